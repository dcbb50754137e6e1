"""All observations of a time step, encoded and concatenated."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mail_agents.encoders.augment import Augmentation
from mail_agents.encoders.config import ImageConfig
from mail_agents.encoders.image import ResNetEncoder
from mail_agents.encoders.resnet import ResNet18
from mail_agents.encoders.state import StateEncoder
from mail_agents.errors import InvalidInputError
from mail_agents.features import Feature


class ObservationEncoder(nn.Module):
    """One encoder per observation key, results concatenated in alphabetical key order.

    All cameras of one size start from identical weights, as in the released MaIL, and are trained
    separately; with ``image.shared`` they are one network.

    Args:
        observations: Features by key; kinds image, state and scalar.
        feature_width: Width that each key contributes.
        image: How images are encoded.
        condition: Length of the vector that conditions the image networks (FiLM), or None.

    Raises:
        InvalidInputError: A key is of a kind without an encoder, or there are no images although
            settings of the image networks were given.
    """

    def __init__(
        self,
        observations: Mapping[str, Feature],
        feature_width: int,
        image: ImageConfig | None = None,
        condition: int | None = None,
    ) -> None:
        super().__init__()
        image = image or ImageConfig()
        self.keys = tuple(sorted(observations))
        self.out_dim = feature_width * len(self.keys)
        cameras: dict[tuple[int, ...], ResNetEncoder] = {}
        encoders: list[nn.Module] = []
        #: Encoder of each key, an index.
        self.encoder_of: list[int] = []
        for key in self.keys:
            feature = observations[key]
            self.encoder_of.append(len(encoders))
            if feature.kind == "image":
                if feature.shape not in cameras:
                    cameras[feature.shape] = ResNetEncoder(feature, feature_width, image, condition)
                    encoders.append(cameras[feature.shape])
                elif image.shared:
                    self.encoder_of[-1] = encoders.index(cameras[feature.shape])
                else:
                    encoders.append(copy.deepcopy(cameras[feature.shape]))
            elif feature.kind in ("state", "scalar"):
                encoders.append(StateEncoder(feature, feature_width))
            else:
                raise InvalidInputError(
                    f"Observation {key!r} is of kind {feature.kind!r}; this agent encodes image, "
                    "state and scalar observations. Make it with features that leave this key out "
                    "(an agent may ignore observations)."
                )
        if not cameras and (condition is not None or image != ImageConfig()):
            raise InvalidInputError(
                f"There are no images among the observations ({', '.join(self.keys)}), but image "
                "networks were configured: leave out the settings 'image.*' and "
                "language_as='film', or use a dataset with cameras."
            )
        self.encoders = nn.ModuleList(encoders)

    def trunks(self) -> list[ResNet18]:
        """The image networks, without what follows them."""
        return [each.trunk for each in self.encoders if isinstance(each, ResNetEncoder)]

    def draw(
        self, observations: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Augmentation]:
        """Draws how the images of a batch are augmented, by key."""
        return {
            key: encoder.draw(observations[key], generator)
            for key, index in zip(self.keys, self.encoder_of, strict=True)
            if isinstance(encoder := self.encoders[index], ResNetEncoder)
        }

    def forward(
        self,
        observations: Mapping[str, Tensor],
        condition: Tensor | None = None,
        augmentations: Mapping[str, Augmentation] | None = None,
    ) -> Tensor:
        """Encodes ``{key: (B, H, *shape)}`` to ``(B, H, out_dim)``.

        Args:
            observations: Normalised states, and uint8 images.
            condition: ``(B, condition)`` for image networks with FiLM, else None.
            augmentations: Of :meth:`draw`; images are not augmented without.
        """
        parts = []
        for key, index in zip(self.keys, self.encoder_of, strict=True):
            encoder, x = self.encoders[index], observations[key]
            if isinstance(encoder, ResNetEncoder):
                parts.append(encoder(x, condition, (augmentations or {}).get(key)))
            else:
                parts.append(encoder(x))
        return torch.cat(parts, dim=-1)
