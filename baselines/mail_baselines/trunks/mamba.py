"""Trunk of Decision Mamba (Ota 2024, arXiv 2403.19925): a transformer with Mamba for attention.

Source: ``gym/models/decision_mamba.py`` and ``layers.py`` of
github.com/Toshihiro-Ota/decision-mamba.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mail_agents.errors import unknown_name
from mail_agents.mixers.base import zero_masked
from mail_agents.mixers.mamba import Mamba, MambaState
from mail_baselines.trunks.base import EPS, check_layers, feed_forward, init_gpt2

_NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class _Block(nn.Module):
    """``x += mamba(norm(x)); x += mlp(norm(x))``."""

    def __init__(self, mixer: Mamba, norm: type[nn.Module], dropout: float) -> None:
        super().__init__()
        self.norm = norm(mixer.d_model, eps=EPS)
        self.mixer = mixer
        self.mlp_norm = nn.LayerNorm(mixer.d_model, eps=EPS)
        self.mlp = feed_forward(mixer.d_model, dropout, "gelu")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self._feed_forward(x + self.mixer(self.norm(x), mask))

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        y, state = self.mixer.step(self.norm(x), state)
        return self._feed_forward(x + y), state

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.mlp_norm(x))


class MambaTrunk(nn.Module):
    """Pre-norm Mamba blocks with MLPs between a dropout and a final LayerNorm.

    Upstream passes no mask and lets padding in front of a window act as real input; a ``mask``
    removes it.

    Args:
        d_model: Width D.
        layers: Number of blocks.
        d_state: State size per channel.
        d_conv: Width of the convolutions.
        expand: Inner width of the mixers in units of ``d_model``.
        norm: In front of the mixer: ``"layer"`` (model type ``dmamba``) or ``"rms"``
            (``dmamba-min``). The other norms are LayerNorms in both.
        dropout: Probability, on the input and at the end of the MLPs.
        released_init: Whether the linear layers inside the mixers are drawn from N(0, 0.02) with
            zero bias too, as the published results were obtained: step sizes then start near
            ln 2 = 0.69, far outside of Mamba's 0.001 to 0.1.
        backend: Kernel backend, see :mod:`mail_agents.ops.backends`.

    Raises:
        InvalidInputError: There are no layers, or a size is smaller than one.
        UnknownNameError: There is no such norm.
    """

    def __init__(
        self,
        d_model: int,
        layers: int = 3,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        norm: Literal["layer", "rms"] = "layer",
        dropout: float = 0.1,
        released_init: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_layers(layers)
        if norm not in _NORMS:
            raise unknown_name("norm", norm, _NORMS)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            _Block(Mamba(d_model, d_state, d_conv, expand, backend=backend), _NORMS[norm], dropout)
            for _ in range(layers)
        )
        self.norm_f = nn.LayerNorm(d_model, eps=EPS)
        for block in self._blocks():
            init_gpt2(block if released_init else block.mlp)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D); see :class:`mail_baselines.trunks.Trunk` for ``mask``."""
        x = self.dropout(zero_masked(x, mask))
        for block in self._blocks():
            x = block(x, mask)
        return self.norm_f(x)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[MambaState, ...]:
        """Returns the states of all blocks before the first token."""
        return tuple(b.mixer.init_state(batch_size, device, dtype) for b in self._blocks())

    def step(
        self, x: Tensor, state: tuple[MambaState, ...]
    ) -> tuple[Tensor, tuple[MambaState, ...]]:
        """Maps one token (B, D) to (B, D) and returns the state after it."""
        x, after = self.dropout(x), []
        for block, old in zip(self._blocks(), state, strict=True):
            x, new = block.step(x, old)
            after.append(new)
        return self.norm_f(x), tuple(after)

    def _blocks(self) -> Iterable[Any]:
        return self.layers
