"""Sequence mixers (B, L, D) -> (B, L, D), steps of the causal ones, and residual stacks."""

from mail_agents.mixers.attention import CausalSelfAttention, FusedCrossAttention
from mail_agents.mixers.base import CausalMixer, Mixer
from mail_agents.mixers.bimamba import BiMamba
from mail_agents.mixers.hydra import Hydra
from mail_agents.mixers.mamba import Mamba, MambaState
from mail_agents.mixers.mamba2 import Mamba2
from mail_agents.mixers.stack import MambaStack, TransformerBlock, TransformerStack
from mail_agents.mixers.stream import MambaStream

__all__ = [
    "BiMamba",
    "CausalMixer",
    "CausalSelfAttention",
    "FusedCrossAttention",
    "Hydra",
    "Mamba",
    "Mamba2",
    "MambaStack",
    "MambaState",
    "MambaStream",
    "Mixer",
    "TransformerBlock",
    "TransformerStack",
]
