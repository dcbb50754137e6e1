"""Checks of what worlds of manipulation tasks are given, with errors that say what to give."""

import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mail_agents.errors import InvalidInputError, suggest, unknown_name

# MuJoCo's mjJNT_FREE: an object that moves freely; position and quaternion are its coordinates.
_FREE = 0


def check_choice(what: str, value: object, valid: Sequence[str]) -> None:
    """Refuses a value that is not among the valid ones.

    Raises:
        InvalidInputError: It is not.
    """
    if value not in valid:
        raise InvalidInputError(
            f"Unknown {what} {value!r}.{suggest(str(value), valid)} Valid: {', '.join(valid)}."
        )


def checked_cameras(cameras: Sequence[str], valid: Sequence[str]) -> tuple[str, ...]:
    """Camera names, checked.

    Raises:
        InvalidInputError: A single string, or a name twice.
        UnknownNameError: A name is not valid.
    """
    if isinstance(cameras, str):
        raise InvalidInputError(f"cameras is a list of names; write cameras=({cameras!r},).")
    for camera in cameras:
        if camera not in valid:
            raise unknown_name("camera", camera, valid)
    if len(set(cameras)) != len(cameras):
        raise InvalidInputError(f"cameras has a name twice: {', '.join(cameras)}.")
    return tuple(cameras)


def check_whole(what: str, value: object) -> None:
    """Refuses anything but a whole number of at least 0.

    Raises:
        InvalidInputError: It is something else; True is not 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise InvalidInputError(f"{what} is {value!r}; give a whole number of at least 0.")


def finite_numbers(given: Any, count: int) -> np.ndarray | None:
    """A copy as float64 ``(count,)``, or None when it is not that many finite numbers."""
    try:
        array = np.array(given, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return array if array.shape == (count,) and np.isfinite(array).all() else None


def checked_state(world: str, model: Any, state: Any) -> np.ndarray:
    """A flattened simulator state, checked.

    Args:
        world: What errors call the environment.
        model: Its ``mujoco.MjModel``.
        state: Time, positions and velocities.

    Returns:
        float64 ``(1 + nq + nv,)``.

    Raises:
        InvalidInputError: Another count, NaN, infinity, or a quaternion that is all zero.
    """
    width = 1 + model.nq + model.nv
    array = finite_numbers(state, width)
    if array is None:
        what = f"shape {state.shape}" if isinstance(state, np.ndarray) else reprlib.repr(state)
        raise InvalidInputError(
            f"A state of {world} is {width} finite numbers (time, {model.nq} positions, "
            f"{model.nv} velocities); got {what}. States of another task do not fit."
        )
    for joint in np.flatnonzero(np.asarray(model.jnt_type) == _FREE):
        address = 1 + model.jnt_qposadr[joint]
        if not array[address + 3 : address + 7].any():
            raise InvalidInputError(
                f"In this state of {world}, numbers {address + 3} to {address + 6} are the "
                "quaternion of an object and all zero; no object is turned like that."
            )
    return array


def checked_action(world: str, shape: tuple[int, ...], action: np.ndarray) -> np.ndarray:
    """An action as float64, clipped to [-1, 1].

    Raises:
        InvalidInputError: It has another shape, or holds NaN or infinity.
    """
    array = np.asarray(action, dtype=np.float64)
    if array.shape != shape:
        raise InvalidInputError(
            f"An action of {world} has shape {shape}. Got shape {array.shape}; pass one "
            "environment's action, not a batch."
        )
    if not np.isfinite(array).all():
        raise InvalidInputError(
            f"The action is not finite: {array.tolist()}. The agent has diverged or its "
            "normalisation statistics are wrong; check that its training loss is finite."
        )
    return np.clip(array, -1.0, 1.0)
