"""Inference of a stack of Mamba-1 layers in one call of ``native/layer.cpp``.

Between operations on single tokens, dispatch costs more than arithmetic; here there is one call for
all layers. Parameters are read where they are at every call: nothing is packed or kept.
"""

import ctypes
import functools
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mail_agents.ops._native import threads
from mail_agents.ops._native_call import address, library


class LayerWeights(NamedTuple):
    """Parameters of one layer, contiguous and float32, in the order in which the kernel has them.

    ``d`` is the width outside, ``D`` inside, ``N`` the state size, ``R`` the rank of the step size
    projection and ``W`` the width of the convolution. The norm is absent in a layer without
    residual connection.
    """

    norm_weight: Tensor | None  # (d,)
    norm_bias: Tensor | None  # (d,)
    in_weight: Tensor  # (2 D, d)
    in_bias: Tensor | None  # (2 D,)
    conv_weight: Tensor  # (D, 1, W)
    conv_bias: Tensor | None  # (D,)
    x_weight: Tensor  # (R + 2 N, D)
    dt_weight: Tensor  # (D, R)
    dt_bias: Tensor  # (D,)
    A_log: Tensor  # (D, N)
    D: Tensor  # (D,)
    out_weight: Tensor  # (d, D)
    out_bias: Tensor | None  # (d,)

    def fits(self) -> bool:
        """Whether all that has to be there is, in these shapes."""
        widths = (self.in_weight, self.conv_weight, self.dt_weight, self.A_log)
        if any(p is None or p.dim() < 2 for p in widths):
            return False
        d, (D, N), R = self.in_weight.shape[1], self.A_log.shape, self.dt_weight.shape[1]
        shapes = LayerWeights(
            *((d,), (d,), (2 * D, d), (2 * D,), (D, 1, self.conv_weight.shape[-1]), (D,)),  # type: ignore[arg-type]
            *((R + 2 * N, D), (D, R), (D,), (D, N), (D,), (d, D), (d,)),  # type: ignore[arg-type]
        )
        for name, given in self._asdict().items():
            if given is None and name not in _OPTIONAL:
                return False
            if given is not None and given.shape != getattr(shapes, name):
                return False
        return True


_OPTIONAL = ("norm_weight", "norm_bias", "in_bias", "conv_bias", "out_bias")

#: History (B, W-1, D) and state (B, D, N) of a layer.
State = tuple[Tensor, Tensor]


class Table(NamedTuple):
    """States as the kernel sees them, and the tensors that live only for it."""

    rows: "array[int]"
    kept: list[Tensor]


