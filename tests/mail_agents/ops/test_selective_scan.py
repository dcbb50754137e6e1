"""Every backend of the selective scan against an independent loop, in values and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_agents.errors import InvalidInputError
from mail_agents.ops import (
    _scan_cuda,
    _scan_tiles,
    selective_scan,
    selective_scan_step,
    use_backend,
)
from mail_agents.ops._native import load
from mail_agents.ops._scan_inputs import ScanInputs
from mail_agents.ops.backends import NUMBA, probe

#: Backends that run anywhere on the CPU; ``native`` is skipped where it cannot be compiled.
FAST = [
    "torch",
    pytest.param(
        "native", marks=pytest.mark.skipif(bool(load().failure), reason=load().failure or "works")
    ),
    pytest.param(
        "numba", marks=pytest.mark.skipif(bool(probe(NUMBA).failure), reason="numba is absent")
    ),
]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0")


def naive(u, delta, A, B, C, D=None, z=None, delta_bias=None, h0=None, reset=None, softplus=True):
    """The recurrence in float64 NumPy, one channel and one state at a time in spirit."""
    arrays = [None if x is None else x.detach().double().numpy() for x in (u, delta, A, B, C, D, z)]
    u, delta, A, B, C, D, z = arrays
    batch, length, channels = u.shape
    h = np.zeros((batch, channels, A.shape[1])) if h0 is None else h0.detach().double().numpy()
    y = np.zeros_like(u)
    for t in range(length):
        dt = delta[:, t] + (0 if delta_bias is None else delta_bias.detach().double().numpy())
        if softplus:
            dt = np.logaddexp(0.0, dt)
        if reset is not None:
            h = np.where(reset[:, t].numpy()[:, None, None], 0.0, h)
        h = np.exp(dt[:, :, None] * A) * h + (dt * u[:, t])[:, :, None] * B[:, t, None, :]
        y[:, t] = (h * C[:, t, None, :]).sum(-1) + (0 if D is None else D * u[:, t])
        if z is not None:
            y[:, t] *= z[:, t] / (1 + np.exp(-z[:, t]))
    return y, h


def make(B, L, D, N, seed=0, dtype=torch.float32, optional=("D", "z", "delta_bias", "h0")):
    """Inputs with strides that no kernel may rely on."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    xz = rand(B, L, 2 * D)
    dBC = rand(B, L, 2 * N + 3)
    inputs = {
        "u": xz[..., :D],
        "delta": rand(D, L, B).permute(2, 1, 0) - 1,
        "A": -torch.rand(D, N, generator=g, dtype=dtype) * 16 - 1e-3,
        "B": dBC[..., 3 : 3 + N],
        "C": dBC[..., 3 + N :],
        "D": rand(D),
        "z": xz[..., D:],
        "delta_bias": rand(D),
        "h0": rand(B, D, N),
    }
    return {k: v for k, v in inputs.items() if k in NAMES[:5] or k in optional}


