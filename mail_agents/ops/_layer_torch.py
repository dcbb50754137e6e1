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

from mail_agents.ops._layer_native import LayerStack, LayerWeights, State

_LOG2E = math.log2(math.e)


def step(
    stack: LayerStack, x: Tensor, state: Sequence[State], aggregate: Tensor | None
) -> tuple[Tensor, list[State]]:
    """Advances all layers by one token; gradients have to be off.

    Args:
        stack: The layers.
        x: Tokens, (B, d).
        state: History and recurrent state of every layer; not modified.
        aggregate: Added to the residual stream after every layer, (B, d).

    Returns:
        Output (B, d), and the states after it.
    """
    after = []
    sizes = (stack.parameters[0].dt_weight.shape[1], stack.d_state, stack.d_state)
    for p, views, old in zip(stack.parameters, stack.transposed, state, strict=True):
        x, new = _layer_step(p, *views, sizes, stack.eps, x, old)
        if aggregate is not None:
            x.add_(aggregate)
        after.append(new)
    if stack.last_norm[0] is not None:
        x = torch.layer_norm(x, x.shape[1:], *stack.last_norm, stack.eps)
    return x, after


def _layer_step(
    p: LayerWeights,
    taps: Tensor,
    out_weight: Tensor,
    sizes: tuple[int, int, int],
    eps: float,
    x: Tensor,
    old: State,
) -> tuple[Tensor, State]:
    history, ssm = old
    residual = p.norm_weight is not None
    normed = torch.layer_norm(x, x.shape[1:], p.norm_weight, p.norm_bias, eps) if residual else x
    u, z = F.linear(normed, p.in_weight, p.in_bias).chunk(2, 1)
    window = torch.cat((history, u.unsqueeze(1)), 1)
    u = (window * taps).sum(1)
    if p.conv_bias is not None:
        u.add_(p.conv_bias)
    u = torch._C._nn.silu_(u)
    dt, B, C = F.linear(u, p.x_weight).split_with_sizes(sizes, 1)
    dt = F.softplus(F.linear(dt, p.dt_weight, p.dt_bias))
    new = dt.unsqueeze(2) * p.A_log.exp().mul_(-_LOG2E)
    new.exp2_().mul_(ssm).addcmul_((dt * u).unsqueeze(2), B.unsqueeze(1))
    y = (new * C.unsqueeze(1)).sum(2).addcmul_(u, p.D).mul_(torch._C._nn.silu(z))
    out = torch.addmm(x, y, out_weight) if residual else torch.mm(y, out_weight)
    if p.out_bias is not None:
        out.add_(p.out_bias)
    return out, (window[:, 1:], new)
