"""Trajectories: episodes, stores, windows and their statistics."""

from mail_agents.data.dataset import DatasetInfo, MemoryDataset, TrajectoryDataset, select_demos
from mail_agents.data.episode import Episode
from mail_agents.data.segments import SegmentSpec, SegmentView
from mail_agents.data.stats import FeatureStats
from mail_agents.data.store import (
    StoreDataset,
    StoreWriter,
    open_dataset,
    verify_dataset,
    write_dataset,
)
from mail_agents.data.views import Batch, StepView
from mail_agents.data.windows import BatchSampler, WindowSpec, WindowView

__all__ = [
    "Batch",
    "BatchSampler",
    "DatasetInfo",
    "Episode",
    "FeatureStats",
    "MemoryDataset",
    "SegmentSpec",
    "SegmentView",
    "StepView",
    "StoreDataset",
    "StoreWriter",
    "TrajectoryDataset",
    "WindowSpec",
    "WindowView",
    "open_dataset",
    "select_demos",
    "verify_dataset",
    "write_dataset",
]
