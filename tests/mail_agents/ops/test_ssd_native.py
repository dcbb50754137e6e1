"""Compiled state space duality: what is not finite moves forward in time only."""

import pytest
import torch

from mail_agents.ops import ssd
from mail_agents.ops._native import load

BACKENDS = [
    "reference",
    pytest.param(
        "native", marks=pytest.mark.skipif(bool(load().failure), reason=load().failure or "works")
    ),
]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
@pytest.mark.parametrize("step", [0, 1, 17, 18, 19, 20, 36])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_not_finite_reach_no_earlier_output(backend, step, name, value):
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    batch, length, heads, head, n = 2, 37, 2, 5, 6
    inputs = {
        "x": rand(batch, length, heads, head),
        "dt": rand(batch, length, heads),
        "A": -torch.rand(heads, generator=g),
        "B": rand(batch, length, 1, n),
        "C": rand(batch, length, 1, n),
        "D": rand(heads),
        "z": rand(batch, length, heads, head),
        "h0": rand(batch, heads, head, n),
    }
    wanted = ssd(**inputs, backend=backend)
    inputs[name][1, step] = value
    y, last = ssd(**inputs, return_state=True, backend=backend)
    assert torch.equal(y[0], wanted[0])
    assert torch.equal(y[1, :step], wanted[1, :step])
    assert torch.isfinite(last[0]).all()
    assert not torch.isfinite(y[1, step]).all() or (name, value) in (
        ("dt", -torch.inf),  # a step that does nothing
        ("z", -torch.inf),
    )
