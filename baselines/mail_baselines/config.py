"""Configurations of the offline-RL baselines; imports no torch."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mail_agents.config import AgentConfig, OptimConfig
from mail_agents.errors import InvalidInputError

if TYPE_CHECKING:
    from mail_baselines.trunks import Trunk

#: Normalisations that put actions in [-1, 1], which tanh can reach.
_SQUASHABLE = ("bounds", "min_max", "identity")


def _sequence_optim() -> OptimConfig:
    """The recipe that Decision Transformer and its successors share."""
    return OptimConfig(
        name="adamw", lr=1e-4, weight_decay=1e-4, grad_clip=0.25, warmup_steps=10_000, batch_size=64
    )


@dataclass(frozen=True)
class SelfEvolutionConfig:
    """Targets that move from recorded actions toward those of an earlier version of the policy.

    Training is cut into stages of ``steps_per_stage`` updates. In stage k (from 1) the target is
    ``(1 - alpha) action + alpha teacher(window)`` with ``alpha = min(alpha_cap, alpha_final * k /
    stages)``; the first stage has no teacher yet, so its alpha is 0. The schedule is that of
    ``training/trainer.py`` of github.com/aopolin-lv/DecisionMamba, where a later line sets alpha to
    zero; the teacher is what the paper describes (arXiv:2406.05427).
    """

    enabled: bool = False
    """Whether to train toward an earlier version of the policy."""
    alpha_final: float = 0.85
    """Weight of the earlier policy in the last stage, before the cap."""
    alpha_cap: float = 0.5
    """Largest weight of the earlier policy."""
    stages: int = 40
    """Stages over which the weight rises; it stays after the last one."""
    steps_per_stage: int = 2500
    """Updates per stage."""
    teacher: Literal["snapshot", "ema"] = "snapshot"
    """'snapshot': the policy at the start of the stage. 'ema': an average that follows it."""
    ema_decay: float = 0.999
    """Decay of the average, for teacher='ema'."""

    def __post_init__(self) -> None:
        if not (
            0 <= self.alpha_final <= 1 and 0 <= self.alpha_cap <= 1 and 0 <= self.ema_decay < 1
        ):
            raise InvalidInputError(
                "SelfEvolutionConfig needs alpha_final and alpha_cap in [0, 1] and ema_decay in "
                f"[0, 1); got {self}."
            )
        if min(self.stages, self.steps_per_stage) < 1:
            raise InvalidInputError(
                f"SelfEvolutionConfig needs stages and steps_per_stage of at least 1; got {self}."
            )

    def stage(self, updates: int) -> int:
        """Stage (from 1) of the update that follows ``updates`` updates."""
        return 1 + updates // self.steps_per_stage

    def alpha(self, stage: int) -> float:
        """Weight of the earlier policy in a stage (from 1)."""
        if stage == 1:
            return 0.0
        return min(self.alpha_cap, self.alpha_final * min(stage, self.stages) / self.stages)


@dataclass(frozen=True)
class OfflineConfig(AgentConfig):
    """What the offline-RL baselines share: one action per step, in [-1, 1] inside the network."""

    action_norm: Literal["mean_std", "min_max", "quantile", "identity", "bounds"] = "bounds"
    """Normalisation of actions; 'bounds' maps the bounds of the action space to [-1, 1]."""
    squash: bool = True
    """End the action head with tanh, so that actions stay in [-1, 1]."""
    self_evolution: SelfEvolutionConfig = field(default_factory=SelfEvolutionConfig)
    """Training toward an earlier version of the policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon != 1:
            raise InvalidInputError(
                f"Offline-RL agents plan one action at a time: horizon is 1, got {self.horizon}."
            )
        if self.squash and self.action_norm not in _SQUASHABLE:
            raise InvalidInputError(
                f"squash=True limits normalised actions to [-1, 1], but "
                f"action_norm={self.action_norm!r} puts valid actions outside. Use action_norm="
                "'bounds' (or 'min_max' where the action space has no bounds), or squash=False."
            )


