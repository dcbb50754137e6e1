"""What the rules of :func:`mail_agents.check.check_agent` look at: an agent and data for it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mail_agents.agent import Agent
from mail_agents.config import AgentConfig
from mail_agents.data.example import example_dataset, random_observation
from mail_agents.data.segments import SegmentSpec
from mail_agents.features import FeatureSpec
from mail_agents.registry import AgentSpec, make


class Violation(Exception):
    """The agent breaks a rule."""


class NotApplicable(Exception):
    """The rule does not concern this agent, or cannot be checked on this machine."""


class Subject:
    """A spec, the features, and freshly made (optionally fitted) agents of it."""

    def __init__(self, found: AgentSpec, config: AgentConfig, features: FeatureSpec) -> None:
        self.spec = found
        self.config = config
        self.features = features
        self.dataset = example_dataset(features, config.history + config.horizon + 8)
        self._fitted: dict[int, Agent] = {}

    def new(self, overrides: Mapping[str, Any] | None = None) -> Agent:
        """A new agent, without statistics."""
        config = self.config.replace(overrides) if overrides else self.config
        return make(self.spec, self.features, config=config, device="cpu", seed=0)

    def agent(self) -> Agent:
        """A fitted agent that rules must not train; random streams are reset by ``reset``."""
        if 0 not in self._fitted:
            self._fitted[0] = self.trainable()
        return self._fitted[0]

    def trainable(self, overrides: Mapping[str, Any] | None = None) -> Agent:
        """A new, fitted agent that a rule may train."""
        agent = self.new(overrides)
        agent.fit_statistics(self.dataset)
        return agent

    def observations(self, rows: int, seed: int = 1) -> dict[str, np.ndarray]:
        """Random observations, one row per slot."""
        rng = np.random.default_rng(seed)
        return {
            key: random_observation(feature, rows, rng)
            for key, feature in self.features.observations.items()
        }

    def batch(self, size: int = 8) -> dict[str, Any]:
        """The first training windows."""
        return self.dataset.windows(self.agent().window_spec)[np.arange(size)]

    @property
    def untrained(self) -> bool:
        """Whether the agent has nothing to train."""
        return not any(p.requires_grad for p in self.agent().policy.parameters())

    def padded_batch(self) -> dict[str, Any]:
        """All training segments, or windows: padding is on either end of an episode."""
        spec = self.agent().window_spec
        if isinstance(spec, SegmentSpec) and spec.padding == "left_legacy":
            raise NotApplicable("padding='left_legacy' shows padding to the network, as released")
        view = self.dataset.windows(spec)
        return view[np.arange(len(view))]

    @property
    def target(self) -> float:
        """A return to aim for, that of the best episode."""
        return float(self.dataset.episode_returns.max())

    def begin(
        self, agent: Agent, slots: int, *, seed: int = 0, target: float | None = None
    ) -> None:
        """Starts an episode in every slot; slot k acts with seed + k."""
        agent.reset()
        self.start(agent, range(slots), [seed + k for k in range(slots)], target)

    def start(
        self, agent: Agent, slots: Sequence[int], seeds: list[int], target: float | None = None
    ) -> None:
        """Starts an episode in some slots."""
        tasks = ["task-0"] * len(slots)
        agent.reset(slots, seed=seeds, task=tasks, **self.goal(agent, target))

    def goal(self, agent: Agent, target: float | None = None) -> dict[str, Any]:
        """The argument of ``reset`` that only return-conditioned agents take."""
        wanted = self.target if target is None else target
        return {"target_return": wanted} if agent.uses_target_return else {}