def gradients(inputs, backend, reset=None, seed=1):
    """Output, last state and the gradient of every input for fixed cotangents."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    y, h = selective_scan(**leaves, reset=reset, return_state=True, backend=backend)
    g = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in (y, h)]
    # The last state of an empty sequence without h0 is a constant.
    pairs = [(x, c) for x, c in zip((y, h), cotangents, strict=True) if x.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return {"y": y.detach(), "h": h.detach(), **dict(zip(leaves, found, strict=True))}


def assert_near(found, wanted, tolerance, context=""):
    for name, reference in wanted.items():
        if reference.numel() == 0:
            assert found[name].shape == reference.shape
            continue
        error = (found[name].double() - reference.double()).abs().max()
        scale = reference.double().abs().max().clamp(min=1e-30)
        assert error <= tolerance * scale, f"{context} {name}: {error / scale:.2e}"


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("length", [0, 1, 2, 15, 65])
def test_forward_equals_an_independent_loop(backend, length):
    inputs = make(3, length, 5, 4, dtype=torch.float64)
    reset = torch.rand(3, length, generator=torch.Generator().manual_seed(0)) < 0.1
    y, h = selective_scan(**inputs, reset=reset, return_state=True, backend=backend)
    wanted_y, wanted_h = naive(**inputs, reset=reset)
    np.testing.assert_allclose(y.numpy(), wanted_y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(h.numpy(), wanted_h, rtol=1e-10, atol=1e-12)


SIZES = [
    (2, 1, 1, 1),
    (3, 2, 16, 8),
    (2, 3, 33, 16),
    (130, 6, 256, 16),
    (4, 10, 256, 64),
    (2, 15, 33, 1),
    (2, 60, 256, 8),
    (3, 63, 16, 64),
    (2, 64, 33, 16),
    (2, 65, 16, 1),
    (2, 150, 256, 16),
    (1, 257, 33, 8),
    (1, 1024, 64, 16),
    (2, 5, 40, 256),
]


_EXPECTED = {}


def expected(size, resets, inputs, reset):
    """The float64 reference, once for all backends."""
    if (size, resets) not in _EXPECTED:
        wide = {k: v.double() for k, v in inputs.items()}
        _EXPECTED[size, resets] = gradients(wide, "reference", reset)
    return _EXPECTED[size, resets]


@pytest.mark.parametrize(("B", "L", "D", "N"), SIZES)
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_float32_equals_the_float64_reference(backend, B, L, D, N, resets):
    reset = torch.rand(B, L, generator=torch.Generator().manual_seed(3)) < 0.2 if resets else None
    # z, D, bias and h0 are all present once and all absent once.
    inputs = make(B, L, D, N, optional=("D", "z", "delta_bias", "h0") if resets else ())
    wanted = expected((B, L, D, N), resets, inputs, reset)
    assert_near(gradients(inputs, backend, reset), wanted, 1e-5, f"{(B, L, D, N)}")


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 5),
    length=st.integers(0, 40),
    channels=st.integers(1, 9),
    states=st.integers(1, 6),
    optional=st.sets(st.sampled_from(["D", "z", "delta_bias", "h0"])),
    resets=st.booleans(),
    tile=st.integers(1, 200),
    short=st.sampled_from([0, 16]),
    checkpoints=st.sampled_from([1, 16]),
)
def test_torch_backend_equals_reference_for_any_shape_and_tiling(
    batch, length, channels, states, optional, resets, tile, short, checkpoints
):
    inputs = make(batch, length, channels, states, dtype=torch.float64, optional=tuple(optional))
    reset = torch.rand(batch, length) < 0.3 if resets else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_scan_tiles, "_TILE", tile)
        patch.setattr(_scan_tiles, "_STEP", max(1, tile // 4))
        patch.setattr(_scan_tiles, "_SHORT", short)
        patch.setattr(_scan_tiles, "_MAX_CHECKPOINTS", checkpoints)
        found = gradients(inputs, "torch", reset)
    assert_near(found, gradients(inputs, "reference", reset), 1e-10)


@pytest.mark.parametrize("tile", [4, 10**6])
def test_gradcheck_of_the_torch_backend(tile, monkeypatch):
    monkeypatch.setattr(_scan_tiles, "_TILE", tile)
    monkeypatch.setattr(_scan_tiles, "_SHORT", 0)
    inputs = make(2, 5, 3, 2, dtype=torch.float64)
    reset = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    leaves = [v.detach().requires_grad_() for v in inputs.values()]

    def run(*args):
        kwargs = dict(zip(inputs, args, strict=True))
        return selective_scan(**kwargs, reset=reset, return_state=True, backend="torch")

    assert torch.autograd.gradcheck(run, leaves)


def test_reference_has_second_derivatives():
    inputs = make(1, 3, 2, 2, dtype=torch.float64)
    leaves = [v.detach().requires_grad_() for v in inputs.values()]

    def run(*args):
        return selective_scan(**dict(zip(inputs, args, strict=True)), backend="reference")

    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("fast", FAST)
def test_gradient_through_output_or_last_state_alone(fast):
    inputs = make(2, 20, 4, 3, dtype=torch.float64 if fast == "torch" else torch.float32)
    for pick in (0, 1):
        results = []
        for backend in ("reference", fast):
            leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
            out = selective_scan(**leaves, return_state=True, backend=backend)[pick]
            grads = torch.autograd.grad(
                out.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            results.append(dict(zip(leaves, grads, strict=True)))
        assert_near(results[1], results[0], 1e-10 if fast == "torch" else 1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_only_some_inputs_need_gradients(backend):
    inputs = make(2, 7, 4, 3)
    wanted = gradients(inputs, backend)["h0"]
    h0 = inputs.pop("h0").requires_grad_()
    y, h = selective_scan(**inputs, h0=h0, return_state=True, backend=backend)
    g = torch.Generator().manual_seed(1)
    dy, dh = (torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in (y, h))
    torch.testing.assert_close(torch.autograd.grad([y, h], h0, [dy, dh])[0], wanted)


@pytest.mark.parametrize("shift", [-40.0, -8.0, 6.0, 1e4])
@pytest.mark.parametrize("rate", [1e-3, 16.0])
@pytest.mark.parametrize("backend", FAST)
def test_extreme_step_sizes_and_decay_rates(backend, shift, rate):
    inputs = make(2, 300, 8, 4)
    inputs["delta"] = inputs["delta"].abs() + shift
    inputs["A"] = torch.full_like(inputs["A"], -rate)
    wanted = gradients({k: v.double() for k, v in inputs.items()}, "reference")
    found = gradients(inputs, backend)
    assert all(torch.isfinite(v).all() for v in found.values())
    # Rounding of dt * A is amplified by the exponent, as in any float32 implementation.
    assert_near(found, wanted, 1e-4)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("name", ["u", "delta", "B", "z"])
def test_nan_reaches_later_outputs_and_no_earlier_one(backend, name):
    inputs = {k: v.clone() for k, v in make(2, 40, 4, 3).items()}
    inputs[name][1, 20] = torch.nan
    y = selective_scan(**inputs, backend=backend)
    assert torch.isfinite(y[0]).all()
    assert torch.isfinite(y[1, :20]).all()
    later = y[1, 20:21] if name == "z" else y[1, 20:]
    assert torch.isnan(later).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("cut", [0, 1, 7, 30])
def test_split_sequence_with_carried_state_equals_the_whole(backend, cut):
    inputs = make(2, 30, 8, 4)
    h = inputs.pop("h0")
    whole, last = selective_scan(**inputs, h0=h, return_state=True, backend=backend)
    parts = []
    for time in (slice(0, cut), slice(cut, 30)):
        piece = {k: v[:, time] if v.dim() == 3 else v for k, v in inputs.items()}
        y, h = selective_scan(**piece, h0=h, return_state=True, backend=backend)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h, last, rtol=1e-5, atol=1e-5)


def test_step_loop_equals_the_whole():
    inputs = make(3, 12, 8, 4)
    h = inputs.pop("h0")
    whole, last = selective_scan(**inputs, h0=h, return_state=True)
    for t in range(12):
        piece = {k: v[:, t] if v.dim() == 3 else v for k, v in inputs.items()}
        before = h.clone()
        y, after = selective_scan_step(h, **piece)
        assert torch.equal(h, before)
        h = after
        torch.testing.assert_close(y, whole[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_reset_starts_a_new_sequence(backend):
    inputs = make(1, 20, 4, 3, optional=("D", "z", "delta_bias"))
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, 8] = True
    y = selective_scan(**inputs, reset=reset, backend=backend)
    tail = {k: v[:, 8:] if v.dim() == 3 else v for k, v in inputs.items()}
    torch.testing.assert_close(y[:, 8:], selective_scan(**tail, backend=backend))


def test_without_softplus():
    inputs = make(2, 9, 4, 3, dtype=torch.float64, optional=())
    inputs["delta"] = inputs["delta"].abs()
    wanted, _ = naive(**inputs, softplus=False)
    for backend in ("reference", "torch"):
        y = selective_scan(**inputs, delta_softplus=False, backend=backend)
        np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FAST)
def test_half_precision_inputs_keep_a_float32_state(backend, dtype):
    inputs = {k: v.to(dtype) for k, v in make(2, 50, 8, 4).items()}
    inputs["A"], inputs["h0"] = inputs["A"].float(), inputs["h0"].float()
    y, h = selective_scan(**inputs, return_state=True, backend=backend)
    wanted_y, wanted_h = naive(**inputs)
    assert y.dtype == dtype
    assert h.dtype == torch.float32
    np.testing.assert_allclose(h.numpy(), wanted_h, rtol=1e-5, atol=1e-5)
    assert np.abs(y.float().numpy() - wanted_y).max() <= 0.01 * np.abs(wanted_y).max()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast_does_not_touch_the_recurrence(backend):
    inputs = make(2, 20, 8, 4)
    wanted = gradients(inputs, "torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(gradients(inputs, backend), wanted, 1e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("batch", [1, 2, 70])
def test_two_threads_give_the_same_numbers_every_time(backend, batch):
    inputs = make(batch, 33, 64, 8)
    wanted = gradients(inputs, backend)
    torch.set_num_threads(2)
    try:
        found, again = gradients(inputs, backend), gradients(inputs, backend)
    finally:
        torch.set_num_threads(1)
    assert_near(found, wanted, 1e-5)
    assert all(torch.equal(found[k], again[k]) for k in found)


def test_torch_func_transforms_fall_back_to_the_reference():
    inputs = make(2, 4, 3, 2, optional=())
    rest = {k: v for k, v in inputs.items() if k != "u"}
    jacobian = torch.func.jacrev(lambda u: selective_scan(u, **rest))(inputs["u"].contiguous())
    assert jacobian.shape == (2, 4, 3, 2, 4, 3)
    with pytest.raises(InvalidInputError, match="transform is active"):
        torch.func.jacrev(lambda u: selective_scan(u, **rest, backend="torch"))(inputs["u"])


@pytest.mark.parametrize("backend", FAST)
def test_inputs_are_not_modified(backend):
    inputs = make(3, 40, 5, 4)
    before = {k: v.clone() for k, v in inputs.items()}
    gradients(inputs, backend)
    assert all(torch.equal(inputs[k], before[k]) for k in inputs)


def test_long_sequences_keep_few_states(monkeypatch):
    """One state per block would be half of the (B, L, D, N) tensor that blocks exist to avoid."""
    B, L, D, N = 2, 1024, 16, 8
    monkeypatch.setattr(_scan_tiles, "_TILE", 4 * D * N)
    monkeypatch.setattr(_scan_tiles, "_STEP", 2 * D * N)
    plan = _scan_tiles.plan_tiles(B, L, D * N, torch.device("cpu"))
    assert (plan.rows, plan.steps) == (2, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        inputs = {k: v.detach().requires_grad_() for k, v in make(B, L, D, N).items()}
        selective_scan(**inputs, backend="torch")
    states = [t.numel() for t in saved if t.dim() == 4]
    assert sum(states) <= 2 * L**0.5 * B * D * N


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(2, 4, 5)}, "delta has shape"),
        ({"B": torch.zeros(2, 2, 4)}, "B has shape"),
        ({"h0": torch.zeros(2, 2, 3)}, "h0 has shape"),
        ({"u": torch.zeros(2, 3)}, "channel-last"),
        ({"reset": torch.zeros(2, 4)}, "reset must be bool"),
        ({"A": torch.zeros(3, 2, dtype=torch.complex64)}, "real floating point"),
    ],
)
def test_wrong_inputs_are_explained(change, message):
    inputs = {**make(2, 4, 3, 2, optional=()), **change}
    with pytest.raises(InvalidInputError, match=message):
        selective_scan(**inputs)


class FakeExtension:
    """``selective_scan_cuda`` as its Python callers see it, computed by the reference backend."""

    @staticmethod
    def _run(u, delta, A, B, C, D, z, bias, softplus):
        assert B.shape == C.shape == (u.shape[0], 1, A.shape[1], u.shape[2])
        first = [t.transpose(1, 2) for t in (u, delta)]
        pair = [t.squeeze(1).transpose(1, 2) for t in (B, C)]
        gate = None if z is None else z.transpose(1, 2)
        y, h = selective_scan(
            *(*first, A, *pair, D, gate, bias, softplus), return_state=True, backend="reference"
        )
        return y.transpose(1, 2), h

    def fwd(self, u, delta, A, B, C, D, z, bias, softplus):
        out, h = self._run(u, delta, A, B, C, D, None, bias, softplus)
        x = torch.stack((torch.ones_like(h), h), -1).flatten(2).unsqueeze(2)
        gated = [] if z is None else [self._run(u, delta, A, B, C, D, z, bias, softplus)[0]]
        return [out, x, *gated]

    def bwd(self, u, delta, A, B, C, D, z, bias, dout, x, out, dz, softplus, recompute):
        assert (out is None) == (z is None)
        assert dout.is_contiguous()
        assert not recompute
        leaves = [
            None if t is None else t.detach().requires_grad_() for t in (u, delta, A, B, C, D)
        ]
        gate, shift = (None if t is None else t.detach().requires_grad_() for t in (z, bias))
        with torch.enable_grad():
            y, _ = self._run(*leaves, gate, shift, softplus)
            known = [t for t in (*leaves, gate, shift) if t is not None]
            grads = dict(zip(map(id, known), torch.autograd.grad(y, known, dout), strict=True))
        *first, dz, dbias = (grads.get(id(t)) for t in (*leaves, gate, shift))
        return [*first, dbias, *([] if z is None else [dz])]


@pytest.mark.parametrize("optional", [(), ("D", "z", "delta_bias"), ("z",), ("D",)])
def test_cuda_adapter_calls_the_extension_as_it_expects(optional, monkeypatch):
    fake = type("Probe", (), {"module": FakeExtension(), "failure": ""})
    monkeypatch.setattr(_scan_cuda, "probe", lambda _: fake)
    inputs = {
        k: v.detach().requires_grad_() for k, v in make(2, 7, 4, 3, optional=optional).items()
    }
    values = [inputs.get(name) for name in NAMES[:8]]
    y, h = _scan_cuda.run(ScanInputs(*values, True, None, None, True))
    wanted_y, wanted_h = selective_scan(**inputs, return_state=True, backend="reference")
    torch.testing.assert_close(y, wanted_y)
    torch.testing.assert_close(h, wanted_h)
    assert not h.requires_grad
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, list(inputs.values()), dy)
    wanted = torch.autograd.grad(wanted_y, list(inputs.values()), dy)
    torch.testing.assert_close(found, wanted)


def test_cuda_limits_are_named():
    def limits(**changes):
        base = make(2, 4, 3, 2, optional=())
        values = ScanInputs(*base.values(), None, None, None, True, None, None, False)
        return _scan_cuda.limits(values._replace(**changes))

    assert limits() is None
    assert "float64" in limits(u=torch.zeros(2, 4, 3, dtype=torch.float64))
    assert "256" in limits(A=torch.zeros(3, 257))
    assert "initial state" in limits(h0=torch.zeros(2, 3, 2))
    assert "resets" in limits(reset=torch.zeros(2, 4, dtype=torch.bool))
    assert "empty" in limits(u=torch.zeros(2, 0, 3))
    leaf = torch.zeros(2, 4, 3, requires_grad=True)
    assert "last state" in limits(u=leaf, return_state=True)
    with torch.no_grad():
        assert limits(u=leaf, return_state=True) is None


def test_context_manager_selects_the_backend():
    inputs = {k: v.requires_grad_() for k, v in make(1, 3, 2, 2, optional=()).items() if k != "u"}
    u = torch.zeros(1, 3, 2)
    for name in ("torch", "reference"):
        with use_backend(name):
            found = type(selective_scan(u, **inputs).grad_fn).__name__
        assert (found == "SelectiveScanBackward") == (name == "torch")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("u", (1, 8)),
        ("delta", (1, 8)),
        ("A", (8, 1)),
        ("B", (1, 4)),
        ("C", (1, 4)),
        ("D", (1,)),
        ("z", (1, 8)),
        ("delta_bias", (1,)),
    ],
)
def test_steps_name_the_tensor_that_does_not_fit(name, shape):
    state = torch.zeros(2, 8, 4)
    good = {"u": torch.zeros(2, 8), "delta": torch.zeros(2, 8), "A": -torch.ones(8, 4)}
    good |= {"B": torch.zeros(2, 4), "C": torch.zeros(2, 4)}
    selective_scan_step(state, **good)
    with pytest.raises(InvalidInputError, match=rf"step: {name} has shape .* \(2, 8, 4\)"):
        selective_scan_step(state, **(good | {name: torch.zeros(shape)}))
    with pytest.raises(InvalidInputError, match=r"needs a state \(B, D, N\)"):
        selective_scan_step(state[0], **good)
