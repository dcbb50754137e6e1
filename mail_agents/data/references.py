"""Reference returns of a dataset, checked before they are stored, not when scores are made."""

from collections.abc import Mapping
from typing import Any

from mail_agents.errors import InvalidInputError
from mail_agents.report.scores import from_dataset


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
