"""D4RL's locomotion, hand and kitchen tasks on today's simulators, with D4RL's numbers.

Observations, action range, rewards and ends are those of D4RL's environments; bodies and physics
are those of Gymnasium and gymnasium-robotics on the installed MuJoCo. Data recorded with MuJoCo 2
therefore meet slightly other dynamics here, and a :class:`D4RLPhysicsWarning` says so. ``maze2d``
is in :mod:`mail_envs.pointmaze`, ``antmaze`` in :mod:`mail_envs.antmaze`.
"""

import contextlib
import io
import warnings
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from mail_agents.errors import InvalidInputError, require, unknown_name
from mail_envs.rendering import import_mujoco
from mail_wrappers.datasets.d4rl_names import WORLDS, D4RLWorld

#: Subtasks of each kitchen dataset (``d4rl/kitchen/kitchen_envs.py``).
KITCHEN_TASKS: dict[str, tuple[str, ...]] = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}

_BODIES = {
    "hopper": ("hopper_v4", "HopperEnv"),
    "halfcheetah": ("half_cheetah_v4", "HalfCheetahEnv"),
    "walker2d": ("walker2d_v4", "Walker2dEnv"),
    "ant": ("ant_v4", "AntEnv"),
}
_HANDS = {
    "pen": ("adroit_pen", "AdroitHandPenEnv"),
    "hammer": ("adroit_hammer", "AdroitHandHammerEnv"),
    "door": ("adroit_door", "AdroitHandDoorEnv"),
    "relocate": ("adroit_relocate", "AdroitHandRelocateEnv"),
}
# Where the observation holds palm and object, or their difference (d4rl/hand_manipulation_suite).
_PALM_TO_OBJECT = {
    "hammer": lambda state: state[33:36] - state[36:39],
    "door": lambda state: state[35:38],
    "relocate": lambda state: state[30:33],
}
_PEN_HEIGHT, _PEN_DROPPED = 26, 0.075


class D4RLPhysicsWarning(UserWarning):
    """The simulator is not the one that D4RL's data and reference scores come from."""


