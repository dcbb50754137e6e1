"""Simulator states of tasks whose models differ in size, as one column of a dataset.

LIBERO's 130 tasks have states of 45 to 123 numbers, and one dataset holds many tasks. Columns have
rows of one width, so shorter states are filled up with NaN, which no simulator state contains.
"""

import numpy as np

#: Numbers of a row; wider states stay as they are.
STATE_WIDTH = 128


def widen_states(states: np.ndarray) -> np.ndarray:
    """Fills states ``(..., D)`` up with NaN to ``(..., 128)``; those with D >= 128 stay."""
    missing = STATE_WIDTH - states.shape[-1]
    if missing <= 0:
        return states
    return np.pad(states, [(0, 0)] * (states.ndim - 1) + [(0, missing)], constant_values=np.nan)


def narrow_states(states: np.ndarray) -> np.ndarray:
    """Undoes :func:`widen_states`: drops the last columns that are NaN in every row."""
    filled = np.isnan(states).reshape(-1, states.shape[-1]).all(axis=0)
    return states[..., : states.shape[-1] - int(np.argmin(filled[::-1]))] if filled.any() else states
