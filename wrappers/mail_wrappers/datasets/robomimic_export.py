"""Writing a dataset as LIBERO's or robomimic's HDF5 files, one per task."""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np

from mail_agents.data.dataset import TrajectoryDataset
from mail_agents.data.env_specs import recorded_start, recording_kwargs
from mail_agents.data.episode import Episode
from mail_agents.data.sim_states import narrow_states
from mail_agents.errors import InvalidInputError
from mail_agents.features import FeatureSpec, Orientation
from mail_wrappers.datasets.robomimic_facts import GYM
from mail_wrappers.datasets.robomimic_file import EXTRAS, created, storing
from mail_wrappers.images import turn_images

_SIMULATED = ("mail_envs:libero_", "mail_envs:robosuite/")
#: Meta that reading the file gives again.
_DERIVED = ("source_id", "alignment", "final_observation", "fixtures")


def write_libero(dataset: TrajectoryDataset, output: str | os.PathLike[str]) -> Path:
    """Writes ``<task>_demo.hdf5`` files like those that LIBERO publishes.

    As in upstream's ``scripts/create_dataset.py``, observations are those after the action of the
    same row, ``states`` those before it; images have the raw orientation and are turned if need be.
    ``model_file`` and, unless the dataset was converted from LIBERO's files, the BDDL file come
    from the environment that the dataset names, started as each episode was. Seeds, ``meta`` and
    the environment go into the attribute ``mail_agents`` of ``data``.

    Args:
        dataset: Recordings in LIBERO's environments, or a converted dataset.
        output: Folder to write; it must not exist, or be empty.

    Returns:
        The folder.

    Raises:
        InvalidInputError: The folder exists, the dataset lacks simulator states or other parts of
            the layout, or an environment cannot be made.
        StorageError: The disk is full or the place cannot be written to.
    """
    return _write(dataset, Path(output), libero=True)


def write_robomimic(dataset: TrajectoryDataset, output: str | os.PathLike[str]) -> Path:
    """Writes ``<task>_demo.hdf5`` files in robomimic's layout.

    ``obs`` is before the action and ``next_obs`` after it; images of robosuite are turned upright,
    as robomimic has them. Environments of robosuite are described in ``env_args`` and give
    ``model_file``; other environments are described as Gym's.

    Args:
        dataset: Any dataset of numbers with flat observation keys.
        output: Folder to write; it must not exist, or be empty.

    Returns:
        The folder.

    Raises:
        InvalidInputError: The folder exists, observations are text or nested, or an environment of
            robosuite cannot be made.
        StorageError: The disk is full or the place cannot be written to.
    """
    return _write(dataset, Path(output), libero=False)


def _write(dataset: TrajectoryDataset, output: Path, *, libero: bool) -> Path:
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise InvalidInputError(f"{output} exists already. Choose another folder or delete it.")
    _check_keys(dataset.features)
    names = _file_names(dataset)
    needed = _bytes(dataset, libero)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with storing(output):
            partial.mkdir(parents=True)
            _check_space(partial, needed)
        for task, name in names.items():
            with created(partial / name, output) as file:
                _TaskFile(dataset, task, libero, output).write(file)
        with storing(output):
            if output.is_dir():
                output.rmdir()
            os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if libero and not dataset.features.of_kind("image"):
        warnings.warn(
            "The dataset has no images, which LIBERO's own code expects in its files. Record with "
            "--cameras to write files that it can train on.",
            UserWarning,
            stacklevel=3,
        )
    return output


def _check_keys(features: FeatureSpec) -> None:
    for key, feature in features.observations.items():
        if feature.kind == "text" or "/" in key:
            what = "is text" if feature.kind == "text" else "is nested"
            raise InvalidInputError(
                f"Observation {key!r} {what}; the layout holds numbers under flat names. Write the "
                "dataset in Minari's format instead: 'mail-agents data convert STORE minari:ID'."
            )