@dataclass(frozen=True)
class SequenceConfig(OfflineConfig):
    """A policy over the tokens (return-to-go, state, action) of the last steps.

    Abstract: subclasses add a trunk with :meth:`make_trunk`.
    """

    #: Whether the trunk can be fed token by token.
    streams: ClassVar[bool] = False
    #: Whether padding in front of a window is hidden from the trunk, as upstream does.
    masks_padding: ClassVar[bool] = False

    history: int = 20
    """Steps in the window (context length K)."""
    padding: Literal["edge", "none", "right", "left_legacy"] = "right"
    """'right': padding follows the valid steps in training, and acting sees valid steps only.
    'left_legacy': padding in front, with other values in training than in acting, as released."""
    d_model: int = 128
    """Token width."""
    layers: int = 3
    """Blocks of the trunk."""
    reward_mode: Literal["dense", "delayed"] = "dense"
    """'delayed': the whole return comes at the end of an episode, and the target never falls."""
    return_scale: float | None = None
    """Returns are divided by this; None takes the largest absolute return of the training data."""
    max_timestep: int = 1000
    """Rows of the table of time embeddings: the longest episode."""
    embedding: Literal["linear", "mlp"] = "linear"
    """'mlp': embeddings and action head get a hidden layer of width d_model."""
    time_embedding: Literal["pre_norm", "post_norm"] = "pre_norm"
    """Whether the time embedding is added before or after the norm of the tokens."""
    action_tokens: bool = True
    """Whether past actions are shown to the trunk."""
    state_weight: float = 0.0
    """Share of the loss for predicting the next state; 0 builds no head for it."""
    return_weight: float = 0.0
    """Share of the loss for predicting the next return-to-go; 0 builds no head for it."""
    loss_average: Literal["valid", "all"] = "valid"
    """Average the action loss over valid steps, or over all, so that padding shrinks it."""
    init: Literal["torch", "normal"] = "torch"
    """Initial weights of embeddings and heads: torch's own, or N(0, 0.02) with zero biases; with
    the latter, queries, keys and values of a transformer are Xavier uniform. Both as released."""
    acting: Literal["window", "stream"] = "window"
    """'window': read the last ``history`` steps anew at every step, as in training. 'stream': carry
    the trunk's state over the whole episode, at constant cost per step."""
    optim: OptimConfig = field(default_factory=_sequence_optim)
    """Optimiser settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.d_model, self.layers, self.max_timestep) < 1:
            raise InvalidInputError(
                "d_model, layers and max_timestep are at least 1; got "
                f"{self.d_model}, {self.layers}, {self.max_timestep}."
            )
        if self.return_scale is not None and not 0 < self.return_scale < math.inf:
            raise InvalidInputError(
                f"return_scale is positive or None (from the data); got {self.return_scale}."
            )
        self._check_weights()
        if self.acting == "stream" and not (self.streams and self.history > 1):
            raise InvalidInputError(
                f"acting='stream' needs history >= 2 and a trunk with a recurrent state; a "
                f"{type(self).__name__} with history={self.history} cannot. Use acting='window', "
                "or a Mamba agent such as 'decision-mamba' or 'dm'."
            )
        if self.acting == "stream" and self.padding == "left_legacy":
            raise InvalidInputError(
                "acting='stream' feeds the trunk real steps only, but with padding='left_legacy' "
                "it was trained on windows that begin with padding. Use acting='window', or train "
                "with padding='right' (--config.padding right)."
            )

    def _check_weights(self) -> None:
        weights = (self.state_weight, self.return_weight)
        if not (min(weights) >= 0 and sum(weights) < 1):
            raise InvalidInputError(
                "state_weight and return_weight are not negative and sum to less than 1, the rest "
                f"is for the action; got {weights}."
            )
        if sum(weights) and not self.action_tokens:
            raise InvalidInputError(
                "The next state and return are predicted at action tokens: with "
                "action_tokens=False, state_weight and return_weight are 0."
            )

    @property
    def tokens_per_step(self) -> int:
        """3 for (return-to-go, state, action), 2 without action tokens."""
        return 3 if self.action_tokens else 2

    def make_trunk(self) -> "Trunk":
        """Builds the trunk."""
        raise NotImplementedError


@dataclass(frozen=True)
class DTConfig(SequenceConfig):
    """Decision Transformer (Chen et al. 2021, arXiv:2106.01345)."""

    masks_padding: ClassVar[bool] = True

    heads: int = 1
    """Attention heads."""
    dropout: float = 0.1
    """Dropout of tokens, attention weights and residual branches."""
    activation: Literal["relu", "gelu"] = "relu"
    """Non-linearity of the MLPs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_dropout(self.dropout)
        if self.heads < 1 or self.d_model % self.heads:
            raise InvalidInputError(
                f"d_model={self.d_model} is not divisible by heads={self.heads}."
            )

    def make_trunk(self) -> "Trunk":
        """Builds a GPT-2 trunk."""
        from mail_baselines.trunks import GPTTrunk

        tokens = self.history * self.tokens_per_step
        return GPTTrunk(
            self.d_model,
            self.layers,
            self.heads,
            self.dropout,
            self.activation,
            max_tokens=tokens,
            xavier_qkv=self.init == "normal",
        )


