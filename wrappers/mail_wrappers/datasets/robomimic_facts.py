"""What a demonstration file says besides its arrays: task, world, alignment, orientation.

LIBERO's files are recognised by their BDDL file (attribute ``bddl_file_name`` of ``data``) or by
their name, robomimic's by ``env_args`` (robomimic ``utils/env_utils.py``: type 1 is robosuite, type
2 is Gym).
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import numpy as np
from gymnasium.envs.registration import EnvSpec

from mail_agents.data.dataset import select_demos
from mail_agents.errors import CorruptFileError, FeatureMismatchError, InvalidInputError
from mail_agents.features import Feature, FeatureSpec, Orientation
from mail_wrappers.datasets import robomimic_file as rf
from mail_wrappers.datasets.libero_names import suite_of
from mail_wrappers.worlds import (
    LIBERO_HORIZON,
    OSC_POSE,
    ROBOSUITE_CONTROL_HZ,
    ROBOSUITE_FULL_STATE,
    ROBOSUITE_HAND_VELOCITIES,
    ROBOSUITE_HORIZON,
    ROBOSUITE_TASKS,
)

Selection = Literal["first", "mail_legacy"]
Alignment = Literal["after_action", "before_action"]

DEMO_SUFFIX = "_demo"
ROBOSUITE, GYM = 1, 2


_TASK_FACTS = {"attributes": "attributes of data", "env_spec": "environments"}


class UnknownWorldWarning(UserWarning):
    """The environment of a file is not known here, so agents cannot be evaluated in it."""


@dataclass(frozen=True)
class FileFacts:
    """What is known of one file before its arrays are read.

    Attributes:
        path: The file.
        task: Name of its task; None in files written from a dataset without tasks.
        demos: The chosen groups of ``data``, in order.
        libero: Whether it is one of LIBERO's.
        alignment: Whether ``obs[t]`` was taken after or before ``actions[t]``; None when unknown.
        features: Schema of the first chosen demonstration.
        env_spec: Gymnasium spec of its world, JSON-ready; None when unknown.
        attributes: Attributes of ``data``, JSON-ready.
        extras: What :mod:`~mail_wrappers.datasets.robomimic_export` noted; {} in other files.
    """

    path: Path
    task: str | None
    demos: tuple[str, ...]
    libero: bool
    alignment: Alignment | None
    features: FeatureSpec
    env_spec: Mapping[str, Any] | None
    attributes: Mapping[str, Any]
    extras: Mapping[str, Any]


def survey(
    source: str | Path, demos: int | None = None, selection: Selection = "first"
) -> list[FileFacts]:
    """Looks at every file of a source, without reading its arrays.

    Raises:
        InvalidInputError: There are no files, or fewer demonstrations than asked for.
        CorruptFileError: A file is broken, see :mod:`~mail_wrappers.datasets.robomimic_file`.
        FeatureMismatchError: The files disagree in keys, shapes, dtypes or orientation.
    """
    found = [_facts(path, demos, selection) for path in rf.demo_files(source)]
    stems: dict[str, Path] = {}
    for facts in found:
        _check_alike(found[0], facts)
        other = stems.setdefault(stem(facts.path), facts.path)
        if other is not facts.path:
            raise FeatureMismatchError(
                f"{other.name} and {facts.path.name} have the same name but for the ending, so "
                "their demonstrations cannot be told apart. Rename one of them."
            )
    _check_tasks(found)
    return found


def _check_tasks(files: list[FileFacts]) -> None:
    """Refuses files of one task of which a dataset could describe one only."""
    seen: dict[str, FileFacts] = {}
    for facts in files:
        other = seen.setdefault(facts.task, facts) if facts.task else facts
        for name in ("attributes", "env_spec"):
            if getattr(other, name) != getattr(facts, name):
                raise FeatureMismatchError(
                    f"{other.path} and {facts.path} are both of task {facts.task!r}, but differ in "
                    f"their {_TASK_FACTS[name]}. Convert them into two datasets."
                )


def stem(path: Path) -> str:
    """File name without ending and without ``_demo``: LIBERO's name of the task."""
    return path.stem.removesuffix(DEMO_SUFFIX)


