"""LIBERO's worlds: upstream's physics, sensors and pixels, and reproducible episodes."""

import json
import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import mail_envs
from mail_agents.errors import InvalidInputError, UnknownNameError
from mail_envs.libero import LiberoEnv
from mail_wrappers.datasets.libero_names import SUITES, tasks_of

pytest.importorskip("libero", reason="LIBERO is not installed (docs/install.md)")

ACTIONS = np.random.default_rng(0).uniform(-1, 1, (4, 7)) - [0, 0, 0.3, 0, 0, 0, 0]
MILK = "pick_up_the_milk_and_place_it_in_the_basket"
# The drawer begins open and the bowl in it: placed by every kind of sampler that LIBERO has.
IN_DRAWER = tasks_of("libero_spatial")[4]

# LIBERO's own environment, as its evaluation makes it, with the same seed and actions.
UPSTREAM = """
import sys
import numpy as np
from mail_envs.libero_setup import bddl_file, import_libero, load_init_states, quiet
suite, task, seed, initial, settle, out = sys.argv[1:]
envs = import_libero()
env = envs.OffScreenRenderEnv(
    bddl_file_name=str(bddl_file(suite, task)), camera_heights=32, camera_widths=32)
env.seed(int(seed))
observation = env.reset()
if initial:
    observation = env.set_init_state(load_init_states(suite, task)[int(initial)])
for _ in range(5):
    observation, *_ = env.step([0, 0, 0, 0, 0, 0, float(settle)])
rows, states = [observation], [env.get_sim_state()]
for action in np.random.default_rng(0).uniform(-1, 1, (4, 7)) - [0, 0, .3, 0, 0, 0, 0]:
    rows.append(env.step(np.clip(action, -1, 1))[0])
    states.append(env.get_sim_state())
keys = ["robot0_joint_pos", "robot0_gripper_qpos", "robot0_eef_pos", "agentview_image",
        "robot0_eye_in_hand_image"]
np.savez(out, states=states, **{key: [row[key] for row in rows] for key in keys})
"""


