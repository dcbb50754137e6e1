"""Mamba-1 block (Gu & Dao 2023, section 3.4, figure 3), interchangeable with ``mamba_ssm.Mamba``.

Names, shapes and initialisation of the parameters are those of
``mamba_ssm/modules/mamba_simple.py``, including the order of random draws; state dicts move in
both directions.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mail_agents.mixers.base import zero_masked
from mail_agents.mixers.fused import FusedLayers, Layers
from mail_agents.mixers.parts import check_sizes, conv_weights, convolve, skip_masked
from mail_agents.ops._precision import decay_rates, wide_dtype
from mail_agents.ops.causal_conv1d import causal_conv1d_step
from mail_agents.ops.selective_scan import selective_scan, selective_scan_step


class MambaState(NamedTuple):
    """State of one Mamba or Mamba-2 layer.

    Attributes:
        history: The last W - 1 inputs of the convolution, oldest first, (B, W-1, d_inner); Mamba-2
            convolves d_inner + 2 ngroups d_state channels.
        ssm: State of the recurrence, (B, d_inner, d_state), of Mamba-2 (B, heads, headdim,
            d_state); float32 or float64 because rounding errors compound over time.
    """

    history: Tensor
    ssm: Tensor

    def reset(self, rows: Tensor) -> "MambaState":
        """Returns a state in which the batch rows where ``rows`` (B,) bool is True start anew."""
        chosen = (rows.view(-1, *[1] * (part.ndim - 1)) for part in self)
        return MambaState(*(part.masked_fill(c, 0) for part, c in zip(self, chosen, strict=True)))

    def detach(self) -> "MambaState":
        """Returns a state through which no gradient flows."""
        return MambaState(self.history.detach(), self.ssm.detach())

    def to_mamba_ssm(self) -> tuple[Tensor, Tensor]:
        """Returns ``conv_state`` (B, channels, W) and ``ssm_state`` as ``mamba_ssm`` keeps them.

        The oldest of the W columns is zero: ``mamba_ssm`` drops it before using the others.
        """
        return F.pad(self.history.transpose(1, 2), (1, 0)), self.ssm.clone()

    @classmethod
    def from_mamba_ssm(cls, conv_state: Tensor, ssm_state: Tensor) -> "MambaState":
        """Builds a state from the cache layout of ``mamba_ssm``; see :meth:`to_mamba_ssm`."""
        wide = wide_dtype(ssm_state.dtype)
        return cls(conv_state[:, :, 1:].transpose(1, 2).contiguous(), ssm_state.to(wide).clone())


def initial_step_bias(
    count: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4
) -> Tensor:
    """Draws (count,) biases whose softplus, the step size, is log-uniform in [low, high].

    Gu & Dao 2023, section 3.6.
    """
    span = math.log(high) - math.log(low)
    dt = torch.exp(torch.rand(count) * span + math.log(low)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def init_step_size(dt_proj: nn.Linear) -> None:
    """Gives the step size projection its initial weights; see :func:`initial_step_bias`."""
    scale = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -scale, scale)
    with torch.no_grad():
        dt_proj.bias.copy_(initial_step_bias(dt_proj.out_features))


def initial_decay(channels: int, d_state: int) -> nn.Parameter:
    """Returns the logarithms of the initial decay rates, 1 to N in every channel, (D, N)."""
    rates = torch.arange(1, d_state + 1, dtype=torch.float32).repeat(channels, 1)
    return nn.Parameter(torch.log(rates))


def select(u: Tensor, x_proj: nn.Module, dt_proj: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Returns raw step sizes (without the bias, which the scan adds), B and C of inputs (..., D).

    Equation 2 of section 3.2: what makes the recurrence depend on its input.
    """
    found, rank = x_proj(u), dt_proj.weight.shape[1]
    n = (found.shape[-1] - rank) // 2
    dt, B, C = found.split([rank, n, n], dim=-1)
    return F.linear(dt, dt_proj.weight), B, C


class Mamba(nn.Module):
    """Selective state space mixer: projection, short convolution, selective scan, gate, projection.

    Masked steps have no influence: the convolution sees zeros in their place, the recurrence passes
    its state through them unchanged (a step size of zero), their output is zero and no gradient
    comes from them. A sequence with masked steps in front equals the sequence without them.

    Args:
        d_model: Width of input and output.
        d_state: State size N per channel.
        d_conv: Width W of the convolution.
        expand: Inner width in units of ``d_model``.
        dt_rank: Rank of the step size projection; ``"auto"`` is ceil(d_model / 16).
        bias: Whether input and output projections have a bias.
        conv_bias: Whether the convolution has a bias.
        backend: Kernel backend of scan and convolution, see :mod:`mail_agents.ops.backends`.

    Raises:
        InvalidInputError: A size is smaller than one.
    """

    causal = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        bias: bool = False,
        conv_bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes(
            "Mamba",
            d_model=d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
        )
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.d_model, self.d_state, self.d_conv, self.dt_rank = d_model, d_state, d_conv, rank
        self.d_inner = expand * d_model
        self.backend = backend
        inner = self.d_inner
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv1d = conv_weights(inner, d_conv, conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=True)
        init_step_size(self.dt_proj)
        self.A_log = initial_decay(inner, d_state)
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        # Markers that optimizer and initialisation code written for mamba_ssm looks for.
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self._fused = FusedLayers(_only_layer)
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]

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
        if mask is None:
            before = None if state is None else (state,)
            found = self._fused.run(self, x, 3, before, return_state=keep_state)
            if found is not None:
                return found[0], MambaState(*found[1][0]) if keep_state else None
        u, z = self.in_proj(zero_masked(x, mask)).chunk(2, dim=-1)
        if self.in_proj.bias is not None:
            u = zero_masked(u, mask)
        history: Any
        ssm: Any
        history, ssm = state if state is not None else (None, None)
        u, history = convolve(self.conv1d, u, self.backend, history, keep_state)
        dt, B, C = self._select(u)
        y = selective_scan(
            *(u, skip_masked(dt, mask), self._decay(), B, C, self.D, z),
            delta_bias=self.dt_proj.bias,
            h0=ssm,
            return_state=keep_state,
            backend=self.backend,
        )
        if keep_state:
            y, ssm = y
        y = zero_masked(self.out_proj(y), mask)
        return y, MambaState(history, ssm) if keep_state else None

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """Returns the zero state; ``dtype`` is that of the activations (default: the weights')."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = wide_dtype(dtype)
        return MambaState(
            torch.zeros(batch_size, self.d_conv - 1, self.d_inner, device=device, dtype=dtype),
            torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=wide),
        )

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Maps one token (B, d_model) to (B, d_model) and returns the state after it."""
        found = self._fused.run(self, x, 2, (state,), return_state=True)
        if found is not None:
            return found[0], MambaState(*found[1][0])
        u, z = self.in_proj(x).chunk(2, dim=-1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        u, history = causal_conv1d_step(u, state.history, weight, bias)
        dt, B, C = self._select(u)
        y, ssm = selective_scan_step(
            *(state.ssm, u, dt, self._decay(), B, C, self.D, z), delta_bias=self.dt_proj.bias
        )
        return self.out_proj(y), MambaState(history, ssm)

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input-dependent step size (without its bias, which the scan adds), B and C."""
        return select(u, self.x_proj, self.dt_proj)

    def _decay(self) -> Tensor:
        return decay_rates(self.A_log)


def _only_layer(mixer: Mamba) -> Layers | None:
    return ([(None, mixer)], None) if type(mixer) is Mamba else None
