"""Every backend that can be named over every mixer: it runs, or says why not, and is recorded."""

import pytest
import torch

from mail_agents.errors import InvalidInputError, MissingDependencyError
from mail_agents.mixers import BiMamba, Hydra, Mamba, Mamba2, MambaStack
from mail_agents.ops import _native, ssd, use_backend
from mail_agents.ops.backends import BACKENDS, NUMBA, probe, recording_backends

MIXERS = {
    "mamba": lambda **kw: Mamba(16, d_state=4, **kw),
    "mamba2": lambda **kw: Mamba2(16, d_state=4, headdim=8, **kw),
    "bimamba": lambda **kw: BiMamba(16, d_state=4, **kw),
    "hydra": lambda **kw: Hydra(16, d_state=4, headdim=8, **kw),
}
SEQUENCE_OPS = {"mamba": "selective_scan", "bimamba": "selective_scan"}
every_mixer = pytest.mark.parametrize("name", MIXERS)


def wanted(name, backend):
    """What runs the convolution and the sequence op, or the error."""
    if backend == "cuda":
        return (MissingDependencyError, InvalidInputError)
    if backend == "native" and _native.load().failure:
        return (MissingDependencyError,)
    op = SEQUENCE_OPS.get(name, "ssd")
    if backend == "numba":
        if op == "selective_scan" and probe(NUMBA).failure:
            return (MissingDependencyError,)
        return {"causal_conv1d": {"torch"}, op: {"numba" if op == "selective_scan" else "torch"}}
    return {"causal_conv1d": {backend}, op: {backend}}


@every_mixer
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_argument", [True, False])
def test_a_name_runs_or_raises(name, backend, by_argument):
    torch.manual_seed(0)
    mixer = MIXERS[name](**({"backend": backend} if by_argument else {}))
    x, expected = torch.randn(2, 5, 16), wanted(name, backend)
    with recording_backends(ran := {}), use_backend("auto" if by_argument else backend):
        if not isinstance(expected, dict):
            with pytest.raises(expected, match=backend):
                mixer(x)
            return
        y = mixer(x)
        y.sum().backward()
    assert ran == expected
    mixer.backend = "auto"
    with use_backend("reference"):
        torch.testing.assert_close(y, mixer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_steps_are_of_pytorch_and_are_recorded(name):
    mixer = MIXERS[name]()
    op = "selective_scan_step" if name == "mamba" else "ssd_step"
    for backend in ("torch", "reference"):
        with use_backend(backend), recording_backends(ran := {}), torch.no_grad():
            mixer.step(torch.randn(2, 16), mixer.init_state(2))
        assert ran == {"causal_conv1d_step": {"torch"}, op: {"torch"}}


@pytest.mark.parametrize("name", [*BACKENDS, "auto"])
@torch.no_grad()
def test_steps_of_stacks_are_recorded_whatever_runs(name):
    stack = MambaStack(16, 2, d_state=4)
    with use_backend(name), recording_backends(ran := {}):
        stack.step(torch.randn(2, 16), stack.init_state(2))
    assert ran


def test_what_stands_in_is_said(caplog, monkeypatch):
    from mail_agents.ops import backends

    monkeypatch.setattr(backends, "_logged", set())
    s, dt = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1)
    with caplog.at_level("INFO"):
        ssd(torch.zeros(1, 2, 1, 3), dt, -torch.ones(1), s, s, backend="numba")
    assert "ssd runs on backend 'torch' ('numba' was requested and has no kernel" in caplog.text


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_compiled_graph_takes_numba_where_it_stands_for_torch_and_says_why_not_else(name):
    torch._dynamo.reset()
    mixer = MIXERS[name]()
    compiled, x = torch.compile(mixer, backend="aot_eager"), torch.randn(2, 5, 16)
    with use_backend("numba"), recording_backends(ran := {}):
        if name == "mamba":
            with pytest.raises(Exception, match="cannot be compiled"):
                compiled(x)
        else:
            compiled(x).sum().backward()
            assert ran == {"causal_conv1d": {"torch"}, "ssd": {"torch"}}
    torch._dynamo.reset()
