"""D4RL's antmaze (Fu et al. 2020, section 5): an ant walks to the far end of a maze.

Gymnasium's ant, with the numbers of D4RL's (``d4rl/locomotion/assets/ant.xml``: weaker motors,
longer steps, other contacts), between walls at D4RL's coordinates.
"""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from mail_agents.errors import InvalidInputError, unknown_name
from mail_envs.d4rl import warn_physics
from mail_envs.pointmaze import MAZES, Cell
from mail_envs.rendering import OffscreenRenderer, import_mujoco

#: Where the ant starts: the origin of D4RL's coordinates.
START: Cell = (1, 1)
#: Where it shall go. D4RL evaluates "play" and "diverse" data with the same goal.
GOALS: dict[str, Cell] = {"umaze": (3, 1), "medium": (6, 6), "large": (7, 9)}

_CELL, _WALL_HEIGHT, _GOAL_RADIUS = 4.0, 2.0, 0.5
_STEPS_PER_ACTION = 5
_CAMERA = "above"


class AntMazeEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Reach the goal once: reward 1 and the end within 0.5 of it, else 0 (antmaze version 2).

    Observation: float64 ``(29,)``: positions (15, the first two are ``x`` along columns and ``y``
    along rows, in metres from the start) and velocities (14). The goal is not part of it. Action:
    float32 ``(8,)`` torques in [-1, 1], clipped; ten steps are one second. ``info`` is empty.

    A reset draws a goal: the goal cell's centre plus up to 1.5 in both directions, as D4RL does.

    Args:
        maze: ``"umaze"``, ``"medium"`` or ``"large"``.
        render_mode: ``"rgb_array"`` makes :meth:`render` return frames from above.

    Raises:
        UnknownNameError: There is no such maze.
        InvalidInputError: The render mode is unknown.
        MissingDependencyError: MuJoCo is not installed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  (Gymnasium's API)

    def __init__(self, maze: str = "umaze", render_mode: str | None = None) -> None:
        if maze not in GOALS:
            raise unknown_name("ant maze", maze, GOALS)
        if render_mode not in (None, "rgb_array"):
            raise InvalidInputError(f"render_mode={render_mode!r} must be None or 'rgb_array'.")
        self._mujoco = import_mujoco("antmaze")
        warn_physics(self, f"antmaze-{maze}", "Gymnasium's ant with D4RL's motors")
        self._model = self._mujoco.MjModel.from_xml_string(maze_xml(maze))
        self._data = self._mujoco.MjData(self._model)
        self._renderer = OffscreenRenderer(480)
        self._cell = position_of(GOALS[maze])
        self.goal = self._cell.copy()
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-np.inf, np.inf, (29,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (8,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Puts the ant at the start, slightly disturbed, and draws a goal."""
        super().reset(seed=seed)
        draw = self.np_random
        self.goal = self._cell + draw.uniform(0.0, 1.0, 2) + draw.uniform(0.0, 0.5, 2)
        self._mujoco.mj_resetData(self._model, self._data)
        self._data.qpos += draw.uniform(-0.1, 0.1, self._model.nq)
        self._data.qvel += 0.1 * draw.standard_normal(self._model.nv)
        self._mujoco.mj_forward(self._model, self._data)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Applies torques for a tenth of a second."""
        self._data.ctrl[:] = np.clip(action, -1.0, 1.0)
        self._mujoco.mj_step(self._model, self._data, nstep=_STEPS_PER_ACTION)
        state = self._observe()
        there = bool(np.linalg.norm(state[:2] - self.goal) <= _GOAL_RADIUS)
        return state, float(there), there, False, {}

    def render(self) -> Any:
        """Returns one frame from above, or None without a render mode."""
        if self.render_mode is None:
            return None
        return self._renderer.render(self._model, self._data, _CAMERA)

    def close(self) -> None:
        """Frees the OpenGL context."""
        self._renderer.close()

    def _observe(self) -> np.ndarray:
        return np.concatenate([self._data.qpos[:15], self._data.qvel[:14]])


def position_of(cell: Cell) -> np.ndarray:
    """Centre of a cell, ``(x, y)`` in metres from the start."""
    return _CELL * np.array([cell[1] - START[1], cell[0] - START[0]], np.float64)


def maze_xml(maze: str) -> str:
    """MuJoCo description of ant and walls."""
    assets = Path(gymnasium.__path__[0]) / "envs" / "mujoco" / "assets"
    root = ET.parse(assets / "ant.xml").getroot()
    _find(root, "option").set("timestep", "0.02")
    contacts = _find(root, "default/geom")
    contacts.set("solref", ".02 1")
    contacts.set("solimp", ".8 .8 .01")
    for motor in root.findall("actuator/motor"):
        motor.set("gear", "30")
    world, rows = _find(root, "worldbody"), MAZES[maze]
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if tile == "#":
                x, y = position_of((i, j))
                half = f"{_CELL / 2} {_CELL / 2} {_WALL_HEIGHT / 2}"
                wall = {"name": f"wall_{i}_{j}", "type": "box", "size": half}
                place = {"pos": f"{x} {y} {_WALL_HEIGHT / 2}", "contype": "1", "conaffinity": "1"}
                ET.SubElement(world, "geom", wall | place | {"rgba": ".7 .5 .3 1"})
    middle = (position_of((0, 0)) + position_of((len(rows) - 1, len(rows[0]) - 1))) / 2
    height = 1.4 * _CELL * max(len(rows), len(rows[0]))
    above = {"name": _CAMERA, "pos": f"{middle[0]} {middle[1]} {height}"}
    ET.SubElement(world, "camera", above)
    return ET.tostring(root, encoding="unicode")


def _find(root: ET.Element, path: str) -> ET.Element:
    found = root.find(path)
    if found is None:
        raise InvalidInputError(
            f"Gymnasium's ant.xml has no {path!r}; antmaze is built on it. Install the tested "
            "version: pip install -c constraints.txt gymnasium."
        )
    return found
