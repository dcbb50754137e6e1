"""Environments side by side, told which episode to begin and which step to take.

What only the environment needs stays with it: of ``info``, whether the task was solved comes back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np

from mail_agents.data.episode import SUCCESS_KEYS
from mail_agents.features import as_mapping

#: Environments side by side where neither the caller nor the environment names a number.
DEFAULT_ENVS = 20

MakeEnv = Callable[[], gymnasium.Env]


class Start(NamedTuple):
    """How an episode begins: arguments of ``env.reset``, and whether to render the first frame."""

    seed: int
    options: dict[str, Any] | None
    frame: bool


class Move(NamedTuple):
    """An action in environment units, and whether to render what follows."""

    action: np.ndarray
    frame: bool


class Outcome(NamedTuple):
    """What a reset or a step led to.

    Attributes:
        observation: Unbatched, by key.
        reward: 0 after a reset.
        terminated: Whether the environment ended the episode.
        truncated: Whether a limit ended it.
        success: What ``info`` says of it, or None.
        frame: ``(height, width, 3)`` uint8 where it was asked for.
    """

    observation: dict[str, Any]
    reward: float
    terminated: bool
    truncated: bool
    success: bool | None
    frame: np.ndarray | None


@dataclass(frozen=True)
class EnvFacts:
    """What is known of an environment once it is made.

    Attributes:
        observation_space: Of a single environment.
        action_space: Of a single environment.
        env_id: Its registered id, or None.
        max_steps: Its step limit, or None.
        render_mode: As made.
        render_fps: Frames per second of its recordings.
        simulator: ``metadata["simulator"]``, or None.
        init_states: How many initial states ``reset(options={"init_state": i})`` chooses from
            (``metadata["init_states"]``); 0 where the seed alone decides.
        parallel: How many it suggests to run side by side (``metadata["parallel"]``), or None.
    """

    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    env_id: str | None
    max_steps: int | None
    render_mode: str | None
    render_fps: float
    simulator: str | None
    init_states: int
    parallel: int | None

    @classmethod
    def of(cls, env: gymnasium.Env) -> "EnvFacts":
        """Asks an environment."""
        spec, metadata = env.spec, env.metadata
        return cls(
            env.observation_space,
            env.action_space,
            None if spec is None else spec.id,
            None if spec is None else spec.max_episode_steps,
            env.render_mode,
            float(metadata.get("render_fps") or 30.0),
            metadata.get("simulator"),
            int(metadata.get("init_states") or 0),
            metadata.get("parallel"),
        )


class Environments(Protocol):
    """Environments that are numbered from 0."""

    @property
    def facts(self) -> EnvFacts:
        """Of the first one; all are made alike."""
        ...

    def __len__(self) -> int: ...

    def reset(self, starts: Mapping[int, Start]) -> dict[int, Outcome]:
        """Begins episodes in some of them."""
        ...

    def step(self, moves: Mapping[int, Move]) -> dict[int, Outcome]:
        """Steps some of them."""
        ...

    def close(self) -> None:
        """Closes all of them."""
        ...


class LocalEnvironments:
    """Environments in this process.

    Args:
        make_env: Makes one.
        count: How many, at least 1; None takes what the first one suggests.
        most: Never more than these.
    """

    def __init__(self, make_env: MakeEnv, count: int | None, most: int) -> None:
        self._make_env = make_env
        self._envs: list[gymnasium.Env] = []
        try:
            self.add(1)
            self.facts = EnvFacts.of(self._envs[0])
            self.add(min(wanted(count, self.facts), most) - 1)
        except BaseException:
            self.close()
            raise

    def add(self, count: int) -> None:
        """Makes further ones."""
        for _ in range(count):
            self._envs.append(self._make_env())

    def __len__(self) -> int:
        return len(self._envs)

    def reset(self, starts: Mapping[int, Start]) -> dict[int, Outcome]:
        """Begins episodes, one environment after the other."""
        outcomes = {}
        for number, start in starts.items():
            env = self._envs[number]
            options = {} if start.options is None else {"options": start.options}
            observation, info = env.reset(seed=start.seed, **options)
            outcomes[number] = _outcome(env, observation, 0.0, False, False, info, start.frame)
        return outcomes

    def step(self, moves: Mapping[int, Move]) -> dict[int, Outcome]:
        """Steps one environment after the other."""
        outcomes = {}
        for number, move in moves.items():
            env = self._envs[number]
            observation, reward, terminated, truncated, info = env.step(move.action)
            outcomes[number] = _outcome(
                env, observation, float(reward), bool(terminated), bool(truncated), info, move.frame
            )
        return outcomes

    def close(self) -> None:
        """Closes all of them."""
        while self._envs:
            self._envs.pop().close()


def _outcome(
    env: gymnasium.Env,
    observation: Any,
    reward: float,
    terminated: bool,
    truncated: bool,
    info: Mapping[str, Any],
    frame: bool,
) -> Outcome:
    known = [bool(info[key]) for key in SUCCESS_KEYS if key in info]
    return Outcome(
        as_mapping(observation),
        reward,
        terminated,
        truncated,
        any(known) if known else None,
        np.asarray(env.render()) if frame else None,
    )


def wanted(count: int | None, facts: EnvFacts, workers: int = 1) -> int:
    """How many environments to run: as asked for, else as suggested, at least one per process."""
    if count is not None:
        return count
    return max(workers, DEFAULT_ENVS if facts.parallel is None else facts.parallel)


def env_maker(env_id: str, kwargs: Mapping[str, Any], max_steps: int | None = None) -> MakeEnv:
    """Returns a function that makes an environment.

    Args:
        env_id: Gymnasium id; ``"module:id"`` imports a module first.
        kwargs: Passed to ``gymnasium.make``.
        max_steps: Step limit, or None for the environment's own.
    """
    limit = {} if max_steps is None else {"max_episode_steps": max_steps}

    def make_env() -> gymnasium.Env:
        return gymnasium.make(env_id, **limit, **kwargs)

    return make_env
