"""Arguments of the selective scan as one value, so that backends share a signature."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mail_agents.errors import InvalidInputError
from mail_agents.ops._checks import check_dtypes, check_shapes
from mail_agents.ops._precision import wide_dtype


class ScanInputs(NamedTuple):
    """See :func:`mail_agents.ops.selective_scan.selective_scan` for meaning and shapes."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    h0: Tensor | None
    reset: Tensor | None
    return_state: bool

    def tensors(self) -> list[Tensor]:
        """Returns the inputs that are tensors."""
        return [value for value in self if isinstance(value, Tensor)]

    def work_dtype(self) -> torch.dtype:
        """Returns the dtype of all arithmetic: float32, or float64 when an input is float64."""
        return wide_dtype(*(tensor.dtype for tensor in self.tensors()))

    def to(self, dtype: torch.dtype) -> "ScanInputs":
        """Returns the same inputs with all floating point tensors in ``dtype``."""
        values: tuple[Any, ...] = tuple(self)
        floating = (isinstance(x, Tensor) and x.is_floating_point() for x in values)
        pairs = zip(values, floating, strict=True)
        return ScanInputs(*(x.to(dtype) if cast else x for x, cast in pairs))

    def check(self) -> None:
        """Raises InvalidInputError when a shape or dtype does not fit."""
        u, A = self.u, self.A
        if u.dim() != 3 or A.dim() != 2:
            raise InvalidInputError(
                f"selective_scan needs u (B, L, D) and A (D, N), got u {tuple(u.shape)} "
                f"and A {tuple(A.shape)}. Sequences are channel-last here, unlike in mamba_ssm."
            )
        batch, length, d = u.shape
        n = A.shape[1]
        sequence, projection = (batch, length, d), (batch, length, n)
        check_shapes(
            "selective_scan",
            (
                ("delta", self.delta, sequence),
                ("A", A, (d, n)),
                ("B", self.B, projection),
                ("C", self.C, projection),
                ("D", self.D, (d,)),
                ("z", self.z, sequence),
                ("delta_bias", self.delta_bias, (d,)),
                ("h0", self.h0, (batch, d, n)),
                ("reset", self.reset, (batch, length)),
            ),
            lambda: f"u (B, L, D) = {sequence} and N = {n}",
        )
        check_dtypes("selective_scan", "u", u, A, self.reset)


class Forward(NamedTuple):
    """Results of the op without autograd.

    Attributes:
        out: (B, L, D).
        ungated: The same before the gate, (B, L, D); None without a gate or a backward pass.
        last: State after the last step, (B, N, D), if it is wanted.
    """

    out: Tensor
    ungated: Tensor | None
    last: Tensor | None
