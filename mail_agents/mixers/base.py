"""What every sequence mixer offers: a whole sequence at once, or one step at a time."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Mixer(Protocol):
    """A causal map of sequences (B, L, D) -> (B, L, D) that can also run step by step.

    ``step`` over the tokens of a sequence, from ``init_state``, gives what ``__call__`` gives for
    the whole sequence; ``prefill`` does the same for a prefix at once and returns its state.
    States are immutable: every method returns a new one.

    ``mask`` (B, L) bool is False at steps that must not influence anything, and leading steps are
    the intended use (a window that begins before its episode does). A mixer returns zeros there.
    """

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        ...

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Returns the state before the first step."""
        ...

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Maps one token (B, D) to (B, D) and returns the state after it."""
        ...

    def prefill(
        self, x: Tensor, state: Any = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Maps (B, L, D) to (B, L, D) from ``state`` on, and returns the state after it."""
        ...


def zero_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns ``x`` (B, L, D) with zeros where ``mask`` (B, L) is False, whatever was there."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
