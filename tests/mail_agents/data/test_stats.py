"""Streamed statistics against NumPy on the whole array."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mail_agents.data import Episode, FeatureStats, MemoryDataset, stats
from mail_agents.data.stats import RunningMoments, feature_stats
from mail_agents.errors import InvalidInputError, UnknownNameError

FIELDS = ("mean", "std", "min", "max", "q01", "q99")


def reference(flat: np.ndarray) -> dict[str, np.ndarray]:
    flat = flat.astype(np.float64)
    return {
        "mean": flat.mean(0),
        "std": flat.std(0),
        "min": flat.min(0),
        "max": flat.max(0),
        "q01": np.quantile(flat, 0.01, axis=0),
        "q99": np.quantile(flat, 0.99, axis=0),
    }


@given(
    rows=hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 60), st.integers(1, 3)),
        elements=st.floats(-1e6, 1e6, width=32),
    ),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_merged_moments_equal_one_pass(rows, cuts):
    moments = RunningMoments(rows.shape[1])
    for part in np.split(rows, sorted(min(c, len(rows)) for c in cuts)):
        moments.update(part)
    assert moments.count == len(rows)
    scale = np.abs(rows).max() + 1
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(moments.std, rows.std(0), rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_array_equal(moments.min, rows.min(0))
    np.testing.assert_array_equal(moments.max, rows.max(0))


def test_large_offsets_do_not_cancel(monkeypatch):
    monkeypatch.setattr(stats, "_BLOCK_BYTES", 256)
    rng = np.random.default_rng(0)
    array = (1e9 + rng.normal(size=(5000, 1))).astype(np.float64)
    found = feature_stats(array, np.arange(5000), "state")
    np.testing.assert_allclose(found.std, array.std(0), rtol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, bool])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_low_dimensional_features_match_numpy(monkeypatch, dtype, shape):
    monkeypatch.setattr(stats, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(stats, "_QUANTILE_BYTES", 8 * 400)  # two columns at a time
    rng = np.random.default_rng(1)
    array = (rng.normal(size=(300, *shape)) * 5).astype(dtype)
    rows = np.arange(17, 211)
    found = feature_stats(array, rows, "state" if shape else "scalar")
    for name, want in reference(array[rows]).items():
        value = getattr(found, name)
        assert value.dtype == np.float64
        assert value.shape == shape
        np.testing.assert_allclose(value, want, rtol=1e-12, atol=1e-12, err_msg=name)
    assert found.count == len(rows)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.just(3), st.just(2), st.just(3))))
def test_image_statistics_are_exact_per_channel(array):
    found = feature_stats(array, np.arange(len(array)), "image")
    for name, want in reference(array.reshape(-1, 3)).items():
        assert getattr(found, name).shape == (3,)
        np.testing.assert_allclose(getattr(found, name), want, rtol=1e-12, atol=1e-9, err_msg=name)
    assert found.count == array.size // 3


def test_point_clouds_are_reduced_per_coordinate():
    array = np.random.default_rng(0).normal(size=(20, 16, 3)).astype(np.float32)
    found = feature_stats(array, np.arange(20), "pointcloud")
    for name, want in reference(array.reshape(-1, 3)).items():
        np.testing.assert_allclose(getattr(found, name), want, rtol=1e-9, atol=1e-9)


def test_statistics_cover_the_chosen_episodes_and_leave_out_final_observations(make_episode):
    episodes = [make_episode(i, 4 + i) for i in range(4)]
    dataset = MemoryDataset(episodes)
    found = dataset.stats([3, 1])
    assert set(found) == {"state", "cameras/front", "action"}
    parts = [episodes[3], episodes[1]]
    for key, arrays in {
        "state": [e.observations["state"][:-1] for e in parts],
        "action": [e.actions for e in parts],
    }.items():
        for name, want in reference(np.concatenate(arrays)).items():
            np.testing.assert_allclose(getattr(found[key], name), want, rtol=1e-12, atol=1e-12)
        assert found[key].count == len(episodes[3]) + len(episodes[1])
    assert found["cameras/front"].mean.shape == (3,)
    everything = dataset.stats()
    assert everything["action"].count == dataset.info.n_steps
    assert set(dataset.stats(keys=["action"])) == {"action"}


def test_statistics_that_make_no_sense_are_refused(make_episode):
    dataset = MemoryDataset([make_episode(0, 3)])
    with pytest.raises(InvalidInputError, match="at least one episode"):
        dataset.stats([])
    with pytest.raises(UnknownNameError, match="feature with statistics 'Say'"):
        dataset.stats(keys=["Say"])
    with pytest.raises(InvalidInputError, match="undefined"):
        feature_stats(np.array(["a"]), np.arange(1), "text")


def test_json_round_trip_is_exact():
    array = np.random.default_rng(0).normal(size=(50, 3))
    found = feature_stats(array, np.arange(50), "state")
    again = FeatureStats.from_dict(json.loads(json.dumps(found.to_dict())))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(again, name))
    assert again.count == 50


def test_store_keeps_the_statistics_of_all_episodes(tmp_path, make_episode):
    from mail_agents.data import write_dataset

    episodes: list[Episode] = [make_episode(i, 4 + i) for i in range(3)]
    stored = write_dataset(tmp_path / "s", episodes).stats()
    fresh = MemoryDataset(episodes).stats()
    assert set(stored) == set(fresh)
    for key, item in fresh.items():
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(stored[key], name), getattr(item, name))
