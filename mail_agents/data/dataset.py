"""Trajectory datasets: what every consumer may rely on, and the one that lives in memory."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from mail_agents.data.columns import (
    INFO,
    OBSERVATION,
    EpisodeTable,
    Ledger,
    array_sha256,
    content_sha256,
    episode_columns,
    is_text,
    make_entry,
)
from mail_agents.data.episode import Episode
from mail_agents.data.references import checked_references
from mail_agents.data.segments import SegmentSpec, SegmentView
from mail_agents.data.stats import FeatureStats, feature_stats
from mail_agents.data.views import StepView, episode_array
from mail_agents.data.windows import WindowSpec, WindowView
from mail_agents.errors import InvalidInputError, unknown_name
from mail_agents.features import FeatureSpec
from mail_agents.seeding import derive_seed


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset.

    Attributes:
        name: Name given when it was written.
        tasks: Task names; ``task_ids`` index them.
        n_episodes: Number of episodes.
        n_steps: Number of actions.
        env_specs: Gymnasium ``EnvSpec`` as a JSON-ready dictionary, by task.
        source: Where the data came from: ``kind``, ``id``, ``sha256`` and format-specific facts.
        reference_scores: ``{"min": ..., "max": ...}`` returns for normalised scores, by task.
        sha256: Identity of the content (features, tasks, episodes, arrays), equal for equal
            content in memory and on disk.
    """

    name: str
    tasks: tuple[str, ...]
    n_episodes: int
    n_steps: int
    env_specs: Mapping[str, Any]
    source: Mapping[str, Any]
    reference_scores: Mapping[str, Any]
    sha256: str


