"""What demonstration files say of their world, alignment and orientation."""

import json
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest

from mail_agents.data.sim_states import narrow_states
from mail_agents.errors import (
    CorruptFileError,
    FeatureMismatchError,
    InvalidInputError,
    MailAgentsError,
)
from mail_wrappers.datasets.robomimic import convert_demos, read_demos
from mail_wrappers.datasets.robomimic_facts import UnknownWorldWarning
from mail_wrappers.worlds import OSC_POSE


def test_a_published_file_of_libero_names_its_world_and_how_it_sees(tmp_path, demo_files):
    path = demo_files.libero(tmp_path / f"{demo_files.milk}_demo.hdf5")
    dataset = convert_demos(path, tmp_path / "store")
    spec = dataset.info.env_specs[demo_files.milk]
    assert spec["id"] == f"mail_envs:libero_object/{demo_files.milk}"
    assert spec["max_episode_steps"] == 600
    assert spec["kwargs"] == {
        "cameras": ["agentview", "eye_in_hand"],
        "image_size": 8,
        "orientation": "raw",
        "render_quality": "stock",
    }
    assert gymnasium.envs.registration.EnvSpec.from_json(json.dumps(spec)).id == spec["id"]
    features = dataset.features.observations
    assert features["agentview_rgb"].orientation == "raw"
    assert features["ee_pos"].orientation is None
    episode = dataset.episode(0)
    assert episode.meta["alignment"] == "after_action"
    assert dataset.info.source["attributes"][demo_files.milk] == demo_files.published


def test_the_file_name_alone_tells_libero_and_the_folder_decides_between_suites(
    tmp_path, demo_files
):
    def of_states(file: h5py.File) -> None:
        for demo in file["data"].values():
            del demo["obs/agentview_rgb"], demo["obs/eye_in_hand_rgb"]
            demo["obs/goal_state"] = np.zeros((demo_files.steps, 28))

    path = tmp_path / "libero_object" / f"{demo_files.soup}_demo.hdf5"
    demo_files.libero(path, change=of_states, attributes={})
    spec = convert_demos(path.parent, tmp_path / "store").info.env_specs[demo_files.soup]
    assert spec["id"] == f"mail_envs:libero_object/{demo_files.soup}"
    assert spec["kwargs"] == {"cameras": [], "goal_state": True}


def test_causal_alignment_pairs_each_observation_with_the_next_action(tmp_path, demo_files):
    path = demo_files.libero(tmp_path / f"{demo_files.milk}_demo.hdf5", 1)
    (episode,) = read_demos(path, align="causal")
    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        assert np.array_equal(episode.actions, demo["actions"][1:])
        assert np.array_equal(episode.rewards, demo["rewards"][1:])
        assert np.array_equal(episode.observations["ee_pos"], demo["obs/ee_pos"])
        assert np.array_equal(narrow_states(episode.infos["states"]), demo["states"][1:])
        assert np.array_equal(episode.infos["robot_states"], demo["robot_states"])
    assert episode.meta["alignment"] == "before_action"
    assert "final_observation" not in episode.meta
    assert (episode.success, episode.terminations[-1]) == (True, True)


MODEL = """<mujoco><worldbody>
  <body name="table" pos="0 0 1"/>
  <body name="robot0_base" pos="1 0 1"/>
  <body name="milk_1_main" pos="1 1 1"><joint type="free"/></body>
  <body name="soup_1_main"><freejoint/></body>
  <body name="cabinet_1_main" pos="0.1 0.2 0.9" quat="0 0 0 1"><body name="inner_main"/></body>
  <body name="stove_1_main"/>
</worldbody></mujoco>"""


def test_where_fixtures_stood_is_taken_from_the_model(tmp_path, demo_files):
    path = demo_files.libero(
        tmp_path / f"{demo_files.milk}_demo.hdf5",
        change=lambda f: f["data/demo_1"].attrs.update(model_file=MODEL),
    )
    without, placed = read_demos(path)
    assert "fixtures" not in without.meta
    assert placed.meta["fixtures"] == {
        "cabinet_1": [0.1, 0.2, 0.9, 0, 0, 0, 1],
        "stove_1": [0, 0, 0, 1, 0, 0, 0],
    }


