"""Geometry for grasping: contact shapes of a MuJoCo scene, and where a hand can close around one.

Everything is read from the simulator, in metres and along the world's axes; +z is up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mail_envs.rendering import import_mujoco

mujoco = import_mujoco("The scripted experts")

#: Horizontal distance from the arm's base, in metres, from which on the elbow is nearly straight: a
#: straight elbow does not bend again under this controller.
COMFORTABLE_REACH = 0.70

#: Widest object, in metres, that fits between the fingers of the Panda's hand (0.08) with a margin.
MAX_WIDTH = 0.074

#: Unit vector upwards.
UP = np.array([0.0, 0.0, 1.0])

_ROBOT = ("robot", "gripper", "mount")


@dataclass(frozen=True)
class Extent:
    """Smallest box around some shapes, along three given directions, in metres."""

    low: np.ndarray
    high: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """Middle of the box, ``(3,)``, along the same directions."""
        return (self.low + self.high) / 2.0

    @property
    def size(self) -> np.ndarray:
        """Lengths of the edges, ``(3,)``."""
        return self.high - self.low


class Scene:
    """Contact shapes of a MuJoCo model where they are now.

    Args:
        model: ``mujoco.MjModel``.
        data: Its ``mujoco.MjData``; read at every call.
    """

    def __init__(self, model: Any, data: Any) -> None:
        self.model, self.data = model, data
        solid = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
        plane = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
        self._solid = solid & ~plane
        roots = [model.body(int(root)).name for root in model.body_rootid[model.geom_bodyid]]
        robot = np.array([name.startswith(_ROBOT) for name in roots], bool)
        self._obstacles = self._solid & ~robot & (model.geom_bodyid != 0)

    def shapes(self, body: int) -> np.ndarray:
        """Indices of the contact shapes of a body and of everything attached to it."""
        inside = np.zeros(self.model.nbody, bool)
        inside[body] = True
        for child in range(body + 1, self.model.nbody):  # parents come before their children
            inside[child] |= inside[self.model.body_parentid[child]]
        return np.flatnonzero(self._solid & inside[self.model.geom_bodyid])

    def obstacles(self, without: int) -> np.ndarray:
        """Indices of all contact shapes but those of the robot and of one body."""
        obstacles = self._obstacles.copy()
        obstacles[self.shapes(without)] = False
        return np.flatnonzero(obstacles)

    def spans(self, shapes: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest coordinate of each shape's bounding box along given directions.

        Args:
            shapes: Indices, ``(N,)``.
            axes: Unit vectors in its rows, ``(3, 3)``.

        Returns:
            Two arrays ``(N, 3)``.
        """
        turn = self.data.geom_xmat[shapes].reshape(-1, 3, 3)
        middle, half = self.model.geom_aabb[shapes, :3], self.model.geom_aabb[shapes, 3:]
        centre = self.data.geom_xpos[shapes] + np.einsum("nij,nj->ni", turn, middle)
        reach = np.einsum("nij,nj->ni", np.abs(axes @ turn), half)
        return centre @ axes.T - reach, centre @ axes.T + reach

    def extent(self, body: int, axes: np.ndarray | None = None) -> Extent:
        """Box around a body's contact shapes, along the world's axes unless others are given.

        A body without contact shapes is a point at its origin.
        """
        axes = np.eye(3) if axes is None else axes
        low, high = self.spans(self.shapes(body), axes)
        if not len(low):
            low = high = (axes @ self.data.xpos[body])[None]
        return Extent(low.min(axis=0), high.max(axis=0))

    @property
    def base(self) -> np.ndarray:
        """Where the arm stands, ``(3,)`` metres; the world's origin in a scene without one."""
        body = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_BODY, "robot0_base")
        return self.data.xpos[max(body, 0)]

    def moving(self, speed: float = 0.01) -> bool:
        """Whether a free body is faster than ``speed`` (m/s, and ten times that in rad/s).

        What is out of the arm's reach does not count: robosuite drops unused objects for ever.
        """
        model, data = self.model, self.data
        for joint in np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_FREE):
            velocity = data.qvel[model.jnt_dofadr[joint] :][:6]
            fast = np.abs(velocity[:3]).max() > speed or np.abs(velocity[3:]).max() > 10.0 * speed
            if fast and np.linalg.norm(data.xpos[model.jnt_bodyid[joint]] - self.base) < 2.0:
                return True
        return False


