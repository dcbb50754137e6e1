"""Random crops and colour jitter of image windows, drawn from the caller's generator.

Every window gets one crop and one set of colour factors for all of its frames: within a window the
camera must not appear to move. What is drawn is apart from what is computed with it, so that the
computation can be compiled. Random crops as in robomimic (Mandlekar et al., arXiv:2108.03298);
colour factors as in torchvision's ``ColorJitter``, without hue and always in the same order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: Luma of ITU-R BT.601, the grey level that contrast and saturation are relative to.
_LUMA = (0.299, 0.587, 0.114)


class Augmentation(NamedTuple):
    """What was drawn for the windows of one camera; None for what is not augmented.

    Attributes:
        corner: Of :func:`draw_crop`.
        factors: Of :func:`draw_jitter`.
    """

    corner: tuple[Tensor, Tensor] | None
    factors: Tensor | None


def center_crop(x: Tensor, size: int) -> Tensor:
    """Cuts the middle ``size`` x ``size`` pixels out of ``(B, H, height, width, C)``."""
    top, left = ((length - size) // 2 for length in x.shape[2:4])
    return x[:, :, top : top + size, left : left + size]


def draw_crop(x: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws one uniform place of a square for every window.

    Args:
        x: ``(B, H, height, width, C)``; only shape and device matter.
        size: Side of the square in pixels, at most height and width.
        generator: Where the places are drawn from, ``2 B`` integers.

    Returns:
        Top row and left column, ``(B, 1)`` each.
    """
    top, left = (
        torch.randint(
            length - size + 1, (len(x), 1), generator=generator, device=generator.device
        ).to(x.device)
        for length in x.shape[2:4]
    )
    return top, left


def crop(x: Tensor, size: int, corner: tuple[Tensor, Tensor]) -> Tensor:
    """Cuts a square out of every window, at one place for all of its frames.

    Args:
        x: ``(B, H, height, width, C)`` of any dtype.
        size: Side of the square in pixels.
        corner: See :func:`draw_crop`.

    Returns:
        ``(B, H, size, size, C)``.
    """
    batch, frames = x.shape[:2]
    top, left = corner
    side = torch.arange(size, device=x.device)
    rows, columns = top + side, left + side
    return x[
        torch.arange(batch, device=x.device).view(-1, 1, 1, 1),
        torch.arange(frames, device=x.device).view(1, -1, 1, 1),
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def draw_jitter(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Draws factors of brightness, contrast and saturation for every window.

    Args:
        x: ``(B, H, height, width, 3)``; only length and device matter.
        strength: Factors are uniform in ``[1 - strength, 1 + strength]``.
        generator: Where the factors are drawn from, ``3 B`` numbers.

    Returns:
        ``(3, B)`` float32.
    """
    draws = torch.rand((3, len(x)), generator=generator, device=generator.device)
    return (1.0 + strength * (2.0 * draws - 1.0)).to(x.device)


def color_jitter(x: Tensor, factors: Tensor) -> Tensor:
    """Multiplies brightness, then contrast, then saturation of every window by factors.

    Args:
        x: ``(B, H, height, width, 3)`` floats in [0, 1].
        factors: See :func:`draw_jitter`.

    Returns:
        Like ``x``, in [0, 1].
    """
    brightness, contrast, saturation = factors.to(x.dtype).view(3, -1, 1, 1, 1, 1)
    x = (brightness * x).clamp(0.0, 1.0)
    mean = _grey(x).mean(dim=(2, 3), keepdim=True)
    x = torch.lerp(mean, x, contrast).clamp(0.0, 1.0)
    return torch.lerp(_grey(x), x, saturation).clamp(0.0, 1.0)


def _grey(x: Tensor) -> Tensor:
    return (x * x.new_tensor(_LUMA)).sum(dim=-1, keepdim=True)
