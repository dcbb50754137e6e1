"""Reports say what is in the data."""

import json

import numpy as np
import pytest

from mail_agents.data import MemoryDataset, write_dataset
from mail_agents.data.inspect import dataset_report, format_report, frame_grid
from mail_agents.errors import InvalidInputError, UnknownNameError


def test_report_counts_everything(tmp_path, make_episode):
    episodes = [make_episode(i, 4 + i) for i in range(4)]
    dataset = write_dataset(tmp_path / "s", episodes, name="demo", source={"id": "x"})
    report = dataset_report(dataset)
    json.dumps(report, allow_nan=False)
    assert (report["name"], report["episodes"], report["steps"]) == ("demo", 4, 22)
    assert report["length"] == {"min": 4, "mean": 5.5, "max": 7}
    returns = [e.rewards.sum() for e in episodes]
    assert report["return"]["max"] == pytest.approx(max(returns))
    assert sum(report["return"]["histogram"]) == 4
    assert len(report["return"]["edges"]) == 11
    assert report["success"] == 0.5
    assert report["tasks"] == {"task 0": 1, "task 1": 2, "(no task)": 1}
    assert set(report["features"]) == {"state", "cameras/front", "Say", "say", "action"}
    state = np.concatenate([e.observations["state"][:-1] for e in episodes])
    assert report["features"]["state"]["mean"] == pytest.approx(state.mean())
    assert report["features"]["state"]["nan"] == 0
    assert "mean" not in report["features"]["say"]
    text = format_report(report)
    for word in ("demo", "22 steps", "task 1", "cameras/front", "success 50.0%", "(no task)"):
        assert word in text
    assert text.count("#") > 0


def test_alignment_and_orientation_are_shown_where_they_are_stated(make_episode):
    from dataclasses import replace

    plain = make_episode(0, 3, text=False)
    assert dataset_report(MemoryDataset([plain]))["alignment"] == []
    features = plain.features()
    front = replace(features.observations["cameras/front"], orientation="raw")
    features = replace(features, observations={**features.observations, "cameras/front": front})
    episode = replace(plain, meta={**plain.meta, "alignment": "after_action"})
    report = dataset_report(MemoryDataset([episode], features=features))
    assert report["features"]["cameras/front"]["orientation"] == "raw"
    assert "orientation" not in report["features"]["state"]
    text = format_report(report)
    assert "observations are from after the action beside them" in text
    assert next(line for line in text.splitlines() if "cameras/front" in line).endswith("raw")


def test_nan_is_counted_in_data_made_elsewhere(make_episode):
    dataset = MemoryDataset([make_episode(0, 4)])
    damaged = dataset.column("obs/state").copy()
    damaged[1:3, 0] = np.nan
    dataset._columns["obs/state"] = damaged
    assert dataset_report(dataset)["features"]["state"]["nan"] == 2


def test_constant_returns_have_a_histogram(make_episode):
    from dataclasses import replace

    episode = replace(make_episode(0, 3), rewards=np.zeros(3))
    text = format_report(dataset_report(MemoryDataset([episode])))
    assert "success 0.0%" in text


def test_frame_grid_shows_first_and_last_frames(make_episode):
    episodes = [make_episode(i, 4 + i, text=False) for i in range(3)]
    grid = frame_grid(MemoryDataset(episodes), "cameras/front", episodes=2, frames=3)
    assert grid.shape == (2 * 4, 3 * 5, 3)
    assert grid.dtype == np.uint8
    first, last = (episodes[i].observations["cameras/front"] for i in (0, 2))
    np.testing.assert_array_equal(grid[:4, :5], first[0])
    np.testing.assert_array_equal(grid[:4, 10:], first[-1])
    np.testing.assert_array_equal(grid[4:, 5:10], last[3])
    assert frame_grid(MemoryDataset(episodes), "cameras/front", episodes=9).shape[0] == 12
    with pytest.raises(UnknownNameError, match="cameras/front"):
        frame_grid(MemoryDataset(episodes), "cameras/frnt")
    with pytest.raises(InvalidInputError, match="empty"):
        frame_grid(MemoryDataset(episodes), "cameras/front", frames=0)
