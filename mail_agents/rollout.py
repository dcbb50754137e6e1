"""Evaluation: the same episodes whatever the number of parallel environments.

Episode ``i`` gets its reset seed and its acting-noise seed from ``(seed, i)`` alone, and every
episode asked for is run to its end, so there is no bias toward short episodes. Finished slots
take the next episode index at once; slots without work left are frozen. Where the environment has
initial states to choose from, episode ``i`` starts in state ``i`` modulo their number.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mail_agents.env_workers import WorkerPool, open_environments
from mail_agents.environments import EnvFacts, Environments, MakeEnv, Move, Outcome, Start
from mail_agents.errors import InvalidInputError
from mail_agents.features import FeatureSpec
from mail_agents.report.stats import bootstrap_mean, wilson_interval
from mail_agents.seeding import derive_env_seed, derive_seed
from mail_agents.storage import write_atomic

if TYPE_CHECKING:
    from mail_agents.agent import Agent

# Frames of a recording wait in memory, and more than this many a second show nothing new.
_VIDEO_FPS = 40.0


@dataclass(frozen=True)
class EpisodeResult:
    """One evaluated episode.

    Attributes:
        index: Episode index, from 0.
        seed: Seed given to ``env.reset``.
        task: Task name, or None.
        success: Whether ``info["success"]`` or ``info["is_success"]`` was true at any step; None
            when neither was ever reported.
        episode_return: Undiscounted sum of rewards.
        length: Environment steps.
        plans: Times the policy planned a chunk.
        terminated: Whether the environment ended the episode (else it was truncated).
        wall_time: Seconds from reset to end, shared with the episodes that ran beside it.
        target_return: Return the agent aimed for, or None.
        init_state: Which of its initial states the environment was put in, or None where the seed
            alone decides.
    """

    index: int
    seed: int
    task: str | None
    success: bool | None
    episode_return: float
    length: int
    plans: int
    terminated: bool
    wall_time: float
    target_return: float | None = None
    init_state: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """All episodes of one evaluation, their summary and any recorded frames.

    Attributes:
        episodes: Results in index order.
        protocol: What was run: environment, its simulator where ``metadata["simulator"]`` names it,
            seeds, limits, chunk control.
        frames: Recorded RGB frames by episode index.
        fps: Frame rate of the recordings.
    """

    episodes: list[EpisodeResult]
    protocol: dict[str, Any]
    frames: dict[int, list[np.ndarray]] = field(default_factory=dict, repr=False)
    fps: float = 30.0

    @property
    def success_rate(self) -> float | None:
        """Fraction of solved episodes, or None when the environment does not report success."""
        return self.summary()["success_rate"]

    def summary(self) -> dict[str, Any]:
        """Means with intervals: Wilson 95% for success, bootstrap 95% for the mean return."""
        returns = np.array([episode.episode_return for episode in self.episodes])
        known = [episode.success for episode in self.episodes if episode.success is not None]
        rate, interval = None, None
        if known:
            rate = float(np.mean(known))
            interval = [float(x) for x in wilson_interval(sum(known), len(known))]
        mean = bootstrap_mean(returns)
        return {
            "n_episodes": len(self.episodes),
            "success_rate": rate,
            "success_interval_95": interval,
            "return_mean": mean.value,
            "return_std": float(returns.std()),
            "return_interval_95": [mean.low, mean.high],
            "length_mean": float(np.mean([episode.length for episode in self.episodes])),
            "protocol": self.protocol,
        }

    def __str__(self) -> str:
        summary = self.summary()
        interval = summary["success_interval_95"]
        if interval is None:
            return f"return {summary['return_mean']:.1f} over {len(self.episodes)} episodes"
        known = [episode.success for episode in self.episodes if episode.success is not None]
        low, high = interval
        return f"{sum(known)}/{len(known)} solved, {low:.2f}-{high:.2f}"

    def save(self, directory: str | Path) -> Path:
        """Writes ``episodes.jsonl`` and ``summary.json`` into a directory."""
        directory = Path(directory)
        lines = "".join(json.dumps(asdict(episode)) + "\n" for episode in self.episodes)
        write_atomic(directory / "episodes.jsonl", lines.encode())
        # Keyword arguments of an environment made in Python may be anything.
        summary = json.dumps(self.summary(), indent=2, sort_keys=True, default=str) + "\n"
        write_atomic(directory / "summary.json", summary.encode())
        return directory


class _Slot:
    """The running totals of an environment's current episode."""

    def __init__(self, index: int, seed: int, init_state: int | None) -> None:
        self.index, self.seed, self.init_state = index, seed, init_state
        self.observation: dict[str, np.ndarray] = {}
        self.total, self.length = 0.0, 0
        self.success: bool | None = None
        self.began = time.perf_counter()

    def take(self, outcome: Outcome) -> None:
        self.observation = outcome.observation
        self.total += outcome.reward
        if outcome.success is not None:
            self.success = bool(self.success) or outcome.success

    def result(
        self, task: str | None, plans: int, terminated: bool, target_return: float | None
    ) -> EpisodeResult:
        return EpisodeResult(
            index=self.index,
            seed=self.seed,
            task=task,
            success=self.success,
            episode_return=self.total,
            length=self.length,
            plans=plans,
            terminated=terminated,
            wall_time=time.perf_counter() - self.began,
            target_return=target_return,
            init_state=self.init_state,
        )