def test_options_of_a_conversion_are_part_of_its_identity(tmp_path, demo_files):
    path = demo_files.libero(tmp_path / f"{demo_files.milk}_demo.hdf5", 12)
    dataset = convert_demos(path, tmp_path / "a", demos=3, demo_selection="mail_legacy")
    assert [m["source_id"].rpartition("/")[2] for m in dataset.table.metas] == [
        "demo_0",
        "demo_1",
        "demo_4",
    ]
    assert dataset.info.source["demo_selection"] == "mail_legacy"
    assert dataset.info.source["demos"] == 3
    causal = convert_demos(path, tmp_path / "b", demos=3, align="causal")
    assert causal.info.n_steps == dataset.info.n_steps - 3


def test_a_file_of_robomimic_names_robosuites_world(tmp_path, demo_files):
    path = demo_files.robosuite(tmp_path / "image.hdf5")
    dataset = convert_demos(path, tmp_path / "store")
    assert dataset.info.tasks == ("Lift",)
    spec = dataset.info.env_specs["Lift"]
    assert (spec["id"], spec["max_episode_steps"]) == ("mail_envs:robosuite/Lift", 500)
    assert spec["kwargs"] == {
        "cameras": ["agentview"],
        "image_size": 8,
        "orientation": "upright",
        "render_quality": "stock",
    }
    assert dataset.features.observations["agentview_image"].orientation == "upright"
    assert dataset.episode(0).meta.get("alignment") is None
    with pytest.raises(InvalidInputError, match=r"before the actions already.*--align causal"):
        list(read_demos(path, align="causal"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"robots": ["Panda", "Panda"]}, "recorded with Panda, Panda"),
        ({"controller_configs": {"type": "JOINT_POSITION"}}, "not those of the controller"),
        ({"controller_configs": {"type": "OSC_POSE", "control_delta": False}}, "absolute poses"),
        (
            {"controller_configs": {"type": "OSC_POSE", "kp": 50}},
            "kp of its controller is 50, .*150",
        ),
        ({"controller_configs": {"damping": 2}}, "damping_ratio of its controller is 2"),
        ({"controller_configs": {"output_max": [1] * 6}}, r"output_max .* is \[1, .*0\.05"),
        ({"controller_configs": {"input_min": [-1, -2]}}, "input_min"),
        ({"controller_configs": {"impedance_mode": "variable"}}, "impedance_mode"),
        ({"controller_configs": {"body_parts": {"right": {"input_type": "absolute"}}}}, "absolute"),
        ({"controller_configs": "osc"}, "arm controller is 'osc'"),
        ({"control_freq": 10}, "control_freq is 10, here it is 20"),
        ({"env_name": "ToolHang"}, "no single-arm task 'ToolHang'"),
        ({"env_name": "Stack_D0"}, "no single-arm task 'Stack_D0'"),
    ],
)
def test_robosuite_files_that_no_world_here_matches_say_so(tmp_path, demo_files, kwargs, message):
    path = demo_files.robosuite(tmp_path / "lift.hdf5", **kwargs)
    with pytest.warns(UnknownWorldWarning, match=message):
        assert convert_demos(path, tmp_path / "store").info.env_specs == {}


@pytest.mark.parametrize(
    "controller",
    [
        {**OSC_POSE, "kp": [150] * 6, "output_max": OSC_POSE["output_max"], "input_max": [1] * 6},
        {"type": "BASIC", "body_parts": {"right": {"type": "OSC_POSE", "input_type": "delta"}}},
        [{"type": "OSC_POSE", "damping": 1}],
    ],
)
def test_the_controller_of_robosuite_is_recognised(tmp_path, demo_files, controller, recwarn):
    path = demo_files.robosuite(
        tmp_path / "lift.hdf5", controller_configs=controller, control_freq=20
    )
    assert "Lift" in convert_demos(path, tmp_path / "store").info.env_specs
    assert not recwarn.list


def test_observations_beyond_the_usual_ones_are_asked_of_robosuite(tmp_path, demo_files):
    def add(file: h5py.File) -> None:
        for group in ("obs", "next_obs"):
            file[f"data/demo_0/{group}/robot0_joint_vel"] = np.zeros((demo_files.steps, 7))

    path = demo_files.robosuite(tmp_path / "low_dim.hdf5", change=add)
    spec = convert_demos(path, tmp_path / "store").info.env_specs["Lift"]
    assert spec["kwargs"]["full_state"] is True


