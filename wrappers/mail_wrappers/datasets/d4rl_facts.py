"""What is known of a D4RL file besides its arrays: from itself, from D4RL, or from Gymnasium."""

from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from mail_agents.data.env_specs import spec_to_dict
from mail_agents.errors import (
    CorruptFileError,
    InvalidInputError,
    MailAgentsError,
    UnknownNameError,
)
from mail_agents.features import DEFAULT_KEY, Feature, FeatureSpec
from mail_wrappers.datasets.d4rl_file import D4RLFile
from mail_wrappers.datasets.d4rl_names import WORLDS, dataset_id, world_of, world_spec
from mail_wrappers.datasets.d4rl_reference import reference


@dataclass(frozen=True)
class Facts:
    """What the arrays of a file do not say.

    Attributes:
        id: Name of the dataset.
        task: Task of every episode; None when there is none, or each has its own.
        features: Kinds and bounds; None when nothing is known.
        env_specs: Gymnasium specs by task.
        reference_scores: Reference returns by task.
        max_episode_steps: Limit of the environment, if it is known and has one.
        episodes: Task, seed and ``meta`` of each episode, in files of ``write_d4rl`` only.
    """

    id: str
    task: str | None = None
    features: FeatureSpec | None = None
    env_specs: dict[str, Any] = field(default_factory=dict)
    reference_scores: dict[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None
    episodes: list[dict[str, Any]] | None = None

    @property
    def action(self) -> Feature | None:
        """The action, if anything is known."""
        return None if self.features is None else self.features.action


def facts_of(file: D4RLFile, name: str | None, env: str | None, *, anonymous: bool) -> Facts:
    """Collects what is known of a file.

    Args:
        file: The file.
        name: D4RL's name of the dataset; None takes it from the file name.
        env: Gymnasium id of the environment it was recorded in.
        anonymous: Whether files of which nothing is known are accepted.

    Raises:
        InvalidInputError: Both ``name`` and ``env`` are given, or either for a file that knows its
            own, or the environment cannot be made or has no single array of observations.
        UnknownNameError: Nothing is known of the file and ``anonymous`` is not set.
        CorruptFileError: Sizes differ from those of the environment, or the metadata is damaged.
    """
    given = [key for key, value in (("name", name), ("env", env)) if value is not None]
    own = _own_facts(file)
    if given and own is not None:
        raise InvalidInputError(
            f"{file.path} was written by write_d4rl and holds its own tasks, environments and "
            f"reference scores: leave {' and '.join(given)} out."
        )
    if len(given) == 2:
        raise InvalidInputError(
            f"Give either name={name!r}, D4RL's name of the dataset, or env={env!r}, the "
            "environment in which data of your own were recorded."
        )
    if own is not None:
        return own
    if env is not None:
        return _environment_facts(file, env)
    return _d4rl_facts(file, name, anonymous)


def _own_facts(file: D4RLFile) -> Facts | None:
    if not file.extras:
        return None
    try:
        return Facts(
            id=str(file.extras["name"]),
            features=FeatureSpec.from_dict(file.extras["features"]),
            env_specs=dict(file.extras["env_specs"]),
            reference_scores=dict(file.extras["reference_scores"]),
            episodes=[
                {key: item[key] for key in ("task", "seed", "meta")}
                for item in file.extras["episodes"]
            ],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{file.path}: its metadata is damaged: {error!r}.") from error


def _d4rl_facts(file: D4RLFile, name: str | None, anonymous: bool) -> Facts:
    try:
        known = name or dataset_id(file.path)
        world = world_of(known)
    except UnknownNameError as error:
        if anonymous:
            return Facts(id=name or file.path.stem, task=name)
        origin = "" if name else f" The name was taken from the file name {file.path.name}."
        raise UnknownNameError(
            f"{error}{origin} Data of D4RL: rename the file to D4RL's name of them, such as "
            "hopper-medium-v2.hdf5. Data of your own: name the Gymnasium environment they were "
            "recorded in, with env='Hopper-v5' in Python or '--env Hopper-v5' after 'mail-agents "
            f"data convert d4rl:{file.path} OUTPUT'."
        ) from error
    sizes = WORLDS[world]
    bound = (1.0,) * sizes.action_size
    state, action = file.dtype("observations").name, file.dtype("actions").name
    features = FeatureSpec(
        {DEFAULT_KEY: Feature("state", (sizes.observation_size,), state)},
        Feature("state", (sizes.action_size,), action, low=tuple(-x for x in bound), high=bound),
    )
    _check_sizes(file, features, known, "Is the file named after the dataset it holds?")
    return Facts(
        id=known,
        task=known,
        features=features,
        env_specs={known: world_spec(world)},
        reference_scores={known: reference(known)},
        max_episode_steps=sizes.max_episode_steps,
    )


def _environment_facts(file: D4RLFile, env_id: str) -> Facts:
    """Bounds, spec and task of an environment, which has no reference scores."""
    try:
        env = gymnasium.make(env_id)
    except MailAgentsError:
        raise
    except (gymnasium.error.Error, ImportError) as error:
        raise InvalidInputError(
            f"The environment {env_id!r} cannot be made: {error} Expected a Gymnasium id such as "
            "'Hopper-v5'; 'module:id' imports a module first."
        ) from error
    spec, features = env.spec, FeatureSpec.from_spaces(env.observation_space, env.action_space)
    env.close()
    assert spec is not None  # made by id
    if set(features.observations) != {DEFAULT_KEY} or np.dtype(features.action.dtype).kind != "f":
        raise InvalidInputError(
            f"{env_id} observes {', '.join(features.observations)} and takes actions of "
            f"{features.action.dtype}; D4RL's layout has one array of observations and "
            "floating-point actions. Name the environment that the file was recorded in."
        )
    _check_sizes(file, features, env_id, "Was the file recorded in this environment?")
    try:
        description = spec_to_dict(spec)
    except ValueError as error:  # Gymnasium's way to refuse a class or function
        raise InvalidInputError(
            f"{env_id} cannot be described for another process: {error} Register it with text: "
            "gymnasium.register(id, entry_point='package.module:Class')."
        ) from error
    return Facts(
        id=file.path.stem,
        task=spec.id,
        features=features,
        env_specs={spec.id: description},
        max_episode_steps=spec.max_episode_steps,
    )


def _check_sizes(file: D4RLFile, features: FeatureSpec, label: str, question: str) -> None:
    expected = {
        "observations": features.observations[DEFAULT_KEY].shape,
        "actions": features.action.shape,
    }
    for key, shape in expected.items():
        if file.shape(key) != shape:
            raise CorruptFileError(
                f"{file.path}: {key} has rows of shape {file.shape(key)}, but {label} has {shape}. "
                f"{question}"
            )
