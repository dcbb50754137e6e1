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
        keys, values = torch.cat((self.keys, other.keys), 2), torch.cat((self.values, other.values), 2)
        return KVCache(keys, values, valid)

    def _flags(self) -> Tensor:
        batch, _, tokens, _ = self.keys.shape
        return self.keys.new_ones(batch, tokens, dtype=torch.bool) if self.valid is None else self.valid


class CausalSelfAttention(nn.Module):
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
        super().__init__()
        if heads < 1 or d_model % heads:
            raise InvalidInputError(f"{heads} heads do not divide a width of {d_model}.")
        self.d_model, self.heads, self.dropout = d_model, heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)
        self.proj_dropout = nn.Dropout(dropout)

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
        weight = self.proj.weight
        empty = torch.empty(
            *(batch_size, self.heads, 0, self.d_model // self.heads),
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )
        return KVCache(empty, empty)

    def prefill(
        self, x: Tensor, state: KVCache | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, KVCache]:
        """Like :meth:`forward`, after the tokens in ``state``; returns the cache after ``x``."""
        y, state = self._attend(x, state, mask)
        return self._project(y, mask), state

    def step(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """Maps one token (B, D) to (B, D) and returns the cache after it."""
        y, state = self.prefill(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attend(
        self, x: Tensor, past: KVCache | None, mask: Tensor | None
    ) -> tuple[Tensor, KVCache]:
        """Self-attention before the output projection, (B, heads, L, D / heads)."""
        projected = self.qkv(zero_masked(x, mask)).chunk(3, dim=-1)
        query, keys, values = (self._split(part) for part in projected)
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


class CrossState(NamedTuple):
    """State of :class:`FusedCrossAttention`: tokens so far, and the projected memory."""

    past: KVCache
    memory: KVCache


class FusedCrossAttention(CausalSelfAttention):
    """Causal self-attention plus unmasked cross-attention, summed before one output projection.

    Args:
        d_model: Width D of tokens and memory.
        heads: Number of heads; divides ``d_model``.
        dropout: Probability, on attention weights and on the output.
    """

    def __init__(self, d_model: int, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__(d_model, heads, dropout)
        self.cross_q = nn.Linear(d_model, d_model)
        self.cross_kv = nn.Linear(d_model, 2 * d_model)

    def project_memory(self, memory: Tensor, memory_mask: Tensor | None = None) -> KVCache:
        """Keys and values of ``memory`` (B, M, D); ``memory_mask`` (B, M) is False where hidden.

        A row whose memory is hidden completely gets no cross-attention.
        """
        parts = self.cross_kv(zero_masked(memory, memory_mask)).chunk(2, dim=-1)
        return KVCache(*(self._split(part) for part in parts), memory_mask)

    def init_cross_state(self, memory: KVCache) -> CrossState:
        """Returns the state before the first token, for a projected memory."""
        keys = memory.keys
        return CrossState(self.init_state(keys.shape[0], keys.device, keys.dtype), memory)

    def prefill_cross(
        self, x: Tensor, state: CrossState, mask: Tensor | None = None
    ) -> tuple[Tensor, CrossState]:
        """Maps tokens (B, L, D) that follow ``state`` to (B, L, D); returns the state after them."""
        own, past = self._attend(x, state.past, mask)
        query = self._split(self.cross_q(zero_masked(x, mask)))
        valid = state.memory.valid
        if valid is None:
            cross = self._dot(query, state.memory, None)
        else:
            nothing = ~valid.any(1)[:, None, None, None]
            cross = self._dot(query, state.memory, valid[:, None, None, :] | nothing)
            cross = cross.masked_fill(nothing, 0.0)
        return self._project(own + cross, mask), CrossState(past, state.memory)


class MLP(nn.Sequential):
    """Two linear layers, four times as wide in between, with exact GELU and dropout at the end."""

    def __init__(self, d_model: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(d_model, 4 * d_model),
            nn.GELU(),
            nn.Linear(4 * d_model, d_model),
            nn.Dropout(dropout),
        )
