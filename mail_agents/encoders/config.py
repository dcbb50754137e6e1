"""Configuration of encoders; imports no torch."""

from dataclasses import dataclass
from typing import Literal

from mail_agents.errors import InvalidInputError

#: Smallest height and width that the image network sees: it divides both by 32, rounding up, and a
#: keypoint on a map of one row or column cannot move.
MIN_SIZE = 33


@dataclass(frozen=True)
class ImageConfig:
    """How camera images are encoded. The defaults are those of the released MaIL."""

    norm: Literal["group", "batch_frozen"] = "group"
    """Normalisation inside the network. 'group': group normalisation, trained. 'batch_frozen': the
    batch normalisation of the file of weights with its statistics, never trained."""
    shared: bool = False
    """One network for all cameras of equal size, instead of one each."""
    crop: int | None = None
    """Side in pixels of the square that is cut out: at a random place in training, in the middle in
    acting. None for the whole image."""
    jitter: float = 0.0
    """Colour jitter in training: brightness, contrast and saturation are multiplied by factors
    drawn from 1 - jitter .. 1 + jitter."""
    weights: str | None = None
    """File with the weights of an ordinary ResNet-18 to start from, .safetensors, .pt or .pth, with
    the names of torchvision or R3M. Trained artifacts do not need it."""

    def __post_init__(self) -> None:
        if self.crop is not None and self.crop < MIN_SIZE:
            raise InvalidInputError(
                f"image.crop must be at least {MIN_SIZE} pixels, or None; got {self.crop}."
            )
        if not 0.0 <= self.jitter < 1.0:
            raise InvalidInputError(f"image.jitter must be in [0, 1); got {self.jitter}.")
        if self.norm == "batch_frozen" and self.weights is None:
            raise InvalidInputError(
                "image.norm='batch_frozen' keeps the batch statistics of a trained network, so it "
                "needs image.weights=FILE. Without one use image.norm='group'."
            )

    @property
    def augments(self) -> bool:
        """Whether training images differ at random from what is seen in acting."""
        return self.crop is not None or self.jitter > 0.0
