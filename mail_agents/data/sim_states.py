"""Simulator states of tasks whose models differ in size, as one column of a dataset.

LIBERO's 130 tasks have states of 45 to 123 numbers, and one dataset holds many tasks. Columns have
rows of one width, so shorter states are filled up with NaN, which no simulator state contains.
"""

import numpy as np

from mail_agents.errors import InvalidInputError

#: Numbers of a row; wider states stay as they are.
STATE_WIDTH = 128


def widen_states(states: np.ndarray) -> np.ndarray:
    """Fills states up with NaN.

    Args:
        states: Real numbers ``(T, D)``.

    Returns:
        ``(T, 128)``; the states themselves with D >= 128.

    Raises:
        InvalidInputError: They are something else, such as whole numbers or one number per step.
    """
    if states.dtype.kind != "f" or states.ndim != 2:
        raise InvalidInputError(
            f"Simulator states are float vectors, one per step; found {states.dtype} with shape "
            f"{states.shape[1:]} per step. Store them as np.float64 of shape (D,)."
        )
    missing = STATE_WIDTH - states.shape[-1]
    if missing <= 0:
        return states
    return np.pad(states, [(0, 0), (0, missing)], constant_values=np.nan)


def narrow_states(states: np.ndarray) -> np.ndarray:
    """Undoes :func:`widen_states`: drops the last columns that are NaN in every row."""
    filled = np.asarray(np.isnan(states).reshape(-1, states.shape[-1]).all(axis=0))
    return states[..., : states.shape[-1] - int(np.argmin(filled[::-1]))] if filled.any() else states