class LayerStack:
    """The layers as the kernel sees them: addresses of parameters, which must not change.

    Args:
        layers: Parameters; shapes are the same in all layers.
        last_norm: Weight and bias of the norm after the layers, each of which may be absent.
        eps: Of all norms.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        last_norm: tuple[Tensor | None, Tensor | None],
        eps: float,
    ) -> None:
        first = layers[0]
        self.d_inner, self.d_state = first.A_log.shape
        self.d_conv = first.conv_weight.shape[-1]
        self.d_model, rank = first.in_weight.shape[1], first.dt_weight.shape[1]
        self.parameters, self.last_norm, self.eps = layers, last_norm, eps
        self._shape = (self.d_model, self.d_inner, self.d_state, self.d_conv, rank)
        self._residual = int(first.norm_weight is not None)
        self._weights = array("q", [address(part) or 0 for layer in layers for part in layer])
        self._last = [address(part) for part in last_norm]
        self._known: tuple[tuple[int, int, int], Any, int] = ((0, 0, 0), None, 0)

    def tensors(self) -> list[Tensor | None]:
        """Returns all parameters."""
        return [*chain.from_iterable(self.parameters), *self.last_norm]

    def takes(self, state: Sequence[State | None], batch: int) -> bool:
        """Whether the states of all layers are of the right kind to go on from."""
        if len(state) != len(self.parameters):
            return False
        history, ssm = (batch, self.d_conv - 1, self.d_inner), (batch, self.d_inner, self.d_state)
        for pair in state:
            if pair is None or not (_usable(pair[0], history) and _usable(pair[1], ssm)):
                return False
        return True

    def run(
        self,
        x: Tensor,
        state: Sequence[State] | None,
        aggregate: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, list[State]]:
        """Runs all layers over float32 tokens on the CPU, at least one, without gradients.

        Args:
            x: (B, L, d), or (B, d) for single tokens.
            state: What :meth:`takes` accepts, or None for zero.
            aggregate: Added to the residual stream after every layer, like ``x``.
            return_state: Whether to return the states after the last token.

        Returns:
            Output like ``x``, and the states (which share memory blocks), or an empty list.
        """
        new, blocks = self._states(x, x.shape[0]) if return_state else ([], (0, 0))
        old = None if state is None else _table(state)
        return self.call(x, old, aggregate, blocks), new

    def call(
        self, x: Tensor, old: Table | None, aggregate: Tensor | None, new: tuple[int, int]
    ) -> Tensor:
        """Like :meth:`run`, from the states ``old`` into memory at ``new``.

        Args:
            x: (B, L, d) or (B, d).
            old: Where the states are, or None for zero.
            aggregate: Like ``x``.
            new: Addresses for all histories (layers, B, W-1, D) and all other states
                (layers, B, N, D), which may be those of ``old``; (0, 0) for none.
        """
        kernels = _declared(library())
        length, workers = 1 if x.dim() == 2 else x.shape[1], threads()
        sizes, scratch = self._sizes_for(kernels, x.shape[0], length, workers)
        x = x.contiguous()
        out = torch.empty_like(x)
        aggregate = None if aggregate is None else aggregate.contiguous()
        memory = x.new_empty(scratch)
        kernels.mamba_layers(
            sizes.buffer_info()[0],
            self._weights.buffer_info()[0],
            None if old is None else old.rows.buffer_info()[0],
            *self._last,
            x.data_ptr(),
            address(aggregate),
            out.data_ptr(),
            *new,
            memory.data_ptr(),
            self.eps,
            workers,
        )
        return out

    def _sizes_for(
        self, kernels: ctypes.CDLL, batch: int, length: int, workers: int
    ) -> "tuple[array[int], int]":
        """Sizes for the kernel, and the floats of scratch memory it needs for them."""
        key = (batch, length, workers)
        known, sizes, scratch = self._known
        if known != key:
            sizes = array("q", [len(self.parameters), batch, length, *self._shape, self._residual])
            scratch = kernels.mamba_layers_scratch(sizes.buffer_info()[0], workers)
            self._known = key, sizes, scratch
        return sizes, scratch

    def _states(self, x: Tensor, batch: int) -> tuple[list[State], tuple[int, int]]:
        """Uninitialised states, and the addresses of all histories and of all other parts."""
        lead = (len(self.parameters), batch)
        histories = x.new_empty(*lead, self.d_conv - 1, self.d_inner)
        # Channels are neighbours in memory, as the kernel works on them.
        ssms = x.new_empty(*lead, self.d_state, self.d_inner)
        found = zip(histories.unbind(), ssms.transpose(2, 3).unbind(), strict=True)
        return list(found), (histories.data_ptr(), ssms.data_ptr())


class NativeStream:
    """Streams of ``batch`` rows; see :class:`~mail_agents.mixers.stream.MambaStream`.

    Addresses are looked up once. Parameters are held by views of them, so that memory stays valid
    even where a parameter is given other memory meanwhile.
    """

    backend = "native"

    def __init__(self, stack: LayerStack, batch: int) -> None:
        self._stack = stack
        self._kept = [None if p is None else p.detach() for p in stack.tensors()]
        lead = (len(stack.parameters), batch)
        like = stack.parameters[0].D.detach()
        self._histories = like.new_zeros(*lead, stack.d_conv - 1, stack.d_inner)
        self._ssms = like.new_zeros(*lead, stack.d_state, stack.d_inner)
        states = zip(self._histories, self._ssms.transpose(2, 3), strict=True)
        self._table = _table(list(states))
        self._new = self._histories.data_ptr(), self._ssms.data_ptr()

    def step(self, x: Tensor, aggregate: Tensor | None) -> Tensor:
        """Advances all layers by one token (B, d)."""
        return self._stack.call(x, self._table, aggregate, self._new)

    def reset(self, rows: Tensor) -> None:
        """Starts the rows anew at which ``rows`` (B,) bool is True."""
        self._histories[:, rows] = 0.0
        self._ssms[:, rows] = 0.0


def _table(state: Sequence[State]) -> Table:
    """Addresses and strides of states."""
    rows, kept = array("q"), []
    for history, ssm in state:
        row, step, channel = history.stride()
        if channel != 1:
            history = history.contiguous()
            row, step, channel = history.stride()
            kept.append(history)
        strides = ssm.stride()
        if strides[1] != 1 and strides[2] != 1:
            ssm = ssm.contiguous()
            strides = ssm.stride()
            kept.append(ssm)
        rows.extend((history.data_ptr(), row, step, ssm.data_ptr(), *strides))
    return Table(rows, kept)


def _usable(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.shape == shape
        and not tensor.is_neg()
    )


@functools.cache
def _declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    kernels.mamba_layers.argtypes = [*[pointer] * 11, ctypes.c_float, size]
    kernels.mamba_layers.restype = None
    kernels.mamba_layers_scratch.argtypes = [pointer, size]
    kernels.mamba_layers_scratch.restype = size
    return kernels
