"""Features of low-dimensional observations."""

from torch import Tensor, nn

from mail_agents.features import Feature


class StateEncoder(nn.Module):
    """A two-layer perceptron over one state or scalar observation.

    The released MaIL sees images only; this encoder is this project's addition, so that the same
    agents run on state-based worlds.

    Args:
        feature: The observation; its shape is flattened.
        out_dim: Width of the result.
    """

    def __init__(self, feature: Feature, out_dim: int) -> None:
        super().__init__()
        self.size = feature.size
        self.out_dim = out_dim
        self.net = nn.Sequential(
            nn.Linear(self.size, 2 * out_dim), nn.GELU(), nn.Linear(2 * out_dim, out_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Encodes normalised observations ``(B, H, *shape)`` to ``(B, H, out_dim)``."""
        return self.net(x.reshape(*x.shape[:2], self.size))
