"""The memory-mapped store: a folder with one ``.npy`` per feature that opens only when complete.

Layout: ``manifest.json`` (schema, features, tasks, environment specs, source, reference scores,
library versions, and a table of files with sha256, bytes, dtype and shape), one flat ``.npy`` per
feature, ``episodes.npz`` (lengths, offsets, task ids, seeds), ``episodes.jsonl`` (source id and
meta of each episode) and ``stats.json``. Nothing in it is ever unpickled.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mail_agents.data.columns import EpisodeTable
from mail_agents.data.dataset import ArrayDataset, DatasetInfo, MemoryDataset, TrajectoryDataset
from mail_agents.data.episode import Episode
from mail_agents.data.manifest import (
    LINES,
    MANIFEST,
    RECONVERT,
    STATS,
    TABLES,
    check_file,
    check_sha256,
    load_manifest,
)
from mail_agents.data.stats import FeatureStats
from mail_agents.data.writer import StoreWriter
from mail_agents.errors import CorruptFileError, MailAgentsError
from mail_agents.features import FeatureSpec

__all__ = [
    "DatasetInfo",
    "MemoryDataset",
    "StoreDataset",
    "StoreWriter",
    "TrajectoryDataset",
    "open_dataset",
    "verify_dataset",
    "write_dataset",
]

#: Columns other than images are read into RAM, smallest first, up to this many bytes in all.
RAM_BYTES = 256 << 20


class StoreDataset(ArrayDataset):
    """A store on disk; make one with :func:`open_dataset`.

    Large columns are read-only memory maps, shared by forked and spawned workers through the page
    cache; pickling one sends its path, not its data.

    Attributes:
        path: Folder of the store.
    """

    def __init__(self, path: Path, *args: Any) -> None:
        super().__init__(*args)
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., "StoreDataset"], tuple[str]]:
        return open_dataset, (str(self.path),)


def open_dataset(path: str | os.PathLike[str], *, verify: bool = False) -> StoreDataset:
    """Opens a store after checking every file's size, dtype and shape against the manifest.

    Args:
        path: Folder of the store.
        verify: Whether to also recompute every checksum and look for NaN (reads everything).

    Raises:
        InvalidInputError: There is no store at ``path``.
        CorruptFileError: A file is missing, truncated, foreign or altered, or the schema version is
            another one; the message names the file, the key, the expectation and what to do.
    """
    folder = Path(os.path.abspath(path))
    manifest = load_manifest(folder)
    with _naming_missing_keys(folder / MANIFEST):
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, expected in files.items():
            check_file(folder, name, expected)
        for name in (TABLES, LINES, STATS):
            check_sha256(folder, name, files[name])
        columns = _open_columns(folder, files)
        features = FeatureSpec.from_dict(manifest["features"])
        info = _info(manifest)
    with (
        _naming_missing_keys(folder / TABLES),
        np.load(folder / TABLES, allow_pickle=False) as arrays,
    ):
        table = EpisodeTable.from_storage(dict(arrays), (folder / LINES).read_bytes())
        _check_rows(folder, table, columns)
    with _naming_missing_keys(folder / STATS):
        stats = json.loads((folder / STATS).read_text(encoding="utf-8"))
        known = {key: FeatureStats.from_dict(item) for key, item in stats.items()}
    dataset = StoreDataset(folder, info, features, columns, table, known)
    if verify:
        _verify(folder, files, dataset)
    return dataset


@contextlib.contextmanager
def _naming_missing_keys(file: Path) -> Iterator[None]:
    try:
        yield
    except MailAgentsError:
        raise
    except KeyError as error:
        raise CorruptFileError(f"{file}: key {error.args[0]!r} is missing. {RECONVERT}") from error


def _info(manifest: Mapping[str, Any]) -> DatasetInfo:
    return DatasetInfo(
        name=manifest["name"],
        tasks=tuple(manifest["tasks"]),
        n_episodes=manifest["n_episodes"],
        n_steps=manifest["n_steps"],
        env_specs=manifest["env_specs"],
        source=manifest["source"],
        reference_scores=manifest["reference_scores"],
        sha256=manifest["sha256"],
    )


def _open_columns(folder: Path, files: Mapping[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    listed = {name: item for name, item in files.items() if "column" in item}
    columns, used = {}, 0
    for name, item in sorted(listed.items(), key=lambda pair: pair[1]["bytes"]):
        image = item["dtype"] == "|u1" and len(item["shape"]) == 4
        if not image and used + item["bytes"] <= RAM_BYTES:
            used += item["bytes"]
            array = np.load(folder / name, allow_pickle=False)
            array.flags.writeable = False
        else:
            # A plain view of the map: indexing np.memmap itself costs several microseconds.
            array = np.load(folder / name, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        columns[item["column"]] = array
    return {item["column"]: columns[item["column"]] for item in listed.values()}


def _check_rows(folder: Path, table: EpisodeTable, columns: Mapping[str, np.ndarray]) -> None:
    for name, array in columns.items():
        rows = int(table.row_counts(name).sum())
        if rows != len(array):
            raise CorruptFileError(
                f"{folder / TABLES}: the episodes have {rows} rows of {name!r}, its file "
                f"{len(array)}. {RECONVERT}"
            )


def _verify(folder: Path, files: Mapping[str, dict[str, Any]], dataset: StoreDataset) -> None:
    for name, expected in files.items():
        check_sha256(folder, name, expected)
    for name in [n for n in dataset._columns if not n.startswith("info/")]:
        array = dataset.column(name)
        if array.dtype.kind not in "fc":
            continue
        for start in range(0, len(array), 1 << 16):
            if not np.isfinite(array[start : start + (1 << 16)]).all():
                raise CorruptFileError(
                    f"{folder}: column {name!r} holds NaN or infinity near row {start}. {RECONVERT}"
                )


def verify_dataset(path: str | os.PathLike[str]) -> DatasetInfo:
    """Checks a whole store: structure, every checksum, and the absence of NaN.

    Returns:
        The facts of the store, when everything is in order.

    Raises:
        InvalidInputError: There is no store at ``path``.
        CorruptFileError: Something is wrong, see :func:`open_dataset`.
    """
    return open_dataset(path, verify=True).info


def write_dataset(
    path: str | os.PathLike[str],
    episodes: Iterable[Episode],
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    **options: Any,
) -> StoreDataset:
    """Writes episodes as a store and opens it.

    Episodes are consumed one at a time. With a ``source`` that says where they come from, an
    interrupted write of the same source is continued (episodes that are in already are skipped by
    ``meta["source_id"]``, or by position); without one it starts again.

    Args:
        path: Folder of the store.
        episodes: The episodes.
        name: Name of the dataset; the folder's name when None.
        source: See :class:`StoreWriter`.
        options: Further arguments of :class:`StoreWriter`.

    Raises:
        InvalidInputError: The target exists and ``overwrite`` is not set, there are no episodes, or
            reference scores are no scale.
    """
    name = Path(path).name if name is None else name
    options.setdefault("resume", source is not None)
    with StoreWriter(path, name=name, source=source, **options) as writer:
        for position, episode in enumerate(episodes):
            source_id = str(episode.meta.get("source_id", position))
            if source_id not in writer.completed:
                writer.add(episode, source_id)
    return open_dataset(path)
