"""Minari datasets: read as episodes, converted to a store, and written back without loss.

Datasets are looked up in ``MINARI_DATASETS_PATH`` (Minari's default folder otherwise). Nothing is
downloaded here: get a dataset with ``minari download <id>`` first.
"""

import hashlib
import json
import os
import shutil
import string
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from mail_agents.data.dataset import TrajectoryDataset
from mail_agents.data.env_specs import spec_to_dict
from mail_agents.data.episode import SUCCESS_KEYS, Episode
from mail_agents.data.manifest import file_sha256
from mail_agents.data.store import StoreDataset, StoreWriter, open_dataset
from mail_agents.errors import InvalidInputError, require, unknown_name
from mail_agents.features import DEFAULT_KEY, Feature, FeatureSpec, flatten

#: Minari is optional, so its types are only names here.
MinariDataset = Any
MinariSource = MinariDataset | str | os.PathLike[str]

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


def _minari() -> Any:
    return require("minari", "minari", purpose="Minari datasets")


def load_minari(source: MinariSource) -> MinariDataset:
    """Opens a Minari dataset given itself, its id, or the folder it is in.

    Raises:
        UnknownNameError: There is no such folder, and no such id among the local datasets.
    """
    minari = _minari()
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
    if dataset.env_spec is not None:
        writer.env_specs = dict.fromkeys(writer.tasks, spec_to_dict(dataset.env_spec))
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if low is not None and high is not None:
        writer.reference_scores = {task: {"min": low, "max": high} for task in writer.tasks}


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\n{file_sha256(path)}\n".encode())
    return digest.hexdigest()


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
    """
    minari = _minari()
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
    observation_space, action_space = _spaces(dataset)
    if namespace is not None and namespace not in list_local_namespaces():
        create_namespace(namespace)
    # A hidden folder, renamed at the end: an interrupted export is never listed by Minari.
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    storage = MinariStorage.new(
        partial / "data", observation_space, action_space, data_format="hdf5", jpeg_encoding=False
    )
    storage.update_metadata(
        {
            **_dataset_metadata(dataset),
            **_as_sets(metadata or {}),
            "dataset_id": dataset_id,
            "minari_version": minari.__version__,
        }
    )
    kept = []
    for number in range(len(dataset)):
        episode = dataset.episode(number)
        _write_episode(storage, number, episode, observation_space)
        kept.append({"task": episode.task, "seed": episode.seed, "meta": dict(episode.meta)})
    storage.update_metadata({EXTRAS: {**_extras(dataset), "episodes": kept}})
    os.rename(partial, target)
    return minari.load_dataset(dataset_id)


def _write_episode(
    storage: Any, number: int, episode: Episode, observation_space: spaces.Space
) -> None:
    from minari.data_collector import EpisodeBuffer

    small = episode.seed is not None and episode.seed < 2**63
    buffer = EpisodeBuffer(
        id=number,
        seed=episode.seed if small else None,
        options=episode.meta.get("options"),
        observations=_nest(observation_space, episode.observations),
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
