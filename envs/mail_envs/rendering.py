"""Images from MuJoCo, off screen: one small renderer for observations and for videos.

Simulators' own ``render`` methods spend most of their time on shadow maps, reflections and
multisampling, which matter little at the image sizes that policies see. This renderer leaves them
out unless asked.
"""

import atexit
import ctypes.util
import importlib.util
import os
import sys
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np

from mail_agents.errors import (
    InvalidInputError,
    MailAgentsError,
    MissingDependencyError,
    require,
    suggest,
)

RenderQuality = Literal["fast", "stock"]
_QUALITIES: tuple[str, ...] = get_args(RenderQuality)

_INSTALL_GL = (
    "On a machine without a display: 'apt-get install libegl1 libgl1 libgl1-mesa-dri' and "
    "MUJOCO_GL=egl, or 'apt-get install libosmesa6' and MUJOCO_GL=osmesa."
)

# The process that drew first. OpenGL's state does not survive a fork: in the child, even a new
# context would wait forever for threads that only the parent has.
_drawing_process: int | None = None

_PROBE_XML = (
    "<mujoco><worldbody><camera name='c' pos='0 0 3'/><geom size='1'/></worldbody></mujoco>"
)


def select_gl_backend() -> None:
    """Sets ``MUJOCO_GL`` to a backend that needs no display, when it is not set.

    On Linux: ``egl`` if the EGL library is installed, else ``osmesa`` if that is, else nothing
    (worlds then work without images). Call it before the first ``import mujoco``, which reads the
    variable.
    """
    if sys.platform != "linux" or os.environ.get("MUJOCO_GL"):
        return
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            return


def import_mujoco(purpose: str) -> ModuleType:
    """Imports MuJoCo, telling an unusable ``MUJOCO_GL`` apart from a package that is not there.

    Raises:
        MissingDependencyError: It cannot be imported; the message says what to do.
    """
    try:
        return require("mujoco", "sim", purpose=purpose)
    except MissingDependencyError as error:
        if importlib.util.find_spec("mujoco") is None or not os.environ.get("MUJOCO_GL"):
            raise
        raise MissingDependencyError(
            f"MuJoCo is installed but cannot be imported with MUJOCO_GL={os.environ['MUJOCO_GL']}: "
            f"{error.__cause__}. {_INSTALL_GL} Or unset MUJOCO_GL and work without images."
        ) from error


def gl_problem() -> str | None:
    """Tries to render one tiny image; returns None when it works, else the reason in one line."""
    try:
        mujoco = import_mujoco("rendering")
        model = mujoco.MjModel.from_xml_string(_PROBE_XML)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        renderer = OffscreenRenderer(8)
        try:
            renderer.render(model, data, "c")
        finally:
            renderer.close()
    except MissingDependencyError as error:
        return str(error)
    return None


class ForkedRenderingError(MailAgentsError, RuntimeError):
    """A process that was forked from one that had drawn images was to draw one."""


def _check_not_forked() -> None:
    global _drawing_process
    if _drawing_process is None:
        _drawing_process = os.getpid()
    if _drawing_process != os.getpid():
        raise ForkedRenderingError(
            "This process was forked from one that had drawn images already, and OpenGL does not "
            "work after that. Start workers with context='spawn' (AsyncVectorEnv(..., "
            "context='spawn')), or make the vector environment before anything is rendered."
        )


class OffscreenRenderer:
    """Renders square RGB images of a MuJoCo model.

    The OpenGL context is created at the first :meth:`render`, in the process that calls it, so an
    environment may be constructed before a worker process is forked, but none may have drawn by
    then. It is rebuilt when another
    model is passed (some simulators reload theirs at reset) and freed by :meth:`close` or at exit.

    Args:
        size: Height and width in pixels, at least 1.
        quality: ``"fast"`` without multisampling, reflections and shadows; ``"stock"`` as MuJoCo
            draws the model.
        geom_groups: Groups of geoms to draw; None draws those that MuJoCo draws by default.

    Raises:
        InvalidInputError: The size or quality is not valid.
    """

    def __init__(
        self,
        size: int,
        quality: RenderQuality = "fast",
        geom_groups: Sequence[int] | None = None,
    ) -> None:
        self._renderer: Any = None
        self._model: Any = None
        self._options: Any = None
        self._groups = geom_groups
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidInputError(
                f"Image size {size!r} is not valid; give a positive whole number of pixels."
            )
        if quality not in _QUALITIES:
            raise InvalidInputError(
                f"Unknown render quality {quality!r}.{suggest(str(quality), _QUALITIES)} "
                f"Valid: {', '.join(_QUALITIES)}."
            )
        self.size = size
        self.quality = quality

    def render(self, model: Any, data: Any, camera: str) -> np.ndarray:
        """Draws one image.

        Args:
            model: The ``mujoco.MjModel``.
            data: Its ``mujoco.MjData``.
            camera: Name of a camera of the model.

        Returns:
            ``(size, size, 3)`` uint8, first row at the top of the camera's own frame.

        Raises:
            MissingDependencyError: No OpenGL backend works; the message says what to install.
            ForkedRenderingError: This process was forked from one that had drawn images.
        """
        _check_not_forked()
        if self._model is not model:
            self.close()
            self._renderer = self._build(model)
            self._model = model
        self._renderer.update_scene(data, camera=camera, scene_option=self._options)
        return self._renderer.render()

    def close(self) -> None:
        """Frees the OpenGL context; a later :meth:`render` makes a new one."""
        renderer, self._renderer, self._model = self._renderer, None, None
        # The context belongs to the process that made it.
        if renderer is not None and _drawing_process == os.getpid():
            renderer.close()

    def __del__(self) -> None:
        self.close()

    def _build(self, model: Any) -> Any:
        mujoco = import_mujoco("rendering")
        fast = self.quality == "fast"
        window, detail = model.vis.global_, model.vis.quality
        saved = window.offwidth, window.offheight, detail.offsamples, detail.shadowsize
        # MuJoCo reads these four from the model once, while it creates the context.
        window.offwidth = window.offheight = self.size
        if fast:
            detail.offsamples = detail.shadowsize = 0
        renderer = mujoco.Renderer.__new__(mujoco.Renderer)
        # Else its destructor complains on top of our error when the constructor fails.
        renderer._gl_context = renderer._mjr_context = None
        try:
            renderer.__init__(model, self.size, self.size)
        except Exception as error:  # every backend raises something else
            raise MissingDependencyError(_no_gl_message(error)) from error
        finally:
            window.offwidth, window.offheight, detail.offsamples, detail.shadowsize = saved
        if fast:
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        if self._groups is not None:
            self._options = mujoco.MjvOption()
            self._options.geomgroup[:] = np.isin(np.arange(mujoco.mjNGROUP), self._groups)
        # Registered after the context exists, hence run before the backend's own exit handler.
        atexit.register(_close_if_alive, weakref.ref(self))
        return renderer


def _close_if_alive(reference: "weakref.ref[OffscreenRenderer]") -> None:
    renderer = reference()
    if renderer is not None:
        renderer.close()


def _no_gl_message(error: Exception) -> str:
    backend = os.environ.get("MUJOCO_GL") or "unset"
    return (
        f"Cannot create an OpenGL context for camera images (MUJOCO_GL is {backend}): "
        f"{type(error).__name__}: {error}. {_INSTALL_GL} MuJoCo reads MUJOCO_GL at its first "
        "import, so set it in the shell, or import mail_envs before mujoco. Without OpenGL, make "
        "the world with cameras=() and without render_mode."
    )
