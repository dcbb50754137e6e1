"""Causal maps of token sequences (B, L, D) -> (B, L, D): what the offline RL agents differ in."""

from mail_baselines.trunks.base import StreamingTrunk, Trunk, map_state
from mail_baselines.trunks.causality import assert_causal, leaking_tokens
from mail_baselines.trunks.gpt import GPTTrunk
from mail_baselines.trunks.mamba import MambaTrunk
from mail_baselines.trunks.multi_grained import LabelLeakWarning, MultiGrainedTrunk

__all__ = [
    "GPTTrunk",
    "LabelLeakWarning",
    "MambaTrunk",
    "MultiGrainedTrunk",
    "StreamingTrunk",
    "Trunk",
    "assert_causal",
    "leaking_tokens",
    "map_state",
]