def import_robotics(module: str, world: str) -> ModuleType:
    """Imports a module of gymnasium-robotics, without the notice that the package prints.

    The notice is about Adroit rewards, which :class:`AdroitEnv` repairs.

    Raises:
        MissingDependencyError: It cannot be imported.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        return require(f"gymnasium_robotics.envs.{module}", "sim", purpose=f"d4rl/{world}")


def warn_physics(env: gymnasium.Env, world: str, body: str) -> None:
    """Says which simulator stands in for D4RL's: in a warning, and to those who report results.

    Args:
        env: Gets ``metadata["simulator"]``, which evaluations keep and reports show.
        world: Name of the world.
        body: What is simulated instead.
    """
    version = import_mujoco("D4RL's environments").__version__
    env.metadata = {**env.metadata, "simulator": f"{body}, MuJoCo {version} instead of 2"}
    warnings.warn(
        f"d4rl/{world} is {body} on MuJoCo {version}; D4RL's data and reference scores were made "
        "with MuJoCo 2 through mujoco-py. Compare scores with others of this world; published "
        "ones are near, not the same.",
        D4RLPhysicsWarning,
        stacklevel=4,
    )


class D4RLEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """An environment whose observation is rearranged to D4RL's flat one.

    Observation: float64 ``(S,)``. Action: float32 ``(A,)`` in [-1, 1], clipped. ``info`` is empty,
    because these tasks are scored by their return. The same seed of ``reset`` gives the same
    episode.

    Args:
        inner: The environment that simulates.
        facts: Sizes of observation and action.

    Raises:
        InvalidInputError: The simulator has other sizes than D4RL.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012  (Gymnasium's API)

    def __init__(self, inner: Any, facts: D4RLWorld) -> None:
        self._inner = inner
        fps = inner.metadata.get("render_fps", self.metadata["render_fps"])
        self.metadata = {**self.metadata, "render_fps": fps}
        self.render_mode = inner.render_mode
        size, actions = (facts.observation_size,), (facts.action_size,)
        self.observation_space = spaces.Box(-np.inf, np.inf, size, np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, actions, np.float32)
        if inner.action_space.shape != actions:
            raise InvalidInputError(
                f"{type(inner).__name__} takes actions of shape {inner.action_space.shape}, D4RL's "
                f"have {actions}. Install the tested versions: pip install -c constraints.txt."
            )

    def observe(self, observation: Any) -> np.ndarray:
        """D4RL's observation, from the simulator's."""
        return observation

    def judge(self, state: np.ndarray, reward: float, terminated: bool) -> tuple[float, bool]:
        """D4RL's reward and end, from the simulator's."""
        return reward, terminated

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode."""
        super().reset(seed=seed)
        observation, _ = self._inner.reset(seed=seed)
        return self.observe(observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Applies an action, clipped to [-1, 1]."""
        clipped = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        observation, reward, terminated, _, _ = self._inner.step(clipped)
        state = self.observe(observation)
        reward, terminated = self.judge(state, float(reward), bool(terminated))
        return state, reward, terminated, False, {}

    def render(self) -> Any:
        """Returns one frame; needs ``render_mode="rgb_array"``."""
        return self._inner.render()

    def close(self) -> None:
        """Frees the simulation."""
        self._inner.close()


class LocomotionEnv(D4RLEnv):
    """Hopper, HalfCheetah, Walker2d or Ant: version 4 of Gymnasium's, without ``x`` (and ``y``).

    ``ant`` has D4RL's 111 numbers, of which the last 84 are contact forces: zero here, as they are
    with mujoco-py since MuJoCo 2.0, and free in the reward for that reason.

    Args:
        body: ``"hopper"``, ``"halfcheetah"``, ``"walker2d"`` or ``"ant"``.
        render_mode: ``"rgb_array"`` makes :meth:`render` return frames.

    Raises:
        UnknownNameError: There is no such body.
        MissingDependencyError: MuJoCo is not installed.
    """

    def __init__(self, body: str, render_mode: str | None = None) -> None:
        if body not in _BODIES:
            raise unknown_name("body", body, _BODIES)
        module, name = _BODIES[body]
        warn_physics(self, body, f"Gymnasium's {name.removesuffix('Env')}-v4")
        bodies = require(f"gymnasium.envs.mujoco.{module}", "sim", purpose=f"d4rl/{body}")
        super().__init__(getattr(bodies, name)(render_mode=render_mode), WORLDS[body])

    def observe(self, observation: Any) -> np.ndarray:
        """Appends Ant's contact forces, all zero."""
        size = self.observation_space.shape[0]  # type: ignore[index]
        return np.pad(observation, (0, size - len(observation)))


class AdroitEnv(D4RLEnv):
    """A 24-joint hand twirls a pen, hammers a nail, opens a door or relocates a ball.

    gymnasium-robotics' hands with two repairs toward D4RL: the distance of palm and object costs
    (in their version 1 it pays, in version 2 it costs), and dropping the pen ends the episode.

    Args:
        task: ``"pen"``, ``"hammer"``, ``"door"`` or ``"relocate"``.
        render_mode: ``"rgb_array"`` makes :meth:`render` return frames.

    Raises:
        UnknownNameError: There is no such task.
        MissingDependencyError: gymnasium-robotics is not installed.
        InvalidInputError: It registers no such hand.
    """

    def __init__(self, task: str, render_mode: str | None = None) -> None:
        if task not in _HANDS:
            raise unknown_name("hand task", task, _HANDS)
        module, name = _HANDS[task]
        hands = import_robotics(f"adroit_hand.{module}", task)
        version = _newest_version(name.removesuffix("Env"))
        warn_physics(self, task, f"gymnasium-robotics' {name.removesuffix('Env')}-v{version}")
        super().__init__(getattr(hands, name)(render_mode=render_mode), WORLDS[task])
        self.task = task
        self._distance_pays = version < 2

    def judge(self, state: np.ndarray, reward: float, terminated: bool) -> tuple[float, bool]:
        """Charges for the distance of palm and object, and ends when the pen is dropped."""
        if self.task == "pen":
            return reward, bool(state[_PEN_HEIGHT] < _PEN_DROPPED)
        if not self._distance_pays:
            return reward, False
        distance = float(np.linalg.norm(_PALM_TO_OBJECT[self.task](state)))
        return reward - 0.2 * distance, False


def _newest_version(name: str) -> int:
    """Version of the one class behind an id, which gymnasium-robotics raises with its rewards."""
    versions = [spec.version or 0 for spec in gymnasium.registry.values() if spec.name == name]
    if not versions:
        raise InvalidInputError(
            f"The installed gymnasium-robotics registers no {name}, so its rewards are not known. "
            "Install the tested versions: pip install -c constraints.txt."
        )
    return max(versions)


class KitchenEnv(D4RLEnv):
    """A Franka arm in a kitchen: one point for each of four subtasks, once.

    Observation: 9 joints, 21 coordinates of objects, and the 30-number goal (zero where the task
    does not care). D4RL's data count a subtask in every step after it was solved, so their returns
    are far above the 4 that can be reached here: set target returns to at most 4.

    Args:
        kind: ``"complete"``, ``"partial"`` or ``"mixed"``.
        render_mode: ``"rgb_array"`` makes :meth:`render` return frames.

    Raises:
        UnknownNameError: There is no such kitchen.
        MissingDependencyError: gymnasium-robotics is not installed.
    """

    def __init__(self, kind: str, render_mode: str | None = None) -> None:
        if kind not in KITCHEN_TASKS:
            raise unknown_name("kitchen", kind, KITCHEN_TASKS)
        warn_physics(self, f"kitchen-{kind}", "gymnasium-robotics' FrankaKitchen-v1")
        module = import_robotics("franka_kitchen.kitchen_env", f"kitchen-{kind}")
        inner = module.KitchenEnv(
            tasks_to_complete=list(KITCHEN_TASKS[kind]),
            robot_noise_ratio=0.1,
            object_noise_ratio=0.1,
            render_mode=render_mode,
        )
        self._goal = np.zeros(30)
        for task in KITCHEN_TASKS[kind]:
            self._goal[module.OBS_ELEMENT_INDICES[task]] = module.OBS_ELEMENT_GOALS[task]
        super().__init__(inner, WORLDS[f"kitchen-{kind}"])

    def observe(self, observation: Any) -> np.ndarray:
        """Joints, objects and goal, without velocities."""
        state = observation["observation"]
        return np.concatenate([state[:9], state[18:39], self._goal])
