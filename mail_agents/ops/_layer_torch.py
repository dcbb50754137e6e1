"""A stream of tokens through a stack of Mamba-1 layers in plain PyTorch, without a compiler.

At a few rows the time of a step is that of calling operations, so there are few: no modules in
between, states that change in place, exp2, which is several times faster than exp on CPUs, and a
convolution in one operation, which keeps sums of what past inputs will add instead of the inputs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mail_agents.ops._layer_native import LayerStack, LayerWeights

_LOG2E = math.log2(math.e)


class TorchStream:
    """Streams of ``batch`` rows; see :class:`~mail_agents.mixers.stream.MambaStream`."""

    backend = "torch"

    def __init__(self, stack: LayerStack, batch: int) -> None:
        self._eps, self._last_norm = stack.eps, _views(stack.last_norm)
        layers = (LayerWeights(*_views(p)) for p in stack.parameters)
        self._layers = [_LayerStream(p, stack.eps, batch) for p in layers]

    def step(self, x: Tensor, aggregate: Tensor | None) -> Tensor:
        """Advances all layers by one token (B, d)."""
        for layer in self._layers:
            x = layer.step(x)
            if aggregate is not None:
                x.add_(aggregate)
        weight, bias = self._last_norm
        return x if weight is None else torch.layer_norm(x, x.shape[1:], weight, bias, self._eps)

    def reset(self, rows: Tensor) -> None:
        """Starts the rows anew at which ``rows`` (B,) bool is True."""
        for layer in self._layers:
            layer.reset(rows)


def _views(parameters: Sequence[Tensor | None]) -> list[Any]:
    """The same memory, also where a parameter is given other memory later."""
    return [None if p is None else p.detach() for p in parameters]


class _LayerStream:
    """One layer.

    What is known of this and the next W outputs of the convolution, (B, W + 1, D), goes back and
    forth between two buffers; of the last one, that is the bias.
    """

    def __init__(self, p: LayerWeights, eps: float, batch: int) -> None:
        self._p, self._eps = p, eps
        (inner, n), width = p.A_log.shape, p.conv_weight.shape[-1]
        self._sizes = (p.dt_weight.shape[1], n, n)
        self._ssm = p.A_log.new_zeros(batch, n, inner)
        self._buffers = p.A_log.new_zeros(2, batch, width + 1, inner).unbind()
        self.reset(torch.ones(batch, dtype=torch.bool))

    def _read_weights(self) -> None:
        """Puts decay rates and taps in the layout of the state."""
        p = self._p
        self._decay = p.A_log.t().exp().mul_(-_LOG2E).contiguous()
        self._taps = p.conv_weight.squeeze(1).t().flip(0).contiguous()
        self._bias = torch.zeros_like(p.D) if p.conv_bias is None else p.conv_bias
        for sums in self._buffers:
            sums[:, -1] = self._bias

    def step(self, x: Tensor) -> Tensor:
        p, (old, new) = self._p, self._buffers
        self._buffers = new, old
        residual = p.norm_weight is not None
        normed = x
        if residual:
            normed = torch.layer_norm(x, x.shape[1:], p.norm_weight, p.norm_bias, self._eps)
        u, z = F.linear(normed, p.in_weight, p.in_bias).chunk(2, 1)
        torch.addcmul(old[:, 1:], self._taps, u.unsqueeze(1), out=new[:, :-1])
        u = F.silu(new[:, 0])
        dt, B, C = F.linear(u, p.x_weight).split_with_sizes(self._sizes, 1)
        dt = F.softplus(F.linear(dt, p.dt_weight, p.dt_bias))
        decay = (dt.unsqueeze(1) * self._decay).exp2_()
        self._ssm.mul_(decay).addcmul_(B.unsqueeze(2), (dt.mul_(u)).unsqueeze(1))
        y = torch.bmm(C.unsqueeze(1), self._ssm).squeeze(1).addcmul_(u, p.D).mul_(F.silu(z))
        if not residual:
            return F.linear(y, p.out_weight, p.out_bias)
        out = torch.addmm(x, y, p.out_weight.t())
        return out if p.out_bias is None else out.add_(p.out_bias)

    def reset(self, rows: Tensor) -> None:
        self._read_weights()
        self._ssm[rows] = 0.0
        for sums in self._buffers:
            sums[rows] = self._bias
