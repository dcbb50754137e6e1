"""Meta-World (Yu et al. 2019): 50 tabletop manipulation tasks of a Sawyer arm.

A thin Gymnasium environment around the classes of the ``metaworld`` package. Dynamics, rewards and
observations are upstream's; what differs is listed on :class:`MetaWorldEnv`.
"""

import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from mail_agents.errors import InvalidInputError, require, unknown_name
from mail_envs.catalogue import METAWORLD_CAMERAS, METAWORLD_TASKS
from mail_envs.manipulation_inputs import checked_cameras
from mail_envs.rendering import OffscreenRenderer, RenderQuality, import_mujoco

import_mujoco("Meta-World")
env_dict = require("metaworld.env_dict", "sim", purpose="Meta-World")

#: The camera of videos.
VIDEO_CAMERA = "corner2"

# These cameras hang head down in the scene description; turned by 180 degrees, up is up.
_UPSIDE_DOWN = frozenset({"corner", "corner2", "corner3", "corner4"})


class MetaWorldEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One Meta-World task with a new object and goal placement at every reset.

    Observation (Dict):
        ``state``: float64 ``(39,)``: hand position (3, metres), gripper opening (1, 0 closed to 1
        open), up to two objects' positions and quaternions (14, zero padded), the same 18 numbers
        one step earlier, goal position (3, metres). The goal is always visible, as in MT1.
        ``<camera>``: uint8 ``(S, S, 3)`` for every requested camera, upright (the four ``corner``
        cameras hang upside down in the scene and are turned by 180 degrees).

    Action: float32 ``(4,)`` in [-1, 1]: hand displacement (x, y, z; 1 is one centimetre per step)
    and gripper effort (1 closes). Values outside are clipped. 80 steps are one second.

    Reward: upstream's dense reward (version 2), 0 to 10.

    Ends: ``terminated`` when the task is solved (``success_hold`` steps later), and success is
    latched; ``truncated`` by Gymnasium's TimeLimit, 500 steps unless
    ``gymnasium.make(max_episode_steps=)`` says otherwise. ``info["success"]`` (bool) is always
    there.

    ``reset(seed=s)`` draws the placement from ``s`` alone: same seed, same initial observation and
    same rollout, whatever happened in this environment before. ``reset()`` continues the random
    stream of the last seed.

    Differences from upstream: there, a placement is one of 50 pickled task objects and
    ``reset(seed=)`` is ignored, and episodes never terminate. Given the same placement and actions,
    observations and rewards are equal bit for bit.

    Args:
        task: Task name, for example ``"reach-v3"``.
        cameras: Cameras to observe, out of :data:`~mail_envs.catalogue.METAWORLD_CAMERAS`.
        image_size: Height and width of observed images in pixels.
        render_quality: ``"fast"`` or ``"stock"``, for observed images and videos.
        render_mode: ``"rgb_array"`` makes :meth:`render` return video frames.
        render_size: Height and width of video frames in pixels.
        success_hold: Steps that an episode goes on after success. Demonstrations that stop at the
            very edge of success never show how to stay there.

    Raises:
        UnknownNameError: The task or a camera does not exist.
        InvalidInputError: A size, quality or camera list is not valid.
        MissingDependencyError: The ``metaworld`` package is not installed, or images are asked for
            and no OpenGL backend works (raised at the first image).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012  (Gymnasium's API)

    def __init__(
        self,
        task: str,
        *,
        cameras: Sequence[str] = (),
        image_size: int = 128,
        render_quality: RenderQuality = "fast",
        render_mode: str | None = None,
        render_size: int = 480,
        success_hold: int = 0,
    ) -> None:
        if task not in METAWORLD_TASKS:
            hint = "List them with mail_envs.list_worlds('metaworld/*')."
            raise unknown_name("Meta-World task", task, METAWORLD_TASKS, hint)
        if render_mode not in (None, "rgb_array"):
            raise InvalidInputError(
                f"Unknown render mode {render_mode!r}. Valid: None and 'rgb_array'."
            )
        if success_hold < 0:
            raise InvalidInputError(f"success_hold is {success_hold}; give a number of at least 0.")
        self.task = task
        self.success_hold = success_hold
        self.cameras = checked_cameras(cameras, METAWORLD_CAMERAS)
        self.render_mode = render_mode
        self._images = OffscreenRenderer(image_size, render_quality)
        self._video = OffscreenRenderer(render_size, render_quality)
        self._sim = _make_sim(task)
        self._running = False
        self._steps_after_success: int | None = None
        image_space = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        keys: dict[str, spaces.Space] = {"state": spaces.Box(-np.inf, np.inf, (39,), np.float64)}
        keys |= dict.fromkeys(self.cameras, image_space)
        self.observation_space = spaces.Dict(keys)  # type: ignore[assignment]
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode with a new placement of objects and goal.

        Args:
            seed: Determines the episode; None continues the current random stream.
            options: Must be empty: a placement is chosen by its seed.

        Returns:
            Observation and ``{"success": False}``.

        Raises:
            InvalidInputError: Options were given.
        """
        super().reset(seed=seed)
        if options:
            raise InvalidInputError(
                f"Meta-World has no reset options, got {sorted(options)}. "
                "Choose the initial placement with reset(seed=...)."
            )
        sim = self._sim
        sim.np_random = self.np_random
        sim._freeze_rand_vec = False
        # The first pass draws the placement (redrawing invalid ones). The second repeats it from
        # MuJoCo's initial state with the objects already there: some tasks measure positions
        # before MuJoCo has moved the bodies, and would see those of the previous episode.
        sim.reset_model()
        sim._freeze_rand_vec = True
        state, _ = sim.reset()
        self._running = True
        self._steps_after_success = None
        return self._observe(state), {"success": False}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Moves the arm for one step of 1/80 s.

        Args:
            action: ``(4,)`` finite numbers; see the class.

        Returns:
            Observation, reward, terminated (solved and held), truncated (always False; the time
            limit is a wrapper) and ``{"success": bool}``.

        Raises:
            InvalidInputError: The action has another shape, or holds NaN or infinity.
            ResetNeeded: The episode has not begun or is over.
        """
        if not self._running:
            raise gymnasium.error.ResetNeeded(
                f"metaworld/{self.task}: the episode has not begun or has ended in success. "
                "Call env.reset() before env.step()."
            )
        state, reward, _, _, info = self._sim.step(_checked_action(action))
        if self._steps_after_success is not None:
            self._steps_after_success += 1
        elif info["success"]:
            self._steps_after_success = 0
        success = self._steps_after_success is not None
        solved = success and self._steps_after_success == self.success_hold
        self._running = not solved
        return self._observe(state), float(reward), solved, False, {"success": success}

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """Returns the scene as ``(render_size, render_size, 3)`` uint8, or None without a mode."""
        if self.render_mode is None:
            gymnasium.logger.warn(
                f"render() does nothing: make metaworld/{self.task} with render_mode='rgb_array'."
            )
            return None
        return self._draw(self._video, VIDEO_CAMERA)

    def close(self) -> None:
        """Frees the OpenGL contexts."""
        self._images.close()
        self._video.close()

    def _observe(self, state: np.ndarray) -> dict[str, np.ndarray]:
        observation = {"state": np.array(state, dtype=np.float64)}
        for camera in self.cameras:
            observation[camera] = self._draw(self._images, camera)
        return observation

    def _draw(self, renderer: OffscreenRenderer, camera: str) -> np.ndarray:
        image = renderer.render(self._sim.model, self._sim.data, camera)
        if camera in _UPSIDE_DOWN:
            image = np.ascontiguousarray(image[::-1, ::-1])
        return image


def _make_sim(task: str) -> Any:
    sim = env_dict.ALL_V3_ENVIRONMENTS[task]()
    # What upstream's MT1 benchmark sets through a pickled task object: the goal is observed.
    sim._set_task_called = True
    sim._partially_observable = False
    # Both spaces are cached and were computed with the goal hidden.
    del sim.sawyer_observation_space
    # Draw placements from the environment's own generator, not from NumPy's global one.
    sim.seeded_rand_vec = True
    # Gymnasium's TimeLimit is the only time limit, so that it can be overridden.
    sim.max_path_length = sys.maxsize
    return sim


def _checked_action(action: np.ndarray) -> np.ndarray:
    array = np.asarray(action, dtype=np.float32)
    if array.shape != (4,):
        raise InvalidInputError(
            f"A Meta-World action has shape (4,): x, y, z, gripper. Got shape {array.shape}; "
            "pass one environment's action, not a batch."
        )
    if not np.isfinite(array).all():
        raise InvalidInputError(
            f"The action is not finite: {array.tolist()}. The agent has diverged or its "
            "normalisation statistics are wrong; check that its training loss is finite."
        )
    return np.clip(array, -1.0, 1.0)
