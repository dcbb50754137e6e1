"""Groups of tokens that end at a decision: the bookkeeping of the fine-grained scans.

With m tokens per environment step, the first of them the return and the second the state, group t
holds the m tokens up to and including the state of step t: ``(a_{t-1}, R_t, s_t)`` for m = 3 and
``(R_t, s_t)`` for m = 2. Nothing precedes the first step, so zeros stand for ``a_{-1}``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mail_agents.mixers.mamba import MambaState
from mail_baselines.trunks.base import map_state


class GroupState(NamedTuple):
    """State of a block with a coarse and a fine scan.

    Attributes:
        coarse: State of the scan over tokens.
        fine: State of the scan over groups: of a Mamba layer, or of a bare recurrence.
        recent: The last m - 1 tokens, oldest first, (B, m-1, D).
        held: What the last complete group said, zero before the first one, (B, D').
    """

    coarse: MambaState
    fine: Any
    recent: Tensor
    held: Tensor


def group(x: Tensor, size: int) -> Tensor:
    """Maps tokens (B, L, D) to the groups that are complete among them, (B, G, size, D)."""
    count = (x.shape[1] + size - 2) // size
    return F.pad(x, (0, 0, size - 2, 0))[:, : count * size].unflatten(1, (count, size))


def group_mask(mask: Tensor | None, size: int) -> Tensor | None:
    """Which groups end at a valid token, (B, G), for a ``mask`` (B, L) of the tokens."""
    return None if mask is None else mask[:, 1::size]


def hold(groups: Tensor, length: int, size: int) -> Tensor:
    """Spreads one value per group (B, G, D) over the tokens, (B, ``length``, D).

    Every token gets the value of the last group that is complete at it, and zero before the first.
    """
    return F.pad(groups.repeat_interleave(size, dim=1), (0, 0, 1, size))[:, :length]


def initial_group(
    coarse: MambaState, fine: Any, token: Tensor, held: Tensor, size: int
) -> GroupState:
    """Builds the state before the first token, from zeros ``token`` (B, D), ``held`` (B, D')."""
    return GroupState(coarse, fine, token.unsqueeze(1).repeat(1, size - 1, 1), held)


def advance_group(
    state: GroupState,
    token: Tensor,
    closes: Tensor | None,
    fine_step: Callable[[Tensor, Any], tuple[Tensor, Any]],
) -> GroupState:
    """Adds one token per row and runs the fine scan in the rows where it completes a group.

    Args:
        state: Before the token.
        token: (B, D).
        closes: (B,) bool, where the token completes a group; None if nowhere.
        fine_step: Maps groups (B, size, D) and the fine state to what is held, (B, D'), and the
            fine state after them.
    """
    tokens = torch.cat((state.recent, token.unsqueeze(1)), 1)
    held, fine = state.held, state.fine
    if closes is not None:
        said, after = fine_step(tokens, fine)
        held = _where(closes, said, held)
        fine = map_state(functools.partial(_where, closes), after, fine)
    return GroupState(state.coarse, fine, tokens[:, 1:], held)


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *(1,) * (new.ndim - 1)), new, old)
