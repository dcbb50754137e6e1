"""Minari datasets: read as episodes, converted to a store, and written back without loss.

Datasets are looked up in ``MINARI_DATASETS_PATH`` (Minari's default folder otherwise). Nothing is
downloaded here: get a dataset with ``minari download <id>`` first.
"""

import hashlib
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from mail_agents.data.env_specs import spec_to_dict
from mail_agents.data.episode import SUCCESS_KEYS, Episode
from mail_agents.data.manifest import file_sha256
from mail_agents.data.references import checked_references
from mail_agents.data.store import StoreDataset, StoreWriter, open_dataset
from mail_agents.errors import InvalidInputError, unknown_name
from mail_agents.features import FeatureSpec, flatten
from mail_wrappers.datasets.minari_export import (
    EXTRAS,
    MinariDataset,
    import_minari,
    write_minari,
)

__all__ = [
    "MinariReferenceWarning",
    "MinariSource",
    "convert_minari",
    "load_minari",
    "read_minari",
    "write_minari",
]

MinariSource = MinariDataset | str | os.PathLike[str]


class MinariReferenceWarning(UserWarning):
    """The published reference scores are no scale and were left out of the store."""


def load_minari(source: MinariSource) -> MinariDataset:
    """Opens a Minari dataset given itself, its id, or the folder it is in.

    Raises:
        UnknownNameError: There is no such folder, and no such id among the local datasets.
    """
    minari = import_minari()
    if isinstance(source, minari.MinariDataset):
        return source
    for folder in (Path(source), Path(source) / "data"):
        if (folder / "metadata.json").is_file():
            return minari.MinariDataset(folder)
    try:
        return minari.load_dataset(str(source))
    except (FileNotFoundError, ValueError) as error:
        root = os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")
        raise unknown_name(
            "Minari dataset",
            str(source),
            minari.list_local_datasets(),
            f"Looked in {root} (set MINARI_DATASETS_PATH to change it). To get a published one: "
            f"minari download {source}",
        ) from error


def read_minari(source: MinariSource) -> Iterator[Episode]:
    """Reads a Minari dataset one episode at a time.

    Nested observations become ``a/b`` keys, text becomes fixed-width text. The task is, in this
    order: what :func:`write_minari` stored; the first ``mission`` text of the episode (Minigrid and
    BabyAI); the environment id; none. ``meta`` has ``source_id`` (the episode id), ``options``,
    ``success`` (true if ``infos/success`` or ``infos/is_success`` ever is) and, under ``minari``,
    the other attributes of the episode.

    Args:
        source: A dataset, its id, or its folder.

    Raises:
        UnknownNameError: The dataset does not exist locally.
        InvalidInputError: Actions are nested, or an episode cannot be represented (NaN, ragged).
    """
    return _episodes(load_minari(source), skip=())


def _episodes(dataset: MinariDataset, skip: Collection[str]) -> Iterator[Episode]:
    if isinstance(dataset.action_space, spaces.Dict | spaces.Tuple):
        raise InvalidInputError(
            f"Minari dataset {dataset.id!r} has {type(dataset.action_space).__name__} actions; an "
            "episode holds one action array. Flatten the actions before recording."
        )
    extras = _raw_metadata(dataset).get(EXTRAS, {}).get("episodes", [])
    wanted = [int(i) for i in dataset.episode_indices if str(i) not in skip]
    attributes = dataset.storage.get_episode_metadata(wanted)
    for data, attrs in zip(dataset.iterate_episodes(wanted), attributes, strict=True):
        yield _episode(dataset, data, dict(attrs), extras)


def _episode(
    dataset: MinariDataset, data: Any, attrs: dict[str, Any], extras: list[dict[str, Any]]
) -> Episode:
    leaves = flatten(dataset.observation_space)
    values = flatten(data.observations)
    observations = {key: _leaf(space, values[key]) for key, space in leaves.items()}
    infos = {key: _info(value) for key, value in flatten(data.infos or {}).items()}
    seed = attrs.pop("seed", None)
    if data.id < len(extras):
        known = extras[data.id]
        task, meta, seed = known["task"], known["meta"], known["seed"]
    else:
        task = _task(dataset, leaves, observations)
        meta = _meta(data.id, attrs, infos)
    return Episode(
        observations=observations,
        actions=np.asarray(data.actions),
        rewards=np.asarray(data.rewards),
        terminations=np.asarray(data.terminations),
        truncations=np.asarray(data.truncations),
        task=task,
        seed=None if seed is None else int(seed),
        meta=meta,
        infos=infos,
    )


