"""Optimisers and learning-rate schedules from an :class:`~mail_agents.config.OptimConfig`."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mail_agents.config import OptimConfig
from mail_agents.errors import InvalidInputError

_NO_DECAY_NAMES = frozenset({"A_log", "A_b_log", "D", "D_b", "dt_bias"})
_NO_DECAY_MODULES = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _decays_all(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Everything, as in the releases of Decision Transformer and plain Decision Mamba."""
    return True


def _decays_but_biases_and_layernorms(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """As in github.com/aopolin-lv/DecisionMamba, where an RMSNorm is no LayerNorm."""
    return "bias" not in name and not isinstance(owner, nn.LayerNorm)


def _decays_matrices(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels, unless zero is no neutral value for them."""
    return not (
        parameter.ndim < 2
        or name in _NO_DECAY_NAMES
        or isinstance(owner, _NO_DECAY_MODULES)
        or getattr(parameter, "_no_weight_decay", False)
    )


_SCHEMES: dict[str, Callable[[nn.Module, str, nn.Parameter], bool]] = {
    "matrices": _decays_matrices,
    "all": _decays_all,
    "all_but_biases_and_layernorms": _decays_but_biases_and_layernorms,
}


def parameter_groups(
    module: nn.Module, weight_decay: float, decayed: str = "matrices"
) -> list[dict]:
    """Splits trainable parameters into those with and without weight decay.

    Args:
        module: The parameters' owner.
        weight_decay: Of those that decay.
        decayed: Which ones do, see :class:`~mail_agents.config.OptimConfig`. Under ``"matrices"``
            biases, gains and every other vector, embeddings, and the state-space parameters
            ``A_log``, ``D`` and ``dt_bias`` do not: zero is no neutral value for them.

    Returns:
        Groups for an optimiser: the parameters that decay, then the others; none is empty.
    """
    decays = _SCHEMES[decayed]
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            (decay if decays(owner, name, parameter) else keep).append(parameter)
    # A parameter that two modules share must appear once.
    decay, keep = list(dict.fromkeys(decay)), list(dict.fromkeys(keep))
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Builds Adam or AdamW for a module's trainable parameters.

    Raises:
        InvalidInputError: The module has no trainable parameters.
    """
    groups = parameter_groups(module, config.weight_decay, config.decayed)
    if not groups:
        raise InvalidInputError(
            "There is nothing to optimise: the module has no trainable parameters."
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rate_factor(config: OptimConfig, step: int, total_steps: int | None) -> float:
    """Factor on the peak learning rate for the update after ``step`` updates (from 0).

    Linear warm-up from ``1 / warmup_steps`` to 1, then constant, or half a cosine down to 0 at
    ``total_steps``.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant" or total_steps is None:
        return 1.0
    span = max(1, total_steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int | None = None
) -> LambdaLR:
    """Builds the learning-rate schedule; call its ``step`` after every optimiser step.

    Args:
        optimizer: From :func:`build_optimizer`.
        config: The settings.
        total_steps: Length of the run; needed by the cosine schedule.

    Raises:
        InvalidInputError: A cosine schedule without a length.
    """
    if config.schedule == "cosine" and total_steps is None:
        raise InvalidInputError(
            "A cosine learning-rate schedule needs the number of updates of the run: give "
            "total_steps, or use schedule='constant'."
        )
    return LambdaLR(optimizer, lambda step: learning_rate_factor(config, step, total_steps))
