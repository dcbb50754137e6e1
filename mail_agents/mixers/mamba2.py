"""Mamba-2 block (Dao & Gu 2024, section 7), interchangeable with ``mamba_ssm.Mamba2``.

Names, shapes and initialisation of the parameters are those of ``mamba_ssm/modules/mamba2.py``,
including the order of random draws; state dicts move in both directions.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError
from mail_agents.mixers.base import zero_masked
from mail_agents.mixers.heads import GatedRMSNorm, count_heads
from mail_agents.mixers.mamba import MambaState, initial_step_bias
from mail_agents.mixers.parts import check_sizes, conv_weights, convolve, skip_masked
from mail_agents.ops._precision import decay_rates, wide_dtype
from mail_agents.ops.causal_conv1d import causal_conv1d_step
from mail_agents.ops.ssd import ssd, ssd_step


class Mamba2(nn.Module):
    """State space mixer with one decay rate per head: projection, convolution, SSD, gated norm.

    Masked steps have no influence, as in :class:`~mail_agents.mixers.mamba.Mamba`. The single step
    applies ``dt_limit`` and a skip per channel (``D_has_hdim``) like the whole sequence does, which
    the step of ``mamba_ssm`` does not.

    Args:
        d_model: Width of input and output.
        d_state: State size N per channel.
        d_conv: Width W of the convolution, which covers x, B and C.
        expand: Inner width in units of ``d_model``.
        headdim: Channels P per head; divides the inner width. The official CUDA convolution
            needs ``2 * expand * d_model + 2 * ngroups * d_state + heads`` divisible by 8.
        ngroups: Groups of heads that share B and C, and are normalised together.
        A_init_range: Range of the initial decay rates, uniform.
        D_has_hdim: Whether the skip has a weight per channel instead of one per head.
        rmsnorm: Whether the gate comes with a norm; without, the output is only gated.
        norm_before_gate: Whether that norm precedes the gate.
        dt_limit: Smallest and largest step size.
        bias: Whether input and output projections have a bias.
        conv_bias: Whether the convolution has a bias.
        backend: Kernel backend of SSD and convolution, see :mod:`mail_agents.ops.backends`.

    Raises:
        InvalidInputError: A size is smaller than one, heads do not divide the inner width or
            groups the heads, or a range is none.
    """

    causal = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes("Mamba2", d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        if not 0 < A_init_range[0] <= A_init_range[1] or not 0 <= dt_limit[0] <= dt_limit[1]:
            raise InvalidInputError(
                "Mamba2 needs 0 < low <= high in A_init_range and 0 <= low <= high in dt_limit; "
                f"got {A_init_range=}, {dt_limit=}."
            )
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = expand * d_model
        self.headdim, self.ngroups = headdim, ngroups
        self.nheads = count_heads(self.d_inner, headdim, ngroups)
        self.D_has_hdim, self.dt_limit, self.backend = D_has_hdim, dt_limit, backend
        inner, projected = self.d_inner, 2 * ngroups * d_state
        channels = inner + projected
        self.in_proj = nn.Linear(d_model, inner + channels + self.nheads, bias=bias)
        self.conv1d = conv_weights(channels, d_conv, conv_bias)
        self.dt_bias = nn.Parameter(initial_step_bias(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(inner if D_has_hdim else self.nheads))
        self.norm = GatedRMSNorm(inner, ngroups, norm_before_gate) if rmsnorm else None
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        # Markers that optimizer and initialisation code written for mamba_ssm looks for.
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, d_model) to (B, L, d_model); ``mask`` (B, L) is False at steps to ignore."""
        return self._run(x, mask, None, keep_state=False)[0]

    def prefill(
        self, x: Tensor, state: MambaState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """Like :meth:`forward`, from ``state`` (default: zero); returns the new state too."""
        return self._run(x, mask, state, keep_state=True)

    def _run(
        self, x: Tensor, mask: Tensor | None, state: MambaState | None, keep_state: bool
    ) -> tuple[Tensor, Any]:
        z, xbc, dt = self._project(zero_masked(x, mask))
        if self.in_proj.bias is not None:
            xbc = zero_masked(xbc, mask)
        history: Any
        h0: Any
        history, h0 = state if state is not None else (None, None)
        xbc, history = convolve(self.conv1d, xbc, self.backend, history, keep_state)
        u, B, C = self._heads(xbc)
        y = ssd(
            *(u, skip_masked(dt, mask), self._decay(), B, C, self._skip()),
            z=None if self.norm is not None else z.unflatten(-1, (self.nheads, -1)),
            dt_bias=self.dt_bias,
            dt_limit=self.dt_limit,
            h0=h0,
            return_state=keep_state,
            backend=self.backend,
        )
        if keep_state:
            y, h0 = y
        y = zero_masked(self._finish(y, z), mask)
        return y, MambaState(history, h0) if keep_state else None

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """Returns the zero state; ``dtype`` is that of the activations (default: the weights')."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        history = (batch_size, self.d_conv - 1, self.conv1d.in_channels)
        heads = (batch_size, self.nheads, self.headdim, self.d_state)
        return MambaState(
            torch.zeros(history, device=device, dtype=dtype),
            torch.zeros(heads, device=device, dtype=wide_dtype(dtype)),
        )

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Maps one token (B, d_model) to (B, d_model) and returns the state after it."""
        z, xbc, dt = self._project(x)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        xbc, history = causal_conv1d_step(xbc, state.history, weight, bias)
        u, B, C = self._heads(xbc)
        y, ssm = ssd_step(
            *(state.ssm, u, dt, self._decay(), B, C, self._skip()),
            z=None if self.norm is not None else z.unflatten(-1, (self.nheads, -1)),
            dt_bias=self.dt_bias,
            dt_limit=self.dt_limit,
        )
        return self._finish(y, z), MambaState(history, ssm)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, what is convolved, and step sizes without their bias, which SSD adds."""
        sizes = [self.d_inner, self.conv1d.in_channels, self.nheads]
        z, xbc, dt = self.in_proj(x).split(sizes, dim=-1)
        return z, xbc, dt

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (..., H, P), and B and C (..., G, N)."""
        width = self.ngroups * self.d_state
        u, B, C = xbc.split([self.d_inner, width, width], dim=-1)
        groups = (self.ngroups, self.d_state)
        return u.unflatten(-1, (self.nheads, -1)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        y = y.flatten(-2)
        return self.out_proj(y if self.norm is None else self.norm(y, z))

    def _decay(self) -> Tensor:
        return decay_rates(self.A_log)

    def _skip(self) -> Tensor:
        return self.D.view(self.nheads, -1) if self.D_has_hdim else self.D
