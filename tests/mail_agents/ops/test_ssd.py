"""Every backend of the state space duality op against an independent loop and its matrix."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_agents.errors import InvalidInputError, MissingDependencyError
from mail_agents.ops import (
    _native,
    _ssd_chunks,
    _ssd_cuda,
    _ssd_opaque,
    backend_report,
    ssd,
    ssd_step,
    use_backend,
)
from mail_agents.ops._ssd_inputs import UNLIMITED, SsdInputs

ops = importlib.import_module("mail_agents.ops.ssd")

REQUIRED = ("x", "dt", "A", "B", "C")
OPTIONAL = ("D", "z", "dt_bias", "h0")
LENGTHS = [1, 2, 3, 10, 63, 64, 65, 192, 193, 255, 256, 257, 300]


def naive(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    h0=None,
    reset=None,
    softplus=True,
    limit=UNLIMITED,
):
    """The recurrence in float64 NumPy, head by head."""
    arrays = [None if t is None else t.detach().double().numpy() for t in (x, dt, A, B, C, D, z)]
    x, dt, A, B, C, D, z = arrays
    batch, length, heads, head = x.shape
    h = np.zeros((batch, heads, head, B.shape[3])) if h0 is None else h0.detach().double().numpy()
    h, y = h.copy(), np.zeros_like(x)
    raw = dt + (0 if dt_bias is None else dt_bias.detach().double().numpy())
    sizes = np.clip(np.logaddexp(0.0, raw) if softplus else raw, *limit)
    sizes = np.where(raw == -np.inf, 0.0, sizes)
    for k in range(heads):
        g = k * B.shape[2] // heads
        for t in range(length):
            if reset is not None:
                h[reset[:, t].numpy(), k] = 0.0
            size = sizes[:, t, k, None, None]
            h[:, k] = np.exp(size * A[k]) * h[:, k] + size * x[:, t, k, :, None] * B[:, t, g, None]
            y[:, t, k] = np.einsum("bpn,bn->bp", h[:, k], C[:, t, g])
    if D is not None:
        y += (D if D.ndim == 2 else D[:, None]) * x
    return (y if z is None else y * z / (1 + np.exp(-z))), h


def make(
    B, L, H=4, P=3, G=2, N=5, seed=0, dtype=torch.float32, optional=OPTIONAL, per_channel=True
):
    """Inputs with strides that no kernel may rely on."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    xz, groups = rand(B, L, 2 * H * P + 1), rand(B, L, 2 * G * N + 3)
    inputs = {
        "x": xz[..., : H * P].unflatten(-1, (H, P)),
        "dt": rand(H, L, B).permute(2, 1, 0) - 1,
        "A": -torch.rand(H, generator=g, dtype=dtype) * 16 - 1e-3,
        "B": groups[..., 3 : 3 + G * N].unflatten(-1, (G, N)),
        "C": groups[..., 3 + G * N :].unflatten(-1, (G, N)),
        "D": rand(H, P) if per_channel else rand(H),
        "z": xz[..., H * P : -1].unflatten(-1, (H, P)),
        "dt_bias": rand(H),
        "h0": rand(B, H, N, P).transpose(2, 3),
    }
    return {k: v for k, v in inputs.items() if k in REQUIRED or k in optional}


def resets(B, L, share=0.1):
    return torch.rand(B, L, generator=torch.Generator().manual_seed(3)) < share


