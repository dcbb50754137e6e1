"""LIBERO (Liu et al. 2023): 130 language-conditioned tasks of a Panda arm, in five suites.

A Gymnasium environment around the simulation of the ``hf-libero`` package. What differs from
upstream is listed on :class:`LiberoEnv`.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from mail_agents.data.instructions import instruction
from mail_agents.errors import InvalidInputError, unknown_name
from mail_agents.features import Orientation
from mail_envs.libero_protocols import ProtocolName, protocol_named
from mail_envs.libero_setup import (
    asset_fingerprint,
    asset_folder,
    bddl_file,
    broken_assets,
    import_libero,
    load_init_states,
)
from mail_envs.manipulation import Initial, ManipulationEnv
from mail_envs.manipulation_inputs import check_choice, checked_cameras, finite_numbers
from mail_envs.rendering import RenderQuality, import_mujoco
from mail_wrappers.datasets.libero_names import tasks_of

#: Cameras that can be observed, and what the scenes call them.
LIBERO_CAMERAS: Mapping[str, str] = {
    "agentview": "agentview",
    "eye_in_hand": "robot0_eye_in_hand",
}

#: Initial states that LIBERO ships per task.
INIT_STATES = 50

# Goals that ``goal_state`` describes; one of the 130 tasks has three.
_GOALS = 2
_POSES = 14


class LiberoEnv(ManipulationEnv):
    """One LIBERO task.

    Observation (Dict), keys and values of the published HDF5 files:
        ``joint_states`` float64 ``(7,)`` (rad), ``gripper_states`` ``(2,)`` (finger positions, m),
        ``ee_pos`` ``(3,)`` (m), ``ee_ori`` ``(3,)`` (axis times angle, rad), ``ee_states``
        ``(6,)`` (both); ``<camera>_rgb`` uint8 ``(S, S, 3)`` for every camera.
        With ``goal_state=True`` also ``goal_state`` ``(28,)``: for each of the first two parts of
        the goal, position (3, m) and quaternion (4, w first) of the object, then of its
        destination; zero where there is none.

    Action: float32 ``(7,)`` in [-1, 1], clipped: hand displacement x, y, z (1 is 5 cm), rotation
    vector (1 is 0.5 rad), gripper (its sign counts: positive closes). 20 steps are one second.

    Reward: 1 while the goal is reached, else 0.

    Ends: ``terminated`` when the goal is reached and stays so for ``success_hold`` further steps;
    ``info["success"]`` becomes true then. ``truncated`` is Gymnasium's TimeLimit, 600 steps unless
    ``gymnasium.make(max_episode_steps=)`` says otherwise.

    ``reset`` options: ``init_state``, the number of a stored initial state (0 to 49); or ``state``,
    a flattened simulator state to start from without settling. With neither, the seed draws the
    number, or the placement when ``initial="sampled"``. Fixtures such as a cabinet are not part of
    a state: the seed places them, a centimetre here or there, as it does upstream; beside
    ``state``, ``fixtures`` says where they stand: position (3, m) and quaternion (4, w first) by
    name.

    Differences from upstream: an episode depends on seed and options alone. There, a reset without
    reload keeps the gripper's command and the fixtures' places, and placements come from NumPy's
    global generator. Given the same seed, initial state and actions, states and observations
    (images in ``"stock"`` quality) equal those of a newly made ``OffScreenRenderEnv`` bit for bit.

    Args:
        task: LIBERO's name of the task, the stem of its files.
        suite: The suite it belongs to.
        cameras: Cameras to observe: ``"agentview"``, ``"eye_in_hand"``.
        image_size: Height and width of observed images in pixels.
        orientation: ``"raw"`` (as the published files: upside down), ``"upright"``, ``"rot180"``
            (as OpenVLA's data: mirrored).
        render_quality: ``"fast"`` without multisampling, reflections and shadows, or ``"stock"``.
        render_mode: ``"rgb_array"`` makes :meth:`render` return video frames, upright.
        render_size: Height and width of video frames in pixels.
        success_hold: Steps for which the goal must stay reached.
        goal_state: Observe the poses that the goal is about; for agents that see no images.
        protocol: Whose way of settling: see :mod:`mail_envs.libero_protocols`.
        initial: ``"stored"`` or ``"sampled"`` initial states.

    Raises:
        UnknownNameError: The task, the suite, a camera or the protocol does not exist.
        InvalidInputError: An argument is not valid, or the mesh folder lacks parts.
        MissingDependencyError: LIBERO or its meshes are not there; the message has the commands.
    """

    metadata = {**ManipulationEnv.metadata, "parallel": 1}  # noqa: RUF012  (each takes 1.3 GB)

    sensors = ("robot0_joint_pos", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")

    def __init__(
        self,
        task: str,
        suite: str,
        *,
        cameras: Sequence[str] = ("agentview", "eye_in_hand"),
        image_size: int = 128,
        orientation: Orientation = "raw",
        render_quality: RenderQuality = "fast",
        render_mode: str | None = None,
        render_size: int = 480,
        success_hold: int = 0,
        goal_state: bool = False,
        protocol: ProtocolName = "mail",
        initial: Initial = "stored",
    ) -> None:
        if task not in tasks_of(suite):
            hint = f"List them with mail_envs.list_worlds('{suite}/*')."
            raise unknown_name(f"task of {suite}", task, tasks_of(suite), hint)
        check_choice("initial", initial, get_args(Initial))
        self.task, self.suite, self.initial = task, suite, initial
        self.protocol = protocol_named(protocol)
        self.goal_state = goal_state
        self.cameras = checked_cameras(cameras, tuple(LIBERO_CAMERAS))
        self._init_states: np.ndarray | None = None
        super().__init__(
            f"{suite}/{task}",
            self._build,
            cameras={f"{name}_rgb": LIBERO_CAMERAS[name] for name in self.cameras},
            image_size=image_size,
            orientation=orientation,
            render_quality=render_quality,
            render_mode=render_mode,
            render_size=render_size,
            success_hold=success_hold,
        )
        self._pristine = _model_without_placement(self._sim)
        self.metadata = {**self.metadata, "simulator": _simulator()}
        if initial == "stored":
            self.metadata["init_states"] = INIT_STATES

    @property
    def instruction(self) -> str:
        """What the task asks for, in words."""
        return instruction(self.task)

    @property
    def goals(self) -> list[list[str]]:
        """Parts of the goal, such as ``["on", "akita_black_bowl_1", "plate_1"]``."""
        return [list(map(str, goal)) for goal in self._sim.parsed_problem["goal_state"]]

    @property
    def init_states(self) -> np.ndarray:
        """The stored initial states, float64 ``(50, 1 + nq + nv)``."""
        if self._init_states is None:
            self._init_states = load_init_states(self.suite, self.task)
        return self._init_states

    @property
    def bddl_path(self) -> str:
        """The file that defines the task."""
        return str(bddl_file(self.suite, self.task))

    @property
    def problem_info(self) -> dict[str, Any]:
        """``problem_info`` of LIBERO's HDF5 files; the wording is the BDDL file's."""
        return dict(self._problem_info)

    @property
    def env_args(self) -> dict[str, Any]:
        """``env_args`` of LIBERO's HDF5 files (upstream ``scripts/create_dataset.py``)."""
        file = f"libero/libero/bddl_files/{self.suite}/{self.task}.bddl"
        from robosuite import load_controller_config

        return {
            "type": 1,
            "env_name": type(self._sim).__name__,
            "problem_name": self._problem_info["problem_name"],
            "bddl_file": file,
            "env_kwargs": {
                "robots": ["Panda"],
                "controller_configs": load_controller_config(default_controller="OSC_POSE"),
                "bddl_file_name": file,
                "has_renderer": False,
                "has_offscreen_renderer": True,
                "ignore_done": True,
                "use_camera_obs": True,
                "camera_depths": False,
                "camera_names": list(LIBERO_CAMERAS.values()),
                "reward_shaping": True,
                "control_freq": 20,
                "camera_heights": self.image_size,
                "camera_widths": self.image_size,
                "camera_segmentations": None,
            },
        }

    def reset_options(self) -> tuple[str, ...]:
        """``init_state`` (with stored initial states), ``state`` and ``fixtures``."""
        stored = ("init_state",) if self.initial == "stored" else ()
        return (*stored, "state", "fixtures")

    def _build(self) -> Any:
        envs = import_libero()
        path = self.bddl_path
        try:
            outer = envs.env_wrapper.ControlEnv(
                bddl_file_name=path,
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=False,
                # The same model is made faster by putting back what episodes change in it.
                hard_reset=False,
                ignore_done=True,
                camera_heights=8,
                camera_widths=8,
            )
        except FileNotFoundError as error:
            raise broken_assets(error) from error
        except ValueError as error:
            if "opening file" not in str(error):
                raise
            raise broken_assets(error) from error
        _forward_after_reset(outer.env.sim)
        # Loading the model, which upstream does twice before the first episode, adds each of these
        # again; a drawer is then drawn twice, which moves the random stream of what follows.
        outer.env.object_property_initializers *= 2
        names = ("problem_name", "domain_name", "language_instruction")
        self._problem_info = {name: getattr(outer, name) for name in names}
        return outer.env

    def _forget(self) -> None:
        for name, values in self._pristine.items():
            getattr(self.model, name)[...] = values
        for robot in self._sim.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)

    def _start(self, options: dict[str, Any]) -> dict[str, Any]:
        if "state" in options:
            for body, pose in options.get("fixtures", {}).items():
                self.model.body_pos[body], self.model.body_quat[body] = pose[:3], pose[3:]
            self._go_to(options["state"])
            self._refresh()
            return {}
        info: dict[str, Any] = {}
        if self.initial == "stored":
            info["init_state"] = options["init_state"]
            self._go_to(self.init_states[info["init_state"]])
            self._refresh(draw=False)
        self._settle()
        return info

    def _checked_options(self, options: dict[str, Any]) -> dict[str, Any]:
        if self.initial != "stored" and "init_state" in options:
            raise InvalidInputError(
                f"The option 'init_state' is the number of a stored initial state, and "
                f"{self.world} was made with initial={self.initial!r}. Make it with "
                "initial='stored'."
            )
        options = super()._checked_options(options)
        if "fixtures" in options:
            if "state" not in options:
                raise InvalidInputError("The option 'fixtures' needs the option 'state' beside it.")
            options["fixtures"] = self._checked_fixtures(options["fixtures"])
        if self.initial != "stored" or "state" in options:
            if "init_state" in options:
                raise InvalidInputError("Give either the option 'init_state' or 'state', not both.")
            return options
        count = len(self.init_states)
        index = options.get("init_state")
        if index is None:
            index = self.np_random.integers(count)
        if isinstance(index, bool) or not isinstance(index, int | np.integer):
            raise InvalidInputError(f"init_state is {index!r}; give a whole number.")
        if not 0 <= index < count:
            raise InvalidInputError(
                f"init_state is {index}; {self.world} has the initial states 0 to {count - 1}."
            )
        return {"init_state": int(index)}

    def _checked_fixtures(self, fixtures: Mapping[str, Any]) -> dict[int, np.ndarray]:
        """Pose with a quaternion of length 1 by number of the body."""
        if not isinstance(fixtures, Mapping):
            raise InvalidInputError(
                f"The option 'fixtures' holds poses by name, as in {{'wooden_cabinet_1': [...]}}; "
                f"got {fixtures!r}."
            )
        out = {}
        for name, given in fixtures.items():
            if name not in self._sim.fixtures_dict:
                raise unknown_name(f"fixture of {self.world}", name, self._sim.fixtures_dict)
            pose = finite_numbers(given, 7)
            if pose is None or not pose[3:].any():
                raise InvalidInputError(
                    f"Fixture {name!r} stands at {given}; give position (3) and quaternion (4, "
                    "not all zero)."
                )
            pose[3:] /= np.linalg.norm(pose[3:])
            out[self.body_id(name)] = pose
        return out

    def _go_to(self, state: np.ndarray) -> None:
        """What upstream's ``ControlEnv.set_init_state`` does, without reading sensors."""
        if state.shape != self.flat_state().shape:
            raise InvalidInputError(
                f"{self.world}: the stored initial state has {len(state)} numbers, the simulator "
                f"{len(self.flat_state())}. Meshes and package are of different versions."
            )
        self._set_state(state)
        self._reached()
        self._sim._post_process()

    def _settle(self) -> None:
        action = np.zeros(7)
        action[-1] = self.protocol.settle_gripper
        for left in reversed(range(self.protocol.settle_steps)):
            # The last reading may have been taken within the step before.
            self._drawing = left < 2
            self._sim.step(action)

    def _own_sensors(self) -> dict[str, Callable[[], np.ndarray]]:
        return {"goal_state": self._read_goal} if self.goal_state else {}

    def _read_goal(self) -> np.ndarray:
        out = np.zeros((_GOALS, _POSES))
        for row, (_, *names) in zip(out, self.goals[:_GOALS], strict=False):
            poses = [self._pose(name) for name in names]
            row[: 7 * len(poses)] = np.concatenate(poses)
        return out.ravel()

    def _pose(self, name: str) -> np.ndarray:
        data, sites = self.data, self._sim.object_sites_dict
        if name in sites:
            index, quaternion = self.model.site(name).id, np.empty(4)
            import_mujoco("LIBERO").mju_mat2Quat(quaternion, data.site_xmat[index])
            return np.concatenate([data.site_xpos[index], quaternion])
        body = self.body_id(name)
        return np.concatenate([data.xpos[body], data.xquat[body]])

    def _state_observation(self, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        from robosuite.utils.transform_utils import quat2axisangle

        position = raw["robot0_eef_pos"]
        # quat2axisangle clips its argument in place.
        orientation = quat2axisangle(np.array(raw["robot0_eef_quat"]))
        observation = {
            "joint_states": raw["robot0_joint_pos"],
            "gripper_states": raw["robot0_gripper_qpos"],
            "ee_pos": position,
            "ee_ori": orientation,
            "ee_states": np.concatenate([position, orientation]),
        }
        if self.goal_state:
            observation["goal_state"] = raw["own_goal_state"]
        return observation


def _forward_after_reset(sim: Any) -> None:
    """Gives the solver the warm start that it has upstream, where every reset loads the model.

    Loading computes forces once and making the renderer does so again. Without them, states differ
    in the sixteenth digit, and after some contacts in the third.
    """
    clear = sim.reset

    def reset() -> None:
        clear()
        sim.forward()
        sim.forward()

    sim.reset = reset


def _model_without_placement(sim: Any) -> dict[str, np.ndarray]:
    """What episodes change in the model, as it is before the first placement of fixtures.

    Objects that are placed in a fixture are placed relative to where the model description has it,
    so a reset has to begin there.
    """
    model = sim.sim.model._model
    out = {name: getattr(model, name).copy() for name in ("body_pos", "body_quat", "site_rgba")}
    for fixture in sim.fixtures_dict.values():
        body = sim.obj_body_id[fixture.name]
        element = sim.model.root.find(f".//body[@name='{fixture.root_body}']")
        out["body_pos"][body] = np.fromstring(element.get("pos", "0 0 0"), sep=" ")
        out["body_quat"][body] = np.fromstring(element.get("quat", "1 0 0 0"), sep=" ")
    return out


def _simulator() -> str:
    version = importlib.metadata.version
    return (
        f"LIBERO {version('hf-libero')}, robosuite {version('robosuite')}, MuJoCo "
        f"{version('mujoco')}, meshes {asset_fingerprint(asset_folder())}"
    )