@dataclass(frozen=True)
class DecisionMambaConfig(SequenceConfig):
    """Decision Mamba (Ota 2024, arXiv:2403.19925): Mamba in place of attention."""

    streams: ClassVar[bool] = True

    dropout: float = 0.1
    """Dropout of tokens and MLPs."""
    norm: Literal["layer", "rms"] = "layer"
    """Norm in front of the mixers."""
    released_init: bool = False
    """Draw the weights inside the mixers from N(0, 0.02), which resets Mamba's step sizes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_dropout(self.dropout)

    def make_trunk(self) -> "Trunk":
        """Builds a trunk of Mamba blocks with MLPs."""
        from mail_baselines.trunks import MambaTrunk

        return MambaTrunk(
            self.d_model,
            self.layers,
            norm=self.norm,
            dropout=self.dropout,
            released_init=self.released_init,
        )


@dataclass(frozen=True)
class MultiGrainedConfig(SequenceConfig):
    """Multi-grained Decision Mamba (Lv et al. 2024, arXiv:2406.05427)."""

    streams: ClassVar[bool] = True

    variant: Literal["causal", "figure", "released"] = "causal"
    """'causal': the released tensors, grouped so that no token sees a later one. 'figure': one gate
    and one output projection, as the paper draws it. 'released': as published, which lets the trunk
    see the actions it is to predict."""

    def __post_init__(self) -> None:
        if self.variant == "released" and self.acting == "stream":
            raise InvalidInputError(
                "variant='released' reads later tokens, so it cannot act step by step: use "
                "acting='window', or variant='causal'."
            )
        super().__post_init__()
        if self.variant == "released" and self.padding != "left_legacy":
            raise InvalidInputError(
                "variant='released' reads groups of a full window, and its outputs depend on later "
                f"tokens: it needs padding='left_legacy', got {self.padding!r}."
            )

    def make_trunk(self) -> "Trunk":
        """Builds a trunk of two-branch Mamba blocks."""
        from mail_baselines.trunks import MultiGrainedTrunk

        return MultiGrainedTrunk(
            self.d_model, self.layers, variant=self.variant, tokens_per_step=self.tokens_per_step
        )


@dataclass(frozen=True)
class BCConfig(OfflineConfig):
    """Behaviour cloning with a multilayer perceptron, optionally on the best episodes only."""

    padding: Literal["edge", "none", "right", "left_legacy"] = "edge"
    """'edge': short histories repeat the first state. 'left_legacy': zeros in front, and training
    windows that end at the end of an episode more often than elsewhere, as released."""
    width: int = 256
    """Units of each hidden layer."""
    layers: int = 2
    """Hidden layers."""
    dropout: float = 0.0
    """Dropout after each hidden layer."""
    top_fraction: float = 1.0
    """Share of each task's data to train on, the episodes with the highest returns (%BC)."""
    by: Literal["timesteps", "trajectories"] = "timesteps"
    """What the share counts."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))
    """Optimiser settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_dropout(self.dropout)
        if min(self.width, self.layers) < 1 or not 0 < self.top_fraction <= 1:
            raise InvalidInputError(
                "BCConfig needs width and layers of at least 1 and top_fraction in (0, 1]; got "
                f"{self.width}, {self.layers}, {self.top_fraction}."
            )


def _check_dropout(value: Any) -> None:
    if not 0.0 <= value < 1.0:
        raise InvalidInputError(f"dropout must be in [0, 1); got {value}.")
