"""Files of LIBERO and robomimic: written as upstream writes them, and nothing lost on the way."""

import importlib
import inspect
import json
import shutil
import tomllib
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest

from mail_agents.data import Episode, MemoryDataset, open_dataset, write_dataset
from mail_agents.data.sim_states import narrow_states
from mail_agents.errors import InvalidInputError, StorageError
from mail_agents.replay import replay_dataset
from mail_wrappers import RecordEpisodes
from mail_wrappers.datasets import robomimic_export
from mail_wrappers.datasets.robomimic import convert_demos, write_libero, write_robomimic


def contents(path: Path) -> dict[str, tuple[str, bytes]]:
    """Every array of a file, with its dtype."""
    found = {}

    def visit(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = (item.dtype.str, item[()].tobytes())

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def record(arm, milk: str, orientation: str = "raw", **extra):
    """Two recorded episodes of the fake LIBERO world."""
    env = RecordEpisodes(arm(orientation=orientation), task=milk)
    for seed in (3, 4):
        env.reset(seed=seed)
        ended = False
        while not ended:
            *_, ended, _, _ = env.step(np.full(7, 0.3, np.float32))
    kwargs = {"cameras": ["agentview", "eye_in_hand"], "orientation": orientation}
    spec = {"id": f"mail_envs:libero_object/{milk}", "kwargs": kwargs}
    features = env.features
    return MemoryDataset(
        env.episodes, "demo", {milk: spec}, features=features, **extra
    ), env.episodes


def test_a_published_file_comes_back_array_by_array(tmp_path, demo_files, arm, same_episode):
    path = demo_files.libero(tmp_path / "libero_object" / f"{demo_files.milk}_demo.hdf5", 12)
    dataset = convert_demos(path.parent, tmp_path / "store")
    written = write_libero(dataset, tmp_path / "out" / "libero_object") / path.name
    assert contents(written) == contents(path)
    with h5py.File(path) as ours, h5py.File(written) as theirs:
        kept = {k: v for k, v in theirs["data"].attrs.items() if k != "mail_agents"}
        assert kept == dict(ours["data"].attrs)
        assert list(theirs["data"]) == list(ours["data"])
        for name, demo in ours["data"].items():
            copy = theirs[f"data/{name}"].attrs
            assert copy["num_samples"] == demo.attrs["num_samples"]
            assert np.array_equal(copy["init_state"], demo.attrs["init_state"])
            # The simulator's, which is in the state that the demonstration begins with.
            assert copy["model_file"] == f"<mujoco model='{demo['states'][0, 0]:.3f}'/>"
    again = convert_demos(written.parent, tmp_path / "again")
    assert again.info.env_specs == dataset.info.env_specs
    assert again.features == dataset.features
    for i in range(len(dataset)):
        same_episode(dataset.episode(i), again.episode(i))


def test_a_recording_is_written_in_liberos_layout(tmp_path, demo_files, arm):
    dataset, (episode, _) = record(arm, demo_files.milk)
    folder = write_libero(dataset, tmp_path / "libero_object")
    length = len(episode)
    with h5py.File(folder / f"{demo_files.milk}_demo.hdf5") as file:
        data = file["data"]
        assert (data.attrs["num_demos"], data.attrs["total"]) == (2, dataset.info.n_steps)
        assert data.attrs["env_name"] == "Libero_Arm"
        args = json.loads(data.attrs["env_args"])
        assert args["type"] == 1
        assert args["env_kwargs"] == {
            "use_camera_obs": True,
            "has_offscreen_renderer": True,
            "camera_depths": False,
            "camera_names": ["agentview", "robot0_eye_in_hand"],
            "camera_heights": 8,
            "camera_widths": 8,
            "control_freq": 20,
        }
        assert json.loads(data.attrs["problem_info"]) == {"problem_name": "arm"}
        assert data.attrs["bddl_file_content"] == "(define arm)"
        assert data.attrs["bddl_file_name"] == f"bddl_files/{demo_files.milk}.bddl"
        assert data.attrs["macros_image_convention"] == "opengl"
        assert data.attrs["tag"] == "libero-v1"
        demo = data["demo_0"]
        assert demo.attrs["num_samples"] == length
        assert np.array_equal(demo.attrs["init_state"], narrow_states(episode.infos["states"])[0])
        assert demo.attrs["model_file"].startswith("<mujoco")
        dtypes = {name: array.dtype.str for name, array in demo.items() if name != "obs"}
        assert dtypes == {
            "actions": "<f8",
            "states": "<f8",
            "robot_states": "<f8",
            "rewards": "|u1",
            "dones": "|u1",
        }
        assert np.array_equal(demo["actions"], episode.actions.astype(np.float64))
        # States before the action, observations after it.
        assert np.array_equal(demo["states"], narrow_states(episode.infos["states"])[:-1])
        for key, values in episode.observations.items():
            assert np.array_equal(demo[f"obs/{key}"], values[1:])
            assert demo[f"obs/{key}"].dtype == values.dtype
        assert demo["rewards"][()].tolist() == demo["dones"][()].tolist()
        assert demo["dones"][()].tolist() == [0] * (length - 1) + [1]


def test_a_recording_comes_back_from_liberos_layout(tmp_path, demo_files, arm):
    source = {"env_kwargs": {"success_hold": 3}}
    dataset, episodes = record(arm, demo_files.milk, source=source)
    folder = write_libero(dataset, tmp_path / "libero_object")
    back = convert_demos(folder, tmp_path / "stored")
    assert back.info.env_specs == dataset.info.env_specs
    assert back.info.source["recorded_with"] == {demo_files.milk: {"success_hold": 3}}
    causal = convert_demos(folder, tmp_path / "causal", align="causal")
    for i, episode in enumerate(episodes):
        found = back.episode(i)
        assert (found.seed, found.task) == (episode.seed, episode.task)
        assert np.array_equal(found.actions, episode.actions)
        shifted = causal.episode(i)
        assert shifted.seed is None  # it leads to the step before
        assert np.array_equal(shifted.actions, episode.actions[1:])
        for key, values in episode.observations.items():
            assert np.array_equal(found.observations[key][:-1], values[1:])
            assert np.array_equal(shifted.observations[key], values[1:])
    assert all(replayed.ok for replayed in replay_dataset(back, 2))
    again = write_libero(back, tmp_path / "again")
    name = f"{demo_files.milk}_demo.hdf5"
    assert contents(again / name) == contents(folder / name)


@pytest.mark.parametrize("orientation", ["upright", "rot180"])
def test_images_are_turned_to_liberos_orientation(tmp_path, demo_files, arm, orientation):
    raw, _ = record(arm, demo_files.milk)
    turned, _ = record(arm, demo_files.milk, orientation)
    name = f"{demo_files.milk}_demo.hdf5"
    ours = contents(write_libero(raw, tmp_path / "a") / name)
    assert ours == contents(write_libero(turned, tmp_path / "b") / name)
    back = convert_demos(tmp_path / "b", tmp_path / "store")
    assert back.features.observations["agentview_rgb"].orientation == "raw"
    assert back.info.env_specs[demo_files.milk]["kwargs"]["orientation"] == "raw"


def test_robot_states_have_the_hands_quaternion(demo_files, arm):
    transform = pytest.importorskip("robosuite.utils.transform_utils")
    dataset, _ = record(arm, demo_files.milk)
    quaternions = np.random.default_rng(0).normal(size=(4, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    quaternions[0] = [0, 0, 0, 1]
    assert (quaternions[:, 3] < 0).any()
    episode = dataset.episode(0)
    turns = np.stack([transform.quat2axisangle(q.copy()) for q in quaternions])
    rows = {key: np.resize(values, (4, 3)) for key, values in episode.observations.items()}
    rows = {**rows, "gripper_states": rows["ee_pos"][:, :2], "ee_ori": turns}
    made = robomimic_export._robot_states(
        0, Episode(rows, np.zeros((3, 7)), np.zeros(3), np.zeros(3), np.zeros(3))
    )
    assert np.allclose(made[:, 5:], quaternions, atol=1e-12)
    assert np.array_equal(made[:, :5], np.hstack([rows["gripper_states"], rows["ee_pos"]]))


def test_a_file_of_robomimic_comes_back_array_by_array(tmp_path, demo_files, monkeypatch):
    path = demo_files.robosuite(tmp_path / "in" / "image.hdf5")
    with h5py.File(path, "a") as file:
        file["data"].attrs["names"] = np.array(["a", "bc"], h5py.string_dtype())
        file["data"].attrs["gains"] = np.arange(3.0)
    dataset = convert_demos(path, tmp_path / "store")

    class Lift(gymnasium.Env):
        def reset(self, *, seed=None, options=None):
            return {}, {}

        def model_xml(self):
            return "<mujoco/>"

    monkeypatch.setattr(gymnasium, "make", lambda *_, **__: Lift())
    written = write_robomimic(dataset, tmp_path / "out") / "Lift_demo.hdf5"
    assert contents(written) == contents(path)
    with h5py.File(written) as file, h5py.File(path) as original:
        assert file["data"].attrs["env_args"] == original["data"].attrs["env_args"]
        assert file["data"].attrs["names"].tolist() == ["a", "bc"]
        assert file["data"].attrs["gains"].tolist() == [0, 1, 2]
        assert file["data/demo_0"].attrs["model_file"] == "<mujoco/>"
    back = convert_demos(written, tmp_path / "back")
    assert back.info.env_specs == dataset.info.env_specs
    assert back.features == dataset.features


def test_any_recording_becomes_a_file_of_robomimic_and_comes_back(
    tmp_path, point_dataset, same_episode
):
    dataset = open_dataset(point_dataset)
    folder = write_robomimic(dataset, tmp_path / "files")
    with h5py.File(folder / "point_demo.hdf5") as file:
        assert json.loads(file["data"].attrs["env_args"]) == {
            "env_name": "toybox:toybox/Point-v0",
            "type": 2,
            "env_kwargs": {},
        }
        assert "states" not in file["data/demo_0"]
    back = convert_demos(folder, tmp_path / "store")
    assert back.info.env_specs == dataset.info.env_specs
    assert back.features == dataset.features
    for i in range(len(dataset)):
        ours, theirs = dataset.episode(i), back.episode(i)
        theirs.meta.pop("source_id")  # type: ignore[attr-defined]
        same_episode(ours, theirs)


def test_what_liberos_layout_cannot_hold_is_refused(tmp_path, demo_files, arm, point_dataset):
    with pytest.raises(InvalidInputError, match=r"'toybox:.*to?.*robomimic"):
        write_libero(open_dataset(point_dataset), tmp_path / "out")
    dataset, episodes = record(arm, demo_files.milk)
    spec = dict(dataset.info.env_specs)

    def changed(**parts):
        first = vars(episodes[0])
        return MemoryDataset([Episode(**{**first, **parts})], "x", spec, features=features)

    features = dataset.features
    for parts, message in (
        ({"infos": {}}, "no simulator states"),
        ({"rewards": np.full(len(episodes[0]), 0.5)}, "rewards other than 0 and 1"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            write_libero(changed(**parts), tmp_path / "out")
    features = None  # nothing says which way up the images are
    with pytest.raises(InvalidInputError, match="Which way up"):
        write_libero(changed(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_a_world_that_cannot_be_made_is_named(tmp_path, demo_files, monkeypatch):
    path = demo_files.libero(tmp_path / f"{demo_files.milk}_demo.hdf5")
    dataset = convert_demos(path, tmp_path / "store")

    def fail(*_, **__):
        raise ImportError("no meshes")

    monkeypatch.setattr(gymnasium, "make", fail)
    with pytest.raises(InvalidInputError, match=r"libero_object/.* cannot be made here: no meshes"):
        write_libero(dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_text_is_refused(tmp_path, demo_files, arm, point_dataset):
    dataset, _ = record(arm, demo_files.milk)
    (tmp_path / "out").mkdir()
    write_libero(dataset, tmp_path / "out")
    with pytest.raises(InvalidInputError, match="exists already"):
        write_libero(dataset, tmp_path / "out")
    episode = next(iter([open_dataset(point_dataset).episode(0)]))
    for observations, message in (
        ({"say": np.array(["a"] * (len(episode) + 1))}, "'say' is text"),
        ({"a/b": np.zeros((len(episode) + 1, 2))}, "'a/b' is nested"),
    ):
        words = MemoryDataset([Episode(**{**vars(episode), "observations": observations})])
        with pytest.raises(InvalidInputError, match=message):
            write_robomimic(words, tmp_path / "words")


def test_two_tasks_of_one_file_name_and_mixed_alignments_are_refused(tmp_path, point_dataset):
    episode = open_dataset(point_dataset).episode(0)
    parts = vars(episode)
    twins = MemoryDataset([Episode(**{**parts, "task": t}) for t in ("a/x", "b/x")])
    with pytest.raises(InvalidInputError, match=r"written to x_demo\.hdf5"):
        write_robomimic(twins, tmp_path / "out")
    after = Episode(**{**parts, "meta": {"alignment": "after_action"}})
    with pytest.raises(InvalidInputError, match="Write two datasets"):
        write_robomimic(MemoryDataset([episode, after]), tmp_path / "out")


def test_a_recording_without_images_does_not_claim_cameras(tmp_path, demo_files, arm):
    _, episodes = record(arm, demo_files.milk)
    blind = [
        Episode(
            **{
                **vars(episode),
                "observations": {k: v for k, v in episode.observations.items() if v.ndim == 2},
            }
        )
        for episode in episodes
    ]
    spec = {demo_files.milk: {"id": f"mail_envs:libero_object/{demo_files.milk}"}}
    with pytest.warns(UserWarning, match=r"has no images.*--cameras"):
        folder = write_libero(MemoryDataset(blind, "blind", spec), tmp_path / "out")
    with h5py.File(folder / f"{demo_files.milk}_demo.hdf5") as file:
        kwargs = json.loads(file["data"].attrs["env_args"])["env_kwargs"]
    assert kwargs["camera_names"] == []
    assert (kwargs["use_camera_obs"], kwargs["has_offscreen_renderer"]) == (False, False)


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_an_error_of_the_world_is_not_one_of_the_disk(
    tmp_path, demo_files, arm, monkeypatch, error
):
    dataset, _ = record(arm, demo_files.milk)

    def fail(*_):
        raise error("mesh")

    monkeypatch.setattr(type(arm()), "model_xml", fail)
    with pytest.raises(InvalidInputError, match=r"Episode 0 cannot be started again .* mesh"):
        write_libero(dataset, tmp_path / "out")
    monkeypatch.setattr(type(dataset), "episode", fail)
    with pytest.raises(error, match=r"^mesh"):
        write_libero(dataset, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_disk_that_fills_up_while_writing_is_told(tmp_path, demo_files, arm, monkeypatch):
    dataset, _ = record(arm, demo_files.milk)

    def full(*_):
        raise OSError("No space left")

    monkeypatch.setattr(h5py.Group, "__setitem__", full)
    with pytest.raises(StorageError, match="nothing was put there: No space left"):
        write_libero(dataset, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_leaves_nothing(tmp_path, demo_files, arm, monkeypatch):
    dataset, _ = record(arm, demo_files.milk)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="nothing was put there"):
        write_libero(dataset, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_two_cameras_go_through_minari_and_back(tmp_path, demo_files, same_episode):
    pytest.importorskip("minari")
    from mail_wrappers.datasets.minari import convert_minari, write_minari

    path = demo_files.libero(tmp_path / f"{demo_files.milk}_demo.hdf5")
    dataset = convert_demos(path, tmp_path / "store")
    write_minari(dataset, "mine/libero-v0")
    back = convert_minari("mine/libero-v0", tmp_path / "back")
    assert back.features == dataset.features
    assert back.info.env_specs == dataset.info.env_specs
    assert back.info.tasks == dataset.info.tasks
    for i in range(len(dataset)):
        same_episode(dataset.episode(i), back.episode(i))


def test_a_store_without_tasks_is_named_by_its_dataset(tmp_path, point_dataset):
    episode = open_dataset(point_dataset).episode(0)
    dataset = write_dataset(tmp_path / "one", [Episode(**{**vars(episode), "task": None})])
    folder = write_robomimic(dataset, tmp_path / "out")
    assert [path.name for path in folder.iterdir()] == ["one_demo.hdf5"]
    back = convert_demos(folder, tmp_path / "back")
    assert (back.info.tasks, back.episode(0).task) == ((), None)


def test_the_command_line_finds_readers_and_writers(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    points = project["project"]["entry-points"]["mail_agents.converters"]
    found = {}
    for name, target in points.items():
        module, _, function = target.partition(":")
        found[name] = getattr(importlib.import_module(module), function)
    assert found["to-libero"] is write_libero
    assert found["to-robomimic"] is write_robomimic
    for name in ("libero", "robomimic"):
        options = {"demos": 10, "demo_selection": "mail_legacy", "align": "causal"}
        inspect.signature(found[name]).bind("source", "output", overwrite=True, **options)
