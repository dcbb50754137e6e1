"""The selective scan with gradients, from kernels without: the same for every CPU backend."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mail_agents.ops._scan_inputs import Forward, ScanInputs


class Kernels(Protocol):
    """What the module of a backend offers."""

    def prepare(self, inputs: ScanInputs, /) -> ScanInputs:
        """Returns the inputs in the dtype and layout that the other functions take."""
        ...

    def new_kept(self, inputs: ScanInputs, /) -> Tensor:
        """Returns memory for the states (count, B, N, D) that a backward pass starts from."""
        ...

    def scan_forward(self, inputs: ScanInputs, kept: Tensor | None, /) -> Forward:
        """The op; without ``kept`` there is no backward pass."""
        ...

    def scan_backward(
        self,
        inputs: ScanInputs,
        ungated: Tensor | None,
        kept: Tensor,
        dout: Tensor | None,
        dlast: Tensor | None,
        /,
    ) -> tuple[Tensor | None, ...]:
        """Gradients by input, from what the forward pass kept and the cotangents of its results.

        ``dlast`` is (B, N, D), like ``last``.
        """
        ...


def run_scan(kernels: Kernels, inputs: ScanInputs) -> tuple[Tensor, Tensor | None]:
    """Returns y (B, L, D) in the dtype of ``u``, and the last state (B, D, N) if it is wanted."""
    ready = kernels.prepare(inputs)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.tensors()):
        y, last = SelectiveScan.apply(kernels, *ready)  # type: ignore[misc]
    else:
        y, _, last = kernels.scan_forward(ready, None)
    return y.to(inputs.u.dtype), None if last is None else last.transpose(1, 2)


class SelectiveScan(torch.autograd.Function):
    """``apply(kernels, *ScanInputs)``, first-order gradients; y and the last state (B, N, D)."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, *args: Any) -> tuple[Tensor, Tensor | None]:
        inputs = ScanInputs(*args)
        kept = kernels.new_kept(inputs)
        found = kernels.scan_forward(inputs, kept)
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        ctx.save_for_backward(*tensors, found.ungated, kept)
        ctx.kernels, ctx.softplus = kernels, inputs.delta_softplus
        ctx.set_materialize_grads(False)
        return found.out, found.last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, ungated, kept = ctx.saved_tensors
        inputs = ScanInputs(*tensors)._replace(delta_softplus=ctx.softplus)
        return None, *ctx.kernels.scan_backward(inputs, ungated, kept, dout, dlast)