@dataclass(frozen=True)
class Grasp:
    """Where to close the fingers, from above.

    Attributes:
        point: Point between the finger tips, ``(3,)`` metres.
        yaw: Rotation about the vertical, radians, from the upright hand.
        cost: Metres of penetration of hand and fingers with other things, plus half the metres
            beyond the comfortable reach, plus small preferences.
    """

    point: np.ndarray
    yaw: float
    cost: float


def about_z(angle: float) -> np.ndarray:
    """Matrix ``(3, 3)`` of a rotation about the vertical by ``angle`` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def plan_grasps(
    scene: Scene,
    body: int,
    closing: np.ndarray,
    *,
    rim: bool,
    yaws: Sequence[float] | None = None,
) -> list[Grasp]:
    """Grasps of a body from above, the best first.

    Args:
        scene: Where it lies.
        body: Its index.
        closing: Horizontal unit vector along which the fingers close at yaw 0.
        rim: Whether to take it by the rim (bowls), or across its middle.
        yaws: Hand rotations to try, in radians; None tries eight for a rim, else four.

    Returns:
        Empty when the body is too wide for the fingers at every yaw.
    """
    if yaws is None:
        eighths = range(-3, 5) if rim else range(-2, 5, 2)
        yaws = [np.pi / 8 * eighth for eighth in eighths]
    obstacles = scene.obstacles(body)
    grasps = []
    for yaw in yaws:
        along = about_z(yaw) @ closing
        axes = np.stack([along, np.cross(UP, along), UP])
        low, high = scene.spans(obstacles, axes)
        box = scene.extent(body, axes)
        for point, preference in _rim_points(box) if rim else _middle_points(box):
            far = np.linalg.norm((point @ axes - scene.base)[:2]) - COMFORTABLE_REACH
            cost = _penetration(point, low, high) + preference + 0.002 * abs(yaw)
            grasps.append(Grasp(point @ axes, float(yaw), float(cost + 0.5 * max(far, 0.0))))
    return sorted(grasps, key=lambda grasp: grasp.cost)


def aligned_yaws(turn: np.ndarray, closing: np.ndarray) -> list[float]:
    """The two hand rotations at which the fingers are parallel to a box's sides, small one first.

    Args:
        turn: Orientation matrix of the box, ``(3, 3)``.
        closing: Horizontal unit vector along which the fingers close at yaw 0.

    Returns:
        Radians in [-pi/4, pi/4], and that plus or minus a quarter turn.
    """
    side = turn[:, np.argmax(np.linalg.norm(turn[:2], axis=0))]
    angle = np.arctan2(side[1], side[0]) - np.arctan2(closing[1], closing[0])
    small = float((angle + np.pi / 4) % (np.pi / 2) - np.pi / 4)
    return [small, small - np.copysign(np.pi / 2, small)]


def _middle_points(box: Extent) -> Iterator[tuple[np.ndarray, float]]:
    if box.size[0] > MAX_WIDTH:
        return
    height = max(box.high[2] - 0.03, box.low[2] + 0.012)
    for share in (0.0, 0.25, -0.25) if box.size[1] > 0.06 else (0.0,):
        across = box.centre[1] + share * box.size[1]
        yield np.array([box.centre[0], across, height]), 0.002 * abs(share)


def _rim_points(box: Extent) -> Iterator[tuple[np.ndarray, float]]:
    radius = box.size[:2].min() / 2.0 - 0.004
    for side in (-1.0, 1.0):
        yield np.array([box.centre[0] + side * radius, box.centre[1], box.high[2] - 0.012]), 0.0


# Palm and two fingers: offset from the grasp point and half sizes, along (closing, across, up).
_HAND_BOXES = (
    ((0.0, 0.0, 0.1425), (0.105, 0.035, 0.1075)),
    ((0.052, 0.0, 0.024), (0.014, 0.012, 0.036)),
    ((-0.052, 0.0, 0.024), (0.014, 0.012, 0.036)),
)


def _penetration(point: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Sum over shapes of how deep hand and fingers at ``point`` would be inside them, metres."""
    total = 0.0
    for offset, half in _HAND_BOXES:
        centre = point + offset
        depth = np.minimum(centre + half, high) - np.maximum(centre - half, low)
        total += float(np.clip(depth.min(axis=1), 0.0, None).sum())
    return total
