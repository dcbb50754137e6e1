"""Segments against an oracle that builds one sample at a time from the definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_agents.data import (
    BatchSampler,
    Episode,
    MemoryDataset,
    SegmentSpec,
    SegmentView,
    WindowSpec,
)
from mail_agents.errors import InvalidInputError, UnknownNameError


def episode(number: int, length: int, rewards: np.ndarray | None = None) -> Episode:
    rng = np.random.default_rng([number, length])
    return Episode(
        observations={
            "state": rng.normal(size=(length + 1, 2)),
            "camera": rng.integers(1, 256, (length + 1, 2, 3, 3), dtype=np.uint8),
            "say": np.array(["go"] * (length + 1)),
        },
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        rewards=rng.normal(size=length) * 100 if rewards is None else rewards,
        terminations=np.zeros(length, bool),
        truncations=np.zeros(length, bool),
        task=[None, "a", "b"][number % 3],
    )


def zero(array: np.ndarray) -> np.ndarray:
    return np.zeros_like(array)


def oracle(data: MemoryDataset, index: int, start: int, spec: SegmentSpec) -> dict:
    """One sample, step by step, from the table in the SegmentView docstring."""
    ep = data.episode(index)
    rewards = [float(r) for r in ep.rewards]
    if spec.reward_mode == "delayed":
        rewards = [0.0] * (len(ep) - 1) + [float(sum(rewards[::-1]))]
    real = [
        {
            **{f"obs/{key}": array[t] for key, array in ep.observations.items()},
            "action": ep.actions[t],
            "reward": np.float32(rewards[t]),
            "rtg": np.float32(sum(rewards[t:][::-1])),
            "timestep": np.int64(t),
            "mask": np.bool_(True),
        }
        for t in range(start, min(start + spec.length, len(ep)))
    ]
    missing = spec.length - len(real)
    gone = {"mask": np.bool_(False), "reward": np.float32(0)}
    if spec.padding == "right":
        pad = real[-1] | gone | {"action": zero(real[-1]["action"])}
        rows = real + [pad] * missing
    else:
        pad = {key: zero(value)[()] for key, value in real[-1].items()}
        rows = [pad | gone | {"action": zero(pad["action"]) - 10}] * missing + real
    out = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    out["action_mask"] = out["mask"]
    return out | {"task": np.array(-1 if ep.task is None else data.info.tasks.index(ep.task))}


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    length=st.integers(1, 12),
    reward_mode=st.sampled_from(["dense", "delayed"]),
    padding=st.sampled_from(["right", "left_legacy"]),
    data=st.data(),
)
def test_every_segment_equals_the_oracle(lengths, length, reward_mode, padding, data):
    dataset = MemoryDataset([episode(i, n) for i, n in enumerate(lengths)])
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    spec = SegmentSpec(length, reward_mode=reward_mode, padding=padding)
    view = dataset.windows(spec, chosen)
    assert isinstance(view, SegmentView)
    expected = [(index, t) for index in chosen for t in range(lengths[index])]
    assert list(zip(*(a.tolist() for a in view.index), strict=True)) == expected
    assert len(view) == len(expected)
    order = np.array(data.draw(st.permutations(range(len(expected)))))
    batch = view[order]
    for row, i in enumerate(order):
        want = oracle(dataset, *expected[i], spec)
        assert set(batch) == set(want)
        for key, value in want.items():
            found = batch[key][row]
            assert found.dtype == value.dtype, key
            np.testing.assert_array_equal(found, value, err_msg=key)
    single = view[int(order[0])]
    for key, value in batch.items():
        np.testing.assert_array_equal(single[key], value[0])


def test_returns_to_go_of_known_rewards():
    dataset = MemoryDataset([episode(0, 4, np.array([1.0, 2.0, 3.0, 4.0]))])
    assert dataset.episode_returns.tolist() == [10.0]
    first = dataset.windows(SegmentSpec(length=4))[0]
    assert first["rtg"].tolist() == [10, 9, 7, 4]
    assert first["reward"].tolist() == [1, 2, 3, 4]
    delayed = dataset.windows(SegmentSpec(length=4, reward_mode="delayed"))
    assert delayed[0]["rtg"].tolist() == [10, 10, 10, 10]
    assert delayed[0]["reward"].tolist() == [0, 0, 0, 10]
    assert delayed[3]["reward"].tolist() == [10, 0, 0, 0]


def test_returns_are_summed_in_double_precision():
    rewards = np.full(1000, 1.0)
    rewards[-1] = 2.0**24  # adding 1 to this is lost in float32
    dataset = MemoryDataset([episode(0, 1000, rewards)])
    assert dataset.episode_returns[0] == 2.0**24 + 999
    expected = (2.0**24 + 999 - np.arange(1000)).astype(np.float32)
    np.testing.assert_array_equal(dataset.windows(SegmentSpec(1000))[0]["rtg"], expected)


def test_trajectories_are_drawn_by_their_length_and_starts_uniformly():
    dataset = MemoryDataset([episode(0, 1), episode(1, 3)])
    view = dataset.windows(SegmentSpec(length=2))
    sampler = BatchSampler(len(view), batch_size=3, seed=0)
    drawn = np.concatenate([next(sampler) for _ in range(4000)])[:10_000]
    episodes, steps = view.locate(drawn)
    assert np.mean(episodes == 1) == pytest.approx(0.75, abs=0.02)
    starts = np.bincount(steps[episodes == 1]) / np.sum(episodes == 1)
    np.testing.assert_allclose(starts, 1 / 3, atol=0.02)
    last = view[int(np.flatnonzero((view.index.episode == 1) & (view.index.step == 2))[0])]
    assert last["mask"].tolist() == [True, False]


def test_batches_are_copies():
    dataset = MemoryDataset([episode(0, 3)])
    view = dataset.windows(SegmentSpec(length=3))
    before = {key: value.copy() for key, value in view[:].items()}
    changed = view[:]
    for key in set(changed) - {"obs/say"}:
        changed[key][...] = 0
    assert changed["mask"] is not changed["action_mask"]
    for key, value in view[:].items():
        np.testing.assert_array_equal(value, before[key])


def test_only_chosen_keys_are_read():
    dataset = MemoryDataset([episode(0, 3)])
    batch = dataset.windows(SegmentSpec(keys=("state",)))[:]
    assert {key for key in batch if key.startswith("obs/")} == {"obs/state"}
    with pytest.raises(UnknownNameError, match="state"):
        dataset.windows(SegmentSpec(keys=("stat",)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "SegmentSpec.length is 0, expected an integer >= 1"),
        ({"length": True}, "SegmentSpec.length"),
        ({"reward_mode": "sparse"}, "'sparse', expected 'dense' or 'delayed'"),
        ({"padding": "left"}, "'left', expected 'right' or 'left_legacy'"),
    ],
)
def test_bad_specs_are_refused(options, words):
    with pytest.raises(InvalidInputError, match=words):
        SegmentSpec(**options)


def test_windows_and_segments_of_one_dataset_agree():
    """History 1, horizon K: the same steps, but for the padding of actions."""
    dataset = MemoryDataset([episode(i, n) for i, n in enumerate((4, 2))])
    windows = dataset.windows(WindowSpec(1, 3))[:]
    segments = dataset.windows(SegmentSpec(3))[:]
    np.testing.assert_array_equal(windows["action_mask"], segments["mask"])
    np.testing.assert_array_equal(windows["reward"], segments["reward"])
    np.testing.assert_array_equal(windows["rtg"][:, 0], segments["rtg"][:, 0])
    real = segments["mask"]
    np.testing.assert_array_equal(windows["action"][real], segments["action"][real])
