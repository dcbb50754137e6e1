"""Meta-World: seeds decide everything, episodes leave nothing behind, upstream is reproduced."""

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from mail_agents.errors import InvalidInputError
from mail_envs import METAWORLD_TASKS
from mail_envs.experts import MetaWorldExpert

SEED = 7


def make(task: str = "reach-v3", **kwargs: Any) -> gymnasium.Env:
    return gymnasium.make(f"mail_envs:metaworld/{task}", **kwargs)


def expert_actions(env: gymnasium.Env, seed: int | None, limit: int = 500) -> np.ndarray:
    expert, (observation, _) = MetaWorldExpert(env), env.reset(seed=seed)
    actions = []
    for _ in range(limit):
        actions.append(expert.act(observation))
        observation, _, terminated, truncated, _ = env.step(actions[-1])
        if terminated or truncated:
            break
    return np.stack(actions)


def rollout(env: gymnasium.Env, actions: np.ndarray, seed: int | None = SEED) -> np.ndarray:
    """States and rewards of an open-loop episode, as one array of bits."""
    observation, info = env.reset(seed=seed)
    assert info == {"success": False}
    rows = [np.append(observation["state"], 0.0)]
    for action in actions:
        observation, reward, *_ = env.step(action)
        rows.append(np.append(observation["state"], reward))
    return np.stack(rows).view(np.uint64)


@pytest.mark.parametrize("task", METAWORLD_TASKS)
def test_an_episode_leaves_nothing_behind(task: str) -> None:
    env = make(task)
    generator = np.random.default_rng(0)
    actions = expert_actions(make(task) if task == "reach-v3" else env, SEED, limit=40)
    fresh = rollout(env, actions)
    assert np.array_equal(fresh, rollout(env, actions)), "the episode that came before matters"
    expert_actions(env, None)  # a whole episode elsewhere, objects displaced
    env.reset(seed=99)
    for _ in range(20):  # cut in the middle
        if env.step(generator.uniform(-1, 1, 4).astype(np.float32))[2]:
            break
    assert np.array_equal(fresh, rollout(env, actions))


@pytest.mark.parametrize("task", ["peg-insert-side-v3", "lever-pull-v3", "stick-pull-v3"])
def test_two_environments_agree_bit_for_bit(task: str) -> None:
    first, second = make(task), make(task)
    actions = expert_actions(first, 3)
    expert_actions(second, 11)
    assert np.array_equal(rollout(first, actions), rollout(second, actions))


def test_placement_comes_from_the_seed_alone() -> None:
    env = make("pick-place-v3")
    np.random.seed(0)
    one = env.reset(seed=1)[0]["state"]
    np.random.seed(12345)
    before = np.random.get_state()[1].copy()
    assert np.array_equal(env.reset(seed=1)[0]["state"], one)
    assert np.array_equal(np.random.get_state()[1], before), "NumPy's global generator was used"
    goals = {tuple(env.reset(seed=seed)[0]["state"][36:]) for seed in range(20)}
    assert len(goals) == 20


def test_resets_without_a_seed_continue_the_stream() -> None:
    def stream(env: gymnasium.Env) -> list[bytes]:
        states = [env.reset(seed=5)[0]["state"], *(env.reset()[0]["state"] for _ in range(3))]
        return [state.tobytes() for state in states]

    env = make()
    first = stream(env)
    assert len(set(first)) == 4
    assert stream(env) == first == stream(make())


@pytest.mark.parametrize("task", ["reach-v3", "drawer-open-v3", "peg-insert-side-v3", "soccer-v3"])
def test_equals_upstream_given_the_same_placement(task: str) -> None:
    import metaworld
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env = make(task)
    actions = expert_actions(env, SEED)
    ours = rollout(env, actions)
    upstream = ALL_V3_ENVIRONMENTS[task]()
    fields = {"rand_vec": env.unwrapped._sim._last_rand_vec, "env_cls": type(upstream)}
    upstream.set_task(metaworld._encode_task(task, {**fields, "partially_observable": False}))
    rows = [np.append(upstream.reset()[0], 0.0)]
    for action in actions:
        state, reward, *_ = upstream.step(action)
        rows.append(np.append(state, reward))
    assert np.array_equal(ours, np.stack(rows).view(np.uint64))


