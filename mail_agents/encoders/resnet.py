"""ResNet-18 (He et al., arXiv:1512.03385) without its head, with optional FiLM.

FiLM (Perez et al., arXiv:1709.07871) scales and shifts the channels of every residual block by
linear functions of a vector, here the embedding of an instruction, after the block's second
normalisation. Both functions start at zero, so that a network with FiLM starts as the one without.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError

_CHANNELS_PER_GROUP = 16

NormName = Literal["group", "batch_frozen"]


class FrozenBatchNorm(nn.Module):
    """Batch normalisation with fixed statistics and fixed scale: an affine map per channel.

    Names are those of :class:`torch.nn.BatchNorm2d`; everything is a buffer.

    Args:
        channels: Number of channels.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, channels, h, w)`` to the same shape."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype).view(-1, 1, 1) + shift.to(x.dtype).view(-1, 1, 1)


def _norm(channels: int, kind: NormName) -> nn.Module:
    if kind == "batch_frozen":
        return FrozenBatchNorm(channels)
    return nn.GroupNorm(channels // _CHANNELS_PER_GROUP, channels)


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class FiLM(nn.Module):
    """Scales and shifts channels by linear functions of a condition; the identity at first.

    Args:
        condition: Length of the condition.
        channels: Number of channels.
    """

    def __init__(self, condition: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(condition, 2 * channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Maps ``(B, channels, h, w)`` under a condition ``(B, condition)`` to the same shape."""
        scale, shift = self.project(condition)[..., None, None].chunk(2, dim=1)
        return x * (1.0 + scale) + shift


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection; a 1x1 convolution where the shape changes.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Stride of the first convolution and of the skip connection.
        norm: Kind of normalisation.
        condition: Length of the FiLM condition, or None for no FiLM.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        norm: NormName = "group",
        condition: int | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm1 = _norm(outputs, norm)
        self.conv2 = _conv(outputs, outputs, 3, 1)
        self.norm2 = _norm(outputs, norm)
        self.film = None if condition is None else FiLM(condition, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.skip = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(_conv(inputs, outputs, 1, stride), _norm(outputs, norm))
        )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Maps ``(B, inputs, h, w)`` to ``(B, outputs, ceil(h / stride), ceil(w / stride))``."""
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        if self.film is not None and condition is not None:
            y = self.film(y, condition)
        return self.relu(y + self.skip(x))


class ResNet18(nn.Module):
    """ResNet-18 without its head: ``(B, 3, h, w)`` to ``(B, 512, h/32, w/32)``.

    Args:
        norm: ``"group"`` for groups of 16 channels, ``"batch_frozen"`` for fixed statistics.
        condition: Length of the FiLM condition, or None for no FiLM.
    """

    out_channels = 512

    def __init__(self, norm: NormName = "group", condition: int | None = None) -> None:
        super().__init__()
        self.condition = condition
        self.stem = nn.Sequential(
            _conv(3, 64, 7, 2), _norm(64, norm), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        inputs = 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [
                ResidualBlock(inputs, outputs, stride, norm, condition),
                ResidualBlock(outputs, outputs, 1, norm, condition),
            ]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Returns the last feature map.

        Args:
            x: ``(B, 3, h, w)`` normalised images.
            condition: ``(B, condition)`` for a network with FiLM, else None.

        Raises:
            InvalidInputError: The condition is missing, not wanted, or of another length.
        """
        given = None if condition is None else condition.shape[-1]
        if given != self.condition:
            raise InvalidInputError(
                f"This image network expects a condition of length {self.condition} for every "
                f"image; got {given}."
            )
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, condition)
        return x
