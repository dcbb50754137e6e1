"""Behaviour cloning: regression on the demonstrated chunk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mail_agents.objectives import ActionNet, Draws, PlanNet, masked_mse


class BC:
    """Mean squared error on normalised actions; one deterministic prediction, not clamped.

    MaIL's "BC" head (arXiv:2406.08234; upstream ``agents/models/bc/bc_agent.py``). On
    demonstrations with several modes it converges to their mean.
    """

    conditions_on_noise = False

    def draw(self, target: Tensor, generator: torch.Generator | None = None) -> Draws:
        """See :class:`~mail_agents.objectives.Objective`; draws nothing."""

    def training_loss(
        self, net: ActionNet, target: Tensor, mask: Tensor | None = None, draws: Draws = None
    ) -> Tensor:
        """See :class:`~mail_agents.objectives.Objective`."""
        return masked_mse(net(None, None), target, mask)

    def draw_noise(
        self,
        shape: tuple[int, int, int],
        generators: Sequence[torch.Generator],
        *,
        deterministic: bool,
        like: Tensor,
    ) -> Tensor | None:
        """See :class:`~mail_agents.objectives.Objective`; draws nothing with either flag."""

    def sample(self, net: PlanNet, noise: Tensor | None, *, low: Tensor, high: Tensor) -> Tensor:
        """See :class:`~mail_agents.objectives.Objective`."""
        return net(None, None)
