"""Stable-Baselines3 actors as agents: experts that appear in reports and record datasets.

Only the weights of an actor are taken over, so nothing is unpickled: from a live model with
:func:`from_model`, from the ``policy.pth`` inside a saved ``.zip`` with :func:`from_zip`.
"""

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

import mail_agents
from mail_agents.agent import Agent
from mail_agents.config import AgentConfig, OptimConfig
from mail_agents.errors import CorruptFileError, InvalidInputError, unknown_name
from mail_agents.features import FeatureSpec
from mail_agents.policy import Batch, Policy

Algorithm = Literal["sac", "ppo", "td3"]
Activation = Literal["relu", "tanh"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
#: Activation of ``MlpPolicy`` where the user names none.
_DEFAULT_ACTIVATION: dict[Algorithm, Activation] = {"sac": "relu", "td3": "relu", "ppo": "tanh"}
#: Units that each algorithm's actor acts in: [-1, 1], or those of the environment.
_UNITS: dict[Algorithm, str] = {"sac": "bounds", "td3": "bounds", "ppo": "identity"}
# Bounds that Stable-Baselines3 puts on SAC's log standard deviation.
_LOG_STD = (-20.0, 2.0)
# Where tanh is inverted, actions are kept this far inside (-1, 1).
_EDGE = 1e-6


@dataclass(frozen=True)
class SB3Config(AgentConfig):
    """The actor of a Stable-Baselines3 ``MlpPolicy``."""

    algorithm: Algorithm = "sac"
    """'sac': squashed Gaussian with learnt spread; 'ppo': Gaussian in environment units with one
    spread per action; 'td3': deterministic."""
    hidden: tuple[int, ...] = (256, 256)
    """Units of each hidden layer."""
    activation: Activation = "relu"
    """Non-linearity after each hidden layer."""
    state_norm: Literal["mean_std", "min_max", "quantile", "identity"] = "identity"
    """Normalisation of state observations; Stable-Baselines3 actors see raw ones."""
    action_norm: Literal["mean_std", "min_max", "quantile", "identity", "bounds"] = "bounds"
    """Given by the algorithm: 'bounds' for SAC and TD3, whose actors act in [-1, 1], 'identity' for
    PPO, whose actor acts in environment units."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))
    """Optimiser settings, for behavioural cloning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        units = _UNITS[self.algorithm]
        if self.action_norm != units:
            raise InvalidInputError(
                f"The actor of {self.algorithm!r} has units of its own: action_norm={units!r}, got "
                f"{self.action_norm!r}. Leave action_norm out with the agent "
                f"'sb3/{self.algorithm}'."
            )


class ActorPolicy(Policy):
    """A multilayer perceptron from the concatenated observation to one action.

    Args:
        config: Algorithm and layers.
        observations: Observation keys and sizes, in the order in which they are concatenated.
        actions: Number of action dimensions A.
    """

    def __init__(self, config: SB3Config, observations: Mapping[str, int], actions: int) -> None:
        super().__init__()
        self.algorithm: Algorithm = config.algorithm
        self.keys = tuple(observations)
        widths = [sum(observations.values()), *config.hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), _ACTIVATIONS[config.activation]()]
        self.hidden = nn.Sequential(*layers)
        self.mean = nn.Linear(widths[-1], actions)
        if self.algorithm == "sac":
            self.log_std: Any = nn.Linear(widths[-1], actions)
        elif self.algorithm == "ppo":
            self.log_std = nn.Parameter(torch.zeros(actions))

    def distribution(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation ``(B, A)`` before squashing; no deviation for TD3."""
        parts = [batch[f"obs/{key}"][:, -1].flatten(1) for key in self.keys]
        latent = self.hidden(torch.cat(parts, dim=-1))
        mean = self.mean(latent)
        if self.algorithm == "sac":
            return mean, self.log_std(latent).clamp(*_LOG_STD).exp()
        if self.algorithm == "ppo":
            return mean, self.log_std.exp().expand_as(mean)
        return mean, None

    def loss(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Behavioural cloning: mean squared error for TD3, else the negative log-likelihood."""
        mean, std = self.distribution(batch)
        target = batch["action"][:, 0]
        if std is None:
            return (mean.tanh() - target).square().mean(), {}
        if self.algorithm == "sac":
            target = target.clamp(_EDGE - 1, 1 - _EDGE).atanh()
        scaled = (target - mean) / std
        loss = 0.5 * scaled.square() + std.log() + 0.5 * math.log(2 * math.pi)
        return loss.mean(), {}

    def sample(
        self, batch: Batch, generators: Sequence[torch.Generator], deterministic: bool
    ) -> Tensor:
        """Actions ``(B, 1, A)``: in [-1, 1] for SAC and TD3, in environment units for PPO."""
        mean, std = self.distribution(batch)
        if std is not None and not deterministic:
            noise = torch.stack([torch.randn(mean.shape[-1], generator=g) for g in generators])
            mean = mean + std * noise.to(mean)
        if self.algorithm != "ppo":
            mean = mean.tanh()
        return mean.unsqueeze(1)


class SB3Agent(Agent):
    """Acts like the Stable-Baselines3 model that its weights came from.

    A deterministic agent plays ``model.predict(observation, deterministic=True)``; otherwise
    actions are drawn from the actor's distribution (TD3 has none and is always deterministic).
    """

    config: SB3Config

    def check_features(self, features: FeatureSpec) -> None:
        """Refuses images and other observations that are not vectors of numbers."""
        super().check_features(features)
        others = set(features.observations) - set(features.of_kind("state", "scalar"))
        if others:
            raise InvalidInputError(
                f"A Stable-Baselines3 MLP actor sees states only; {sorted(others)} are not. Select "
                "observation keys with features.select(...)."
            )

    def build_policy(self) -> Policy:
        """The actor network."""
        sizes = {
            key: math.prod(feature.shape)
            for key, feature in sorted(self.features.observations.items())
        }
        return ActorPolicy(self.config, sizes, math.prod(self.features.action.shape))


def from_model(model: Any, features: FeatureSpec) -> SB3Agent:
    """Takes the actor of a Stable-Baselines3 model (SAC, PPO or TD3 with ``MlpPolicy``).

    Args:
        model: The model.
        features: Features of its environment, from :meth:`FeatureSpec.from_spaces`.

    Raises:
        UnknownNameError: The model has another algorithm.
        InvalidInputError: The policy is not an MLP, or the model was trained on observations that
            ``VecNormalize`` scaled. A model that was loaded without its environment does not know.
    """
    algorithm = _known(type(model).__name__.lower())
    scaled = model.get_vec_normalize_env()
    if scaled is not None and scaled.norm_obs:
        raise InvalidInputError(
            "This model was trained under VecNormalize: its actor sees observations scaled by "
            "statistics that are no part of its weights, and would be given raw ones. Train it "
            "with VecNormalize(env, norm_obs=False), which may still scale rewards, or without."
        )
    names = {kind: name for name, kind in _ACTIVATIONS.items()}
    activation = names.get(model.policy.activation_fn)
    if activation is None:
        raise InvalidInputError(
            f"The actor uses {model.policy.activation_fn.__name__}; supported are ReLU and Tanh."
        )
    weights = model.policy.state_dict()
    return _from_weights(weights, algorithm, activation, features)


def from_zip(
    path: str | Path,
    algorithm: Algorithm,
    features: FeatureSpec,
    activation: Activation | None = None,
) -> SB3Agent:
    """Reads the actor of a file that ``model.save`` wrote, without unpickling anything.

    The file does not say whether the model was trained under ``VecNormalize``. If it was, with
    ``norm_obs=True``, the actor expects scaled observations and plays badly on the raw ones it
    gets here: such models cannot be used.

    Args:
        path: The ``.zip`` file.
        algorithm: Which algorithm trained it; the file names it only inside a pickle.
        features: Features of its environment.
        activation: Non-linearity of the hidden layers; None takes the algorithm's default.

    Raises:
        UnknownNameError: The algorithm is not supported.
        CorruptFileError: The file is not one that Stable-Baselines3 wrote.
        InvalidInputError: The weights do not suit the algorithm or the features.
    """
    algorithm = _known(algorithm)
    try:
        with zipfile.ZipFile(path) as archive:
            weights = torch.load(
                io.BytesIO(archive.read("policy.pth")), map_location="cpu", weights_only=True
            )
    except Exception as error:  # zip and torch raise many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CorruptFileError(
            f"{path} is not a model saved by Stable-Baselines3: {reason}. Save one with "
            "model.save(path)."
        ) from error
    return _from_weights(weights, algorithm, activation or _DEFAULT_ACTIVATION[algorithm], features)


