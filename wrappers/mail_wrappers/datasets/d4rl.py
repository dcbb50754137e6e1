"""D4RL's HDF5 files (Fu et al. 2020), versions 0 to 2: split into episodes, converted to a store.

Nothing is downloaded and the d4rl package is not needed. D4RL's own ``qlearning_dataset`` leaves
out the last transition of every episode that ended by timeout; here every row is kept.
"""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from mail_agents.data.episode import Episode
from mail_agents.data.manifest import file_sha256
from mail_agents.data.store import StoreDataset, write_dataset
from mail_agents.errors import CorruptFileError, InvalidInputError
from mail_agents.features import DEFAULT_KEY
from mail_wrappers.datasets.d4rl_export import write_d4rl
from mail_wrappers.datasets.d4rl_facts import Facts, facts_of
from mail_wrappers.datasets.d4rl_file import D4RLActionWarning, D4RLFile

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
        max_episode_steps: See ``timeouts``; at least 1, not used otherwise.

    Returns:
        Increasing int64 indices, each one past the last row of an episode. Rows after the last one
        belong to an episode that never ended.

    Raises:
        InvalidInputError: There are neither timeouts nor a limit, or the limit is below 1.
    """
    if max_episode_steps is not None and max_episode_steps < 1:
        raise InvalidInputError(f"max_episode_steps is {max_episode_steps}, expected at least 1.")
    if timeouts is not None:
        return np.flatnonzero(terminals | timeouts) + 1
    if max_episode_steps is None:
        raise InvalidInputError(
            "The file has no 'timeouts' and no step limit is known, so it cannot be known where "
            "episodes end. Give env, the Gymnasium id of the environment it was recorded in, or "
            "max_episode_steps."
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
    env: str | None = None,
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
        name: The task of the episodes. D4RL's name of the dataset, for example
            ``"hopper-medium-v2"``, says more: sizes and step limit. None takes that from the file
            name, if it is one of D4RL's; a file written by :func:`write_d4rl` knows its tasks.
        env: For data of your own, the Gymnasium id of the environment they were recorded in, for
            example ``"Hopper-v5"``: task, sizes, bounds and step limit are taken from it.
        keep_trailing: Whether rows after the last end become a truncated episode, with
            ``meta["trailing"]``; otherwise they are left out with a :class:`D4RLTrailingWarning`.
        max_episode_steps: Where to cut when the file has no ``timeouts``; None takes the limit of
            the dataset's environment.

    Yields:
        Episodes, everything in the stored dtype.

    Raises:
        InvalidInputError: There is no file, it cannot be known where episodes end, ``name`` or
            ``env`` is given for a file that knows its own, or the environment cannot be made.
        CorruptFileError: The file is malformed, see
            :class:`~mail_wrappers.datasets.d4rl_file.D4RLFile`, holds no whole episode, or its
            sizes are not those of the environment.
    """
    with D4RLFile(source) as file:
        facts = facts_of(file, name, env, anonymous=True)
        file.check(facts.action)
        yield from _episodes(file, _spans(file, facts, keep_trailing, max_episode_steps), facts)


def _spans(
    file: D4RLFile, facts: Facts, keep_trailing: bool, limit: int | None
) -> list[tuple[int, int]]:
    """First row of each episode and one past its last."""
    limit = facts.max_episode_steps if limit is None else limit
    timeouts = file.flags("timeouts") if "timeouts" in file else None
    ends = episode_ends(file.flags("terminals"), timeouts, limit).tolist()
    left = file.rows - (ends[-1] if ends else 0)
    if left and keep_trailing:
        ends.append(file.rows)
    elif not ends:
        raise CorruptFileError(
            f"{file.path}: no terminal or timeout is set in {file.rows} rows, so there is no whole "
            "episode. keep_trailing=True (--keep-trailing) takes them as one unfinished episode."
        )
    elif left:
        warnings.warn(
            f"{file.path}: {left} of {file.rows} rows after the last end of an episode are left "
            "out; keep_trailing=True (--keep-trailing) keeps them.",
            D4RLTrailingWarning,
            stacklevel=3,
        )
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _episodes(file: D4RLFile, spans: list[tuple[int, int]], facts: Facts) -> Iterator[Episode]:
    own = facts.episodes
    if own is not None and len(own) != len(spans):
        raise CorruptFileError(
            f"{file.path}: the arrays hold {len(spans)} episodes, its metadata {len(own)}; the "
            "file was altered after it was written."
        )
    key = DEFAULT_KEY if facts.features is None else next(iter(facts.features.observations))
    for number, (start, stop) in enumerate(spans):
        arrays, meta = _episode(file, start, stop, key)
        if own is not None:
            yield Episode(**arrays, **own[number])
        else:
            meta["source_id"] = f"{facts.id}/{number:06d}"
            yield Episode(**arrays, task=facts.task, meta=meta)


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
    env: str | None = None,
    keep_trailing: bool = False,
    max_episode_steps: int | None = None,
) -> StoreDataset:
    """Converts a file to a store, with bounds and the environment to evaluate in.

    D4RL's data also get D4RL's reference scores, and the worlds of ``docs/worlds/d4rl.md``. The
    whole file is checked before anything is written. Run it again to continue after an
    interruption.

    Args:
        source: The file.
        output: Folder of the store.
        overwrite: Whether to replace an existing store.
        name: D4RL's name of the dataset, needed when the file was renamed.
        env: See :func:`read_d4rl`; for data of your own. There are no reference scores then.
        keep_trailing: See :func:`read_d4rl`.
        max_episode_steps: See :func:`read_d4rl`.

    Raises:
        UnknownNameError: Neither the file name nor ``name`` is one of D4RL's, and there is no
            ``env``.
        CorruptFileError: See :func:`read_d4rl`.
        InvalidInputError: See :func:`read_d4rl`, or the output exists.
    """
    with D4RLFile(source) as file:
        facts = facts_of(file, name, env, anonymous=False)
        file.check(facts.action)
        spans = _spans(file, facts, keep_trailing, max_episode_steps)
        origin = {
            "kind": "d4rl-hdf5",
            "id": facts.id,
            "task": facts.task,
            "file": file.path.name,
            "bytes": file.path.stat().st_size,
            "sha256": file_sha256(file.path),
            "rows": file.rows,
            "dropped_rows": file.rows - spans[-1][1],
            "metadata": file.metadata,
        }
        return write_dataset(
            output,
            _episodes(file, spans, facts),
            name=facts.id,
            source=origin,
            env_specs=facts.env_specs,
            reference_scores=facts.reference_scores,
            features=facts.features,
            overwrite=overwrite,
        )
