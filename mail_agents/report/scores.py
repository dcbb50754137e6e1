"""Normalised scores: returns between two reference returns, as percent.

A score means something only together with its references, so they travel with it, and there is
none without them: a return is never scored with the references of another environment.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mail_agents.data.references import Reference, as_reference
from mail_agents.errors import InvalidInputError


def normalised_score(
    returns: ArrayLike, reference: Reference | Mapping[str, Any] | None
) -> NDArray[np.float64]:
    """``100 * (G - minimum) / (maximum - minimum)`` for undiscounted returns ``G``, never clipped.

    Scores below 0 and above 100 are legal: worse than the random and better than the expert
    reference. Note that ``d4rl``'s and ``minari``'s functions return the fraction.

    Args:
        returns: Undiscounted raw returns, any shape.
        reference: From :func:`~mail_agents.data.references.from_dataset`, or
            ``{"min": ..., "max": ...}`` as datasets and ``mail_wrappers.datasets.d4rl_reference``
            have it.

    Returns:
        Scores in percent, the shape of ``returns``.

    Raises:
        InvalidInputError: There is no reference, or it cannot be used.

    Source: Fu et al. (2020), "D4RL: datasets for deep data-driven reinforcement learning",
    section 6.
    """
    if reference is None:
        raise InvalidInputError(
            "A normalised score needs reference returns, and there are none: report the raw "
            "return, or record the dataset with reference_scores={task: {'min': ..., 'max': ...}}."
        )
    scale = as_reference(reference)
    span = scale.maximum - scale.minimum
    return 100.0 * (np.asarray(returns, np.float64) - scale.minimum) / span
