"""Tokens through a Mamba stack one after another, with states that stay where they are.

For control loops: a step costs the same however many came before it, and nothing is allocated but
its output. :meth:`~mail_agents.mixers.stack.MambaStack.step` does the same for states that are
values, and looks at every call whether the module is still what it was.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from mail_agents.errors import InvalidInputError
from mail_agents.ops._layer_native import LayerStack, NativeStream
from mail_agents.ops._layer_torch import TorchStream
from mail_agents.ops._native import load
from mail_agents.ops.backends import Candidate, choose, requested_backend


class _Stream(Protocol):
    backend: str

    def step(self, x: Tensor, aggregate: Tensor | None) -> Tensor: ...

    def reset(self, rows: Tensor) -> None: ...


class MambaStream:
    """Independent streams through one stack, one per batch row.

    Made by :meth:`~mail_agents.mixers.stack.MambaStack.stream`.

    Weights that are changed in place (training, ``load_state_dict``) count from the next
    :meth:`reset` on at the latest. After a conversion of the stack (``to``, ``half``) or a
    replacement of its parts, make a new one: this one keeps the weights it was made with.

    Attributes:
        backend: What makes the steps: ``native``, ``torch``, or ``modules`` where the stack has to
            be called as it stands (other mixers, other dtypes, a GPU, hooks).

    Args:
        stack: A stack of causal mixers.
        batch_size: Number of rows.
        layers: Its parameters and their ``backend``, where calling its modules is not needed.

    Raises:
        InvalidInputError: There is no row, or a backend named explicitly cannot run.
    """

    def __init__(self, stack: Any, batch_size: int, layers: tuple[LayerStack, str] | None) -> None:
        if batch_size < 1:
            raise InvalidInputError(f"A stream needs at least one row, got {batch_size=}.")
        weight = stack.norm_f.weight
        self._like = ((batch_size, weight.numel()), weight.dtype, weight.device)
        self._stream = _make(stack, batch_size, layers)
        self.backend = self._stream.backend

    @torch.inference_mode()
    def step(self, x: Tensor, aggregate: Tensor | None = None) -> Tensor:
        """Maps the next token of every row (B, D) to (B, D).

        Args:
            x: Tokens.
            aggregate: Added to the residual stream after every layer, (B, D).

        Raises:
            InvalidInputError: A shape, dtype or device is not that of the stream.
        """
        for name, given in (("x", x), ("aggregate", aggregate)):
            if given is not None and (given.shape, given.dtype, given.device) != self._like:
                shape, dtype, device = self._like
                raise InvalidInputError(
                    f"A stream takes one token per row: {name} is {tuple(given.shape)}, "
                    f"{given.dtype} on {given.device}; expected {shape}, {dtype} on {device}."
                )
        return self._stream.step(x, aggregate)

    @torch.inference_mode()
    def reset(self, rows: Tensor | None = None) -> None:
        """Starts rows anew: all, or those where ``rows`` (B,) bool is True.

        Raises:
            InvalidInputError: ``rows`` has another shape or dtype.
        """
        (batch, _), _, device = self._like
        chosen = torch.ones(batch, dtype=torch.bool, device=device) if rows is None else rows
        if chosen.shape != (batch,) or chosen.dtype != torch.bool:
            raise InvalidInputError(
                f"reset takes a bool per row ({batch},), got {chosen.dtype} {tuple(chosen.shape)}."
            )
        self._stream.reset(chosen)


class _ModuleStream:
    """Calls the stack."""

    backend = "modules"

    def __init__(self, stack: Any, batch: int) -> None:
        self._stack = stack
        self._state = stack.init_state(batch)

    def step(self, x: Tensor, aggregate: Tensor | None) -> Tensor:
        y, self._state = self._stack.step(x, self._state, aggregate)
        return y

    def reset(self, rows: Tensor) -> None:
        self._state = tuple(layer.reset(rows) for layer in self._state)


_CANDIDATES = (
    Candidate("native", NativeStream, lambda *_: load().failure or None),
    Candidate("torch", TorchStream, lambda *_: None),
)


def _make(stack: Any, batch: int, layers: tuple[LayerStack, str] | None) -> _Stream:
    if layers is None or requested_backend(layers[1]) not in ("auto", "native", "torch"):
        return _ModuleStream(stack, batch)
    return choose("mamba_stream", _CANDIDATES, layers[1]).run(layers[0], batch)
