"""Episodes as flat columns: the bookkeeping that the memory dataset and the store share.

Every feature of every episode goes into one array with time as its first axis. Observations have
``T + 1`` rows per episode, actions, rewards and flags ``T``, infos ``T`` or ``T + 1`` (or none).
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mail_agents.data.episode import Episode
from mail_agents.errors import FeatureMismatchError, InvalidInputError
from mail_agents.features import Feature, FeatureSpec

#: Columns with T rows per episode.
STEP_COLUMNS = ("action", "reward", "termination", "truncation")
OBSERVATION = "obs/"
INFO = "info/"


def episode_columns(episode: Episode) -> dict[str, np.ndarray]:
    """Names the arrays of an episode: ``obs/<key>``, ``action``, ``reward``, ``info/<key>``."""
    out = {OBSERVATION + key: array for key, array in episode.observations.items()}
    out["action"] = episode.actions
    out["reward"] = episode.rewards
    out["termination"] = episode.terminations
    out["truncation"] = episode.truncations
    out.update({INFO + key: array for key, array in episode.infos.items()})
    return dict(sorted(out.items()))  # the order that a journal line is read back in


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def canonical_json(value: Any) -> str:
    """Sorted, compact JSON without NaN; NumPy scalars and arrays become numbers and lists.

    Raises:
        TypeError: A value has no JSON form.
        ValueError: A number is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)


def make_entry(episode: Episode, source_id: str | None) -> dict[str, Any]:
    """Describes one episode as JSON-ready data: everything except its arrays.

    Raises:
        InvalidInputError: ``meta`` is not JSON-ready, or a dtype cannot be stored.
    """
    try:
        meta = json.loads(canonical_json(dict(episode.meta)))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"Episode {source_id or ''}: meta is not JSON-ready ({error}). Keep only text, "
            "numbers, booleans, lists and dictionaries; put arrays with a time axis into infos."
        ) from error
    columns = {}
    for name, array in episode_columns(episode).items():
        if array.dtype.kind not in "biufUS":
            raise InvalidInputError(
                f"Episode {source_id or ''}: {name!r} has dtype {array.dtype}; only real "
                "numbers, booleans and text can be stored."
            )
        columns[name] = {
            "dtype": array.dtype.str,
            "rows": array.shape[0],
            "shape": list(array.shape[1:]),
        }
    return {
        "source_id": source_id,
        "length": len(episode),
        "task": episode.task,
        "seed": None if episode.seed is None else int(episode.seed),
        "meta": meta,
        "columns": columns,
    }


