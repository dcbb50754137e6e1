"""Features of camera images: ResNet-18 with group normalisation and a spatial softmax.

The front end of MaIL (arXiv:2406.08234) as released: robomimic's ``VisualCore`` with a randomly
initialised ResNet-18 (He et al., arXiv:1512.03385), every batch normalisation replaced by group
normalisation, and 32 spatial-softmax keypoints (Finn et al., arXiv:1509.06113).
"""

import torch
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError
from mail_agents.features import Feature

#: Channel statistics of ImageNet, applied to images in [0, 1] although nothing is pre-trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Smallest height and width: the network divides both by 32, rounding up, and a keypoint on a map
#: of one row or column cannot move.
MIN_SIZE = 33

_CHANNELS_PER_GROUP = 16


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // _CHANNELS_PER_GROUP, channels)


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection; a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm1 = _norm(outputs)
        self.conv2 = _conv(outputs, outputs, 3, 1)
        self.norm2 = _norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.skip = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(_conv(inputs, outputs, 1, stride), _norm(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, inputs, h, w)`` to ``(B, outputs, ceil(h / stride), ceil(w / stride))``."""
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ResNet18(nn.Module):
    """Group-normalised ResNet-18 without its head: ``(B, 3, h, w)`` to ``(B, 512, h/32, w/32)``."""

    out_channels = 512

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _conv(3, 64, 7, 2), _norm(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        inputs = 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [ResidualBlock(inputs, outputs, stride), ResidualBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Returns the last feature map."""
        return self.blocks(self.stem(x))


class SpatialSoftmax(nn.Module):
    """Expected image coordinates of learnt keypoints.

    A 1x1 convolution scores every location for every keypoint; a softmax over locations turns the
    scores into weights; the result is the mean ``(x, y)`` under them, each in [-1, 1].

    Args:
        channels: Channels of the feature map.
        keypoints: Number of keypoints.
    """

    def __init__(self, channels: int, keypoints: int = 32) -> None:
        super().__init__()
        self.keypoints = keypoints
        self.score = nn.Conv2d(channels, keypoints, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, channels, h, w)`` to ``(B, keypoints, 2)``, coordinates ordered (x, y)."""
        height, width = x.shape[-2:]
        # Half precision cannot resolve neighbouring pixels of a large map, so this part is fp32.
        weights = self.score(x).flatten(2).float().softmax(dim=-1)
        ys = torch.linspace(-1.0, 1.0, height, device=x.device)
        xs = torch.linspace(-1.0, 1.0, width, device=x.device)
        grid = torch.stack(
            (xs.expand(height, width).flatten(), ys[:, None].expand(height, width).flatten()),
            dim=-1,
        )
        return weights @ grid


class ResNetEncoder(nn.Module):
    """One camera: images to a feature vector per time step.

    ``uint8`` images are scaled to [0, 1], normalised with ImageNet statistics, encoded by a
    ResNet-18 and a 32-keypoint spatial softmax, and projected: 11,201,248 parameters at
    ``out_dim=128``. There is no cropping, resizing or flipping.

    Args:
        feature: The camera: shape ``(height, width, 3)``, both sizes above 32.
        out_dim: Width of the result.

    Raises:
        InvalidInputError: The feature is not an RGB ``uint8`` image, or is too small.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, feature: Feature, out_dim: int = 128) -> None:
        super().__init__()
        shape = feature.shape
        if len(shape) != 3 or shape[-1] != 3 or feature.dtype != "uint8" or min(shape) < 3:
            raise InvalidInputError(
                "The image encoder reads RGB images (height, width, 3) of dtype uint8, 0..255; got "
                f"shape {shape} and dtype {feature.dtype}. Convert the images (multiply floats in "
                "[0, 1] by 255, repeat a grey channel three times) in the dataset and in the "
                "environment."
            )
        if min(shape[:2]) < MIN_SIZE:
            raise InvalidInputError(
                f"The image encoder needs at least {MIN_SIZE}x{MIN_SIZE} pixels; got "
                f"{shape[0]}x{shape[1]}. Render or resize the camera larger."
            )
        self.shape = shape
        self.out_dim = out_dim
        self.trunk = ResNet18()
        self.pool = SpatialSoftmax(ResNet18.out_channels)
        self.head = nn.Linear(2 * self.pool.keypoints, out_dim)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes ``(B, H, height, width, 3)`` uint8 images to ``(B, H, out_dim)``.

        Raises:
            InvalidInputError: The tensor is not uint8 or has another size than the feature.
        """
        if x.dtype != torch.uint8 or tuple(x.shape[2:]) != self.shape:
            raise InvalidInputError(
                f"Expected uint8 images (B, H, {', '.join(map(str, self.shape))}); got "
                f"{tuple(x.shape)} of dtype {x.dtype}. Images stay uint8 until the encoder."
            )
        frames = x.flatten(0, 1).permute(0, 3, 1, 2).to(self.mean.dtype) / 255.0
        frames = (frames - self.mean) / self.std
        points = self.pool(self.trunk(frames)).flatten(1)
        return self.head(points.to(self.head.weight.dtype)).unflatten(0, tuple(x.shape[:2]))
