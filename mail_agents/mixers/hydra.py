"""Hydra, the quasiseparable mixer (Hwang et al. 2024, arXiv:2407.09941, section 3).

Names, shapes and initialisation of the parameters are those of ``hydra/modules/hydra.py`` in
github.com/goombalab/hydra, including the order of random draws; state dicts move in both
directions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError
from mail_agents.mixers.base import NonCausalMixer, zero_masked
from mail_agents.mixers.heads import GatedRMSNorm, count_heads
from mail_agents.mixers.mamba import initial_step_bias
from mail_agents.mixers.parts import check_sizes, conv_weights, convolve, skip_masked
from mail_agents.ops._precision import decay_rates
from mail_agents.ops.ssd import ssd


class Hydra(NonCausalMixer):
    """Two state space recurrences, one per direction, around a free diagonal.

    Row i of the mixing matrix of a head is, with ``a_k = exp(dt_k A)``::

        below the diagonal, j < i:  C_{i-1} . B_j a_{j+1} .. a_{i-1} dt_j     (forward B, C, dt)
        above the diagonal, j > i:  C_{i+1} . B_j a_{i+1} .. a_{j-1} dt_j     (backward B, C, dt)
        on the diagonal:            fc_D . x_i + D

    Both directions share ``A_log`` and ``dt_bias``; the convolution is centred. Masked steps have
    no influence: a sequence with masked steps in front equals the sequence without them. Not
    causal, so it has no states.

    Args:
        d_model: Width of input and output.
        d_state: State size N per channel.
        d_conv: Width W of the convolution. Even widths, which the release does not have, reach one
            step further back than ahead.
        expand: Inner width in units of ``d_model``.
        headdim: Channels P per head; divides the inner width.
        ngroups: Groups of heads that share B and C.
        dt_limit: Smallest and largest step size.
        bias: Whether input and output projections have a bias.
        conv_bias: Whether the convolution has a bias.
        backend: Kernel backend of SSD and convolution, see :mod:`mail_agents.ops.backends`.

    Raises:
        InvalidInputError: A size is smaller than one, heads do not divide the inner width or
            groups the heads, or ``dt_limit`` is no range.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes("Hydra", d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        if not 0 <= dt_limit[0] <= dt_limit[1]:
            raise InvalidInputError(f"Hydra needs 0 <= low <= high in dt_limit; got {dt_limit}.")
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = expand * d_model
        self.headdim, self.ngroups = headdim, ngroups
        self.nheads = count_heads(self.d_inner, headdim, ngroups)
        self.dt_limit, self.backend = dt_limit, backend
        inner, heads = self.d_inner, self.nheads
        channels = inner + 4 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, inner + channels + 2 * heads, bias=bias)
        self.conv1d = conv_weights(channels, d_conv, conv_bias)
        self.dt_bias = nn.Parameter(initial_step_bias(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.fc_D = nn.Linear(inner, heads, bias=False)
        self.norm = GatedRMSNorm(inner, norm_before_gate=True)
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, d_model) to (B, L, d_model); ``mask`` (B, L) is False at steps to ignore."""
        sizes = [self.d_inner, self.conv1d.in_channels, 2 * self.nheads]
        z, xbc, dt = self.in_proj(zero_masked(x, mask)).split(sizes, dim=-1)
        if self.in_proj.bias is not None:
            xbc = zero_masked(xbc, mask)
        dt = skip_masked(dt, mask)
        xbc = self._convolve(xbc)
        u, bc = xbc.split([self.d_inner, 4 * self.ngroups * self.d_state], dim=-1)
        diagonal = F.linear(u, self.fc_D.weight, self.D).unsqueeze(-1)
        u = u.unflatten(-1, (self.nheads, -1))
        y = (u * diagonal + self._off_diagonal(u, bc, dt)).flatten(-2)
        return zero_masked(self.out_proj(self.norm(y, z)), mask)

    def _convolve(self, x: Tensor) -> Tensor:
        """A centred convolution is a causal one of the future, read ``ahead`` steps later."""
        ahead = (self.d_conv - 1) // 2
        x = F.pad(x, (0, 0, 0, ahead))
        return convolve(self.conv1d, x, self.backend)[0][:, ahead:]

    def _off_diagonal(self, u: Tensor, bc: Tensor, dt: Tensor) -> Tensor:
        """What comes from earlier and from later steps, (B, L, H, P).

        Every step reads what its neighbour has, so the last step of each direction feeds none.
        """
        batch, length = u.shape[:2]
        bc = bc.unflatten(-1, (4, self.ngroups, self.d_state))
        B, C = bc[:, :, 0::2].unbind(2), bc[:, :, 1::2].unbind(2)
        y = ssd(
            _both_ways(u, u),
            _both_ways(*dt.chunk(2, dim=-1)),
            decay_rates(self.A_log),
            _both_ways(*B),
            _both_ways(*C),
            dt_bias=self.dt_bias,
            dt_limit=self.dt_limit,
            backend=self.backend,
        )
        earlier, later = y[:batch, :-1], y[batch:, :-1].flip(1)
        y = F.pad(earlier, (0, 0, 0, 0, 1, 0)) + F.pad(later, (0, 0, 0, 0, 0, 1))
        return y[:, :length]


def _both_ways(forward: Tensor, backward: Tensor) -> Tensor:
    """One sequence, and the other reversed, on the batch axis."""
    return torch.cat((forward, backward.flip(1)))
