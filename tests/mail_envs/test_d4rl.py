"""D4RL's tasks on today's simulators: its observations, rewards and ends."""

import importlib
import os
import subprocess
import sys
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

import mail_envs
from mail_agents.errors import InvalidInputError, UnknownNameError
from mail_envs import d4rl
from mail_envs.antmaze import GOALS, START, AntMazeEnv, maze_xml, position_of
from mail_envs.d4rl import AdroitEnv, D4RLPhysicsWarning, KitchenEnv, LocomotionEnv
from mail_wrappers.datasets.d4rl_names import WORLDS, world_spec

pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics is not installed ('sim')")

SLOW = {"kitchen-partial", "kitchen-mixed"}  # another goal, the same simulation


def make(world: str, **kwargs: Any) -> gymnasium.Env:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", D4RLPhysicsWarning)
        return gymnasium.make(f"mail_envs:d4rl/{world}", **kwargs)


@pytest.mark.parametrize("world", sorted(set(WORLDS) - SLOW))
def test_every_world_has_d4rls_sizes_and_keeps_gymnasiums_rules(world: str) -> None:
    env = make(world)
    facts = WORLDS[world]
    assert env.observation_space.shape == (facts.observation_size,)
    assert env.action_space.shape == (facts.action_size,)
    assert env.action_space.low.tolist() == [-1.0] * facts.action_size  # type: ignore[attr-defined]
    assert env.spec is not None
    assert env.spec.max_episode_steps == facts.max_episode_steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unbounded observations; no second environment
        check_env(env.unwrapped, skip_render_check=True)
    first, info = env.reset(seed=11)
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(3)]
    rollout = [env.step(action)[:3] for action in actions]
    again, _ = env.reset(seed=11)
    assert np.array_equal(first, again)
    assert info == {}
    for action, (state, reward, terminated) in zip(actions, rollout, strict=True):
        found = env.step(action)
        assert np.array_equal(found[0], state)
        assert found[1:3] == (reward, terminated)
    env.close()


@pytest.mark.parametrize(
    ("world", "body"),
    [
        ("hopper", "Gymnasium's Hopper-v4 on MuJoCo"),
        ("antmaze-umaze", "ant with D4RL's motors on MuJoCo"),
        ("pen", "gymnasium-robotics' AdroitHandPen-v"),
        ("kitchen-complete", "FrankaKitchen-v1 on MuJoCo"),
    ],
)
def test_other_physics_are_said(world: str, body: str) -> None:
    with pytest.warns(D4RLPhysicsWarning, match=body) as caught:
        env = gymnasium.make(f"mail_envs:d4rl/{world}")
    env.close()
    assert caught[0].filename != d4rl.__file__
    # What evaluations keep, so that a score says in which physics it was made.
    where, _, version = env.metadata["simulator"].partition(", MuJoCo ")
    assert body.partition(" on ")[0] in where
    assert version.endswith(" instead of 2")


def test_maze2d_has_d4rls_physics_and_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", D4RLPhysicsWarning)
        gymnasium.make("mail_envs:d4rl/maze2d-umaze").close()


def test_the_notice_of_gymnasium_robotics_is_not_shown() -> None:
    code = "import gymnasium; gymnasium.make('mail_envs:d4rl/maze2d-umaze')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")


def test_specs_in_datasets_make_the_same_world() -> None:
    for world in ("hopper", "maze2d-medium-dense", "kitchen-mixed", "antmaze-large"):
        made = make(world).spec
        assert made is not None
        spec = world_spec(world)
        assert spec["id"] == f"mail_envs:d4rl/{world}"
        assert spec["kwargs"] == made.kwargs
        assert spec["entry_point"] == made.entry_point
        assert spec["max_episode_steps"] == made.max_episode_steps
        again = gymnasium.envs.registration.EnvSpec(**{**spec, "vector_entry_point": None})
        assert again.id == spec["id"]


def test_unknown_worlds_are_explained() -> None:
    with pytest.raises(gymnasium.error.NameNotFound, match="hopper"):
        gymnasium.make("mail_envs:d4rl/hoper")
    for build, message in (
        (lambda: LocomotionEnv("hoper"), "Did you mean 'hopper'"),
        (lambda: AdroitEnv("door-v1"), "Did you mean 'door'"),
        (lambda: KitchenEnv("full"), "complete, mixed, partial"),
        (lambda: AntMazeEnv("umaze-diverse"), "Did you mean 'umaze'"),
    ):
        with pytest.raises(UnknownNameError, match=message):
            build()
    with pytest.raises(InvalidInputError, match="rgb_array"):
        AntMazeEnv("umaze", render_mode="human")


