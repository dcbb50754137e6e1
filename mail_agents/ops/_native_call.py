"""What the Python sides of the compiled kernels share: arguments, calls and cotangents."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from mail_agents.errors import InvalidInputError
from mail_agents.ops._native import load


class Sequence(ctypes.Structure):
    """``struct Sequence`` of ``native/memory.h``: (B, L, ...), dense after the second axis."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("time_stride", ctypes.c_int64),
    )


def library() -> Any:
    """Returns the loaded kernels; only for callers that found no reason to refuse them."""
    found = load().library
    assert found is not None
    return found


def call(op: str, kernel: str, arguments: ctypes.Structure) -> None:
    """Runs a kernel.

    Raises:
        MemoryError: There is none for its scratch space.
    """
    if getattr(library(), kernel)(ctypes.byref(arguments)):
        raise MemoryError(f"{op}: no memory for the scratch space of the native kernel")


def address(x: Tensor | None) -> int | None:
    """Returns where a tensor is, or None for a null pointer."""
    return None if x is None else x.data_ptr()


def sequence(x: Tensor | None) -> Sequence:
    """Returns a tensor as kernels see it; null where there is none."""
    return Sequence() if x is None else Sequence(x.data_ptr(), x.stride(0), x.stride(1))


def rows(x: Tensor) -> Tensor:
    """Returns the same values (B, L, D) with contiguous channels."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def cotangent(op: str, x: Tensor) -> Tensor:
    """Returns a cotangent as plain memory, which autograd does not promise.

    Raises:
        InvalidInputError: It has none, for example because it stands for a batch of cotangents.
    """
    if type(x) in (Tensor, torch.nn.Parameter):
        try:
            x.data_ptr()
        except RuntimeError:
            pass
        else:
            return x.clone() if x.is_neg() or x._is_zerotensor() else x
    raise InvalidInputError(
        f"The backward pass of {op} on backend 'native' got gradients without memory of their own, "
        "as batches of them have (is_grads_batched, jacobian with vectorize=True) and fake or "
        f"wrapped tensors. Call {op} with backend='reference', which allows them."
    )
