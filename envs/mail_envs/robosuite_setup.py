"""Imports robosuite without side effects, and seeds and silences what it does later."""

import contextlib
import importlib
import io
import logging
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mail_agents.errors import MissingDependencyError
from mail_envs.rendering import import_mujoco

_ROBOSUITE_LOG = "/tmp/robosuite.log"


def import_robosuite(purpose: str) -> ModuleType:
    """Imports robosuite without its warnings, its log file and its change of ``MUJOCO_GL``.

    Raises:
        MissingDependencyError: It, or something it needs, is missing.
    """
    import_mujoco(purpose)
    if "robosuite" in sys.modules:
        return sys.modules["robosuite"]
    backend = os.environ.get("MUJOCO_GL")
    try:
        with quiet(), _no_log_file():
            return importlib.import_module("robosuite")
    except Exception as error:  # no OpenGL library at all raises AttributeError in PyOpenGL
        extra = "libero" if purpose == "LIBERO" else "robosuite"
        raise MissingDependencyError(
            f"Cannot import robosuite (needed for {purpose}): {type(error).__name__}: {error}. "
            f"Install it with: pip install 'mail-agents[{extra}]'. It needs an OpenGL library even "
            "without images: apt-get install libegl1 libgl1, or libosmesa6 with MUJOCO_GL=osmesa."
        ) from error
    finally:
        if backend is None:
            os.environ.pop("MUJOCO_GL", None)
        else:
            os.environ["MUJOCO_GL"] = backend


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what LIBERO and robosuite print and log below the level of an error."""
    logger = logging.getLogger("robosuite_logs")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def global_random(seed: int) -> Iterator[None]:
    """Seeds the global generators that LIBERO and robosuite draw from, and restores them after.

    Args:
        seed: Any number of at least 0. Below 2**32 it is what LIBERO's ``env.seed(seed)`` gets, so
            that placements are those of LIBERO's own environment.
    """
    arrays, scalars = np.random.get_state(), random.getstate()
    word = seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])
    np.random.seed(word)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(arrays)
        random.setstate(scalars)


@contextlib.contextmanager
def no_traces() -> Iterator[None]:
    """Keeps matplotlib, which LIBERO imports, from making a folder for settings in the home folder.

    Settings that exist, there or where ``MPLCONFIGDIR`` says, are left in use.
    """
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "matplotlib"
    if "MPLCONFIGDIR" in os.environ or settings.exists():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mail-agents-matplotlib-") as folder:
        os.environ["MPLCONFIGDIR"] = folder
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]


@contextlib.contextmanager
def _no_log_file() -> Iterator[None]:
    """Keeps robosuite from opening a log file in /tmp, which fails when another user owns it."""
    original = logging.FileHandler

    def handler(filename: Any, *args: Any, **kwargs: Any) -> logging.Handler:
        if str(filename) == _ROBOSUITE_LOG:
            return logging.NullHandler()
        return original(filename, *args, **kwargs)

    logging.FileHandler = handler  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        logging.FileHandler = original  # type: ignore[misc]
