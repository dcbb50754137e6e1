"""Compiled causal convolution against the float64 reference: shapes, strides, threads, rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_agents.errors import InvalidInputError
from mail_agents.ops import causal_conv1d
from mail_agents.ops._native import load

pytestmark = pytest.mark.skipif(bool(load().failure), reason=load().failure or "works")


def make(batch, length, channels, width, bias=True, history=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    x = rand(batch, length, 2 * channels)[..., :channels]
    past = rand(batch, channels, width - 1).transpose(1, 2) if history else None
    return x, rand(channels, width), rand(channels) if bias else None, past


def results(inputs, activation, backend):
    """Output, new history and all gradients."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    x, weight, bias, past = leaves
    y, after = causal_conv1d(x, weight, bias, activation, past, True, backend=backend)
    g = torch.Generator().manual_seed(1)
    dy, dafter = (torch.randn(t.shape, generator=g).to(t.dtype) for t in (y, after))
    known = [t for t in leaves if t is not None]
    found = torch.autograd.grad(
        (y * dy).sum() + (after * dafter).sum(), known, allow_unused=True, materialize_grads=True
    )
    return y.detach(), after.detach(), *found


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(0, 4),
    length=st.integers(0, 12),
    channels=st.one_of(st.integers(0, 40), st.integers(250, 262)),
    width=st.integers(1, 6),
    bias=st.booleans(),
    history=st.booleans(),
    activation=st.sampled_from(["silu", None]),
)
def test_equals_the_float64_reference_for_any_shape(
    batch, length, channels, width, bias, history, activation
):
    inputs = make(batch, length, channels, width, bias, history)
    if channels == 0 and width == 1:
        return  # nothing at all to view
    wide = [None if t is None else t.double() for t in inputs]
    wanted = results(wide, activation, "torch")
    for found, reference in zip(results(inputs, activation, "native"), wanted, strict=True):
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=2e-5)


def test_rows_are_rounded_alike_in_any_batch():
    inputs = make(7, 9, 300, 4)
    x, weight, bias, past = inputs
    y = causal_conv1d(x, weight, bias, "silu", past, backend="native")
    alone = causal_conv1d(x[5:6], weight, bias, "silu", past[5:6], backend="native")
    assert torch.equal(y[5:6], alone)


@pytest.mark.parametrize("batch", [1, 7])
def test_two_threads_give_the_same_numbers_every_time(batch):
    inputs = make(batch, 9, 300, 4)
    wanted = results(inputs, "silu", "native")
    torch.set_num_threads(2)
    try:
        found, again = (results(inputs, "silu", "native") for _ in range(2))
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_nan_reaches_the_width_of_the_filter_only():
    x, weight, bias, _ = make(1, 10, 3, 4)
    x = x.clone()
    x[0, 4, 1] = torch.nan
    wrong = torch.isnan(causal_conv1d(x, weight, bias, backend="native"))
    wanted = torch.zeros_like(wrong)
    wanted[0, 4:8, 1] = True
    assert torch.equal(wrong, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x, weight, bias, past = (t.to(dtype) for t in make(2, 6, 20, 4))
    y = causal_conv1d(x, weight, bias, "silu", past, backend="native")
    wide = [t.float() for t in (x, weight, bias)]
    assert torch.equal(y, causal_conv1d(*wide, "silu", past.float(), backend="native").to(dtype))


@pytest.mark.parametrize(("batch", "length"), [(256, 256), (4, 4096), (2048, 6)])
@pytest.mark.parametrize("activation", ["silu", None])
def test_sums_over_all_steps_are_no_less_exact_than_those_of_the_reference(
    batch, length, activation
):
    inputs = make(batch, length, 16, 4)
    wide = [t.double() for t in inputs]
    wanted = results(wide, activation, "reference")
    native, reference = (results(inputs, activation, b) for b in ("native", "reference"))
    for filters_and_bias in (3, 4):
        found, other, exact = (r[filters_and_bias] for r in (native, reference, wanted))
        error, own = ((t.double() - exact).square().mean().sqrt() for t in (found, other))
        assert error <= own


@pytest.mark.parametrize("width", [1, 4, 65, 100])
def test_filters_of_any_width(width):
    inputs = make(2, 7, 20, width)
    wanted = results([t.double() for t in inputs], "silu", "torch")
    for found, reference in zip(results(inputs, "silu", "native"), wanted, strict=True):
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-4)


def test_limits_are_named():
    with pytest.raises(InvalidInputError, match="float64"):
        causal_conv1d(torch.zeros(1, 2, 3).double(), torch.zeros(3, 4).double(), backend="native")