@pytest.fixture(scope="module", autouse=True)
def meshes(libero_asset_folder):
    """Names the meshes for the environments that several tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAIL_AGENTS_LIBERO_ASSETS", str(libero_asset_folder))
        yield libero_asset_folder


@pytest.fixture(autouse=True)
def _meshes_in_every_test(libero_assets):
    """The variable is cleared for every test."""


@pytest.fixture(scope="module")
def milk(meshes):
    """A world without images, shared by the tests that only reset and step it."""
    env = LiberoEnv(MILK, "libero_object", cameras=(), goal_state=True)
    yield env
    env.close()


def play(env, seed, options=None, actions=ACTIONS):
    observation, info = env.reset(seed=seed, options=options)
    rows, states = [observation], [info["state"]]
    for action in actions:
        observation, _, _, _, info = env.step(action)
        rows.append(observation)
        states.append(info["state"])
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}, np.stack(states)


def test_all_tasks_are_registered():
    for suite in SUITES:
        assert mail_envs.list_worlds(f"{suite}/*") == sorted(
            f"mail_envs:{suite}/{task}" for task in tasks_of(suite)
        )
        for task in tasks_of(suite):
            spec = gymnasium.spec(f"{suite}/{task}")
            assert spec.max_episode_steps == 600


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task", "initial", "protocol"),
    [
        ("libero_spatial", IN_DRAWER, "sampled", "mail"),
        ("libero_object", MILK, "stored", "libero"),
    ],
)
def test_equals_upstream_bit_for_bit(gl, tmp_path, suite, task, initial, protocol):
    env = LiberoEnv(
        task, suite, image_size=32, render_quality="stock", initial=initial, protocol=protocol
    )
    options = {"init_state": 3} if initial == "stored" else None
    play(env, seed=1, actions=ACTIONS[:1])  # another episode before leaves nothing behind
    ours, states = play(env, 7, options)
    env.close()
    out = tmp_path / "upstream.npz"
    index, gripper = str(3 if initial == "stored" else ""), str(env.protocol.settle_gripper)
    subprocess.run(
        [sys.executable, "-c", UPSTREAM, suite, task, "7", index, gripper, str(out)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    theirs = dict(np.load(out))
    np.testing.assert_array_equal(states, theirs["states"])
    np.testing.assert_array_equal(ours["joint_states"], theirs["robot0_joint_pos"])
    np.testing.assert_array_equal(ours["gripper_states"], theirs["robot0_gripper_qpos"])
    np.testing.assert_array_equal(ours["ee_pos"], theirs["robot0_eef_pos"])
    for key, name in (
        ("agentview_rgb", "agentview_image"),
        ("eye_in_hand_rgb", "robot0_eye_in_hand_image"),
    ):
        assert ours[key].std() > 10
        np.testing.assert_array_equal(ours[key], theirs[name])


@pytest.mark.parametrize("suite", SUITES)
def test_first_task_of_every_suite(gl, suite):
    images = {}
    for orientation in ("raw", "upright"):
        env = LiberoEnv(
            tasks_of(suite)[0], suite, image_size=24, orientation=orientation, goal_state=True
        )
        stored = env.init_states
        assert stored.shape == (50, len(env.flat_state()))
        observation, info = env.reset(seed=0, options={"init_state": 2})
        assert info["init_state"] == 2
        assert env.observation_space.contains(observation)
        images[orientation] = [observation[f"{c}_rgb"] for c in ("agentview", "eye_in_hand")]
        assert env.observation_space["agentview_rgb"].orientation == orientation
        assert env.goals
        assert np.linalg.norm(observation["goal_state"][3:7]) == pytest.approx(1)
        env._settle = env._refresh  # the stored state itself
        _, info = env.reset(options={"init_state": 2})
        np.testing.assert_array_equal(info["state"], stored[2])
        env.close()
    for raw, upright in zip(images["raw"], images["upright"], strict=True):
        assert raw.std() > 10
        np.testing.assert_array_equal(raw[::-1], upright)
        assert not np.array_equal(raw, upright)


@pytest.mark.filterwarnings("ignore:.*A Box observation space")
def test_gymnasium_accepts_it(milk):
    check_env(milk, skip_render_check=True)
    assert milk.action_space == gymnasium.spaces.Box(-1, 1, (7,), np.float32)
    assert {key: part.shape for key, part in milk.observation_space.items()} == {
        "ee_ori": (3,),
        "ee_pos": (3,),
        "ee_states": (6,),
        "goal_state": (28,),
        "gripper_states": (2,),
        "joint_states": (7,),
    }


def test_metadata(milk):
    assert milk.metadata["init_states"] == 50
    assert milk.metadata["parallel"] == 1
    assert milk.metadata["render_fps"] == 20
    assert milk.metadata["record_infos"] == ("state",)
    for part in ("LIBERO 0.1", "robosuite 1.4", "MuJoCo 3", "meshes "):
        assert part in milk.metadata["simulator"]
    assert "init_states" not in LiberoEnv.metadata
    assert milk.instruction == "pick up the milk and place it in the basket"


def test_an_episode_depends_on_seed_and_options_alone(milk):
    first, states = play(milk, 3, {"init_state": 4})
    play(milk, 5, {"init_state": 1})
    np.random.seed(0)
    again, same = play(milk, 3, {"init_state": 4})
    np.testing.assert_array_equal(states, same)
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
    drawn = milk.reset(seed=3)[1]
    assert drawn["init_state"] == milk.reset(seed=3)[1]["init_state"]
    assert len({milk.reset(seed=seed)[1]["init_state"] for seed in range(5)}) > 1
    assert drawn["success"] is False


def test_gripper_settles_open(milk):
    observation, info = milk.reset(seed=0, options={"init_state": 0})
    assert info["init_state"] == 0
    assert observation["gripper_states"][0] > 0.03  # 0.021 before settling
    np.testing.assert_array_equal(
        observation["ee_states"], [*observation["ee_pos"], *observation["ee_ori"]]
    )


def test_starting_from_a_state_continues_there(milk):
    _, states = play(milk, 3, {"init_state": 4})
    observation, info = milk.reset(seed=3, options={"state": states[-1]})
    assert "init_state" not in info
    np.testing.assert_array_equal(info["state"], states[-1])
    # time, then the first seven positions: the joints of the arm.
    np.testing.assert_array_equal(observation["joint_states"], states[-1][1:8])


def test_fixtures_stand_where_a_recording_had_them():
    env = LiberoEnv(IN_DRAWER, "libero_spatial", cameras=())
    _, states = play(env, 3, {"init_state": 4})
    cabinet = env.body_id("wooden_cabinet_1")
    pose = [*env.model.body_pos[cabinet], *env.model.body_quat[cabinet]]
    env.reset(seed=8)
    assert not np.array_equal(env.model.body_pos[cabinet], pose[:3])
    env.reset(seed=8, options={"state": states[-1], "fixtures": {"wooden_cabinet_1": pose}})
    np.testing.assert_allclose(env.data.xpos[cabinet], pose[:3], rtol=0, atol=1e-12)
    np.testing.assert_allclose(env.data.xquat[cabinet], pose[3:], rtol=0, atol=1e-12)
    for bad, message in [
        ({"fixtures": {"wooden_cabinet_1": pose}}, "needs the option 'state'"),
        ({"state": states[0], "fixtures": {"wooden_cabinet_1": pose[:3]}}, "position"),
        ({"state": states[0], "fixtures": {"wooden_cabinet_1": "here"}}, "position"),
        ({"state": states[0], "fixtures": {"wooden_cabinet_1": [*pose[:3], 0, 0, 0, 0]}}, "zero"),
        ({"state": states[0], "fixtures": [1]}, "poses by name"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            env.reset(options=bad)
    with pytest.raises(UnknownNameError, match="Did you mean 'wooden_cabinet_1'"):
        env.reset(options={"state": states[0], "fixtures": {"cabinet_1": pose}})
    env.close()


def test_goal_state_holds_the_poses(milk):
    observation, _ = milk.reset(seed=0, options={"init_state": 0})
    assert milk.goals == [["in", "milk_1", "basket_1_contain_region"]]
    goal = observation["goal_state"]
    body = milk.body_id("milk_1")
    np.testing.assert_allclose(goal[:3], milk.data.xpos[body], atol=2e-3)  # it still falls
    np.testing.assert_allclose(goal[3:7], milk.data.xquat[body], atol=1e-3)
    basket = milk.data.xpos[milk.body_id("basket_1")]
    np.testing.assert_allclose(goal[7:9], basket[:2], atol=0.02)
    assert np.linalg.norm(goal[10:14]) == pytest.approx(1)
    np.testing.assert_array_equal(goal[14:], 0)
    with pytest.raises(UnknownNameError, match="Did you mean 'milk_1'"):
        milk.body_id("milk")


def test_success_is_the_goal(milk):
    """The milk carton, put where the basket is, is in it."""
    milk.reset(seed=0, options={"init_state": 0})
    state = milk.flat_state()
    joint = milk.model.body_jntadr[milk.body_id("milk_1")]
    address = 1 + milk.model.jnt_qposadr[joint]
    state[address : address + 3] = milk.data.xpos[milk.body_id("basket_1")] + [0, 0, 0.05]
    _, info = milk.reset(seed=0, options={"state": state})
    assert info["success"] is False
    _, reward, terminated, truncated, info = milk.step(np.zeros(7))
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)


def test_options_are_checked(milk):
    for bad, message in [
        ({"init_state": 50}, "initial states 0 to 49"),
        ({"init_state": -1}, "initial states 0 to 49"),
        ({"init_state": "first"}, "whole number"),
        ({"init_state": True}, "whole number"),
        ({"init": 1}, "Did you mean 'init_state'"),
        ({"state": np.zeros(5)}, "States of another task do not fit"),
        ({"state": milk.flat_state(), "init_state": 1}, "not both"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            milk.reset(options=bad)


def test_stored_states_need_a_world_that_starts_from_them():
    env = LiberoEnv(MILK, "libero_object", cameras=(), initial="sampled")
    with pytest.raises(InvalidInputError, match="Make it with initial='stored'"):
        env.reset(options={"init_state": 1})
    env.close()


def test_meshes_that_lack_a_file(meshes, tmp_path, monkeypatch):
    for part in meshes.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "scenes").unlink()
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "other.xml").touch()
    monkeypatch.setenv("MAIL_AGENTS_LIBERO_ASSETS", str(tmp_path))
    code = f"from mail_envs.libero import LiberoEnv; LiberoEnv({MILK!r}, 'libero_object')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "InvalidInputError" in last
    for part in (
        f"{tmp_path}/scenes/",
        f"{tmp_path} (from MAIL_AGENTS_LIBERO_ASSETS)",
        "git clone",
    ):
        assert part in last


def test_what_files_say_about_the_world(milk):
    args = json.loads(json.dumps(milk.env_args))
    assert args["type"] == 1
    assert args["env_name"] == "Libero_Floor_Manipulation"
    assert args["problem_name"] == "libero_floor_manipulation"
    assert args["bddl_file"] == f"libero/libero/bddl_files/libero_object/{MILK}.bddl"
    assert milk.problem_info["language_instruction"] == "pick the milk and place it in the basket"
    with open(milk.bddl_path) as file:
        assert "milk_1" in file.read()


def test_model_xml_is_that_of_this_world_and_episode(milk):
    milk.reset(seed=0)
    other = gymnasium.make("mail_envs:metaworld/reach-v3")  # MuJoCo has loaded another model since
    text = milk.model_xml()
    other.close()
    assert 'name="milk_1_main"' in text
    assert "robot0_link0" in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("milk", "libero_object"), UnknownNameError, "task of libero_object 'milk'"),
        ((MILK, "libero_goal"), UnknownNameError, "task of libero_goal"),
        ((MILK, "libero_objekt"), UnknownNameError, "Did you mean 'libero_object'"),
    ],
)
def test_bad_names(arguments, error, message):
    with pytest.raises(error, match=message):
        LiberoEnv(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cameras": ("agent_view",)}, UnknownNameError, "Did you mean 'agentview'"),
        ({"cameras": "agentview"}, InvalidInputError, r"cameras=\('agentview',\)"),
        ({"protocol": "mial"}, UnknownNameError, "Did you mean 'mail'"),
        ({"initial": "random"}, InvalidInputError, "initial 'random'"),
        ({"image_size": -3}, InvalidInputError, "Image size -3"),
        ({"orientation": "down"}, InvalidInputError, "orientation 'down'"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        LiberoEnv(MILK, "libero_object", **options)
