"""The sampler: a permutation per epoch, shared by ranks, resumable anywhere."""

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_agents.data import BatchSampler
from mail_agents.errors import InvalidInputError


@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 12),
    seed=st.integers(0, 5),
    given_before=st.integers(0, 30),
    drop_last=st.booleans(),
)
def test_resuming_continues_with_the_same_batches(n, batch, seed, given_before, drop_last):
    drop_last = drop_last and batch <= n
    straight = BatchSampler(n, batch, seed, drop_last=drop_last)
    expected = list(islice(straight, given_before + 10))
    first = BatchSampler(n, batch, seed, drop_last=drop_last)
    for _ in range(given_before):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    assert set(state) == {"epoch", "position"}
    resumed = BatchSampler(n, batch, seed, drop_last=drop_last)
    resumed.load_state_dict(state)
    for found, want in zip(islice(resumed, 10), expected[given_before:], strict=True):
        np.testing.assert_array_equal(found, want)


@given(n=st.integers(1, 40), batch=st.integers(1, 12), epochs=st.integers(1, 3))
def test_every_epoch_gives_every_sample_once(n, batch, epochs):
    sampler = BatchSampler(n, batch, seed=3)
    for epoch in range(epochs):
        assert sampler.epoch == epoch
        batches = list(islice(sampler, sampler.batches_per_epoch))
        assert sorted(np.concatenate(batches)) == list(range(n))
        assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1)


def test_the_order_depends_on_seed_and_epoch_only():
    def epoch(seed: int, number: int, batch: int) -> list[int]:
        sampler = BatchSampler(100, batch, seed)
        sampler.load_state_dict({"epoch": number, "position": 0})
        return np.concatenate(list(islice(sampler, sampler.batches_per_epoch))).tolist()

    assert epoch(0, 2, 7) == epoch(0, 2, 100)
    assert epoch(0, 2, 7) != epoch(0, 1, 7)
    assert epoch(0, 2, 7) != epoch(1, 2, 7)
    assert epoch(0, 0, 7) != list(range(100))


@given(n=st.integers(1, 50), batch=st.integers(1, 5), world=st.integers(1, 4), drop=st.booleans())
def test_ranks_share_each_global_batch(n, batch, world, drop):
    if drop and n < batch * world:
        return
    single = BatchSampler(n, batch * world, seed=1, drop_last=drop)
    ranks = [
        BatchSampler(n, batch, 1, drop_last=drop, rank=r, world_size=world) for r in range(world)
    ]
    assert {r.batches_per_epoch for r in ranks} == {single.batches_per_epoch}
    for _ in range(single.batches_per_epoch):
        whole = next(single)
        parts = [next(rank) for rank in ranks]
        assert len({len(part) for part in parts}) == 1, "ranks would wait for each other"
        joined = np.concatenate(parts)
        np.testing.assert_array_equal(joined[: len(whole)], whole)
        assert len(joined) - len(whole) < world


def test_without_shuffling_the_order_is_natural_and_the_last_batch_is_kept():
    sampler = BatchSampler(5, 2, seed=0, shuffle=False)
    assert [b.tolist() for b in islice(sampler, 4)] == [[0, 1], [2, 3], [4], [0, 1]]
    sampler = BatchSampler(5, 2, seed=0, shuffle=False, drop_last=True)
    assert [b.tolist() for b in islice(sampler, 3)] == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": 0, "batch_size": 1},
        {"n": 3, "batch_size": 0},
        {"n": 3, "batch_size": 4, "drop_last": True},
        {"n": 3, "batch_size": 1, "rank": 1},
        {"n": 3, "batch_size": 1, "world_size": 0},
    ],
)
def test_impossible_samplers_are_refused(arguments):
    with pytest.raises(InvalidInputError):
        BatchSampler(**arguments, seed=0)


@pytest.mark.parametrize(
    "state", [{"epoch": 0, "position": 3}, {"epoch": -1, "position": 0}, {"epoch": 0}]
)
def test_foreign_states_are_refused(state):
    with pytest.raises(InvalidInputError, match="state"):
        BatchSampler(6, 2, 0).load_state_dict(state)
