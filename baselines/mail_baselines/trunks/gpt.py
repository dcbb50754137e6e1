"""GPT-2 trunk of Decision Transformer (Chen et al. 2021, section 3 and appendix A).

Sources: ``trajectory_gpt2.py`` of github.com/kzl/decision-transformer (ReLU) and
``algorithms/offline/dt.py`` of github.com/corl-team/CORL (GELU). GPT-2's table of positions is
absent: time is embedded before the trunk, once per environment step. Its table of words, which
upstream builds and never reads, is absent as well.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mail_agents.errors import InvalidInputError
from mail_agents.mixers.attention import CausalSelfAttention
from mail_agents.mixers.base import zero_masked
from mail_baselines.trunks.base import EPS, Activation, check_layers, feed_forward, init_gpt2


class _Block(nn.Module):
    """``x += attention(norm(x)); x += mlp(norm(x))``."""

    def __init__(self, d_model: int, heads: int, dropout: float, activation: Activation) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model, eps=EPS)
        self.attention = CausalSelfAttention(d_model, heads, dropout)
        self.mlp_norm = nn.LayerNorm(d_model, eps=EPS)
        self.mlp = feed_forward(d_model, dropout, activation)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class GPTTrunk(nn.Module):
    """Causal pre-norm transformer blocks between a dropout and a final LayerNorm.

    Args:
        d_model: Width D.
        layers: Number of blocks.
        heads: Attention heads per block; divides ``d_model``.
        dropout: Probability, on the input, on attention weights and on the outputs of attention and
            MLP.
        activation: Of the MLP; ``"gelu"`` is the exact one.
        max_tokens: Longest sequence; longer ones raise instead of running out of distribution.
        xavier_qkv: Whether query, key and value projections are drawn as by
            ``nn.MultiheadAttention``, whose weight CORL's N(0, 0.02) does not reach: Xavier
            uniform, three times as wide at D = 128.

    Raises:
        InvalidInputError: There are no layers, or ``heads`` does not divide ``d_model``.
        UnknownNameError: There is no such activation.
    """

    def __init__(
        self,
        d_model: int,
        layers: int = 3,
        heads: int = 1,
        dropout: float = 0.1,
        activation: Activation = "relu",
        max_tokens: int | None = None,
        xavier_qkv: bool = False,
    ) -> None:
        super().__init__()
        check_layers(layers)
        self.max_tokens = max_tokens
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            _Block(d_model, heads, dropout, activation) for _ in range(layers)
        )
        self.norm_f = nn.LayerNorm(d_model, eps=EPS)
        init_gpt2(self)
        if xavier_qkv:
            for block in self._blocks():
                nn.init.xavier_uniform_(block.attention.qkv.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D); see :class:`mail_baselines.trunks.Trunk` for ``mask``.

        Raises:
            InvalidInputError: The sequence is longer than ``max_tokens``.
        """
        if self.max_tokens is not None and x.shape[1] > self.max_tokens:
            raise InvalidInputError(
                f"A sequence of {x.shape[1]} tokens exceeds max_tokens={self.max_tokens} of this "
                "trunk."
            )
        x = self.dropout(zero_masked(x, mask))
        for block in self._blocks():
            x = block(x, mask)
        return self.norm_f(x)

    def _blocks(self) -> Iterable[Any]:
        return self.layers
