"""What every policy offers: a pure network over normalised windows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError

Batch = Mapping[str, Tensor]


class Policy(nn.Module, ABC):
    """A stateless network over normalised windows: what is compiled, exported and wrapped in DDP.

    Batch keys (batch first): ``obs/<key>`` ``(B, H, ...)`` normalised floats (images are uint8),
    ``mask`` ``(B, H)`` bool valid history, ``task_emb`` ``(B, E)`` for language-conditioned agents,
    ``past_action`` ``(B, H-1, A)``, ``rtg`` and ``timestep`` ``(B, H)``; for :meth:`loss` also
    ``action`` ``(B, J, A)`` normalised targets and ``action_mask`` ``(B, J)``. Agents that train on
    segments of trajectories have H = J = K steps in :meth:`loss`, see
    :class:`~mail_agents.data.segments.SegmentView`.
    """

    @abstractmethod
    def loss(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the scalar training loss and further scalars to log."""

    @abstractmethod
    def sample(
        self, batch: Batch, generators: Sequence[torch.Generator], deterministic: bool
    ) -> Tensor:
        """Returns normalised action chunks ``(B, J, A)``, one random stream per row."""

    def forward(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, so that ``DistributedDataParallel`` and ``compile`` wrap what trains."""
        return self.loss(batch, generator)

    def set_action_bounds(self, low: Tensor, high: Tensor) -> None:
        """Receives the normalised action bounds of the training data, each ``(A,)``."""


def resolve_device(device: str) -> torch.device:
    """Turns ``"auto"`` or a torch device name into a device.

    Raises:
        InvalidInputError: The device does not exist on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            f"Device {device!r} cannot be used here: {str(error).splitlines()[0]}. "
            "Use 'cpu' or 'auto', and see 'mail-agents doctor'."
        ) from error
    return found
