"""Picking and placing with a Panda's hand: its motions, and what all such experts share.

Experts see everything: contact shapes instead of images, the hand's pose instead of joint angles.
Actions are those of robosuite's ``OSC_POSE`` controller: hand displacement (1 is 5 cm) and rotation
vector (1 is 0.5 rad), both along the world's axes, and gripper (+1 closes, -1 opens).
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping

import gymnasium
import numpy as np

from mail_agents.errors import InvalidInputError
from mail_envs.grasps import UP, Grasp, Scene, about_z, mujoco

#: A part of a plan: yields actions, returns when its motion is over.
Motion = Generator[np.ndarray, None, None]

OPEN, CLOSE = -1.0, 1.0

#: Noise per unit of ``noise_std``: rotations suffer more from it, the gripper is a switch.
NOISE_SCALE = np.array([1.0, 1.0, 1.0, 0.2, 0.2, 0.2, 0.0])


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
        down = np.column_stack([x, np.cross(-UP, x), -UP])
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


class PlannedExpert(ABC):
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

    @abstractmethod
    def _play(self) -> Motion:
        """The whole episode; never returns."""

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
        # First across, then down: what was filled last may stand in between.
        across = np.array([*above[:2], max(above[2], hand.position[2])])
        yield from hand.go(across, turned, OPEN, within=0.06, steps=60)
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
