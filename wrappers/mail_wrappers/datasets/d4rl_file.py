"""One file in D4RL's layout: what must be in it, checked whole, and read in blocks of rows.

Flat arrays with one row per transition: ``observations`` ``(N, ...)``, ``actions`` ``(N, A)``,
``rewards`` and ``terminals`` ``(N,)`` or ``(N, 1)``, optionally ``timeouts``, ``next_observations``
and ``infos/...``; anything under ``metadata`` is not a row (``d4rl/offline_env.py``).
"""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from mail_agents.errors import CorruptFileError, InvalidInputError
from mail_agents.features import Feature

#: Where files written by this project keep what D4RL has no place for.
EXTRAS = "metadata/mail_agents"

_REQUIRED = ("observations", "actions", "rewards", "terminals")
_FLAT = ("rewards", "terminals", "timeouts")
_CORE = (*_REQUIRED, "timeouts", "next_observations")
_BLOCK_BYTES = 8 << 20
# Actions that left a network or a file as float32 may miss the bound by a few units in the last
# place; more than this is another range.
_ROUNDING = 1e-5


class D4RLActionWarning(UserWarning):
    """Recorded actions leave the bounds, mostly [-1, 1], which the environments clip to."""


class _Column:
    """A data set of which one block of rows is held at a time."""

    def __init__(self, path: Path, data: h5py.Dataset, flat: bool) -> None:
        self._path, self._data, self._flat = path, data, flat
        row = data.dtype.itemsize * int(np.prod(data.shape[1:], dtype=np.int64))
        self._rows = max(1, _BLOCK_BYTES // max(1, row))
        self._start, self._block = 0, np.empty(0)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start..stop-1``; cheap when asked for in order."""
        if start < self._start or stop > self._start + len(self._block):
            self._start = start
            self._block = self._load(start, max(stop, start + self._rows))
        return self._block[start - self._start : stop - self._start]

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All rows, a block at a time, each with the index of its first row."""
        for start in range(0, self._data.shape[0], self._rows):
            yield start, self._load(start, start + self._rows)

    def _load(self, start: int, stop: int) -> np.ndarray:
        try:
            rows = self._data[start:stop]
        except OSError as error:
            raise CorruptFileError(
                f"{self._path}: {self._data.name} cannot be read near row {start}: {error}. "
                "Download or copy the file again."
            ) from error
        return rows.reshape(len(rows)) if self._flat else rows


class D4RLFile:
    """An open file whose layout is right; :meth:`check` looks at its values.

    Attributes:
        path: The file.
        rows: Number of transitions.
        infos: Names of the extra per-transition arrays, without ``infos/``.
        extras: What this project added when it wrote the file, or an empty dictionary.
        metadata: The small entries of ``metadata``, such as ``algorithm``.

    Raises:
        InvalidInputError: There is no file.
        CorruptFileError: It is truncated, not HDF5, lacks a key, has no rows, integer actions, or
            arrays that disagree; the message names the key.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            state = "is a folder" if self.path.is_dir() else "does not exist"
            raise InvalidInputError(f"{self.path} {state}. Give the path of one HDF5 file.")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise CorruptFileError(
                f"{self.path} is not a complete HDF5 file ({error}). It was cut short while "
                "downloading, or is of another kind."
            ) from error
        try:
            self._found = found = self._arrays()
            self.rows = self._check_layout(found)
            self._columns = {
                name: _Column(self.path, data, name in _FLAT) for name, data in found.items()
            }
            self.infos = {name.removeprefix("infos/"): name for name in found if name not in _CORE}
            self.extras = self._read_extras()
            self.metadata = self._read_metadata()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "D4RLFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start..stop-1`` of one array."""
        return self._columns[name].read(start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one row."""
        return self._found[name].shape[1:]

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype of an array."""
        return self._found[name].dtype

    def flags(self, name: str) -> np.ndarray:
        """``(N,)`` bool of ``terminals`` or ``timeouts``, which some files store as numbers."""
        values = np.concatenate([block for _, block in self._columns[name].blocks()])
        strange = np.flatnonzero((values != 0) & (values != 1))
        if len(strange):
            raise CorruptFileError(
                f"{self.path}: {name} holds {values[strange[0]]} at row {strange[0]}, expected "
                "0 or 1."
            )
        return values.astype(bool)

    def check(self, action: Feature | None = None) -> None:
        """Reads every value that an agent could see.

        Args:
            action: The action of the environment, whose bounds recorded actions are compared with;
                None compares with [-1, 1], D4RL's.

        Raises:
            CorruptFileError: Observations, actions or rewards hold NaN or infinity, or a flag is
                not 0 or 1; the message names the array and the row.
        """
        for name in ("observations", "next_observations", "actions", "rewards"):
            if name in self:
                for start, block in self._columns[name].blocks():
                    self._check_finite(name, start, block)
        for name in ("terminals", "timeouts"):
            if name in self:
                self.flags(name)
        if action is None:
            self._check_range(np.array(-1.0), np.array(1.0))
        elif action.low is not None and action.high is not None:
            self._check_range(np.array(action.low), np.array(action.high))

    def _check_finite(self, name: str, start: int, block: np.ndarray) -> None:
        if block.dtype.kind == "f" and not np.isfinite(block).all():
            bad = ~np.isfinite(block.reshape(len(block), -1)).all(axis=1)
            row = start + int(np.argmax(bad))
            raise CorruptFileError(
                f"{self.path}: {name} is not finite (NaN or infinity), first at row {row}. "
                "Download the file again, or repair it before converting."
            )

    def _check_range(self, low: np.ndarray, high: np.ndarray) -> None:
        dtype = self.dtype("actions")
        floor = (low - _ROUNDING * np.maximum(1, np.abs(low))).astype(dtype)
        ceiling = (high + _ROUNDING * np.maximum(1, np.abs(high))).astype(dtype)
        outside, first, largest = 0, -1, 0.0
        for start, block in self._columns["actions"].blocks():
            beyond = ((block < floor) | (block > ceiling)).any(axis=1)
            if beyond.any():
                first = start + int(np.argmax(beyond)) if first < 0 else first
                outside += int(beyond.sum())
                largest = max(largest, float(np.abs(block[beyond]).max()))
        if outside:
            alike = np.ptp(low) == np.ptp(high) == 0
            bounds = f"[{low.max():g}, {high.max():g}]" if alike else "the environment's bounds"
            warnings.warn(
                f"{self.path}: {outside} of {self.rows} actions leave {bounds} (up to {largest:g}, "
                f"first at row {first}). They are kept; the environments clip them, and an agent "
                "whose outputs are bounded cannot reproduce them.",
                D4RLActionWarning,
                stacklevel=4,
            )

    def _arrays(self) -> dict[str, h5py.Dataset]:
        for name in _REQUIRED:
            group = self._file.get(name)
            if isinstance(group, h5py.Group):
                raise CorruptFileError(
                    f"{self.path}: {name} is a group ({', '.join(group)}), expected "
                    "one array with a row per transition. Convert Minari datasets with 'minari:'."
                )
        found = dict(self._walk(self._file, "", ()))
        missing = [name for name in _REQUIRED if name not in found]
        if missing:
            present = ", ".join(sorted(self._file)) or "nothing"
            raise CorruptFileError(
                f"{self.path}: {', '.join(missing)} missing (present: {present}). Expected D4RL's "
                f"layout: {', '.join(_REQUIRED)}, one row per transition."
            )
        return found

    def _walk(
        self, group: h5py.Group, prefix: str, parents: tuple[h5py.Group, ...]
    ) -> Iterator[tuple[str, h5py.Dataset]]:
        """Data sets by the names that lead to them, links included; not those of ``metadata``."""
        for key, item in group.items():
            name = f"{prefix}{key}"
            if item is None:
                raise CorruptFileError(f"{self.path}: {name} is a link to something missing.")
            if isinstance(item, h5py.Dataset):
                yield name, item
            elif isinstance(item, h5py.Group) and name != "metadata":
                if item in (group, *parents):
                    raise CorruptFileError(f"{self.path}: {name} links back to its own parent.")
                yield from self._walk(item, f"{name}/", (group, *parents))

    def _check_layout(self, found: dict[str, h5py.Dataset]) -> int:
        rows = {name: data.shape[0] if data.shape else None for name, data in found.items()}
        count = rows["rewards"]
        if None in rows.values() or len(set(rows.values())) > 1:
            listed = ", ".join(f"{name} {n}" for name, n in sorted(rows.items()))
            raise CorruptFileError(f"{self.path}: the arrays differ in their rows: {listed}.")
        if not count:
            raise CorruptFileError(f"{self.path} has no transitions (0 rows).")
        for name, data in found.items():
            self._check_array(name, data)
        following = found.get("next_observations")
        if following is not None and following.shape != found["observations"].shape:
            raise CorruptFileError(
                f"{self.path}: next_observations has shape {following.shape}, observations "
                f"{found['observations'].shape}."
            )
        return count

    def _check_array(self, name: str, data: h5py.Dataset) -> None:
        if name == "actions" and data.dtype.kind in "biu":
            raise CorruptFileError(
                f"{self.path}: actions holds {data.dtype}, expected floating-point numbers in "
                "[-1, 1]. Discrete actions cannot be read from this format; convert the Minari "
                "version of the dataset."
            )
        if data.dtype.kind not in ("f" if name == "actions" else "biuf"):
            raise CorruptFileError(f"{self.path}: {name} holds {data.dtype}, expected numbers.")
        if name in _FLAT:
            good, expected = data.shape[1:] in ((), (1,)), "(N,) or (N, 1)"
        elif name == "actions":
            good, expected = len(data.shape) == 2, "(N, A)"
        else:
            good, expected = name not in _CORE or len(data.shape) >= 2, "(N, S)"
        if not good:
            raise CorruptFileError(
                f"{self.path}: {name} has shape {data.shape}, expected {expected}."
            )

    def _read_extras(self) -> dict[str, Any]:
        item: Any = self._file.get(EXTRAS)
        if item is None:
            return {}
        try:
            return dict(json.loads(item.asstr()[()]))
        except (AttributeError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{self.path}: {EXTRAS} is not readable: {error}.") from error

    def _read_metadata(self) -> dict[str, Any]:
        group, out = self._file.get("metadata"), {}
        for name, item in group.items() if isinstance(group, h5py.Group) else ():
            if isinstance(item, h5py.Dataset) and item.size == 1 and f"metadata/{name}" != EXTRAS:
                value = np.asarray(item[()]).reshape(-1)[0]
                out[name] = value.decode() if isinstance(value, bytes) else np.asarray(value).item()
        return out