class _Evaluator:
    """Runs a fixed set of episode indices over N environments."""

    def __init__(
        self,
        agent: "Agent",
        envs: Environments,
        *,
        seed: int,
        task: str | None,
        deterministic: bool,
        record: frozenset[int],
        target_return: float | None,
        on_episode: Callable[[EpisodeResult], None] | None,
    ) -> None:
        self.agent = agent
        self.envs = envs
        self.slots: dict[int, _Slot] = {}
        self.seed = seed
        self.task = task
        self.deterministic = deterministic
        self.record = record
        self.target_return = target_return
        self.on_episode = on_episode
        self.frame_stride = max(1, round(envs.facts.render_fps / _VIDEO_FPS))
        self.frames: dict[int, list[np.ndarray]] = {}
        self.results: list[EpisodeResult] = []

    def run(self, indices: Sequence[int]) -> list[EpisodeResult]:
        pending = iter(indices)
        active = self._begin(list(range(len(self.envs))), pending)
        while active:
            ended = self._step(active)
            restarted = self._begin(ended, pending)
            active = sorted((set(active) - set(ended)) | set(restarted))
        return sorted(self.results, key=lambda episode: episode.index)

    def _begin(self, free: list[int], pending: Iterator[int]) -> list[int]:
        starts: dict[int, Start] = {}
        for number, index in zip(free, pending, strict=False):
            slot = _Slot(index, derive_env_seed(self.seed, "eval", index), self._state_of(index))
            options = None if slot.init_state is None else {"init_state": slot.init_state}
            starts[number] = Start(slot.seed, options, self._films(slot))
            self.slots[number] = slot
        if starts:
            for number, outcome in self.envs.reset(starts).items():
                self._take(self.slots[number], outcome)
            indices = [self.slots[number].index for number in starts]
            targets = None
            if self.target_return is not None:
                targets = [self.target_return] * len(starts)
            self.agent.reset(
                list(starts),
                seed=[derive_seed(self.seed, "eval", index, 1) for index in indices],
                task=[self.task] * len(starts),
                target_return=targets,
            )
        return list(starts)

    def _state_of(self, index: int) -> int | None:
        """Episodes take the environment's initial states in turn."""
        states = self.envs.facts.init_states
        return index % states if states else None

    def _step(self, active: list[int]) -> list[int]:
        slots = [self.slots[number] for number in active]
        keys = [k for k, f in self.agent.features.observations.items() if f.kind != "text"]
        observation = {key: np.stack([slot.observation[key] for slot in slots]) for key in keys}
        actions = self.agent.act(observation, deterministic=self.deterministic, slots=active)
        for slot in slots:
            slot.length += 1
        moves = {
            number: Move(action, self._films(slot))
            for number, slot, action in zip(active, slots, actions, strict=True)
        }
        outcomes = self.envs.step(moves)
        for number, slot in zip(active, slots, strict=True):
            self._take(slot, outcomes[number])
        terminations = [outcomes[number].terminated for number in active]
        truncations = [outcomes[number].truncated for number in active]
        self.agent.step(
            np.array([outcomes[number].reward for number in active]),
            np.array(terminations),
            np.array(truncations),
            slots=active,
        )
        return self._collect(active, terminations, truncations)

    def _collect(
        self, active: list[int], terminated: list[bool], truncated: list[bool]
    ) -> list[int]:
        plans = self.agent.plans
        ended = []
        for number, over, cut in zip(active, terminated, truncated, strict=True):
            if over or cut:
                slot, target = self.slots[number], self.target_return
                result = slot.result(self.task, int(plans[number]), over, target)
                self.results.append(result)
                ended.append(number)
                if self.on_episode is not None:
                    self.on_episode(result)
        return ended

    def _films(self, slot: _Slot) -> bool:
        """Whether the step that the slot's length counts belongs to a recording."""
        return slot.index in self.record and slot.length % self.frame_stride == 0

    def _take(self, slot: _Slot, outcome: Outcome) -> None:
        slot.take(outcome)
        if outcome.frame is not None:
            self.frames.setdefault(slot.index, []).append(outcome.frame)