def test_files_of_one_task_that_differ_are_refused(tmp_path, demo_files):
    demo_files.robosuite(tmp_path / "in" / "ph.hdf5")
    demo_files.robosuite(tmp_path / "in" / "mh.hdf5")
    assert len(convert_demos(tmp_path / "in", tmp_path / "a")) == 2
    demo_files.robosuite(tmp_path / "in" / "mh.hdf5", reward_shaping=True)
    with pytest.raises(FeatureMismatchError, match=r"mh.*ph.*'Lift'.*attributes of data"):
        convert_demos(tmp_path / "in", tmp_path / "b")


def test_array_attributes_are_kept(tmp_path, demo_files):
    attributes = {"cameras": np.array([b"a", b"b"]), "gains": np.array([[1.5, 2.0]]), "n": 3}
    path = demo_files.robosuite(
        tmp_path / "lift.hdf5", change=lambda f: f["data"].attrs.update(attributes)
    )
    kept = convert_demos(path, tmp_path / "store").info.source["attributes"]["Lift"]
    assert (kept["cameras"], kept["gains"], kept["n"]) == (["a", "b"], [[1.5, 2.0]], 3)


@pytest.mark.parametrize("demos", [0, -1, 3])
def test_a_number_of_demonstrations_that_no_file_has(tmp_path, demo_files, demos):
    path = demo_files.libero(tmp_path / f"{demo_files.milk}_demo.hdf5")
    with pytest.raises(InvalidInputError, match=f"{demos} demonstrations") as caught:
        convert_demos(path, tmp_path / "store", demos=demos)
    assert str(path) in str(caught.value)


def test_a_bddl_file_of_ones_own_has_no_world(tmp_path, demo_files):
    path = demo_files.libero(tmp_path / "juggle_demo.hdf5")
    with pytest.warns(UnknownWorldWarning, match="LIBERO has no task 'juggle'"):
        dataset = convert_demos(path, tmp_path / "store")
    assert dataset.info.env_specs == {}
    assert dataset.features.observations["agentview_rgb"].orientation == "raw"


def test_a_file_of_a_gym_world_names_it(tmp_path, demo_files):
    args = {"env_name": "CartPole-v1", "type": 2, "env_kwargs": {"sutton_barto_reward": True}}
    path = demo_files.libero(tmp_path / "pole.hdf5", attributes={"env_args": json.dumps(args)})
    spec = convert_demos(path, tmp_path / "store").info.env_specs["pole"]
    assert (spec["id"], spec["kwargs"]) == ("CartPole-v1", {"sutton_barto_reward": True})


def replace(name: str, value: Any) -> Any:
    def change(file: h5py.File) -> None:
        for demo in file["data"].values():
            if name in demo:
                del demo[name]
            if value is not None:
                demo[name] = value

    return change


