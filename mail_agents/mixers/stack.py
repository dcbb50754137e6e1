"""Residual stacks of sequence mixers: whole sequences, prefixes and single steps.

:class:`MambaStack` is the Mamba backbone of MaIL (Jia et al. 2024; release: ``mamba.py`` and
``mamba_cross.py`` in ``agents/models/oc_ddpm``), :class:`TransformerStack` its
transformer counterpart.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError, unknown_name
from mail_agents.mixers.attention import MLP, CausalSelfAttention, FusedCrossAttention
from mail_agents.mixers.base import Mixer, no_states, zero_masked
from mail_agents.mixers.bimamba import BiMamba
from mail_agents.mixers.fused import FusedLayers, Layers
from mail_agents.mixers.hydra import Hydra
from mail_agents.mixers.mamba import Mamba, MambaState
from mail_agents.mixers.mamba2 import Mamba2
from mail_agents.mixers.stream import MambaStream

_EPS = 1e-5

#: State space mixers by name: the blocks of a :class:`MambaStack`.
SSM_MIXERS: dict[str, Any] = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "bimamba": BiMamba,
    "hydra": Hydra,
}


class ResidualBlock(nn.Module):
    """``x + mixer(norm(x))`` for any :class:`mail_agents.mixers.base.Mixer`."""

    def __init__(self, norm: nn.Module, mixer: Mixer) -> None:
        super().__init__()
        self.norm = norm
        self.mixer: Any = mixer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        return x + self.mixer(self.norm(x), mask)

    def init_state(self, batch_size: int, **factory: Any) -> Any:
        """Returns the state of the mixer before the first step."""
        return self.mixer.init_state(batch_size, **factory)

    def prefill(self, x: Tensor, state: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Maps (B, L, D) that follows ``state`` and returns the state after it."""
        y, state = self.mixer.prefill(self.norm(x), state, mask)
        return x + y, state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Maps (B, D) and returns the state after it."""
        y, state = self.mixer.step(self.norm(x), state)
        return x + y, state


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, both residual; LayerNorms without bias.

    Args:
        d_model: Width D.
        heads: Number of attention heads.
        dropout: Probability, on attention weights, attention output and MLP output.
        cross: Whether attention is :class:`FusedCrossAttention` (a decoder block).
    """

    def __init__(
        self, d_model: int, heads: int = 4, dropout: float = 0.0, cross: bool = False
    ) -> None:
        super().__init__()
        kind = FusedCrossAttention if cross else CausalSelfAttention
        self.norm = nn.LayerNorm(d_model, eps=_EPS, bias=False)
        self.attention: Any = kind(d_model, heads, dropout)
        self.mlp_norm = nn.LayerNorm(d_model, eps=_EPS, bias=False)
        self.mlp = MLP(d_model, dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Maps (B, L, D) to (B, L, D); a decoder block needs ``memory`` (B, M, D)."""
        if memory is None:
            y = self.attention(self.norm(x), mask)
        else:
            y = self.attention(self.norm(x), memory, mask, memory_mask)
        return self._feed_forward(x + y)

    def prefill(self, x: Tensor, state: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Maps (B, L, D) that follows ``state`` and returns the state after it."""
        y, state = self.attention.prefill(self.norm(x), state, mask)
        return self._feed_forward(x + y), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Maps (B, D) and returns the state after it."""
        y, state = self.attention.step(self.norm(x), state)
        return self._feed_forward(x + y), state

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.mlp_norm(x))


class MambaStack(nn.Module):
    """Pre-norm residual Mamba blocks and a final LayerNorm, with MaIL's optional aggregation.

    Any state space mixer can stand in the place of Mamba.

    ``q_l = q_{l-1} + Mamba_l(norm_l(q_{l-1})) + E`` and ``y = norm_f(q_layers)``: the same ``E``
    enters the residual stream after every block, the last one included. Parameter names are those
    of ``MixerModel`` in ``mamba_ssm`` (``layers.i.norm``, ``layers.i.mixer``, ``norm_f``), and so
    is the scaling of output projections by ``layers ** -0.5`` at initialisation.

    Args:
        d_model: Width D.
        layers: Number of blocks.
        d_state: State size per channel.
        d_conv: Width of the convolutions.
        expand: Inner width in units of ``d_model``.
        backend: Kernel backend, see :mod:`mail_agents.ops.backends`.
        mixer: What mixes tokens in every block, a name of :data:`SSM_MIXERS`.
        headdim: Channels per head, of the mixers that have heads.

    Attributes:
        causal: Whether the mixers are; only then there are states, ``prefill`` and ``step``.

    Raises:
        InvalidInputError: A size does not suit the mixer, or there are no layers.
        UnknownNameError: There is no such mixer.
    """

    def __init__(
        self,
        d_model: int,
        layers: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        backend: str = "auto",
        mixer: str = "mamba",
        headdim: int = 64,
    ) -> None:
        super().__init__()
        _check_layers(layers)
        if mixer not in SSM_MIXERS:
            raise unknown_name("state space mixer", mixer, SSM_MIXERS)
        kind = SSM_MIXERS[mixer]
        self.causal: bool = kind.causal
        heads: dict[str, Any] = {"headdim": headdim} if kind in (Mamba2, Hydra) else {}
        self.layers = nn.ModuleList(
            ResidualBlock(
                nn.LayerNorm(d_model, eps=_EPS),
                kind(d_model, d_state, d_conv, expand, backend=backend, **heads),
            )
            for _ in range(layers)
        )
        self.norm_f = nn.LayerNorm(d_model, eps=_EPS)
        self._fused = FusedLayers(_mamba_layers)
        with torch.no_grad():
            for layer in self._blocks():
                layer.mixer.out_proj.weight.mul_(layers**-0.5)

    def forward(
        self, x: Tensor, aggregate: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Maps (B, L, D) to (B, L, D).

        Args:
            x: Tokens.
            aggregate: E, added to the residual stream after every block, (B, L, D).
            mask: (B, L) bool, False at steps that must not influence others; the output there is
                without meaning.

        Raises:
            InvalidInputError: ``aggregate`` has another shape than ``x``.
        """
        _check_aggregate(x, aggregate)
        if mask is None:
            found = self._fused.run(self, x, 3, None, aggregate)
            if found is not None:
                return found[0]
        x = zero_masked(x, mask)
        for layer in self._blocks():
            x = _add(layer(x, mask), aggregate)
        return self.norm_f(x)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Any, ...]:
        """Returns the states of all blocks before the first step.

        Raises:
            InvalidInputError: The mixers are not causal.
        """
        self._check_causal("init_state")
        states = (b.init_state(batch_size, device=device, dtype=dtype) for b in self._blocks())
        return tuple(states)

    def prefill(
        self,
        x: Tensor,
        state: tuple[Any, ...] | None = None,
        aggregate: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Like :meth:`forward`, from ``state`` (default: zero); returns the new state too.

        Raises:
            InvalidInputError: The mixers are not causal, or ``aggregate`` does not suit ``x``.
        """
        self._check_causal("prefill")
        _check_aggregate(x, aggregate)
        if mask is None:
            found = self._fused.run(self, x, 3, state, aggregate, return_state=True)
            if found is not None:
                return found[0], tuple(map(MambaState._make, found[1]))
        x, after = zero_masked(x, mask), []
        before = (None,) * len(self.layers) if state is None else state
        for layer, old in zip(self._blocks(), before, strict=True):
            x, new = layer.prefill(x, old, mask)
            x = _add(x, aggregate)
            after.append(new)
        return self.norm_f(x), tuple(after)

    def step(
        self, x: Tensor, state: tuple[Any, ...], aggregate: Tensor | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Maps one token (B, D) to (B, D); ``aggregate`` is E at this position, (B, D).

        States of all layers may share memory, so keeping one of them keeps all.

        Raises:
            InvalidInputError: The mixers are not causal, or ``aggregate`` does not suit ``x``.
        """
        self._check_causal("step")
        _check_aggregate(x, aggregate)
        found = self._fused.run(self, x, 2, state, aggregate, return_state=True)
        if found is not None:
            return found[0], tuple(map(MambaState._make, found[1]))
        after = []
        for layer, old in zip(self._blocks(), state, strict=True):
            x, new = layer.step(x, old)
            x = _add(x, aggregate)
            after.append(new)
        return self.norm_f(x), tuple(after)

    def stream(self, batch_size: int = 1) -> MambaStream:
        """Returns streams of tokens whose states are kept for the caller, at their start.

        Raises:
            InvalidInputError: The mixers are not causal, or there is no row.
        """
        self._check_causal("stream")
        return MambaStream(self, batch_size, self._fused.stack_of(self))

    def _blocks(self) -> Iterable[Any]:
        return self.layers

    def _check_causal(self, asked: str) -> None:
        if not self.causal:
            kind = type(next(iter(self._blocks())).mixer).__name__
            raise no_states(f"A stack of {kind}", asked)


class StackState(NamedTuple):
    """State of a :class:`TransformerStack`: number of tokens so far, and one state per block."""

    tokens: int
    blocks: tuple[Any, ...]


class TransformerStack(nn.Module):
    """Causal pre-norm transformer blocks and a final LayerNorm without bias.

    Args:
        d_model: Width D.
        layers: Number of blocks.
        heads: Attention heads per block.
        dropout: Probability, on attention weights, attention output and MLP output.
        max_len: Largest sequence length; longer ones raise instead of running out of distribution.
        cross: Whether blocks are decoder blocks that attend to a ``memory``.
    """

    causal = True

    def __init__(
        self,
        d_model: int,
        layers: int,
        heads: int = 4,
        dropout: float = 0.0,
        max_len: int | None = None,
        cross: bool = False,
    ) -> None:
        super().__init__()
        _check_layers(layers)
        self.max_len, self.cross = max_len, cross
        blocks = (TransformerBlock(d_model, heads, dropout, cross) for _ in range(layers))
        self.layers = nn.ModuleList(blocks)
        self.norm_f = nn.LayerNorm(d_model, eps=_EPS, bias=False)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Maps (B, L, D) to (B, L, D).

        Args:
            x: Tokens.
            memory: What decoder blocks attend to without causal mask, (B, M, D).
            mask: (B, L) bool, False at steps that must not influence others; the output there is
                without meaning.
            memory_mask: (B, M) bool, False at memory steps to ignore.

        Raises:
            InvalidInputError: The sequence is too long, or a memory is missing or not expected.
        """
        self._check_length(x.shape[1])
        self._check_memory(memory)
        x = zero_masked(x, mask)
        for layer in self._blocks():
            x = layer(x, mask, memory, memory_mask)
        return self.norm_f(x)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> StackState:
        """Returns the state before the first token; decoder stacks project ``memory`` once here.

        Raises:
            InvalidInputError: A memory is missing, not expected, or of another batch size.
        """
        self._check_memory(memory)
        if memory is None:
            made = (b.attention.init_state(batch_size, device, dtype) for b in self._blocks())
        else:
            if memory.shape[0] != batch_size:
                raise InvalidInputError(
                    f"The memory has batch size {memory.shape[0]}, the state {batch_size}."
                )
            made = (b.attention.init_state(memory, memory_mask) for b in self._blocks())
        return StackState(0, tuple(made))

    def prefill(
        self, x: Tensor, state: StackState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, StackState]:
        """Like :meth:`forward`, from ``state``, which a decoder stack needs; returns the new state.

        Raises:
            InvalidInputError: The sequence gets too long, or a decoder stack has no state.
        """
        state = self.init_state(x.shape[0]) if state is None else state
        total = state.tokens + x.shape[1]
        self._check_length(total)
        x, after = zero_masked(x, mask), []
        for layer, old in zip(self._blocks(), state.blocks, strict=True):
            x, new = layer.prefill(x, old, mask)
            after.append(new)
        return self.norm_f(x), StackState(total, tuple(after))

    def step(self, x: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        """Maps one token (B, D) to (B, D) and returns the state after it."""
        y, state = self.prefill(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def _blocks(self) -> Iterable[Any]:
        return self.layers

    def _check_length(self, length: int) -> None:
        if self.max_len is not None and length > self.max_len:
            raise InvalidInputError(
                f"A sequence of {length} tokens exceeds max_len={self.max_len} of this stack."
            )

    def _check_memory(self, memory: Tensor | None) -> None:
        if self.cross and memory is None:
            raise InvalidInputError(
                "This stack has cross-attention: pass memory (B, M, D) to forward, or to "
                "init_state before prefill and step."
            )
        if not self.cross and memory is not None:
            raise InvalidInputError("This stack has no cross-attention; build it with cross=True.")


def _mamba_layers(stack: MambaStack) -> Layers | None:
    blocks = list(stack.layers)
    if type(stack) is not MambaStack:
        return None
    if any(type(block) is not ResidualBlock or type(block.mixer) is not Mamba for block in blocks):
        return None
    return [(cast(Any, block).norm, cast(Any, block).mixer) for block in blocks], stack.norm_f


def _add(x: Tensor, aggregate: Tensor | None) -> Tensor:
    return x if aggregate is None else x + aggregate


def _check_layers(layers: int) -> None:
    if layers < 1:
        raise InvalidInputError(f"A stack needs at least one layer, got {layers}.")


def _check_aggregate(x: Tensor, aggregate: Tensor | None) -> None:
    if aggregate is not None and aggregate.shape != x.shape:
        raise InvalidInputError(
            f"aggregate has shape {tuple(aggregate.shape)}, the tokens {tuple(x.shape)}: encoder "
            "and decoder sequences have to be aligned position by position."
        )
