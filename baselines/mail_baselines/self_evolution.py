"""Self-evolution: an earlier version of the policy moves the targets of the current one.

Lv et al. 2024 (arXiv:2406.05427), "progressive self-evolution regularisation". The released code
blends in the current prediction, which only rescales the loss, and then switches that off; a
regulariser needs a policy that lags behind. Nothing here knows the trunk, so that the effect of the
regulariser can be told from that of the architecture.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mail_agents.errors import InvalidInputError
from mail_baselines.config import SelfEvolutionConfig

if TYPE_CHECKING:
    from mail_baselines.offline import OfflinePolicy


class SelfEvolution:
    """The earlier policy ("teacher") and what it makes of a batch.

    The teacher is a frozen copy of the policy at the start of the stage, or an average that follows
    it; in the first stage it has no say. It lies outside the policy: it is neither optimised nor
    part of an artifact, only of training checkpoints.

    Args:
        config: Schedule and kind of teacher.
    """

    def __init__(self, config: SelfEvolutionConfig) -> None:
        self.config = config
        self.teacher: OfflinePolicy | None = None

    def refine(
        self, batch: dict[str, Tensor], updates: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Adds ``target`` to a prepared training batch, unless the teacher has no say.

        Args:
            batch: Prepared batch; not modified.
            updates: Updates done so far.

        Returns:
            The batch, and scalars to log: ``alpha``, the teacher's weight, and ``label_shift``, the
            mean absolute change of the valid targets.

        Raises:
            InvalidInputError: The teacher is missing: the run was continued without its state.
        """
        alpha = self.config.alpha(self.config.stage(updates))
        if alpha == 0:
            zero = batch["action"].new_zeros(())
            return batch, {"alpha": zero, "label_shift": zero}
        if self.teacher is None:
            raise InvalidInputError(
                f"Self-evolution has no earlier policy after {updates} updates. Continue a run "
                "from its checkpoint (restore_training_state), or start with 0 updates."
            )
        action = batch["action"]
        with torch.no_grad():
            target = (1.0 - alpha) * action + alpha * self.teacher.predict(batch)
            mask = batch["action_mask"].unsqueeze(-1)
            moved = torch.where(mask, (target - action).abs(), 0.0).sum()
            shift = moved / (mask.sum().clamp(min=1) * action.shape[-1])
        return {**batch, "target": target}, {
            "alpha": action.new_tensor(alpha),
            "label_shift": shift,
        }

    def follow(self, policy: "OfflinePolicy", updates: int) -> None:
        """Lets the teacher follow; called after every update.

        Args:
            policy: The policy in training.
            updates: Updates done, the last one included.
        """
        if self.teacher is None:
            if self.config.teacher == "ema" or updates % self.config.steps_per_stage == 0:
                self.teacher = _frozen(policy)
        elif self.config.teacher == "ema":
            self._average(self.teacher, policy)
        elif updates % self.config.steps_per_stage == 0:
            self.teacher.load_state_dict(policy.state_dict())

    @torch.no_grad()
    def _average(self, teacher: "OfflinePolicy", policy: "OfflinePolicy") -> None:
        weight = 1.0 - self.config.ema_decay
        for average, parameter in zip(teacher.parameters(), policy.parameters(), strict=True):
            average.lerp_(parameter, weight)

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights, or nothing while there is none."""
        return {} if self.teacher is None else {"teacher": dict(self.teacher.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any], policy: "OfflinePolicy") -> None:
        """Takes back :meth:`state_dict`.

        Args:
            state: What it returned.
            policy: The policy in training, for its architecture and device.
        """
        self.teacher = None
        if "teacher" in state:
            self.teacher = _frozen(policy)
            self.teacher.load_state_dict(state["teacher"])


def _frozen(policy: "OfflinePolicy") -> "OfflinePolicy":
    return copy.deepcopy(policy).requires_grad_(False).eval()