def _file_names(dataset: TrajectoryDataset) -> dict[str | None, str]:
    """File name by task, in task order."""
    tasks: list[str | None] = list(dataset.info.tasks)
    if (dataset.task_ids < 0).any():
        tasks.append(None)
    names: dict[str | None, str] = {}
    for task in tasks:
        # Not rpartition alone: a task may be named like a world, "libero_object/pick_up_the_milk".
        name = (task or dataset.info.name).rpartition("/")[2] + "_demo.hdf5"
        if name in names.values():
            raise InvalidInputError(
                f"Two tasks would be written to {name}: {', '.join(map(str, tasks))}. Rename one."
            )
        names[task] = name
    return names


def _bytes(dataset: TrajectoryDataset, libero: bool) -> int:
    """About how many the files take at most."""
    episode = dataset.episode(0)
    rows = sum(values.nbytes for values in episode.observations.values()) * (1 if libero else 2)
    return rows * dataset.info.n_steps // len(episode)


def _check_space(folder: Path, needed: int) -> None:
    """Refuses early: HDF5 may crash the interpreter after running out of space."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"up to {needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free")


class _TaskFile:
    """Everything that goes into the file of one task."""

    def __init__(
        self, dataset: TrajectoryDataset, task: str | None, libero: bool, output: Path
    ) -> None:
        info = dataset.info
        index = -1 if task is None else info.tasks.index(task)
        self.dataset, self.task, self.libero, self.output = dataset, task, libero, output
        self.numbers = np.flatnonzero(dataset.task_ids == index).tolist()
        self.spec: Mapping[str, Any] = info.env_specs.get(task, {}) if task is not None else {}
        self.recorded_with = recording_kwargs(info.source, task)
        self.kept: Mapping[str, Any] = info.source.get("attributes", {}).get(task, {})
        self.simulated = str(self.spec.get("id", "")).startswith(_SIMULATED)
        of_libero = str(self.spec.get("id", "")).startswith(_SIMULATED[0])
        if libero and not of_libero:
            named = f"{self.spec['id']!r}" if self.spec else "none"
            raise InvalidInputError(
                f"LIBERO's files belong to LIBERO's environments; that of task {task!r} is {named}."
                " Write robomimic's layout instead: 'mail-agents data convert STORE robomimic:DIR'."
            )
        raw = of_libero or "bddl_file_name" in self.kept
        self.orientation: Orientation = "raw" if raw else "upright"
        self.alignment = _alignment(dataset, self.numbers, task)

    def write(self, file: h5py.File) -> None:
        data = file.create_group("data")
        notes, total = {}, 0
        with self._environment() as env:
            self._put(data, self._attributes(env))
            for number, index in enumerate(self.numbers):
                episode = self.dataset.episode(index)
                attributes: dict[str, Any] = {"num_samples": len(episode)}
                if env is not None:
                    attributes["model_file"] = self._model(env, index, episode)
                arrays = self._libero(index, episode) if self.libero else self._robomimic(episode)
                if self.libero:
                    attributes["init_state"] = arrays["states"][0]
                self._put(data.require_group(f"demo_{number}"), attributes, arrays)
                total += len(episode)
                meta = {k: v for k, v in episode.meta.items() if k not in _DERIVED}
                notes[f"demo_{number}"] = {"seed": episode.seed, "meta": meta}
        counts = {"num_demos": len(self.numbers), "total": total}
        self._put(data, {**counts, EXTRAS: json.dumps(self._extras(notes))})

    def _put(
        self,
        group: h5py.Group,
        attributes: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        with storing(self.output):
            for name, value in attributes.items():
                texts = isinstance(value, list) and np.asarray(value).dtype.kind == "U"
                group.attrs[name] = np.array(value, h5py.string_dtype()) if texts else value
            for name, array in (arrays or {}).items():
                group[name] = array

    @contextlib.contextmanager
    def _environment(self) -> Iterator[gymnasium.Env | None]:
        """The simulator behind the task, without cameras; None for worlds of other kinds."""
        if not self.simulated:
            yield None
            return
        kwargs = {**self.spec.get("kwargs", {}), **self.recorded_with, "cameras": []}
        try:
            env = gymnasium.make(str(self.spec["id"]), disable_env_checker=True, **kwargs)
        except Exception as error:  # simulators raise anything
            raise InvalidInputError(
                f"The layout holds each episode's simulator model, but the environment "
                f"{self.spec['id']!r} of task {self.task!r} cannot be made here: {error}"
            ) from error
        try:
            yield env
        finally:
            env.close()

    def _model(self, env: gymnasium.Env, index: int, episode: Episode) -> str:
        start = recorded_start(episode, env)
        if start is None:
            raise InvalidInputError(
                f"Episode {index} has neither a seed nor simulator states, so its simulator model "
                "cannot be restored. Record it again with RecordEpisodes or scripts/collect.py."
            )
        try:
            env.reset(**start)
            return str(env.get_wrapper_attr("model_xml")())
        except Exception as error:  # simulators raise anything
            raise InvalidInputError(
                f"Episode {index} cannot be started again in {self.spec['id']!r}, which gives its "
                f"simulator model: {error}"
            ) from error

    def _attributes(self, env: gymnasium.Env | None) -> dict[str, Any]:
        if self.libero and env is not None and "bddl_file_content" not in self.kept:
            return {**_libero_attributes(env, self._cameras()), **self.kept}
        if self.kept or not self.spec:
            return dict(self.kept)
        if env is not None:
            return {"env_args": json.dumps(_env_args(env, self._cameras()))}
        kwargs = dict(self.spec.get("kwargs") or {})
        gym = {"env_name": self.spec["id"], "type": GYM, "env_kwargs": kwargs}
        return {"env_args": json.dumps(gym)}

    def _cameras(self) -> dict[str, Any]:
        """What ``env_kwargs`` of ``env_args`` say of the images of this file."""
        images = self.dataset.features.of_kind("image")
        depths = any(key.endswith("_depth") for key in self.dataset.features.observations)
        cameras: dict[str, Any] = {
            "use_camera_obs": bool(images),
            "has_offscreen_renderer": bool(images),
            "camera_depths": depths,
        }
        if not images:
            return {**cameras, "camera_names": []}
        names = [key.removesuffix("_rgb").removesuffix("_image") for key in images]
        # LIBERO calls its wrist camera by another name in observations.
        names = ["robot0_eye_in_hand" if name == "eye_in_hand" else name for name in names]
        height, width = next(iter(images.values())).shape[:2]
        sizes = {"camera_heights": height, "camera_widths": width}
        return {**cameras, "camera_names": names, **sizes}

    def _extras(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        features = self.dataset.features
        turned = {
            key: replace(f, orientation=self.orientation) if f.orientation else f
            for key, f in features.observations.items()
        }
        spec = dict(self.spec)
        images = [f for f in features.observations.values() if f.orientation]
        if images and spec:
            spec["kwargs"] = {**spec.get("kwargs", {}), "orientation": self.orientation}
        action = features.action
        if self.libero:
            action = replace(action, dtype="float64")
        return {
            "task": self.task,
            "alignment": "after_action" if self.libero else self.alignment,
            "features": FeatureSpec(turned, action).to_dict(),
            "env_spec": spec or None,
            "env_kwargs": {
                k: v for k, v in self.recorded_with.items() if k not in ("orientation", "cameras")
            },
            "episodes": notes,
        }

    def _libero(self, index: int, episode: Episode) -> dict[str, np.ndarray]:
        length = len(episode)
        if "states" not in episode.infos:
            raise InvalidInputError(
                f"Episode {index} has no simulator states, which LIBERO's layout holds. Record it "
                "again with scripts/collect.py, or write robomimic's layout."
            )
        if not np.isin(episode.rewards, (0, 1)).all():
            raise InvalidInputError(
                f"Episode {index} has rewards other than 0 and 1, which LIBERO's layout cannot "
                "hold. Write robomimic's layout instead."
            )
        first = 0 if self.alignment == "after_action" else 1
        rows = slice(first, first + length)
        states = narrow_states(episode.infos["states"])[:length]
        return {
            "actions": episode.actions.astype(np.float64),
            "states": states,
            "robot_states": _robot_states(index, episode)[rows],
            "rewards": episode.rewards.astype(np.uint8),
            "dones": episode.terminations.astype(np.uint8),
            **{f"obs/{k}": self._turned(k, v[rows]) for k, v in episode.observations.items()},
        }

    def _robomimic(self, episode: Episode) -> dict[str, np.ndarray]:
        length = len(episode)
        arrays = {
            "actions": episode.actions,
            "rewards": episode.rewards,
            "dones": episode.terminations.astype(np.int64),
        }
        for name in ("states", "robot_states"):
            if name in episode.infos:
                arrays[name] = narrow_states(episode.infos[name])[:length]
        for key, values in episode.observations.items():
            values = self._turned(key, values)
            arrays[f"obs/{key}"] = values[:-1]
            if episode.meta.get("final_observation") != "repeated":
                arrays[f"next_obs/{key}"] = values[1:]
        return arrays

    def _turned(self, key: str, values: np.ndarray) -> np.ndarray:
        feature = self.dataset.features.observations[key]
        if feature.kind != "image":
            return values
        if feature.orientation is None:
            if not self.libero:
                return values
            raise InvalidInputError(
                f"Which way up the images {key!r} are is unknown, and LIBERO's layout holds raw "
                "ones. Convert or record the dataset again with this version, which notes it."
            )
        return turn_images(values, feature.orientation, self.orientation)


def _env_args(env: gymnasium.Env, cameras: Mapping[str, Any]) -> dict[str, Any]:
    """The environment's, which was made without cameras, with those of the recording."""
    args = dict(env.get_wrapper_attr("env_args"))
    return {**args, "env_kwargs": {**args.get("env_kwargs", {}), **cameras}}


