"""Demonstration files in the layout of robomimic and LIBERO."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import mail_agents
from mail_agents.data.sim_states import narrow_states
from mail_agents.data.store import StoreWriter
from mail_agents.data.windows import WindowSpec
from mail_agents.errors import CorruptFileError, InvalidInputError
from mail_wrappers.datasets.robomimic import convert_demos, read_demos

STEPS = 7


def write_file(
    path: Path, demos: int = 2, change: Callable[[h5py.File], Any] = lambda file: None
) -> Path:
    """A tiny file with what LIBERO's ``create_dataset.py`` writes."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(demos):
            group = file.create_group(f"data/demo_{number}")
            group.attrs["num_samples"] = STEPS
            group["actions"] = rng.uniform(-1, 1, (STEPS, 7))
            group["states"] = np.full((STEPS, 5), float(number))
            group["robot_states"] = rng.random((STEPS, 9))
            group["rewards"] = group["dones"] = np.eye(STEPS, dtype=np.uint8)[-1]
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                group[f"obs/{camera}"] = rng.integers(0, 256, (STEPS, 8, 8, 3), dtype=np.uint8)
            group["obs/ee_pos"] = rng.random((STEPS, 3))
        change(file)
    return path


def test_reads_what_is_stored(tmp_path: Path) -> None:
    path = write_file(tmp_path / "pick_up_the_milk_demo.hdf5")
    episodes = list(read_demos(path))
    with h5py.File(path) as file:
        for number, episode in enumerate(episodes):
            group = file[f"data/demo_{number}"]
            assert np.array_equal(episode.actions, group["actions"])
            for key in ("agentview_rgb", "eye_in_hand_rgb", "ee_pos"):
                assert np.array_equal(episode.observations[key][:-1], group[f"obs/{key}"])
                assert episode.observations[key].dtype == group[f"obs/{key}"].dtype
                assert np.array_equal(episode.observations[key][-1], group[f"obs/{key}"][-1])
            assert np.array_equal(narrow_states(episode.infos["states"]), group["states"])
            assert episode.terminations.tolist() == [False] * (STEPS - 1) + [True]
            assert not episode.truncations.any()
            assert episode.task == "pick_up_the_milk"
            assert episode.success is True
            assert episode.meta["final_observation"] == "repeated"


def test_next_observations_give_the_final_one(tmp_path: Path) -> None:
    def add(file: h5py.File) -> None:
        for key, array in file["data/demo_0/obs"].items():
            file[f"data/demo_0/next_obs/{key}"] = np.asarray(array)[::-1].copy()

    path = write_file(tmp_path / "lift.hdf5", 1, add)
    (episode,) = read_demos(path)
    assert np.array_equal(episode.observations["ee_pos"][-1], episode.observations["ee_pos"][0])
    assert "final_observation" not in episode.meta


def test_demos_are_counted_in_numerical_order(tmp_path: Path) -> None:
    path = write_file(tmp_path / "task_demo.hdf5", 12)
    ids = [episode.meta["source_id"] for episode in read_demos(path, demos=11)]
    assert ids == [f"task/demo_{i}" for i in range(11)]
    legacy = [e.meta["source_id"] for e in read_demos(path, demos=3, selection="mail_legacy")]
    assert legacy == ["task/demo_0", "task/demo_1", "task/demo_4"]


