"""Features of camera images: ResNet-18 with group normalisation and a spatial softmax.

The front end of MaIL (arXiv:2406.08234) as released: robomimic's ``VisualCore`` with a randomly
initialised ResNet-18 (He et al., arXiv:1512.03385), every batch normalisation replaced by group
normalisation, and 32 spatial-softmax keypoints (Finn et al., arXiv:1509.06113). Crops, colour
jitter, weights from a file and conditioning on language are this project's additions, all off by
default.
"""

import torch
from torch import Tensor, nn

from mail_agents.encoders.augment import (
    Augmentation,
    center_crop,
    color_jitter,
    crop,
    draw_crop,
    draw_jitter,
)
from mail_agents.encoders.config import MIN_SIZE, ImageConfig
from mail_agents.encoders.resnet import ResNet18
from mail_agents.errors import InvalidInputError
from mail_agents.features import Feature

#: Channel statistics of ImageNet, applied to images in [0, 1] whether or not weights were trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
        scores = self.score(x).flatten(2)
        ys = torch.linspace(-1.0, 1.0, height, device=x.device)
        xs = torch.linspace(-1.0, 1.0, width, device=x.device)
        grid = torch.stack(
            (xs.expand(height, width).flatten(), ys[:, None].expand(height, width).flatten()),
            dim=-1,
        )
        # Half precision cannot resolve neighbouring pixels of a large map, so this part is fp32;
        # autocast would round the operands of the product again.
        with torch.autocast(x.device.type, enabled=False):
            return scores.float().softmax(dim=-1) @ grid


class ResNetEncoder(nn.Module):
    """One camera: images to a feature vector per time step.

    ``uint8`` images are cropped where the config says so, scaled to [0, 1], normalised with
    ImageNet statistics, encoded by a ResNet-18 and a 32-keypoint spatial softmax, and projected:
    11,201,248 parameters at ``out_dim=128``. There is no resizing or flipping.

    Args:
        feature: The camera: shape ``(height, width, 3)``, both sizes above 32.
        out_dim: Width of the result.
        config: Crop, jitter and normalisation; ``shared`` and ``weights`` concern others.
        condition: Length of the vector that conditions the network (FiLM), or None.

    Raises:
        InvalidInputError: The feature is not an RGB ``uint8`` image, or is too small.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        feature: Feature,
        out_dim: int = 128,
        config: ImageConfig | None = None,
        condition: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config or ImageConfig()
        _check_camera(feature, self.config.crop)
        self.shape = feature.shape
        self.out_dim = out_dim
        self.trunk = ResNet18(self.config.norm, condition)
        self.pool = SpatialSoftmax(ResNet18.out_channels)
        self.head = nn.Linear(2 * self.pool.keypoints, out_dim)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        augmentation: Augmentation | None = None,
    ) -> Tensor:
        """Encodes ``(B, H, height, width, 3)`` uint8 images to ``(B, H, out_dim)``.

        Args:
            x: Images.
            condition: ``(B, condition)`` for an encoder with FiLM, else None.
            augmentation: Of :meth:`draw`; without one, images are cut in the middle.

        Raises:
            InvalidInputError: The tensor is not uint8 or has another size than the feature.
        """
        if x.dtype != torch.uint8 or tuple(x.shape[2:]) != self.shape:
            raise InvalidInputError(
                f"Expected uint8 images (B, H, {', '.join(map(str, self.shape))}); got "
                f"{tuple(x.shape)} of dtype {x.dtype}. Images stay uint8 until the encoder."
            )
        frames = self._frames(x, augmentation).flatten(0, 1).permute(0, 3, 1, 2)
        frames = (frames - self.mean) / self.std
        if condition is not None:
            condition = condition.repeat_interleave(x.shape[1], dim=0)
        points = self.pool(self.trunk(frames, condition)).flatten(1)
        return self.head(points.to(self.head.weight.dtype)).unflatten(0, tuple(x.shape[:2]))

    def draw(self, x: Tensor, generator: torch.Generator) -> Augmentation:
        """Draws what the config says to augment at random, for images as :meth:`forward` takes."""
        size, jitter = self.config.crop, self.config.jitter
        return Augmentation(
            None if size is None else draw_crop(x, size, generator),
            draw_jitter(x, jitter, generator) if jitter > 0.0 else None,
        )

    def _frames(self, x: Tensor, augmentation: Augmentation | None) -> Tensor:
        """Crops and augments; ``(B, H, h, w, 3)`` floats in [0, 1]."""
        corner, factors = augmentation or (None, None)
        size = self.config.crop
        if size is not None:
            x = center_crop(x, size) if corner is None else crop(x, size, corner)
        frames = x.to(self.mean.dtype) / 255.0
        return frames if factors is None else color_jitter(frames, factors)


def _check_camera(feature: Feature, crop: int | None) -> None:
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
    if crop is not None and crop > min(shape[:2]):
        raise InvalidInputError(
            f"image.crop={crop} is larger than the camera, {shape[0]}x{shape[1]} pixels. Choose at "
            f"most {min(shape[:2])}."
        )