def _libero_attributes(env: gymnasium.Env, cameras: Mapping[str, Any]) -> dict[str, str]:
    args = _env_args(env, cameras)
    path = Path(env.get_wrapper_attr("bddl_path"))
    return {
        "env_name": str(args["env_name"]),
        "env_args": json.dumps(args),
        "problem_info": json.dumps(dict(env.get_wrapper_attr("problem_info"))),
        "bddl_file_name": str(args["bddl_file"]),
        "bddl_file_content": path.read_text(encoding="utf-8"),
        "macros_image_convention": "opengl",
        "tag": "libero-v1",
    }


def _alignment(dataset: TrajectoryDataset, numbers: list[int], task: str | None) -> str:
    """Whether observations of a task are from before or after the action beside them."""
    found = {dataset.episode(i).meta.get("alignment", "before_action") for i in numbers}
    if len(found) > 1:
        raise InvalidInputError(
            f"Some episodes of task {task!r} hold observations from before the action, others "
            "from after it. Write two datasets."
        )
    return found.pop()


def _robot_states(index: int, episode: Episode) -> np.ndarray:
    """``(T or T+1, 9)``: fingers (2), position (3), quaternion xyzw (4), beside each observation.

    The quaternion is that of ``ee_ori``, an axis times an angle in [0, 2 pi) (robosuite
    ``utils/transform_utils.py``, ``quat2axisangle``), so that even its sign comes back.
    """
    if "robot_states" in episode.infos:
        return episode.infos["robot_states"]
    needed = ("gripper_states", "ee_pos", "ee_ori")
    missing = [key for key in needed if key not in episode.observations]
    if missing:
        raise InvalidInputError(
            f"Episode {index} lacks {', '.join(missing)}, from which robot_states are made. Record "
            "it in LIBERO's environment with all of its observations."
        )
    fingers, position, turn = (episode.observations[key] for key in needed)
    angle = np.linalg.norm(turn, axis=1, keepdims=True)
    axis = np.divide(turn, angle, out=np.zeros_like(turn), where=angle > 0)
    quaternion = np.concatenate([axis * np.sin(angle / 2), np.cos(angle / 2)], axis=1)
    return np.concatenate([fingers, position, quaternion], axis=1)
