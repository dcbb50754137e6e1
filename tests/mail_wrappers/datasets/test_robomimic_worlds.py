"""Files, stores and the real environments of LIBERO and robosuite agree with each other."""

import gymnasium
import h5py
import numpy as np
import pytest

from mail_agents.data import MemoryDataset
from mail_agents.data.sim_states import narrow_states
from mail_agents.features import FeatureSpec
from mail_agents.replay import replay_dataset
from mail_wrappers import RecordEpisodes
from mail_wrappers.datasets.robomimic import convert_demos, write_libero, write_robomimic

DRAWER = "open_the_middle_drawer_of_the_cabinet"


@pytest.fixture
def robosuite():
    pytest.importorskip("robosuite")


def record(env_id: str, task: str, steps: int = 4, **kwargs) -> MemoryDataset:
    """Two short recordings of random actions."""
    env = RecordEpisodes(gymnasium.make(env_id, **kwargs), task=task)
    rng = np.random.default_rng(0)
    for seed in (5, 6):
        env.reset(seed=seed)
        for _ in range(steps):
            env.step(rng.uniform(-1, 1, 7).astype(np.float32))
    env.close()
    return MemoryDataset(env.episodes, "short", env.env_specs, features=env.features)


def test_the_world_that_a_published_file_names_sees_what_the_file_holds(
    tmp_path, demo_files, libero_assets
):
    def complete(file: h5py.File) -> None:
        for demo in file["data"].values():
            demo["obs/joint_states"] = np.zeros((demo_files.steps, 7))
            demo["obs/ee_states"] = np.zeros((demo_files.steps, 6))

    path = demo_files.libero(tmp_path / f"{demo_files.milk}_demo.hdf5", 1, complete)
    dataset = convert_demos(path, tmp_path / "store")
    spec = dataset.info.env_specs[demo_files.milk]
    env = gymnasium.make(spec["id"], max_episode_steps=spec["max_episode_steps"], **spec["kwargs"])
    found = FeatureSpec.from_spaces(env.observation_space, env.action_space)
    env.close()
    dataset.features.check(found)
    assert set(found.observations) == set(dataset.features.observations)
    for key, feature in dataset.features.observations.items():
        assert found.observations[key].orientation == feature.orientation
        assert found.observations[key].dtype == feature.dtype


def test_a_recording_in_libero_is_replayed_written_and_read_back(tmp_path, libero_assets):
    dataset = record(f"mail_envs:libero_goal/{DRAWER}", DRAWER, cameras=[])
    (replayed,) = replay_dataset(dataset, 1)
    assert replayed.ok
    assert replayed.numbers is not None
    assert replayed.state is not None
    assert (replayed.numbers.value, replayed.state.value) == (0, 0)
    with pytest.warns(UserWarning, match="no images"):
        folder = write_libero(dataset, tmp_path / "libero_goal")
    with h5py.File(folder / f"{DRAWER}_demo.hdf5") as file:
        data = file["data"]
        name = f"libero/libero/bddl_files/libero_goal/{DRAWER}.bddl"
        assert data.attrs["bddl_file_name"] == name
        assert data.attrs["env_name"] == "Libero_Tabletop_Manipulation"
        assert "wooden_cabinet_1" in data.attrs["bddl_file_content"]
        models = [demo.attrs["model_file"] for demo in data.values()]
        # Each episode has its own places of the fixtures.
        assert models[0] != models[1]
        width = data["demo_0/states"].shape[1]
    assert width == narrow_states(dataset.episode(0).infos["states"]).shape[1]
    back = convert_demos(folder, tmp_path / "store")
    assert back.info.env_specs == dataset.info.env_specs
    assert set(back.episode(0).meta["fixtures"]) == {
        "wooden_cabinet_1",
        "flat_stove_1",
        "wine_rack_1",
    }
    (replayed,) = replay_dataset(back, 1)
    assert replayed.ok


def test_a_recording_in_robosuite_is_replayed_written_and_read_back(tmp_path, robosuite):
    dataset = record("mail_envs:robosuite/Lift", "Lift")
    folder = write_robomimic(dataset, tmp_path / "lift")
    with h5py.File(folder / "Lift_demo.hdf5") as file:
        assert file["data/demo_0"].attrs["model_file"].startswith("<mujoco")
        assert '"env_name": "Lift"' in file["data"].attrs["env_args"]
    with h5py.File(folder / "Lift_demo.hdf5", "a") as file:
        del file["data"].attrs["mail_agents"]  # as files of robomimic are
    back = convert_demos(folder, tmp_path / "store")
    spec = back.info.env_specs["Lift"]
    assert (spec["id"], spec["kwargs"]) == ("mail_envs:robosuite/Lift", {"cameras": []})
    (replayed,) = replay_dataset(back, 1)
    assert not replayed.seeded
    assert replayed.reproduced


def test_robosuite_observes_what_robomimics_low_dimensional_files_hold(robosuite):
    env = gymnasium.make("mail_envs:robosuite/Lift", full_state=True)
    observation, _ = env.reset(seed=0)
    sizes = {key: len(value) for key, value in observation.items()}
    assert sizes == {
        "object": 10,
        "robot0_eef_pos": 3,
        "robot0_eef_quat": 4,
        "robot0_eef_vel_ang": 3,
        "robot0_eef_vel_lin": 3,
        "robot0_gripper_qpos": 2,
        "robot0_gripper_qvel": 2,
        "robot0_joint_pos": 7,
        "robot0_joint_pos_cos": 7,
        "robot0_joint_pos_sin": 7,
        "robot0_joint_vel": 7,
    }
    before = observation
    for _ in range(8):  # upwards
        before, observation = observation, env.step(np.eye(7, dtype=np.float32)[2])[0]
    env.close()
    joints = observation["robot0_joint_pos"]
    np.testing.assert_array_equal(observation["robot0_joint_pos_cos"], np.cos(joints))
    np.testing.assert_array_equal(observation["robot0_joint_pos_sin"], np.sin(joints))
    moved = (observation["robot0_eef_pos"] - before["robot0_eef_pos"]) * 20  # steps per second
    assert moved[2] > 0.1
    np.testing.assert_allclose(observation["robot0_eef_vel_lin"], moved, atol=0.05)
    turned = (joints - before["robot0_joint_pos"]) * 20
    np.testing.assert_allclose(observation["robot0_joint_vel"], turned, atol=0.1)
    assert observation["robot0_gripper_qvel"].any()
    assert observation["robot0_eef_vel_ang"].any()
