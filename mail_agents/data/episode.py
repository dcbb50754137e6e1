"""One recorded episode, losslessly: T+1 observations around T actions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mail_agents.errors import InvalidInputError
from mail_agents.features import Feature, FeatureSpec, as_mapping

#: Names under which environments report success in ``info``.
SUCCESS_KEYS = ("success", "is_success")


def _checked(name: str, value: Any, length: int | tuple[int, ...], where: str) -> np.ndarray:
    array = np.asarray(value)
    lengths = (length,) if isinstance(length, int) else length
    if array.dtype == object:
        raise InvalidInputError(
            f"{where}: {name!r} holds Python objects (ragged rows or None); expected one "
            "numeric or text array with time as its first axis."
        )
    if array.ndim == 0 or array.shape[0] not in lengths:
        rows = array.shape[0] if array.ndim else "no"
        raise InvalidInputError(
            f"{where}: {name!r} has {rows} rows, expected {' or '.join(map(str, lengths))} "
            "(T actions, rewards and flags; T+1 observations, the last one after the final action)."
        )
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        step = int(np.argwhere(~np.isfinite(array.reshape(array.shape[0], -1)).all(axis=1))[0, 0])
        raise InvalidInputError(
            f"{where}: {name!r} is not finite (NaN or infinity), first at step {step}. "
            "Repair or drop the episode before converting it."
        )
    return array


@dataclass(frozen=True, eq=False)
class Episode:
    """A trajectory of T actions.

    Attributes:
        observations: Arrays ``(T+1, *shape)`` by key; row ``t`` is what the agent saw before action
            ``t``, row ``T`` is the final observation. Nested keys are joined with ``/``.
        actions: ``(T, *action_shape)`` in environment units.
        rewards: ``(T,)`` reward received after action ``t``.
        terminations: ``(T,)`` bool, a terminal state was reached by action ``t``.
        truncations: ``(T,)`` bool, the episode was cut after action ``t``.
        task: Task name or language instruction, or None.
        seed: Seed given to ``env.reset``, or None when unknown.
        meta: JSON-ready facts about this episode (``success``, expert, noise, source id, ...).
        infos: Extra arrays of T or T+1 rows by key, kept but not shown to agents.

    Raises:
        InvalidInputError: Row counts disagree, T is zero, or a value is NaN or infinite
            (``infos`` may hold NaN: they are not inputs of any agent).
    """

    observations: Mapping[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    task: str | None = None
    seed: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    infos: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = self.meta.get("source_id")
        where = f"Episode {name}" if name is not None else "Episode"
        if np.ndim(self.actions) == 0 or len(self.actions) == 0:
            raise InvalidInputError(f"{where}: has no actions; an episode needs at least one step.")
        length = len(self.actions)
        put = object.__setattr__
        observations = as_mapping(self.observations)
        put(
            self,
            "observations",
            {k: _checked(k, v, length + 1, where) for k, v in observations.items()},
        )
        if not observations:
            raise InvalidInputError(f"{where}: has no observations.")
        for key in ("actions", "rewards"):
            put(self, key, _checked(key, getattr(self, key), length, where))
        for key in ("terminations", "truncations"):
            put(self, key, _checked(key, getattr(self, key), length, where).astype(bool))
        for key in ("rewards", "terminations", "truncations"):
            shape = getattr(self, key).shape
            if len(shape) != 1:
                raise InvalidInputError(f"{where}: {key!r} has shape {shape}, expected (T,).")
        put(self, "meta", dict(self.meta))
        put(
            self,
            "infos",
            {k: self._checked_info(k, v, length, where) for k, v in self.infos.items()},
        )

    @staticmethod
    def _checked_info(key: str, value: Any, length: int, where: str) -> np.ndarray:
        array = np.asarray(value)
        if array.dtype.kind in "fc":
            _checked(f"infos/{key}", np.zeros(array.shape[:1]), (length, length + 1), where)
            return array
        return _checked(f"infos/{key}", array, (length, length + 1), where)

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def success(self) -> bool | None:
        """Whether the task was solved, or None when the recording does not say."""
        value = self.meta.get("success")
        return None if value is None else bool(value)

    def features(self) -> FeatureSpec:
        """Describes the arrays of this episode (bounds are unknown from data alone)."""
        observations = {key: Feature.from_array(array) for key, array in self.observations.items()}
        return FeatureSpec(observations=observations, action=Feature.from_array(self.actions))
