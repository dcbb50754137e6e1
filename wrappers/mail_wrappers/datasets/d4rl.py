"""D4RL's HDF5 files (Fu et al. 2020), versions 0 to 2: split into episodes, converted to a store.

Nothing is downloaded and the d4rl package is not needed. D4RL's own ``qlearning_dataset`` leaves
out the last transition of every episode that ended by timeout; here every row is kept.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mail_agents.data.episode import Episode
from mail_agents.data.manifest import file_sha256
from mail_agents.data.store import StoreDataset, write_dataset
from mail_agents.errors import CorruptFileError, InvalidInputError, UnknownNameError
from mail_agents.features import DEFAULT_KEY, Feature, FeatureSpec
from mail_wrappers.datasets.d4rl_export import write_d4rl
from mail_wrappers.datasets.d4rl_file import D4RLActionWarning, D4RLFile
from mail_wrappers.datasets.d4rl_names import WORLDS, dataset_id, world_of, world_spec
from mail_wrappers.datasets.d4rl_reference import reference

__all__ = [
    "D4RLActionWarning",
    "D4RLTrailingWarning",
    "convert_d4rl",
    "episode_ends",
    "read_d4rl",
    "write_d4rl",
]


class D4RLTrailingWarning(UserWarning):
    """Rows after the last end of an episode were left out."""


def episode_ends(
    terminals: np.ndarray, timeouts: np.ndarray | None, max_episode_steps: int | None
) -> np.ndarray:
    """Where episodes end in flat arrays.

    Args:
        terminals: ``(N,)`` bool, the transition reached a terminal state.
        timeouts: ``(N,)`` bool, the episode was cut after the transition; None when the file does
            not say, then episodes are also cut after ``max_episode_steps``.
        max_episode_steps: See ``timeouts``; not used otherwise.

    Returns:
        Increasing int64 indices, each one past the last row of an episode. Rows after the last one
        belong to an episode that never ended.

    Raises:
        InvalidInputError: There are neither timeouts nor a limit.
    """
    if timeouts is not None:
        return np.flatnonzero(terminals | timeouts) + 1
    if max_episode_steps is None:
        raise InvalidInputError(
            "The file has no 'timeouts' and its name is not one of D4RL's, so it cannot be known "
            "where episodes end. Give max_episode_steps, the environment's limit."
        )
    ends, last = [], 0
    for stop in [*(np.flatnonzero(terminals) + 1).tolist(), len(terminals)]:
        ends += range(last + max_episode_steps, stop, max_episode_steps)
        whole = stop == len(terminals) and (stop - last) % max_episode_steps == 0
        if stop > last and (whole or terminals[stop - 1]):
            ends.append(stop)
        last = stop
    return np.array(ends, np.int64)


def read_d4rl(
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    keep_trailing: bool = False,
    max_episode_steps: int | None = None,
) -> Iterator[Episode]:
    """Reads a file one episode at a time; it is checked whole before the first.

    An episode ends after a row whose terminal or timeout is set. Its final observation is the last
    ``next_observations``; where the file has none, the last observation is repeated and
    ``meta["final_observation"]`` is ``"repeated"``. It is never the first observation of the next
    episode. In maze2d files a timeout is a change of goal: nothing was reset.

    Args:
        source: The file.
        name: D4RL's name of the dataset, for example ``"hopper-medium-v2"``: the task of the
            episodes. None takes it from the file name, if that is one of D4RL's; a file written by
            :func:`write_d4rl` knows its tasks.
        keep_trailing: Whether rows after the last end become a truncated episode, with
            ``meta["trailing"]``; otherwise they are left out with a :class:`D4RLTrailingWarning`.
        max_episode_steps: Where to cut when the file has no ``timeouts``; None takes the limit of
            the dataset's environment.

    Yields:
        Episodes, everything in the stored dtype.

    Raises:
        InvalidInputError: There is no file, or it cannot be known where episodes end.
        CorruptFileError: The file is malformed, see
            :class:`~mail_wrappers.datasets.d4rl_file.D4RLFile`, or holds no whole episode.
    """
    with D4RLFile(source) as file:
        file.check()
        name = name or _known_name(file.path)
        yield from _episodes(file, _spans(file, name, keep_trailing, max_episode_steps), name)


def _known_name(path: Path) -> str | None:
    try:
        return dataset_id(path)
    except UnknownNameError:
        return None


def _spans(
    file: D4RLFile, name: str | None, keep_trailing: bool, limit: int | None
) -> list[tuple[int, int]]:
    """First row of each episode and one past its last."""
    if limit is None and name is not None:
        limit = WORLDS[world_of(name)].max_episode_steps
    timeouts = file.flags("timeouts") if "timeouts" in file else None
    ends = episode_ends(file.flags("terminals"), timeouts, limit).tolist()
    left = file.rows - (ends[-1] if ends else 0)
    if left and keep_trailing:
        ends.append(file.rows)
    elif not ends:
        raise CorruptFileError(
            f"{file.path}: no terminal or timeout is set in {file.rows} rows, so there is no whole "
            "episode. To read them as one unfinished episode, use "
            "mail_wrappers.datasets.d4rl.convert_d4rl(..., keep_trailing=True)."
        )
    elif left:
        warnings.warn(
            f"{file.path}: {left} of {file.rows} rows after the last end of an episode are left "
            "out (keep_trailing=True keeps them).",
            D4RLTrailingWarning,
            stacklevel=3,
        )
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _episodes(file: D4RLFile, spans: list[tuple[int, int]], name: str | None) -> Iterator[Episode]:
    own = _own_facts(file)
    if own is not None and len(own["episodes"]) != len(spans):
        raise CorruptFileError(
            f"{file.path}: the arrays hold {len(spans)} episodes, its metadata "
            f"{len(own['episodes'])}; the file was altered after it was written."
        )
    key = DEFAULT_KEY if own is None else next(iter(own["features"].observations))
    for number, (start, stop) in enumerate(spans):
        arrays, meta = _episode(file, start, stop, key)
        if own is not None:
            yield Episode(**arrays, **own["episodes"][number])
        else:
            meta["source_id"] = f"{name or file.path.stem}/{number:06d}"
            yield Episode(**arrays, task=name, meta=meta)


def _episode(
    file: D4RLFile, start: int, stop: int, key: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays of an episode, and what its ``meta`` must say about them."""
    observations = file.read("observations", start, stop)
    meta: dict[str, Any] = {}
    if "next_observations" in file:
        final = file.read("next_observations", start, stop)[-1:].astype(observations.dtype)
    else:
        final, meta["final_observation"] = observations[-1:], "repeated"
    terminations = file.read("terminals", start, stop).astype(bool)
    truncations = np.zeros(stop - start, bool)
    if "timeouts" in file:
        truncations = file.read("timeouts", start, stop).astype(bool)
    if not (terminations[-1] or truncations[-1]):
        truncations[-1] = True
        if "timeouts" in file:
            meta["trailing"] = True
    arrays = {
        "observations": {key: np.concatenate([observations, final])},
        "actions": file.read("actions", start, stop),
        "rewards": file.read("rewards", start, stop),
        "terminations": terminations,
        "truncations": truncations,
        "infos": {info: file.read(full, start, stop) for info, full in file.infos.items()},
    }
    return arrays, meta


