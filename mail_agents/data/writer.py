"""Writing a store: streamed, resumable after a kill, visible only when complete."""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from mail_agents.data.columns import (
    Column,
    Ledger,
    canonical_json,
    content_sha256,
    episode_columns,
    is_text,
    make_entry,
    raw_bytes,
)
from mail_agents.data.dataset import ArrayDataset, DatasetInfo
from mail_agents.data.episode import Episode
from mail_agents.data.files import (
    ColumnFile,
    stored_dtype,
    swap_in,
    sync_file,
    take_lock,
    write_all,
)
from mail_agents.data.manifest import (
    FORMAT,
    LINES,
    MANIFEST,
    SCHEMA,
    STATS,
    TABLES,
    dump_manifest,
    file_sha256,
    library_versions,
    partial_path,
)
from mail_agents.data.references import checked_references
from mail_agents.errors import InvalidInputError, StorageError
from mail_agents.features import FeatureSpec
from mail_agents.storage import sync_directory

_JOURNAL = "journal.jsonl"
_DATA = "data"


class StoreWriter:
    """Builds a store beside its final place and renames it there when it is complete.

    Episodes are appended to ``.<name>.partial`` and noted in a journal with checksums. If the
    process dies, running the same conversion again continues after the last whole episode. Nothing
    that :func:`~mail_agents.data.store.open_dataset` accepts exists before the final rename.

    >>> with StoreWriter("store", name="demo") as writer:  # doctest: +SKIP
    ...     for key in keys:
    ...         if key not in writer.completed:
    ...             writer.add(read_episode(key), source_id=key)

    Args:
        path: Folder of the finished store.
        name: Name of the dataset.
        env_specs: Gymnasium ``EnvSpec`` dictionaries by task; may be filled until the end.
        source: Where the data comes from (``kind``, ``id``, ``sha256``, ...). An unfinished
            conversion is continued only when name and source are the same.
        reference_scores: ``{"min": ..., "max": ...}`` by task; may be filled until the end.
        overwrite: Whether to replace an existing store, once the new one is complete.
        features: What the environment declares (bounds, discrete values, kinds).
        resume: Whether to continue an unfinished conversion; False starts again.

    Attributes:
        completed: Source ids of the episodes that are in.

    Raises:
        InvalidInputError: The target exists, an unfinished conversion cannot be continued, or
            reference scores are no scale.
        StorageError: The folder cannot be made or written to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str,
        env_specs: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        reference_scores: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        features: FeatureSpec | None = None,
        resume: bool = True,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.name = name
        self.env_specs = dict(env_specs or {})
        self.source = json.loads(canonical_json(dict(source or {})))
        self.reference_scores = checked_references(reference_scores)
        self.overwrite = overwrite
        self.completed: set[str] = set()
        self._ledger = Ledger(features)
        self._files: dict[str, ColumnFile] = {}
        self._partial = partial_path(self.path)
        self._data = self._partial / _DATA
        self._check_target()
        with self._storing():
            self._open(resume)

    def __len__(self) -> int:
        return len(self._ledger.entries)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of the episodes that are in, in order of first appearance."""
        return self._ledger.tasks

    def _open(self, resume: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial.mkdir(exist_ok=True)
        self._lock = take_lock(self._partial / "lock")
        try:
            self._journal = self._resume() if resume else None
            if self._journal is None:
                self._journal = self._start()
        except BaseException:
            self._close()
            raise

    def _check_target(self) -> None:
        if not os.path.lexists(self.path):
            return
        if self.path.is_dir() and not any(self.path.iterdir()):
            return
        if not self.overwrite:
            raise InvalidInputError(
                f"{self.path} exists already and is not overwritten. Choose another path, or pass "
                "overwrite=True (--overwrite) to replace it once the new store is complete."
            )
        if not (self.path / MANIFEST).is_file():
            raise InvalidInputError(
                f"{self.path} is not a trajectory store; overwrite=True refuses it."
            )

    def _identity(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "name": self.name, "source": self.source}

    def _start(self) -> BinaryIO:
        shutil.rmtree(self._data, ignore_errors=True)
        (self._partial / _JOURNAL).unlink(missing_ok=True)
        self._data.mkdir()
        journal = open(self._partial / _JOURNAL, "x+b", buffering=0)  # noqa: SIM115
        write_all(journal, canonical_json(self._identity()).encode() + b"\n")
        return journal

    def _resume(self) -> BinaryIO | None:
        """Continues the journal that is there; None when there is nothing to continue."""
        path = self._partial / _JOURNAL
        if not path.is_file() or not self._data.is_dir():
            return None
        lines = list(_whole_lines(path.read_bytes()))
        if not lines:
            return None
        if lines[0][1] != self._identity():
            raise InvalidInputError(
                f"{self._partial} holds an unfinished conversion of something else (name "
                f"{lines[0][1].get('name')!r}, source {lines[0][1].get('source')!r}). Finish that "
                "one, delete the folder, or pass resume=False to discard it."
            )
        if any(entry["source_id"] is None for _, entry in lines[1:]):
            raise InvalidInputError(
                f"{self._partial} holds an unfinished store whose episodes have no source_id, so "
                "it cannot be known which are missing. Delete the folder, or pass resume=False to "
                "discard it."
            )
        end = lines[0][0]
        for stop, entry in lines[1:]:
            if not self._readmit(entry):
                break
            end = stop
        journal = open(path, "r+b", buffering=0)  # noqa: SIM115
        journal.truncate(end)
        journal.seek(end)
        return journal

    def _readmit(self, entry: dict[str, Any]) -> bool:
        """Takes a journaled episode back if its data is on disk, unharmed."""
        self._ledger.check(entry)
        for name, item in entry["columns"].items():
            file = self._files.get(name)
            if file is None:
                path = self._data / self._file_name(name)
                if not path.is_file():
                    return False
                column = Column(np.dtype(item["dtype"]), tuple(item["shape"]))
                if is_text(column.dtype):  # the file may be wider already
                    column = Column(stored_dtype(path, column.dtype), column.shape)
                file = self._files[name] = ColumnFile(path, column)
            rows = file.read(file.rows, file.rows + item["rows"]).astype(np.dtype(item["dtype"]))
            if zlib.crc32(raw_bytes(rows)) != item["crc32"]:
                return False
        self._accept(entry)
        return True

    def _file_name(self, column: str) -> str:
        # Numbered, lower-case ASCII: safe on every file system, also when keys differ only in case.
        if column in self._files:
            return self._files[column].path.name
        slug = "".join(c if c.isascii() and c.isalnum() else "_" for c in column.lower())[:48]
        return f"{len(self._files):03d}_{slug}.npy"

    def _accept(self, entry: dict[str, Any]) -> None:
        for name, item in entry["columns"].items():
            self._files[name].rows += item["rows"]
        self._ledger.record(entry)
        if entry["source_id"] is not None:
            self.completed.add(entry["source_id"])

    def add(self, episode: Episode, source_id: str | None = None) -> None:
        """Appends one episode.

        Args:
            episode: The episode; its arrays are written at once and not kept.
            source_id: Identity in the source, by which a resumed conversion skips it. None takes
                ``episode.meta["source_id"]``; without either the conversion cannot be resumed.

        Raises:
            FeatureMismatchError: It does not agree with the episodes before it.
            InvalidInputError: The source id is in already, or ``meta`` is not JSON-ready.
            StorageError: The disk is full or failing; what was complete before stays resumable.
        """
        if source_id is None and episode.meta.get("source_id") is not None:
            source_id = str(episode.meta["source_id"])
        if source_id in self.completed:
            raise InvalidInputError(
                f"Episode {source_id!r} is in the store already; skip the ids in writer.completed."
            )
        entry = make_entry(episode, source_id)
        self._ledger.check(entry)
        with self._storing():
            for name, array in episode_columns(episode).items():
                self._write(name, array, entry["columns"][name])
            assert self._journal is not None
            start = self._journal.tell()
            try:
                write_all(self._journal, canonical_json(entry).encode() + b"\n")
            except OSError:
                self._journal.seek(start)
                raise
        self._accept(entry)

    def _write(self, name: str, array: np.ndarray, item: dict[str, Any]) -> None:
        column = Column(array.dtype, array.shape[1:])
        file = self._files.get(name)
        if file is None:
            path = self._data / self._file_name(name)
            path.unlink(missing_ok=True)
            file = self._files[name] = ColumnFile(path, column)
        elif column.dtype.itemsize > file.column.dtype.itemsize:
            file.widen(column.dtype)
        item["crc32"] = zlib.crc32(raw_bytes(array))
        file.write(array, at=file.rows)

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "Free space or choose another place, then run the same command again."
            if len(self):
                remedy = (
                    f"{len(self)} whole episodes are kept in {self._partial}: free space and run "
                    "the same command again to continue, or delete that folder."
                )
            raise StorageError(
                f"Cannot write the store {self.path}, nothing was put there: {error}. {remedy}"
            ) from error

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with self._storing():
                    self._commit()
        finally:
            self._close()
            if not self._ledger.entries:
                shutil.rmtree(self._partial, ignore_errors=True)
        if kind is None:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        if getattr(self, "_journal", None) is not None:
            assert self._journal is not None
            self._journal.close()
        self._lock.close()

    def _commit(self) -> None:
        if not self._ledger.entries:
            raise InvalidInputError(
                f"No episode was added, so there is no store to write at {self.path}. Check the "
                "filter (for example only_successful) or the source."
            )
        self.reference_scores = checked_references(self.reference_scores)
        for name, file in list(self._files.items()):
            if name in self._ledger.columns:
                file.finish()
            else:  # of an episode that could not be added
                file.close()
                file.path.unlink()
                del self._files[name]
        self._write_tables()
        sync_directory(self._data)
        self._check_target()
        swap_in(self._data, self.path, overwrite=self.overwrite)

    def _write_tables(self) -> None:
        ledger, table = self._ledger, self._ledger.table()
        files: dict[str, Any] = {}
        for name, file in self._files.items():
            column = file.column
            files[file.path.name] = {
                "column": name,
                "dtype": column.dtype.str,
                "shape": [file.rows, *column.shape],
                **_sums(file.path),
            }
        hashes = {item["column"]: item["sha256"] for item in files.values()}
        info = DatasetInfo(
            name=self.name,
            tasks=ledger.tasks,
            n_episodes=len(table.lengths),
            n_steps=int(table.lengths.sum()),
            env_specs=self.env_specs,
            source=self.source,
            reference_scores=self.reference_scores,
            sha256=content_sha256(ledger.features(), ledger.tasks, table, hashes),
        )
        columns = {
            item["column"]: np.load(self._data / name, mmap_mode="r", allow_pickle=False)
            for name, item in files.items()
        }
        stats = ArrayDataset(info, ledger.features(), columns, table).stats()
        del columns
        with open(self._data / TABLES, "wb") as stream:
            np.savez(stream, allow_pickle=False, **table.to_arrays())  # type: ignore[arg-type]
        (self._data / LINES).write_bytes(table.to_lines())
        stats_text = json.dumps({k: s.to_dict() for k, s in stats.items()}, sort_keys=True)
        (self._data / STATS).write_text(stats_text + "\n", encoding="utf-8")
        for name in (TABLES, LINES, STATS):
            sync_file(self._data / name)
            files[name] = _sums(self._data / name)
        manifest = {
            "format": FORMAT,
            "schema": SCHEMA,
            "name": info.name,
            "tasks": list(info.tasks),
            "n_episodes": info.n_episodes,
            "n_steps": info.n_steps,
            "features": ledger.features().to_dict(),
            "env_specs": info.env_specs,
            "source": info.source,
            "reference_scores": info.reference_scores,
            "sha256": info.sha256,
            "versions": library_versions(),
            "files": files,
        }
        (self._data / MANIFEST).write_bytes(dump_manifest(manifest))
        sync_file(self._data / MANIFEST)


def _sums(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _whole_lines(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Journal lines that were written completely, each with the offset of its end."""
    end = 0
    for line in data.splitlines(keepends=True):
        end += len(line)
        try:
            if not line.endswith(b"\n"):
                return
            yield end, json.loads(line)
        except ValueError:
            return
