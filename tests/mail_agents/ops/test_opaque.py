"""Scan and convolution as single operations of compiled graphs, on the backends of eager code.

``aot_eager`` traces and differentiates like the default backend, without generating code.
"""

import pytest
import torch

from mail_agents.ops import _opaque, causal_conv1d, selective_scan
from mail_agents.ops._native import load
from mail_agents.ops.backends import recording_backends

BACKENDS = [
    "torch",
    pytest.param(
        "native", marks=pytest.mark.skipif(bool(load().failure), reason=load().failure or "works")
    ),
]
OPTIONAL = [(), ("D", "z", "bias"), ("z", "h0"), ("D", "z", "bias", "h0", "reset")]


def scan_inputs(present, length=5):
    g = torch.Generator().manual_seed(0)
    B, D, N = 2, 6, 3

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    optional = {
        **{"D": rand(D), "z": rand(B, length, D), "bias": rand(D), "h0": rand(B, D, N)},
        "reset": torch.rand(B, length, generator=g) < 0.3,
    }
    chosen = {k: v if k in present else None for k, v in optional.items()}
    first = [rand(B, length, D), rand(B, length, D), -rand(D, N).abs()]
    return [*first, rand(B, length, N), rand(B, length, N)], chosen


def leaves(tensors):
    return [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]


def scan(backend):
    def run(u, delta, A, B, C, D, z, bias, h0, reset):
        return selective_scan(
            *(u, delta, A, B, C, D, z, bias, True, h0, reset), return_state=True, backend=backend
        )

    return run


def conv(backend):
    def run(x, weight, bias, history):
        return causal_conv1d(x, weight, bias, "silu", history, True, backend=backend)

    return run


def update(function, tensors):
    """Outputs and gradients."""
    inputs = leaves(tensors)
    y, state = function(*inputs)
    known = [t for t in inputs if t is not None and t.requires_grad]
    return y, state, *torch.autograd.grad(y.square().sum() + state.sin().sum(), known)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("present", OPTIONAL)
def test_compiled_scan_is_one_graph_and_equals_eager(backend, present):
    torch._dynamo.reset()
    first, optional = scan_inputs(present, length=40)
    tensors = [*first, *optional.values()]
    compiled = torch.compile(scan(backend), backend="aot_eager", fullgraph=True)
    ran = {}
    with recording_backends(ran):
        found = update(compiled, tensors)
    assert ran == {"selective_scan": {backend}}
    wanted = update(scan(backend), tensors)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("history", [False, True])
def test_compiled_conv_is_one_graph_and_equals_eager(backend, history):
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*s, generator=g) for s in ((2, 5, 6), (6, 4), (6,), (2, 3, 6))]
    if not history:
        tensors[3] = None
    compiled = torch.compile(conv(backend), backend="aot_eager", fullgraph=True)
    ran = {}
    with recording_backends(ran):
        found = update(compiled, tensors)
    assert ran == {"causal_conv1d": {backend}}
    torch.testing.assert_close(found, update(conv(backend), tensors), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("present", [(), ("D", "z", "bias", "h0", "reset")])
def test_scan_is_a_well_formed_operation(backend, present):
    first, o = scan_inputs(present)
    o = dict(zip(o, leaves(o.values()), strict=True))
    arguments = (
        *(*leaves(first), o["D"], o["z"], o["bias"], True),
        *(o["h0"], o["reset"], bool(present), backend),
    )
    torch.library.opcheck(_opaque._scan, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_is_a_well_formed_operation(backend):
    tensors = leaves([torch.randn(2, 5, 6), torch.randn(6, 4), torch.randn(6)])
    torch.library.opcheck(_opaque._conv, (*tensors, True, None, backend))


def test_tensors_without_memory_do_not_reach_the_kernels():
    first, _ = scan_inputs(())
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in first]
        assert selective_scan(*fake).shape == first[0].shape
        assert causal_conv1d(fake[0], mode.from_tensor(torch.ones(6, 4))).shape == first[0].shape


def test_empty_sequences_can_be_compiled():
    torch._dynamo.reset()
    first, _ = scan_inputs((), length=0)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    assert compiled(*first).shape == (2, 0, 6)
