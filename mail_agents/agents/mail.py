"""MaIL: imitation learning with Mamba (Jia et al., CoRL 2024, arXiv:2406.08234).

Eight published variants are presets of one agent: {decoder-only, encoder-decoder} x {Mamba,
Transformer} x {behaviour cloning, diffusion}; see ``docs/agents/mail.md``. Differences from the
released code, each reversed by the ``-released`` presets:

- short histories at the start of an episode are filled by repeating the first observation, in
  training and in acting; the release trains on full histories only and meets its first short one
  when acting, with positions it has learnt for other tokens;
- Mamba blocks keep Mamba's own initial weights; the release overwrites them.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mail_agents.agent import Agent
from mail_agents.agents.mail_backbone import MailBackbone
from mail_agents.agents.mail_config import MailConfig, StackConfig
from mail_agents.agents.mail_plan import Denoiser
from mail_agents.data.instructions import instruction
from mail_agents.data.stats import FeatureStats
from mail_agents.encoders.augment import Augmentation
from mail_agents.encoders.language import InstructionEmbedder, task_embedder
from mail_agents.encoders.observation import ObservationEncoder
from mail_agents.encoders.weights import load_resnet18, read_image_weights
from mail_agents.errors import InvalidInputError, MissingStatisticsError
from mail_agents.features import FeatureSpec
from mail_agents.objectives import Draws, Objective
from mail_agents.objectives.bc import BC
from mail_agents.policy import Policy

__all__ = ["MailAgent", "MailBackbone", "MailConfig", "MailPolicy", "StackConfig"]

#: Key of the provenance of an agent whose image networks started from a file.
_IMAGE_WEIGHTS = "image_weights"


def repeat_first_valid(x: Tensor, mask: Tensor) -> Tensor:
    """Replaces padded steps at the start of each row by the first valid one.

    Args:
        x: ``(B, H, ...)``.
        mask: ``(B, H)`` bool; False steps come first.
    """
    first = mask.to(torch.uint8).argmax(dim=1, keepdim=True)
    steps = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x[rows, torch.maximum(steps, first)]


class MailPolicy(Policy):
    """Encoders, sequence model and objective over normalised windows.

    What :meth:`~mail_agents.policy.Policy.compile` compiles is the loss after random numbers have
    been drawn, but for those of dropout, which are the compiler's own. On the CPU that is one
    graph, in which scan and convolution of Mamba blocks are single operations; on a GPU those two
    interrupt it, because which of their kernels runs is decided at run time. A recorded plan holds
    everything from the observations to the chunk; its noise is drawn before.

    Args:
        config: Configuration.
        features: Observations and action.

    Raises:
        InvalidInputError: An observation has no encoder, or there are no images to condition.
    """

    action_low: Tensor
    action_high: Tensor

    def __init__(self, config: MailConfig, features: FeatureSpec) -> None:
        super().__init__()
        self.history = config.history
        self.padding = config.padding
        self.chunk = (config.horizon, features.action.size)
        self.augments = config.image.augments
        self.film = config.language_as == "film"
        self.observation_encoder = ObservationEncoder(
            features.observations,
            config.feature_width,
            config.image,
            config.language_dim if self.film else None,
        )
        feature_dim = self.observation_encoder.out_dim
        with_token = config.language != "none" and not self.film
        self.language = nn.Linear(config.language_dim, feature_dim) if with_token else None
        self.backbone = MailBackbone(
            feature_dim=feature_dim,
            action_dim=features.action.size,
            max_states=config.history + int(with_token),
            horizon=config.horizon,
            width=config.width,
            encoder=config.encoder,
            decoder=config.decoder,
            diffusion=config.objective == "ddpm",
            init=config.init,
        )
        self.objective = _objective(config)
        unknown = torch.full((features.action.size,), torch.nan)
        self.register_buffer("action_low", unknown.clone())
        self.register_buffer("action_high", unknown.clone())
        self._loss_of = _loss_of

    def set_action_bounds(self, low: Tensor, high: Tensor) -> None:
        """Sets the range, in normalised units, that diffusion samples are clamped to; ``(A,)``."""
        self.action_low.copy_(low.reshape(-1))
        self.action_high.copy_(high.reshape(-1))

    def encode(
        self, batch: Mapping[str, Tensor], augmentations: Mapping[str, Augmentation] | None = None
    ) -> Tensor:
        """Encodes a batch's observations to state features ``(B, n, F)``.

        n is the history length given, plus one for a language token (placed first).

        Args:
            batch: See :class:`~mail_agents.policy.Policy`.
            augmentations: Of ``observation_encoder.draw``; images are not augmented without.
        """
        observations, mask = self._observations(batch), batch["mask"]
        if self.padding == "edge":
            observations = {k: repeat_first_valid(x, mask) for k, x in observations.items()}
        condition = batch["task_emb"] if self.film else None
        features = self.observation_encoder(observations, condition, augmentations)
        if self.language is None:
            return features
        return torch.cat((self.language(batch["task_emb"]).unsqueeze(1), features), dim=1)

    def _observations(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: batch[f"obs/{key}"] for key in self.observation_encoder.keys}

    def _check_history(self, mask: Tensor) -> None:
        if self.padding == "none" and not bool(mask.all()):
            raise InvalidInputError(
                "This policy was made with padding='none' and cannot see padded steps: give it "
                "only the steps that exist, or make it with padding='edge'."
            )

    def loss(
        self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~mail_agents.policy.Policy`; targets that do not exist are ignored.

        Images are augmented in training mode only.

        Raises:
            InvalidInputError: Images are to be augmented, and there is no generator to draw from;
                or the policy was made without padding and a step is masked.
        """
        self._check_history(batch["mask"])
        augmenting = self.augments and self.training
        if augmenting and generator is None:
            raise InvalidInputError(
                "image.crop and image.jitter draw from the generator that the loss is given, never "
                "from the global stream: policy.loss(batch, torch.Generator().manual_seed(0)), or "
                "policy.eval() for the loss without augmentation."
            )
        augmentations = None
        if augmenting and generator is not None:
            augmentations = self.observation_encoder.draw(self._observations(batch), generator)
        draws = self.objective.draw(batch["action"], generator)
        run = self._loss_of if self.training else _loss_of
        return run(self, batch, augmentations, draws), {}

    def sample(
        self,
        batch: Mapping[str, Tensor],
        generators: Sequence[torch.Generator],
        deterministic: bool,
    ) -> Tensor:
        """See :class:`~mail_agents.policy.Policy`; observations are encoded once per plan.

        Raises:
            MissingStatisticsError: A diffusion policy does not know the action bounds.
            InvalidInputError: The policy was made without padding and a step is masked.
        """
        self._check_history(batch["mask"])
        if self.objective.conditions_on_noise and bool(self.action_low.isnan().any()):
            raise MissingStatisticsError(
                "A diffusion policy clamps to the range of the training actions and was not given "
                "it. Call agent.fit_statistics(dataset), or policy.set_action_bounds(low, high)."
            )
        noise = self.objective.draw_noise(
            (len(batch["mask"]), *self.chunk),
            generators,
            deterministic=deterministic,
            like=self.action_low,
        )
        inputs = {k: v for k, v in batch.items() if k.startswith("obs/")}
        inputs |= {k: batch[k] for k in ("mask", "task_emb") if k in batch}
        return self.captured(_plan_of, inputs if noise is None else inputs | {"noise": noise})


