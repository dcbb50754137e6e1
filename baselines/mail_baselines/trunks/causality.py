"""Does a trunk look ahead? A check by perturbation that needs nothing but the forward pass.

A sequence policy is trained to predict the action of step t from the token of state t, while the
sequence it reads also holds that action, one token later. A trunk that lets later tokens influence
earlier outputs learns to copy the label, and has a low loss and no skill. Run
:func:`assert_causal` over any trunk before training with it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mail_agents.errors import InvalidInputError


def leaking_tokens(
    trunk: Callable[[Tensor], Tensor],
    length: int,
    dim: int,
    *,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Finds the outputs that change when a later token changes.

    Args:
        trunk: Maps (B, L, D) to (B, L, D); a module has to be in eval mode.
        length: Number of tokens L to try, for example 3 per step of a window.
        dim: Width D.
        tolerance: Largest change of an output that counts as none.
        seed: Of the random tokens and perturbations.

    Returns:
        (L, L) bool, True at [p, j] when output p depends on token j > p. For tokens in the order
        (return, state, action), [3t+1, 3t+2] says whether the action of step t is predicted from
        itself.

    Raises:
        InvalidInputError: The same tokens gave two results: dropout is active.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(length, dim, generator=generator)
    # Row j is the sequence with token j replaced; the last two rows are the sequence itself.
    batch = tokens.repeat(length + 2, 1, 1)
    each = torch.arange(length)
    batch[each, each] = torch.randn(length, dim, generator=generator)
    parameter = next(trunk.parameters(), None) if isinstance(trunk, torch.nn.Module) else None
    if parameter is not None:
        batch = batch.to(parameter)
    with torch.no_grad():
        outputs = trunk(batch)
    changes = (outputs - outputs[-1]).abs().amax(-1).cpu()
    if changes[-2].max() > tolerance:
        raise InvalidInputError(
            "The trunk gave two results for the same tokens, so nothing can be said about it. "
            "Switch dropout off: trunk.eval()."
        )
    return (changes[:length] > tolerance).T.triu(1).numpy()


def assert_causal(
    trunk: Callable[[Tensor], Tensor],
    length: int,
    dim: int,
    *,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> None:
    """Refuses a trunk that looks ahead; arguments as of :func:`leaking_tokens`.

    Raises:
        InvalidInputError: An output depends on a later token, or dropout is active.
    """
    pairs = np.argwhere(leaking_tokens(trunk, length, dim, tolerance=tolerance, seed=seed))
    if len(pairs):
        output, token = pairs[0]
        raise InvalidInputError(
            f"Output {output} depends on token {token}, which comes later; {len(pairs)} such pairs "
            f"among {length} tokens. Trained like this, a policy copies its labels. "
            "leaking_tokens() lists the pairs."
        )
