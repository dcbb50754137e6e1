"""Bidirectional Mamba ("Vision Mamba", Zhu et al. 2024, arXiv:2401.09417, section 3.3).

The mixer that its release (``mamba_simple.py``) calls ``bimamba_type="v2"``, and VideoMamba
``bimamba=True``: names and shapes of the parameters are theirs, so state dicts move in both
directions, and so is the order of random draws.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mail_agents.mixers.base import NonCausalMixer, zero_masked
from mail_agents.mixers.mamba import init_step_size, initial_decay, select
from mail_agents.mixers.parts import check_sizes, conv_weights, convolve, skip_masked
from mail_agents.ops._precision import decay_rates
from mail_agents.ops.selective_scan import selective_scan


class BiMamba(NonCausalMixer):
    """Two selective scans, one per direction, between shared input and output projections.

    ``out_proj(f(x, z) + reverse(f_b(reverse(x), reverse(z))))``, where ``f`` is everything that
    :class:`~mail_agents.mixers.mamba.Mamba` does between its projections and ``f_b`` the same with
    parameters of its own.

    Masked steps have no influence, as in Mamba: a sequence with masked steps in front equals the
    sequence without them. Not causal, so it has no states.

    Unlike the releases, which leave ``dt_proj_b`` as torch makes it and so start the second
    direction with step sizes around 0.7, both directions start with Mamba's.

    Args:
        d_model: Width of input and output.
        d_state: State size N per channel.
        d_conv: Width W of the convolutions.
        expand: Inner width in units of ``d_model``.
        dt_rank: Rank of the step size projections; ``"auto"`` is ceil(d_model / 16).
        bias: Whether input and output projections have a bias.
        conv_bias: Whether the convolutions have a bias.
        divide_out: Whether to average the two directions instead of adding them
            (``if_devide_out`` of the release).
        backend: Kernel backend of scans and convolutions, see :mod:`mail_agents.ops.backends`.

    Raises:
        InvalidInputError: A size is smaller than one.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        bias: bool = False,
        conv_bias: bool = True,
        divide_out: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes(
            "BiMamba",
            d_model=d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
        )
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.d_model, self.d_state, self.d_conv, self.dt_rank = d_model, d_state, d_conv, rank
        self.d_inner = inner = expand * d_model
        self.divide_out = divide_out
        self.backend = backend
        projected = rank + 2 * d_state
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv1d = conv_weights(inner, d_conv, conv_bias)
        self.x_proj = nn.Linear(inner, projected, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        init_step_size(self.dt_proj)
        self.A_log, self.D = initial_decay(inner, d_state), nn.Parameter(torch.ones(inner))
        self.conv1d_b = conv_weights(inner, d_conv, conv_bias)
        self.x_proj_b = nn.Linear(inner, projected, bias=False)
        self.dt_proj_b = nn.Linear(rank, inner)
        self.A_b_log, self.D_b = initial_decay(inner, d_state), nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        # Last, so that every other draw is the one of the release.
        init_step_size(self.dt_proj_b)
        for parameter in (self.A_log, self.D, self.A_b_log, self.D_b):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        for projection in (self.dt_proj, self.dt_proj_b):
            projection.bias._no_reinit = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, d_model) to (B, L, d_model); ``mask`` (B, L) is False at steps to ignore."""
        u, z = self.in_proj(zero_masked(x, mask)).chunk(2, dim=-1)
        if self.in_proj.bias is not None:
            u = zero_masked(u, mask)
        later = None if mask is None else mask.flip(1)
        y = self._direction(
            *(u, z, mask, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        )
        y_b = self._direction(
            *(u.flip(1), z.flip(1), later, self.conv1d_b, self.x_proj_b, self.dt_proj_b),
            *(self.A_b_log, self.D_b),
        )
        y = y + y_b.flip(1)
        return zero_masked(self.out_proj(y / 2 if self.divide_out else y), mask)

    def _direction(
        self,
        u: Tensor,
        z: Tensor,
        mask: Tensor | None,
        conv: nn.Conv1d,
        x_proj: nn.Linear,
        dt_proj: nn.Linear,
        A_log: Tensor,
        D: Tensor,
    ) -> Tensor:
        """Convolution, selection, scan and gate with one set of parameters, (B, L, d_inner)."""
        u, _ = convolve(conv, u, self.backend)
        dt, B, C = select(u, x_proj, dt_proj)
        return selective_scan(
            *(u, skip_masked(dt, mask), decay_rates(A_log), B, C, D, z),
            delta_bias=dt_proj.bias,
            backend=self.backend,
        )
