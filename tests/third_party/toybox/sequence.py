"""A return-conditioned agent over segments of trajectories, in as few lines as it takes."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mail_agents import Agent, Policy
from mail_agents.config import AgentConfig
from mail_agents.data.segments import SegmentSpec


@dataclass(frozen=True)
class SequenceConfig(AgentConfig):
    """A running mean of steps, each its return-to-go, state and previous action."""

    history: int = 4
    padding: Literal["edge", "none", "right", "left_legacy"] = "right"
    action_norm: Literal["mean_std", "min_max", "quantile", "identity", "bounds"] = "bounds"
    width: int = 16
    """Hidden units."""


class SequencePolicy(Policy):
    def __init__(self, config, features):
        super().__init__()
        action = features.action.size
        self.inputs = nn.Linear(features.observations["state"].size + 1 + action, config.width)
        self.head = nn.Linear(2 * config.width, action)

    def predict(self, batch, past_action):
        """Actions of every step ``(B, L, A)`` from what is known before each is taken."""
        past = nn.functional.pad(past_action, (0, 0, 1, 0))  # nothing before the first step
        rtg = 0.1 * batch["rtg"].unsqueeze(-1)
        steps = torch.tanh(self.inputs(torch.cat([rtg, batch["obs/state"], past], dim=-1)))
        steps = steps * batch["mask"].unsqueeze(-1)
        mean = steps.cumsum(1) / batch["mask"].cumsum(1).clamp(min=1).unsqueeze(-1)
        return torch.tanh(self.head(torch.cat([steps, mean], dim=-1)))

    def loss(self, batch, generator=None):
        mask = batch["action_mask"].unsqueeze(-1)
        found = self.predict(batch, batch["action"][:, :-1]).float()
        error = torch.where(mask, found - batch["action"], 0.0).square()
        return error.sum() / mask.sum().clamp(min=1), {}

    def sample(self, batch, generators, deterministic):
        return self.predict(batch, batch["past_action"])[:, -1:]


class SequenceAgent(Agent):
    uses_target_return = True
    paddings = ("right", "left_legacy")

    @property
    def window_spec(self):
        return SegmentSpec(self.config.history, ("state",), padding=self.config.padding)

    def resolve_target(self, target, task=None):
        return 0.0 if target is None else target

    def build_policy(self):
        return SequencePolicy(self.config, self.features)
