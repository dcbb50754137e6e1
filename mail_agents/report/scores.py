"""Normalised scores: returns between two reference returns, as percent.

A score means something only together with its references, so they travel with it, and there is
none without them: a return is never scored with the references of another environment.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mail_agents.errors import InvalidInputError


@dataclass(frozen=True)
class Reference:
    """Two undiscounted returns that fix a scale.

    Attributes:
        minimum: Return that scores 0, usually that of a random policy.
        maximum: Return that scores 100, usually that of an expert.
        source: Where the two come from, for example ``"d4rl:hopper"``.

    Raises:
        InvalidInputError: A return is not finite, or the maximum is not above the minimum.
    """

    minimum: float
    maximum: float
    source: str = "dataset"

    def __post_init__(self) -> None:
        finite = math.isfinite(self.minimum) and math.isfinite(self.maximum)
        if not finite or self.maximum <= self.minimum:
            raise InvalidInputError(
                "Reference returns must be finite, the maximum above the minimum; got "
                f"{self.minimum} and {self.maximum} ({self.source})."
            )

    def __str__(self) -> str:
        return f"{self.minimum:g} to {self.maximum:g} ({self.source})"


def as_reference(entry: Reference | Mapping[str, Any]) -> Reference:
    """Takes a reference as datasets store it: ``{"min": ..., "max": ...}``, with or without source.

    Raises:
        InvalidInputError: It has no usable minimum and maximum.
    """
    if isinstance(entry, Reference):
        return entry
    try:
        source = str(entry.get("source", "dataset"))
        minimum, maximum = float(entry["min"]), float(entry["max"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"Reference returns are {{'min': return, 'max': return}}; got {entry!r}."
        ) from error
    return Reference(minimum, maximum, source)


def normalised_score(
    returns: ArrayLike, reference: Reference | Mapping[str, Any] | None
) -> NDArray[np.float64]:
    """``100 * (G - minimum) / (maximum - minimum)`` for undiscounted returns ``G``, never clipped.

    Scores below 0 and above 100 are legal: worse than the random and better than the expert
    reference. Note that ``d4rl``'s and ``minari``'s functions return the fraction.

    Args:
        returns: Undiscounted raw returns, any shape.
        reference: From :func:`from_dataset`, or ``{"min": ..., "max": ...}`` as datasets and
            ``mail_wrappers.datasets.d4rl_reference`` have it.

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


def from_dataset(reference_scores: Mapping[str, Any]) -> dict[str, Reference]:
    """References by task, from what a dataset stores about itself.

    Args:
        reference_scores: ``dataset.info.reference_scores``, or the same part of an artifact's
            provenance: ``{task: {"min": ..., "max": ..., "source": ...}}``, the source optional.

    Raises:
        InvalidInputError: An entry has no usable minimum and maximum.
    """
    found = {}
    for task, entry in reference_scores.items():
        try:
            found[task] = as_reference(entry)
        except InvalidInputError as error:
            raise InvalidInputError(
                f"The reference scores of task {task!r} cannot be used. {error}"
            ) from error
    return found
