"""Outputs and gradients of the released code, pinned.

The numbers were computed in float64 on a CPU with the modules of kzl/decision-transformer
``e2d82e6`` (``GPT2Model``), corl-team/CORL ``eeeeef2`` (``TransformerBlock``),
Toshihiro-Ota/decision-mamba ``35f9944`` (``GPT2Model`` with ``MambaBlock``) and
aopolin-lv/DecisionMamba ``d37dc82`` (``MambaModel``; its fixed width and its casts to float32
replaced). Weights and inputs come from the formula ``wave`` below and were put into the released
modules by name. Renaming a parameter changes the order in which ``fill`` visits them, and with it
every number here.
"""

import math

import pytest
import torch

from mail_baselines.trunks import GPTTrunk, LabelLeakWarning, MambaTrunk, MultiGrainedTrunk

WIDTH, LENGTH = 8, 12

# First four channels of three tokens of the second row, and of a gradient with respect to an input.
KZL = """
    -1.193514 -0.149924  2.351823 -1.043165   -1.274218  0.103855  2.409712 -1.016625
    -1.439537 -0.621551  1.877009 -1.155913    0.064440  0.475946 -0.123455 -0.316894
"""
CORL = """
    -1.310503  0.137609  2.293121 -1.009456   -1.333494  0.245062  2.218610 -0.954855
    -1.517709 -0.668776  1.717463 -1.136929    0.032143  0.401450  0.102220 -0.062031
"""
DMAMBA = """
    -1.215611 -0.435765  1.209073 -0.088554   -1.119758 -0.093575  1.715137  0.569539
    -0.939834 -0.858556 -0.176088  0.384700    3.042549 -1.114142  0.672347  0.180487
"""
DMAMBA_MIN = """
    -2.685191 -0.021822  0.226668 -1.219350   -2.285194  0.920949  0.494516 -2.069048
    -1.613404 -1.501316 -0.030072 -0.329381    0.602005  0.313708  0.240607 -0.289961
"""
DM = """
     1.769840 -0.231360  0.624321  1.292371    0.511552  0.101438  0.074962  2.703712
     2.340486 -1.608239  0.003054 -1.126481    1.335931  0.572523  0.892617  0.151158
"""


def wave(shape, phase):
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(index**1.5 + phase).reshape(shape)


def fill(net):
    """Parameter i, in alphabetical order, becomes ``scale * wave(shape, i)``.

    One is added to scales of norms and to the skip D of Mamba.
    """
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(net.named_parameters())):
            offset = float(p.ndim == 1 and name.endswith(("weight", ".D")))
            scale = 0.5 if p.ndim == 1 else p.shape[1] ** -0.5
            p.copy_(scale * wave(p.shape, i) + offset)
    return net


def all_valid() -> torch.Tensor:
    return torch.ones(2, LENGTH, dtype=torch.bool)


def padded(row: int, tokens: slice) -> torch.Tensor:
    mask = all_valid()
    mask[row, tokens] = False
    return mask


def numbers(net, mask: torch.Tensor) -> torch.Tensor:
    x = wave((2, LENGTH, WIDTH), 0.3).requires_grad_()
    y = net(x, None if mask.all() else mask)
    loss = (y * wave(y.shape, 0.7))[mask].sum()
    (gradient,) = torch.autograd.grad(loss, x)
    return torch.cat((y[1, 7:10, :4].flatten(), gradient[1, 8, :4])).detach()


@pytest.mark.parametrize(
    ("make", "mask", "expected"),
    [
        (lambda: GPTTrunk(WIDTH, 2, 2), padded(1, slice(6)), KZL),
        (lambda: GPTTrunk(WIDTH, 2, 2, activation="gelu"), padded(0, slice(9, None)), CORL),
        (lambda: MambaTrunk(WIDTH, 2), all_valid(), DMAMBA),
        (lambda: MambaTrunk(WIDTH, 2, norm="rms"), all_valid(), DMAMBA_MIN),
        (lambda: MultiGrainedTrunk(WIDTH, 2, "released"), all_valid(), DM),
    ],
    ids=["kzl", "corl", "dmamba", "dmamba-min", "dm"],
)
@pytest.mark.filterwarnings(f"ignore::{LabelLeakWarning.__module__}.LabelLeakWarning")
def test_trunks_equal_the_released_ones(make, mask, expected):
    got = numbers(fill(make().double().eval()), mask)
    assert got.tolist() == pytest.approx([float(v) for v in expected.split()], abs=2e-6)