# --- locomotion -------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["hopper", "halfcheetah", "walker2d"])
def test_bodies_are_gymnasiums(body: str) -> None:
    env = make(body)
    module, name = d4rl._BODIES[body]
    upstream = getattr(importlib.import_module(f"gymnasium.envs.mujoco.{module}"), name)()
    state, _ = env.reset(seed=2)
    expected, _ = upstream.reset(seed=2)
    assert np.array_equal(state, expected)
    for step in range(5):
        action = 2.0 * np.sin(step + np.arange(env.action_space.shape[0]))  # type: ignore[index]
        left, right = env.step(action), upstream.step(np.clip(action, -1, 1))
        assert np.array_equal(left[0], right[0])
        assert left[1:3] == right[1:3]


def test_contact_forces_of_ant_are_zero() -> None:
    env = make("ant")
    state, _ = env.reset(seed=0)
    for _ in range(20):
        state, *_ = env.step(np.ones(8))
    assert state[:27].any()
    assert not state[27:].any()


# --- antmaze ----------------------------------------------------------------------------------


def test_ant_is_upstreams() -> None:
    import mujoco

    # D4RL's own ant.xml (d4rl/locomotion/assets at 89141a6) in MuJoCo 3.3.0: positions after ten
    # actions sin(t/3 + joint), from rest and far from any wall.
    upstream = [
        *(-0.279601, -0.18992, 0.429023, 0.987933, -0.019913, -0.026872, -0.151227, -0.535055),
        *(0.522559, -0.303821, -0.514792, 0.52494, -0.658506, 0.524205, 0.792718),
    ]
    model = mujoco.MjModel.from_xml_string(maze_xml("umaze"))
    data = mujoco.MjData(model)
    for t in range(10):
        data.ctrl[:] = np.sin(t / 3 + np.arange(8))
        mujoco.mj_step(model, data, nstep=5)
    np.testing.assert_allclose(data.qpos, upstream, atol=2e-4)


@pytest.mark.parametrize(
    ("maze", "goal"), [("umaze", (0.0, 8.0)), ("medium", (20.0, 20.0)), ("large", (32.0, 24.0))]
)
def test_coordinates_and_goals_are_d4rls(maze: str, goal: tuple[float, float]) -> None:
    env = make(f"antmaze-{maze}").unwrapped
    assert isinstance(env, AntMazeEnv)
    assert position_of(START).tolist() == [0.0, 0.0]
    assert position_of(GOALS[maze]).tolist() == list(goal)
    goals = []
    for seed in range(60):
        state, _ = env.reset(seed=seed)
        assert np.abs(state[:2]).max() <= 0.1
        goals.append(env.goal - np.array(goal))
    assert np.min(goals) >= 0.0
    assert 1.0 < np.max(goals) <= 1.5


def test_walls_hold_the_ant_and_the_goal_ends_the_episode() -> None:
    env = make("antmaze-umaze").unwrapped
    assert isinstance(env, AntMazeEnv)
    env.reset(seed=0)
    env._data.qvel[1] = 8.0  # toward the wall between the arms of the U, at y = 2
    for _ in range(30):
        state, reward, terminated, *_ = env.step(np.zeros(8))
    assert state[1] < 2.0
    assert (reward, terminated) == (0.0, False)
    env._data.qpos[:2] = env.goal + np.array([0.3, 0.0])
    env._data.qvel[:] = 0.0
    _, reward, terminated, truncated, info = env.step(np.zeros(8))
    assert (reward, terminated, truncated, info) == (1.0, True, False, {})


# --- adroit and kitchen -----------------------------------------------------------------------


def d4rl_reward(task: str, env: Any) -> float:
    """The rewards of d4rl/hand_manipulation_suite, from the state of the simulation."""
    data = env.data
    if task == "door":
        palm, handle = data.site_xpos[env.grasp_site_id], data.site_xpos[env.handle_site_id]
        angle = data.qpos[env.door_hinge_addrs]
        reward = -0.1 * np.linalg.norm(palm - handle) - 0.1 * (angle - 1.57) ** 2
        reward -= 1e-5 * np.sum(data.qvel**2)
        return reward + 2 * (angle > 0.2) + 8 * (angle > 1.0) + 10 * (angle > 1.35)
    palm = data.site_xpos[env.S_grasp_site_id]
    body, target = data.xpos[env.obj_body_id], data.site_xpos[env.target_obj_site_id]
    if task == "relocate":
        reward = -0.1 * np.linalg.norm(palm - body)
        if body[2] > 0.04:
            reward += (
                1.0 - 0.5 * np.linalg.norm(palm - target) - 0.5 * np.linalg.norm(body - target)
            )
        near = np.linalg.norm(body - target)
        return reward + 10 * (near < 0.1) + 20 * (near < 0.05)
    head, goal = data.site_xpos[env.tool_site_id], data.site_xpos[env.goal_site_id]
    nail = np.linalg.norm(target - goal)
    reward = -0.1 * np.linalg.norm(palm - body) - np.linalg.norm(head - target) - 10 * nail
    reward -= 1e-2 * np.linalg.norm(data.qvel)
    lifted = body[2] > 0.04 and head[2] > 0.04
    return reward + 2 * lifted + 25 * (nail < 0.02) + 75 * (nail < 0.01)


