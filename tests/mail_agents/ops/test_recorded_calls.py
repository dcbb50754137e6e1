"""Kernels that work on memory leave calls alone that something records operation by operation."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from mail_agents.errors import InvalidInputError
from mail_agents.ops import causal_conv1d, selective_scan, ssd, use_backend
from mail_agents.ops._native import load, recorded

pytestmark = pytest.mark.skipif(bool(load().failure), reason=load().failure or "works")


def scan(u):
    rates = -torch.ones(4, 3)
    return selective_scan(u, u, rates, u[..., :3], u[..., 1:])


def conv(u):
    return causal_conv1d(u, torch.arange(12.0).view(4, 3), activation="silu")


def duality(u):
    x = u.unflatten(2, (2, 2))
    return ssd(x, u[..., :2], -torch.ones(2), x[:, :, :1], x[:, :, 1:])


@pytest.fixture(params=[scan, conv, duality])
def op(request):
    return request.param


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 4, generator=g) for _ in range(2)]


def jit_trace(op, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(op, x)


@pytest.mark.parametrize("record", [jit_trace, lambda op, x: make_fx(op)(x)], ids=["jit", "fx"])
def test_recorded_calls_compute_and_do_not_repeat_memory(op, inputs, record):
    first, second = inputs
    with torch.no_grad():
        graph = record(op, first)
        for x in (first, second):
            torch.testing.assert_close(graph(x), op(x), rtol=1e-4, atol=1e-5)


def test_fake_tensors_are_never_read_nor_is_memory_behind_their_mode(op, inputs):
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert isinstance(op(inputs[0]), FakeTensor)


def test_operations_are_counted_under_a_mode(op, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found = op(inputs[0])
    torch.testing.assert_close(found, op(inputs[0]), rtol=1e-4, atol=1e-5)
    assert op is conv or counter.get_total_flops() > 0


def test_naming_native_says_why_it_cannot_run(op, inputs):
    with use_backend("native"), torch.no_grad():
        op(inputs[0])
        with FlopCounterMode(display=False), pytest.raises(InvalidInputError, match="recorded"):
            op(inputs[0])
    assert not recorded()
