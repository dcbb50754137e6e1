"""maze2d: D4RL's coordinates and dynamics, its planner, and data made the way it made them."""

import itertools
from collections.abc import Callable

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mail_envs  # noqa: F401  (registers the worlds)
from mail_agents.data import Episode
from mail_agents.errors import InvalidInputError, UnknownNameError
from mail_envs.pointmaze import (
    MAZES,
    Maze2dEnv,
    WaypointController,
    collect_maze,
    reference_returns,
    shortest_path,
)

pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics is not installed ('sim')")

# From (1.05, 1.0) at rest, with force (sin(t/9), cos(t/13)) at step t: position and velocity after
# 40, 80 and 120 steps of D4RL's own model (d4rl/pointmaze/maze_model.py at 89141a6), which MuJoCo
# 3.3.0 simulated.
UPSTREAM = {
    "umaze": [
        [1.132377, 1.693715, -1.461191, -0.244602],
        [0.781865, 0.711577, 3.884374, -0.848176],
        [0.401143, 1.348125, 0.253911, 0.233492],
    ],
    "medium": [
        [2.059124, 1.814386, 2.588831, 0.244527],
        [2.198531, 1.018637, -0.003971, -0.403543],
        [1.331252, 1.824617, -3.575877, 0.637675],
    ],
    "large": [
        [1.132377, 1.693715, -1.461191, -0.244602],
        [0.781865, 0.711577, 3.884374, -0.848176],
        [1.531401, 1.085558, 0.292619, -2.125125],
    ],
}


@pytest.fixture(scope="module")
def umaze() -> Maze2dEnv:
    return Maze2dEnv("umaze")


def put(env: Maze2dEnv, position: tuple[float, float], velocity: tuple[float, float]) -> None:
    env.reset(seed=0)
    env._point.set_state(env._inside(position), np.array(velocity))


@pytest.mark.parametrize("maze", sorted(MAZES))
def test_same_trajectory_as_upstreams_model(maze: str) -> None:
    env = Maze2dEnv(maze)
    put(env, (1.05, 1.0), (0.0, 0.0))
    found = []
    for t in range(120):
        observation, *_ = env.step(np.array([np.sin(t / 9), np.cos(t / 13)]))
        if t % 40 == 39:
            found.append(observation)
    np.testing.assert_allclose(found, UPSTREAM[maze], atol=2e-4)


@pytest.mark.parametrize(
    ("maze", "goal", "free", "steps"),
    [("umaze", (1, 1), 7, 300), ("medium", (6, 6), 26, 600), ("large", (7, 9), 46, 800)],
)
def test_mazes(maze: str, goal: tuple[int, int], free: int, steps: int) -> None:
    world = gymnasium.make(f"mail_envs:d4rl/maze2d-{maze}")
    env = world.unwrapped
    assert isinstance(env, Maze2dEnv)
    assert (env.goal, len(env.cells)) == (goal, free)
    assert world.spec is not None
    assert world.spec.max_episode_steps == steps
    world.reset(seed=0)
    ends = [world.step(world.action_space.sample())[2:4] for _ in range(steps)]
    assert ends == [(False, False)] * (steps - 1) + [(False, True)]


def test_rewards_of_the_fixed_goal(umaze: Maze2dEnv) -> None:
    dense = Maze2dEnv("umaze", reward_type="dense")
    for distance, sparse in ((0.0, 1.0), (0.5, 1.0), (0.501, 0.0)):
        position = np.array(umaze.goal) + np.array([0.0, distance])
        assert umaze.reward(position) == sparse
        assert dense.reward(position) == pytest.approx(np.exp(-distance))
    for env in (umaze, dense):
        put(env, (1.0, 1.3), (0.0, 0.0))
        observation, reward, terminated, truncated, info = env.step(np.zeros(2))
        assert reward == env.reward(observation[:2])
        assert (terminated, truncated, info) == (False, False, {})