@pytest.mark.parametrize("task", ["door", "hammer", "relocate"])
def test_adroit_rewards_are_d4rls(task: str) -> None:
    env = make(task)
    env.reset(seed=3)
    env.action_space.seed(3)
    for _ in range(15):
        _, reward, *_ = env.step(env.action_space.sample())
        inner = env.unwrapped._inner  # type: ignore[attr-defined]
        assert reward == pytest.approx(d4rl_reward(task, inner), abs=1e-9)


def test_rewards_that_upstream_repaired_are_not_repaired_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Version 2 of gymnasium-robotics' hands charges for the distance, like D4RL.
    module = importlib.import_module("gymnasium_robotics.envs.adroit_hand.adroit_relocate")

    class Repaired(module.AdroitHandRelocateEnv):  # type: ignore[name-defined]
        def step(self, action: np.ndarray) -> Any:
            state, _, *rest = super().step(action)
            return state, d4rl_reward("relocate", self), *rest

    monkeypatch.setattr(module, "AdroitHandRelocateEnv", Repaired)
    spec = EnvSpec("AdroitHandRelocate-v2", "not.used:Here")
    monkeypatch.setitem(gymnasium.registry, spec.id, spec)
    with pytest.warns(D4RLPhysicsWarning, match="AdroitHandRelocate-v2"):
        env = AdroitEnv("relocate")
    env.reset(seed=3)
    _, reward, *_ = env.step(np.zeros(30))
    assert reward == pytest.approx(d4rl_reward("relocate", env._inner), abs=1e-12)
    assert reward < 0  # the object lies on the table, away from the palm


def test_hands_of_unknown_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in gymnasium.registry if n.startswith("AdroitHandDoor-")]:
        monkeypatch.delitem(gymnasium.registry, name)
    with pytest.raises(InvalidInputError, match="registers no AdroitHandDoor"):
        AdroitEnv("door")


def test_dropping_the_pen_ends_the_episode() -> None:
    env = make("pen")
    env.reset(seed=0)
    env.action_space.seed(0)
    terminated = truncated = False
    while not (terminated or truncated):
        state, _, terminated, truncated, _ = env.step(env.action_space.sample())
        assert terminated == (state[26] < 0.075)
    assert (terminated, truncated) == (True, False)


def test_kitchen_observes_joints_objects_and_goal() -> None:
    for kind, unused in (("complete", [11, 12]), ("mixed", [19])):
        env = make(f"kitchen-{kind}")
        state, _ = env.reset(seed=0)
        goal = state[30:]
        assert not goal[[*range(11), *unused]].any()
        assert goal[22] == -0.75  # the microwave
        assert goal[23:30].tolist() == [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]
    inner = env.unwrapped._inner  # type: ignore[attr-defined]
    assert np.abs(state[:9] - inner.data.qpos[:9]).max() < 0.05  # D4RL's sensor noise
    assert np.abs(state[9:30] - inner.data.qpos[9:]).max() < 0.05
    # A solved subtask counts once.
    inner.data.qpos[22] = -0.75
    rewards = [env.step(np.zeros(9))[1] for _ in range(3)]
    assert rewards == [1.0, 0.0, 0.0]


def test_other_sizes_than_d4rls_are_refused() -> None:
    inner = make("hopper").unwrapped._inner  # type: ignore[attr-defined]
    with pytest.raises(InvalidInputError, match=r"HopperEnv takes actions of shape \(3,\)"):
        d4rl.D4RLEnv(inner, WORLDS["ant"])


@pytest.mark.usefixtures("gl")
@pytest.mark.parametrize("world", ["hopper", "antmaze-umaze"])
def test_worlds_render(world: str) -> None:
    env = make(world, render_mode="rgb_array")
    env.reset(seed=0)
    frame = np.asarray(env.render())
    assert frame.dtype == np.uint8
    assert frame.std() > 5
    assert env.metadata["render_fps"] > 0
    env.close()


def test_worlds_are_listed() -> None:
    assert mail_envs.list_worlds("d4rl/antmaze-*") == [
        f"mail_envs:d4rl/antmaze-{maze}" for maze in ("large", "medium", "umaze")
    ]
