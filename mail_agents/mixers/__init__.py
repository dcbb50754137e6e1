"""Sequence mixers (B, L, D) -> (B, L, D) with equivalent single steps, and residual stacks."""

from mail_agents.mixers.attention import CausalSelfAttention, FusedCrossAttention
from mail_agents.mixers.base import Mixer
from mail_agents.mixers.mamba import Mamba, MambaState
from mail_agents.mixers.stack import MambaStack, TransformerBlock, TransformerStack

__all__ = [
    "CausalSelfAttention",
    "FusedCrossAttention",
    "Mamba",
    "MambaStack",
    "MambaState",
    "Mixer",
    "TransformerBlock",
    "TransformerStack",
]