class TrajectoryDataset(Protocol):
    """Episodes by index, windows for training, statistics of any subset of episodes."""

    @property
    def info(self) -> DatasetInfo:
        """Facts about the dataset."""
        ...

    @property
    def features(self) -> FeatureSpec:
        """Schema of observations and actions."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """``(N,)`` int64 number of actions of each episode."""
        ...

    @property
    def task_ids(self) -> np.ndarray:
        """``(N,)`` int64 index into ``info.tasks``, -1 when the episode has no task."""
        ...

    def __len__(self) -> int: ...

    def episode(self, index: int) -> Episode:
        """Returns one episode, as it was added."""
        ...

    @property
    def episode_returns(self) -> np.ndarray:
        """``(N,)`` float64 undiscounted return of each episode."""
        ...

    def windows(
        self, spec: WindowSpec | SegmentSpec, episodes: Sequence[int] | None = None
    ) -> StepView:
        """Returns the windows, or segments, of the given episodes (None: all)."""
        ...

    def stats(
        self, episodes: Sequence[int] | None = None, keys: Sequence[str] | None = None
    ) -> dict[str, FeatureStats]:
        """Returns statistics over the steps of the given episodes (None: all)."""
        ...


class ArrayDataset:
    """A dataset over flat columns, wherever they are (RAM or a memory map).

    Args:
        info: Facts about the dataset.
        features: Schema of observations and actions.
        columns: Arrays by column name (``obs/<key>``, ``action``, ..., ``info/<key>``).
        table: What is known about each episode.
        stats: Statistics over all episodes when they are known already.
    """

    def __init__(
        self,
        info: DatasetInfo,
        features: FeatureSpec,
        columns: Mapping[str, np.ndarray],
        table: EpisodeTable,
        stats: Mapping[str, FeatureStats] | None = None,
    ) -> None:
        self.info = info
        self.features = features
        self.table = table
        self._columns = dict(columns)
        self._stats = None if stats is None else dict(stats)
        self._counts = {name: table.row_counts(name) for name in self._columns}
        self._starts = {name: table.starts(name) for name in self._columns}
        self._starts[OBSERVATION] = table.starts(OBSERVATION)

    def __len__(self) -> int:
        return len(self.table.lengths)

    @property
    def lengths(self) -> np.ndarray:
        """``(N,)`` int64 number of actions of each episode."""
        return self.table.lengths

    @property
    def task_ids(self) -> np.ndarray:
        """``(N,)`` int64 index into ``info.tasks``, -1 when the episode has no task."""
        return self.table.task_ids

    def column(self, name: str) -> np.ndarray:
        """Flat array of one column (read-only)."""
        return self._columns[name]

    def starts(self, name: str) -> np.ndarray:
        """First row of each episode in a column; ``"obs/"`` stands for any observation."""
        return self._starts[name]

    @cached_property
    def returns_to_go(self) -> np.ndarray:
        """``(n_steps,)`` float64 undiscounted return from each step on, its own reward included."""
        rewards = self.column("reward").astype(np.float64)
        out = np.empty_like(rewards)
        for start, length in zip(self.starts("reward"), self.lengths, strict=True):
            part = slice(start, start + length)
            out[part] = np.cumsum(rewards[part][::-1])[::-1]
        return out

    @property
    def episode_returns(self) -> np.ndarray:
        """``(N,)`` float64 undiscounted return of each episode."""
        return self.returns_to_go[self.starts("reward")]

    def episode(self, index: int) -> Episode:
        """Returns one episode exactly as it was added; its arrays are read-only views.

        Raises:
            IndexError: There is no such episode.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Episode {index} does not exist: there are {len(self)}.")
        index = index % len(self)
        observations, infos = {}, {}
        for name in self._columns:
            if name.startswith(OBSERVATION):
                observations[name.removeprefix(OBSERVATION)] = self._part(name, index)
            elif name.startswith(INFO) and self.table.rows[name][index] > 0:
                infos[name.removeprefix(INFO)] = self._part(name, index)
        task = int(self.task_ids[index])
        return Episode(
            observations=observations,
            actions=self._part("action", index),
            rewards=self._part("reward", index),
            terminations=self._part("termination", index),
            truncations=self._part("truncation", index),
            task=None if task < 0 else self.info.tasks[task],
            seed=self.table.seeds[index],
            meta=self.table.metas[index],
            infos=infos,
        )

    def _part(self, name: str, index: int) -> np.ndarray:
        start = int(self._starts[name][index])
        part = self._columns[name][start : start + int(self._counts[name][index])]
        if is_text(part.dtype):
            width = int(self.table.widths[name][index])
            return part.astype(np.dtype(f"{part.dtype.byteorder}{part.dtype.kind}{width}"))
        return part

    def windows(
        self, spec: WindowSpec | SegmentSpec, episodes: Sequence[int] | None = None
    ) -> StepView:
        """Returns the windows, or segments, of the given episodes (None: all)."""
        if isinstance(spec, SegmentSpec):
            return SegmentView(self, spec, episodes)
        return WindowView(self, spec, episodes)

    def stats(
        self, episodes: Sequence[int] | None = None, keys: Sequence[str] | None = None
    ) -> dict[str, FeatureStats]:
        """Statistics by feature: observation keys, and ``"action"``.

        Observations count at the steps an action was taken from (the final observation of an
        episode is never a network input), so every feature has the same number of steps. Text has
        no statistics.

        Args:
            episodes: Episode indices, normally those of the training split; None for all.
            keys: Features wanted, or None for all. Leaving images out avoids reading them.

        Raises:
            UnknownNameError: A key does not exist or is text.
            InvalidInputError: The choice of episodes is empty or invalid.
        """
        available = {k: f for k, f in self.features.observations.items() if f.kind != "text"}
        for key in keys or ():
            if key != "action" and key not in available:
                raise unknown_name("feature with statistics", key, [*available, "action"])
        wanted = [*sorted(available), "action"] if keys is None else list(keys)
        if episodes is None and self._stats is not None:
            return {key: self._stats[key] for key in wanted}
        chosen = episode_array(episodes, len(self))
        out = {}
        for key in wanted:
            name = "action" if key == "action" else OBSERVATION + key
            kind = self.features.action.kind if key == "action" else available[key].kind
            rows = step_rows(self.starts(name)[chosen], self.lengths[chosen])
            out[key] = feature_stats(self.column(name), rows, kind)
        return out


def step_rows(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenates the ranges ``start..start+length-1``."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(
        int(ends[-1]) if len(ends) else 0
    )


