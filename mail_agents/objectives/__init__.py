"""Objectives: how a network is trained to produce actions, and how actions are drawn from it.

An objective knows nothing about observations or architecture. It sees a function
``net(noisy, t)`` that maps a noisy action chunk ``(B, J, A)`` and diffusion steps (both None for
objectives without noise) to a chunk ``(B, J, A)``. Steps are ``(B,)`` in training; sampling goes
through them one at a time, all rows together, so that they are plain integers there.

Random numbers are drawn apart from the computation, in training and in sampling: what is left is
deterministic, and can be compiled or captured.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mail_agents.errors import InvalidInputError

#: Diffusion steps ``(B,)`` int64 and noise ``(B, J, A)``, or None for an objective without noise.
Draws = tuple[Tensor, Tensor] | None


class ActionNet(Protocol):
    """What an objective trains: see the module's docstring."""

    def __call__(self, noisy: Tensor | None, t: Tensor | None, /) -> Tensor:
        """Maps ``(B, J, A)`` noisy actions and ``(B,)`` int64 steps, or None, to ``(B, J, A)``."""
        ...


class PlanNet(Protocol):
    """What an objective samples: see the module's docstring."""

    def __call__(self, noisy: Tensor | None, step: int | None, /) -> Tensor:
        """Maps ``(B, J, A)`` noisy actions, all at one step, or None, to ``(B, J, A)``."""
        ...


class Objective(Protocol):
    """A training loss and a sampler."""

    #: Whether the network is given noisy actions and a diffusion step.
    conditions_on_noise: bool

    def draw(self, target: Tensor, generator: torch.Generator | None = None) -> Draws:
        """Draws what the loss of normalised targets ``(B, J, A)`` needs, or None for nothing.

        Args:
            target: Only shape, dtype and device matter.
            generator: Source of the draws; None uses torch's global one.
        """
        ...

    def training_loss(
        self, net: ActionNet, target: Tensor, mask: Tensor | None = None, draws: Draws = None
    ) -> Tensor:
        """Returns the scalar loss for normalised targets ``(B, J, A)``.

        Args:
            net: The network.
            target: Normalised actions.
            mask: ``(B, J)`` bool, True where the target is real; others are ignored entirely.
            draws: Of :meth:`draw`; given them, the loss is deterministic and can be compiled.
                None draws from torch's global stream.
        """
        ...

    def draw_noise(
        self,
        shape: tuple[int, int, int],
        generators: Sequence[torch.Generator],
        *,
        deterministic: bool,
        like: Tensor,
    ) -> Tensor | None:
        """Draws what :meth:`sample` needs for chunks of a shape, or None for nothing.

        Args:
            shape: ``(B, J, A)``.
            generators: One per row, so that a row does not depend on its neighbours.
            deterministic: Draw no random numbers.
            like: Gives dtype and device.

        Raises:
            InvalidInputError: There is not one generator per row.
        """
        ...

    def sample(self, net: PlanNet, noise: Tensor | None, *, low: Tensor, high: Tensor) -> Tensor:
        """Makes a chunk per row, without random numbers of its own.

        Args:
            net: The network.
            noise: Of :meth:`draw_noise`.
            low: ``(A,)`` smallest normalised training action per dimension.
            high: ``(A,)`` largest, like ``low``.

        Returns:
            ``(B, J, A)`` normalised actions.
        """
        ...


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error over the valid steps of ``(B, J, A)`` chunks.

    Args:
        prediction: ``(B, J, A)``.
        target: ``(B, J, A)``.
        mask: ``(B, J)`` bool, or None when every step is valid. With no valid step at all the
            result is zero.
    """
    if mask is None:
        return (prediction - target).square().mean()
    # A padded target may hold anything, and 0 * inf is NaN: replace it, do not weigh it with 0.
    valid = mask.unsqueeze(-1)
    error = (prediction - torch.where(valid, target, prediction.detach())).square()
    return error.sum() / (mask.sum().clamp(min=1) * prediction.shape[-1])


def check_generators(generators: Sequence[torch.Generator], batch_size: int) -> None:
    """Refuses a generator list that is not one per row.

    Raises:
        InvalidInputError: The lengths differ.
    """
    if len(generators) != batch_size:
        raise InvalidInputError(
            f"Sampling needs one generator per row: got {len(generators)} for {batch_size} rows."
        )
