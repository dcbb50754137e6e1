"""robosuite 1.4 (Zhu et al. 2020): tabletop tasks of one Panda arm, with robomimic's observations.

Everything comes from the package; meshes are inside. What differs from upstream is listed on
:class:`RobosuiteEnv`.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mail_agents.errors import unknown_name
from mail_agents.features import Orientation
from mail_envs.catalogue import ROBOSUITE_TASKS
from mail_envs.manipulation import ManipulationEnv
from mail_envs.manipulation_inputs import checked_cameras
from mail_envs.rendering import RenderQuality
from mail_envs.robosuite_setup import import_robosuite
from mail_wrappers.worlds import ROBOSUITE_FULL_STATE, ROBOSUITE_HAND_VELOCITIES

#: Cameras that every one of these scenes has.
ROBOSUITE_CAMERAS: tuple[str, ...] = (
    "agentview",
    "robot0_eye_in_hand",
    "frontview",
    "birdview",
)


class RobosuiteEnv(ManipulationEnv):
    """One robosuite task, in the set-up of robomimic (Mandlekar et al. 2021): Panda, OSC_POSE.

    Observation (Dict), keys and values of robomimic's HDF5 files:
        ``robot0_eef_pos`` float64 ``(3,)`` (m), ``robot0_eef_quat`` ``(4,)`` (w last),
        ``robot0_joint_pos`` ``(7,)`` (rad), ``robot0_gripper_qpos`` ``(2,)`` (m; not in Wipe, whose
        hand does not move), ``object`` (the task's objects, its length depends on the task) and
        ``<camera>_image`` uint8 ``(S, S, 3)`` for every camera. With ``full_state`` also
        ``robot0_eef_vel_lin`` ``(3,)`` (m/s), ``robot0_eef_vel_ang`` ``(3,)`` and
        ``robot0_joint_vel`` ``(7,)`` (rad/s), ``robot0_joint_pos_cos`` and ``robot0_joint_pos_sin``
        ``(7,)``, and ``robot0_gripper_qvel`` ``(2,)`` (m/s).

    Action: float32 ``(7,)`` in [-1, 1], clipped: hand displacement x, y, z (1 is 5 cm), rotation
    vector (1 is 0.5 rad), gripper (its sign counts: positive closes; not in Wipe). 20 steps are one
    second.

    Reward: upstream's sparse one: 1 in the goal, else 0; part of it for every object in tasks of
    several objects and for every wiped spot in Wipe.

    Ends: ``terminated`` when the goal is reached and stays so for ``success_hold`` further steps;
    ``info["success"]`` becomes true then. ``truncated`` is Gymnasium's TimeLimit, 500 steps unless
    ``gymnasium.make(max_episode_steps=)`` says otherwise.

    ``reset`` option ``state``: a flattened simulator state to start from. Sizes of objects are not
    part of it; the seed draws them.

    Differences from upstream: an episode depends on seed and options alone. There, objects are
    drawn from NumPy's global generator. Given the same seed and actions, states and observations
    equal those of upstream's environment bit for bit.

    Args:
        task: Name such as ``"Lift"``.
        cameras: Cameras to observe, out of :data:`ROBOSUITE_CAMERAS`.
        image_size: Height and width of observed images in pixels.
        orientation: ``"upright"`` (as robomimic's files), ``"raw"`` (as robosuite's own images:
            upside down) or ``"rot180"`` (mirrored).
        render_quality: ``"fast"`` without multisampling, reflections and shadows, or ``"stock"``.
        render_mode: ``"rgb_array"`` makes :meth:`render` return video frames, upright.
        render_size: Height and width of video frames in pixels.
        success_hold: Steps for which the goal must stay reached.
        full_state: Whether to observe everything that robomimic's low-dimensional files hold.

    Raises:
        UnknownNameError: The task or a camera does not exist.
        InvalidInputError: An argument is not valid.
        MissingDependencyError: robosuite is not installed.
    """

    sensors = (
        "robot0_eef_pos",
        "robot0_eef_quat",
        "robot0_joint_pos",
        "robot0_gripper_qpos",
        "object-state",
    )
    # A further reading would move the moments at which robosuite reads its sensors.
    draws_in_reset = True

    def __init__(
        self,
        task: str,
        *,
        cameras: Sequence[str] = (),
        image_size: int = 128,
        orientation: Orientation = "upright",
        render_quality: RenderQuality = "fast",
        render_mode: str | None = None,
        render_size: int = 480,
        success_hold: int = 0,
        full_state: bool = False,
    ) -> None:
        if task not in ROBOSUITE_TASKS:
            hint = "List them with mail_envs.list_worlds('robosuite/*')."
            raise unknown_name("robosuite task", task, ROBOSUITE_TASKS, hint)
        self.task = task
        self.cameras = checked_cameras(cameras, ROBOSUITE_CAMERAS)
        self.full_state = full_state
        if full_state:
            self.sensors = (*self.sensors, *ROBOSUITE_FULL_STATE)
        super().__init__(
            f"robosuite/{task}",
            self._build,
            cameras={f"{name}_image": name for name in self.cameras},
            image_size=image_size,
            orientation=orientation,
            render_quality=render_quality,
            render_mode=render_mode,
            render_size=render_size,
            success_hold=success_hold,
        )
        version = importlib.metadata.version
        simulator = f"robosuite {version('robosuite')}, MuJoCo {version('mujoco')}"
        self.metadata = {**self.metadata, "simulator": simulator}

    @property
    def env_args(self) -> dict[str, Any]:
        """``env_args`` of robomimic's HDF5 files."""
        return {
            "env_name": self.task,
            "env_version": importlib.metadata.version("robosuite"),
            "type": 1,
            "env_kwargs": {
                "has_renderer": False,
                "has_offscreen_renderer": bool(self.cameras),
                "ignore_done": True,
                "use_object_obs": True,
                "use_camera_obs": bool(self.cameras),
                "control_freq": 20,
                "controller_configs": _controller(),
                "robots": ["Panda"],
                "camera_depths": False,
                "camera_names": list(self.cameras),
                "camera_heights": self.image_size,
                "camera_widths": self.image_size,
                "reward_shaping": False,
            },
        }

    def _build(self) -> Any:
        return import_robosuite(self.world).make(
            self.task,
            robots="Panda",
            controller_configs=_controller(),
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
            control_freq=20,
            ignore_done=True,
            # Sizes of objects are drawn while the model is built.
            hard_reset=True,
        )

    def _start(self, options: dict[str, Any]) -> dict[str, Any]:
        if "state" in options:
            self._set_state(options["state"])
            self._refresh()
        return {}

    def _own_sensors(self) -> dict[str, Callable[[], np.ndarray]]:
        if not self.full_state:
            return {}
        # As robomimic's simulator does it, see robosuite's ``SingleArm``.
        linear, angular = ROBOSUITE_HAND_VELOCITIES
        return {
            linear: lambda: np.array(self._sim.robots[0]._hand_vel),
            angular: lambda: np.array(self._sim.robots[0]._hand_ang_vel),
        }

    def _state_observation(self, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        observation = {name: raw[name] for name in self.sensors if name != "object-state"}
        observation["object"] = raw["object-state"]
        observation |= {name: raw[f"own_{name}"] for name in self._own_sensors()}
        return {name: value for name, value in observation.items() if value.size}


def _controller() -> dict[str, Any]:
    from robosuite import load_controller_config

    return load_controller_config(default_controller="OSC_POSE")
