"""Arguments of the state space duality op as one value, so that backends share a signature."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mail_agents.errors import InvalidInputError
from mail_agents.ops._checks import check_dtypes, check_shapes
from mail_agents.ops._precision import as_dtype, wide_dtype

#: Bounds of the step size that bound nothing: softplus is positive.
UNLIMITED = (0.0, float("inf"))


class SsdInputs(NamedTuple):
    """See :func:`mail_agents.ops.ssd.ssd` for meaning and shapes."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    dt_limit: tuple[float, float]
    h0: Tensor | None
    reset: Tensor | None
    return_state: bool

    def tensors(self) -> list[Tensor]:
        """Returns the inputs that are tensors."""
        return [value for value in self if isinstance(value, Tensor)]

    def check(self) -> None:
        """Raises InvalidInputError when a shape, dtype or limit does not fit."""
        x, B = self.x, self.B
        if x.dim() != 4 or B.dim() != 4:
            raise InvalidInputError(
                f"ssd needs x (B, L, H, P) and B (B, L, G, N), got x {tuple(x.shape)} and "
                f"B {tuple(B.shape)}. Split channels into heads with x.unflatten(-1, (H, P))."
            )
        batch, length, heads, head = x.shape
        groups, n = B.shape[2:]
        sequence, projection = (batch, length, heads, head), (batch, length, groups, n)
        check_shapes(
            "ssd",
            (
                ("dt", self.dt, (batch, length, heads)),
                ("A", self.A, (heads,)),
                ("B", B, projection),
                ("C", self.C, projection),
                ("D", self.D, skip_shape(self.D, heads, head)),
                ("z", self.z, sequence),
                ("dt_bias", self.dt_bias, (heads,)),
                ("h0", self.h0, (batch, heads, head, n)),
                ("reset", self.reset, (batch, length)),
            ),
            lambda: f"x (B, L, H, P) = {sequence}, G = {groups} and N = {n}",
        )
        check_groups("ssd", heads, groups)
        check_dtypes("ssd", "x", x, self.A, self.reset)
        low, high = self.dt_limit
        if not 0 <= low <= high:
            raise InvalidInputError(
                f"ssd: dt_limit must be (low, high) with 0 <= low <= high, got {self.dt_limit}."
            )

    def work_dtype(self) -> torch.dtype:
        """Returns the dtype of all arithmetic: float32, or float64 when an input is float64."""
        return wide_dtype(*(t.dtype for t in self.tensors()))


def skip_shape(D: Tensor | None, heads: int, head: int) -> tuple[int, ...]:
    """Returns the shape that ``D`` should have: a weight per head, or per channel of each."""
    return (heads,) if D is not None and D.dim() == 1 else (heads, head)


def check_groups(op: str, heads: int, groups: int) -> None:
    """Raises InvalidInputError unless ``groups`` divide ``heads``."""
    if groups == 0 or heads % groups:
        raise InvalidInputError(
            f"{op}: {groups} groups of B and C do not divide {heads} heads; every group "
            "serves the same number of heads."
        )


def step_sizes(
    dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]
) -> Tensor:
    """Returns ``clamp(softplus(dt + bias), *limit)`` in the dtype of ``dt``.

    A raw step size of -inf gives exactly 0 whatever the lower limit, with a gradient of 0.

    The step sizes of a row are the same, bit for bit, whatever rows are beside it.
    """
    raw = dt if bias is None else dt + as_dtype(bias, dt.dtype)
    sizes = _softplus(raw) if softplus else raw
    low, high = limit
    if not softplus or limit != UNLIMITED:
        sizes = sizes.clamp(low, high)
    return sizes.masked_fill(raw == -torch.inf, 0.0) if low > 0 else sizes


def _softplus(x: Tensor) -> Tensor:
    """On CPUs, torch rounds the last elements of a tensor, which fill no vector, in another way.

    There are so few heads that most rows have such elements. What differs in float64 is lost in
    the rounding to float32.
    """
    if x.is_cpu and x.dtype is torch.float32:
        return F.softplus(x.double()).float()
    return F.softplus(x)
