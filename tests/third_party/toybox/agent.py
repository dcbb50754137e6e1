"""An agent in as few lines as it takes."""

from dataclasses import dataclass

import torch
from torch import nn

from mail_agents import Agent, Policy
from mail_agents.config import AgentConfig


@dataclass(frozen=True)
class MlpConfig(AgentConfig):
    """A multi-layer perceptron over the last state."""

    width: int = 32
    """Hidden units."""


class MlpPolicy(Policy):
    def __init__(self, config, features):
        super().__init__()
        self.keys = list(features.of_kind("state"))
        self.shape = (config.horizon, features.action.size)
        inputs = sum(features.observations[key].size for key in self.keys)
        self.net = nn.Sequential(
            nn.Linear(inputs, config.width),
            nn.Tanh(),
            nn.Linear(config.width, self.shape[0] * self.shape[1]),
        )

    def predict(self, batch):
        now = torch.cat([batch[f"obs/{key}"][:, -1].flatten(1) for key in self.keys], dim=1)
        return self.net(now).unflatten(1, self.shape)

    def loss(self, batch, generator=None):
        mask = batch["action_mask"].unsqueeze(-1)
        error = torch.where(mask, self.predict(batch) - batch["action"], 0.0).square()
        return error.sum() / mask.sum().clamp(min=1), {}

    def sample(self, batch, generators, deterministic):
        return self.predict(batch)


class MlpAgent(Agent):
    def build_policy(self):
        return MlpPolicy(self.config, self.features)