def test_a_folder_becomes_a_store_that_trains(tmp_path: Path) -> None:
    folder = tmp_path / "libero_tiny"
    folder.mkdir()
    for task in ("b_demo", "a_demo"):
        write_file(folder / f"{task}.hdf5")
    dataset = convert_demos(folder, tmp_path / "store")
    assert dataset.info.tasks == ("a", "b")
    assert len(dataset) == 4
    view = mail_agents.open_dataset(tmp_path / "store").windows(WindowSpec(5, 2, "none"))
    assert len(view) == 4 * (STEPS - 6 + 1)
    batch = view[np.arange(len(view))]
    assert batch["obs/agentview_rgb"].shape == (8, 5, 8, 8, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("data"), "group /data is missing"),
        (lambda f: f["data/demo_1"].pop("actions"), r"array /data/demo_1/actions is missing .*obs"),
        (lambda f: f["data/demo_1"].pop("obs"), "group /data/demo_1/obs is missing"),
    ],
)
def test_missing_parts(tmp_path: Path, change: Any, message: str) -> None:
    path = write_file(tmp_path / "task_demo.hdf5", change=change)
    with pytest.raises(CorruptFileError, match=message) as caught:
        list(read_demos(path))
    assert str(path) in str(caught.value)


def shorten(file: h5py.File, name: str) -> None:
    rows = np.asarray(file[name])[:-2]
    del file[name]
    file[name] = rows


def spoil(file: h5py.File) -> None:
    file["data/demo_1/actions"][3, 0] = np.nan


def text(file: h5py.File) -> None:
    del file["data/demo_0/actions"]
    file["data/demo_0/actions"] = ["a"] * STEPS


def scalar(file: h5py.File) -> None:
    del file["data/demo_0/actions"]
    file["data/demo_0/actions"] = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scalar, "actions is a single value, expected one per step"),
        (lambda f: shorten(f, "data/demo_1/obs/ee_pos"), "ee_pos has 5 rows, actions have 7"),
        (lambda f: shorten(f, "data/demo_0/rewards"), "rewards has 5 rows"),
        (spoil, r"demo_1: 'actions' is not finite .*step 3"),
        (text, "actions holds object, expected numbers"),
        (lambda f: shorten(f, "data/demo_1/actions"), "has 7 rows, actions have 5"),
    ],
)
def test_broken_values(tmp_path: Path, change: Any, message: str) -> None:
    path = write_file(tmp_path / "task_demo.hdf5", change=change)
    with pytest.raises(CorruptFileError, match=message) as caught:
        list(read_demos(path))
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused_and_leaves_no_store(tmp_path: Path) -> None:
    path = write_file(tmp_path / "task_demo.hdf5")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CorruptFileError, match=r"task_demo\.hdf5 is not a complete HDF5 file"):
        convert_demos(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_conversion_is_continued_with_the_same_content_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_file(tmp_path / "task_demo.hdf5", 3)
    add = StoreWriter.add

    def interrupted(self: StoreWriter, *arguments: Any) -> None:
        if len(self):
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_demos(path, tmp_path / "store")
    original = path.read_bytes()
    write_file(path, 2)
    with pytest.raises(InvalidInputError, match="unfinished conversion of something else"):
        convert_demos(path, tmp_path / "store")
    path.write_bytes(original)
    dataset = convert_demos(path, tmp_path / "store")
    assert len(dataset) == 3
    assert dataset.info.source["files"] == [
        {
            "name": "task_demo.hdf5",
            "bytes": len(original),
            "sha256": hashlib.sha256(original).hexdigest(),
        }
    ]


def test_an_existing_store_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = write_file(tmp_path / "task_demo.hdf5", 3)
    convert_demos(path, tmp_path / "store")
    write_file(path, 1)
    with pytest.raises(InvalidInputError, match="--overwrite"):
        convert_demos(path, tmp_path / "store")
    assert len(convert_demos(path, tmp_path / "store", overwrite=True)) == 1


def test_an_empty_folder_and_too_many_demos(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="nowhere does not exist"):
        convert_demos(tmp_path / "nowhere", tmp_path / "store")
    with pytest.raises(InvalidInputError, match=r"holds no \.hdf5 files"):
        list(read_demos(tmp_path))
    write_file(tmp_path / "task_demo.hdf5")
    with pytest.raises(InvalidInputError, match="3 demonstrations requested, the file has 2"):
        list(read_demos(tmp_path, demos=3))