def test_reset_is_a_function_of_the_seed(umaze: Maze2dEnv) -> None:
    first, _ = umaze.reset(seed=5)
    umaze.step(np.ones(2))
    again, _ = umaze.reset(seed=5)
    assert np.array_equal(first, again)
    assert np.array_equal(umaze._outside(umaze._point._get_obs()[0]), first)
    starts = np.array([umaze.reset(seed=s)[0] for s in range(300)])
    cells = {umaze.cell_of(start[:2]) for start in starts}
    assert cells == set(umaze.cells)  # the goal's cell included
    assert np.abs(starts[:, :2] - np.round(starts[:, :2])).max() <= 0.1
    assert 0.08 < starts[:, 2:].std() < 0.12


def test_velocity_is_limited_and_actions_are_clipped(umaze: Maze2dEnv) -> None:
    for force in (1.0, 50.0):
        put(umaze, (3.0, 1.0), (0.0, 9.0))
        observation, *_ = umaze.step(np.array([0.0, force]))
        assert observation[3] == pytest.approx(5.0 + 0.01 * 100 / 4.19 - 0.01 * 5 / 4.19, abs=0.01)


def test_bad_choices_are_explained() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'umaze'"):
        Maze2dEnv("u-maze")
    with pytest.raises(InvalidInputError, match="'sparse' or 'dense'"):
        Maze2dEnv("umaze", reward_type="shaped")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="rgb_array"):
        Maze2dEnv("umaze", render_mode="human")


# --- planner ----------------------------------------------------------------------------------


def test_shortest_path_of_the_u() -> None:
    cells = Maze2dEnv("umaze").cells
    assert shortest_path(cells, (3, 1), (1, 1)) == [(3, 2), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)]
    assert shortest_path(cells, (1, 1), (1, 1)) == [(1, 1)]
    with pytest.raises(InvalidInputError, match="no way"):
        shortest_path(((1, 1), (3, 3)), (1, 1), (3, 3))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_shortest_paths_are_connected_and_shortest(data: st.DataObject) -> None:
    rows = MAZES[data.draw(st.sampled_from(sorted(MAZES)))]
    cells = tuple((i, j) for i, r in enumerate(rows) for j, tile in enumerate(r) if tile != "#")
    start, goal = data.draw(st.sampled_from(cells)), data.draw(st.sampled_from(cells))
    path = shortest_path(cells, start, goal)
    steps = np.abs(np.diff(np.array([start, *path]), axis=0)).sum(axis=1)
    assert path[-1] == goal
    assert set(path) <= set(cells)
    # Distances by relaxation, another way to the same number.
    distance = dict.fromkeys(cells, np.inf)
    distance[start] = 0.0
    for _ in cells:
        for i, j in cells:
            around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
            near = [distance[cell] + 1 for cell in around if cell in distance]
            distance[i, j] = min(distance[i, j], *near)
    if start == goal:
        assert path == [goal]
    else:
        assert steps.tolist() == [1] * len(path)
        assert len(path) == distance[goal]


def test_the_planner_reaches_every_cell_from_every_cell(umaze: Maze2dEnv) -> None:
    controller = WaypointController(umaze, np.random.default_rng(0))
    for start in umaze.cells:
        for goal in umaze.cells:
            put(umaze, start, (0.0, 0.0))
            observation = np.array([*start, 0.0, 0.0])
            controller.plan(observation, goal)
            for _ in range(300):
                if controller.arrived(observation):
                    break
                action = controller.act(observation)
                assert umaze.action_space.contains(action)
                observation, *_ = umaze.step(action)
            assert np.linalg.norm(observation[:2] - np.array(goal)) < 0.1


# --- data -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def episodes(umaze: Maze2dEnv) -> list[Episode]:
    return list(collect_maze(umaze, 1500, 3, max_steps=300, task="maze2d-umaze"))


