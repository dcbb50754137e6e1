"""robosuite's worlds: upstream's physics and sensors, robomimic's keys, reproducible episodes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import mail_envs
from mail_agents.errors import InvalidInputError, UnknownNameError
from mail_envs.catalogue import ROBOSUITE_TASKS
from mail_envs.robosuite import ROBOSUITE_CAMERAS, RobosuiteEnv
from mail_envs.robosuite_setup import import_robosuite

# Not importorskip: a plain import prints, and opens a log file in /tmp.
if importlib.util.find_spec("robosuite") is None:
    pytest.skip("robosuite is not installed (extra 'robosuite')", allow_module_level=True)

ACTIONS = np.random.default_rng(0).uniform(-1, 1, (8, 7))

# Upstream's environment, as its documentation makes it, with the same seed and actions.
UPSTREAM = """
import random, sys
import numpy as np
from mail_envs.robosuite_setup import import_robosuite
robosuite = import_robosuite("this comparison")
task, seed, images, out = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "images", sys.argv[4]
cameras = ["agentview", "robot0_eye_in_hand"] if images else []
env = robosuite.make(
    task, robots="Panda", use_camera_obs=images, has_offscreen_renderer=images,
    controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
    ignore_done=True, **(dict(camera_names=cameras, camera_heights=32, camera_widths=32)
    if images else {}))
np.random.seed(seed)
random.seed(seed)
rows = [(env.reset(), 0.0)]
states = [env.sim.get_state().flatten()]
for action in np.random.default_rng(0).uniform(-1, 1, (8, 7)):
    rows.append(env.step(action)[:2])
    states.append(env.sim.get_state().flatten())
keys = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state"]
keys += [f"{camera}_image" for camera in cameras]
np.savez(out, states=states, rewards=[row[1] for row in rows],
         **{key: [row[0][key] for row in rows] for key in keys})