def _leaf(space: spaces.Space, value: Any) -> np.ndarray:
    return np.asarray(value, np.str_) if isinstance(space, spaces.Text) else np.asarray(value)


def _info(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype == object and all(isinstance(item, bytes | str) for item in array.ravel()):
        text = [i.decode() if isinstance(i, bytes) else i for i in array.ravel()]
        return np.array(text, np.str_).reshape(array.shape)
    return array


def _task(
    dataset: MinariDataset, leaves: Mapping[str, spaces.Space], values: Mapping[str, np.ndarray]
) -> str | None:
    for key, space in leaves.items():
        if key.rsplit("/", 1)[-1] == "mission" and isinstance(space, spaces.Text):
            return str(values[key][0])
    return None if dataset.env_spec is None else dataset.env_spec.id


def _meta(number: int, attrs: dict[str, Any], infos: Mapping[str, np.ndarray]) -> dict[str, Any]:
    meta: dict[str, Any] = {"source_id": str(number)}
    if attrs.get("options"):
        meta["options"] = attrs["options"]
    for key in SUCCESS_KEYS:
        if key in infos:
            meta["success"] = bool(np.any(infos[key]))
    rest = {k: v for k, v in attrs.items() if k not in ("id", "total_steps", "options")}
    if rest:
        meta["minari"] = rest
    return meta


def _raw_metadata(dataset: MinariDataset) -> dict[str, Any]:
    return dataset.storage.read_raw_metadata(dataset.storage.data_path)


def convert_minari(
    source: MinariSource, output: str | os.PathLike[str], *, overwrite: bool = False
) -> StoreDataset:
    """Converts a Minari dataset to a store; run it again to continue after an interruption.

    All metadata of the dataset is kept in ``info.source["metadata"]``, so that
    :func:`write_minari` gives the same dataset back.

    Args:
        source: A dataset, its id, or its folder.
        output: Folder of the store.
        overwrite: Whether to replace an existing store.

    Raises:
        UnknownNameError: The dataset does not exist locally.
        InvalidInputError: The output exists, or an episode cannot be represented.
    """
    dataset = load_minari(source)
    metadata = _raw_metadata(dataset)
    extras = metadata.get(EXTRAS, {})
    facts: dict[str, Any] = {
        "kind": "minari",
        "id": dataset.id,
        "sha256": _folder_sha256(Path(dataset.storage.data_path)),
        "metadata": {key: value for key, value in metadata.items() if key != EXTRAS},
    }
    if len(dataset.episode_indices) != dataset.storage.total_episodes:
        facts["episodes"] = [int(i) for i in dataset.episode_indices]
    if "features" in extras:
        features = FeatureSpec.from_dict(extras["features"])
    else:
        features = FeatureSpec.from_spaces(dataset.observation_space, dataset.action_space)
    with StoreWriter(
        output, name=dataset.id, source=facts, features=features, overwrite=overwrite
    ) as writer:
        skip = frozenset(writer.completed)
        numbers = [str(i) for i in dataset.episode_indices if str(i) not in skip]
        for number, episode in zip(numbers, _episodes(dataset, skip), strict=True):
            writer.add(episode, source_id=number)
        writer.env_specs = extras.get("env_specs", {})
        writer.reference_scores = extras.get("reference_scores", {})
        if not extras:
            _describe_environment(dataset, metadata, writer)
    return open_dataset(output)


def _describe_environment(
    dataset: MinariDataset, metadata: Mapping[str, Any], writer: StoreWriter
) -> None:
    # Mazes are evaluated with one goal, and recorded with many. Minari has no public name for it.
    spec = getattr(dataset, "_eval_env_spec", None) or dataset.env_spec
    if spec is not None:
        writer.env_specs = dict.fromkeys(writer.tasks, spec_to_dict(spec))
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if low is not None and high is not None:
        scores = {"min": low, "max": high, "source": f"minari:{dataset.id}"}
        try:
            writer.reference_scores = checked_references(dict.fromkeys(writer.tasks, scores))
        except InvalidInputError as error:  # the publisher's mistake; the episodes are as good
            warnings.warn(f"Left out: {error}", MinariReferenceWarning, stacklevel=3)


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\n{file_sha256(path)}\n".encode())
    return digest.hexdigest()
