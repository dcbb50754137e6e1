"""Writing a dataset in D4RL's HDF5 layout, for code that reads nothing else."""

import contextlib
import json
import os
import shutil
import warnings
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

from mail_agents.data.dataset import TrajectoryDataset
from mail_agents.data.episode import Episode
from mail_agents.errors import InvalidInputError, StorageError
from mail_wrappers.datasets.d4rl_file import EXTRAS

_CHUNK_BYTES = 256 << 10


class D4RLInfoWarning(UserWarning):
    """Infos that D4RL's layout cannot hold were left out."""


def write_d4rl(dataset: TrajectoryDataset, path: str | os.PathLike[str]) -> Path:
    """Writes flat arrays with one row per transition: D4RL's layout, version 2.

    ``observations``, ``actions``, ``rewards``, ``terminals``, ``timeouts``, ``next_observations``
    and ``infos/...``, compressed. Tasks, seeds, ``meta``, features, environments and reference
    scores go into the text ``metadata/mail_agents``, so that
    :func:`~mail_wrappers.datasets.d4rl.convert_d4rl` gives the same content back.

    Args:
        dataset: The dataset. It has one observation key and floating-point actions.
        path: File to write; its folder is made.

    Returns:
        The path.

    Raises:
        InvalidInputError: The file exists, there are several observation keys or discrete actions,
            or an episode has no end or one before its last step.
        StorageError: The disk is full or the place cannot be written to.
    """
    path = Path(path)
    if path.exists():
        raise InvalidInputError(f"{path} exists already. Choose another name or delete it first.")
    key = _only_key(dataset)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path.parent, dataset, key)
        with h5py.File(partial, "w") as file:
            _write(file, dataset, key)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # HDF5 raises either when the disk is full
        raise StorageError(
            f"Cannot write {path}, nothing was put there: {error}. Free space or choose another "
            "place, then run the command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return path


def _only_key(dataset: TrajectoryDataset) -> str:
    keys, action = list(dataset.features.observations), dataset.features.action
    if len(keys) != 1 or dataset.features.observations[keys[0]].kind == "text":
        raise InvalidInputError(
            f"D4RL's layout has one array of observations; this dataset observes {keys}. Write it "
            "in Minari's format instead: 'mail-agents data convert STORE minari:ID'."
        )
    if np.dtype(action.dtype).kind != "f" or len(action.shape) != 1:
        raise InvalidInputError(
            f"D4RL's layout has actions (N, A) of floating-point numbers; these are {action.dtype} "
            f"of shape {action.shape}. Write the dataset in Minari's format instead."
        )
    return keys[0]


def _check_space(folder: Path, dataset: TrajectoryDataset, key: str) -> None:
    """Refuses early: HDF5 may crash the interpreter after running out of space."""
    episode = dataset.episode(0)
    columns = [*_columns(episode, key).values(), *episode.infos.values()]
    needed = sum(values.nbytes for values in columns) * dataset.info.n_steps // len(episode)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"up to {needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free")


def _write(file: h5py.File, dataset: TrajectoryDataset, key: str) -> None:
    infos = _row_infos(dataset)
    known, row = [], 0
    targets: dict[str, h5py.Dataset] = {}
    for number in range(len(dataset)):
        episode = dataset.episode(number)
        _check_end(number, episode)
        columns = _columns(episode, key)
        columns.update({f"infos/{name}": episode.infos[name] for name in infos})
        for name, values in columns.items():
            if name not in targets:
                targets[name] = _make(file, name, values, dataset.info.n_steps)
            targets[name][row : row + len(episode)] = values
        row += len(episode)
        known.append({"task": episode.task, "seed": episode.seed, "meta": dict(episode.meta)})
    info = dataset.info
    file[EXTRAS] = json.dumps(
        {
            "name": info.name,
            "features": dataset.features.to_dict(),
            "env_specs": dict(info.env_specs),
            "reference_scores": dict(info.reference_scores),
            "episodes": known,
        }
    )


def _columns(episode: Episode, key: str) -> dict[str, np.ndarray]:
    observations = episode.observations[key]
    return {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": episode.actions,
        "rewards": episode.rewards,
        "terminals": episode.terminations,
        "timeouts": episode.truncations,
    }


def _make(file: h5py.File, name: str, values: np.ndarray, rows: int) -> h5py.Dataset:
    row = max(1, values.dtype.itemsize * int(np.prod(values.shape[1:], dtype=np.int64)))
    chunk = min(rows, max(1, _CHUNK_BYTES // row))
    shape = (rows, *values.shape[1:])
    return file.create_dataset(
        name, shape, values.dtype, chunks=(chunk, *values.shape[1:]), compression="gzip"
    )


def _row_infos(dataset: TrajectoryDataset) -> list[str]:
    """Infos with one row per transition in every episode; the others are named in a warning."""
    fitting, seen = Counter[str](), set[str]()
    for number in range(len(dataset)):
        episode = dataset.episode(number)
        seen.update(episode.infos)
        fitting.update(
            name
            for name, values in episode.infos.items()
            if len(values) == len(episode) and values.dtype.kind in "biuf"
        )
    dropped = sorted(name for name in seen if fitting[name] < len(dataset))
    if dropped:
        warnings.warn(
            f"Infos {dropped} are left out: D4RL's layout holds numbers, one row per transition, "
            "in every episode.",
            D4RLInfoWarning,
            stacklevel=4,
        )
    return sorted(seen.difference(dropped))


def _check_end(number: int, episode: Episode) -> None:
    ends = episode.terminations | episode.truncations
    if not ends[-1] or ends[:-1].any():
        raise InvalidInputError(
            f"Episode {number} "
            + ("has no end" if not ends[-1] else "ends before its last step")
            + ": D4RL's layout knows episodes by 'terminals' and 'timeouts' alone. Set "
            "terminations or truncations at the last step, and only there."
        )
