"""Scripted experts for tasks of robosuite 1.4 (Zhu et al. 2020)."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from mail_agents.errors import InvalidInputError
from mail_envs.grasps import Grasp, about_z, aligned_yaws, plan_grasps
from mail_envs.pick_place import CLOSE, OPEN, Motion, PlannedExpert

# Objects appear centimetres above the table and need some steps to fall.
_SETTLE_STEPS, _FALL_STEPS = 25, 4


class BoxExpert(PlannedExpert):
    """Takes one box-like object across its middle, with the fingers parallel to its sides."""

    def _play(self) -> Motion:
        yield from self._settle(_SETTLE_STEPS, _FALL_STEPS)
        while True:
            if not self._done():
                yield from self._attempt()
            yield self._hand.action(self._hand.position, self._down, OPEN)

    @abstractmethod
    def _attempt(self) -> Motion:
        """Tries once to solve the task."""

    def _done(self) -> bool:
        return bool(self._env.get_wrapper_attr("robosuite_env")._check_success())

    def _take(self, body: int) -> Motion:
        """Grasps a body at the best of its two aligned grasps."""
        turn = self._scene.data.xmat[body].reshape(3, 3)
        yaws = aligned_yaws(turn, self._closing)
        grasps = plan_grasps(self._scene, body, self._closing, rim=False, yaws=yaws)
        top = self._scene.extent(body).high[2]
        if not grasps:
            middle = np.array([*self._scene.extent(body).centre[:2], top - 0.03])
            grasps = [Grasp(middle, yaws[0], 0.0)]
        self._turned = about_z(grasps[0].yaw) @ self._down
        yield from self._grasp(grasps[0], top)

    def _carry(self, body: int, xy: np.ndarray, bottom: float, clear: float) -> Motion:
        """Carries what is held over a place, higher than ``clear``, and lowers it.

        Args:
            body: What is held.
            xy: Where its middle is to be, ``(2,)`` metres.
            bottom: Height at which to let it go, metres.
            clear: Height that its underside keeps on the way, metres.
        """
        hand = self._hand
        up = hand.position[2] + max(clear - self._scene.extent(body).low[2], 0.05)
        lift = np.array([*hand.position[:2], up])
        yield from hand.go(lift, self._turned, CLOSE, within=0.02, steps=60)
        for height, within in ((clear, 0.012), (bottom, 0.008)):
            box = self._scene.extent(body)
            offset = hand.position - np.array([*box.centre[:2], box.low[2]])
            target = offset + np.array([*xy, height])
            yield from hand.go(target, self._turned, CLOSE, within=within, steps=100)


class LiftExpert(BoxExpert):
    """Lift: takes the cube and holds it 10 cm up."""

    name = "mail_envs.robosuite_experts.LiftExpert"

    def _attempt(self) -> Motion:
        cube = self._body("cube_main")
        yield from self._take(cube)
        before = self._scene.extent(cube).low[2]
        up = self._hand.position + np.array([0.0, 0.0, 0.10])
        yield from self._hand.go(up, self._turned, CLOSE, within=0.01, steps=60)
        if self._scene.extent(cube).low[2] > before + 0.05:
            yield from self._rest(self._turned, CLOSE)


class StackExpert(BoxExpert):
    """Stack: puts the small cube on the large one."""

    name = "mail_envs.robosuite_experts.StackExpert"

    def _attempt(self) -> Motion:
        small, large = self._body("cubeA_main"), self._body("cubeB_main")
        yield from self._take(small)
        under = self._scene.extent(large)
        top = under.high[2]
        yield from self._carry(small, under.centre[:2], top + 0.004, top + 0.05)
        yield from self._release(self._turned)


class BinExpert(BoxExpert):
    """PickPlaceCan and its sisters: carries the object into its compartment of the other bin."""

    name = "mail_envs.robosuite_experts.BinExpert"

    def _attempt(self) -> Motion:
        task: Any = self._env.get_wrapper_attr("robosuite_env")
        body = self._body(task.obj_to_use)
        yield from self._take(body)
        place = np.array(task.target_bin_placements[task.object_id])
        # The middle of a compartment can be out of comfortable reach; its near corner is not.
        inward = np.sign(self._scene.base - place)[:2]
        place[:2] += inward * (np.array(task.bin_size[:2]) / 4.0 - 0.045)
        yield from self._carry(body, place[:2], place[2] + 0.03, place[2] + 0.15)
        yield from self._release(self._turned)


class NutExpert(BoxExpert):
    """NutAssemblySquare: takes the nut by its handle and threads it on the square peg."""

    name = "mail_envs.robosuite_experts.NutExpert"

    def _attempt(self) -> Motion:
        data, hand = self._scene.data, self._hand
        nut, peg = self._body("SquareNut_main"), self._body("peg1")
        handle = data.site("SquareNut_handle_site").xpos.copy()
        grasp = Grasp(handle, self._yaw_across(handle - data.xpos[nut]), 0.0)
        if not (yield from self._grasp(grasp, self._scene.extent(nut).high[2])):
            return
        turned = about_z(grasp.yaw) @ self._down
        high = self._scene.extent(peg).high[2] + 0.06
        lift = np.array([*hand.position[:2], high])
        yield from hand.go(lift, turned, CLOSE, within=0.015, steps=80)
        if data.xpos[nut][2] < handle[2] + 0.05:
            yield from hand.stay(turned, OPEN, 6)
            return
        for _ in range(3):  # the nut shifts in the hand, and turns about the handle, not the hole
            turned = about_z(self._to_quarter_turn(nut)) @ turned
            offset = hand.position - data.xpos[nut]
            over = np.array([*(data.xpos[peg] + offset)[:2], high])
            yield from hand.go(over, turned, CLOSE, within=0.004, steps=50, turned_within=0.05)
        low = np.array([*hand.position[:2], high - 0.11])
        yield from hand.go(low, turned, CLOSE, within=0.01, steps=50)
        yield from self._release(turned)

    def _yaw_across(self, handle: np.ndarray) -> float:
        """The hand's yaw, in [-pi/2, pi/2], at which the fingers close across the handle."""
        wanted = np.arctan2(handle[1], handle[0]) + np.pi / 2
        now = np.arctan2(self._closing[1], self._closing[0])
        return float((wanted - now + np.pi / 2) % np.pi - np.pi / 2)

    def _to_quarter_turn(self, nut: int) -> float:
        """Angle, at most pi/4, by which to turn the nut so that its sides are the peg's."""
        side = self._scene.data.xmat[nut].reshape(3, 3)[:, 0]
        angle = np.arctan2(side[1], side[0])
        return float(np.pi / 4 - (angle + np.pi / 4) % (np.pi / 2))


_EXPERTS: Mapping[str, type[BoxExpert]] = {
    "Lift": LiftExpert,
    "NutAssemblySquare": NutExpert,
    "PickPlaceBread": BinExpert,
    "PickPlaceCan": BinExpert,
    "PickPlaceCereal": BinExpert,
    "PickPlaceMilk": BinExpert,
    "Stack": StackExpert,
}


def robosuite_expert(env: gymnasium.Env) -> PlannedExpert:
    """The expert of a ``robosuite/<task>`` environment.

    Raises:
        InvalidInputError: There is none for this task.
    """
    task = env.get_wrapper_attr("task")
    if task not in _EXPERTS:
        raise InvalidInputError(
            f"There is no scripted expert for robosuite/{task}, only for {', '.join(_EXPERTS)}. "
            "Human demonstrations: mail-agents data convert robomimic:DIR OUT."
        )
    return _EXPERTS[task](env)
