"""A scripted expert for the pick-and-place tasks of LIBERO (Liu et al. 2023)."""

from dataclasses import dataclass

import gymnasium
import numpy as np

from mail_agents.errors import InvalidInputError
from mail_envs.grasps import Extent, about_z, mujoco, plan_grasps
from mail_envs.pick_place import CLOSE, OPEN, Motion, PlannedExpert

#: Goal predicates that a pick-and-place reaches.
_PLACEMENTS = ("in", "on")

#: What is taken by the rim: everything hollow, by parts of its name.
_HOLLOW = ("bowl", "mug")

#: Longest wait for things to come to rest at the start, in steps.
_SETTLE_STEPS = 15


@dataclass(frozen=True)
class Place:
    """Where a goal wants an object.

    Attributes:
        body: Body of the destination; 0 is the table or floor.
        site: Site that marks the region, or None when the destination is an object.
        inside: Whether the object goes into the destination, or onto it.
    """

    body: int
    site: int | None
    inside: bool


class LiberoExpert(PlannedExpert):
    """Picks up the object of each goal from above and puts it where the goal wants it.

    It knows where everything is. An object that was lost, or lies beside its goal, is picked up
    again, until the environment's time limit. Goals other than ``in`` and ``on`` (drawers, knobs,
    the microwave's door) are beyond it.

    Args:
        env: A ``libero_*/<task>`` environment.

    Raises:
        InvalidInputError: The task has a goal that is not a pick-and-place.
    """

    name = "mail_envs.libero_expert.LiberoExpert"

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self._goals: list[list[str]] = env.get_wrapper_attr("goals")
        for goal in self._goals:
            if goal[0].lower() not in _PLACEMENTS or not self._movable(goal[1]):
                raise InvalidInputError(
                    f"The scripted expert only picks and places, and "
                    f"{env.get_wrapper_attr('world')} wants '{' '.join(goal)}'. "
                    "scripts/measure_experts.py tells which tasks it does how often; for others "
                    "convert human demonstrations: mail-agents data convert libero:DIR OUT."
                )

    def _movable(self, name: str) -> bool:
        model = self._env.get_wrapper_attr("model")
        joint = model.body_jntadr[self._body(name)]
        return bool(joint >= 0 and model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE)

    def _play(self) -> Motion:
        yield from self._settle(_SETTLE_STEPS)
        goals, tries = self._goals, [0] * len(self._goals)
        while True:
            wanting = [i for i, goal in enumerate(goals) if not self._placed(goal)]
            if not wanting:
                yield self._hand.action(self._hand.position, self._down, OPEN)
                continue
            first = min(wanting, key=lambda i: (tries[i], i))
            yield from self._pick_and_place(goals[first], tries[first])
            tries[first] += 1

    def _pick_and_place(self, goal: list[str], attempt: int) -> Motion:
        """One attempt at a goal; gives up early when the object slips away."""
        body, place, hand = self._body(goal[1]), self._place(goal), self._hand
        rim = any(part in goal[1] for part in _HOLLOW)
        grasps = plan_grasps(self._scene, body, self._closing, rim=rim)
        if not grasps:
            yield from hand.stay(self._down, OPEN, 1)
            return
        grasp = grasps[attempt % len(grasps)]
        turned, before = about_z(grasp.yaw) @ self._down, self._scene.extent(body)
        if not (yield from self._grasp(grasp, before.high[2])):
            return
        top = self._target(place).high[2]
        carry = max(self._start[2], top + 0.12, grasp.point[2] + 0.10)
        lift = np.array([*hand.position[:2], carry])
        yield from hand.go(lift, turned, CLOSE, within=0.02, steps=60)
        if self._scene.extent(body).low[2] < before.low[2] + 0.02:
            yield from hand.stay(turned, OPEN, 6)
            return
        turned = about_z(self._angle_to_fit(body, place)) @ turned
        yield from self._put(body, place, turned, carry)
        yield from self._release(turned)

    def _put(self, body: int, place: Place, turned: np.ndarray, carry: float) -> Motion:
        """Carries what is in the hand over its place and lowers it."""
        hand = self._hand
        held = self._scene.extent(body)
        offset = hand.position - np.array([*held.centre[:2], held.low[2]])
        target = self._target(place)
        top = target.high[2]
        height = max(carry, top + 0.03 + offset[2]) if place.inside else carry
        over = np.array([*(target.centre[:2] + offset[:2]), height])
        narrow = place.site is not None and target.size[:2].min() < 0.08
        within = 0.006 if narrow else 0.012
        yield from hand.go(over, turned, CLOSE, within=within, steps=120, turned_within=0.1)
        held = self._scene.extent(body)
        offset = hand.position - np.array([*held.centre[:2], held.low[2]])
        if place.inside:
            low = max(top + 0.02, target.low[2] + offset[2] + 0.02)
        else:
            low = top - 0.005 + offset[2]
        down = np.array([*(target.centre[:2] + offset[:2]), low])
        yield from hand.go(down, turned, CLOSE, within=0.010, steps=60)

    def _angle_to_fit(self, body: int, place: Place) -> float:
        """Angle by which to turn what is held so that its long side lies along a narrow region."""
        sides = self._target(place).size[:2]
        if place.site is None or not place.inside or sides.max() < 1.5 * sides.min():
            return 0.0
        turn = self._scene.data.xmat[body].reshape(3, 3)
        size = self._scene.extent(body, turn.T).size * np.linalg.norm(turn[:2], axis=0)
        side = turn[:, np.argmax(size)]
        angle = np.arctan2(side[1], side[0]) - np.argmax(sides) * np.pi / 2
        return float(np.pi / 2 - (angle + np.pi / 2) % np.pi)

    def _place(self, goal: list[str]) -> Place:
        model, name = self._scene.model, goal[2]
        inside = goal[0].lower() == "in"
        site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, name)
        if site < 0:
            return Place(self._body(name), None, inside)
        return Place(int(model.site_bodyid[site]), site, inside)

    def _target(self, place: Place) -> Extent:
        """The region in which the object is to stand: its floor, its rim, its middle."""
        data, model = self._scene.data, self._scene.model
        if place.site is None:
            return self._scene.extent(place.body)
        half = np.abs(data.site_xmat[place.site].reshape(3, 3)) @ model.site_size[place.site]
        centre = data.site_xpos[place.site]
        low, high = centre - half, centre + half
        if place.inside:  # a region often ends below the walls around it
            high[2] = max(high[2], self._scene.extent(place.body).high[2])
        return Extent(low, high)

    def _placed(self, goal: list[str]) -> bool:
        """Whether LIBERO says that this part of the goal is reached."""
        return bool(self._env.get_wrapper_attr("robosuite_env")._eval_predicate(goal))
