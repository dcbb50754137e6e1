"""Sequence-policy agents for offline reinforcement learning and imitation learning.

    >>> import mail_agents
    >>> dataset = mail_agents.open_dataset("data/demo")
    >>> agent = mail_agents.make("mail/ed-ma-ddpm", dataset.features)

Only the registry is imported here; torch is loaded when an agent is made.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mail_agents.features import Feature, FeatureSpec
from mail_agents.registry import AgentSpec, list_agents, make, pprint_registry, register, spec

if TYPE_CHECKING:
    from mail_agents.agent import Agent
    from mail_agents.check import check_agent
    from mail_agents.checkpoint import load_agent as load
    from mail_agents.data.dataset import MemoryDataset
    from mail_agents.data.episode import Episode
    from mail_agents.data.segments import SegmentSpec
    from mail_agents.data.store import open_dataset, write_dataset
    from mail_agents.data.windows import WindowSpec
    from mail_agents.policy import Policy
    from mail_agents.rollout import evaluate

__version__ = "0.1.0"

_LAZY = {
    "Agent": "mail_agents.agent:Agent",
    "Policy": "mail_agents.policy:Policy",
    "Episode": "mail_agents.data.episode:Episode",
    "MemoryDataset": "mail_agents.data.dataset:MemoryDataset",
    "SegmentSpec": "mail_agents.data.segments:SegmentSpec",
    "WindowSpec": "mail_agents.data.windows:WindowSpec",
    "check_agent": "mail_agents.check:check_agent",
    "evaluate": "mail_agents.rollout:evaluate",
    "load": "mail_agents.checkpoint:load_agent",
    "open_dataset": "mail_agents.data.store:open_dataset",
    "write_dataset": "mail_agents.data.store:write_dataset",
}

__all__ = [
    "Agent",
    "AgentSpec",
    "Episode",
    "Feature",
    "FeatureSpec",
    "MemoryDataset",
    "Policy",
    "SegmentSpec",
    "WindowSpec",
    "check_agent",
    "evaluate",
    "list_agents",
    "load",
    "make",
    "open_dataset",
    "pprint_registry",
    "register",
    "spec",
    "write_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mail_agents' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
