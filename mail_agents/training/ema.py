"""Exponential moving average of weights, with the warm-up of diffusion policies."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mail_agents.errors import InvalidInputError


def effective_decay(decay: float, n: int) -> float:
    """Decay of the ``n``-th update (from 1): ``min(decay, (1 + n) / (10 + n))``."""
    return min(decay, (1 + n) / (10 + n))


class EMA(AveragedModel):
    """A copy of a module whose parameters follow the original slowly.

    After the ``n``-th optimiser step, ``ema = d_n ema + (1 - d_n) weights`` with ``d_n =
    min(decay, (1 + n) / (10 + n))``: 2/11 at first, reaching 0.995 at n = 1790 (upstream MaIL).
    Buffers are copied. The original is never touched: act with :attr:`module`, which is in
    evaluation mode.

    Args:
        model: The module to follow; its current weights are the start of the average.
        decay: Largest decay, in [0, 1).

    Raises:
        InvalidInputError: The decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise InvalidInputError(f"An EMA decay must be in [0, 1); got {decay}.")

        def update(averages: Sequence[Tensor], weights: Sequence[Tensor], n: Tensor | int) -> None:
            weight = 1.0 - effective_decay(decay, int(n))
            torch._foreach_lerp_(list(averages), list(weights), weight)  # type: ignore[attr-defined]

        super().__init__(model, multi_avg_fn=update)
        self.module.requires_grad_(False).eval()
        # AveragedModel copies instead of averaging while its counter is 0. The recipe averages
        # from the first update on, so the counter starts at 1: the number of the coming update.
        self.n_averaged.fill_(1)

    def update(self, model: nn.Module) -> None:
        """Averages in the weights of ``model``; call once after every optimiser step."""
        self.update_parameters(model)
