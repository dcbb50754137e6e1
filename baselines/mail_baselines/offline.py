"""What the offline-RL baselines share: policies that regress one action, and their agents."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mail_agents.agent import Agent
from mail_agents.data.dataset import TrajectoryDataset
from mail_agents.errors import InvalidInputError
from mail_agents.features import FeatureSpec
from mail_agents.objectives import masked_mse
from mail_agents.ops.backends import recording_backends
from mail_agents.policy import Batch, Policy
from mail_baselines.config import OfflineConfig
from mail_baselines.self_evolution import SelfEvolution

#: What released codes put into the actions of padded training steps, in network units.
_LEGACY_ACTION = -10.0


def state_size(features: FeatureSpec) -> int:
    """Width of the state vector: all observations side by side."""
    return sum(feature.size for feature in features.observations.values())


def state_vectors(batch: Batch, keys: Sequence[str]) -> Tensor:
    """Concatenates observations ``(B, L, ...)`` to state vectors ``(B, L, S)``."""
    parts = [batch[f"obs/{key}"] for key in keys]
    return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], dim=-1)


def by_task(dataset: TrajectoryDataset, episodes: Sequence[int]) -> dict[int, np.ndarray]:
    """Groups episodes by their task.

    Args:
        dataset: The dataset.
        episodes: Indices of the episodes to group.

    Returns:
        Indices in the order given, by number of the task; -1 collects those without one.
    """
    chosen = np.asarray(episodes, np.int64)
    tasks = dataset.task_ids[chosen]
    return {int(task): chosen[tasks == task] for task in np.unique(tasks)}


class OfflinePolicy(Policy):
    """A policy that regresses actions.

    Besides what every policy is given, a training batch may hold ``target`` ``(B, J, A)``: what to
    regress in place of ``action``, which stays the input. Every loss reports ``action_loss``, the
    mean squared error to what is regressed, and with a ``target`` also ``action_error``, the one to
    the recorded actions.
    """

    def action_loss(self, predicted: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of predicted actions ``(B, J, A)``, and what to log of it."""
        mask, recorded = batch["action_mask"], batch["action"]
        error = masked_mse(predicted, batch.get("target", recorded), mask)
        metrics = {"action_loss": error.detach()}
        if "target" in batch:
            metrics["action_error"] = masked_mse(predicted.detach(), recorded, mask)
        return error, metrics

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """Returns normalised actions for every step of a training batch, shaped like ``action``."""


class OfflineAgent(Agent):
    """An agent over state observations, with self-evolution and the padding of released codes."""

    config: OfflineConfig
    policy: OfflinePolicy

    def __init__(self, config: OfflineConfig, features: FeatureSpec, **kwargs: Any) -> None:
        super().__init__(config, features, **kwargs)
        evolution = config.self_evolution
        #: What moves the targets in training, or None.
        self.evolution = SelfEvolution(evolution) if evolution.enabled else None

    def check_features(self, features: FeatureSpec) -> None:
        """Refuses observations that are not plain numbers, besides what every agent refuses."""
        super().check_features(features)
        states = features.of_kind("state", "scalar")
        others = sorted(set(features.observations) - set(states))
        if others:
            raise InvalidInputError(
                f"{type(self).__name__} sees state observations only, not {', '.join(others)}. "
                "Choose observations: features.select([...]) in Python, --observations "
                f"{' '.join(states) or 'KEY'} with scripts/train.py."
            )

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See :class:`~mail_agents.agent.Agent`; padding in front gets its released values.

        Released codes pad training windows with states of zero before normalisation and actions of
        -10, and acting windows with states of zero after normalisation and actions of zero. Return
        and time step are zero in both.
        """
        out = super().prepare(batch)
        if self.config.padding != "left_legacy":
            return out
        padded, training = ~out["mask"], "action" in out
        for name in self.features.observations:
            value = out[f"obs/{name}"]
            pad = torch.zeros_like(value)
            if training:
                pad = self.normalizers[f"obs/{name}"](pad)
            shape = (*padded.shape, *[1] * (value.ndim - 2))
            out[f"obs/{name}"] = torch.where(padded.reshape(shape), pad, value)
        for name, fill in (("action", _LEGACY_ACTION), ("past_action", 0), ("rtg", 0)):
            if name in out:
                value = out[name]
                where = padded[:, : value.shape[1]]
                shape = (*where.shape, *[1] * (value.ndim - 2))
                out[name] = value.masked_fill(where.reshape(shape), fill)
        out["timestep"] = out["timestep"].masked_fill(padded, 0)
        return out

    # ---- self-evolution -----------------------------------------------------------------------

    def loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~mail_agents.agent.Agent`; in training mode the targets may be moved."""
        with recording_backends(self.backends):
            prepared, metrics = self.prepare(batch), {}
            if self.evolution is not None and self.policy.training:
                prepared, metrics = self.evolution.refine(prepared, self.updates)
            loss, own = self.training_module(prepared, self.generator)
        return loss, {**own, **metrics}

    def loss_weight(self, batch: Mapping[str, Any]) -> float:
        """See :class:`~mail_agents.agent.Agent`; padding counts where the loss averages over it.

        Losses on further predictions, which have a few targets less, are weighed alike.
        """
        if getattr(self.config, "loss_average", "valid") == "all":
            return float(batch["action_mask"].shape[0] * batch["action_mask"].shape[1])
        return super().loss_weight(batch)

    def on_update(self) -> None:
        """Lets the earlier version of the policy follow."""
        if self.evolution is not None:
            self.evolution.follow(self.policy, self.updates)

    def extra_training_state(self) -> dict[str, Any]:
        """The earlier version of the policy."""
        return {} if self.evolution is None else self.evolution.state_dict()

    def load_extra_training_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`~mail_agents.agent.Agent`."""
        if self.evolution is not None:
            self.evolution.load_state_dict(state, self.policy)
