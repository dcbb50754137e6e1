"""Writing a dataset as a Minari dataset, without loss."""

import json
import os
import shutil
import string
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from mail_agents.data.dataset import TrajectoryDataset
from mail_agents.data.episode import Episode
from mail_agents.errors import InvalidInputError, StorageError, require
from mail_agents.features import DEFAULT_KEY, Feature, flatten

#: Minari is optional, so its types are only names here.
MinariDataset = Any

#: Key of ``metadata.json`` that holds what Minari has no place for (tasks, meta, large seeds).
EXTRAS = "mail_agents"
_STRUCTURE = {
    "total_episodes",
    "total_steps",
    "data_format",
    "jpeg_encoding",
    "observation_space",
    "action_space",
    "dataset_id",
    "dataset_size",
    "minari_version",
    EXTRAS,
}


def import_minari() -> Any:
    """The package ``minari``, or an error that says how to install it."""
    return require("minari", "minari", purpose="Minari datasets")


def write_minari(
    dataset: TrajectoryDataset, dataset_id: str, *, metadata: Mapping[str, Any] | None = None
) -> MinariDataset:
    """Writes a dataset as a new local Minari dataset, images lossless.

    A dataset that came from Minari gets its spaces, environment specs, reference scores, authors
    and every other metadata entry back. Otherwise spaces are derived from the features. Tasks,
    ``meta`` and environment specs of several tasks travel in the metadata entry ``mail_agents``.

    Args:
        dataset: The dataset.
        dataset_id: Minari id such as ``"mine/reach-v0"``.
        metadata: Entries of Minari's metadata, such as ``author``, ``author_email``,
            ``algorithm_name``, ``code_permalink``, ``description`` or ``requirements``.

    Returns:
        The new dataset, which ``minari.load_dataset(dataset_id)`` also finds.

    Raises:
        InvalidInputError: The id is malformed or taken, or ``metadata`` has one of Minari's own
            entries.
        StorageError: The disk is full or the place cannot be written to.
    """
    minari = import_minari()
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces
    from minari.storage import get_dataset_path

    try:
        namespace = parse_dataset_id(dataset_id)[0]
    except ValueError as error:
        raise InvalidInputError(str(error)) from error
    target = get_dataset_path(dataset_id)
    if target.exists():
        raise InvalidInputError(
            f"Minari dataset {dataset_id!r} exists already at {target}. Choose another name or "
            f"version, or delete it with: minari delete {dataset_id}"
        )
    forbidden = sorted(_STRUCTURE.intersection(metadata or {}))
    if forbidden:
        raise InvalidInputError(f"Metadata entries {forbidden} are set by the writer.")
    # A hidden folder, renamed at the end: an interrupted export is never listed by Minari.
    partial = target.with_name(f".{target.name}.partial")
    try:
        if namespace is not None and namespace not in list_local_namespaces():
            create_namespace(namespace)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        storage = MinariStorage.new(
            partial / "data", *_spaces(dataset), data_format="hdf5", jpeg_encoding=False
        )
        storage.update_metadata(
            {
                **_dataset_metadata(dataset),
                **_as_sets(metadata or {}),
                "dataset_id": dataset_id,
                "minari_version": minari.__version__,
            }
        )
        _write_episodes(storage, dataset)
        os.rename(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(
            f"Cannot write Minari dataset {dataset_id!r}, nothing was put at {target}: {error}. "
            "Free space or set MINARI_DATASETS_PATH to another place, then run the command again."
        ) from error
    return minari.load_dataset(dataset_id)


def _write_episodes(storage: Any, dataset: TrajectoryDataset) -> None:
    kept = []
    for number in range(len(dataset)):
        episode = dataset.episode(number)
        _write_episode(storage, number, episode)
        kept.append({"task": episode.task, "seed": episode.seed, "meta": dict(episode.meta)})
    storage.update_metadata({EXTRAS: {**_extras(dataset), "episodes": kept}})


def _write_episode(storage: Any, number: int, episode: Episode) -> None:
    from minari.data_collector import EpisodeBuffer

    small = episode.seed is not None and episode.seed < 2**63
    buffer = EpisodeBuffer(
        id=number,
        seed=episode.seed if small else None,
        options=episode.meta.get("options"),
        observations=_nest(storage.observation_space, episode.observations),
        actions=episode.actions,  # type: ignore[arg-type]
        rewards=episode.rewards,  # type: ignore[arg-type]
        terminations=episode.terminations,  # type: ignore[arg-type]
        truncations=episode.truncations,  # type: ignore[arg-type]
        infos=_nest_infos(episode.infos) or None,
    )
    storage.update_episodes([buffer])
    attributes = episode.meta.get("minari")
    if attributes:
        storage.update_episode_metadata([flatten(attributes)], [number])


def _nest(space: spaces.Space, values: Mapping[str, np.ndarray], prefix: str = "") -> Any:
    if isinstance(space, spaces.Dict):
        items = space.spaces.items()
        return {k: _nest(s, values, f"{prefix}/{k}" if prefix else str(k)) for k, s in items}
    if isinstance(space, spaces.Tuple):
        items = enumerate(space.spaces)
        return tuple(_nest(s, values, f"{prefix}/{i}" if prefix else str(i)) for i, s in items)
    value = values[prefix or DEFAULT_KEY]
    return value.tolist() if value.dtype.kind in "US" else value


def _nest_infos(infos: Mapping[str, np.ndarray]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in infos.items():
        *parents, leaf = key.split("/")
        group = out
        for parent in parents:
            group = group.setdefault(parent, {})
        group[leaf] = value.tolist() if value.dtype.kind in "US" else value
    return out


def _as_sets(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Minari insists on sets of authors and stores them as lists."""
    out = dict(metadata)
    for key in ("author", "author_email"):
        if key in out:
            out[key] = {out[key]} if isinstance(out[key], str) else set(out[key])
    return out


def _minari_metadata(dataset: TrajectoryDataset) -> dict[str, Any]:
    source = dataset.info.source
    return dict(source.get("metadata", {})) if source.get("kind") == "minari" else {}


def _dataset_metadata(dataset: TrajectoryDataset) -> dict[str, Any]:
    info = dataset.info
    out = {k: v for k, v in _minari_metadata(dataset).items() if k not in _STRUCTURE}
    specs = {json.dumps(spec, sort_keys=True) for spec in info.env_specs.values()}
    if "env_spec" not in out and len(specs) == 1:
        out["env_spec"] = specs.pop()
    scores = {(s.get("min"), s.get("max")) for s in info.reference_scores.values()}
    if len(scores) == 1 and "ref_min_score" not in out and "ref_max_score" not in out:
        out["ref_min_score"], out["ref_max_score"] = scores.pop()
    return _as_sets(out)


def _extras(dataset: TrajectoryDataset) -> dict[str, Any]:
    return {
        "features": dataset.features.to_dict(),
        "env_specs": dict(dataset.info.env_specs),
        "reference_scores": dict(dataset.info.reference_scores),
    }


def _spaces(dataset: TrajectoryDataset) -> tuple[spaces.Space, spaces.Space]:
    metadata = _minari_metadata(dataset)
    if "observation_space" in metadata and "action_space" in metadata:
        from minari.serialization import deserialize_space

        observation = deserialize_space(metadata["observation_space"])
        if set(flatten(observation)) == set(dataset.features.observations):
            return observation, deserialize_space(metadata["action_space"])
    features = dataset.features.observations
    if set(features) == {DEFAULT_KEY}:
        observation = _space(features[DEFAULT_KEY])
    else:
        observation = _nest_spaces({key: _space(f) for key, f in features.items()})
    return observation, _space(dataset.features.action)


def _nest_spaces(leaves: Mapping[str, spaces.Space]) -> spaces.Dict:
    groups: dict[str, Any] = {}
    for key, space in leaves.items():
        head, _, rest = key.partition("/")
        if rest:
            groups.setdefault(head, {})[rest] = space
        else:
            groups[head] = space
    return spaces.Dict(
        {k: _nest_spaces(v) if isinstance(v, dict) else v for k, v in groups.items()}
    )


def _space(feature: Feature) -> spaces.Space:
    if feature.kind == "text":
        return spaces.Text(max_length=4096, charset=string.printable)
    if feature.n is not None:
        return spaces.Discrete(feature.n)
    dtype = np.dtype(feature.dtype)
    if dtype.kind == "b":
        return spaces.MultiBinary(feature.shape)
    if feature.low is not None and feature.high is not None:
        low = np.asarray(feature.low, dtype).reshape(feature.shape)
        high = np.asarray(feature.high, dtype).reshape(feature.shape)
    elif dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    else:
        low, high = -np.inf, np.inf
    return spaces.Box(low, high, feature.shape, dtype.type)