def _plan_of(policy: MailPolicy, inputs: Mapping[str, Tensor]) -> Tensor:
    """The deterministic part of sampling."""
    net = Denoiser(policy.backbone, policy.encode(inputs))
    low, high = policy.action_low, policy.action_high
    return policy.objective.sample(net, inputs.get("noise"), low=low, high=high)


def _loss_of(
    policy: MailPolicy,
    batch: Mapping[str, Tensor],
    augmentations: Mapping[str, Augmentation] | None,
    draws: Draws,
) -> Tensor:
    """The deterministic part of the loss."""
    features = policy.encode(batch, augmentations)
    mask = batch["action_mask"]
    # A decoder that is not causal sees the end of the noisy chunk from its start: after the end of
    # an episode its last action stands there, whatever the batch holds.
    actions = torch.where(mask.unsqueeze(-1), batch["action"], 0.0)
    actions = repeat_first_valid(actions.flip(1), mask.flip(1)).flip(1)
    return policy.objective.training_loss(
        lambda noisy, t: policy.backbone(features, noisy, t), actions, mask, draws
    )


def _objective(config: MailConfig) -> Objective:
    if config.objective == "bc":
        return BC()
    # diffusers takes seconds to import, and behaviour cloning does not need it.
    from mail_agents.objectives.diffusion import DDPM

    return DDPM(config.diffusion_steps)


class MailAgent(Agent):
    """MaIL in time and units; see :class:`~mail_agents.agent.Agent` for the arguments."""

    config: MailConfig
    #: Embeddings by task that need no text model again; it may be out of reach by then.
    _embedded: Mapping[str, np.ndarray] | None = None

    def build_policy(self) -> MailPolicy:
        """Builds the network from ``self.config`` and ``self.features``."""
        return MailPolicy(self.config, self.features)

    def task_embedder(self) -> InstructionEmbedder | None:
        """Returns the embedder of tasks, or None for an agent without language."""
        return task_embedder(self.config.language, self.config.language_dim, self._embedded)

    def missing_statistics(self) -> list[str]:
        """See :class:`~mail_agents.agent.Agent`; embeddings and image weights count, too."""
        missing = super().missing_statistics()
        if self.config.language != "none" and self.task_embeddings is None:
            missing.append("task_embeddings")
        if self.config.image.weights is not None and _IMAGE_WEIGHTS not in self.provenance:
            missing.append("image.weights")
        return missing

    def set_statistics(self, stats: Mapping[str, FeatureStats], tasks: Sequence[str] = ()) -> None:
        """See :class:`~mail_agents.agent.Agent`; also starts the image networks from their file.

        The file is read once in the life of an agent: not again when a trained or loaded agent is
        fitted to other data, and never to load an artifact. In the same way only tasks that the
        agent has not met are embedded.
        """
        # What can fail comes first, so that a failure leaves the agent as it was.
        if self.task_embeddings is not None:
            self._embedded = dict(zip(self.tasks, self.task_embeddings, strict=True))
        embedder = self.task_embedder()
        if embedder is not None:
            self._embedded = dict(zip(tasks, embedder(tasks), strict=True))
        if "image.weights" in self.missing_statistics():
            self._start_from_image_weights(str(self.config.image.weights))
        super().set_statistics(stats, tasks)
        if self.config.language != "none":
            self.provenance["language"] = {
                "model": self.config.language,
                "instructions": {task: instruction(task) for task in self.tasks},
            }

    def _start_from_image_weights(self, path: str) -> None:
        weights = read_image_weights(path)
        for policy in self.policies():
            for trunk in cast(MailPolicy, policy).observation_encoder.trunks():
                load_resnet18(trunk, weights)
        self.provenance[_IMAGE_WEIGHTS] = {"file": weights.path.name, "sha256": weights.sha256}