def evaluate(
    agent: "Agent",
    env: str | MakeEnv,
    episodes: int | Sequence[int],
    *,
    seed: int = 0,
    n_envs: int | None = None,
    workers: int | WorkerPool = 1,
    task: str | None = None,
    deterministic: bool = False,
    env_kwargs: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
    target_return: float | None = None,
    record: Sequence[int] = (),
    on_episode: Callable[[EpisodeResult], None] | None = None,
) -> Evaluation:
    """Rolls an agent out on fixed, seeded episodes.

    Args:
        agent: A trained agent; its executed chunk length is part of the protocol.
        env: Gymnasium id (``"module:id"`` imports a module first), or a function that makes one
            environment.
        episodes: How many episodes to run, or which episode indices; all of them count.
        seed: Root seed; episode ``i`` depends on ``(seed, i)`` only.
        n_envs: Environments stepped side by side, sharing each network call; None takes what the
            environment suggests in ``metadata["parallel"]``, else 20.
        workers: How many processes host the environments, which then step at the same time, or the
            processes (for several evaluations); 1 hosts them here. The network stays here, and
            episodes are the same, bit for bit.
        task: Task given to the agent, for language-conditioned agents.
        deterministic: Whether the agent leaves out sampling noise.
        env_kwargs: Passed to ``gymnasium.make`` when ``env`` is an id.
        max_steps: Step limit that replaces the environment's own, when ``env`` is an id.
        target_return: Return to aim for, for return-conditioned agents; None takes the agent's own.
        record: Episode indices whose frames are kept (needs ``render_mode="rgb_array"``).
        on_episode: Called after each finished episode, for progress bars.

    Returns:
        Results in index order, with the protocol.

    Raises:
        FeatureMismatchError: The environment does not give what the agent was trained on.
        InvalidInputError: A number is out of range, the agent does not use target returns, or other
            processes are wanted for an environment that they cannot make.
        EnvironmentFailedError: An environment in another process raised an error, or the process
            ended.
    """
    indices = range(episodes) if isinstance(episodes, int) else list(episodes)
    _check_numbers(indices, n_envs, workers)
    if target_return is not None:
        check_target_returns(agent, [target_return])
    target_return = agent.resolve_target(target_return, task)
    opened = open_environments(
        env, env_kwargs or {}, max_steps, n_envs=n_envs, workers=workers, most=len(indices)
    )
    with agent.planning_alike(), opened as environments:
        facts = environments.facts
        spaces = FeatureSpec.from_spaces(facts.observation_space, facts.action_space)
        agent.features.check(spaces)
        _check_camera(facts, record)
        agent.reset()
        evaluator = _Evaluator(
            agent,
            environments,
            seed=seed,
            task=task,
            deterministic=deterministic,
            record=frozenset(record),
            target_return=target_return,
            on_episode=on_episode,
        )
        results = evaluator.run(indices)
    protocol = {
        "agent": agent.agent_id,
        "env": facts.env_id or getattr(env, "__name__", str(env)),
        "simulator": facts.simulator,
        "env_kwargs": dict(env_kwargs or {}),
        "max_steps": max_steps or facts.max_steps,
        "init_states": facts.init_states or None,
        "task": task,
        "seed": seed,
        "n_episodes": len(indices),
        "deterministic": deterministic,
        "history": agent.config.history,
        "horizon": agent.config.horizon,
        "execute": agent.config.executed,
        "target_return": target_return,
        "weights": "raw" if agent.ema is None else "ema",
    }
    fps = facts.render_fps / evaluator.frame_stride
    return Evaluation(results, protocol, evaluator.frames, fps)


def _check_numbers(indices: Sequence[int], n_envs: int | None, workers: int | WorkerPool) -> None:
    if not indices or min(indices) < 0 or len(set(indices)) < len(indices):
        raise InvalidInputError(
            "At least one episode is needed, and episode indices must be distinct and not "
            f"negative; got {list(indices)[:8]}."
        )
    if isinstance(workers, WorkerPool):
        workers = workers.workers
    if workers < 1 or (n_envs is not None and n_envs < 1):
        raise InvalidInputError(
            f"At least one environment and one process are needed; got {n_envs=}, {workers=}."
        )


def _check_camera(facts: EnvFacts, record: Sequence[int]) -> None:
    if record and facts.render_mode != "rgb_array":
        raise InvalidInputError(
            "Recording needs an environment made with render_mode='rgb_array'; this one has "
            f"render_mode={facts.render_mode!r}."
        )


def check_target_returns(agent: "Agent", target_returns: Sequence[float]) -> None:
    """Refuses returns to aim for that would change nothing, or break what is planned.

    Raises:
        InvalidInputError: The agent does not use target returns, or one is not finite.
    """
    if not agent.uses_target_return:
        raise InvalidInputError(
            f"Agent {agent.agent_id!r} does not use target returns, got {list(target_returns)}. "
            "Leave them out (--target-returns, target_return=...): they are for "
            "return-conditioned agents."
        )
    if not all(map(math.isfinite, target_returns)):
        raise InvalidInputError(f"Target returns must be finite; got {list(target_returns)}.")
