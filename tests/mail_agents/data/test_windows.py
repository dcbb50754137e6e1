"""Windows against an oracle that builds one sample at a time from the definition."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_agents.data import Episode, MemoryDataset, WindowSpec, views
from mail_agents.errors import InvalidInputError, UnknownNameError


def episode(number: int, length: int) -> Episode:
    rng = np.random.default_rng([number, length])
    return Episode(
        observations={
            "state": rng.normal(size=(length + 1, 2)),
            "camera": rng.integers(0, 256, (length + 1, 2, 3, 3), dtype=np.uint8),
        },
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        rewards=rng.normal(size=length) * 100,
        terminations=np.zeros(length, bool),
        truncations=np.zeros(length, bool),
        task=[None, "a", "b"][number % 3],
    )


def oracle(data: MemoryDataset, index: int, t: int, history: int, horizon: int) -> dict:
    """One sample, step by step, from the table in the WindowView docstring."""
    ep = data.episode(index)
    past = list(range(t - history + 1, t + 1))
    ahead = list(range(t, t + horizon))
    last = len(ep) - 1
    rtg = [sum(map(float, ep.rewards[max(s, 0) :][::-1]), 0.0) for s in past]
    return {
        "obs/state": np.stack([ep.observations["state"][max(s, 0)] for s in past]),
        "obs/camera": np.stack([ep.observations["camera"][max(s, 0)] for s in past]),
        "action": np.stack([ep.actions[min(s, last)] for s in ahead]),
        "past_action": np.array(
            [ep.actions[s] if s >= 0 else np.zeros(2) for s in past[:-1]], np.float32
        ).reshape(history - 1, 2),
        "reward": np.array([ep.rewards[s] if s <= last else 0 for s in ahead], np.float32),
        "rtg": np.array(rtg, np.float32),
        "timestep": np.array([max(s, 0) for s in past]),
        "mask": np.array([s >= 0 for s in past]),
        "action_mask": np.array([s <= last for s in ahead]),
        "task": np.array(-1 if ep.task is None else data.info.tasks.index(ep.task)),
    }


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    history=st.integers(1, 5),
    horizon=st.integers(1, 5),
    padding=st.sampled_from(["edge", "none"]),
    data=st.data(),
)
def test_every_window_equals_the_oracle(lengths, history, horizon, padding, data):
    dataset = MemoryDataset([episode(i, n) for i, n in enumerate(lengths)])
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    expected = []
    for index in chosen:
        n = lengths[index]
        steps = range(n) if padding == "edge" else range(history - 1, n - horizon + 1)
        expected += [(index, t) for t in steps]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        view = dataset.windows(WindowSpec(history, horizon, padding), chosen)
    assert list(zip(*(a.tolist() for a in view.index), strict=True)) == expected
    assert len(view) == len(expected)
    if not expected:
        return
    order = np.array(data.draw(st.permutations(range(len(expected)))))
    batch = view[order]
    for row, i in enumerate(order):
        want = oracle(dataset, *expected[i], history, horizon)
        assert set(batch) == set(want)
        for key, value in want.items():
            found = batch[key][row]
            assert found.dtype == value.dtype, key
            np.testing.assert_array_equal(found, value, err_msg=key)


@pytest.mark.parametrize(("history", "horizon", "count"), [(5, 5, 92), (1, 5, 96), (5, 10, 87)])
def test_unpadded_window_counts_of_the_mail_paper(history, horizon, count):
    dataset = MemoryDataset([episode(0, 100)])
    view = dataset.windows(WindowSpec(history, horizon, "none"))
    assert len(view) == count
    first = view[0]
    actions = dataset.episode(0).actions
    np.testing.assert_array_equal(first["action"][0], actions[history - 1])
    np.testing.assert_array_equal(
        first["obs/state"][0], dataset.episode(0).observations["state"][0]
    )
    assert first["mask"].all()
    assert first["action_mask"].all()


def test_short_episodes_are_skipped_with_a_warning():
    dataset = MemoryDataset([episode(0, 100), episode(1, 8)])
    with pytest.warns(UserWarning, match=r"1 of 2 episodes are shorter.*episode 1.*'edge'"):
        view = dataset.windows(WindowSpec(5, 5, "none"))
    assert len(view) == 92
    assert len(dataset.windows(WindowSpec(5, 5, "edge"))) == 108


def test_all_episodes_too_short_gives_an_empty_view():
    dataset = MemoryDataset([episode(0, 3)])
    with pytest.warns(UserWarning, match="shorter"):
        view = dataset.windows(WindowSpec(4, 4, "none"))
    assert len(view) == 0
    with pytest.raises(IndexError):
        view[0]


def test_return_to_go_is_summed_in_float64():
    rewards = np.ones(1000)
    rewards[-1] = 2.0**24  # ones vanish beside it in float32
    ep = episode(0, 1000)
    ep = Episode(ep.observations, ep.actions, rewards, ep.terminations, ep.truncations)
    rtg = MemoryDataset([ep]).windows(WindowSpec())[:]["rtg"][:, 0]
    expected = (2.0**24 + 999 - np.arange(1000)).astype(np.float32)
    np.testing.assert_array_equal(rtg, expected)


def test_only_history_frames_are_read(monkeypatch):
    dataset = MemoryDataset([episode(0, 50)])
    view = dataset.windows(WindowSpec(history=2, horizon=16))
    read = []
    gather = views.gather_rows

    def spy(array, rows):
        if array.ndim == 4:
            read.append(rows.size)
        return gather(array, rows)

    monkeypatch.setattr(views, "gather_rows", spy)
    view[np.arange(8)]
    assert read == [16]


def test_large_and_small_rows_are_gathered_alike():
    rows = np.array([[2, 0], [1, 1]])
    for width in (3, 5000):
        array = np.arange(4 * width, dtype=np.uint8).reshape(4, width)
        np.testing.assert_array_equal(views.gather_rows(array, rows), array[rows])


def test_keys_limit_what_is_read():
    dataset = MemoryDataset([episode(0, 5)])
    batch = dataset.windows(WindowSpec(keys=("state",)))[:]
    assert [key for key in batch if key.startswith("obs/")] == ["obs/state"]
    with pytest.raises(UnknownNameError, match="Did you mean 'state'"):
        dataset.windows(WindowSpec(keys=("stat",)))


def test_indexing_follows_numpy():
    dataset = MemoryDataset([episode(0, 5), episode(1, 4)])
    view = dataset.windows(WindowSpec(3, 2))
    whole = view[:]
    for item in (
        slice(2, 7),
        [1, 8],
        np.array([-1, 0]),
        np.arange(9) % 2 == 0,
        slice(None, None, -2),
    ):
        part = view[item]
        for key in whole:
            np.testing.assert_array_equal(part[key], whole[key][item])
    one = view[-2]
    assert one["obs/state"].shape == (3, 2)
    np.testing.assert_array_equal(one["obs/state"], whole["obs/state"][-2])
    assert view[[]]["action"].shape == (0, 2, 2)
    for bad in (9, -10, [0, 9]):
        with pytest.raises(IndexError, match="9 samples"):
            view[bad]
    with pytest.raises(IndexError):
        view[np.array([0.5])]


def test_a_batch_may_be_written_to():
    dataset = MemoryDataset([episode(0, 5)])
    before = dataset.column("action").copy()
    batch = dataset.windows(WindowSpec())[:]
    batch["action"] += 1
    np.testing.assert_array_equal(dataset.column("action"), before)
    with pytest.raises(ValueError, match="read-only"):
        dataset.column("action")[0] = 0


@pytest.mark.parametrize(
    "options", [{"history": 0}, {"horizon": -1}, {"history": 1.5}, {"padding": "zero"}]
)
def test_invalid_specs_are_refused(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        WindowSpec(**options)


@pytest.mark.parametrize("episodes", [[2], [-1], [0, 0], [[0]], [0.5]])
def test_invalid_choices_of_episodes_are_refused(episodes):
    dataset = MemoryDataset([episode(0, 5), episode(1, 5)])
    with pytest.raises(InvalidInputError):
        dataset.windows(WindowSpec(), episodes)