@dataclass(frozen=True)
class Column:
    """Layout of one column: dtype and shape of a single row."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype.name}"


def is_text(dtype: np.dtype) -> bool:
    """Whether rows are fixed-width text, whose width may grow from episode to episode."""
    return dtype.kind in "US"


def _width(dtype: np.dtype) -> int:
    return dtype.itemsize // (4 if dtype.kind == "U" else 1)


@dataclass(frozen=True, eq=False)
class EpisodeTable:
    """What is known about each episode besides its arrays.

    Attributes:
        lengths: ``(N,)`` int64, number of actions T of each episode.
        task_ids: ``(N,)`` int64 index into the task list, -1 without a task.
        seeds: Reset seed of each episode, or None.
        source_ids: Identity of each episode in its source, or None.
        metas: JSON-ready dictionaries.
        rows: ``(N,)`` int64 row counts of each info column, 0 where an episode lacks it.
        widths: ``(N,)`` int64 text width of each text column, in characters.
    """

    lengths: np.ndarray
    task_ids: np.ndarray
    seeds: tuple[int | None, ...]
    source_ids: tuple[str | None, ...]
    metas: tuple[dict[str, Any], ...]
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    widths: Mapping[str, np.ndarray] = field(default_factory=dict)

    def row_counts(self, column: str) -> np.ndarray:
        """Rows that each episode has in ``column``."""
        if column.startswith(INFO):
            return self.rows[column]
        return self.lengths + 1 if column.startswith(OBSERVATION) else self.lengths

    def starts(self, column: str) -> np.ndarray:
        """First row of each episode in ``column``."""
        counts = self.row_counts(column)
        return np.cumsum(counts) - counts

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Numeric tables for ``episodes.npz``; seeds are decimal text, so none is too large."""
        zero = np.zeros(1, np.int64)
        out = {
            "length": self.lengths,
            "task_id": self.task_ids,
            "step_offset": np.concatenate([zero, np.cumsum(self.lengths)]),
            "observation_offset": np.concatenate([zero, np.cumsum(self.lengths + 1)]),
            "seed": np.array(["" if s is None else str(s) for s in self.seeds], dtype=np.str_),
        }
        out.update({f"rows:{name}": counts for name, counts in sorted(self.rows.items())})
        out.update({f"width:{name}": widths for name, widths in sorted(self.widths.items())})
        return out

    def to_lines(self) -> bytes:
        """One JSON object per episode for ``episodes.jsonl``."""
        rows = zip(self.source_ids, self.metas, strict=True)
        return "".join(canonical_json({"source_id": s, "meta": m}) + "\n" for s, m in rows).encode()

    @classmethod
    def from_storage(cls, arrays: Mapping[str, np.ndarray], lines: bytes) -> "EpisodeTable":
        """Inverse of :meth:`to_arrays` and :meth:`to_lines`."""
        episodes = [json.loads(line) for line in lines.splitlines()]
        return cls(
            lengths=arrays["length"],
            task_ids=arrays["task_id"],
            seeds=tuple(int(text) if text else None for text in arrays["seed"].tolist()),
            source_ids=tuple(item["source_id"] for item in episodes),
            metas=tuple(item["meta"] for item in episodes),
            rows={k.removeprefix("rows:"): v for k, v in arrays.items() if k.startswith("rows:")},
            widths={
                k.removeprefix("width:"): v for k, v in arrays.items() if k.startswith("width:")
            },
        )


