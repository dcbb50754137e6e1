"""Every backend of the causal convolution against an independent loop, in values and gradients."""

import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_agents.errors import InvalidInputError
from mail_agents.ops import _conv_torch, backends, causal_conv1d, causal_conv1d_step

BACKENDS = ["reference", "torch"]


def naive(x, weight, bias, activation, history):
    """Definition in float64 NumPy."""
    x, weight = x.detach().double().numpy(), weight.detach().double().numpy()
    width = weight.shape[1]
    past = np.zeros((x.shape[0], width - 1, x.shape[2]))
    if history is not None:
        past = history.detach().double().numpy()
    padded = np.concatenate([past, x], 1)
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for k in range(width):
            y[:, t] += weight[:, k] * padded[:, t + k]
    if bias is not None:
        y += bias.detach().double().numpy()
    return y / (1 + np.exp(-y)) if activation == "silu" else y


def make(B, L, D, W, bias=True, history=True, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    # A strided view, like one half of the input projection.
    x = rand(B, L, 2 * D)[..., :D]
    return x, rand(D, W), rand(D) if bias else None, rand(B, W - 1, D) if history else None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 15, 65])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("history", [False, True])
def test_forward_equals_an_independent_loop(backend, activation, length, width, history):
    x, weight, bias, past = make(3, length, 5, width, history=history)
    y = causal_conv1d(x, weight, bias, activation, past, backend=backend)
    wanted = naive(x, weight, bias, activation, past)
    np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 5),
    length=st.integers(0, 12),
    channels=st.integers(1, 6),
    width=st.integers(1, 6),
    bias=st.booleans(),
    history=st.booleans(),
    activation=st.sampled_from(["silu", None]),
    tile=st.sampled_from([1, 60, 10**6]),
)
def test_gradients_of_all_backends_agree(
    batch, length, channels, width, bias, history, activation, tile
):
    inputs = make(batch, length, channels, width, bias, history)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_conv_torch, "_TILE", tile)
        for backend in BACKENDS:
            leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
            x, weight, b, past = leaves
            y, after = causal_conv1d(x, weight, b, activation, past, True, backend=backend)
            g = torch.Generator().manual_seed(1)
            dy = torch.randn(y.shape, generator=g, dtype=y.dtype)
            dafter = torch.randn(after.shape, generator=g, dtype=y.dtype)
            known = [t for t in leaves if t is not None]
            grads = torch.autograd.grad(
                (y * dy).sum() + (after * dafter).sum(),
                known,
                allow_unused=True,
                materialize_grads=True,
            )
            results.append((y.detach(), after.detach(), *grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["silu", None])
def test_gradcheck_of_the_torch_backend(activation):
    leaves = [t.detach().requires_grad_() for t in make(2, 5, 3, 4)]

    def run(x, weight, bias, history):
        return causal_conv1d(x, weight, bias, activation, history, True, backend="torch")

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [0, 1, 2, 9])
def test_split_sequence_with_history_equals_the_whole(backend, cut):
    x, weight, bias, history = make(2, 9, 4, 4)
    whole, last = causal_conv1d(x, weight, bias, "silu", history, True, backend=backend)
    first, middle = causal_conv1d(x[:, :cut], weight, bias, "silu", history, True, backend=backend)
    rest, end = causal_conv1d(x[:, cut:], weight, bias, "silu", middle, True, backend=backend)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_step_loop_equals_the_whole(width, activation):
    x, weight, bias, history = make(2, 6, 4, width)
    whole, last = causal_conv1d(x, weight, bias, activation, history, True)
    for t in range(6):
        y, history = causal_conv1d_step(x[:, t], history, weight, bias, activation)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(history, last)


def test_nan_reaches_the_width_of_the_filter_only():
    x, weight, bias, _ = make(1, 10, 3, 4)
    x = x.clone()
    x[0, 4, 1] = torch.nan
    wrong = torch.isnan(causal_conv1d(x, weight, bias, backend="torch"))
    wanted = torch.zeros_like(wrong)
    wanted[0, 4:8, 1] = True
    assert torch.equal(wrong, wanted)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "channel-last"),
        ({"weight": torch.zeros(4, 1, 3)}, "squeeze"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"history": torch.zeros(2, 3, 4)}, "history has shape"),
        ({"activation": "relu"}, "activation 'relu'"),
    ],
)
def test_wrong_inputs_are_explained(kwargs, message):
    base = {"x": torch.zeros(2, 5, 4), "weight": torch.zeros(4, 3)}
    with pytest.raises(InvalidInputError, match=message):
        causal_conv1d(**{**base, **kwargs})


def test_cuda_adapter_calls_the_package_as_it_expects(monkeypatch):
    def causal_conv1d_fn(x, weight, bias=None, initial_states=None, activation=None):
        # The layout in which the kernel accepts initial states.
        assert x.stride(1) == 1
        assert initial_states.stride(1) == 1
        args = (x.transpose(1, 2), weight, bias, activation, initial_states.transpose(1, 2))
        return causal_conv1d(*args, backend="reference").transpose(1, 2)

    package = types.ModuleType("causal_conv1d")
    package.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    backends.probe.cache_clear()
    try:
        module = sys.modules[causal_conv1d.__module__]
        x, weight, bias, history = make(2, 5, 8, 4, dtype=torch.float32)
        y = module._cuda(module._ConvInputs(x, weight, bias, "silu", history))
        torch.testing.assert_close(y, causal_conv1d(x, weight, bias, "silu", history))
        # A CPU tensor is refused by name even though the package can be imported.
        with pytest.raises(InvalidInputError, match="CUDA device"):
            causal_conv1d(x, weight, bias, backend="cuda")
    finally:
        backends.probe.cache_clear()
