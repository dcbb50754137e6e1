"""Trunk of the multi-grained Decision Mamba (Lv et al. 2024, arXiv 2406.05427).

Every block runs Mamba over all tokens (coarse) and a second one over one token per environment step
(fine), made from a group of tokens. Three ways of grouping:

``causal``
    Groups end at the decision, ``(a_{t-1}, R_t, s_t)``, as in figure 2 of the paper, and what a
    group says is heard from its last token until the next group is complete. Parameters are those
    of the released code, name by name.
``figure``
    The same groups, but one gate and one output projection for both granularities, as in the middle
    of that figure; see :mod:`mail_baselines.trunks.shared_gate`.
``released``
    ``modeling_mamba.py`` of github.com/aopolin-lv/DecisionMamba to the letter. Groups are
    ``(R_t, s_t, a_t)`` and group g is heard at the tokens g, g + K and g + 2K of 3K: the action to
    predict is among the inputs it is predicted from, except at the last step. For parity only.
"""

import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError, unknown_name
from mail_agents.mixers.base import zero_masked
from mail_agents.mixers.mamba import Mamba
from mail_baselines.trunks.base import EPS, check_layers
from mail_baselines.trunks.grouping import (
    GroupState,
    advance_group,
    group,
    group_mask,
    hold,
    initial_group,
)
from mail_baselines.trunks.shared_gate import SharedGateBlock

Variant = Literal["causal", "figure", "released"]

VARIANTS = ("causal", "figure", "released")


_LEAK = (
    "The released trunk sees most of the actions that it is trained to predict, so its training "
    "curve is not comparable with that of another agent."
)


class LabelLeakWarning(UserWarning):
    """A trunk was built that shows a policy the actions it is trained to predict."""


