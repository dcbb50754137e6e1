"""What the ops check alike about their arguments."""

from collections.abc import Callable, Iterable

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