def _facts(path: Path, demos: int | None, selection: Selection) -> FileFacts:
    with rf.open_file(path) as file:
        data = rf.child(path, file, "data")
        if not len(data):
            raise CorruptFileError(f"{path}: {data.name} is empty, it has no demonstrations.")
        env_args = rf.json_attribute(path, data, "env_args")
        if not isinstance(env_args.get("env_kwargs"), dict | None):
            raise CorruptFileError(
                f"{path}: env_kwargs in attribute 'env_args' of {data.name} is not a JSON object."
            )
        extras = _extras(path, data)
        attributes = rf.attributes(data)
        _check_counts(path, data)
        try:
            keys = tuple(select_demos(list(data), demos, selection))
        except InvalidInputError as error:
            raise InvalidInputError(f"{path}: {error}") from error
        first = rf.child(path, data, keys[0])
        bddl = str(attributes.get("bddl_file_name") or env_args.get("bddl_file") or "")
        suite = suite_of(stem(path), f"{bddl} {path.absolute().parent.name}")
        libero = bool(bddl) or suite is not None
        robosuite = not libero and env_args.get("type") == ROBOSUITE
        default: Orientation | None = "raw" if libero else "upright" if robosuite else None
        features = _features(path, first, extras, default)
        task = str(env_args["env_name"]) if robosuite and "env_name" in env_args else stem(path)
        alignment: Alignment | None = extras.get("alignment")
        if alignment is None:
            alignment = "before_action" if "next_obs" in first else None
        if alignment is None and libero:
            alignment = "after_action"
    spec = extras.get("env_spec")
    if spec is None and libero:
        spec = _libero_spec(path, suite, features)
    elif spec is None and robosuite:
        spec = _robosuite_spec(path, env_args, features)
    elif spec is None and env_args.get("type") == GYM and "env_name" in env_args:
        spec = _spec(str(env_args["env_name"]), dict(env_args.get("env_kwargs") or {}), None)
    return FileFacts(
        path=path,
        task=extras.get("task", task),
        demos=keys,
        libero=libero,
        alignment=alignment,
        features=features,
        env_spec=spec,
        attributes=attributes,
        extras=extras,
    )


def _extras(path: Path, data: h5py.Group) -> dict[str, Any]:
    """The attribute of :mod:`~mail_wrappers.datasets.robomimic_export`; {} without.

    Raises:
        CorruptFileError: It is not what that module writes.
    """
    extras = rf.json_attribute(path, data, rf.EXTRAS)
    kinds = {"task": str, "env_spec": dict, "env_kwargs": dict, "episodes": dict}
    try:
        for name, kind in kinds.items():
            if not isinstance(extras.get(name), kind | None):
                raise TypeError(f"{name} is {extras[name]!r}")
        if extras.get("alignment") not in (None, *get_args(Alignment)):
            raise ValueError(f"alignment is {extras['alignment']!r}")
        if "features" in extras:
            extras["features"] = FeatureSpec.from_dict(extras["features"])
        for key, known in extras.get("episodes", {}).items():
            if not isinstance(known, dict) or not isinstance(known.get("meta", {}), dict):
                raise TypeError(f"episodes has {known!r} for {key}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(
            f"{path}: attribute {rf.EXTRAS!r} of {data.name} is damaged "
            f"({type(error).__name__}: {error}). Get the file again, or delete the attribute: the "
            "demonstrations can be read without it."
        ) from error
    return extras


def _check_counts(path: Path, data: h5py.Group) -> None:
    rf.check_count(path, data, "num_demos", len(data), "demonstrations")
    if "total" in data.attrs:
        rows = [
            len(rf.dataset(path, rf.child(path, data, key), "actions")) for key in map(str, data)
        ]
        rf.check_count(path, data, "total", sum(rows), "steps")


def _features(
    path: Path, demo: h5py.Group, extras: Mapping[str, Any], orientation: Orientation | None
) -> FeatureSpec:
    def describe(group: h5py.Group, name: str) -> Feature:
        found = rf.dataset(path, group, name)
        feature = Feature.from_array(np.empty((0, *found.shape[1:]), found.dtype))
        return replace(feature, orientation=orientation) if feature.kind == "image" else feature

    keys = rf.observation_keys(path, demo)
    found = FeatureSpec(
        {key: describe(rf.child(path, demo, "obs"), key) for key in keys}, describe(demo, "actions")
    )
    if "features" in extras:
        declared: FeatureSpec = extras["features"]
        if _layout(declared) == _layout(found):
            return declared
    return found


def _layout(features: FeatureSpec) -> dict[str, tuple[Any, ...]]:
    every = {**features.observations, "the action": features.action}
    return {key: (feature.shape, feature.dtype) for key, feature in every.items()}


def _check_alike(first: FileFacts, other: FileFacts) -> None:
    left, right = _layout(first.features), _layout(other.features)
    remedy = "Convert them into two datasets, or write the files alike."
    if left.keys() != right.keys():
        raise FeatureMismatchError(
            f"{other.path} and {first.path} disagree in what they observe: only the first has "
            f"{sorted(right.keys() - left.keys()) or 'nothing'}, only the second "
            f"{sorted(left.keys() - right.keys()) or 'nothing'} more. {remedy}"
        )
    for key in left:
        if left[key] != right[key]:
            raise FeatureMismatchError(
                f"{other.path}: {key} is {right[key][1]} {right[key][0]} per step, but "
                f"{left[key][1]} {left[key][0]} in {first.path}. {remedy}"
            )
    for key, feature in first.features.of_kind("image").items():
        found = other.features.observations[key].orientation
        if found != feature.orientation:
            raise FeatureMismatchError(
                f"{other.path}: images {key} are {found}, but {feature.orientation} in "
                f"{first.path}. {remedy}"
            )


