"""In which precision recurrences compute: float32 or wider, whatever the activations are."""

import contextlib
from typing import Any

import torch
from torch import Tensor


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Returns float64 where one of ``dtypes`` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which takes longer than a look at the dtype; single steps do it often."""
    return x if x.dtype is dtype else x.to(dtype)


def decay_rates(log: Tensor) -> Tensor:
    """Returns ``-exp(log)``, the rates A of a recurrence from the parameter of a mixer."""
    return -torch.exp(as_dtype(log, wide_dtype(log.dtype)))


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Keeps mixed precision out: a recurrence compounds rounding errors over time."""
    # There is none for shapes without numbers, and asking is an error.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
