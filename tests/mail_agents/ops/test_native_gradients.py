"""Cotangents that autograd hands to the compiled kernels: those without memory, and odd views."""

import pytest
import torch

from mail_agents.errors import InvalidInputError
from mail_agents.ops import causal_conv1d, selective_scan, ssd
from mail_agents.ops._native import load
from mail_agents.ops._native_call import cotangent

pytestmark = pytest.mark.skipif(bool(load().failure), reason=load().failure or "works")


def scan(u, backend="native"):
    rates = -torch.ones(4, 3)
    return selective_scan(u, u, rates, u[..., :3], u[..., 1:], backend=backend)


def last_state(u, backend="native"):
    rates = -torch.ones(4, 3)
    options = {"return_state": True, "backend": backend}
    return selective_scan(u, u, rates, u[..., :3], u[..., 1:], **options)[1]


def conv(u, backend="native"):
    weight = torch.arange(12.0).view(4, 3)
    return causal_conv1d(u, weight, activation="silu", backend=backend)


def duality(u, backend="native"):
    x = u.unflatten(2, (2, 2))
    return ssd(x, u[..., :2], -torch.ones(2), x[:, :, :1], x[:, :, 1:], backend=backend)


every_op = pytest.mark.parametrize("op", [scan, last_state, conv, duality])


def make():
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


@every_op
def test_batches_of_cotangents_are_refused_with_a_way_out(op):
    x = make()
    y = op(x)
    batch = torch.randn(3, *y.shape)
    with pytest.raises(InvalidInputError, match="backend='reference'"):
        torch.autograd.grad(y, x, batch, is_grads_batched=True)
    found = torch.autograd.grad(op(x, "reference"), x, batch, is_grads_batched=True)[0]
    for row, one in zip(found, batch, strict=True):
        torch.testing.assert_close(torch.autograd.grad(op(x), x, one)[0], row, rtol=1e-4, atol=1e-4)


@every_op
def test_jacobians_are_vectorised_on_the_reference_only(op):
    x = make().detach()
    with pytest.raises(InvalidInputError, match="vectorize=True"):
        torch.autograd.functional.jacobian(op, x, vectorize=True)
    found = torch.autograd.functional.jacobian(op, x)
    wanted = torch.autograd.functional.jacobian(lambda u: op(u, "reference"), x, vectorize=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@every_op
def test_cotangents_may_be_any_view(op):
    x = make()
    y = op(x)
    plain = torch.randn(y.shape)
    negative = torch.complex(torch.zeros(y.shape), -plain).conj().imag
    assert negative.is_neg()
    across = plain.transpose(0, -1).contiguous().transpose(0, -1)
    wanted = torch.autograd.grad(y, x, plain, retain_graph=True)[0]
    for dy in (negative, across):
        torch.testing.assert_close(torch.autograd.grad(y, x, dy, retain_graph=True)[0], wanted)
    one = torch.tensor(1.0).expand(y.shape)
    wanted = torch.autograd.grad(y, x, torch.ones(y.shape), retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(y, x, one)[0], wanted)


def test_zeros_without_memory_get_some():
    found = cotangent("op", torch._efficientzerotensor((2, 3)))
    assert found.data_ptr()
    assert torch.equal(found, torch.zeros(2, 3))
