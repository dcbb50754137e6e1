"""One update, as every process of a training computes it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mail_agents.training.distributed import Team

if TYPE_CHECKING:
    from mail_agents.agent import Agent


def gradients(
    agent: "Agent", batch: Mapping[str, Any], team: Team, precision: str = "float32"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Puts the gradients of a batch's loss into the weights; ``agent.apply_gradients()`` is next.

    The loss is the mean over the targets of all processes together, so gradients are those of one
    process on the whole batch.

    Args:
        agent: In training, its optimiser configured.
        batch: This process's part of the batch.
        team: The processes.
        precision: ``"bfloat16"`` computes the loss under autocast.

    Returns:
        The loss and further scalars to log, the same in every process.
    """
    team.reseed(agent)
    with torch.autocast(agent.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        loss, metrics = agent.loss(batch)
    agent.optimizer.zero_grad(set_to_none=True)
    share = 1.0 if team.size == 1 else team.share(agent.loss_weight(batch))
    team.backward(loss, share)
    means = team.mean({**metrics, "loss": loss.detach()}, share)
    return means.pop("loss"), means


def pinned(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Copies arrays to memory that a GPU reads while it computes; for a prefetching thread.

    Args:
        batch: Arrays by key; text stays as it is.
    """
    return {
        key: torch.from_numpy(value).pin_memory() if _is_numeric(value) and key != "task" else value
        for key, value in batch.items()
    }


def _is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
