"""Demonstrations in robomimic's HDF5 layout, which LIBERO uses too: one file per task.

``data/demo_<i>/actions`` ``(T, A)``, ``data/demo_<i>/obs/<key>`` ``(T, ...)``, optionally
``rewards``, ``dones``, ``states``, ``robot_states`` and ``next_obs/<key>``. Only h5py is needed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from mail_agents.data.dataset import select_demos
from mail_agents.data.episode import Episode
from mail_agents.data.manifest import file_sha256
from mail_agents.data.store import StoreDataset, write_dataset
from mail_agents.errors import CorruptFileError, InvalidInputError

DEMO_SUFFIX = "_demo"
_STEP_INFOS = ("states", "robot_states")


def read_demos(
    source: str | Path,
    *,
    demos: int | None = None,
    selection: Literal["first", "mail_legacy"] = "first",
) -> Iterator[Episode]:
    """Reads demonstrations one at a time, as they are stored.

    LIBERO's files pair ``obs[t]`` with ``actions[t]`` although the image was taken after the action
    (upstream ``scripts/create_dataset.py``); training code reads them as they are, and so does
    this. They hold T observations: where ``next_obs`` is missing, the last one is repeated as the
    final observation, and ``meta["final_observation"]`` is ``"repeated"``. Windows never show it.

    Args:
        source: One HDF5 file, or a folder of them (read in name order).
        demos: Demonstrations per file; None for all.
        selection: See :func:`~mail_agents.data.dataset.select_demos`.

    Yields:
        Episodes; ``task`` is the file name without ``_demo.hdf5``.

    Raises:
        CorruptFileError: A file is truncated, of another kind, lacks a key, or its arrays disagree.
        InvalidInputError: There are no files, or fewer demonstrations than asked for.
    """
    for file in _demo_files(source):
        yield from _read_file(file, demos, selection)


def _demo_files(source: str | Path) -> list[Path]:
    path = Path(source)
    if not path.exists():
        raise InvalidInputError(f"{path} does not exist. Give an HDF5 file or a folder of them.")
    files = sorted([*path.glob("*.hdf5"), *path.glob("*.h5")]) if path.is_dir() else [path]
    if not files:
        raise InvalidInputError(f"{path} holds no .hdf5 files.")
    return files


def convert_demos(
    source: str | Path, output: str | Path, *, overwrite: bool = False
) -> StoreDataset:
    """Converts a file or folder of demonstrations into a store; see :func:`read_demos`.

    Run it again to continue after an interruption; that needs the same files with the same content.

    Args:
        source: One HDF5 file, or a folder of them.
        output: Folder of the store.
        overwrite: Whether to replace an existing store.

    Raises:
        CorruptFileError: See :func:`read_demos`.
        InvalidInputError: There are no files, or the output exists.
    """
    return write_dataset(
        output,
        read_demos(source),
        name=Path(source).stem,
        source=_identity(source),
        overwrite=overwrite,
    )


def _identity(source: str | Path) -> dict[str, Any]:
    files = [
        {"name": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in _demo_files(source)
    ]
    return {"kind": "robomimic-hdf5", "id": Path(source).name, "files": files}


def _read_file(
    path: Path, demos: int | None, selection: Literal["first", "mail_legacy"]
) -> Iterator[Episode]:
    task = path.stem.removesuffix(DEMO_SUFFIX)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise CorruptFileError(
            f"{path} is not a complete HDF5 file ({error}). It was cut short while downloading, or "
            "is of another kind."
        ) from error
    with file:
        data = _child(path, file, "data")
        for key in select_demos(list(data), demos, selection):
            try:
                yield _read_demo(path, _child(path, data, key), key, task)
            except InvalidInputError as error:
                raise CorruptFileError(f"{path}: {error}") from error


def _read_demo(path: Path, group: h5py.Group, key: str, task: str) -> Episode:
    actions = _array(path, group, "actions")
    length = len(actions)
    observed = _observations(path, group, "obs", length)
    repeated = "next_obs" not in group
    final = observed if repeated else _observations(path, group, "next_obs", length)
    if not repeated and final.keys() != observed.keys():
        raise CorruptFileError(
            f"{path}: {group.name}/next_obs has keys {sorted(final)}, obs has {sorted(observed)}."
        )
    dones = _optional(path, group, "dones", length, np.zeros(length)).astype(bool)
    rewards = _optional(path, group, "rewards", length, np.zeros(length))
    last = np.arange(length) == length - 1
    meta: dict[str, Any] = {"source_id": f"{task}/{key}"}
    if "rewards" in group:
        meta["success"] = bool((rewards > 0).any())
    if repeated:
        meta["final_observation"] = "repeated"
    infos = {n: _optional(path, group, n, length, np.zeros(0)) for n in _STEP_INFOS if n in group}
    return Episode(
        observations={k: np.concatenate([v, final[k][-1:]]) for k, v in observed.items()},
        actions=actions,
        rewards=rewards,
        terminations=dones,
        truncations=last & ~dones,
        task=task,
        meta=meta,
        infos=infos,
    )


def _child(path: Path, group: h5py.Group, name: str) -> h5py.Group:
    found = group.get(name)
    if not isinstance(found, h5py.Group):
        raise CorruptFileError(_missing(path, group, name, "group"))
    return found


def _missing(path: Path, group: h5py.Group, name: str, kind: str) -> str:
    present = ", ".join(sorted(group)) or "nothing"
    full = f"{str(group.name).rstrip('/')}/{name}"
    return (
        f"{path}: {kind} {full} is missing (present: {present}). Expected robomimic's layout: "
        "data/demo_<i>/actions and data/demo_<i>/obs/<key>."
    )


def _array(path: Path, group: h5py.Group, name: str) -> np.ndarray:
    found = group.get(name)
    if not isinstance(found, h5py.Dataset):
        raise CorruptFileError(_missing(path, group, name, "array"))
    if found.dtype.kind not in "biuf":
        raise CorruptFileError(f"{path}: {found.name} holds {found.dtype}, expected numbers.")
    if not found.shape:
        raise CorruptFileError(f"{path}: {found.name} is a single value, expected one per step.")
    try:
        return found[()]
    except OSError as error:
        raise CorruptFileError(f"{path}: {found.name} cannot be read: {error}.") from error


def _optional(
    path: Path, group: h5py.Group, name: str, length: int, default: np.ndarray
) -> np.ndarray:
    if name not in group:
        return default
    array = _array(path, group, name)
    if len(array) != length:
        raise CorruptFileError(
            f"{path}: {group.name}/{name} has {len(array)} rows, actions have {length}."
        )
    return array


def _observations(path: Path, group: h5py.Group, name: str, length: int) -> dict[str, np.ndarray]:
    child = _child(path, group, name)
    keys: Sequence[str] = sorted(child)
    if not keys:
        raise CorruptFileError(f"{path}: {child.name} is empty.")
    empty = np.zeros(0)
    return {key: _optional(path, child, key, length, empty) for key in keys}
