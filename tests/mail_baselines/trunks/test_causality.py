"""The checker sees the leak of the released multi-grained trunk, to the token."""

import warnings

import pytest
import torch
from torch import nn

from mail_agents.errors import InvalidInputError
from mail_baselines.trunks import (
    LabelLeakWarning,
    MultiGrainedTrunk,
    assert_causal,
    leaking_tokens,
)

STEPS, WIDTH, TINY = 20, 16, 1e-11


def released(layers: int, variant: str = "released") -> MultiGrainedTrunk:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabelLeakWarning)
        trunk = MultiGrainedTrunk(WIDTH, layers, variant)
    with torch.no_grad():  # at the small step sizes of the start some leaks are below any rounding
        for p in trunk.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else p.shape[1] ** -0.5))
    return trunk.double().eval()


def steps_that_see_their_action(leaks) -> set[int]:
    return {t for t in range(STEPS) if leaks[3 * t + 1, 3 * t + 2]}


@pytest.mark.parametrize(
    ("layers", "steps"),
    [(1, {*range(7), 10, 11, 12}), (2, {*range(19)}), (3, {*range(19)}), (6, {*range(19)})],
)
def test_released_trunk_shows_labels_of_exactly_these_steps(layers, steps):
    leaks = leaking_tokens(released(layers), 3 * STEPS, WIDTH, tolerance=TINY)
    assert steps_that_see_their_action(leaks) == steps
    assert not leaks[58].any()  # acting reads the last state token, which is honest


def test_released_trunk_of_three_layers_sees_the_end_of_the_window():
    leaks = leaking_tokens(released(3), 3 * STEPS, WIDTH, tolerance=TINY)
    assert [t for t in range(STEPS - 1) if leaks[3 * t + 1, 58]] == [*range(1, 19)]
    assert not leaks[:, 59].any()  # the released code zeroes the very last token


def test_the_same_parameters_are_causal_with_the_right_alignment():
    leaky, causal = released(2), released(2, "causal")
    causal.load_state_dict(leaky.state_dict())
    assert_causal(causal, 3 * STEPS, WIDTH, tolerance=TINY)
    with pytest.raises(InvalidInputError, match=r"Output 0 depends on token 1, .*copies its label"):
        assert_causal(leaky, 3 * STEPS, WIDTH)


def test_building_the_released_trunk_warns():
    with pytest.warns(LabelLeakWarning, match="variant='causal'"):
        MultiGrainedTrunk(WIDTH, 1, "released")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MultiGrainedTrunk(WIDTH, 1)
        MultiGrainedTrunk(WIDTH, 1, "figure")


def test_released_trunk_needs_whole_steps_no_mask_and_the_whole_window():
    trunk, x = released(1), torch.zeros(1, 61, WIDTH, dtype=torch.float64)
    with pytest.raises(InvalidInputError, match="61 tokens"):
        trunk(x)
    with pytest.raises(InvalidInputError, match="knows no mask"):
        trunk(x[:, :60], torch.arange(60)[None] > 2)
    with pytest.raises(InvalidInputError, match="token by token"):
        trunk.init_state(1)


def test_leaks_of_plain_functions():
    assert not leaking_tokens(lambda x: x.cumsum(1), 5, 2).any()
    shifted = leaking_tokens(lambda x: x.roll(-1, 1), 4, 2)
    assert [tuple(pair) for pair in zip(*shifted.nonzero(), strict=True)] == [
        (0, 1),
        (1, 2),
        (2, 3),
    ]
    assert not leaking_tokens(lambda x: x, 1, 2).any()


def test_active_dropout_is_named():
    with pytest.raises(InvalidInputError, match=r"trunk\.eval\(\)"):
        leaking_tokens(nn.Dropout(0.5), 6, 8)
