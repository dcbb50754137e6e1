"""Replaying recorded episodes: the same start and actions must give the same observations and end.

What proves that a store's actions, observations and environment belong together, whoever recorded
them. Episodes start from their seed and options; without a seed, as in published files, from the
first simulator state that they hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np

from mail_agents.data.dataset import ArrayDataset
from mail_agents.data.env_specs import recorded_start, recording_kwargs
from mail_agents.data.episode import SUCCESS_KEYS, Episode
from mail_agents.data.sim_states import narrow_states
from mail_agents.errors import InvalidInputError, MailAgentsError
from mail_agents.features import FeatureSpec, as_mapping

#: Largest difference of a number in a seeded episode. Simulators repeat an episode to the last bit
#: on one machine; another processor or library rounds differently.
NUMBER_TOLERANCE = 1e-5
#: Largest mean difference of an image, in grey levels of 255: graphics drivers shade differently.
IMAGE_TOLERANCE = 4.0


@dataclass(frozen=True)
class Difference:
    """Where a replay is furthest from the recording.

    Attributes:
        key: Observation key, or ``"state"``.
        step: Action after which it was seen, from 1; 0 is the start.
        value: Largest absolute difference of a number, or mean difference of an image.
    """

    key: str
    step: int
    value: float

    def __str__(self) -> str:
        return f"{self.value:.2g} ({self.key}, step {self.step})"


@dataclass(frozen=True)
class Replayed:
    """One replayed episode.

    Attributes:
        index: Index in the dataset.
        task: Its task.
        seeded: Whether it started from its seed; else from its first simulator state.
        recorded: Recorded length.
        steps: Replayed actions; fewer when the environment ended the episode.
        success: ``(recorded, replayed)``; None where it was not reported.
        numbers: Largest difference of a number in any observation; None without numbers.
        images: Largest difference of an image; None without images.
        state: Largest difference of a simulator state; None where none was recorded.
        unseen: Recorded observations that the environment does not have.
    """

    index: int
    task: str | None
    seeded: bool
    recorded: int
    steps: int
    success: tuple[bool | None, bool | None]
    numbers: Difference | None
    images: Difference | None
    state: Difference | None
    unseen: tuple[str, ...] = ()

    @property
    def reproduced(self) -> bool:
        """Whether success is as recorded (true when the recording does not say)."""
        recorded, replayed = self.success
        return recorded is None or recorded == bool(replayed)

    @property
    def observed_alike(self) -> bool:
        """Whether observations and states stay within the tolerances."""
        limits = (
            (self.numbers, NUMBER_TOLERANCE),
            (self.state, NUMBER_TOLERANCE),
            (self.images, IMAGE_TOLERANCE),
        )
        # Written so that NaN counts as a difference.
        return all(found is None or found.value <= limit for found, limit in limits)

    @property
    def ok(self) -> bool:
        """Success is reproduced, and a seeded episode was observed alike.

        From a simulator state alone contacts and controllers start differently from how they were,
        so that observations of such episodes are reported but not judged.
        """
        return self.reproduced and (self.observed_alike or not self.seeded)

    def __str__(self) -> str:
        words = {True: "success", False: "failure", None: "no outcome"}
        recorded, replayed = self.success
        if recorded == replayed or recorded is None:
            outcome = words[replayed]
        else:
            outcome = f"recorded {words[recorded]}, replayed {words[replayed]}"
        parts = [f"{self.task or 'no task'}, episode {self.index}: {outcome}"]
        parts.append(f"{self.steps} of {self.recorded} steps from its")
        parts[-1] += " seed" if self.seeded else " first simulator state"
        for name, found in (
            ("numbers", self.numbers),
            ("images", self.images),
            ("states", self.state),
        ):
            if found is not None:
                parts.append(f"{name} differ by {found}")
        if self.unseen:
            parts.append(f"not compared, the environment lacks them: {', '.join(self.unseen)}")
        return "; ".join(parts) + ("" if self.ok else "  DIFFERS")


def replay_dataset(dataset: ArrayDataset, episodes: int) -> Iterator[Replayed]:
    """Replays the first episodes of every task, one at a time.

    Args:
        dataset: A dataset that names its environments.
        episodes: Episodes per task.

    Yields:
        One result per episode, in task order.

    Raises:
        InvalidInputError: A task has no environment or it cannot be made, or an episode has neither
            seed nor simulator states, or an environment refuses its start or an action.
        FeatureMismatchError: An observation or the action has another shape in the environment.
    """
    if episodes < 1:
        raise InvalidInputError(f"{episodes} episodes cannot be replayed; give at least 1.")
    for number, task in enumerate(dataset.info.tasks):
        chosen = np.flatnonzero(dataset.task_ids == number)[:episodes].tolist()
        env = _make(dataset, task, chosen)
        try:
            for index in chosen:
                yield _replay(env, dataset.episode(index), index)
        finally:
            env.close()
    if not dataset.info.tasks:
        raise InvalidInputError(
            "The episodes of this store have no task, so their environment is unknown and they "
            "cannot be replayed."
        )


def _make(dataset: ArrayDataset, task: str, chosen: list[int]) -> gymnasium.Env:
    spec = dataset.info.env_specs.get(task)
    if not spec or "id" not in spec:
        raise InvalidInputError(
            f"The store does not name an environment for task {task!r}, so its episodes cannot be "
            "replayed. Verify it without --replay."
        )
    kwargs = dict(spec.get("kwargs") or {})
    if any(dataset.table.seeds[index] is not None for index in chosen):
        # What a seed means depends on them; a simulator state is a start by itself.
        kwargs.update(recording_kwargs(dataset.info.source, task))
    steps = int(dataset.lengths[chosen].max())
    try:
        env = gymnasium.make(str(spec["id"]), max_episode_steps=steps + 1, **kwargs)
    except Exception as error:  # simulators raise anything
        kind = "" if isinstance(error, MailAgentsError) else f"{type(error).__name__}: "
        raise InvalidInputError(
            f"The environment {spec['id']!r} of task {task!r} cannot be made here, so its episodes "
            f"cannot be replayed: {kind}{error}"
        ) from error
    try:
        found = FeatureSpec.from_spaces(env.observation_space, env.action_space)
        recorded = dataset.features
        common = {k: f for k, f in recorded.observations.items() if k in found.observations}
        replace(recorded, observations=common or recorded.observations).check(
            found, this="store", that=f"environment of task {task!r}"
        )
    except MailAgentsError:
        env.close()
        raise
    return env


class _Worst:
    """Remembers where replay and recording are furthest apart."""

    def __init__(self) -> None:
        self.found: Difference | None = None

    def compare(self, key: str, step: int, recorded: np.ndarray, replayed: Any) -> None:
        left, right = np.asarray(recorded), np.asarray(replayed)
        gaps = np.abs(left.astype(np.float64) - right.astype(np.float64))
        value = float(
            gaps.mean() if left.dtype == np.uint8 and left.ndim == 3 else gaps.max(initial=0.0)
        )
        # "not <=": a NaN is worse than any number.
        if self.found is None or not value <= self.found.value:
            self.found = Difference(key, step, value)


def _replay(env: gymnasium.Env, episode: Episode, index: int) -> Replayed:
    start = recorded_start(episode, env)
    if start is None:
        raise InvalidInputError(
            f"Episode {index} has neither a seed nor simulator states, so where it started is "
            "unknown and it cannot be replayed. Verify the store without --replay."
        )
    # Row t of LIBERO's files was observed after action t, row t of ours before it.
    shift = 1 if episode.meta.get("alignment") == "after_action" else 0
    seen = FeatureSpec.from_spaces(env.observation_space, env.action_space).observations
    worst = {"numbers": _Worst(), "images": _Worst(), "state": _Worst()}
    success: bool | None = None
    steps = 0

    def compare(observation: Any, info: dict[str, Any]) -> None:
        nonlocal success
        for key in SUCCESS_KEYS:
            if key in info:
                success = bool(success) or bool(info[key])
        row = steps - shift
        for key, value in as_mapping(observation).items():
            rows = episode.observations.get(key)
            if rows is not None and rows.dtype.kind in "biuf" and row >= 0:
                kind = "images" if rows.dtype == np.uint8 and rows.ndim == 4 else "numbers"
                worst[kind].compare(key, steps, rows[row], value)
        states = episode.infos.get("states")
        if states is not None and "state" in info and steps < len(states):
            worst["state"].compare("state", steps, narrow_states(states)[steps], info["state"])

    try:
        compare(*env.reset(**start))
        for action in episode.actions:
            observation, _, terminated, truncated, info = env.step(action)
            steps += 1
            compare(observation, info)
            if terminated or truncated:
                break
    except (MailAgentsError, ValueError, gymnasium.error.Error) as error:
        raise InvalidInputError(f"Episode {index} cannot be replayed: {error}") from error
    return Replayed(
        index=index,
        task=episode.task,
        seeded=episode.seed is not None,
        recorded=len(episode),
        steps=steps,
        success=(episode.success, success),
        numbers=worst["numbers"].found,
        images=worst["images"].found,
        state=worst["state"].found,
        unseen=tuple(sorted(episode.observations.keys() - seen.keys())),
    )
