"""What LIBERO and robosuite share: a Panda arm in robosuite 1.4, behind Gymnasium's interface.

robosuite steps the physics and samples its sensors; this module seeds it, makes it forget the
previous episode, draws its cameras and judges success. Nothing here changes the physics.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

from mail_agents.errors import InvalidInputError, MailAgentsError, suggest, unknown_name
from mail_agents.features import ORIENTATIONS, ImageSpace, Orientation
from mail_envs.manipulation_inputs import check_choice, check_whole, checked_action, checked_state
from mail_envs.rendering import OffscreenRenderer, RenderQuality, import_mujoco
from mail_envs.robosuite_setup import global_random, quiet
from mail_wrappers.images import turn_images

# robosuite shows group 1, what is meant to be seen, and hides group 0, the collision shapes.
VISIBLE_GROUPS = (1, 2)

Initial = Literal["stored", "sampled"]
_BLANK = np.zeros(1)
# Each of them is many tries per object; LIBERO's own tasks need one or two.
_PLACEMENTS = 100


class PlacementError(MailAgentsError, RuntimeError):
    """No placement of the objects was found in which they fit."""


class ManipulationEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray], ABC):
    """A robosuite 1.4 environment as a Gymnasium one; see the subclasses.

    Args:
        world: What error messages call it, such as ``"robosuite/Lift"``.
        build: Makes the robosuite environment, without cameras.
        cameras: Observation key and the model's camera for every camera to observe.
        image_size: Height and width of observed images in pixels.
        orientation: Which way up observed images are.
        render_quality: ``"fast"`` or ``"stock"``.
        render_mode: None or ``"rgb_array"``.
        render_size: Height and width of video frames in pixels.
        success_hold: Further steps for which the goal must stay reached.

    Raises:
        InvalidInputError: An argument is not valid.
    """

    metadata = {  # noqa: RUF012  (Gymnasium's API)
        "render_modes": ["rgb_array"],
        "render_fps": 20,
        "parallel": 4,
        "record_infos": ("state",),
    }

    #: The camera of videos.
    video_camera = "agentview"

    def __init__(
        self,
        world: str,
        build: Callable[[], Any],
        *,
        cameras: Mapping[str, str],
        image_size: int,
        orientation: Orientation,
        render_quality: RenderQuality,
        render_mode: str | None,
        render_size: int,
        success_hold: int,
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise InvalidInputError(
                f"Unknown render mode {render_mode!r}. Valid: None and 'rgb_array'."
            )
        check_whole("success_hold", success_hold)
        check_choice("orientation", orientation, ORIENTATIONS)
        self.world = world
        self.success_hold = success_hold
        self.image_size = image_size
        self.orientation: Orientation = orientation
        self.render_mode = render_mode
        self._cameras = dict(cameras)
        self._images = OffscreenRenderer(image_size, render_quality, VISIBLE_GROUPS)
        self._video = OffscreenRenderer(render_size, render_quality, VISIBLE_GROUPS)
        self._drawing = False
        self._closed = False
        self._running = False
        self._success = False
        self._held = 0
        with global_random(0), quiet():
            self._sim = build()
        self._arrange_sensors()
        low, high = self._sim.action_spec
        self.action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))
        self._action_shape = tuple(low.shape)
        self.observation_space = self._make_space()  # type: ignore[assignment]

    # What subclasses say about themselves.

    #: robosuite's sensors that observations are made of.
    sensors: tuple[str, ...] = ()

    #: Whether the images of robosuite's own reset are those that the episode starts with.
    draws_in_reset = False

    def _own_sensors(self) -> dict[str, Callable[[], np.ndarray]]:
        """Further sensors, read at the moment at which robosuite reads its own."""
        return {}

    @abstractmethod
    def _state_observation(self, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The observation without images, from the values of the sensors."""

    def _forget(self) -> None:
        """Removes what robosuite's reset leaves of the previous episode."""

    @abstractmethod
    def _start(self, options: dict[str, Any]) -> dict[str, Any]:
        """Brings the freshly reset simulator to where the episode starts; returns infos."""

    def _reached(self) -> bool:
        """Whether the goal is reached now."""
        return bool(self._sim._check_success())

    @property
    def model(self) -> Any:
        """The ``mujoco.MjModel``; a reset may replace it."""
        return self._sim.sim.model._model

    @property
    def data(self) -> Any:
        """The ``mujoco.MjData``; a reset may replace it."""
        return self._sim.sim.data._data

    @property
    def controller(self) -> Any:
        """The controller of the arm; a reset replaces it."""
        return self._sim.robots[0].controller

    @property
    def robosuite_env(self) -> Any:
        """The robosuite environment that simulates."""
        return self._sim

    def body_id(self, name: str) -> int:
        """Number of a body of the model.

        Args:
            name: A body, or an object or fixture of the task.

        Raises:
            UnknownNameError: There is neither.
        """
        named = getattr(self._sim, "obj_body_id", {})
        if name in named:
            return int(named[name])
        bodies = [self.model.body(index).name for index in range(self.model.nbody)]
        if name not in bodies:
            raise unknown_name("body", name, [*named, *bodies])
        return bodies.index(name)

    def model_xml(self) -> str:
        """The model as MJCF text, with the paths of this machine, as robosuite's recorders keep."""
        self._check_open()
        mujoco = import_mujoco(self.world)
        # MuJoCo writes the description that it loaded last, with the numbers of the given model.
        mujoco.MjModel.from_xml_string(self._sim.model.get_xml())
        with tempfile.TemporaryDirectory(prefix="mail-agents-model-") as folder:
            path = Path(folder) / "model.xml"
            mujoco.mj_saveLastXML(str(path), self.model)
            return path.read_text(encoding="utf-8")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode, which depends on seed and options alone.

        Args:
            seed: Determines the episode; None continues the random stream of the last seed.
            options: ``state``: ``(1 + nq + nv,)``, time, positions and velocities to start from as
                they are. Further ones are described on the class.

        Returns:
            Observation and ``{"success": False, "state": ...}``.

        Raises:
            InvalidInputError: An option does not exist or is not valid.
            ClosedEnvironmentError: :meth:`close` was called.
            PlacementError: The objects do not fit, however they are placed.
        """
        self._check_open()
        super().reset(seed=seed)
        chosen = self._checked_options(dict(options or {}))
        if seed is None:
            seed = int(self.np_random.integers(2**32))
        self._drawing = self.draws_in_reset
        with global_random(seed), quiet():
            self._forget()
            self._restart()
            info = self._start(chosen)
        self._held, self._success, self._running = 0, False, True
        return self._observe(), {**info, "success": False, "state": self.flat_state()}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Moves the arm for 1/20 s.

        Args:
            action: Finite numbers in [-1, 1], see the class; clipped. Double precision is kept.

        Returns:
            Observation, reward, terminated (goal reached and held), truncated (always False; the
            time limit is a wrapper) and ``{"success": bool, "state": ...}`` with the simulator's
            state after the step.

        Raises:
            InvalidInputError: The action has another shape, or holds NaN or infinity.
            ResetNeeded: The episode has not begun or is over.
        """
        self._check_open()
        if not self._running:
            raise gymnasium.error.ResetNeeded(
                f"{self.world}: the episode has not begun or has ended in success. "
                "Call env.reset() before env.step()."
            )
        values = checked_action(self.world, self._action_shape, action)
        self._drawing = True
        _, reward, _, _ = self._sim.step(values)
        self._held = self._held + 1 if self._reached() else 0
        solved = self._held > self.success_hold
        self._success = self._success or solved
        self._running = not solved
        info = {"success": self._success, "state": self.flat_state()}
        return self._observe(), float(reward), solved, False, info

    def flat_state(self) -> np.ndarray:
        """The simulator's state, float64 ``(1 + nq + nv,)``: time, positions, velocities.

        It lacks the arm controller's goal, the gripper's command and the solver's warm start.
        """
        data = self.data
        return np.concatenate([[data.time], data.qpos, data.qvel])

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """Returns the scene as ``(render_size, render_size, 3)`` uint8, or None without a mode."""
        if self.render_mode is None:
            gymnasium.logger.warn(
                f"render() does nothing: make {self.world} with render_mode='rgb_array'."
            )
            return None
        self._check_open()
        return self._video.render(self.model, self.data, self.video_camera)

    def close(self) -> None:
        """Frees the OpenGL contexts and the simulation."""
        self._images.close()
        self._video.close()
        if getattr(self, "_sim", None) is not None and self._sim.sim is not None:
            self._sim.close()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise gymnasium.error.ClosedEnvironmentError(
                f"{self.world} is closed, and only environments that are open can be reset, "
                "stepped or drawn. Make a new one with gymnasium.make."
            )

    def _restart(self) -> None:
        from robosuite.utils.errors import RandomizationError

        for _ in range(_PLACEMENTS):
            try:
                self._sim.reset()
                return
            except RandomizationError:  # objects did not fit: the next draw, as LIBERO does
                self._forget()
        raise PlacementError(
            f"{self.world}: the objects did not fit in {_PLACEMENTS} drawn placements. Take "
            "another seed, or check that the meshes are those of the tested version."
        )

    def _set_state(self, state: np.ndarray) -> None:
        self._sim.sim.set_state_from_flattened(state)
        self._sim.sim.forward()

    def _refresh(self, *, draw: bool = True) -> None:
        """Reads every sensor now, instead of at robosuite's next sampling time."""
        self._drawing = draw
        self._sim._update_observables(force=True)

    def _arrange_sensors(self) -> None:
        """Turns off the sensors that nobody reads and adds ours."""
        from robosuite.utils.observables import Observable

        for name, observable in self._sim._observables.items():
            wanted = name in self.sensors or (
                "object-state" in self.sensors and observable.modality == "object"
            )
            observable.set_enabled(wanted)
            observable.set_active(observable.is_active() or name in self.sensors)
        readers = self._own_sensors()
        readers |= {camera: self._camera_reader(camera) for camera in self._cameras.values()}
        for name, read in readers.items():
            self._sim.add_observable(Observable(f"own_{name}", _as_sensor(read)))

    def _camera_reader(self, camera: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if not self._drawing:
                return _BLANK
            return self._images.render(self.model, self.data, camera)

        return read

    def _make_space(self) -> spaces.Dict:
        self._sim._update_observables(force=True)
        shape = (self.image_size, self.image_size, 3)
        keys: dict[str, spaces.Space] = {
            name: spaces.Box(-np.inf, np.inf, value.shape, np.float64)
            for name, value in self._state_observation(self._readings()).items()
        }
        keys |= {name: ImageSpace(shape, self.orientation) for name in self._cameras}
        return spaces.Dict(keys)

    def _readings(self) -> Mapping[str, np.ndarray]:
        return self._sim._get_observations()

    def _observe(self) -> dict[str, np.ndarray]:
        raw = self._readings()
        observation = {
            name: np.array(value, dtype=np.float64)
            for name, value in self._state_observation(raw).items()
        }
        for name, camera in self._cameras.items():
            image = turn_images(raw[f"own_{camera}"], "upright", self.orientation)
            observation[name] = np.ascontiguousarray(image)
        return observation

    def _checked_options(self, options: dict[str, Any]) -> dict[str, Any]:
        valid = self.reset_options()
        for name in options:
            if name not in valid:
                raise InvalidInputError(
                    f"{self.world} has no reset option {name!r}.{suggest(name, valid)} "
                    f"Valid: {', '.join(valid)}."
                )
        if "state" in options:
            options["state"] = checked_state(self.world, self.model, options["state"])
        return options

    def reset_options(self) -> tuple[str, ...]:
        """Names that ``reset(options=)`` may hold."""
        return ("state",)


def _as_sensor(read: Callable[[], np.ndarray]) -> Callable[[Any], np.ndarray]:
    def sensor(_: Any) -> np.ndarray:
        return read()

    # What robosuite's decorator sets; it joins the values of every other modality into one array.
    sensor.__modality__ = "image"  # type: ignore[attr-defined]
    return sensor