def test_goal_is_visible() -> None:
    env = make()
    observation, _ = env.reset(seed=0)
    goal = env.unwrapped._sim._target_pos
    assert np.any(goal != 0.0)
    np.testing.assert_array_equal(observation["state"][36:], goal)
    np.testing.assert_array_equal(env.step(np.zeros(4, np.float32))[0]["state"][36:], goal)
    # At the first step the "one step earlier" half repeats the current one.
    np.testing.assert_array_equal(observation["state"][:18], observation["state"][18:36])


def test_success_terminates_and_is_reported() -> None:
    env = make()
    expert, (observation, info) = MetaWorldExpert(env), env.reset(seed=0)
    terminated = truncated = False
    while not (terminated or truncated):
        assert info == {"success": False}
        observation, _, terminated, truncated, info = env.step(expert.act(observation))
    assert terminated
    assert not truncated
    assert info == {"success": True}
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        env.step(np.zeros(4, np.float32))
    env.reset()
    env.step(np.zeros(4, np.float32))


@pytest.mark.parametrize("hold", [0, 1, 7])
def test_success_is_held_for_the_steps_asked_for(hold: int) -> None:
    env = make(success_hold=hold)
    for _ in range(2):  # the second episode starts counting anew
        expert, (observation, _) = MetaWorldExpert(env), env.reset(seed=SEED)
        reported = []
        terminated = False
        while not terminated:
            observation, _, terminated, truncated, info = env.step(expert.act(observation))
            assert not truncated
            reported.append(info["success"])
        assert sum(reported) == hold + 1
        assert all(reported[-hold - 1 :])


def test_a_negative_hold_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="success_hold is -1"):
        make(success_hold=-1)


def test_stepping_before_reset() -> None:
    with pytest.raises(gymnasium.error.ResetNeeded):
        make().step(np.zeros(4, np.float32))
    with pytest.raises(gymnasium.error.ResetNeeded, match="has not begun"):
        make().unwrapped.step(np.zeros(4, np.float32))


@pytest.mark.parametrize(("kwargs", "limit"), [({}, 500), ({"max_episode_steps": 520}, 520)])
def test_time_limit(kwargs: dict[str, int], limit: int) -> None:
    env = make("drawer-open-v3", **kwargs)
    env.reset(seed=0)
    still = np.zeros(4, np.float32)
    ends = [env.step(still)[2:4] for _ in range(limit)]
    assert ends == [(False, False)] * (limit - 1) + [(False, True)]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([0, 0, np.nan, 0], "not finite"),
        ([np.inf, 0, 0, 0], "not finite"),
        ([0, 0, 0], r"Got shape \(3,\)"),
        (np.zeros((1, 4)), "not a batch"),
    ],
)
def test_bad_actions_are_refused(action: Any, message: str) -> None:
    env = make(disable_env_checker=True)
    env.reset(seed=0)
    with pytest.raises(InvalidInputError, match=message):
        env.step(action)


def test_actions_beyond_the_bounds_are_clipped() -> None:
    env = make()
    wild = np.array([[3.0, -7.0, 2.0, 9.0]] * 5, np.float32)
    assert np.array_equal(rollout(env, wild), rollout(env, np.sign(wild)))


def test_options_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="seed"):
        make().reset(options={"init_state": 3})


@pytest.mark.parametrize("task", ["reach-v3", "hammer-v3", "window-close-v3"])
def test_gymnasium_checker(task: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*infinity.*")
        check_env(make(task).unwrapped)


def test_ordinary_use_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expert_actions(make("basketball-v3"), 0)


def test_vector_environments() -> None:
    envs = gymnasium.make_vec("mail_envs:metaworld/reach-v3", num_envs=2, vectorization_mode="sync")
    observation, _ = envs.reset(seed=[4, 5])
    single = make().reset(seed=5)[0]["state"]
    np.testing.assert_array_equal(observation["state"][1], single)
    observation, *_, info = envs.step(envs.action_space.sample())
    assert observation["state"].shape == (2, 39)
    assert info["success"].tolist() == [False, False]
    envs.close()
