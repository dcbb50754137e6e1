"""The sequence model of MaIL: observation features and a noisy chunk in, a chunk out.

Four variants from two switches (arXiv:2406.08234, figures 1 and 2; arithmetic as in the released
code, github.com/ALRhub/MaIL, ``agents/models/{oc_ddpm,bc}``):

    variant   encoder             decoder
    D-Ma      none                Mamba stack over [tau | states | actions]
    ED-Ma     Mamba stack over    Mamba stack over [TV | SV | actions]; the encoder output is added
              [tau|states|AV]     to the residual stream after every block
    D-Tr      none                causal attention over [tau | states | actions]
    ED-Tr     causal attention    fused causal self- and cross-attention over [actions], with the
              over [tau|states]   encoder output as memory

``tau`` is the diffusion step; behaviour cloning has neither ``tau`` nor TV, and learnt queries in
place of noisy actions. AV, TV and SV are learnt variables that give encoder and decoder the same
length and the same order of roles. Encoder and decoder may use different mixers, and Mamba-2,
bidirectional Mamba or Hydra in place of Mamba: the decoder's mixer decides how they are joined.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mail_agents.agents.mail_config import StackConfig
from mail_agents.errors import InvalidInputError
from mail_agents.mixers.stack import SSM_MIXERS, MambaStack, TransformerStack

_INIT_STD = 0.02


class StepEmbedding(nn.Module):
    """Diffusion step to a token: sinusoids, then a two-layer Mish perceptron.

    Args:
        width: Token width; half of it sine, half cosine, of geometric frequencies 1 .. 1e-4.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        rates = torch.exp(-math.log(1e4) * torch.arange(half) / (half - 1))
        self.register_buffer("frequencies", rates, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.Mish(), nn.Linear(2 * width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embeds integer steps ``(B,)`` as ``(B, width)``."""
        angles = t.unsqueeze(-1) * self.frequencies
        return self.mlp(torch.cat((angles.sin(), angles.cos()), dim=-1))


class Context(NamedTuple):
    """What the decoder reads besides the action tokens.

    Attributes:
        before: Tokens before them ``(B, m, D)``, or None.
        given: The encoder's output ``(B, ., D)`` by the name that the decoder has for it.
    """

    before: Tensor | None
    given: dict[str, Tensor]


class MailBackbone(nn.Module):
    """State features (and a noisy chunk with its diffusion step) to a chunk.

    Args:
        feature_dim: F, width of the observation features.
        action_dim: A.
        max_states: Largest number of state tokens: the history, plus one for a language token.
        horizon: J, predicted actions.
        width: D, token width.
        encoder: Encoder stack; ``layers=0`` makes the model decoder-only.
        decoder: Decoder stack.
        diffusion: Whether the model denoises a chunk (else it regresses one).
        init: See :class:`~mail_agents.agents.mail_config.MailConfig`.
    """

    def __init__(
        self,
        *,
        feature_dim: int,
        action_dim: int,
        max_states: int,
        horizon: int,
        width: int,
        encoder: StackConfig,
        decoder: StackConfig,
        diffusion: bool,
        init: Literal["mamba", "upstream"] = "mamba",
    ) -> None:
        super().__init__()
        self.max_states = max_states
        self.horizon = horizon
        self.diffusion = diffusion
        length = int(diffusion) + max_states + horizon
        self.state_proj = nn.Linear(feature_dim, width)
        # The newest state and the first action share row max_states - 1. Behaviour cloning never
        # reads the rows after it; they stay so that sizes equal the published model's.
        self.positions = nn.Embedding(max_states + horizon - 1, width)
        if diffusion:
            self.step_embedding = StepEmbedding(width)
            self.action_proj = nn.Linear(action_dim, width)
        else:
            self.action_queries = nn.Embedding(horizon, width)
        has_encoder = encoder.layers > 0
        self.encoder = _stack(encoder, width, length, cross=False) if has_encoder else None
        self.decoder = _stack(decoder, width, length, cross=has_encoder)
        #: Whether encoder and decoder are joined by addition, which needs equal lengths.
        self.aligned = has_encoder and decoder.mixer != "attention"
        if self.aligned:
            self.action_variables = nn.Embedding(horizon, width)
            # Row 0 is the time variable TV when there is a time token.
            self.state_variables = nn.Embedding(int(diffusion) + max_states, width)
        self.head = nn.Linear(width, action_dim)
        self._init_weights(init)

    def forward(
        self, features: Tensor, noisy: Tensor | None = None, t: Tensor | None = None
    ) -> Tensor:
        """Predicts noise (diffusion) or normalised actions (behaviour cloning).

        Args:
            features: ``(B, n, F)`` with 1 <= n <= ``max_states``, oldest first, the newest
                observation last, a language token first.
            noisy: ``(B, J, A)`` noisy actions; diffusion only.
            t: ``(B,)`` int64 diffusion steps; diffusion only.

        Returns:
            ``(B, J, A)``.

        Raises:
            InvalidInputError: There are no or too many state tokens, a width or dtype is not the
                model's, or ``noisy`` and ``t`` do not suit the objective.
        """
        self.check(features, noisy, t)
        seen = self.context(self.lead_tokens(features, t))
        tokens = self.action_tokens(noisy, *features.shape[:2])
        if seen.before is not None:
            tokens = torch.cat((seen.before, tokens), dim=1)
        return self.head(self.decoder(tokens, **seen.given)[:, -self.horizon :])

    def lead_tokens(self, features: Tensor, t: Tensor | None) -> Tensor:
        """Builds what precedes the actions, [tau | states] or [states], ``(B, m, D)``."""
        states = self.state_proj(features) + self.positions.weight[: features.shape[1]]
        if t is None:
            return states
        return torch.cat((self.step_embedding(t).unsqueeze(1), states), dim=1)

    def action_tokens(self, noisy: Tensor | None, rows: int, n: int) -> Tensor:
        """Builds the action tokens ``(rows, J, D)`` that follow n states."""
        if noisy is None:
            return self.action_queries.weight.expand(rows, -1, -1)
        return self.action_proj(noisy) + self.positions.weight[n - 1 : n - 1 + self.horizon]

    def context(self, lead: Tensor) -> Context:
        """Computes what the decoder reads besides the actions, from what precedes them."""
        if self.encoder is None:
            return Context(lead, {})
        if not self.aligned:
            return Context(None, {"memory": self.encoder(lead)})
        rows, length, _ = lead.shape
        fill = self.action_variables.weight.expand(rows, -1, -1)
        before = self.state_variables.weight[:length].expand(rows, -1, -1)
        return Context(before, {"aggregate": self.encoder(torch.cat((lead, fill), dim=1))})

    def check(self, features: Tensor, noisy: Tensor | None, t: Tensor | int | None) -> None:
        """Refuses arguments that :meth:`forward` cannot take; see there."""
        if features.ndim != 3 or not 1 <= features.shape[1] <= self.max_states:
            raise InvalidInputError(
                f"The model takes 1 to {self.max_states} state tokens (B, n, F); got features of "
                f"shape {tuple(features.shape)}."
            )
        _check_width("features", features, self.state_proj.in_features)
        if self.diffusion != (noisy is not None) or self.diffusion != (t is not None):
            kind = "needs" if self.diffusion else "does not take"
            raise InvalidInputError(
                f"This model {kind} noisy actions and their diffusion steps: diffusion models are "
                "given both, behaviour-cloning models neither."
            )
        if noisy is None:
            return
        if noisy.ndim != 3 or noisy.shape[1] != self.horizon:
            raise InvalidInputError(
                f"Expected {self.horizon} noisy actions per row (B, J, A); got shape "
                f"{tuple(noisy.shape)}."
            )
        _check_width("noisy actions", noisy, self.head.out_features)

    @torch.no_grad()
    def _init_weights(self, init: Literal["mamba", "upstream"]) -> None:
        own = {
            id(part)
            for mixer in self.modules()
            if isinstance(mixer, tuple(SSM_MIXERS.values()))
            for part in mixer.modules()
        }
        for module in self.modules():
            if init == "mamba" and id(module) in own:
                continue
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.positions.weight)


def _check_width(name: str, given: Tensor, width: int) -> None:
    if given.shape[-1] != width or not given.is_floating_point():
        raise InvalidInputError(
            f"The model was made for {name} of {width} floats; got shape {tuple(given.shape)}, "
            f"{given.dtype}. Integers are to be normalised and converted first, as "
            "agent.prepare(batch) does."
        )


def _stack(config: StackConfig, width: int, max_len: int, *, cross: bool) -> Any:
    if config.mixer == "attention":
        return TransformerStack(
            width, config.layers, config.heads, config.dropout, max_len=max_len, cross=cross
        )
    return MambaStack(
        width,
        config.layers,
        d_state=config.d_state,
        d_conv=config.d_conv,
        expand=config.expand,
        mixer=config.mixer,
        headdim=config.headdim,
    )