def images(size: int, dtype: Any = np.uint8, wide: int = 0) -> np.ndarray:
    return np.zeros((7, size, size + wide, 3), dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("obs/agentview_rgb", images(9)), "agentview_rgb is 9x9 .*eye_in_hand_rgb 8x8"),
        (replace("obs/agentview_rgb", images(8, wide=2)), "square and of one size"),
        (replace("obs/agentview_rgb", images(8, np.float32)), "expected images uint8"),
        (replace("obs/agentview_rgb", np.zeros((7, 8, 8), np.uint8)), "expected images uint8"),
        (lambda f: [f["data"].pop(k) for k in list(f["data"])], "it has no demonstrations"),
        (
            lambda f: f["data/demo_1"].attrs.update(num_samples=9),
            "num_samples .* is 9, but there are 7",
        ),
        (
            lambda f: f["data/demo_1"].attrs.update(num_samples="x"),
            "num_samples of /data/demo_1 is x",
        ),
        (lambda f: f["data"].attrs.update(num_demos=50), "num_demos of /data is 50, .* 2 demonst"),
        (lambda f: f["data"].attrs.update(total=15), "total of /data is 15, .* 14 steps"),
        (
            lambda f: f["data"].attrs.update(mail_agents='{"features": 3}'),
            "'mail_agents' .* damaged",
        ),
        (
            lambda f: f["data"].attrs.update(mail_agents='{"alignment": "foo"}'),
            "alignment is 'foo'",
        ),
        (lambda f: f["data"].attrs.update(mail_agents='{"episodes": [1]}'), "episodes is"),
        (
            lambda f: f["data"].attrs.update(mail_agents='{"episodes": {"demo_0": 1}}'),
            "has 1 for demo_0",
        ),
        (lambda f: f["data"].attrs.update(env_args='{"env_kwargs": 3}'), "env_kwargs .*'env_args'"),
        (
            lambda f: f["data/demo_1/obs"].pop("ee_pos"),
            "demo_1/obs/ee_pos is missing, .* in demo_0",
        ),
        (
            lambda f: f.copy("data/demo_1/obs/ee_pos", "data/demo_1/obs/x"),
            "demo_1/obs/x is .*missing",
        ),
        (replace("states", np.zeros((7, 5), int)), "demo_0/states: .*float vectors.* int64"),
        (replace("states", np.zeros(7)), r"demo_0/states: .*shape \(\) per step"),
        (lambda f: f["data"].attrs.update(env_args="{"), "'env_args' of /data is not a JSON"),
        (lambda f: f["data"].attrs.update(env_args="[]"), "it holds a list"),
        (lambda f: f["data/demo_1"].attrs.update(model_file="<a>"), "not a MuJoCo model"),
    ],
)
def test_files_that_cannot_be_what_they_say(tmp_path, demo_files, change, message):
    path = demo_files.libero(tmp_path / f"{demo_files.milk}_demo.hdf5", change=change)
    with pytest.raises(CorruptFileError, match=message) as caught:
        convert_demos(path, tmp_path / "store")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("obs/ee_pos", None), r"first has nothing, only the second \['ee_pos'\]"),
        (replace("obs/ee_pos", np.zeros((7, 4))), r"ee_pos is float64 \(4,\) per step"),
        (replace("actions", np.zeros((7, 8))), r"the action is float64 \(8,\) per step, but"),
        (replace("obs/ee_pos", np.zeros((7, 3), "f4")), "ee_pos is float32"),
    ],
)
def test_files_of_one_folder_that_disagree(tmp_path, demo_files, change, message):
    folder = tmp_path / "libero_object"
    demo_files.libero(folder / f"{demo_files.milk}_demo.hdf5", change=change)
    demo_files.libero(folder / f"{demo_files.soup}_demo.hdf5")
    with pytest.raises(FeatureMismatchError, match=message) as caught:
        convert_demos(folder, tmp_path / "store")
    assert demo_files.milk in str(caught.value)
    assert demo_files.soup in str(caught.value)


def test_a_git_lfs_pointer_and_a_web_page_are_named(tmp_path):
    path = tmp_path / "task_demo.hdf5"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(CorruptFileError, match=r"Git LFS pointer.*git lfs pull"):
        convert_demos(path, tmp_path / "store")
    path.write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(CorruptFileError, match="a web page"):
        convert_demos(path, tmp_path / "store")


def test_a_folder_of_suites_names_them(tmp_path, demo_files):
    demo_files.libero(tmp_path / "all" / "libero_object" / f"{demo_files.milk}_demo.hdf5")
    with pytest.raises(InvalidInputError, match="one of its folders: libero_object"):
        convert_demos(tmp_path / "all", tmp_path / "store")


def test_two_files_of_one_name_cannot_be_told_apart(tmp_path, demo_files):
    demo_files.libero(tmp_path / "a" / f"{demo_files.milk}_demo.hdf5")
    demo_files.libero(tmp_path / "a" / f"{demo_files.milk}.hdf5")
    with pytest.raises(MailAgentsError, match="cannot be told apart"):
        convert_demos(tmp_path / "a", tmp_path / "store")


def test_unknown_alignment_is_refused(tmp_path, demo_files):
    path = demo_files.libero(tmp_path / "task_demo.hdf5")
    with pytest.raises(InvalidInputError, match="'stored' or 'causal'"):
        convert_demos(path, tmp_path / "store", align="shifted")  # type: ignore[arg-type]