def _known(algorithm: str) -> Algorithm:
    if algorithm not in get_args(Algorithm):
        raise unknown_name("Stable-Baselines3 algorithm", algorithm, get_args(Algorithm))
    return cast(Algorithm, algorithm)


# Where each algorithm keeps its hidden layers, its mean and its spread.
_NAMES: dict[Algorithm, tuple[str, str, str]] = {
    "sac": ("actor.latent_pi.", "actor.mu.", "actor.log_std."),
    "ppo": ("mlp_extractor.policy_net.", "action_net.", "log_std"),
    "td3": ("actor.mu.", "", ""),
}


def _from_weights(
    weights: Mapping[str, Tensor], algorithm: Algorithm, activation: str, features: FeatureSpec
) -> SB3Agent:
    hidden, mean, spread = _NAMES[algorithm]
    renamed = {
        name.replace(hidden, "hidden.", 1): value.detach().cpu()
        for name, value in weights.items()
        if name.startswith(hidden)
    }
    if algorithm == "td3":
        last = max((int(name.split(".")[1]) for name in renamed), default=0)
        renamed = {name.replace(f"hidden.{last}.", "mean."): v for name, v in renamed.items()}
    else:
        for old, new in ((mean, "mean."), (spread, "log_std" + "." * (algorithm == "sac"))):
            renamed |= {
                name.replace(old, new, 1): value.detach().cpu()
                for name, value in weights.items()
                if name.startswith(old)
            }
    layers = sorted(
        (int(name.split(".")[1]), len(value))
        for name, value in renamed.items()
        if name.startswith("hidden.") and name.endswith(".weight")
    )
    agent = mail_agents.make(
        f"sb3/{algorithm}",
        features,
        hidden=[units for _, units in layers],
        activation=activation,
        device="cpu",
    )
    assert isinstance(agent, SB3Agent)
    expected = {name: tuple(value.shape) for name, value in agent.policy.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in renamed.items()}
    if given != expected:
        wrong = sorted(set(given.items()) ^ set(expected.items()))
        raise InvalidInputError(
            f"These are not the weights of a {algorithm.upper()} MlpPolicy actor for observations "
            f"{sorted(features.observations)} and actions {features.action.shape}; they differ in "
            f"{wrong[:4]}."
        )
    agent.policy.load_state_dict(renamed)
    return agent
