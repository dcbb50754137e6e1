"""What every policy offers: a pure network over normalised windows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mail_agents.cuda_graphs import Graphs
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

    #: Recordings of acting, after :meth:`compile`.
    _graphs: Graphs | None = None
    #: The part of the loss to compile, where it is not the whole: a function of the policy and
    #: more, that the loss calls in training mode. No method: copies of a policy share it.
    _loss_of: Any = None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the training loss, in place, and records acting on a GPU.

        Arguments are those of ``torch.compile``, which takes the loss, or the part of it that a
        policy has apart for this; losses in evaluation mode are not compiled then. Acting is
        recorded as CUDA graphs where the policy asks for it with :meth:`captured`, one per shape of
        its inputs; on a CPU it stays as it is. A copy of the policy is to be compiled by itself:
        call this for ``agent.policies()``, as an average of the weights acts in place of the
        trained ones.
        """
        if self._loss_of is None:
            super().compile(*args, **kwargs)
        else:
            self._loss_of = torch.compile(self._loss_of, *args, **kwargs)
        self._graphs = Graphs()

    def captured(
        self, function: Callable[..., Tensor], inputs: Mapping[str, Tensor], *state: Any
    ) -> Tensor:
        """Returns ``function(self, inputs, *state)``, from a CUDA graph where there is one.

        Args:
            function: See :class:`~mail_agents.cuda_graphs.Graphs`, as for the other arguments.
            inputs: Tensors that differ from call to call.
            state: Nests of tensors that ``function`` updates in place.
        """
        if self._graphs is None or self.training:
            return function(self, inputs, *state)
        return self._graphs(function, self, inputs, *state)

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
