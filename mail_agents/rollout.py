"""Evaluation: the same episodes whatever the number of parallel environments.

Episode ``i`` gets its reset seed and its acting-noise seed from ``(seed, i)`` alone, and every
episode asked for is run to its end, so there is no bias toward short episodes. Finished slots
take the next episode index at once; slots without work left are frozen.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from mail_agents.data.episode import SUCCESS_KEYS
from mail_agents.errors import InvalidInputError
from mail_agents.features import FeatureSpec, as_mapping
from mail_agents.report.stats import bootstrap_mean, wilson_interval
from mail_agents.seeding import derive_env_seed, derive_seed
from mail_agents.storage import write_atomic

if TYPE_CHECKING:
    from mail_agents.agent import Agent

MakeEnv = Callable[[], gymnasium.Env]

# CPU matrix products of one to three rows round differently from those of four or more. Network
# calls of a multiple of four rows make an episode the same, bit for bit, whatever runs beside it.
_PLAN_ROWS = 4

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
    """One environment and the running totals of its current episode."""

    def __init__(self, env: gymnasium.Env) -> None:
        self.env = env
        self.observation: dict[str, np.ndarray] = {}
        self.index = -1
        self.start(-1, 0)

    def start(self, index: int, seed: int) -> None:
        self.index, self.seed = index, seed
        self.total, self.length = 0.0, 0
        self.success: bool | None = None
        self.began = time.perf_counter()

    def note_info(self, info: Mapping[str, Any]) -> None:
        for key in SUCCESS_KEYS:
            if key in info:
                self.success = bool(self.success) or bool(info[key])

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
        )


def _render_fps(env: gymnasium.Env) -> float:
    return float(env.metadata.get("render_fps") or 30.0)


class _Evaluator:
    """Runs a fixed set of episode indices over N environments."""

    def __init__(
        self,
        agent: "Agent",
        slots: list[_Slot],
        *,
        seed: int,
        task: str | None,
        deterministic: bool,
        record: frozenset[int],
        target_return: float | None,
        on_episode: Callable[[EpisodeResult], None] | None,
    ) -> None:
        self.agent = agent
        self.slots = slots
        self.seed = seed
        self.task = task
        self.deterministic = deterministic
        self.record = record
        self.target_return = target_return
        self.on_episode = on_episode
        self.frame_stride = max(1, round(_render_fps(slots[0].env) / _VIDEO_FPS))
        self.frames: dict[int, list[np.ndarray]] = {}
        self.results: list[EpisodeResult] = []

    def run(self, indices: Sequence[int]) -> list[EpisodeResult]:
        pending = iter(indices)
        active = self._begin(list(range(len(self.slots))), pending)
        while active:
            ended = self._step(active)
            restarted = self._begin(ended, pending)
            active = sorted((set(active) - set(ended)) | set(restarted))
        return sorted(self.results, key=lambda episode: episode.index)

    def _begin(self, free: list[int], pending: Any) -> list[int]:
        started, seeds = [], []
        for number in free:
            index = next(pending, None)
            if index is None:
                break
            slot = self.slots[number]
            slot.start(index, derive_env_seed(self.seed, "eval", index))
            observation, info = slot.env.reset(seed=slot.seed)
            slot.observation = as_mapping(observation)
            slot.note_info(info)
            self._capture(slot)
            started.append(number)
            seeds.append(derive_seed(self.seed, "eval", index, 1))
        if started:
            targets = None
            if self.target_return is not None:
                targets = [self.target_return] * len(started)
            self.agent.reset(
                started, seed=seeds, task=[self.task] * len(started), target_return=targets
            )
        return started

    def _step(self, active: list[int]) -> list[int]:
        slots = [self.slots[number] for number in active]
        keys = [k for k, f in self.agent.features.observations.items() if f.kind != "text"]
        observation = {key: np.stack([slot.observation[key] for slot in slots]) for key in keys}
        actions = self.agent.act(observation, deterministic=self.deterministic, slots=active)
        rewards, terminations, truncations = [], [], []
        for slot, action in zip(slots, actions, strict=True):
            following, reward, terminated, truncated, info = slot.env.step(action)
            slot.observation = as_mapping(following)
            slot.total += float(reward)
            slot.length += 1
            slot.note_info(info)
            self._capture(slot)
            rewards.append(float(reward))
            terminations.append(bool(terminated))
            truncations.append(bool(truncated))
        self.agent.step(
            np.array(rewards), np.array(terminations), np.array(truncations), slots=active
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

    def _capture(self, slot: _Slot) -> None:
        if slot.index in self.record and slot.length % self.frame_stride == 0:
            self.frames.setdefault(slot.index, []).append(np.asarray(slot.env.render()))


def evaluate(
    agent: "Agent",
    env: str | MakeEnv,
    episodes: int | Sequence[int],
    *,
    seed: int = 0,
    n_envs: int | None = None,
    workers: int = 1,
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
        workers: Processes that host the environments; 1 hosts them here.
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
        InvalidInputError: A number is out of range, or the agent does not use target returns.
    """
    indices = range(episodes) if isinstance(episodes, int) else list(episodes)
    n_envs = 20 if n_envs is None else n_envs
    if n_envs < 1 or not indices or min(indices) < 0 or len(set(indices)) < len(indices):
        raise InvalidInputError(
            "At least one environment and one episode are needed, and episode indices must be "
            f"distinct and not negative; got {episodes=}, {n_envs=}."
        )
    make_env = _maker(env, env_kwargs or {}, max_steps)
    if target_return is not None:
        check_target_returns(agent, [target_return])
    target_return = agent.resolve_target(target_return, task)
    environments: list[gymnasium.Env] = []
    plan_rows, agent.plan_rows = agent.plan_rows, _PLAN_ROWS
    try:
        for _ in range(min(n_envs, len(indices))):
            environments.append(make_env())
        first = environments[0]
        features = FeatureSpec.from_spaces(first.observation_space, first.action_space)
        agent.features.check(features)
        if record and first.render_mode != "rgb_array":
            raise InvalidInputError(
                "Recording needs an environment made with render_mode='rgb_array'; this one has "
                f"render_mode={first.render_mode!r}."
            )
        agent.reset()
        evaluator = _Evaluator(
            agent,
            [_Slot(environment) for environment in environments],
            seed=seed,
            task=task,
            deterministic=deterministic,
            record=frozenset(record),
            target_return=target_return,
            on_episode=on_episode,
        )
        results = evaluator.run(indices)
        fps = _render_fps(first) / evaluator.frame_stride
        spec, simulator = first.spec, first.metadata.get("simulator")
    finally:
        agent.plan_rows = plan_rows
        for environment in environments:
            environment.close()
    protocol = {
        "agent": agent.agent_id,
        "env": spec.id if spec is not None else getattr(env, "__name__", str(env)),
        "simulator": simulator,
        "env_kwargs": dict(env_kwargs or {}),
        "max_steps": max_steps if max_steps or spec is None else spec.max_episode_steps,
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
    return Evaluation(results, protocol, evaluator.frames, fps)


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


def _maker(env: str | MakeEnv, kwargs: Mapping[str, Any], max_steps: int | None) -> MakeEnv:
    if not isinstance(env, str):
        if kwargs or max_steps is not None:
            raise InvalidInputError(
                "env_kwargs and max_steps are for environments given by id; a function that makes "
                "the environment must set them itself."
            )
        return env
    return env_maker(env, kwargs, max_steps)


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
