"""What the ops check alike about their arguments."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mail_agents.errors import InvalidInputError


def check_shapes(
    op: str,
    tensors: Iterable[tuple[str, Tensor | None, tuple[int, ...]]],
    source: Callable[[], str],
) -> None:
    """Compares tensors that are there with the shapes they should have.

    Args:
        op: Name of the op.
        tensors: Name, tensor and shape of each.
        source: Says what the shapes follow from; called only for the message.

    Raises:
        InvalidInputError: A tensor has another shape.
    """
    for name, tensor, shape in tensors:
        if tensor is not None and tensor.shape != shape:
            raise InvalidInputError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape} from {source()}."
            )


def check_dtypes(op: str, name: str, x: Tensor, A: Tensor, reset: Tensor | None) -> None:
    """Raises InvalidInputError when inputs are not real numbers, or ``reset`` is not of bools.

    Args:
        op: Name of the op.
        name: Name of ``x``.
        x: Input.
        A: Decay rates.
        reset: Where sequences start anew.
    """
    if A.is_complex() or not x.is_floating_point():
        raise InvalidInputError(
            f"{op} needs real floating point inputs, got {name} {x.dtype}, A {A.dtype}."
        )
    if reset is not None and reset.dtype != torch.bool:
        raise InvalidInputError(f"{op}: reset must be bool, got {reset.dtype}.")
