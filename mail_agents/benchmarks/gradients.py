"""Forward and backward of a function of tensors as a :class:`Candidate`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mail_agents.benchmarks.timing import Candidate, graphed
from mail_agents.errors import MailAgentsError
from mail_agents.ops.backends import use_backend

#: Largest difference between candidates, in units of the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Differentiated:
    """Computes a result and its gradients for all inputs.

    Args:
        name: Shown in tables.
        function: Of the inputs, by name.
        inputs: Tensors; copies of them require gradients.
        upstream: Gradient of the result, (B, L, ...).
        channel_first: Whether the function wants three-dimensional tensors as (B, D, L). It gets
            them in memory of that order, so that no transposition is timed.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Tensor],
        inputs: Mapping[str, Tensor],
        upstream: Tensor,
        channel_first: bool = False,
    ) -> None:
        self.name, self.function, self.channel_first = name, function, channel_first
        self.inputs = {
            key: self._turned(value).detach().contiguous().clone().requires_grad_()
            for key, value in inputs.items()
        }
        self.upstream = self._turned(upstream).contiguous()

    def __call__(self) -> tuple[Tensor, ...]:
        """The result and the gradients, in the order of the inputs."""
        y = self.function(**self.inputs)
        return y, *torch.autograd.grad(y, list(self.inputs.values()), self.upstream)

    def outputs(self) -> list[Tensor]:
        """What is computed, time before channels."""
        return [self._turned(value) for value in self()]

    def candidate(self) -> Candidate:
        """For timing."""
        return Candidate(self.name, self, self.outputs)

    def on_graph(self) -> Candidate:  # pragma: needs gpu
        """For timing, replayed as a CUDA graph."""
        replay = graphed(self)
        return Candidate(
            f"{self.name}, graph", replay, lambda: [self._turned(value) for value in replay()]
        )

    def _turned(self, value: Tensor) -> Tensor:
        return value.transpose(1, 2) if self.channel_first and value.dim() == 3 else value


def runnable(
    made: Mapping[str, Callable[[], Any]], absent: list[str], what: str
) -> dict[str, Callable[[], Any]]:
    """Those of our backends that run here; the reasons of the others are added to ``absent``."""
    found = {}
    for name, function in made.items():
        try:
            function()
        except MailAgentsError as error:
            absent.append(f"{what}, {name}: {str(error).splitlines()[0]}")
        else:
            found[name] = function
    return found


class Layer:
    """Forward and backward of a layer (B, L, D) -> (B, L, D), with gradients of its parameters.

    Args:
        name: Shown in tables.
        module: The layer; compared layers have equal names of parameters.
        x: Input; a copy of it requires a gradient.
        upstream: Gradient of the result.
        backend: Kernel backend to run it with, see :mod:`mail_agents.ops.backends`.
    """

    def __init__(
        self, name: str, module: nn.Module, x: Tensor, upstream: Tensor, backend: str = "auto"
    ) -> None:
        self.name, self.module, self.backend, self.upstream = name, module, backend, upstream
        self.x = x.detach().clone().requires_grad_()
        named = dict(module.named_parameters())
        self.leaves = [self.x, *(named[key] for key in sorted(named))]

    def __call__(self) -> tuple[Tensor, ...]:
        """The result and the gradients of input and parameters, by the names of these."""
        with use_backend(self.backend):
            y = self.module(self.x)
            return y, *torch.autograd.grad(y, self.leaves, self.upstream)

    def candidate(self) -> Candidate:
        """For timing."""
        return Candidate(self.name, self, self)

    def on_graph(self) -> Candidate:  # pragma: needs gpu
        """For timing, replayed as a CUDA graph."""
        replay = graphed(self)
        return Candidate(f"{self.name}, graph", replay, replay)
