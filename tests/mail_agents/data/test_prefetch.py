"""Reading ahead changes when batches are gathered, and nothing else."""

import threading
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toybox.world import demonstrations

from mail_agents.data import BatchSampler, MemoryDataset, WindowSpec
from mail_agents.data.prefetch import Prefetcher

VIEW = MemoryDataset(demonstrations(3), name="toy").windows(WindowSpec(2, 3))


def sampler():
    return BatchSampler(len(VIEW), 5, seed=1)


def same(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


@given(ahead=st.integers(0, 3), taken=st.integers(0, 12))
@settings(deadline=None, max_examples=30)
def test_batches_and_state_are_those_without_it(ahead, taken):
    plain, read = sampler(), sampler()
    with Prefetcher(VIEW, read, ahead) as batches:
        assert batches.state_dict() == plain.state_dict()
        for batch in islice(batches, taken):
            same(batch, VIEW[next(plain)])
            assert batches.state_dict() == plain.state_dict()
    # Closed, the sampler goes on after the last batch that was given, not after the last one read.
    assert read.state_dict() == plain.state_dict()
    np.testing.assert_array_equal(next(read), next(plain))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_have_the_targets_of_one(size):
    n = len(VIEW) - (len(VIEW) - 1) % (4 * size)  # one sample is left for the last batch
    alone, counts = BatchSampler(n, 4 * size, seed=1), []
    teams = [BatchSampler(n, 4, seed=1, rank=rank, world_size=size) for rank in range(size)]
    for _ in range(2 * alone.batches_per_epoch):
        parts = []
        for sampler in teams:
            with Prefetcher(VIEW, sampler, 0) as batches:
                parts.append(next(batches))
        whole = VIEW[next(alone)]
        for key in ("action", "action_mask"):
            found = np.concatenate([part[key] for part in parts])
            rows = len(whole[key])
            np.testing.assert_array_equal(found[:rows], whole[key])
            if key == "action_mask":
                assert not found[rows:].any()
                counts.append(len(found) - rows)
    assert size - 1 in counts
    assert set(counts) <= {0, size - 1}


def test_it_reads_on_while_nobody_asks_but_not_without_end():
    read = []

    def finish(batch):
        read.append(threading.current_thread().name)
        return {**batch, "extra": len(read)}

    with Prefetcher(VIEW, sampler(), 2, finish) as batches:
        assert next(batches)["extra"] == 1
        deadline = time.monotonic() + 10
        while len(read) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(read) == 4  # given, two ready, and one that waits for a place
        assert set(read) == {"prefetch"}


def test_errors_come_up_where_the_batch_is_asked_for():
    def finish(batch):
        if finish.count == 2:
            raise OSError("the disk is gone")
        finish.count += 1
        return batch

    for ahead in (0, 2):
        finish.count = 0
        batches = Prefetcher(VIEW, sampler(), ahead, finish)
        next(batches)
        next(batches)
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_closing_ends_the_thread_even_when_it_waits():
    before = threading.active_count()
    batches = Prefetcher(VIEW, sampler())
    assert threading.active_count() == before + 1
    batches.close()
    batches.close()
    assert threading.active_count() == before