"""


def play(env, seed, options=None, actions=ACTIONS):
    observation, info = env.reset(seed=seed, options=options)
    rows, states = [observation], [info["state"]]
    for action in actions:
        observation, _, _, _, info = env.step(action)
        rows.append(observation)
        states.append(info["state"])
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}, np.stack(states)


def upstream(tmp_path: Path, task: str, seed: int, images: bool) -> dict[str, np.ndarray]:
    out = tmp_path / "upstream.npz"
    subprocess.run(
        [sys.executable, "-c", UPSTREAM, task, str(seed), "images" if images else "", str(out)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    return dict(np.load(out))


def test_catalogue_equals_upstream():
    import_robosuite("this test")
    from robosuite import ALL_ENVIRONMENTS
    from robosuite.environments.base import REGISTERED_ENVS
    from robosuite.environments.manipulation.single_arm_env import SingleArmEnv

    # LIBERO, once imported, adds its own.
    own = [
        name
        for name in ALL_ENVIRONMENTS
        if REGISTERED_ENVS[name].__module__.startswith("robosuite.")
    ]
    single = [name for name in own if issubclass(REGISTERED_ENVS[name], SingleArmEnv)]
    assert sorted(single) == list(ROBOSUITE_TASKS)
    assert mail_envs.list_worlds("robosuite/*") == [
        f"mail_envs:robosuite/{task}" for task in ROBOSUITE_TASKS
    ]


@pytest.mark.parametrize("task", ["Stack", "NutAssemblySquare"])
def test_equals_upstream_bit_for_bit(task, tmp_path):
    env = RobosuiteEnv(task)
    play(env, seed=1)  # another episode before leaves nothing behind
    ours, states = play(env, seed=7)
    env.close()
    theirs = upstream(tmp_path, task, 7, images=False)
    np.testing.assert_array_equal(states, theirs["states"])
    for key in ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"):
        np.testing.assert_array_equal(ours[key], theirs[key])
    np.testing.assert_array_equal(ours["object"], theirs["object-state"])


def test_raw_images_in_stock_quality_equal_upstream(gl, tmp_path):
    env = RobosuiteEnv(
        "Lift",
        cameras=("agentview", "robot0_eye_in_hand"),
        image_size=32,
        orientation="raw",
        render_quality="stock",
    )
    ours, states = play(env, seed=7)
    env.close()
    theirs = upstream(tmp_path, "Lift", 7, images=True)
    np.testing.assert_array_equal(states, theirs["states"])
    for camera in env.cameras:
        image = ours[f"{camera}_image"]
        assert image.std() > 10
        np.testing.assert_array_equal(image, theirs[f"{camera}_image"])


def test_an_episode_depends_on_its_seed_alone():
    env = RobosuiteEnv("Lift")
    first, states = play(env, seed=3)
    other, _ = play(env, seed=4)
    np.random.seed(0)
    again, same = play(env, seed=3)
    fresh, also = play(RobosuiteEnv("Lift"), seed=3)
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
        np.testing.assert_array_equal(value, fresh[key])
    np.testing.assert_array_equal(states, same)
    np.testing.assert_array_equal(states, also)
    assert not np.array_equal(first["object"][0], other["object"][0])
    env.reset(seed=3)
    drawn = env.reset()[1]["state"]
    env.reset(seed=3)
    np.testing.assert_array_equal(env.reset()[1]["state"], drawn)
    assert not np.array_equal(drawn, states[0])


@pytest.mark.filterwarnings("ignore:.*A Box observation space")
def test_gymnasium_accepts_it():
    env = gymnasium.make("mail_envs:robosuite/Lift")
    check_env(env.unwrapped, skip_render_check=True)
    assert env.spec.max_episode_steps == 500
    assert {key: part.shape for key, part in env.observation_space.items()} == {
        "object": (10,),
        "robot0_eef_pos": (3,),
        "robot0_eef_quat": (4,),
        "robot0_gripper_qpos": (2,),
        "robot0_joint_pos": (7,),
    }
    assert "robosuite 1.4" in env.unwrapped.metadata["simulator"]
    assert env.unwrapped.metadata["parallel"] == 4
    env.close()


def test_wipe_has_a_hand_that_does_not_move():
    env = RobosuiteEnv("Wipe")
    observation, _ = env.reset(seed=0)
    assert env.action_space.shape == (6,)
    assert "robot0_gripper_qpos" not in observation
    assert env.observation_space.contains(env.step(np.zeros(6))[0])
    env.close()


def test_every_camera_and_videos(gl):
    env = RobosuiteEnv(
        "PickPlaceCan",
        cameras=ROBOSUITE_CAMERAS,
        image_size=24,
        render_mode="rgb_array",
        render_size=24,
    )
    observation, _ = env.reset(seed=0)
    for camera in ROBOSUITE_CAMERAS:
        assert env.observation_space[f"{camera}_image"].orientation == "upright"
        assert observation[f"{camera}_image"].std() > 10
    np.testing.assert_array_equal(env.render(), observation["agentview_image"])
    env.close()


def test_starting_from_a_state():
    env = RobosuiteEnv("Lift")
    _, states = play(env, seed=3)
    observation, info = env.reset(seed=3, options={"state": states[5]})
    np.testing.assert_array_equal(info["state"], states[5])
    cube = states[5][1 + 9 : 1 + 12]
    np.testing.assert_allclose(observation["object"][:3], cube, atol=1e-12)
    lost = states[5].copy()
    lost[1 + 9 + 3 : 1 + 9 + 7] = 0
    with pytest.raises(InvalidInputError, match="numbers 13 to 16 are the quaternion"):
        env.reset(options={"state": lost})
    with pytest.raises(InvalidInputError, match="is 32 finite numbers"):
        env.reset(options={"state": states[5][1:]})
    with pytest.raises(InvalidInputError, match="Did you mean 'state'"):
        env.reset(options={"stat": states[5]})


def test_env_args_are_robomimics():
    env = RobosuiteEnv("Lift", image_size=84)
    args = json.loads(json.dumps(env.env_args))
    assert (args["env_name"], args["type"]) == ("Lift", 1)
    assert args["env_kwargs"]["controller_configs"]["type"] == "OSC_POSE"
    assert args["env_kwargs"]["use_camera_obs"] is False
    assert env.model_xml().lstrip().startswith("<mujoco")


def test_bad_arguments():
    with pytest.raises(UnknownNameError, match="Did you mean 'Lift'"):
        RobosuiteEnv("lift")
    with pytest.raises(UnknownNameError, match="agentview"):
        RobosuiteEnv("Lift", cameras=("eye_in_hand",))
    with pytest.raises(InvalidInputError, match="orientation 'upside'"):
        RobosuiteEnv("Lift", orientation="upside")  # type: ignore[arg-type]
