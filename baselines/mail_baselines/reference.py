"""Floors that a trained agent must clear: uniform random actions, and the mean demonstrated one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mail_agents.agent import Agent
from mail_agents.config import AgentConfig
from mail_agents.errors import InvalidInputError
from mail_agents.features import FeatureSpec
from mail_agents.policy import Batch, Policy


@dataclass(frozen=True)
class ReferenceConfig(AgentConfig):
    """Reference agents have no settings of their own."""


class _ReferencePolicy(Policy):
    """A policy without parameters; its loss is the mean squared error of what it always plays."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("constant", torch.zeros(shape))

    constant: Tensor

    def loss(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        error = (batch["action"] - self.constant).square().mean(dim=-1)
        mask = batch["action_mask"].float()
        return (error * mask).sum() / mask.sum().clamp(min=1), {}

    def sample(
        self, batch: Batch, generators: Sequence[torch.Generator], deterministic: bool
    ) -> Tensor:
        return self.constant.expand(len(generators), *self.constant.shape).clone()


class MeanActionAgent(Agent):
    """Always plays the mean action of the demonstrations (zero in normalised units)."""

    def __init__(self, config: AgentConfig, features: FeatureSpec, **kwargs: Any) -> None:
        # Zero is the mean in these units only.
        super().__init__(config.replace({"action_norm": "mean_std"}), features, **kwargs)

    def build_policy(self) -> Policy:
        """A policy that plays a constant."""
        return _ReferencePolicy((self.config.horizon, *self.features.action.shape))


class _RandomPolicy(_ReferencePolicy):
    """Uniform in a box; its deterministic action is the middle of the box."""

    def __init__(self, low: Tensor, high: Tensor, horizon: int) -> None:
        super().__init__((horizon, *low.shape))
        self.constant.copy_((low + high) / 2)
        self.register_buffer("half_width", (high - low) / 2)

    half_width: Tensor

    def sample(
        self, batch: Batch, generators: Sequence[torch.Generator], deterministic: bool
    ) -> Tensor:
        middle = super().sample(batch, generators, deterministic)
        if deterministic:
            return middle
        shape = self.constant.shape
        noise = torch.stack([torch.rand(shape, generator=each) for each in generators])
        return middle + (2 * noise.to(middle.device) - 1) * self.half_width


class RandomAgent(Agent):
    """Uniform random actions inside the action bounds."""

    def __init__(self, config: AgentConfig, features: FeatureSpec, **kwargs: Any) -> None:
        # The box is in environment units and observations do not matter: no statistics are needed.
        units = {"action_norm": "identity", "state_norm": "identity"}
        super().__init__(config.replace(units), features, **kwargs)

    def check_features(self, features: FeatureSpec) -> None:
        """Refuses unbounded actions, besides what every agent refuses."""
        super().check_features(features)
        if features.action.low is None or features.action.high is None:
            raise InvalidInputError(
                "A random agent needs a bounded action space; these features have no action "
                "bounds. Take the features from an environment, or from a dataset recorded in one."
            )

    def build_policy(self) -> Policy:
        """A policy that draws from the box of the action space."""
        action = self.features.action
        low, high = (
            torch.tensor(bound).reshape(action.shape) for bound in (action.low, action.high)
        )
        return _RandomPolicy(low, high, self.config.horizon)
