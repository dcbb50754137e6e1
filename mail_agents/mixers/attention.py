"""Causal transformer blocks of the MaIL baselines (Jia et al. 2024), with key/value caches.

Pre-norm blocks whose LayerNorms have no bias, as in ``agents/models/oc_ddpm`` and
``agents/models/bc/transformer.py`` of the release. The decoder block has ONE attention sublayer:
causal self-attention and unmasked cross-attention have separate projections, are summed, and share
the output projection.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError
from mail_agents.mixers.base import zero_masked


class KVCache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
        keys: (B, heads, T, D / heads).
        values: (B, heads, T, D / heads).
        valid: (B, T) bool, False at tokens that were masked; None when all are valid.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None = None

    def append(self, other: "KVCache") -> "KVCache":
        """Returns this cache followed by another."""
        valid = None
        if self.valid is not None or other.valid is not None:
            valid = torch.cat((self._flags(), other._flags()), 1)
        keys = torch.cat((self.keys, other.keys), 2)
        return KVCache(keys, torch.cat((self.values, other.values), 2), valid)

    def _flags(self) -> Tensor:
        if self.valid is not None:
            return self.valid
        return self.keys.new_ones(self.keys.shape[0], self.keys.shape[2], dtype=torch.bool)


class _Attention(nn.Module):
    """Projections and arithmetic that both kinds of attention share."""

    causal = True

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__()
        if heads < 1 or d_model % heads:
            raise InvalidInputError(f"{heads} heads do not divide a width of {d_model}.")
        self.d_model, self.heads, self.dropout = d_model, heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)
        self.proj_dropout = nn.Dropout(dropout)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _empty_cache(
        self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> KVCache:
        weight = self.proj.weight
        empty = torch.empty(
            *(batch_size, self.heads, 0, self.d_model // self.heads),
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )
        return KVCache(empty, empty)

    def _attend_self(
        self, x: Tensor, past: KVCache | None, mask: Tensor | None
    ) -> tuple[Tensor, KVCache]:
        """Causal self-attention before the output projection, (B, heads, L, D / heads)."""
        query, keys, values = (self._split(part) for part in self.qkv(x).chunk(3, dim=-1))
        cache = KVCache(keys, values, mask)
        if past is not None:
            cache = past.append(cache)
        allowed = _causal_mask(query, cache)
        return self._dot(query, cache, allowed, causal=allowed is None), cache

    def _dot(
        self, query: Tensor, cache: KVCache, allowed: Tensor | None, causal: bool = False
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            query,
            cache.keys,
            cache.values,
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal and query.shape[2] > 1,
        )

    def _project(self, y: Tensor, mask: Tensor | None) -> Tensor:
        return zero_masked(self.proj_dropout(self.proj(y.transpose(1, 2).flatten(2))), mask)


def _causal_mask(query: Tensor, cache: KVCache) -> Tensor | None:
    """Which cached tokens each query may see; None when plain causality from the start suffices.

    Every query sees itself even when masked: a softmax over nothing would be NaN.
    """
    length, total = query.shape[2], cache.keys.shape[2]
    if cache.valid is None and length in (1, total):
        return None
    square = torch.ones(length, total, dtype=torch.bool, device=query.device)
    allowed = square.tril(total - length)
    if cache.valid is not None:
        own = square.triu(total - length) & allowed
        allowed = (allowed & cache.valid[:, None, None, :]) | own
    return allowed


class CausalSelfAttention(_Attention):
    """Multi-head causal self-attention; query, key, value and output projections have a bias.

    Masked steps are attended by no valid step, and their output is zero.

    Args:
        d_model: Width D.
        heads: Number of heads; divides ``d_model``.
        dropout: Probability, on attention weights and on the output.

    Raises:
        InvalidInputError: ``heads`` does not divide ``d_model``.
    """

    def __init__(self, d_model: int, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__(d_model, heads, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D); ``mask`` (B, L) is False at steps to ignore."""
        return self.prefill(x, None, mask)[0]

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """Returns an empty cache."""
        return self._empty_cache(batch_size, device, dtype)

    def prefill(
        self, x: Tensor, state: KVCache | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, KVCache]:
        """Like :meth:`forward`, after the tokens in ``state``; returns the cache after ``x``."""
        y, state = self._attend_self(zero_masked(x, mask), state, mask)
        return self._project(y, mask), state

    def step(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """Maps one token (B, D) to (B, D) and returns the cache after it."""
        y, state = self.prefill(x.unsqueeze(1), state)
        return y.squeeze(1), state


class CrossState(NamedTuple):
    """State of :class:`FusedCrossAttention`: tokens so far, and the projected memory."""

    past: KVCache
    memory: KVCache


class FusedCrossAttention(_Attention):
    """Causal self-attention plus unmasked cross-attention, summed before one output projection.

    Not a :class:`mail_agents.mixers.base.CausalMixer`: its state begins with the memory to attend
    to.

    Args:
        d_model: Width D of tokens and memory.
        heads: Number of heads; divides ``d_model``.
        dropout: Probability, on attention weights and on the output.

    Raises:
        InvalidInputError: ``heads`` does not divide ``d_model``.
    """

    def __init__(self, d_model: int, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__(d_model, heads, dropout)
        self.cross_q = nn.Linear(d_model, d_model)
        self.cross_kv = nn.Linear(d_model, 2 * d_model)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Maps tokens (B, L, D) that attend to ``memory`` (B, M, D) to (B, L, D)."""
        return self.prefill(x, self.init_state(memory, memory_mask), mask)[0]

    def init_state(self, memory: Tensor, memory_mask: Tensor | None = None) -> CrossState:
        """Returns the state before the first token, with keys and values of ``memory`` (B, M, D).

        ``memory_mask`` (B, M) is False at memory steps to ignore; a row whose memory is ignored
        completely gets no cross-attention.
        """
        parts = self.cross_kv(zero_masked(memory, memory_mask)).chunk(2, dim=-1)
        keys, values = (self._split(part) for part in parts)
        past = self._empty_cache(keys.shape[0], keys.device, keys.dtype)
        return CrossState(past, KVCache(keys, values, memory_mask))

    def prefill(
        self, x: Tensor, state: CrossState, mask: Tensor | None = None
    ) -> tuple[Tensor, CrossState]:
        """Maps tokens (B, L, D) that follow ``state``; returns the state after them as well."""
        x = zero_masked(x, mask)
        own, past = self._attend_self(x, state.past, mask)
        query, valid = self._split(self.cross_q(x)), state.memory.valid
        if valid is None:
            cross = self._dot(query, state.memory, None)
        else:
            nothing = ~valid.any(1)[:, None, None, None]
            cross = self._dot(query, state.memory, valid[:, None, None, :] | nothing)
            cross = cross.masked_fill(nothing, 0.0)
        return self._project(own + cross, mask), CrossState(past, state.memory)

    def step(self, x: Tensor, state: CrossState) -> tuple[Tensor, CrossState]:
        """Maps one token (B, D) to (B, D) and returns the state after it."""
        y, state = self.prefill(x.unsqueeze(1), state)
        return y.squeeze(1), state


class MLP(nn.Sequential):
    """Two linear layers, four times as wide in between, with exact GELU and dropout at the end."""

    def __init__(self, d_model: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(d_model, 4 * d_model),
            nn.GELU(),
            nn.Linear(4 * d_model, d_model),
            nn.Dropout(dropout),
        )
