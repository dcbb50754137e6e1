"""Tensors that are not what they seem: negated views, duals, shapes without numbers."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from mail_agents.mixers import BiMamba, Hydra, Mamba, Mamba2
from mail_agents.ops import (
    _native,
    causal_conv1d,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_step,
)
from mail_agents.ops.backends import recording_backends


def scan(x, **more):
    A, s = -torch.arange(1.0, 5).repeat(8, 1), torch.linspace(-1, 1, 40).view(2, 5, 4)
    return selective_scan(x, torch.full((2, 5, 8), 0.3), A, s, s, **more)


def conv(x, **more):
    return causal_conv1d(x, torch.linspace(-1, 1, 24).view(8, 3), **more)


def duality(x, **more):
    s = torch.linspace(-1, 1, 40).view(2, 5, 1, 4)
    y = ssd(x.unflatten(2, (2, 4)), torch.ones(2, 5, 2), -torch.ones(2), s, s, **more)
    return y.flatten(2)


OPS = {"scan": scan, "conv": conv, "ssd": duality}
every_op = pytest.mark.parametrize("name", OPS)


@every_op
def test_views_that_negate_their_memory(name):
    x = torch.randn(2, 5, 8)
    negated = torch.complex(torch.zeros_like(x), x).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(OPS[name](negated), OPS[name](-x))
    assert "negates its memory" in _native.refuse_memory(x, negated)


@every_op
def test_cotangents_that_negate_their_memory(name):
    x = torch.randn(2, 5, 8, requires_grad=True)
    (wanted,) = torch.autograd.grad(OPS[name](x), x, -torch.ones(2, 5, 8))
    (found,) = torch.autograd.grad(OPS[name](x), x, torch._neg_view(torch.ones(2, 5, 8)))
    torch.testing.assert_close(found, wanted)


@every_op
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_derivatives_are_never_dropped(name, grad):
    x, direction = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad), forward_ad.dual_level(), recording_backends(ran := {}):
        found = forward_ad.unpack_dual(OPS[name](forward_ad.make_dual(x, direction))).tangent
        (used,) = ran.values()
    assert used == {"reference"}
    wide, step = (t.double() for t in (x, direction))
    wanted = (OPS[name](wide + 1e-6 * step) - OPS[name](wide - 1e-6 * step)) / 2e-6
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_forward_mode_derivatives_of_steps():
    state, direction, s = torch.randn(2, 8, 4), torch.randn(2, 8, 4), torch.ones(2, 4)
    x, A = torch.randn(2, 8), -torch.ones(8, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(state, direction)
        y, _ = selective_scan_step(dual, x, x, A, s, s)
        scanned = forward_ad.unpack_dual(y).tangent
        heads, group = dual.view(2, 2, 4, 4), s.unsqueeze(1)
        y, _ = ssd_step(heads, x.view(2, 2, 4), torch.ones(2, 2), -torch.ones(2), group, group)
        stepped = forward_ad.unpack_dual(y).tangent
    decay = torch.exp(-torch.nn.functional.softplus(x))
    torch.testing.assert_close(scanned, (decay.unsqueeze(2) * direction).sum(2))
    decay = torch.exp(-torch.nn.functional.softplus(torch.ones(())))
    torch.testing.assert_close(stepped.flatten(1), (decay * direction).sum(2))


@pytest.mark.parametrize("kind", [Mamba, Mamba2, BiMamba, Hydra])
def test_shapes_without_numbers(kind):
    sizes = {"headdim": 8} if kind in (Mamba2, Hydra) else {}
    with torch.device("meta"):
        mixer, x = kind(16, d_state=4, **sizes), torch.empty(2, 5, 16)
    mixer(x).sum().backward()
    assert mixer(x).shape == x.shape
    if mixer.causal:
        y, state = mixer.prefill(x)
        assert mixer.step(y[:, 0], state)[0].shape == (2, 16)
