"""The network of Decision Transformer and its successors: tokens, a trunk, heads.

Chen et al. 2021 (arXiv:2106.01345), section 3; ``decision_transformer.py`` of
github.com/kzl/decision-transformer. One environment step is three tokens, (return-to-go, state,
action); the action is read off the state token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mail_agents.features import FeatureSpec
from mail_agents.policy import Batch
from mail_baselines.config import SequenceConfig
from mail_baselines.offline import OfflinePolicy, state_size, state_vectors
from mail_baselines.trunks import map_state

#: Positions of the tokens of a step; the action token may be missing.
_STATE, _ACTION = 1, 2


class ResidualEmbedding(nn.Module):
    """``W2 GELU(W1 x) + W1 x``: ``ResidualBlock`` of github.com/aopolin-lv/DecisionMamba."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., inputs)`` to ``(..., width)``."""
        x = self.inner(x)
        return self.outer(F.gelu(x)) + x


class SequencePolicy(OfflinePolicy):
    """Predicts the action of every step from the tokens up to its state.

    What :meth:`~mail_agents.policy.Policy.compile` records is the prediction for a window, or one
    step of a stream with its state.

    Args:
        config: Tokens, trunk, heads and loss.
        features: State observations and a vector action.
    """

    return_scale: Tensor
    best_return: Tensor

    def __init__(self, config: SequenceConfig, features: FeatureSpec) -> None:
        super().__init__()
        self.config = config
        self.keys = tuple(sorted(features.observations))
        width, states, actions = config.d_model, state_size(features), features.action.size
        embedding = nn.Linear if config.embedding == "linear" else ResidualEmbedding
        self.embed_timestep = nn.Embedding(config.max_timestep, width)
        self.embed_return = embedding(1, width)
        self.embed_state = embedding(states, width)
        self.embed_action = embedding(actions, width) if config.action_tokens else None
        self.embed_norm = nn.LayerNorm(width)
        self.action_head = _action_head(config, actions)
        self.state_head = nn.Linear(width, states) if config.state_weight else None
        self.return_head = nn.Linear(width, 1) if config.return_weight else None
        if config.init == "normal":
            self.apply(_draw_normal)
        self.trunk: Any = config.make_trunk()
        scale = torch.nan if config.return_scale is None else config.return_scale
        self.register_buffer("return_scale", torch.tensor(scale))
        self.register_buffer("best_return", torch.tensor(torch.nan))
        #: Highest return of the training data, or None; reading the buffer would wait for the
        #: accelerator.
        self.best: float | None = None
        self._loss_of = _loss_of

    def set_returns(self, largest: float, best: float) -> None:
        """Tells the policy about the returns of the training data.

        Args:
            largest: Largest absolute return, which returns are divided by unless the config says
                otherwise.
            best: Highest return, for agents to aim for.
        """
        if self.config.return_scale is None:
            self.return_scale.fill_(largest or 1.0)
        self.best_return.fill_(best)
        self.best = float(self.best_return)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        best = float(self.best_return)
        self.best = None if math.isnan(best) else best

    def tokens(self, batch: Batch) -> Tensor:
        """Embeds a batch with ``action`` of ``(B, L, A)`` to tokens ``(B, L * n, D)``.

        Token ``n t + j`` is the j-th of (return-to-go, state, action) of step t.
        """
        returns = (batch["rtg"] / self.return_scale).unsqueeze(-1)
        parts = [self.embed_return(returns), self.embed_state(state_vectors(batch, self.keys))]
        if self.embed_action is not None:
            parts.append(self.embed_action(batch["action"]))
        time = self.embed_timestep(batch["timestep"]).unsqueeze(2)
        x = torch.stack(parts, dim=2)
        if self.config.time_embedding == "pre_norm":
            x = self.embed_norm(x + time)
        else:
            x = self.embed_norm(x) + time
        return x.flatten(1, 2)

    def encode(self, batch: Batch) -> Tensor:
        """Runs the trunk over a batch's tokens; ``(B, L, n, D)``."""
        mask, n = None, self.config.tokens_per_step
        if self.config.padding == "left_legacy" and self.config.masks_padding:
            mask = batch["mask"].repeat_interleave(n, dim=1)
        return self.trunk(self.tokens(batch), mask).unflatten(1, (-1, n))

    def predict(self, batch: Batch) -> Tensor:
        """Predicts the actions of all steps of a batch with ``action`` ``(B, L, A)``.

        The action of step t depends on the actions before t only.
        """
        return self.action_head(self.encode(batch)[:, :, _STATE])

    def loss(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~mail_agents.policy.Policy`; draws no random numbers but dropout's."""
        return (self._loss_of if self.training else _loss_of)(self, batch)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What :meth:`loss` returns, never compiled."""
        hidden, mask = self.encode(batch), batch["action_mask"]
        error, metrics = self.action_loss(self.action_head(hidden[:, :, _STATE]), batch)
        if self.config.loss_average == "all":
            error = error * (mask.sum() / mask.numel())
        share, total = 1.0 - self.config.state_weight - self.config.return_weight, 0.0
        for name, weight, prediction, truth in self._next_step(hidden, batch):
            extra = _masked_smooth_l1(prediction, truth, self._pairs(batch["mask"]))
            metrics[f"{name}_loss"] = extra.detach()
            total = total + weight * extra
        return share * error + total, metrics

    def _next_step(self, hidden: Tensor, batch: Batch) -> list[tuple[str, float, Tensor, Tensor]]:
        """Predictions, at action tokens, of the next state and return-to-go, in network units."""
        found = []
        if self.state_head is not None:
            states = state_vectors(batch, self.keys)[:, 1:]
            guess = self.state_head(hidden[:, :-1, _ACTION])
            found.append(("state", self.config.state_weight, guess, states))
        if self.return_head is not None:
            returns = (batch["rtg"] / self.return_scale).unsqueeze(-1)[:, 1:]
            guess = self.return_head(hidden[:, :-1, _ACTION])
            found.append(("return", self.config.return_weight, guess, returns))
        return found

    def _pairs(self, mask: Tensor) -> Tensor:
        """Steps ``(B, L-1)`` whose next step counts as a target."""
        if self.config.padding == "left_legacy":
            return mask[:, 1:]  # released: the first real step is predicted from padding too
        return mask[:, :-1] & mask[:, 1:]

    def sample(
        self, batch: Batch, generators: Sequence[torch.Generator], deterministic: bool
    ) -> Tensor:
        """See :class:`~mail_agents.policy.Policy`; the action of the last valid step.

        The batch holds ``past_action`` of the steps before the last; the missing action of the last
        step is a zero that its state token does not see. A training batch is taken as well.
        """
        return self.captured(_last_action, batch)

    def stream(self, batch: Batch, state: Any) -> tuple[Tensor, Any]:
        """Feeds the trunk the tokens of a new step, in constant time.

        Args:
            batch: As for :meth:`sample`, of the new step alone at the start of an episode, else of
                the step before and the new one. Tokens not fed yet are the action of the step
                before, and return-to-go and state of the new one.
            state: State of the trunk, see :class:`~mail_baselines.trunks.StreamingTrunk`.

        Returns:
            The action of the new step ``(B, 1, A)``, and the state after its state token.
        """
        tokens = self.tokens(_with_actions(batch))
        steps, n = batch["rtg"].shape[1], self.config.tokens_per_step
        y = tokens[:, 0]
        for position in range(_ACTION * (steps - 1), n * (steps - 1) + _ACTION):
            y, state = self.trunk.step(tokens[:, position], state)
        return self.action_head(y).unsqueeze(1), state

    def stream_memory(self, rows: int) -> Any:
        """Returns a state of the trunk with memory of its own, for :meth:`stream_in`."""
        return map_state(torch.clone, self.trunk.init_state(rows, self.return_scale.device))

    def stream_in(
        self, batch: Batch, memory: Any, rows: Tensor | None, into: Tensor | None, start: bool
    ) -> Tensor:
        """Does what :meth:`stream` does for some rows of a state, which is changed in place.

        Args:
            batch: As for :meth:`stream`, ``(B, ...)``.
            memory: Of :meth:`stream_memory`.
            rows: ``(B,)`` int64, the row of the state that each row of the batch goes on from; None
                for the first B in order.
            into: ``(B,)`` int64, the row that its new state is left in; None with ``rows``.
            start: Whether episodes start, so that all rows go on from a new state.

        Returns:
            Actions ``(B, 1, A)``.
        """
        inputs = {key: value for key, value in batch.items() if key != "mask"}
        if rows is not None and into is not None:
            inputs |= {"rows": rows, "into": into}
        return self.captured(_started if start else _continued, inputs, memory)


# Functions, not methods: copies of a policy share a compilation, and recordings know them by name.


def _loss_of(policy: SequencePolicy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    return policy.losses(batch)


def _last_action(policy: SequencePolicy, batch: Batch) -> Tensor:
    predicted, mask = policy.predict(_with_actions(batch)), batch["mask"]
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(dim=1)
    rows = torch.arange(len(mask), device=mask.device)
    return predicted[rows, last].unsqueeze(1)


def _started(policy: SequencePolicy, inputs: Mapping[str, Tensor], memory: Any) -> Tensor:
    count = len(inputs["rtg"])
    return _stream(policy, inputs, memory, policy.trunk.init_state(count, inputs["rtg"].device))


def _continued(policy: SequencePolicy, inputs: Mapping[str, Tensor], memory: Any) -> Tensor:
    rows, count = inputs.get("rows"), len(inputs["rtg"])
    state = map_state(lambda part: part[:count] if rows is None else part[rows], memory)
    return _stream(policy, inputs, memory, state)


def _stream(
    policy: SequencePolicy, inputs: Mapping[str, Tensor], memory: Any, state: Any
) -> Tensor:
    action, after = policy.stream(inputs, state)
    into = inputs.get("into")

    def keep(part: Tensor, new: Tensor) -> Tensor:
        return part[: len(new)].copy_(new) if into is None else part.index_copy_(0, into, new)

    map_state(keep, memory, after)
    return action


def _with_actions(batch: Batch) -> dict[str, Tensor]:
    """Gives an acting batch ``action``: the past ones, and a zero for the one to come."""
    if "action" in batch:
        return dict(batch)
    return {**batch, "action": F.pad(batch["past_action"], (0, 0, 0, 1))}


def _action_head(config: SequenceConfig, actions: int) -> nn.Sequential:
    width = config.d_model
    layers: list[nn.Module] = [nn.Linear(width, actions)]
    if config.embedding == "mlp":
        layers = [nn.Linear(width, width), nn.GELU(), *layers]
    return nn.Sequential(*layers, *([nn.Tanh()] if config.squash else []))


def _masked_smooth_l1(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean smooth L1 over the valid steps of ``(B, L, C)``; padded targets may hold anything."""
    target = torch.where(mask.unsqueeze(-1), target, prediction.detach())
    error = F.smooth_l1_loss(prediction, target, reduction="sum")
    return error / (mask.sum().clamp(min=1) * prediction.shape[-1])


def _draw_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