def convert_d4rl(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    name: str | None = None,
    keep_trailing: bool = False,
    max_episode_steps: int | None = None,
) -> StoreDataset:
    """Converts a file to a store, with reference scores and the environment to evaluate in.

    The whole file is checked before anything is written. Run it again to continue after an
    interruption. Environments are Gymnasium's, see ``docs/worlds/d4rl.md``.

    Args:
        source: The file.
        output: Folder of the store.
        overwrite: Whether to replace an existing store.
        name: See :func:`read_d4rl`; needed when the file was renamed.
        keep_trailing: See :func:`read_d4rl`.
        max_episode_steps: See :func:`read_d4rl`.

    Raises:
        UnknownNameError: The file name is not one of D4RL's and no name is given.
        CorruptFileError: The file is malformed, see :func:`read_d4rl`, or its sizes are not those
            of the environment.
        InvalidInputError: There is no file, or the output exists.
    """
    with D4RLFile(source) as file:
        facts = _facts(file, name)
        file.check()
        spans = _spans(file, facts["name"], keep_trailing, max_episode_steps)
        origin = {
            "kind": "d4rl-hdf5",
            "id": facts["id"],
            "file": file.path.name,
            "bytes": file.path.stat().st_size,
            "sha256": file_sha256(file.path),
            "rows": file.rows,
            "dropped_rows": file.rows - spans[-1][1],
            "metadata": file.metadata,
        }
        return write_dataset(
            output,
            _episodes(file, spans, facts["name"]),
            name=facts["id"],
            source=origin,
            env_specs=facts["env_specs"],
            reference_scores=facts["reference_scores"],
            features=facts["features"],
            overwrite=overwrite,
        )


def _facts(file: D4RLFile, name: str | None) -> dict[str, Any]:
    """What is known of the dataset: from the file itself, or from D4RL's name of it."""
    own = _own_facts(file)
    if own is not None:
        return {**own, "name": None}
    name = name or _required_name(file.path)
    return {
        "name": name,
        "id": name,
        "features": _features(file, name),
        "env_specs": {name: world_spec(world_of(name))},
        "reference_scores": {name: reference(name)},
    }


def _own_facts(file: D4RLFile) -> dict[str, Any] | None:
    """What :func:`write_d4rl` added to the file; None for other files."""
    if not file.extras:
        return None
    try:
        return {
            "id": str(file.extras["name"]),
            "features": FeatureSpec.from_dict(file.extras["features"]),
            "env_specs": dict(file.extras["env_specs"]),
            "reference_scores": dict(file.extras["reference_scores"]),
            "episodes": [
                {key: item[key] for key in ("task", "seed", "meta")}
                for item in file.extras["episodes"]
            ],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{file.path}: its metadata is damaged: {error!r}.") from error


def _required_name(path: Path) -> str:
    try:
        return dataset_id(path)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{error} The name was taken from the file name {path.name}: rename the file to D4RL's "
            "name of the dataset, for example hopper-medium-v2.hdf5. For data of your own, use "
            "write_dataset(output, read_d4rl(path), env_specs=...) in Python."
        ) from error


def _features(file: D4RLFile, name: str) -> FeatureSpec:
    world = WORLDS[world_of(name)]
    expected: Mapping[str, int] = {
        "observations": world.observation_size,
        "actions": world.action_size,
    }
    for key, size in expected.items():
        if file.shape(key) != (size,):
            raise CorruptFileError(
                f"{file.path}: {key} has rows of shape {file.shape(key)}, but {name} has {size} "
                "numbers in each. Is the file named after the dataset it holds?"
            )
    bound = (1.0,) * world.action_size
    low = tuple(-x for x in bound)
    state, action = file.dtype("observations").name, file.dtype("actions").name
    return FeatureSpec(
        {DEFAULT_KEY: Feature("state", (world.observation_size,), state)},
        Feature("state", (world.action_size,), action, low=low, high=bound),
    )