class MultiGrainedBlock(nn.Module):
    """``x += mixer(norm(x)) + hold(ln_norm(mixer_group(conv1d(groups of norm(x)))))``.

    Args:
        d_model: Width D.
        tokens_per_step: Size of a group.
        backend: Kernel backend, see :mod:`mail_agents.ops.backends`.
    """

    def __init__(self, d_model: int, tokens_per_step: int, backend: str) -> None:
        super().__init__()
        self.size = tokens_per_step
        self.norm = nn.RMSNorm(d_model, eps=EPS)
        self.mixer = Mamba(d_model, backend=backend)
        self.mixer_group = Mamba(d_model, backend=backend)
        # A container for the weights, so that their names match; groups do not overlap.
        self.conv1d = nn.Conv1d(d_model, d_model, tokens_per_step, stride=tokens_per_step)
        self.ln_norm = nn.LayerNorm(d_model, eps=EPS)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        u = self.norm(x)
        return x + self.mixer(u, mask) + self._fine(u, mask)

    def init_state(
        self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> GroupState:
        """Returns the state before the first token."""
        weight = self.ln_norm.weight
        empty = weight.new_zeros(batch_size, weight.shape[0], device=device, dtype=dtype)
        mixers = (m.init_state(batch_size, device, dtype) for m in (self.mixer, self.mixer_group))
        return initial_group(*mixers, token=empty, held=empty, size=self.size)

    def step(self, x: Tensor, state: GroupState, closes: Tensor | None) -> tuple[Tensor, Any]:
        """Maps (B, D); ``closes`` (B,) says where a group is complete, None if nowhere."""
        u = self.norm(x)
        y, coarse = self.mixer.step(u, state.coarse)
        state = advance_group(state._replace(coarse=coarse), u, closes, self._fine_step)
        return x + y + state.held, state

    def _fine(self, u: Tensor, mask: Tensor | None) -> Tensor:
        groups = group(zero_masked(u, mask), self.size)
        valid = group_mask(mask, self.size)
        said = self.ln_norm(self.mixer_group(self._merge(groups), valid))
        return hold(zero_masked(said, valid), u.shape[1], self.size)

    def _fine_step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.mixer_group.step(self._merge(tokens), state)
        return self.ln_norm(y), state

    def _merge(self, groups: Tensor) -> Tensor:
        """Maps groups (..., size, D) to (..., D): the arithmetic of the strided convolution."""
        weight = self.conv1d.weight.transpose(1, 2).flatten(1)
        return F.linear(groups.flatten(-2), weight, self.conv1d.bias)


class _ReleasedBlock(MultiGrainedBlock):
    """Grouping of the released code, which looks ahead and knows no mask."""

    def _fine(self, u: Tensor, mask: Tensor | None) -> Tensor:
        groups = torch.cat((u[:, :-1], torch.zeros_like(u[:, -1:])), 1).unflatten(
            1, (-1, self.size)
        )
        said = self.ln_norm(self.mixer_group(self._merge(groups)))
        # One copy of all groups after the other, not every group where its tokens are.
        return said.repeat(1, self.size, 1)


class MultiGrainedState(NamedTuple):
    """State of a :class:`MultiGrainedTrunk`: tokens so far, (B,) int64, and one state per block."""

    tokens: Tensor
    blocks: tuple[GroupState, ...]


class MultiGrainedTrunk(nn.Module):
    """Residual multi-grained Mamba blocks and a final RMSNorm; no MLP and no dropout.

    The second of the ``tokens_per_step`` tokens of a step is the decision: return, state, action,
    or return, state. Sequences may end anywhere except in the released variant.

    Args:
        d_model: Width D; 768 in the released code.
        layers: Number of blocks; 24 in the released code.
        variant: How tokens are grouped, see the module docstring.
        tokens_per_step: Tokens of one environment step, 3 or (without action tokens) 2.
        backend: Kernel backend, see :mod:`mail_agents.ops.backends`.

    Raises:
        InvalidInputError: There are no layers, or fewer than two tokens per step.
        UnknownNameError: There is no such variant.
    """

    def __init__(
        self,
        d_model: int,
        layers: int = 3,
        variant: Variant = "causal",
        tokens_per_step: int = 3,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_layers(layers)
        if variant not in VARIANTS:
            raise unknown_name("variant of the multi-grained trunk", variant, VARIANTS)
        if tokens_per_step < 2:
            raise InvalidInputError(
                f"A step needs a return and a state token at least, got {tokens_per_step=}."
            )
        if variant == "released":
            warnings.warn(
                "variant='released' shows the policy the actions it is trained to predict (all "
                "but the last of a window), as the released code does. It exists to reproduce that "
                "code; use variant='causal' to train.",
                LabelLeakWarning,
                stacklevel=2,
            )
        self.variant, self.tokens_per_step = variant, tokens_per_step
        #: What a reader of results must know.
        self.caveats = (_LEAK,) if variant == "released" else ()
        kind = {
            "causal": MultiGrainedBlock,
            "figure": SharedGateBlock,
            "released": _ReleasedBlock,
        }[variant]
        self.layers = nn.ModuleList(kind(d_model, tokens_per_step, backend) for _ in range(layers))
        self.norm_f = nn.RMSNorm(d_model, eps=EPS)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D); see :class:`mail_baselines.trunks.Trunk` for ``mask``.

        A mask has to be constant within a step.

        Raises:
            InvalidInputError: Variant ``released`` got a mask, or a sequence that does not consist
                of whole steps.
        """
        if self.variant == "released":
            self._check_released(x, mask)
        x = zero_masked(x, mask)
        for block in self._blocks():
            x = block(x, mask)
        return self.norm_f(x)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MultiGrainedState:
        """Returns the state before the first token.

        Raises:
            InvalidInputError: The variant is ``released``.
        """
        if self.variant == "released":
            raise InvalidInputError(
                "variant='released' cannot be fed token by token: early outputs depend on later "
                "tokens. Use variant='causal', which has the same parameters."
            )
        tokens = torch.zeros(
            batch_size, dtype=torch.int64, device=device or self.norm_f.weight.device
        )
        blocks = (block.init_state(batch_size, device, dtype) for block in self._blocks())
        return MultiGrainedState(tokens, tuple(blocks))

    def step(self, x: Tensor, state: MultiGrainedState) -> tuple[Tensor, MultiGrainedState]:
        """Maps one token (B, D) to (B, D) and returns the state after it.

        Rows may be at different places of their sequences.
        """
        closing = state.tokens % self.tokens_per_step == 1
        # Asking a GPU would wait for it, which a recording of this step cannot.
        closes = closing if closing.is_cuda or bool(closing.any()) else None
        after = []
        for block, old in zip(self._blocks(), state.blocks, strict=True):
            x, new = block.step(x, old, closes)
            after.append(new)
        return self.norm_f(x), MultiGrainedState(state.tokens + 1, tuple(after))

    def _blocks(self) -> Iterable[Any]:
        return self.layers

    def _check_released(self, x: Tensor, mask: Tensor | None) -> None:
        if x.shape[1] % self.tokens_per_step or not x.shape[1]:
            raise InvalidInputError(
                f"variant='released' needs whole steps of {self.tokens_per_step} tokens, got "
                f"{x.shape[1]} tokens."
            )
        if mask is not None and not mask.all():
            raise InvalidInputError(
                "variant='released' knows no mask: padding is input to it, as in the released "
                "code. Pass no mask."
            )