class Ledger:
    """Checks that episodes agree with each other and remembers what they were.

    Args:
        features: What an environment declares (bounds, number of discrete values, kinds), or None.
    """

    def __init__(self, features: FeatureSpec | None = None) -> None:
        self.declared = features
        self.columns: dict[str, Column] = {}
        self.entries: list[dict[str, Any]] = []

    def check(self, entry: Mapping[str, Any]) -> None:
        """Raises when an episode does not fit the ones before it.

        Raises:
            FeatureMismatchError: Keys, shapes or dtypes differ, or contradict the declaration.
        """
        label = f"Episode {len(self.entries)}"
        if entry["source_id"] is not None:
            label += f" ({entry['source_id']})"
        remedy = "All episodes of one dataset must agree: convert them alike or keep two datasets."
        if self.entries:
            expected = {name for name in self.columns if not name.startswith(INFO)}
            found = {name for name in entry["columns"] if not name.startswith(INFO)}
            if expected != found:
                missing, extra = sorted(expected - found), sorted(found - expected)
                raise FeatureMismatchError(
                    f"{label}: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}. "
                    f"{remedy}"
                )
        for name, item in entry["columns"].items():
            column, known = _column(item), self.columns.get(name)
            if known is None:
                continue
            same_dtype = column.dtype == known.dtype or (
                is_text(column.dtype) and column.dtype.kind == known.dtype.kind
            )
            if column.shape != known.shape or not same_dtype:
                raise FeatureMismatchError(
                    f"{label}: {name!r} is {column}, the episodes before it have {known}. {remedy}"
                )
        if not self.entries and self.declared is not None:
            _merge_features(
                self.declared, _features({k: _column(v) for k, v in entry["columns"].items()})
            )

    def record(self, entry: dict[str, Any]) -> None:
        """Adds a checked episode."""
        for name, item in entry["columns"].items():
            column, known = _column(item), self.columns.get(name)
            if known is None or (
                is_text(column.dtype) and _width(column.dtype) > _width(known.dtype)
            ):
                self.columns[name] = column
        self.entries.append(entry)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in order of first appearance."""
        return tuple(dict.fromkeys(e["task"] for e in self.entries if e["task"] is not None))

    def features(self) -> FeatureSpec:
        """Schema of the recorded data, with the declared kinds, bounds and counts."""
        found = _features(self.columns)
        return found if self.declared is None else _merge_features(self.declared, found)

    def table(self) -> EpisodeTable:
        """Collects the per-episode tables."""
        ids = {task: i for i, task in enumerate(self.tasks)}
        entries = self.entries

        def gather(name: str, item: str, missing: int) -> np.ndarray:
            values = []
            for entry in entries:
                column = entry["columns"].get(name)
                if column is None:
                    values.append(missing)
                else:
                    values.append(
                        column["rows"] if item == "rows" else _width(np.dtype(column["dtype"]))
                    )
            return np.array(values, np.int64)

        return EpisodeTable(
            lengths=np.array([e["length"] for e in entries], np.int64),
            task_ids=np.array([ids.get(e["task"], -1) for e in entries], np.int64),
            seeds=tuple(e["seed"] for e in entries),
            source_ids=tuple(e["source_id"] for e in entries),
            metas=tuple(e["meta"] for e in entries),
            rows={n: gather(n, "rows", 0) for n in self.columns if n.startswith(INFO)},
            widths={n: gather(n, "width", 0) for n, c in self.columns.items() if is_text(c.dtype)},
        )


def _column(item: Mapping[str, Any]) -> Column:
    return Column(np.dtype(item["dtype"]), tuple(item["shape"]))


def _features(columns: Mapping[str, Column]) -> FeatureSpec:
    def describe(column: Column) -> Feature:
        return Feature.from_array(np.empty((0, *column.shape), column.dtype))

    observations = {
        name.removeprefix(OBSERVATION): describe(column)
        for name, column in columns.items()
        if name.startswith(OBSERVATION)
    }
    return FeatureSpec(observations=observations, action=describe(columns["action"]))


def _merge_features(declared: FeatureSpec, found: FeatureSpec) -> FeatureSpec:
    """Kinds and bounds from the declaration, dtypes from the data (which are stored losslessly)."""
    if set(declared.observations) != set(found.observations):
        raise FeatureMismatchError(
            f"Declared observations {sorted(declared.observations)} differ from those recorded, "
            f"{sorted(found.observations)}. Declare the features of the recorded environment."
        )

    def merge(name: str, left: Feature, right: Feature) -> Feature:
        if left.shape != right.shape:
            raise FeatureMismatchError(
                f"{name} is declared with shape {left.shape} but recorded with {right.shape}. "
                "Declare the features of the environment that was recorded."
            )
        return replace(left, dtype=right.dtype)

    observations = {
        key: merge(f"Observation {key!r}", declared.observations[key], feature)
        for key, feature in found.observations.items()
    }
    return FeatureSpec(observations, merge("The action", declared.action, found.action))


def npy_header(dtype: np.dtype, shape: Sequence[int]) -> bytes:
    """Header of a version 1.0 ``.npy`` file; its size does not depend on the number of rows."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": tuple(shape),
        },
    )
    return buffer.getvalue()


def raw_bytes(array: np.ndarray) -> memoryview:
    """C-ordered bytes of an array, without a copy unless it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def array_sha256(array: np.ndarray) -> str:
    """sha256 of the ``.npy`` file that would hold ``array``."""
    digest = hashlib.sha256(npy_header(array.dtype, array.shape))
    digest.update(raw_bytes(array))
    return digest.hexdigest()


def content_sha256(
    features: FeatureSpec,
    tasks: Sequence[str],
    table: EpisodeTable,
    column_sha256: Mapping[str, str],
) -> str:
    """Identity of a dataset: equal for equal content, in memory or on disk."""
    parts = {
        "features": features.to_dict(),
        "tasks": list(tasks),
        "columns": dict(column_sha256),
        "tables": {name: array_sha256(array) for name, array in table.to_arrays().items()},
        "meta": list(table.metas),
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()
