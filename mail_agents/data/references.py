"""Reference returns of a dataset: they fix the scale of its scores and are checked first."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


def checked_references(reference_scores: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Reference returns that scores can be made of, refused before they are stored.

    Args:
        reference_scores: ``{"min": ..., "max": ...}`` by task; further entries, such as
            ``source``, are kept.

    Raises:
        InvalidInputError: A pair is missing, not finite, or its maximum is not above its minimum.
    """
    scores = dict(reference_scores or {})
    try:
        pairs = from_dataset(scores)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"{error} Both are finite and the maximum is above the minimum: the returns of a "
            "random and of a trained policy. Leave the task out if they are not known."
        ) from error
    return {
        task: {**scores[task], "min": pair.minimum, "max": pair.maximum}
        for task, pair in pairs.items()
    }
