"""Demonstrations in robomimic's HDF5 layout, which LIBERO uses too: one file per task.

``data/demo_<i>/actions`` ``(T, A)``, ``data/demo_<i>/obs/<key>`` ``(T, ...)``, optionally
``rewards``, ``dones``, ``states``, ``robot_states`` and ``next_obs/<key>``. Only h5py is needed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import numpy as np

from mail_agents.data.episode import Episode
from mail_agents.data.manifest import file_sha256
from mail_agents.data.sim_states import widen_states
from mail_agents.data.store import StoreDataset, write_dataset
from mail_agents.errors import CorruptFileError, InvalidInputError
from mail_wrappers.datasets import robomimic_file as rf
from mail_wrappers.datasets.robomimic_export import write_libero, write_robomimic
from mail_wrappers.datasets.robomimic_facts import FileFacts, Selection, stem, survey

__all__ = ["Align", "convert_demos", "read_demos", "write_libero", "write_robomimic"]

Align = Literal["stored", "causal"]
#: Infos with a row before each action, and infos with a row beside each observation.
_BEFORE, _BESIDE = "states", "robot_states"


def read_demos(
    source: str | Path,
    *,
    demos: int | None = None,
    selection: Selection = "first",
    align: Align = "stored",
) -> Iterator[Episode]:
    """Reads demonstrations one at a time, as they are stored.

    LIBERO's files pair ``obs[t]`` with ``actions[t]`` although the image was taken after the action
    (upstream ``scripts/create_dataset.py``); training code reads them as they are, and so does
    this: ``meta["alignment"]`` is ``"after_action"``. They hold T observations: where ``next_obs``
    is missing, the last one is repeated as the final observation, and
    ``meta["final_observation"]`` is ``"repeated"``. Windows never show it. ``meta["fixtures"]``
    says where cabinets and other fixtures stood, for replays.

    Args:
        source: One HDF5 file, or a folder of them (read in name order).
        demos: Demonstrations per file; None for all.
        selection: See :func:`~mail_agents.data.dataset.select_demos`.
        align: ``"causal"`` pairs ``obs[t]`` of LIBERO's files with ``actions[t+1]``, the action
            that was chosen after seeing it, at the price of the first action; ``meta["alignment"]``
            is then ``"before_action"``.

    Yields:
        Episodes; ``task`` is the file name without ``_demo.hdf5``, or the environment's name for
        files of robosuite that state it.

    Raises:
        CorruptFileError: A file is truncated, of another kind, lacks a key, or its arrays disagree.
        FeatureMismatchError: Files disagree in keys or shapes.
        InvalidInputError: There are no files, fewer demonstrations than asked for, or causal
            alignment is asked of files that have it already.
    """
    _check_align(align)
    return _episodes(survey(source, demos, selection), align)


def _check_align(align: str) -> None:
    if align not in get_args(Align):
        raise InvalidInputError(f"Alignment {align!r} is unknown; use 'stored' or 'causal'.")


def _episodes(files: Sequence[FileFacts], align: Align) -> Iterator[Episode]:
    for facts in files:
        if align == "causal" and facts.alignment == "before_action":
            raise InvalidInputError(
                f"{facts.path}: its observations were taken before the actions already. Leave out "
                "align='causal' (--align causal)."
            )
        with rf.open_file(facts.path) as file:
            data = rf.child(facts.path, file, "data")
            for key in facts.demos:
                demo = rf.child(facts.path, data, key)
                try:
                    yield _read_demo(facts, demo, key, align)
                except InvalidInputError as error:
                    raise CorruptFileError(f"{facts.path}: {error}") from error


def convert_demos(
    source: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    demos: int | None = None,
    demo_selection: Selection = "first",
    align: Align = "stored",
) -> StoreDataset:
    """Converts a file or folder of demonstrations into a store; see :func:`read_demos`.

    The store names the environment of every task that is known (LIBERO's by file name, robosuite's
    by ``env_args``), made such that it observes what the file holds: same cameras, image size and
    orientation. Attributes of LIBERO's files are kept for
    :func:`~mail_wrappers.datasets.robomimic_export.write_libero`. Run it again to continue after an
    interruption; that needs the same files with the same content.

    Args:
        source: One HDF5 file, or a folder of them.
        output: Folder of the store.
        overwrite: Whether to replace an existing store.
        demos: Demonstrations per file; None for all.
        demo_selection: See :func:`~mail_agents.data.dataset.select_demos`.
        align: See :func:`read_demos`.

    Raises:
        CorruptFileError: See :func:`read_demos`.
        FeatureMismatchError: See :func:`read_demos`.
        InvalidInputError: See :func:`read_demos`; or the output exists.
    """
    _check_align(align)
    files = survey(source, demos, demo_selection)
    chosen = {"demos": demos, "demo_selection": demo_selection, "align": align}
    return write_dataset(
        output,
        _episodes(files, align),
        name=Path(source).stem,
        source={**_identity(source, files), **chosen},
        env_specs={facts.task: facts.env_spec for facts in files if facts.task and facts.env_spec},
        features=files[0].features,
        overwrite=overwrite,
    )


def _identity(source: str | Path, files: Sequence[FileFacts]) -> dict[str, Any]:
    return {
        "kind": "robomimic-hdf5",
        "id": Path(source).name,
        "files": [
            {
                "name": facts.path.name,
                "bytes": facts.path.stat().st_size,
                "sha256": file_sha256(facts.path),
            }
            for facts in files
        ],
        "attributes": {facts.task: facts.attributes for facts in files if facts.task},
        "recorded_with": {
            facts.task: facts.extras["env_kwargs"]
            for facts in files
            if facts.task and facts.extras.get("env_kwargs")
        },
    }


def _read_demo(facts: FileFacts, group: h5py.Group, key: str, align: Align) -> Episode:
    path = facts.path
    actions = rf.array(path, group, "actions")
    length = len(actions)
    observed = rf.observations(path, group, "obs", length)
    _check_keys(facts, group, observed)
    repeated = "next_obs" not in group
    final = observed if repeated else rf.observations(path, group, "next_obs", length)
    if final.keys() != observed.keys():
        raise CorruptFileError(
            f"{path}: {group.name}/next_obs has keys {sorted(final)}, obs has {sorted(observed)}."
        )
    dones = rf.optional(path, group, "dones", length, np.zeros(length)).astype(bool)
    rewards = rf.optional(path, group, "rewards", length, np.zeros(length))
    last = np.arange(length) == length - 1
    known = facts.extras.get("episodes", {}).get(key, {})
    meta: dict[str, Any] = {**known.get("meta", {}), "source_id": f"{stem(path)}/{key}"}
    if "rewards" in group:
        meta.setdefault("success", bool((rewards > 0).any()))
    rf.check_count(path, group, "num_samples", length, "actions")
    placed = rf.fixtures(path, group) if facts.libero else {}
    if placed:
        meta["fixtures"] = placed
    infos = {n: rf.array(path, group, n, length) for n in (_BEFORE, _BESIDE) if n in group}
    if _BEFORE in infos:
        try:
            infos[_BEFORE] = widen_states(infos[_BEFORE])
        except InvalidInputError as error:
            raise CorruptFileError(f"{path}: {group.name}/{_BEFORE}: {error}") from error
    if align == "causal":
        if length < 2:
            raise CorruptFileError(
                f"{path}: {group.name} has one step; pairing observations with the next action "
                "needs two."
            )
        first = 1
        observations = observed
        meta["alignment"] = "before_action"
        meta.pop("options", None)  # like the seed, they lead to the action that is left out
        infos.update({_BEFORE: infos[_BEFORE][1:]} if _BEFORE in infos else {})
    else:
        first = 0
        observations = {k: np.concatenate([v, final[k][-1:]]) for k, v in observed.items()}
        if facts.alignment == "after_action":
            meta["alignment"] = "after_action"
        if repeated:
            meta["final_observation"] = "repeated"
    return Episode(
        observations=observations,
        actions=actions[first:],
        rewards=rewards[first:],
        terminations=dones[first:],
        truncations=(last & ~dones)[first:],
        task=facts.task,
        seed=None if align == "causal" else known.get("seed"),
        meta=meta,
        infos=infos,
    )


def _check_keys(facts: FileFacts, group: h5py.Group, observed: dict[str, np.ndarray]) -> None:
    """Names the demonstration that observes something else than the first one of its file."""
    expected = facts.features.observations
    for key in sorted(expected.keys() | observed.keys()):
        here = f"{observed[key].shape[1:]} per step" if key in observed else "missing"
        there = f"{expected[key].shape} per step" if key in expected else "missing"
        if here != there:
            raise CorruptFileError(
                f"{facts.path}: {group.name}/obs/{key} is {here}, but {there} in "
                f"{facts.demos[0]}. Demonstrations of one dataset must agree; correct or delete it."
            )
