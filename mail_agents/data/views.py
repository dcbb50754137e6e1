"""What windows and segments share: one sample per step of chosen episodes, computed on demand."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mail_agents.errors import InvalidInputError, unknown_name

if TYPE_CHECKING:
    from mail_agents.data.dataset import ArrayDataset

_LARGE_ROW = 4096

#: Arrays by key; see :class:`~mail_agents.data.windows.WindowView` and
#: :class:`~mail_agents.data.segments.SegmentView` for the keys.
Batch = dict[str, np.ndarray]


class ViewIndex(NamedTuple):
    """Where each sample is: ``episode (N,)`` and the step it belongs to ``step (N,)``, int64."""

    episode: np.ndarray
    step: np.ndarray


class StepView(ABC):
    """Samples of a dataset, each belonging to one step of one episode.

    ``view[i]`` is one sample, ``view[a:b]`` and ``view[indices]`` are batches; samples are ordered
    by episode, then by step.

    Args:
        dataset: Where the columns are.
        keys: Observation keys to read, or None for all.
        episodes: Episode of each run of samples, ``(E,)``.
        counts: Samples of each of these episodes, ``(E,)``, on consecutive steps.
        first: Step of the first sample of every episode.

    Raises:
        UnknownNameError: An observation key does not exist.
    """

    def __init__(
        self,
        dataset: "ArrayDataset",
        keys: tuple[str, ...] | None,
        episodes: np.ndarray,
        counts: np.ndarray,
        first: int = 0,
    ) -> None:
        self.dataset = dataset
        self._keys = _observation_keys(dataset, keys)
        self._episodes = episodes
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._first = first

    @abstractmethod
    def _gather(self, episode: np.ndarray, step: np.ndarray) -> Batch:
        """Builds the batch of the samples at ``(episode, step)``, each ``(B,)``."""

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def index(self) -> ViewIndex:
        """Episode and step of every sample, in order."""
        return self.locate(np.arange(len(self)))

    def locate(self, indices: np.ndarray) -> ViewIndex:
        """Episode and step of the given samples ``(B,)``."""
        slot = np.searchsorted(self._ends, indices, side="right")
        return ViewIndex(self._episodes[slot], indices - self._starts[slot] + self._first)

    def __getitem__(self, item: int | slice | np.ndarray | Sequence[int]) -> Batch:
        single = isinstance(item, int | np.integer)
        batch = self._gather(*self.locate(self._resolve(item)))
        return {key: value[0] for key, value in batch.items()} if single else batch

    def _resolve(self, item: Any) -> np.ndarray:
        if isinstance(item, slice):
            return np.arange(*item.indices(len(self)))
        indices = np.atleast_1d(np.asarray(item))
        if indices.dtype == bool:
            if indices.shape != (len(self),):
                raise IndexError(f"Boolean index of shape {indices.shape} for {len(self)} samples.")
            return np.flatnonzero(indices)
        if indices.size == 0:
            return np.zeros(0, np.int64)
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise IndexError("Index samples with an integer, a slice or a 1-D integer array.")
        indices = indices.astype(np.int64)
        indices = np.where(indices < 0, indices + len(self), indices)
        if indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(f"Sample index out of range: there are {len(self)} samples.")
        return indices

    def _observations(self, episode: np.ndarray, steps: np.ndarray) -> Batch:
        """Observations at ``steps (B, n)`` of each sample's episode, by batch key."""
        rows = self.dataset.starts("obs/")[episode][:, None] + steps
        return {f"obs/{k}": gather_rows(self.dataset.column(f"obs/{k}"), rows) for k in self._keys}


def gather_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Copies ``array[rows]``; ``np.take`` wins for small rows and loses up to 3x for images."""
    if array.strides[0] >= _LARGE_ROW:
        return array[rows]
    return np.take(array, rows, axis=0)


def _observation_keys(dataset: "ArrayDataset", keys: tuple[str, ...] | None) -> tuple[str, ...]:
    present = dataset.features.observations
    for key in keys or ():
        if key not in present:
            raise unknown_name("observation key", key, present, "See 'mail-agents data inspect'.")
    return tuple(sorted(present)) if keys is None else keys


def episode_array(episodes: Sequence[int] | np.ndarray | None, total: int) -> np.ndarray:
    """Checks a choice of episodes and returns it as int64 indices; None means all.

    Raises:
        InvalidInputError: An index is out of range or repeated.
    """
    if episodes is None:
        return np.arange(total)
    chosen = np.asarray(episodes)
    if chosen.size == 0:
        return np.zeros(0, np.int64)
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
        raise InvalidInputError("Choose episodes with a list of integer indices.")
    if chosen.min() < 0 or chosen.max() >= total:
        raise InvalidInputError(
            f"Episode indices {int(chosen.min())}..{int(chosen.max())} do not all exist: "
            f"valid are 0..{total - 1}."
        )
    if len(np.unique(chosen)) != len(chosen):
        raise InvalidInputError("The same episode is chosen more than once.")
    return chosen.astype(np.int64)


def check_count(owner: str, name: str, value: object) -> None:
    """Refuses a field that is not an integer of at least 1.

    Raises:
        InvalidInputError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(f"{owner}.{name} is {value!r}, expected an integer >= 1.")


def check_choice(owner: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Refuses a field that is not one of a few words.

    Raises:
        InvalidInputError: It is not.
    """
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise InvalidInputError(f"{owner}.{name} is {value!r}, expected {expected}.")
