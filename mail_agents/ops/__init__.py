"""Numeric kernels of the sequence models: one readable reference and faster backends each."""

from mail_agents.ops.backends import backend_report, use_backend
from mail_agents.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from mail_agents.ops.selective_scan import selective_scan, selective_scan_step
from mail_agents.ops.ssd import ssd, ssd_step

__all__ = [
    "backend_report",
    "causal_conv1d",
    "causal_conv1d_step",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "use_backend",
]
