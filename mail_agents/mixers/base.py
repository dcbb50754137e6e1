"""What sequence mixers offer: whole sequences, and single steps where they are causal."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError


@runtime_checkable
class Mixer(Protocol):
    """A map of sequences (B, L, D) -> (B, L, D).

    ``causal`` says whether outputs depend on no later input. Only then is there a state to carry
    from one step to the next, see :class:`CausalMixer`.

    ``mask`` (B, L) bool is False at steps that must not influence anything, and leading steps are
    the intended use (a window that begins before its episode does): a sequence with masked steps
    in front equals the sequence without them. A mixer returns zeros there.
    """

    causal: bool

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        ...


class CausalMixer(Mixer, Protocol):
    """A :class:`Mixer` that can also run step by step. Whether one is, its ``causal`` tells.

    ``step`` over the tokens of a sequence, from ``init_state``, gives what ``__call__`` gives for
    the whole sequence; ``prefill`` does the same for a prefix at once and returns its state.
    States are immutable: every method returns a new one.
    """

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


class NotCausalError(InvalidInputError, AttributeError):
    """What is not causal was asked for states or steps; ``hasattr`` takes it as an answer."""


class NonCausalMixer(nn.Module):
    """Base of mixers that read sequences from both ends; asking them for a state says why not."""

    causal = False

    def __getattr__(self, name: str) -> Any:
        if name in ("init_state", "step", "prefill"):
            raise no_states(type(self).__name__, name)
        return super().__getattr__(name)


def no_states(what: str, asked: str) -> NotCausalError:
    """Builds the refusal of ``asked`` (a method) by ``what``, which is not causal."""
    return NotCausalError(
        f"{what} has no {asked}: every output depends on later tokens, so there is no state to "
        "carry from one step to the next. Give it the whole sequence at once, or stream with a "
        "causal mixer: 'mamba', 'mamba2' or 'attention'."
    )


def zero_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns ``x`` (B, L, D) with zeros where ``mask`` (B, L) is False, whatever was there.

    Raises:
        InvalidInputError: The mask has another shape or is not of bools.
    """
    if mask is None:
        return x
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise InvalidInputError(
            f"A mask is a bool per step, {tuple(x.shape[:2])} for tokens {tuple(x.shape)}; got "
            f"{mask.dtype} {tuple(mask.shape)}. Numbers become bools with mask > 0."
        )
    return x.masked_fill(~mask.unsqueeze(-1), 0.0)
