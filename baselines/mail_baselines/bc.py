"""Behaviour cloning with a multilayer perceptron, and %BC: the same on the best episodes.

Sources: ``algorithms/offline/any_percent_bc.py`` of github.com/corl-team/CORL (two layers of 256 on
the current state) and ``gym/decision_transformer/models/mlp_bc.py`` of
github.com/kzl/decision-transformer (the last 20 states side by side). %BC is defined in section 5.1
of Chen et al. 2021 (arXiv:2106.01345). CORL counts trajectories, kzl time steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mail_agents.agents.mail import repeat_first_valid
from mail_agents.data.dataset import TrajectoryDataset
from mail_agents.data.segments import SegmentSpec
from mail_agents.data.windows import WindowSpec
from mail_agents.features import FeatureSpec
from mail_agents.policy import Batch
from mail_baselines.config import BCConfig
from mail_baselines.offline import (
    OfflineAgent,
    OfflinePolicy,
    by_task,
    state_size,
    state_vectors,
)

__all__ = ["BCAgent", "BCConfig", "BCPolicy", "best_episodes"]


def best_episodes(
    returns: np.ndarray, lengths: np.ndarray, fraction: float, by: str = "timesteps"
) -> np.ndarray:
    """Chooses the episodes with the highest returns.

    Args:
        returns: ``(N,)`` return of each episode.
        lengths: ``(N,)`` steps of each episode.
        fraction: Share to keep, in (0, 1]; at least one episode is kept.
        by: ``"timesteps"`` adds episodes, from the best on, while they hold at most this share of
            all steps (``gym/experiment.py`` of github.com/kzl/decision-transformer);
            ``"trajectories"`` keeps this share of the episodes, rounded down.

    Returns:
        Indices in order.
    """
    order = np.argsort(returns, kind="stable")[::-1]
    if by == "trajectories":
        count = int(fraction * len(order))
    else:
        steps = np.cumsum(lengths[order])
        count = int(np.searchsorted(steps, int(fraction * steps[-1]), side="right"))
    return np.sort(order[: max(1, count)])


class BCPolicy(OfflinePolicy):
    """Hidden layers with ReLU and dropout over the last states, side by side.

    Args:
        config: Sizes.
        features: State observations and a vector action.
    """

    def __init__(self, config: BCConfig, features: FeatureSpec) -> None:
        super().__init__()
        self.keys = tuple(sorted(features.observations))
        self.padding = config.padding
        inputs, width = config.history * state_size(features), config.width
        layers: list[nn.Module] = []
        for _ in range(config.layers):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            layers += [nn.Dropout(config.dropout)] if config.dropout else []
            inputs = width
        layers.append(nn.Linear(width, features.action.size))
        self.net = nn.Sequential(*layers, *([nn.Tanh()] if config.squash else []))

    def predict(self, batch: Batch) -> Tensor:
        """Predicts the action of the last step, ``(B, 1, A)``."""
        states = state_vectors(batch, self.keys)
        if self.padding == "edge":
            states = repeat_first_valid(states, batch["mask"])
        return self.net(states.flatten(1)).unsqueeze(1)

    def loss(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~mail_agents.policy.Policy`; draws no random numbers but dropout's."""
        return self.action_loss(self.predict(batch), batch)

    def sample(
        self, batch: Batch, generators: Sequence[torch.Generator], deterministic: bool
    ) -> Tensor:
        """See :class:`~mail_agents.policy.Policy`; the same with either flag."""
        return self.predict(batch)


class BCAgent(OfflineAgent):
    """Behaviour cloning of all or the best episodes; see :class:`~mail_agents.agent.Agent`."""

    paddings: ClassVar[tuple[str, ...]] = ("edge", "left_legacy")

    config: BCConfig
    policy: BCPolicy

    def build_policy(self) -> BCPolicy:
        """Builds the network from ``self.config`` and ``self.features``."""
        return BCPolicy(self.config, self.features)

    @property
    def window_spec(self) -> WindowSpec | SegmentSpec:
        """Windows, or the released segments, whose last step is the current one."""
        if self.config.padding != "left_legacy":
            return super().window_spec
        keys = tuple(sorted(self.features.observations))
        return SegmentSpec(self.config.history, keys, padding="left_legacy")

    def training_episodes(
        self, dataset: TrajectoryDataset, episodes: Sequence[int] | None = None
    ) -> list[int]:
        """The ``top_fraction`` of each task's episodes with the highest returns, in order."""
        chosen = super().training_episodes(dataset, episodes)
        if self.config.top_fraction == 1:
            return chosen
        kept: set[int] = set()
        # Task by task: returns of different tasks do not compare.
        for members in by_task(dataset, chosen).values():
            returns, lengths = dataset.episode_returns[members], dataset.lengths[members]
            best = best_episodes(returns, lengths, self.config.top_fraction, self.config.by)
            kept.update(members[best].tolist())
        return [episode for episode in chosen if episode in kept]

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See :class:`~mail_agents.agent.Agent`; the last step of a segment is the target."""
        out = super().prepare(batch)
        return {k: v[:, -1:] if k in ("action", "action_mask") else v for k, v in out.items()}
