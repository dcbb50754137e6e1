"""One step of a stack of Mamba-1 layers in plain PyTorch, for inference without a compiler.

At a few rows the time of a step is that of calling operations, so there are few: no modules in
between, in-place where nobody else sees the tensor, and exp2, which is several times faster than
exp on CPUs.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mail_agents.ops._layer_native import LayerWeights, State

_LOG2E = math.log2(math.e)


def step(
    layers: Sequence[LayerWeights],
    last_norm: tuple[Tensor | None, Tensor | None],
    eps: float,
    x: Tensor,
    state: Sequence[State],
    aggregate: Tensor | None,
) -> tuple[Tensor, list[State]]:
    """Advances all layers by one token (B, d); gradients have to be off.

    See :class:`mail_agents.ops._layer_native.LayerStack` for the other arguments.
    """
    after = []
    rank, n = layers[0].dt_weight.shape[1], layers[0].A_log.shape[1]
    for weights, old in zip(layers, state, strict=True):
        x, new = _layer_step(weights, (rank, n, n), eps, x, old)
        if aggregate is not None:
            x.add_(aggregate)
        after.append(new)
    if last_norm[0] is not None:
        x = torch.layer_norm(x, x.shape[1:], *last_norm, eps)
    return x, after


def _layer_step(
    p: LayerWeights, sizes: tuple[int, ...], eps: float, x: Tensor, old: State
) -> tuple[Tensor, State]:
    history, ssm = old
    residual = p.norm_weight is not None
    normed = torch.layer_norm(x, x.shape[1:], p.norm_weight, p.norm_bias, eps) if residual else x
    u, z = F.linear(normed, p.in_weight, p.in_bias).chunk(2, 1)
    window = torch.cat((history, u.unsqueeze(1)), 1)
    u = (window * p.conv_weight.squeeze(1).t()).sum(1)
    if p.conv_bias is not None:
        u.add_(p.conv_bias)
    u = torch._C._nn.silu_(u)
    dt, B, C = F.linear(u, p.x_weight).split_with_sizes(sizes, 1)
    dt = F.softplus(F.linear(dt, p.dt_weight, p.dt_bias))
    ssm_new = (dt * -_LOG2E).unsqueeze(2) * p.A_log.exp()
    ssm_new.exp2_().mul_(ssm).addcmul_((dt * u).unsqueeze(2), B.unsqueeze(1))
    y = (ssm_new * C.unsqueeze(1)).sum(2).addcmul_(u, p.D).mul_(torch._C._nn.silu(z))
    if not residual:
        return F.linear(y, p.out_weight, p.out_bias), (window[:, 1:], ssm_new)
    out = torch.addmm(x, y, p.out_weight.t())
    if p.out_bias is not None:
        out.add_(p.out_bias)
    return out, (window[:, 1:], ssm_new)