def gradients(inputs, backend, return_state=True, seed=1, **options):
    """Output, last state and the gradient of every input for fixed cotangents."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    found = ssd(**leaves, return_state=return_state, backend=backend, **options)
    outputs = dict(zip("yh", found if return_state else (found,), strict=False))
    g = torch.Generator().manual_seed(seed)
    cotangents = {
        k: torch.randn(v.shape, generator=g, dtype=torch.float64).to(v) for k, v in outputs.items()
    }
    # The last state of an empty sequence without h0 is a constant.
    known = [k for k, v in outputs.items() if v.requires_grad]
    grads = torch.autograd.grad(
        [outputs[k] for k in known],
        list(leaves.values()),
        [cotangents[k] for k in known],
        allow_unused=True,
        materialize_grads=True,
    )
    values = {k: v.detach() for k, v in outputs.items()}
    return {**values, **dict(zip(leaves, grads, strict=True))}


def assert_near(found, wanted, tolerance, smallest=1e-24):
    """Errors relative to the largest value; products below `smallest` are zero in float32."""
    assert found.keys() == wanted.keys()
    for name, reference in wanted.items():
        assert found[name].shape == reference.shape
        if reference.numel() == 0:
            continue
        error = (found[name].double() - reference.double()).abs().max()
        scale = reference.double().abs().max().clamp(min=smallest)
        assert error <= tolerance * scale, f"{name}: {error / scale:.2e}"


@pytest.fixture
def native():
    """Skips where there are no compiled kernels; why is tested with their loader."""
    failure = _native.load().failure
    if failure:
        pytest.skip(failure)
    return "native"


def double(inputs):
    return {k: v.double() for k, v in inputs.items()}


def at(inputs, time):
    return {k: v[:, time] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("length", [0, 1, 2, 15, 65])
@pytest.mark.parametrize("per_channel", [False, True])
def test_forward_equals_an_independent_loop(backend, length, per_channel):
    inputs = make(3, length, dtype=torch.float64, per_channel=per_channel)
    reset = resets(3, length)
    y, h = ssd(**inputs, reset=reset, return_state=True, backend=backend)
    wanted_y, wanted_h = naive(**inputs, reset=reset)
    np.testing.assert_allclose(y.numpy(), wanted_y, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(h.numpy(), wanted_h, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_op_is_a_semiseparable_matrix(backend):
    """Definition 3.2 of Dao & Gu 2024: entry (i, j) is C_i . B_j times the decay between them."""
    inputs = make(2, 70, dtype=torch.float64, optional=())
    dt = torch.nn.functional.softplus(inputs["dt"])
    matrix = torch.zeros(2, 4, 70, 70, dtype=torch.float64)
    for i in range(70):
        for j in range(i + 1):
            decay = torch.exp((dt[:, j + 1 : i + 1] * inputs["A"]).sum(1))
            product = (inputs["C"][:, i] * inputs["B"][:, j]).sum(-1).repeat_interleave(2, 1)
            matrix[:, :, i, j] = product * decay * dt[:, j]
    wanted = torch.einsum("bhij,bjhp->bihp", matrix, inputs["x"])
    torch.testing.assert_close(ssd(**inputs, backend=backend), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("stateful", [False, True])
def test_float32_torch_backend_equals_float64_reference(length, stateful):
    # Everything optional is present once and absent once.
    inputs = make(2, length, 4, 8, 2, 16, optional=OPTIONAL if stateful else ())
    reset = resets(2, length, 0.05) if stateful else None
    options = {"reset": reset, "return_state": stateful}
    wanted = gradients(double(inputs), "reference", **options)
    assert_near(gradients(inputs, "torch", **options), wanted, 5e-6)


@pytest.mark.parametrize(
    ("B", "L", "H", "P", "G", "N"),
    [(1, 65, 1, 1, 1, 1), (5, 10, 8, 64, 1, 64), (2, 20, 6, 16, 6, 33), (1, 40, 2, 32, 1, 256)],
)
def test_sizes_of_heads_groups_and_states(B, L, H, P, G, N):
    inputs = make(B, L, H, P, G, N)
    wanted = gradients(double(inputs), "reference")
    assert_near(gradients(inputs, "torch"), wanted, 3e-6)


@pytest.mark.parametrize("length", [n for n in LENGTHS if n <= 192])
@pytest.mark.parametrize("full", [False, True])
def test_native_backend_equals_float64_reference(native, length, full):
    optional = ("D", "z", "dt_bias") if full else ()
    inputs = make(3, length, 4, 8, 2, 16, optional=optional)
    options = {"reset": resets(3, length, 0.1) if full else None, "return_state": False}
    wanted = gradients(double(inputs), "reference", **options)
    assert_near(gradients(inputs, native, **options), wanted, 5e-6)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    head=st.integers(1, 70),
    states=st.integers(1, 70),
    optional=st.sets(st.sampled_from(("D", "z", "dt_bias"))),
    per_channel=st.booleans(),
    with_resets=st.booleans(),
    masked=st.integers(0, 8),
    softplus=st.booleans(),
    limit=st.sampled_from([UNLIMITED, (0.2, 1.0)]),
)
def test_native_backend_equals_reference_for_any_shape(
    batch, length, groups, per_group, head, states, optional, per_channel, with_resets,
    masked, softplus, limit,
):  # fmt: skip
    if _native.load().failure:
        return
    inputs = make(
        *(batch, length, groups * per_group, head, groups, states),
        **{"optional": tuple(optional), "per_channel": per_channel},
    )
    inputs["dt"] = inputs["dt"].clone()
    inputs["dt"][0, :masked] = -torch.inf
    options = {
        "reset": resets(batch, length, 0.3) if with_resets else None,
        "return_state": False,
        "dt_softplus": softplus,
        "dt_limit": limit,
    }
    wanted = gradients(double(inputs), "reference", **options)
    assert_near(gradients(inputs, "native", **options), wanted, 1e-5, smallest=0.1)
    assert (wanted["dt"][0, :masked] == 0).all()


@pytest.mark.parametrize("length", [1, 10, 65, 192])
@pytest.mark.parametrize(("P", "N"), [(3, 5), (64, 128), (33, 20)])
@pytest.mark.parametrize("before", [False, True])
def test_native_backend_acts_with_states(native, length, P, N, before):
    optional = ("D", "z", "dt_bias", "h0") if before else ("D",)
    inputs = make(3, length, 4, P, 2, N, optional=optional)
    reset = resets(3, length, 0.05) if before else None
    y, h = ssd(**inputs, reset=reset, return_state=True, backend=native)
    wanted_y, wanted_h = ssd(**double(inputs), reset=reset, return_state=True, backend="reference")
    found, wanted = {"y": y, "h": h}, {"y": wanted_y, "h": wanted_h}
    assert_near(found, wanted, 3e-6)
    if before:
        assert torch.equal(ssd(**inputs, reset=reset, backend=native), y)


def test_native_backend_divides_the_batch_among_threads(native):
    inputs = make(7, 33, 4, 16, 2, 8, optional=("D",))
    options = {"return_state": False, "reset": resets(7, 33)}
    wanted = gradients(inputs, native, **options)
    torch.set_num_threads(2)
    try:
        found = gradients(inputs, native, **options)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_native_backend_takes_half_precision(native):
    inputs = {k: v.bfloat16() for k, v in make(2, 50, optional=("D", "z")).items()}
    y = ssd(**inputs, backend=native)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, ssd(**inputs, backend="reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"return_state": True, "D": torch.zeros(4, requires_grad=True)}, "through states"),
        ({"h0": torch.zeros(2, 4, 3, 5, requires_grad=True)}, "through states"),
        ({"x": torch.zeros(2, 5, 4, 3, dtype=torch.float64)}, "float64"),
    ],
)
def test_what_the_native_backend_refuses(native, change, message):
    inputs = {**make(2, 5, optional=()), **change}
    with pytest.raises(InvalidInputError, match=message):
        ssd(**inputs, backend=native)
    ssd(**inputs)
    with pytest.raises(InvalidInputError, match="one chunk"):
        ssd(**make(2, 193, optional=()), backend=native)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 5),
    length=st.integers(0, 40),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    head=st.integers(1, 4),
    states=st.integers(1, 4),
    optional=st.sets(st.sampled_from(OPTIONAL)),
    per_channel=st.booleans(),
    with_resets=st.booleans(),
    return_state=st.booleans(),
    softplus=st.booleans(),
    limit=st.sampled_from([UNLIMITED, (0.2, 1.0)]),
    single=st.sampled_from([1, 192]),
    chunk=st.integers(1, 20),
    block=st.integers(1, 2000),
)
def test_torch_backend_equals_reference_for_any_shape_and_chunking(
    batch, length, groups, per_group, head, states, optional, per_channel, with_resets,
    return_state, softplus, limit, single, chunk, block,
):  # fmt: skip
    inputs = make(
        *(batch, length, groups * per_group, head, groups, states),
        **{"dtype": torch.float64, "optional": tuple(optional), "per_channel": per_channel},
    )
    options = {
        "reset": resets(batch, length, 0.3) if with_resets else None,
        "return_state": return_state,
        "dt_softplus": softplus,
        "dt_limit": limit,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ssd_chunks, "_SINGLE", single)
        patch.setattr(_ssd_chunks, "_CHUNK", chunk)
        patch.setattr(_ssd_chunks, "_BLOCK", block)
        found = gradients(inputs, "torch", **options)
    # What resets leave of the gradient of A may be nothing but the rounding of other gradients.
    assert_near(found, gradients(inputs, "reference", **options), 1e-9, smallest=1e-6)


@pytest.mark.parametrize("chunk", [2, 10**6])
@pytest.mark.parametrize("softplus", [False, True])
def test_gradcheck_of_the_torch_backend(chunk, softplus, monkeypatch):
    monkeypatch.setattr(_ssd_chunks, "_SINGLE", chunk)
    monkeypatch.setattr(_ssd_chunks, "_CHUNK", chunk)
    inputs = make(2, 5, 2, 2, 1, 2, dtype=torch.float64)
    reset = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    leaves = [v.detach().requires_grad_() for v in inputs.values()]

    def run(*args):
        kwargs = dict(zip(inputs, args, strict=True))
        return ssd(**kwargs, reset=reset, dt_softplus=softplus, return_state=True, backend="torch")

    assert torch.autograd.gradcheck(run, leaves)


def test_reference_has_second_derivatives():
    inputs = make(1, 3, 2, 2, 1, 2, dtype=torch.float64)
    leaves = [v.detach().requires_grad_() for v in inputs.values()]

    def run(*args):
        return ssd(**dict(zip(inputs, args, strict=True)), backend="reference")

    assert torch.autograd.gradgradcheck(run, leaves)


def test_torch_backend_refuses_second_derivatives():
    inputs = make(1, 3, optional=())
    x = inputs.pop("x").requires_grad_()
    grad = torch.autograd.grad(ssd(x, **inputs).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("pick", [0, 1])
@pytest.mark.parametrize("length", [20, 200])
def test_gradient_through_output_or_last_state_alone(pick, length):
    inputs = make(2, length, dtype=torch.float64)
    results = []
    for backend in ("reference", "torch"):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        out = ssd(**leaves, return_state=True, backend=backend)[pick]
        grads = torch.autograd.grad(
            out.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        results.append(dict(zip(leaves, grads, strict=True)))
    assert_near(results[1], results[0], 1e-9)


@pytest.mark.parametrize("shift", [-40.0, -8.0, 0.0, 6.0, 1e4])
@pytest.mark.parametrize("rate", [1e-3, 1.0, 16.0])
def test_extreme_step_sizes_and_decay_rates(shift, rate):
    inputs = make(2, 150, 4, 8, 2, 8)
    inputs["dt"] = inputs["dt"].abs() + shift
    inputs["A"] = torch.full_like(inputs["A"], -rate)
    wanted = gradients(double(inputs), "reference")
    found = gradients(inputs, "torch")
    assert all(torch.isfinite(v).all() for v in found.values())
    assert_near(found, wanted, 5e-6)


def test_small_steps_after_a_huge_one_keep_their_digits():
    inputs = make(1, 60, 2, 4, 1, 4, optional=())
    inputs["dt"] = torch.full((1, 60, 2), -3.0)
    inputs["dt"][:, 20] = 1e6
    wanted = gradients(double(inputs), "reference")
    assert_near(gradients(inputs, "torch"), wanted, 3e-6)


def test_growing_states():
    """Positive rates are no use to a policy, but nothing forbids them."""
    inputs = make(2, 40, dtype=torch.float64)
    inputs["A"] = -inputs["A"] / 100
    assert_near(gradients(inputs, "torch"), gradients(inputs, "reference"), 1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("chunk", [8, 192])
def test_what_is_not_finite_stays_in_its_sequence(backend, name, value, chunk, monkeypatch):
    monkeypatch.setattr(_ssd_chunks, "_SINGLE", chunk)
    monkeypatch.setattr(_ssd_chunks, "_CHUNK", chunk)
    inputs = {k: v.clone() for k, v in make(3, 40, optional=("D",)).items()}
    inputs[name][1, 20] = value
    y = ssd(**inputs, backend=backend)
    assert torch.isfinite(y[[0, 2]]).all()
    assert not torch.isfinite(y[1, 20]).any()
    if name != "C" and value is torch.nan:
        assert torch.isnan(y[1, 20:]).all()
    if backend == "reference":
        assert torch.isfinite(y[1, :20]).all()


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("cut", [0, 1, 7, 30])
def test_split_sequence_with_carried_state_equals_the_whole(backend, cut):
    inputs = make(2, 30)
    h = inputs.pop("h0")
    whole, last = ssd(**inputs, h0=h, return_state=True, backend=backend)
    parts = []
    for time in (slice(0, cut), slice(cut, 30)):
        y, h = ssd(**at(inputs, time), h0=h, return_state=True, backend=backend)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("groups", "per_channel"), [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize("limit", [UNLIMITED, (0.1, 0.5)])
def test_step_loop_equals_the_whole(groups, per_channel, limit):
    inputs = make(3, 12, G=groups, per_channel=per_channel)
    inputs["dt"] = inputs["dt"].clone()
    inputs["dt"][0, :5] = -torch.inf
    h = inputs.pop("h0")
    whole, last = ssd(**inputs, h0=h, return_state=True, dt_limit=limit)
    for t in range(12):
        before = h.clone()
        y, after = ssd_step(h, **at(inputs, t), dt_limit=limit)
        assert torch.equal(h, before)
        if t < 5:
            assert torch.equal(after[0], h[0])
        h = after
        torch.testing.assert_close(y, whole[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("limit", [UNLIMITED, (0.1, 0.5)])
@pytest.mark.parametrize("length", [30, 220])
def test_masked_steps_are_not_there(backend, limit, length):
    """Steps of size -inf in front, in the middle and behind, forward and backward."""
    inputs = make(2, length, dtype=torch.float64)
    keep = torch.ones(length, dtype=torch.bool)
    keep[:7] = keep[15:18] = keep[-4:] = False
    masked = {**inputs, "dt": inputs["dt"].masked_fill(~keep[:, None], -torch.inf)}
    options = {"dt_limit": limit, "backend": backend}
    y, h = ssd(**masked, **options, return_state=True)
    wanted_y, wanted_h = ssd(**at(inputs, keep), **options, return_state=True)
    torch.testing.assert_close(y[:, keep], wanted_y)
    torch.testing.assert_close(h, wanted_h)
    found = gradients(masked, **options)
    assert all(torch.isfinite(v).all() for v in found.values())
    assert (found["dt"][:, ~keep] == 0).all()
    none = ssd(
        **{**masked, "dt": torch.full_like(inputs["dt"], -torch.inf)}, **options, return_state=True
    )[1]
    assert torch.equal(none, inputs["h0"])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_reset_starts_a_new_sequence(backend):
    inputs = make(1, 20)
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, 8] = True
    y, h = ssd(**inputs, reset=reset, return_state=True, backend=backend)
    tail = {**at(inputs, slice(8, None)), "h0": None}
    wanted_y, wanted_h = ssd(**tail, return_state=True, backend=backend)
    torch.testing.assert_close(y[:, 8:], wanted_y)
    torch.testing.assert_close(h, wanted_h)


@pytest.mark.parametrize("softplus", [False, True])
def test_limits_of_step_sizes(softplus):
    inputs = make(2, 9, dtype=torch.float64, optional=("dt_bias",))
    options = {"dt_softplus": softplus, "dt_limit": (0.3, 0.9)}
    wanted, _ = naive(**inputs, softplus=softplus, limit=(0.3, 0.9))
    for backend in ("reference", "torch"):
        y = ssd(**inputs, **options, backend=backend)
        np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-10, atol=1e-12)
    found = gradients(inputs, "torch", **options)
    raw = inputs["dt"] + inputs["dt_bias"]
    sizes = torch.nn.functional.softplus(raw) if softplus else raw
    outside = (sizes < 0.3) | (sizes > 0.9)
    assert outside.any()
    assert not outside.all()
    assert (found["dt"][outside] == 0).all()
    assert (found["dt"][~outside] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_a_float32_state(dtype):
    inputs = {k: v.to(dtype) for k, v in make(2, 50).items()}
    inputs["A"], inputs["h0"] = inputs["A"].float(), inputs["h0"].float()
    wanted_y, wanted_h = naive(**inputs)
    for backend in ("reference", "torch"):
        y, h = ssd(**inputs, return_state=True, backend=backend)
        assert y.dtype == dtype
        assert h.dtype == torch.float32
        np.testing.assert_allclose(h.numpy(), wanted_h, rtol=1e-5, atol=1e-5)
        assert np.abs(y.float().numpy() - wanted_y).max() <= 0.01 * np.abs(wanted_y).max()


def test_autocast_does_not_touch_the_recurrence():
    inputs = make(2, 20)
    wanted = gradients(inputs, "torch")
    for backend in ("torch", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_near(gradients(inputs, backend), wanted, 1e-5)


def test_two_threads_give_the_same_numbers():
    inputs = make(70, 33, 4, 16, 1, 8)
    wanted = gradients(inputs, "torch")
    torch.set_num_threads(2)
    try:
        found = gradients(inputs, "torch")
    finally:
        torch.set_num_threads(1)
    assert_near(found, wanted, 1e-5)


def test_torch_func_transforms_fall_back_to_the_reference():
    inputs = make(2, 4, 2, 2, 1, 2, optional=())
    rest = {k: v for k, v in inputs.items() if k != "x"}
    jacobian = torch.func.jacrev(lambda x: ssd(x, **rest))(inputs["x"].contiguous())
    assert jacobian.shape == (2, 4, 2, 2, 2, 4, 2, 2)
    with pytest.raises(InvalidInputError, match="transform is active"):
        torch.func.jacrev(lambda x: ssd(x, **rest, backend="torch"))(inputs["x"])


@pytest.mark.parametrize("length", [40, 200])
def test_inputs_are_not_modified(length):
    inputs = make(3, length)
    before = {k: v.clone() for k, v in inputs.items()}
    gradients(inputs, "torch")
    assert all(torch.equal(inputs[k], before[k]) for k in inputs)


@pytest.mark.parametrize(
    ("backend", "optional", "length"),
    [("auto", (), 12), ("auto", ("D",), 12), ("torch", (), 12), ("torch", OPTIONAL, 200)],
)
def test_compiled_graphs_hold_one_operation(backend, optional, length):
    inputs = make(2, length, optional=optional)
    full = "h0" in optional
    reset = resets(2, length) if optional else None
    work = ops._prepared(
        SsdInputs(
            *(inputs.get(k) for k in (*REQUIRED, "D", "z", "dt_bias")),
            *(True, UNLIMITED, inputs.get("h0"), reset, full),
        )
    )
    leaves = [t.detach().requires_grad_() if t is not None else None for t in work[:7]]
    torch.library.opcheck(_ssd_opaque._ssd, (*leaves, *work[7:], backend))


@pytest.mark.parametrize("full", [False, True])
def test_fullgraph_compile_equals_eager(full):
    inputs = make(2, 12, optional=OPTIONAL if full else ("D", "z", "dt_bias"))

    def run(leaves):
        found = ssd(**leaves, return_state=full)
        return found if full else (found, leaves["A"])

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    y, h = compiled(leaves)
    eager = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    wanted_y, wanted_h = run(eager)
    torch.testing.assert_close((y, h), (wanted_y, wanted_h))
    (y.sum() + h.square().sum()).backward()
    (wanted_y.sum() + wanted_h.square().sum()).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, eager[name].grad)
    with pytest.raises(Exception, match="cannot be compiled"), use_backend("reference"):
        compiled(leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 12)}, "unflatten"),
        ({"dt": torch.zeros(2, 4, 5)}, "dt has shape"),
        ({"A": torch.zeros(4, 2)}, "A has shape"),
        ({"C": torch.zeros(2, 4, 2, 4)}, "C has shape"),
        ({"D": torch.zeros(12)}, "D has shape"),
        ({"B": torch.zeros(2, 4, 3, 5), "C": torch.zeros(2, 4, 3, 5)}, "do not divide 4 heads"),
        ({"h0": torch.zeros(2, 4, 5, 3)}, "h0 has shape"),
        ({"reset": torch.zeros(2, 4)}, "reset must be bool"),
        ({"A": torch.zeros(4, dtype=torch.complex64)}, "real floating point"),
        ({"dt_limit": (0.5, 0.1)}, "dt_limit"),
        ({"dt_limit": (-1.0, 0.1)}, "dt_limit"),
    ],
)
def test_wrong_inputs_are_explained(change, message):
    with pytest.raises(InvalidInputError, match=message):
        ssd(**{**make(2, 4, optional=()), **change})


class FakeKernels:
    """``mamba_ssm.ops.triton.ssd_combined`` as its callers see it, computed by the reference."""

    def __init__(self):
        self.chunk_sizes = []

    def mamba_chunk_scan_combined(
        self, x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
        seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=UNLIMITED,
        return_final_states=False, return_varlen_states=False,
    ):  # fmt: skip
        assert all(t.is_contiguous() for t in (x, dt, A, B, C))
        assert x.dtype == B.dtype == C.dtype
        assert A.dtype == torch.float32
        assert dt_limit[0] == 0
        self.chunk_sizes.append(chunk_size)
        reset = None
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32
            previous = torch.cat([torch.zeros_like(seq_idx[:, :1]), seq_idx[:, :-1]], 1)
            reset = seq_idx != previous
        return ssd(
            *(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_states, reset),
            return_state=return_final_states,
            backend="reference",
        )


@pytest.mark.parametrize("optional", [(), OPTIONAL, ("z",), ("D", "h0")])
@pytest.mark.parametrize("limit", [UNLIMITED, (0.1, 0.5)])
@pytest.mark.parametrize("return_state", [False, True])
def test_cuda_adapter_calls_the_package_as_it_expects(optional, limit, return_state, monkeypatch):
    kernels = FakeKernels()
    fake = type("Probe", (), {"module": kernels, "failure": ""})
    monkeypatch.setattr(_ssd_cuda, "probe", lambda _: fake)
    monkeypatch.setattr(ops, "refuse_without", lambda *_: None)
    inputs = make(2, 9, optional=optional)
    inputs["dt"] = inputs["dt"].masked_fill(torch.tensor([1] + [0] * 8).bool()[:, None], -torch.inf)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 0] = reset[1, 4] = True
    options = {"reset": reset, "dt_limit": limit, "return_state": return_state}
    wanted = gradients(inputs, "reference", **options)
    monkeypatch.setattr(ops, "_CANDIDATES", (ops._CANDIDATES[0], ops._CANDIDATES[-1]))
    assert_near(gradients(inputs, "auto", **options), wanted, 1e-5)
    assert kernels.chunk_sizes == [64]


@pytest.mark.parametrize(("length", "size"), [(1, 64), (64, 64), (65, 128), (256, 256), (300, 256)])
def test_cuda_chunks_are_powers_of_two_and_few(length, size, monkeypatch):
    kernels = FakeKernels()
    fake = type("Probe", (), {"module": kernels, "failure": ""})
    monkeypatch.setattr(_ssd_cuda, "probe", lambda _: fake)
    values = make(1, length, 1, 1, 1, 1, optional=()).values()
    _ssd_cuda.run(SsdInputs(*values, None, None, None, True, UNLIMITED, None, None, False))
    assert kernels.chunk_sizes == [size]


def test_cuda_limits_are_named():
    def limits(**changes):
        values = make(2, 4, optional=()).values()
        inputs = SsdInputs(*values, None, None, None, True, UNLIMITED, None, None, False)
        return _ssd_cuda.limits(inputs._replace(**changes))

    assert limits() is None
    assert "float64" in limits(x=torch.zeros(2, 4, 4, 3, dtype=torch.float64))
    assert "256" in limits(B=torch.zeros(2, 4, 1, 257))
    assert "empty" in limits(x=torch.zeros(2, 0, 4, 3))


def test_backends_by_name():
    inputs = make(1, 3, optional=())
    x = inputs.pop("x").requires_grad_()
    assert "Duality" in type(ssd(x, **inputs).grad_fn).__name__
    assert "StateSpaceDuality" in type(ssd(x, **inputs, backend="torch").grad_fn).__name__
    with use_backend("reference"):
        assert "Duality" not in type(ssd(x, **inputs).grad_fn).__name__
    with pytest.raises((MissingDependencyError, InvalidInputError), match="cuda"):
        ssd(x, **inputs, backend="cuda")
    rows = {row["name"]: row for row in backend_report() if row["op"] == "ssd"}
    assert list(rows) == ["cuda", "native", "torch", "reference"]
    assert rows["torch"]["available"]
    assert "mamba-ssm" in rows["cuda"]["fix"] or rows["cuda"]["available"]


@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_of_the_step(groups):
    inputs = at(make(2, 1, 4, 2, groups, 3, dtype=torch.float64), 0)
    names = ("h0", *(name for name in inputs if name != "h0"))
    leaves = [inputs[name].detach().requires_grad_() for name in names]

    def run(state, *args):
        return ssd_step(state, **dict(zip(names[1:], args, strict=True)))

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (1, 2, 8)),
        ("dt", (1, 2)),
        ("A", (1,)),
        ("B", (1, 1, 4)),
        ("C", (2, 2, 4)),
        ("D", (8,)),
        ("z", (1, 2, 8)),
        ("dt_bias", (1,)),
    ],
)
def test_steps_name_the_tensor_that_does_not_fit(name, shape):
    state, group = torch.zeros(2, 2, 8, 4), torch.zeros(2, 1, 4)
    good = {"x": torch.zeros(2, 2, 8), "dt": torch.zeros(2, 2), "A": -torch.ones(2)}
    good |= {"B": group, "C": group}
    ssd_step(state, **good)
    with pytest.raises(InvalidInputError, match=rf"ssd_step: {name} has shape .* expected") as e:
        ssd_step(state, **(good | {name: torch.zeros(shape)}))
    assert "state (B, H, P, N) = (2, 2, 8, 4)" in str(e.value)
    with pytest.raises(InvalidInputError, match=r"needs state \(B, H, P, N\)"):
        ssd_step(state[0], **good)
    three = torch.zeros(2, 3, 4)
    with pytest.raises(InvalidInputError, match="3 groups of B and C do not divide 2 heads"):
        ssd_step(state, **(good | {"B": three, "C": three}))
