"""Block of figure 2 of the multi-grained Decision Mamba paper (Lv et al. 2024, arXiv 2406.05427).

The figure draws three projections of the normalised tokens (coarse, fine, gate), a convolution, an
activation and a selective scan for coarse and fine each, a multiplication of both with the one
gate, their sum, and one output projection. It gives no sizes. Ours: the inner width is twice the
outer one, and both convolutions are depthwise, as in Mamba.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mail_agents.mixers.base import zero_masked
from mail_agents.mixers.mamba import MambaState, init_step_size
from mail_agents.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from mail_agents.ops.selective_scan import selective_scan, selective_scan_step
from mail_baselines.trunks.base import EPS
from mail_baselines.trunks.grouping import (
    GroupState,
    advance_group,
    group,
    group_mask,
    hold,
    initial_group,
)

_EXPAND, _STATE, _WIDTH = 2, 16, 4


class _Scan(nn.Module):
    """Input-dependent parameters of a selective scan, and the scan; no gate, no projections.

    Args:
        d_model: Width outside of the block; the rank of the step sizes is a 16th of it.
        d_inner: Width of what is scanned.
        backend: Kernel backend.
    """

    def __init__(self, d_model: int, d_inner: int, backend: str) -> None:
        super().__init__()
        self.sizes = [math.ceil(d_model / 16), _STATE, _STATE]
        self.backend = backend
        self.x_proj = nn.Linear(d_inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(self.sizes[0], d_inner)
        init_step_size(self.dt_proj)
        self.A_log = nn.Parameter(torch.arange(1.0, _STATE + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        # Markers that the optimiser looks for, as on mail_agents.mixers.Mamba.
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.D._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, u: Tensor, mask: Tensor | None) -> Tensor:
        dt, B, C = self._select(u)
        if mask is not None:
            dt = dt.masked_fill(~mask.unsqueeze(-1), -math.inf)
        bias, backend = self.dt_proj.bias, self.backend
        return selective_scan(
            *(u, dt, self._decay(), B, C, self.D), delta_bias=bias, backend=backend
        )

    def init_state(self, token: Tensor) -> Tensor:
        """Returns the zero state for rows like ``token`` (B, d_inner)."""
        wide = torch.promote_types(token.dtype, torch.float32)
        return token.new_zeros(*token.shape, _STATE, dtype=wide)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        dt, B, C = self._select(u)
        bias = self.dt_proj.bias
        return selective_scan_step(*(state, u, dt, self._decay(), B, C, self.D), delta_bias=bias)

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dt, B, C = self.x_proj(u).split(self.sizes, dim=-1)
        return F.linear(dt, self.dt_proj.weight), B, C

    def _decay(self) -> Tensor:
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))


class SharedGateBlock(nn.Module):
    """``x += out_proj((coarse(x_c) + hold(fine(groups of x_f))) * silu(z))``.

    ``x_c``, ``x_f`` and ``z`` are projections of ``norm(x)``; see the module docstring.

    Args:
        d_model: Width D.
        tokens_per_step: Size of a group.
        backend: Kernel backend, see :mod:`mail_agents.ops.backends`.
    """

    def __init__(self, d_model: int, tokens_per_step: int, backend: str) -> None:
        super().__init__()
        inner = _EXPAND * d_model
        self.size, self.backend = tokens_per_step, backend
        self.norm = nn.RMSNorm(d_model, eps=EPS)
        self.in_proj = nn.Linear(d_model, 3 * inner, bias=False)
        # Containers for weights and their initialisation; the ops do the work.
        self.conv = nn.Conv1d(inner, inner, _WIDTH, groups=inner)
        self.group_conv = nn.Conv1d(inner, inner, tokens_per_step, groups=inner)
        self.coarse = _Scan(d_model, inner, backend)
        self.fine = _Scan(d_model, inner, backend)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        xc, xf, z = self.in_proj(zero_masked(self.norm(x), mask)).chunk(3, dim=-1)
        weight, bias = self.conv.weight.squeeze(1), self.conv.bias
        coarse = self.coarse(causal_conv1d(xc, weight, bias, backend=self.backend), mask)
        valid = group_mask(mask, self.size)
        fine = zero_masked(self.fine(self._merge(group(xf, self.size)), valid), valid)
        y = coarse + hold(fine, x.shape[1], self.size)
        return x + zero_masked(self.out_proj(y * F.silu(z)), mask)

    def init_state(
        self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> GroupState:
        """Returns the state before the first token."""
        inner = self.out_proj.in_features
        token = self.out_proj.weight.new_zeros(batch_size, inner, device=device, dtype=dtype)
        history = token.unsqueeze(1).repeat(1, _WIDTH - 1, 1)
        coarse = MambaState(history, self.coarse.init_state(token))
        return initial_group(coarse, self.fine.init_state(token), token, token, self.size)

    def step(self, x: Tensor, state: GroupState, closes: Tensor | None) -> tuple[Tensor, Any]:
        """Maps (B, D); ``closes`` (B,) says where a group is complete, None if nowhere."""
        xc, xf, z = self.in_proj(self.norm(x)).chunk(3, dim=-1)
        weight, bias = self.conv.weight.squeeze(1), self.conv.bias
        xc, history = causal_conv1d_step(xc, state.coarse.history, weight, bias)
        coarse, ssm = self.coarse.step(xc, state.coarse.ssm)
        state = state._replace(coarse=MambaState(history, ssm))
        state = advance_group(state, xf, closes, self._fine_step)
        return x + self.out_proj((coarse + state.held) * F.silu(z)), state

    def _fine_step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.fine.step(self._merge(tokens), state)

    def _merge(self, groups: Tensor) -> Tensor:
        """Maps groups (..., size, D) to (..., D), every channel by itself."""
        merged = (groups * self.group_conv.weight.squeeze(1).T).sum(-2)
        return F.silu(merged + cast(Tensor, self.group_conv.bias))
