"""Parts that several state space mixers share."""

import math
from typing import Any

from torch import Tensor, nn

from mail_agents.errors import InvalidInputError
from mail_agents.ops.causal_conv1d import causal_conv1d


def check_sizes(mixer: str, **sizes: Any) -> None:
    """Refuses sizes smaller than one; what is no number is only named.

    Raises:
        InvalidInputError: A size is smaller than one.
    """
    if any(isinstance(size, int) and size < 1 for size in sizes.values()):
        given = ", ".join(f"{name}={size!r}" for name, size in sizes.items())
        raise InvalidInputError(f"{mixer} sizes have to be positive, got {given}.")


def conv_weights(channels: int, width: int, bias: bool) -> nn.Conv1d:
    """Returns a container for the weights of a short convolution, so that their names match.

    :func:`convolve` does the work; the module itself is never called.
    """
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias)


def convolve(
    conv: nn.Conv1d, x: Tensor, backend: str, history: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Convolves (B, L, channels) causally, with SiLU.

    Args:
        conv: The weights.
        x: Input.
        backend: See :mod:`mail_agents.ops.backends`.
        history: Inputs before it, (B, W-1, channels).
        keep: Whether to return the next history, else None.
    """
    found = causal_conv1d(
        *(x, conv.weight.squeeze(1), conv.bias),
        history=history,
        return_history=keep,
        backend=backend,
    )
    return found if keep else (found, None)


def skip_masked(dt: Tensor, mask: Tensor | None) -> Tensor:
    """Returns raw step sizes (B, L, .) with -inf, a step of size zero, where ``mask`` is False."""
    return dt if mask is None else dt.masked_fill(~mask.unsqueeze(-1), -math.inf)
