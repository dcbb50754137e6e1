"""What every trunk offers, and the pieces that several of them are made of."""

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError, unknown_name

Activation = Literal["relu", "gelu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}

#: Epsilon of every norm (GPT-2, and ``mamba_config`` of aopolin-lv/DecisionMamba).
EPS = 1e-5


@runtime_checkable
class Trunk(Protocol):
    """A causal map of token sequences; its last operation is a norm.

    ``mask`` (B, L) bool is False at tokens that must not influence others, such as the padding in
    front of a window that begins before its episode. What comes out there has no meaning. Padding
    behind the valid tokens needs no mask, because the map is causal.
    """

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        ...


@runtime_checkable
class StreamingTrunk(Trunk, Protocol):
    """A trunk that can also be fed token by token, in constant time per token.

    A state is a nest of tuples whose leaves are tensors with the batch as first axis, so that rows
    can be selected and replaced with :func:`map_state`. States are immutable.
    """

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Returns the state before the first token."""
        ...

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Maps one token (B, D) to (B, D) and returns the state after it."""
        ...


def map_state(function: Callable[..., Tensor], state: Any, *others: Any) -> Any:
    """Applies ``function`` to every tensor of a state, and to the same tensor of the others.

    Args:
        function: Of as many tensors as there are states; returns a tensor.
        state: State of a :class:`StreamingTrunk`.
        others: More states of the same trunk.

    Returns:
        A state of the same structure.

    Example:
        ``map_state(lambda t: t[rows], state)`` selects rows;
        ``map_state(lambda t, new: t.index_copy(0, rows, new), state, of_rows)`` puts them back.
    """
    if isinstance(state, Tensor):
        return function(state, *others)
    parts = [map_state(function, *same) for same in zip(state, *others, strict=True)]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def feed_forward(d_model: int, dropout: float, activation: Activation) -> nn.Sequential:
    """Two linear layers, four times as wide in between, with dropout at the end (GPT-2).

    Raises:
        UnknownNameError: There is no such activation.
    """
    if activation not in _ACTIVATIONS:
        raise unknown_name("activation", activation, _ACTIVATIONS)
    return nn.Sequential(
        nn.Linear(d_model, 4 * d_model),
        _ACTIVATIONS[activation](),
        nn.Linear(4 * d_model, d_model),
        nn.Dropout(dropout),
    )


def init_gpt2(module: nn.Module) -> None:
    """Draws the weights of every linear layer inside from N(0, 0.02) and zeroes its bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def check_layers(layers: int) -> None:
    """Refuses an empty trunk.

    Raises:
        InvalidInputError: ``layers`` is smaller than one.
    """
    if layers < 1:
        raise InvalidInputError(f"A trunk needs at least one layer, got layers={layers}.")
