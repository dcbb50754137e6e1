"""Picking and placing with a parallel gripper that sees everything: geometry, grasps and motions.

Everything here is measured in the simulator: contact shapes instead of images, and the pose of the
hand instead of joint readings. Actions are those of robosuite's ``OSC_POSE`` controller: hand
displacement (1 is 5 cm), rotation vector (1 is 0.5 rad), both along the world's axes, and gripper
(+1 closes, -1 opens).
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from mail_agents.errors import InvalidInputError
from mail_envs.rendering import import_mujoco

mujoco = import_mujoco("The scripted experts")

#: A part of a plan: yields actions, returns when its motion is over.
Motion = Generator[np.ndarray, None, None]

OPEN, CLOSE = -1.0, 1.0

#: Noise per unit of ``noise_std``: rotations suffer more from it, the gripper is a switch.
NOISE_SCALE = np.array([1.0, 1.0, 1.0, 0.2, 0.2, 0.2, 0.0])

#: Horizontal distance from the arm's base, in metres, from which on the elbow is nearly straight: a
#: straight elbow does not bend again under this controller.
COMFORTABLE_REACH = 0.70

#: Widest object, in metres, that fits between the fingers of the Panda's hand (0.08) with a margin.
MAX_WIDTH = 0.074

_UP = np.array([0.0, 0.0, 1.0])
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
        robot = np.array([name.startswith(_ROBOT) for name in roots])
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


class Hand:
    """The Panda's hand, driven by ``OSC_POSE`` actions.

    Args:
        scene: The scene that it is in.

    Raises:
        InvalidInputError: The model has no such hand.
    """

    def __init__(self, scene: Scene) -> None:
        self._data = scene.data
        site = mujoco.mj_name2id(scene.model, mujoco.mjtObj.mjOBJ_SITE, "gripper0_grip_site")
        fingers = [
            mujoco.mj_name2id(scene.model, mujoco.mjtObj.mjOBJ_JOINT, f"gripper0_finger_joint{i}")
            for i in (1, 2)
        ]
        if site < 0 or min(fingers) < 0:
            raise InvalidInputError(
                "The scripted experts need a Panda arm with its own gripper (site "
                "gripper0_grip_site, joints gripper0_finger_joint1 and 2), which this "
                "environment does not have."
            )
        self._site, self._finger = site, fingers[0]
        self._qpos = scene.model.jnt_qposadr[fingers]

    @property
    def position(self) -> np.ndarray:
        """Point between the finger tips, ``(3,)`` metres."""
        return self._data.site_xpos[self._site].copy()

    @property
    def rotation(self) -> np.ndarray:
        """Orientation matrix ``(3, 3)``, as the controller sees it."""
        return self._data.site_xmat[self._site].reshape(3, 3).copy()

    @property
    def opening(self) -> float:
        """Distance between the fingers in metres: 0 is closed, 0.08 is open."""
        return float(np.abs(self._data.qpos[self._qpos]).sum())

    def upright(self) -> tuple[np.ndarray, np.ndarray]:
        """The nearest orientation that points down along the world's axes.

        Returns:
            Orientation matrix, and the unit vector along which the fingers then close.
        """
        now = self.rotation
        x = np.zeros(3)
        largest = np.argmax(np.abs(now[:2, 0]))
        x[largest] = np.sign(now[largest, 0])
        down = np.column_stack([x, np.cross(-_UP, x), -_UP])
        return down, down @ now.T @ self._data.xaxis[self._finger]

    def action(
        self,
        target: np.ndarray,
        rotation: np.ndarray,
        gripper: float,
        push: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        """One proportional step towards a pose, float64 ``(7,)`` in [-1, 1]; ``push`` is added."""
        move = np.clip(12.0 * (target - self.position) + push, -1.0, 1.0)
        turn = np.clip(2.0 * rotation_vector(rotation @ self.rotation.T), -0.5, 0.5)
        return np.concatenate([move, turn, [gripper]])

    def go(
        self,
        target: np.ndarray,
        rotation: np.ndarray,
        gripper: float,
        *,
        within: float,
        steps: int,
        turned_within: float = np.inf,
    ) -> Motion:
        """Moves to a pose and returns when it is near enough, or after ``steps`` steps."""
        push = np.zeros(3)
        for _ in range(steps):
            turned = np.linalg.norm(rotation_vector(rotation @ self.rotation.T))
            error = target - self.position
            distance = np.linalg.norm(error)
            if distance < within and turned < turned_within:
                return
            if within < distance < 0.04:  # an outstretched arm sags and stops short without this
                push = np.clip(push + 2.0 * error, -0.6, 0.6)
            yield self.action(target, rotation, gripper, push)

    def stay(self, rotation: np.ndarray, gripper: float, steps: int) -> Motion:
        """Stays where it is now for ``steps`` steps."""
        target = self.position
        for _ in range(steps):
            yield self.action(target, rotation, gripper)


class PlannedExpert:
    """An expert of a Panda arm whose plan is written as a generator of actions.

    Args:
        env: An environment whose ``model``, ``data`` and ``body_id`` can be read.
    """

    name = "mail_envs.pick_place.PlannedExpert"
    noise_scale = NOISE_SCALE

    def __init__(self, env: gymnasium.Env) -> None:
        self._env = env
        self._plan: Motion | None = None

    def reset(self) -> None:
        """Plans anew from the state that the environment is in."""
        env = self._env  # a reset may have replaced the model
        self._scene = Scene(env.get_wrapper_attr("model"), env.get_wrapper_attr("data"))
        self._hand = Hand(self._scene)
        self._down, self._closing = self._hand.upright()
        self._start = self._hand.position
        self._plan = self._play()

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the float32 ``(7,)`` action for the simulator's present state."""
        if self._plan is None:
            raise InvalidInputError("Call the expert's reset() after env.reset().")
        return next(self._plan).astype(np.float32)

    def _play(self) -> Motion:
        """The whole episode; never returns."""
        raise NotImplementedError

    def _body(self, name: str) -> int:
        return self._env.get_wrapper_attr("body_id")(name)

    def _settle(self, steps: int, at_least: int = 0) -> Motion:
        """Waits with an open hand until everything has come to rest, at most ``steps`` steps.

        What has only just been let go does not move yet either: hence ``at_least``.
        """
        for step in range(steps):
            if step >= at_least and not self._scene.moving():
                return
            yield self._hand.action(self._start, self._down, OPEN)

    def _rest(self, rotation: np.ndarray, gripper: float) -> Motion:
        """Stays here for ever."""
        target = self._hand.position
        while True:
            yield self._hand.action(target, rotation, gripper)

    def _grasp(self, grasp: Grasp, top: float) -> Generator[np.ndarray, None, bool]:
        """Goes above a grasp, down, and closes the hand.

        Args:
            grasp: Where.
            top: Height of the object's top, metres.

        Returns:
            False when something was in the way; the hand is then open and above again.
        """
        hand, turned = self._hand, about_z(grasp.yaw) @ self._down
        above = np.array([*grasp.point[:2], top + 0.10])
        # Turning with an outstretched arm may straighten the elbow for good, so turn at home first.
        if np.linalg.norm(rotation_vector(turned @ hand.rotation.T)) > 0.3:
            yield from hand.go(self._start, turned, OPEN, within=0.08, steps=60, turned_within=0.3)
        yield from hand.go(above, turned, OPEN, within=0.015, steps=100, turned_within=0.1)
        yield from hand.go(grasp.point, turned, OPEN, within=0.008, steps=60)
        if np.linalg.norm(grasp.point - hand.position) > 0.015:
            yield from hand.go(above, turned, OPEN, within=0.02, steps=40)
            return False
        yield from hand.stay(turned, CLOSE, 12)
        return True

    def _release(self, rotation: np.ndarray) -> Motion:
        """Opens the hand, goes up 10 cm and waits for what it let go."""
        hand = self._hand
        yield from hand.stay(rotation, OPEN, 10)
        away = hand.position + np.array([0.0, 0.0, 0.10])
        yield from hand.go(away, rotation, OPEN, within=0.02, steps=40)
        for _ in range(20):
            if not self._scene.moving():
                return
            yield from hand.stay(rotation, OPEN, 1)


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle, ``(3,)`` radians, of a rotation matrix ``(3, 3)``."""
    quaternion = np.empty(4)
    vector = np.empty(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


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
        yaws = np.pi / 8 * np.arange(-3, 5) if rim else np.pi / 4 * np.arange(-1, 3)
    obstacles = scene.obstacles(body)
    grasps = []
    for yaw in yaws:
        along = about_z(yaw) @ closing
        axes = np.stack([along, np.cross(_UP, along), _UP])
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