def test_data_are_one_trajectory_cut_where_the_goal_changes(
    umaze: Maze2dEnv, episodes: list[Episode]
) -> None:
    assert sum(map(len, episodes)) == 1500
    states = [episode.observations["state"] for episode in episodes]
    for before, after in itertools.pairwise(states):
        assert np.array_equal(before[-1], after[0])
    goals = [tuple(episode.infos["goal"][0].astype(int).tolist()) for episode in episodes]
    for episode, goal in zip(episodes, goals, strict=True):
        assert (episode.infos["goal"] == goal).all()
        assert not episode.terminations.any()
        assert episode.truncations.tolist() == [False] * (len(episode) - 1) + [True]
        final = episode.observations["state"][-1, :2]
        arrived = bool(np.linalg.norm(final - np.array(goal)) < 0.1)
        assert episode.meta["reached"] == arrived
    assert all(episode.meta["reached"] for episode in episodes[:-1])
    assert len(set(goals)) > 3
    assert set(goals) <= set(umaze.cells)


def test_rewards_in_the_data_are_of_the_fixed_goal(
    umaze: Maze2dEnv, episodes: list[Episode]
) -> None:
    for episode in episodes:
        positions = episode.observations["state"][1:, :2]
        distance = np.linalg.norm(positions - np.array(umaze.goal), axis=1)
        sure = np.abs(distance - 0.5) > 1e-5  # float32 positions decide nothing closer
        assert np.array_equal(episode.rewards[sure], (distance <= 0.5)[sure])


def test_data_replay_in_the_world(umaze: Maze2dEnv, episodes: list[Episode]) -> None:
    from mail_agents.seeding import derive_env_seed

    observation, _ = umaze.reset(seed=derive_env_seed(3, "data", 0))
    for episode in episodes:
        for t in range(len(episode)):
            np.testing.assert_allclose(
                episode.observations["state"][t], observation, rtol=0, atol=1e-6
            )
            observation, reward, *_ = umaze.step(episode.actions[t])
            assert reward == episode.rewards[t]


def test_data_depend_on_the_seed_alone(
    umaze: Maze2dEnv,
    episodes: list[Episode],
    same_arrays: Callable[[Episode, Episode], bool],
) -> None:
    again = list(collect_maze(umaze, 1500, 3, max_steps=300, task="maze2d-umaze"))
    other = list(collect_maze(umaze, 1500, 4, max_steps=300, task="maze2d-umaze"))
    assert all(map(same_arrays, episodes, again))
    assert not all(map(same_arrays, episodes, other))


@pytest.fixture(scope="module")
def same_arrays() -> Callable[[Episode, Episode], bool]:
    def same(left: Episode, right: Episode) -> bool:
        return np.array_equal(
            left.observations["state"], right.observations["state"]
        ) and np.array_equal(left.actions, right.actions)

    return same


def test_episodes_are_not_longer_than_the_limit(umaze: Maze2dEnv) -> None:
    short = list(collect_maze(umaze, 300, 0, max_steps=20, task="x"))
    assert max(map(len, short)) == 20
    assert sum(map(len, short)) == 300
    with pytest.raises(InvalidInputError, match="at least 1"):
        list(collect_maze(umaze, 0, 0, max_steps=20, task="x"))


def test_reference_returns(umaze: Maze2dEnv) -> None:
    scores = reference_returns(umaze, 5, 0, max_steps=300)
    assert scores == reference_returns(umaze, 5, 0, max_steps=300)
    assert 0 <= scores["min"] < 100 < scores["max"] <= 300
    with pytest.raises(InvalidInputError, match="at least 1 episode"):
        reference_returns(umaze, 0, max_steps=300)


@pytest.mark.usefixtures("gl")
def test_renders_ball_and_goal() -> None:
    env = gymnasium.make("mail_envs:d4rl/maze2d-umaze", render_mode="rgb_array")
    env.reset(seed=0)
    frame = np.asarray(env.render())
    assert (frame.dtype, frame.shape[-1]) == (np.uint8, 3)
    assert frame.std() > 5
    env.close()
