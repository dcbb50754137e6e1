"""The scan that numba compiles equals the reference, and is used only where it is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_agents.errors import InvalidInputError, MissingDependencyError
from mail_agents.ops import _native, _scan_numba, backends, selective_scan
from mail_agents.ops.backends import Probe, backend_report, recording_backends

OPTIONAL = ("D", "z", "delta_bias", "h0", "reset")


@pytest.fixture(autouse=True)
def needs_numba():
    failure = backends.probe(backends.NUMBA).failure
    if failure:
        pytest.skip(f"needs numba ({failure}): {backends.NUMBA.fix}")


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine without a compiler, for this process."""
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr(backends, "_logged", set())
    _native.load.cache_clear()
    yield
    _native.load.cache_clear()


def make(batch, length, channels, states, optional=OPTIONAL, seed=0):
    """Inputs with strides that no kernel may rely on."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    both = rand(batch, length, 2 * channels)
    inputs = {
        "u": both[..., :channels],
        "delta": rand(channels, length, batch).permute(2, 1, 0) - 1,
        "A": -torch.rand(channels, states, generator=g) * 8 - 1e-3,
        "B": rand(batch, length, states + 2)[..., 2:],
        "C": rand(batch, length, states),
        "D": rand(channels),
        "z": both[..., channels:],
        "delta_bias": rand(channels),
        "h0": rand(batch, channels, states),
        "reset": torch.rand(batch, length, generator=g) < 0.2,
    }
    return {k: v for k, v in inputs.items() if k not in OPTIONAL or k in optional}


def results(inputs, backend, dtype=torch.float32, **options):
    """Output, last state, and the gradients of a fixed linear function of both."""
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in inputs.items() if k != "reset"}
    reset = {k: v for k, v in inputs.items() if k == "reset"}
    y, h = selective_scan(**leaves, **reset, **options, return_state=True, backend=backend)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g).to(x.dtype) for x in (y, h)]
    total = (y * weights[0]).sum() + (h * weights[1]).sum()
    found = torch.autograd.grad(
        total, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {"y": y.detach(), "h": h.detach(), **dict(zip(leaves, found, strict=True))}


def assert_near(found, wanted, tolerance=1e-5):
    for name, right in wanted.items():
        assert found[name].shape == right.shape, name
        if right.numel():
            error = (found[name].double() - right.double()).abs().max()
            scale = right.double().abs().max().clamp(min=1e-6)
            assert error <= tolerance * scale, f"{name}: {error / scale:.1e}"


@pytest.mark.parametrize("optional", [OPTIONAL, (), ("D", "h0"), ("z", "delta_bias", "reset")])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (3, 10, 40, 16), (2, 32, 16, 4), (2, 33, 300, 8), (2, 150, 33, 3)]
)
def test_equals_the_float64_reference(sizes, optional):
    inputs = make(*sizes, optional)
    assert_near(results(inputs, "numba"), results(inputs, "reference", torch.float64))


def test_without_softplus_and_with_the_largest_state():
    inputs = make(2, 40, 17, 256, ("h0",))
    inputs["delta"] = inputs["delta"].abs() * 0.1
    wanted = results(inputs, "reference", torch.float64, delta_softplus=False)
    assert_near(results(inputs, "numba", delta_softplus=False), wanted)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 4),
    length=st.integers(0, 70),
    channels=st.integers(1, 140),
    states=st.integers(1, 5),
    optional=st.sets(st.sampled_from(OPTIONAL)),
)
def test_any_shape(batch, length, channels, states, optional):
    inputs = make(batch, length, channels, states, tuple(optional))
    assert_near(results(inputs, "numba"), results(inputs, "reference", torch.float64), 2e-5)


def test_long_sequences_do_not_drift():
    inputs = make(1, 3000, 5, 4, ("D",))
    inputs["A"] = torch.full((5, 4), -1e-3)
    assert_near(results(inputs, "numba"), results(inputs, "reference", torch.float64))


def test_masked_steps_change_nothing():
    inputs = make(2, 20, 9, 4, ("delta_bias", "h0"))
    masked = {k: v.clone() for k, v in inputs.items()}
    masked["delta"][:, 5:8] = -torch.inf
    kept = [t for t in range(20) if not 5 <= t < 8]
    short = {k: v[:, kept] if k in ("u", "delta", "B", "C") else v for k, v in inputs.items()}
    y, h = selective_scan(**masked, return_state=True, backend="numba")
    wanted_y, wanted_h = selective_scan(**short, return_state=True, backend="numba")
    assert torch.equal(y[:, kept], wanted_y)
    assert torch.equal(h, wanted_h)
    found = results(masked, "numba")
    assert torch.equal(found["delta"][:, 5:8], torch.zeros(2, 3, 9))
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0"])
def test_what_is_not_finite_comes_out_where_the_reference_has_it(name, bad):
    inputs = make(2, 6, 40, 3, OPTIONAL[:-1])
    inputs[name] = inputs[name].clone(memory_format=torch.contiguous_format)
    inputs[name].view(-1)[7 if inputs[name].dim() > 1 else 3] = bad
    y, h = selective_scan(**inputs, return_state=True, backend="numba")
    wanted_y, wanted_h = selective_scan(**inputs, return_state=True, backend="reference")
    for found, wanted in ((y, wanted_y), (h, wanted_h)):
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.isinf(), wanted.isinf())


def test_threads_share_the_batch(monkeypatch):
    inputs = make(5, 20, 16, 4)
    alone = results(inputs, "numba")
    monkeypatch.setattr(_scan_numba, "_WORTH_THREADS", 0)
    for count in (2, 3, 8):
        monkeypatch.setattr(_scan_numba, "threads", lambda count=count: count)
        together = results(inputs, "numba")
        for name in ("y", "h", "u", "delta", "B", "C", "z", "h0"):
            assert torch.equal(alone[name], together[name]), name
        assert_near(together, alone, 1e-6)


def test_gradients_of_one_result_alone():
    inputs = make(2, 40, 8, 3)
    for pick in (0, 1):
        found, wanted = [], []
        for into, backend, dtype in (
            (found, "numba", torch.float32),
            (wanted, "reference", torch.float64),
        ):
            leaves = {k: v.to(dtype) for k, v in inputs.items() if k != "reset"}
            u = leaves["u"].clone().requires_grad_()
            leaves["u"] = u
            pair = selective_scan(
                **leaves, reset=inputs["reset"], return_state=True, backend=backend
            )
            into += torch.autograd.grad(pair[pick].sum(), u)
        assert_near({"u": found[0]}, {"u": wanted[0]})


def test_half_precision_is_computed_in_float32():
    inputs = {k: v if k == "reset" else v.bfloat16() for k, v in make(2, 9, 8, 3).items()}
    y, h = selective_scan(**inputs, return_state=True, backend="numba")
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    single = {k: v if k == "reset" else v.float() for k, v in inputs.items()}
    assert torch.equal(y, selective_scan(**single, backend="numba").bfloat16())


def test_inputs_it_cannot_take(monkeypatch):
    wide = {k: v.double() for k, v in make(1, 2, 3, 2, ()).items()}
    with pytest.raises(InvalidInputError, match="float64"):
        selective_scan(**wide, backend="numba")
    inputs = make(2, 3, 4, 2, ())
    with pytest.raises(InvalidInputError, match=r"torch\.func"):
        torch.func.vmap(lambda u: selective_scan(**{**inputs, "u": u}, backend="numba"))(
            inputs["u"].unsqueeze(0)
        )


def test_auto_takes_it_where_nothing_compiles(no_compiler, monkeypatch):
    inputs = make(1, 2, 3, 2, ())
    with recording_backends(ran := {}):
        selective_scan(**inputs)
        selective_scan(**{k: v.double() for k, v in inputs.items()})
    assert ran["selective_scan"] == {"numba", "torch"}
    rows = {row["name"]: row for row in backend_report() if row["op"] == "selective_scan"}
    assert rows["numba"]["auto"] == ["cpu"]
    monkeypatch.setattr(backends, "probe", lambda extension: Probe(None, "ImportError: absent"))
    with recording_backends(ran := {}):
        selective_scan(**inputs)
    assert ran["selective_scan"] == {"torch"}
    with pytest.raises(MissingDependencyError, match=r"pip install 'mail-agents\[numba\]'"):
        selective_scan(**inputs, backend="numba")
    rows = {row["name"]: row for row in backend_report() if row["op"] == "selective_scan"}
    assert rows["numba"]["fix"] == "pip install 'mail-agents[numba]'"
    assert "ImportError: absent" in rows["numba"]["reason"]


def test_numba_is_not_imported_where_kernels_compile():
    found = _native.load()
    if found.failure:
        pytest.skip(f"needs the native kernels: {found.failure}")
    code = (
        "import sys, torch; from mail_agents.ops import backend_report, selective_scan as scan;"
        "x, s = torch.zeros(1, 2, 8), torch.zeros(1, 2, 3);"
        "scan(x, x, -torch.ones(8, 3), s, s); x = x.double();"
        "scan(x, x, -torch.ones(8, 3), s, s); backend_report(); assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_compiled_is_kept_in_the_users_cache(kernel_cache, monkeypatch, tmp_path):
    selective_scan(**make(1, 2, 3, 2, ()), backend="numba")
    kernels = _scan_numba._kernels()
    assert list((kernel_cache / "numba").rglob("_scan_numba_kernels.forward*.nbi"))
    assert not list(Path(kernels.__file__).parent.rglob("*.nbi"))
    assert kernels._cache_folder() == str((kernel_cache / "numba").resolve())
    # Anywhere that others could write to, or nobody, it keeps nothing.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mail-agents" / "numba").mkdir(parents=True)
    (tmp_path / "mail-agents" / "numba").chmod(0o777)
    assert kernels._cache_folder() is None
    (tmp_path / "mail-agents" / "numba").chmod(0o700)
    monkeypatch.setattr(kernels.os, "access", lambda *_: False)
    assert kernels._cache_folder() is None
    monkeypatch.setattr(kernels.numba.config, "CACHE_DIR", "elsewhere")
    monkeypatch.setattr(kernels.os, "access", os.access)
    assert kernels._cache_folder() == "elsewhere"