def _spec(env_id: str, kwargs: dict[str, Any], steps: int | None) -> dict[str, Any]:
    return json.loads(EnvSpec(id=env_id, kwargs=kwargs, max_episode_steps=steps).to_json())


def _camera_kwargs(path: Path, features: FeatureSpec, ending: str) -> dict[str, Any]:
    """Keyword arguments of cameras that make an environment draw what the file holds."""
    images = features.of_kind("image")
    if not images:
        return {"cameras": []}
    sizes = {key: feature.shape[:2] for key, feature in images.items()}
    (key, size), *others = sizes.items()
    for other, found in [(key, size[::-1]), *others]:
        if found != size:
            raise CorruptFileError(
                f"{path}: the images of this world are square and of one size, but obs/{key} is "
                f"{size[0]}x{size[1]} pixels and obs/{other} {sizes[other][0]}x"
                f"{sizes[other][1]}. Render the demonstrations again with equal sizes."
            )
    cameras = [key.removesuffix(ending) for key in images]
    orientation = next(iter(images.values())).orientation
    return {
        "cameras": cameras,
        "image_size": size[0],
        "orientation": orientation,
        "render_quality": "stock",
    }


def _libero_spec(path: Path, suite: str | None, features: FeatureSpec) -> dict[str, Any] | None:
    kwargs = _camera_kwargs(path, features, "_rgb")
    if suite is None:
        _warn(path, f"LIBERO has no task {stem(path)!r}")
        return None
    if "goal_state" in features.observations:
        kwargs["goal_state"] = True
    return _spec(f"mail_envs:{suite}/{stem(path)}", kwargs, LIBERO_HORIZON)


def _robosuite_spec(
    path: Path, env_args: Mapping[str, Any], features: FeatureSpec
) -> dict[str, Any] | None:
    problem = _robosuite_problem(env_args)
    if problem is not None:
        _warn(path, problem)
        return None
    kwargs = _camera_kwargs(path, features, "_image")
    further = (*ROBOSUITE_HAND_VELOCITIES, *ROBOSUITE_FULL_STATE)
    if any(key in features.observations for key in further):
        kwargs["full_state"] = True
    return _spec(f"mail_envs:robosuite/{env_args['env_name']}", kwargs, ROBOSUITE_HORIZON)


def _robosuite_problem(env_args: Mapping[str, Any]) -> str | None:
    """Why no environment here is the one that was recorded in; None when one is."""
    given = env_args.get("env_kwargs") or {}
    if "env_name" not in env_args:
        return "env_args does not name its environment"
    if env_args["env_name"] not in ROBOSUITE_TASKS:
        return f"robosuite 1.4 has no single-arm task {env_args['env_name']!r}"
    robots = given.get("robots", "Panda")
    robots = [robots] if isinstance(robots, str) else list(robots)
    if robots != ["Panda"]:
        return f"it was recorded with {', '.join(map(str, robots))}, here there is one Panda"
    frequency = given.get("control_freq", ROBOSUITE_CONTROL_HZ)
    if frequency != ROBOSUITE_CONTROL_HZ:
        return f"its control_freq is {frequency}, here it is {ROBOSUITE_CONTROL_HZ}"
    return _controller_problem(given.get("controller_configs") or {})


def _controller_problem(controller: Any) -> str | None:
    if isinstance(controller, list) and len(controller) == 1:
        (controller,) = controller  # one per robot
    if isinstance(controller, Mapping) and isinstance(controller.get("body_parts"), Mapping):
        controller = controller["body_parts"].get("right")  # robosuite 1.5 has one per body part
    if not isinstance(controller, Mapping):
        return f"its arm controller is {controller!r}"
    if controller.get("type", "OSC_POSE") != "OSC_POSE":
        return f"its actions are not those of the controller OSC_POSE but of {controller['type']}"
    if not controller.get("control_delta", True) or controller.get("input_type") == "absolute":
        return "its actions are absolute poses, here they are changes of the pose"
    # robomimic's first files call it damping.
    stated = {"damping_ratio": controller.get("damping", OSC_POSE["damping_ratio"]), **controller}
    for name, expected in OSC_POSE.items():
        if name in stated and not _same(stated[name], expected):
            return f"{name} of its controller is {stated[name]}, here it is {expected}"
    return None


def _same(found: Any, expected: Any) -> bool:
    """Equality in which one number stands for a list of it."""
    try:
        return bool(np.all(np.equal(*np.broadcast_arrays(found, expected))))
    except ValueError:
        return False


def _warn(path: Path, problem: str) -> None:
    warnings.warn(
        f"{path.name}: {problem}, so the dataset does not name an environment for it. Evaluate "
        "with scripts/evaluate.py --env, or train with --eval-episodes 0.",
        UnknownWorldWarning,
        stacklevel=5,
    )
