"""Configuration of MaIL agents; imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from mail_agents.config import AgentConfig
from mail_agents.encoders.config import ImageConfig
from mail_agents.errors import InvalidInputError, nearest_divisor


@dataclass(frozen=True)
class StackConfig:
    """A stack of sequence-mixing blocks. Fields of other mixers are ignored."""

    mixer: Literal["mamba", "mamba2", "bimamba", "hydra", "attention"] = "mamba"
    """What mixes tokens: Mamba-1, Mamba-2, two Mamba-1 scans in opposite directions, Hydra (both
    directions as well), or causal attention with an MLP."""
    layers: int = 8
    """Number of blocks."""
    d_state: int = 16
    """All but attention: state size N."""
    d_conv: int = 4
    """All but attention: kernel of the convolution, causal but in Hydra, where it is centred."""
    expand: int = 2
    """All but attention: inner width over model width."""
    headdim: int = 64
    """Mamba-2, Hydra: channels per head; divides the inner width."""
    heads: int = 4
    """Attention: number of heads."""
    dropout: float = 0.0
    """Attention: dropout of attention weights and residual branches."""

    def __post_init__(self) -> None:
        sizes = (self.d_state, self.d_conv, self.expand, self.headdim, self.heads)
        if self.layers < 0 or min(sizes) < 1:
            raise InvalidInputError(
                "StackConfig needs layers >= 0 and d_state, d_conv, expand, headdim, heads >= 1; "
                f"got {self}."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise InvalidInputError(f"dropout must be in [0, 1); got {self.dropout}.")

    def check_width(self, width: int, name: str) -> None:
        """Refuses a token width that heads do not divide; ``name`` is this stack's in messages."""
        if self.layers == 0:
            return
        if self.mixer == "attention" and width % self.heads:
            raise InvalidInputError(
                f"width={width} is not divisible by {name}.heads={self.heads}; the nearest that "
                f"divides it is {name}.heads={nearest_divisor(width, self.heads)}."
            )
        inner = self.expand * width
        if self.mixer in ("mamba2", "hydra") and inner % self.headdim:
            raise InvalidInputError(
                f"{name}.headdim={self.headdim} does not divide the inner width {inner} of "
                f"{self.mixer!r} (expand {self.expand} * width {width}); the nearest that does is "
                f"{name}.headdim={nearest_divisor(inner, self.headdim)}."
            )


@dataclass(frozen=True)
class MailConfig(AgentConfig):
    """MaIL (arXiv:2406.08234): encoder-decoder Mamba with a diffusion head by default."""

    history: int = 5
    """Observed steps shown to the policy, the current one included."""
    horizon: int = 5
    """Predicted actions per plan (chunk length)."""
    ema_decay: float | None = 0.995
    """Decay of the exponential moving average of the weights used for acting; None for no EMA."""
    width: int = 128
    """Token width."""
    encoder: StackConfig = field(default_factory=lambda: StackConfig(layers=8, d_state=8, d_conv=2))
    """Encoder; 0 layers make the agent decoder-only."""
    decoder: StackConfig = field(
        default_factory=lambda: StackConfig(layers=10, d_state=8, d_conv=2)
    )
    """Decoder."""
    objective: Literal["bc", "ddpm"] = "ddpm"
    """Regression of the chunk, or diffusion over it."""
    diffusion_steps: int = 16
    """Diffusion steps in training and in sampling."""
    init: Literal["mamba", "upstream"] = "mamba"
    """'mamba': the mixers' own initial weights inside Mamba, Mamba-2, bidirectional Mamba and Hydra
    blocks. 'upstream': N(0, 0.02^2) for every linear layer, as the released code does, which also
    resets Mamba's discretisation step."""
    language: str = "none"
    """What embeds the task's instruction: 'none' for no language, 'hash' for hashed words without a
    download, or a frozen text model of the transformers package, by its id on the Hugging Face hub
    ('openai/clip-vit-base-patch32' is the published one) or as a local folder."""
    language_as: Literal["token", "film"] = "token"
    """'token': one token before the states, as published. 'film': the embedding scales and shifts
    the channels of the image networks."""
    language_dim: int = 512
    """Length of an embedding, a property of the text model."""
    feature_width: int = 128
    """Features per observation key; keys are concatenated in alphabetical order."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """How camera images are encoded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("diffusion_steps", "feature_width", "language_dim")
        sizes = {name: getattr(self, name) for name in names}
        sizes["decoder.layers"] = self.decoder.layers
        if min(sizes.values()) < 1:
            raise InvalidInputError(
                f"MailConfig needs {', '.join(sizes)} of at least 1; got {sizes}. (encoder.layers "
                "may be 0: decoder-only.)"
            )
        if not self.language or (self.language == "none" and self.language_as == "film"):
            raise InvalidInputError(
                f"language={self.language!r} with language_as={self.language_as!r}: name what "
                "embeds the instructions, language='hash' or a text model such as "
                "'openai/clip-vit-base-patch32'; or keep language='none' and "
                "language_as='token' for no language."
            )
        if self.width < 4 or self.width % 2:
            raise InvalidInputError(f"width must be even and at least 4; got {self.width}.")
        self.encoder.check_width(self.width, "encoder")
        self.decoder.check_width(self.width, "decoder")
