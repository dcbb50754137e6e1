"""D4RL's maze2d (Fu et al. 2020, section 5): a force-driven ball in a maze, and the data's planner.

The simulation is ``PointMaze`` of gymnasium-robotics, turned and shifted into D4RL's coordinates:
position ``(x, y)`` is ``(row, column)`` of the maze, and the centre of a cell lies 0.2 below its
whole numbers, because D4RL puts the ball at (1.2, 1.2) of a grid that starts at (1, 1).
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

from mail_agents.data.episode import Episode
from mail_agents.errors import InvalidInputError, unknown_name
from mail_agents.seeding import derive_env_seed
from mail_envs.d4rl import import_robotics

Cell = tuple[int, int]

#: Walls, free cells and the goal of evaluation, as in D4RL's ``pointmaze/maze_model.py``.
MAZES: dict[str, tuple[str, ...]] = {
    "umaze": ("#####", "#G  #", "### #", "#   #", "#####"),
    "medium": (
        "########",
        "#  ##  #",
        "#  #   #",
        "##   ###",
        "#  #   #",
        "# #  # #",
        "#   # G#",
        "########",
    ),
    "large": (
        "############",
        "#    #     #",
        "# ## # # # #",
        "#      #   #",
        "# #### ### #",
        "#  # #     #",
        "## # # # ###",
        "#  #   # G #",
        "############",
    ),
}

_GOAL_RADIUS = 0.5
_CENTRE = 0.2
# The planner of D4RL's pointmaze/waypoint_controller.py: gains, and when a waypoint counts.
_P_GAIN, _D_GAIN, _ARRIVED = 10.0, 1.0, 0.1


class Maze2dEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Bring the ball to a fixed goal and keep it there (D4RL's ``maze2d-<maze>-v1``).

    Observation: float64 ``(4,)``: position (row, column) in cells, velocity in cells per second.
    The goal is not part of it. Action: float32 ``(2,)`` force in [-1, 1], clipped; 100 steps are
    one second. Reward after every step: 1 within 0.5 of the goal, else 0 (``"sparse"``), or
    ``exp(-distance)`` (``"dense"``). An episode never terminates; Gymnasium's TimeLimit
    truncates it after 300 (umaze), 600 (medium) or 800 (large) steps.

    A reset puts the ball into a random free cell (the goal's included), up to 0.1 off in each
    direction, with velocities of standard deviation 0.1.

    Args:
        maze: Key of :data:`MAZES`.
        reward_type: ``"sparse"`` or ``"dense"``.
        render_mode: ``"rgb_array"`` makes :meth:`render` return video frames.

    Attributes:
        cells: Free cells, in reading order.
        goal: The goal's cell; its position is the same pair of numbers.

    Raises:
        UnknownNameError: There is no such maze.
        InvalidInputError: The reward type or render mode is unknown.
        MissingDependencyError: gymnasium-robotics is not installed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 100}  # noqa: RUF012  (Gymnasium's API)

    def __init__(
        self,
        maze: str = "umaze",
        *,
        reward_type: Literal["sparse", "dense"] = "sparse",
        render_mode: str | None = None,
    ) -> None:
        if maze not in MAZES:
            raise unknown_name("maze", maze, MAZES)
        if reward_type not in ("sparse", "dense") or render_mode not in (None, "rgb_array"):
            raise InvalidInputError(
                f"reward_type={reward_type!r} must be 'sparse' or 'dense', and "
                f"render_mode={render_mode!r} None or 'rgb_array'."
            )
        rows = MAZES[maze]
        self.cells: tuple[Cell, ...] = tuple(
            (i, j) for i, row in enumerate(rows) for j, tile in enumerate(row) if tile != "#"
        )
        self.goal: Cell = next(cell for cell in self.cells if rows[cell[0]][cell[1]] == "G")
        self.reward_type, self.render_mode = reward_type, render_mode
        module = import_robotics("maze.point_maze", f"maze2d-{maze}")
        walls = np.array([[int(tile == "#") for tile in row] for row in rows])
        # A quarter turn: there, x counts columns and y counts rows from the bottom.
        self._maze = module.PointMazeEnv(walls.T[::-1].tolist(), render_mode)
        self._point = self._maze.point_env
        self._shift = np.array(walls.shape) / 2 - 0.5 - _CENTRE
        self._maze.goal = self._inside(self.goal)
        self._maze.update_target_site_pos()
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def _inside(self, position: Any) -> np.ndarray:
        return np.asarray(position, np.float64) - self._shift

    def _outside(self, state: np.ndarray) -> np.ndarray:
        return np.concatenate([state[:2] + self._shift, state[2:]])

    def cell_of(self, position: np.ndarray) -> Cell:
        """The cell that a position lies in."""
        row, column = np.round(np.asarray(position) + _CENTRE).astype(int).tolist()
        return row, column

    def reward(self, position: np.ndarray) -> float:
        """Reward for having arrived at a position."""
        distance = float(np.linalg.norm(position - np.array(self.goal)))
        return (
            float(distance <= _GOAL_RADIUS) if self.reward_type == "sparse" else np.exp(-distance)
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Puts the ball into a random cell; the same seed gives the same episode."""
        super().reset(seed=seed)
        cell = self.cells[self.np_random.integers(len(self.cells))]
        position = np.array(cell) + self.np_random.uniform(-0.1, 0.1, 2)
        velocity = 0.1 * self.np_random.standard_normal(2)
        self._point.reset()
        self._point.set_state(self._inside(position), velocity)
        return np.concatenate([position, velocity]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Applies a force for one hundredth of a second."""
        observation = self._outside(self._point.step(np.asarray(action, np.float64))[0])
        return observation, self.reward(observation[:2]), False, False, {}

    def render(self) -> Any:
        """Returns one frame; needs ``render_mode="rgb_array"``."""
        return self._maze.render()

    def close(self) -> None:
        """Frees the simulation."""
        self._maze.close()


def shortest_path(cells: tuple[Cell, ...], start: Cell, goal: Cell) -> list[Cell]:
    """Cells from after ``start`` up to ``goal``, in steps along one axis.

    Raises:
        InvalidInputError: There is no way.
    """
    free, before = set(cells), {goal: goal}
    queue = deque([goal])  # from the goal, so that following ``before`` leads to it
    while queue and start not in before:
        i, j = queue.popleft()
        for cell in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if cell in free and cell not in before:
                before[cell] = (i, j)
                queue.append(cell)
    if start not in before:
        raise InvalidInputError(f"There is no way from cell {start} to cell {goal} of this maze.")
    path, cell = [], start
    while cell != goal:
        cell = before[cell]
        path.append(cell)
    return path or [goal]


class WaypointController:
    """The planner that D4RL's maze2d data come from: shortest path over cells, followed by PD.

    Waypoints before the last are moved toward the middle of their cell by a random 0 to 0.2.

    Args:
        env: The maze.
        rng: Random stream of the waypoints.
    """

    def __init__(self, env: Maze2dEnv, rng: np.random.Generator) -> None:
        self._env = env
        self._rng = rng
        self._waypoints: list[np.ndarray] = []

    def plan(self, observation: np.ndarray, goal: Cell) -> None:
        """Finds the way from where the ball is to a cell."""
        path = shortest_path(self._env.cells, self._env.cell_of(observation[:2]), goal)
        points = [np.array(cell) - self._rng.uniform(0.0, _CENTRE, 2) for cell in path[:-1]]
        self._waypoints = [*points, np.array(path[-1], np.float64)]

    def arrived(self, observation: np.ndarray) -> bool:
        """Whether the ball is within 0.1 of the goal."""
        return bool(np.linalg.norm(self._waypoints[-1] - observation[:2]) < _ARRIVED)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Returns the float32 ``(2,)`` force toward the next waypoint."""
        position, velocity = observation[:2], observation[2:]
        force = _P_GAIN * (self._waypoints[0] - position) - _D_GAIN * velocity
        if len(self._waypoints) > 1 and np.linalg.norm(self._waypoints[0] - position) < _ARRIVED:
            self._waypoints.pop(0)
        return np.clip(force, -1.0, 1.0).astype(np.float32)


def collect_maze(
    env: Maze2dEnv, transitions: int, seed: int = 0, *, max_steps: int, task: str
) -> Iterator[Episode]:
    """One long trajectory between random goals, cut where the goal changes, as D4RL's data are.

    The ball is never reset: an episode starts where the one before it ended. It is truncated when
    its own goal is reached, after ``max_steps``, or when there are enough transitions. Rewards are
    those of the environment's fixed goal, whatever goal the planner had: most episodes pass it by
    chance, and that is what an agent has to stitch together. D4RL's script repeats the observation
    at a change of goal and relabels each row with the reward of its own observation; here rows are
    a trajectory that happened, and the reward is the one after the action.

    Args:
        env: The maze, not wrapped.
        transitions: How many, over all episodes.
        seed: Decides everything.
        max_steps: Longest episode.
        task: Task name of the episodes.

    Yields:
        Episodes with float32 ``state`` ``(T+1, 4)``; ``infos["goal"]`` is the planner's goal
        ``(T, 2)`` and ``meta["reached"]`` whether it got there.

    Raises:
        InvalidInputError: A number is less than 1.
    """
    if min(transitions, max_steps) < 1:
        raise InvalidInputError(f"{transitions=} and {max_steps=} must be at least 1.")
    start = derive_env_seed(seed, "data", 0)
    rng = np.random.default_rng([start, 1])
    controller = WaypointController(env, rng)
    observation, _ = env.reset(seed=start)
    left, number = transitions, 0
    while left:
        here = env.cell_of(observation[:2])
        others = [cell for cell in env.cells if cell != here]
        goal = others[rng.integers(len(others))]
        controller.plan(observation, goal)
        observations, actions, rewards = [observation], [], []
        while len(actions) < min(max_steps, left) and not controller.arrived(observation):
            action = controller.act(observation)
            observation, reward, *_ = env.step(action)
            observations.append(observation)
            actions.append(action)
            rewards.append(reward)
        length = len(actions)
        yield Episode(
            observations={"state": np.array(observations, np.float32)},
            actions=np.array(actions),
            rewards=np.array(rewards, np.float32),
            terminations=np.zeros(length, bool),
            truncations=np.arange(length) == length - 1,
            task=task,
            meta={"source_id": f"{number:06d}", "reached": controller.arrived(observation)},
            infos={"goal": np.tile(np.array(goal, np.float32), (length, 1))},
        )
        left -= length
        number += 1


def reference_returns(
    env: Maze2dEnv, episodes: int, seed: int = 0, *, max_steps: int
) -> dict[str, float]:
    """Mean returns of uniformly random actions and of the planner sent to the fixed goal.

    This is how D4RL's reference scores of maze2d were made (``scripts/reference_scores``).

    Returns:
        ``{"min": ..., "max": ...}`` over ``episodes`` episodes of ``max_steps`` steps each.

    Raises:
        InvalidInputError: ``episodes`` is less than 1.
    """
    if episodes < 1:
        raise InvalidInputError(f"A reference needs at least 1 episode, got {episodes}.")
    rng = np.random.default_rng([derive_env_seed(seed, "data", 1), 1])
    controller = WaypointController(env, rng)

    def mean_return(act: Callable[[np.ndarray], np.ndarray]) -> float:
        total = 0.0
        for index in range(episodes):
            observation, _ = env.reset(seed=derive_env_seed(seed, "data", 1, index))
            controller.plan(observation, env.goal)
            for _ in range(max_steps):
                observation, reward, *_ = env.step(act(observation))
                total += float(reward)
        return total / episodes

    return {
        "min": mean_return(lambda observation: rng.uniform(-1.0, 1.0, 2)),
        "max": mean_return(controller.act),
    }