class MemoryDataset(ArrayDataset):
    """Episodes in RAM, with the same behaviour as a store on disk.

    Args:
        episodes: Episodes that agree in keys, shapes and dtypes.
        name: Name of the dataset.
        env_specs: Gymnasium ``EnvSpec`` dictionaries by task.
        source: Where the data came from.
        reference_scores: ``{"min": ..., "max": ...}`` by task.
        features: What the environment declares (bounds, discrete values, kinds); from the data
            alone when None.

    Raises:
        InvalidInputError: There are no episodes, or reference scores are no scale.
        FeatureMismatchError: Episodes disagree with each other or with ``features``.
    """

    def __init__(
        self,
        episodes: Iterable[Episode],
        name: str = "",
        env_specs: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        reference_scores: Mapping[str, Any] | None = None,
        features: FeatureSpec | None = None,
    ) -> None:
        references = checked_references(reference_scores)
        ledger = Ledger(features)
        parts: dict[str, list[np.ndarray]] = {}
        for episode in episodes:
            source_id = episode.meta.get("source_id")
            entry = make_entry(episode, None if source_id is None else str(source_id))
            ledger.check(entry)
            ledger.record(entry)
            for key, array in episode_columns(episode).items():
                parts.setdefault(key, []).append(array)
        if not parts:
            raise InvalidInputError("A dataset needs at least one episode; none was given.")
        columns = {}
        for key in list(parts):
            columns[key] = np.concatenate(parts.pop(key), dtype=ledger.columns[key].dtype)
            columns[key].flags.writeable = False
        table = ledger.table()
        hashes = {key: array_sha256(array) for key, array in columns.items()}
        info = DatasetInfo(
            name=name,
            tasks=ledger.tasks,
            n_episodes=len(table.lengths),
            n_steps=int(table.lengths.sum()),
            env_specs=dict(env_specs or {}),
            source=dict(source or {}),
            reference_scores=references,
            sha256=content_sha256(ledger.features(), ledger.tasks, table, hashes),
        )
        super().__init__(info, ledger.features(), columns, table)


def split_episodes(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits episode indices at random into training and held-out ones, both in order.

    Args:
        n: Number of episodes.
        fraction: Share held out, in [0, 1). A positive share holds out at least one episode and
            leaves at least one for training.
        seed: Root seed; the split depends on nothing else.

    Raises:
        InvalidInputError: The share is out of range, or one episode is to be split.
    """
    if not 0 <= fraction < 1:
        raise InvalidInputError(f"Held-out share {fraction} is not in [0, 1).")
    if fraction == 0:
        return list(range(n)), []
    if n < 2:
        raise InvalidInputError(f"{n} episode cannot be split; use a held-out share of 0.")
    count = min(max(1, round(n * fraction)), n - 1)
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "data", 0, 1)))
    order = rng.permutation(n).tolist()
    return sorted(order[count:]), sorted(order[:count])


def select_demos(
    keys: Sequence[str], n: int | None = None, mode: Literal["first", "mail_legacy"] = "first"
) -> list[str]:
    """Chooses the first ``n`` demonstrations of a LIBERO or robomimic file.

    Args:
        keys: Group names such as ``demo_0``, in any order.
        n: How many; None for all.
        mode: ``"first"`` takes them in the order of their numbers. ``"mail_legacy"`` reproduces the
            released MaIL code, which sorts the keys as text, takes the positions at which the
            numbers 0, 1, 2, ... stand, and uses those positions as demonstration numbers; the first
            ten of fifty are then 0, 1, 12, 23, 34, 45, 46, 47, 48 and 49.

    Raises:
        InvalidInputError: There are fewer than ``n`` keys, a key has no number, the mode is
            unknown, or the legacy rule picks a number that the numbering skips.
    """
    if mode not in ("first", "mail_legacy"):
        raise InvalidInputError(
            f"Demo selection {mode!r} is unknown; use 'first' or 'mail_legacy'."
        )
    numbers = {}
    for key in keys:
        match = re.search(r"(\d+)$", key)
        if match is None:
            raise InvalidInputError(
                f"Demonstration {key!r} does not end in a number like 'demo_0'."
            )
        numbers[key] = int(match.group(1))
    count = len(keys) if n is None else n
    if not 1 <= count <= len(keys):
        raise InvalidInputError(f"{count} demonstrations requested, the file has {len(keys)}.")
    if mode == "first":
        return sorted(keys, key=numbers.__getitem__)[:count]
    lexical = sorted(keys)
    positions = np.argsort([numbers[key] for key in lexical], kind="stable")[:count]
    by_number = {number: key for key, number in numbers.items()}
    missing = [int(i) for i in positions if int(i) not in by_number]
    if missing:
        raise InvalidInputError(
            f"mail_legacy selects demonstration numbers {missing}, which do not exist: the "
            "numbering has gaps. Use mode='first'."
        )
    return [by_number[int(i)] for i in positions]
