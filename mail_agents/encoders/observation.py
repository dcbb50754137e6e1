"""All observations of a time step, encoded and concatenated."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mail_agents.encoders.image import ResNetEncoder
from mail_agents.encoders.state import StateEncoder
from mail_agents.errors import InvalidInputError
from mail_agents.features import Feature


class ObservationEncoder(nn.Module):
    """One encoder per observation key, results concatenated in alphabetical key order.

    All cameras of one size start from identical weights, as in the released MaIL; they are trained
    separately.

    Args:
        observations: Features by key; kinds image, state and scalar.
        feature_width: Width that each key contributes.

    Raises:
        InvalidInputError: A key is of a kind without an encoder.
    """

    def __init__(self, observations: Mapping[str, Feature], feature_width: int) -> None:
        super().__init__()
        self.keys = tuple(sorted(observations))
        self.out_dim = feature_width * len(self.keys)
        encoders: list[nn.Module] = []
        cameras: dict[tuple[int, ...], ResNetEncoder] = {}
        for key in self.keys:
            feature = observations[key]
            if feature.kind == "image":
                if feature.shape not in cameras:
                    cameras[feature.shape] = ResNetEncoder(feature, feature_width)
                encoders.append(copy.deepcopy(cameras[feature.shape]))
            elif feature.kind in ("state", "scalar"):
                encoders.append(StateEncoder(feature, feature_width))
            else:
                raise InvalidInputError(
                    f"Observation {key!r} is of kind {feature.kind!r}; this agent encodes image, "
                    "state and scalar observations. Make it with features that leave this key out "
                    "(an agent may ignore observations)."
                )
        self.encoders = nn.ModuleList(encoders)

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Encodes ``{key: (B, H, *shape)}`` to ``(B, H, out_dim)``."""
        parts = [
            encoder(observations[key])
            for key, encoder in zip(self.keys, self.encoders, strict=True)
        ]
        return torch.cat(parts, dim=-1)
