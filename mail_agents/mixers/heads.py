"""Parts that the mixers with heads, Mamba-2 and Hydra, share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError, nearest_divisor
from mail_agents.ops._precision import wide_dtype


class GatedRMSNorm(nn.Module):
    """Root mean square normalisation with a gate (Dao & Gu 2024, section 7.2).

    ``norm(x * silu(z)) * weight``, or ``norm(x) * weight * silu(z)``, in float32 or wider.

    Args:
        width: Channels D.
        groups: Number of parts of the channels that are normalised each on its own; divides
            ``width``.
        norm_before_gate: Whether the gate comes after the norm.
        eps: Added to the mean square.
    """

    def __init__(
        self, width: int, groups: int = 1, norm_before_gate: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.groups, self.norm_before_gate, self.eps = groups, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Maps (..., D) with the gate (..., D) to (..., D) in the dtype of ``x``."""
        wide = wide_dtype(x.dtype)
        y, gate, weight = x.to(wide), F.silu(z.to(wide)), self.weight.to(wide)
        if not self.norm_before_gate:
            y = y * gate
        if self.groups == 1:
            y = F.rms_norm(y, weight.shape, weight, self.eps)
        else:
            y = y.unflatten(-1, (self.groups, -1))
            y = F.rms_norm(y, y.shape[-1:], eps=self.eps).flatten(-2) * weight
        return (y * gate if self.norm_before_gate else y).to(x.dtype)


def count_heads(inner: int, headdim: int, groups: int) -> int:
    """Returns the number of heads of ``headdim`` channels among ``inner``.

    Raises:
        InvalidInputError: Heads do not divide the channels, or groups the heads.
    """
    if headdim < 1 or inner % headdim:
        raise InvalidInputError(
            f"headdim={headdim} does not divide the inner width {inner} (expand * d_model); the "
            f"nearest that does is headdim={nearest_divisor(inner, headdim)}."
        )
    heads = inner // headdim
    if groups < 1 or heads % groups:
        raise InvalidInputError(
            f"ngroups={groups} does not divide the {heads} heads (inner width {inner} / headdim "
            f"{headdim}); the nearest that does is ngroups={nearest_divisor(heads, groups)}."
        )
    return heads
