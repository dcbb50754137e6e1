"""Predicting the noise of one plan: what does not depend on the noisy actions is computed ahead.

A plan asks the same network at every diffusion step, about the same observations. The noisy actions
are the last tokens of :class:`~mail_agents.agents.mail_backbone.MailBackbone`, so the encoder, and
what precedes the actions in a causal decoder, can be computed for many diffusion steps at once, as
further rows of one batch. A denoising step then runs the action tokens alone, from the state that
the tokens before them have left.

On a GPU the decoder sees the tokens before the actions anew: a plan then consists of fewer
operations, each of which has to be launched, and the tokens are few.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mail_agents.agents.mail_backbone import MailBackbone

#: Rows (observations times diffusion steps) computed ahead at once, unless one step has more. It
#: bounds the memory of a plan.
ROWS_AHEAD = 256


class _Ahead(NamedTuple):
    """What the decoder needs besides the action tokens, for some rows.

    Attributes:
        before: Tokens before them that the decoder is still to see, or None.
        state: State of the decoder after all others, or None.
        given: See :class:`~mail_agents.agents.mail_backbone.Context`, for the tokens still to come.
    """

    before: Tensor | None
    state: Any
    given: dict[str, Tensor]


class Denoiser:
    """A :class:`~mail_agents.agents.mail_backbone.MailBackbone` with its observations fixed.

    Args:
        backbone: The model.
        features: ``(B, n, F)``, as for the model.
    """

    def __init__(self, backbone: MailBackbone, features: Tensor) -> None:
        self._backbone = backbone
        self._features = features
        self._ahead: dict[int, _Ahead] = {}

    def __call__(self, noisy: Tensor | None, step: int | None) -> Tensor:
        """Predicts the noise in ``(B, J, A)``, or the chunk for a model without noise.

        Args:
            noisy: As for the model.
            step: Diffusion step of all rows; going from the last to the first is quickest.

        Raises:
            InvalidInputError: See the model.
        """
        net, features = self._backbone, self._features
        if step is None:
            return net(features, noisy)
        net.check(features, noisy, step)
        if step not in self._ahead:
            self._ahead.clear()  # before others take memory
            self._ahead = self._compute(step)
        before, state, given = self._ahead[step]
        tokens = net.action_tokens(noisy, *features.shape[:2])
        if before is not None:
            tokens = torch.cat((before, tokens), dim=1)
        if state is None:
            out = net.decoder(tokens, **given)
        else:
            out, _ = net.decoder.prefill(tokens, state, **given)
        return net.head(out[:, -net.horizon :])

    def _compute(self, last: int) -> dict[int, _Ahead]:
        """Computes ahead for ``last`` and as many steps before it as there is room for."""
        rows = len(self._features)
        count = min(last + 1, max(1, ROWS_AHEAD // max(1, rows)))
        first = last + 1 - count
        steps = torch.arange(first, last + 1, device=self._features.device)
        t = steps.unsqueeze(1).expand(count, rows).flatten()
        lead = self._backbone.lead_tokens(self._features.repeat(count, 1, 1), t)
        return dict(enumerate(_split(self._before_actions(lead), count), start=first))

    def _before_actions(self, lead: Tensor) -> _Ahead:
        """Runs everything but the action tokens."""
        net = self._backbone
        before, given = net.context(lead)
        if before is None:
            return _Ahead(None, net.decoder.init_state(len(lead), **given), {})
        if not (net.decoder.causal and _tokens_cost(lead)):
            return _Ahead(before, None, given)
        seen = {name: value[:, : before.shape[1]] for name, value in given.items()}
        _, state = net.decoder.prefill(before, **seen)
        coming = {name: value[:, before.shape[1] :] for name, value in given.items()}
        return _Ahead(None, state, coming)


def _tokens_cost(tokens: Tensor) -> bool:
    return tokens.device.type != "cuda"


def _split(tree: Any, parts: int) -> list[Any]:
    """Cuts the rows of every tensor of a nest into equal parts; returns a nest for each part."""
    if isinstance(tree, Tensor):
        return list(tree.unflatten(0, (parts, -1)).unbind())
    if isinstance(tree, dict):
        values = zip(*(_split(each, parts) for each in tree.values()), strict=True)
        return [dict(zip(tree, each, strict=True)) for each in values] if tree else [{}] * parts
    if isinstance(tree, tuple):
        made = getattr(type(tree), "_make", tuple)
        return [made(each) for each in zip(*(_split(t, parts) for t in tree), strict=True)]
    return [tree] * parts
