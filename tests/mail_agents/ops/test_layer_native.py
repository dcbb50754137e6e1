"""Whole Mamba layers at once: equal to their modules, and only where nobody can tell them apart."""

import copy
import ctypes
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from mail_agents.mixers import Mamba, MambaStack, MambaState
from mail_agents.ops import _native
from mail_agents.ops.backends import backend_report, recording_backends, use_backend

HAS_NATIVE = not _native.load().failure
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="there is no compiler here")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def by_modules(module, method, *args):
    """The same call through the modules, which run while gradients are on."""
    with use_backend("reference"), torch.enable_grad():
        return getattr(module, method)(*args)


def ran(call):
    """Backends by op of a call without gradients, and its result."""
    found = {}
    with torch.no_grad(), recording_backends(found):
        result = call()
    return found, result


def flat(state):
    return [part for layer in state for part in layer]


SHAPES = {
    "d_model": st.integers(1, 40),
    "layers": st.integers(1, 3),
    "d_state": st.sampled_from([1, 2, 5, 8, 16, 17, 33]),
    "d_conv": st.integers(1, 5),
    "expand": st.integers(1, 3),
    "batch": st.integers(1, 6),
    "length": st.integers(1, 12),
    "with_aggregate": st.booleans(),
}


@needs_native
@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_prefill_equals_the_modules(
    d_model, layers, d_state, d_conv, expand, batch, length, with_aggregate
):
    stack = randomised(MambaStack(d_model, layers, d_state, d_conv, expand))
    x = torch.randn(batch, length, d_model)
    E = torch.randn(batch, length, d_model) if with_aggregate else None
    _, state = by_modules(stack, "prefill", torch.randn(batch, 3, d_model))
    state = tuple(s.detach() for s in state)
    wanted, after = by_modules(stack, "prefill", x, state, E)
    found, (y, new) = ran(lambda: stack.prefill(x, state, E))
    assert found == {"mamba_layers": {"native"}}
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=2e-5)
    for a, b in zip(flat(new), flat(after), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@needs_native
@pytest.mark.parametrize("with_aggregate", [False, True])
@pytest.mark.parametrize("d_conv", [1, 4])
def test_step_equals_the_modules(with_aggregate, d_conv):
    stack = randomised(MambaStack(24, 3, d_state=5, d_conv=d_conv))
    x, E = torch.randn(4, 24), torch.randn(4, 24) if with_aggregate else None
    _, state = by_modules(stack, "prefill", torch.randn(4, 3, 24))
    state = tuple(s.detach() for s in state)
    before = [part.clone() for part in flat(state)]
    wanted, after = by_modules(stack, "step", x, state, E)
    found, (y, new) = ran(lambda: stack.step(x, state, E))
    assert found == {"mamba_layers": {"native"}}
    assert all(isinstance(layer, MambaState) for layer in new)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(flat(new), flat(after), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(flat(state), before, strict=True))


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_mixer_on_its_own(backend, bias):
    mixer = randomised(Mamba(20, d_state=8, bias=bias, conv_bias=not bias, dt_rank=3))
    x = torch.randn(3, 7, 20)
    whole = by_modules(mixer, "forward", x)
    with use_backend(backend), torch.no_grad():
        state = mixer.init_state(3)
        for t in range(7):
            y, state = mixer.step(x[:, t], state)
            torch.testing.assert_close(y, whole[:, t], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixer(x), whole, rtol=1e-4, atol=1e-5)


@needs_native
@torch.no_grad()
def test_results_do_not_depend_on_how_tokens_are_grouped():
    stack = randomised(MambaStack(40, 2, d_state=16))
    x, E = torch.randn(5, 230, 40), torch.randn(5, 230, 40)
    whole, last = stack.prefill(x, None, E)
    assert torch.equal(stack(x, E), whole)
    for row in range(5):
        assert torch.equal(stack(x[row : row + 1], E[row : row + 1])[0], whole[row])
    first, state = stack.prefill(x[:, :103], None, E[:, :103])
    second, state = stack.prefill(x[:, 103:228], state, E[:, 103:228])
    assert torch.equal(torch.cat((first, second), 1), whole[:, :228])
    for t in (228, 229):
        y, state = stack.step(x[:, t], state, E[:, t])
        assert torch.equal(y, whole[:, t])
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(last), strict=True))


@needs_native
@torch.no_grad()
def test_rows_are_equal_for_any_number_of_rows_and_threads():
    stack = randomised(MambaStack(48, 2, d_state=8))
    x = torch.randn(33, 48)
    state = tuple(MambaState(*(torch.randn_like(p) for p in s)) for s in stack.init_state(33))
    whole, after = stack.step(x, state)
    threads = torch.get_num_threads()
    try:
        for rows in (1, 2, 3, 4, 5, 7, 32):
            torch.set_num_threads(1 + rows % 3)
            part = tuple(MambaState(*(p[:rows] for p in s)) for s in state)
            y, new = stack.step(x[:rows], part)
            assert torch.equal(y, whole[:rows])
            assert all(
                torch.equal(a, b[:rows]) for a, b in zip(flat(new), flat(after), strict=True)
            )
    finally:
        torch.set_num_threads(threads)


@needs_native
@torch.no_grad()
def test_states_of_any_layout():
    stack = randomised(MambaStack(24, 2, d_state=5))
    x = torch.randn(3, 24)
    _, state = stack.prefill(torch.randn(3, 4, 24))
    wanted, _ = stack.step(x, state)

    def layouts(tensor):
        padded = torch.zeros(*(2 * size for size in tensor.shape))
        view = padded[tuple(slice(0, 2 * size, 2) for size in tensor.shape)]
        return tensor.contiguous(), view.copy_(tensor), tensor.mT.contiguous().mT

    for other in range(3):
        again = tuple(MambaState(*(layouts(part)[other] for part in s)) for s in state)
        assert torch.equal(stack.step(x, again)[0], wanted)
    spread = torch.randn(3, 24, 2)[..., 0].copy_(x)
    assert torch.equal(stack.step(spread, state)[0], wanted)


@needs_native
@torch.no_grad()
def test_nan_stays_in_its_row_and_infinite_steps_are_like_the_modules():
    stack = randomised(MambaStack(24, 2))
    x = torch.randn(3, 6, 24)
    clean = stack(x)
    x[1, 2, 3] = math.nan
    y = stack(x)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert torch.equal(y[1, :2], clean[1, :2])
    assert y[1, 2:].isnan().all()
    stack.layers[0].mixer.dt_proj.bias.fill_(-math.inf)
    wanted = by_modules(stack, "forward", x)
    torch.testing.assert_close(stack(x), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


CHANGES = {
    "in place": lambda s: s.layers[1].mixer.in_proj.weight.mul_(1.5),
    "data": lambda s: setattr(s.layers[1].mixer.out_proj.weight, "data", torch.randn(16, 32)),
    "parameter": lambda s: setattr(s.layers[0].norm, "weight", nn.Parameter(torch.randn(16))),
    "module": lambda s: setattr(s.layers[1].mixer, "in_proj", nn.Linear(16, 64)),
    "layer": lambda s: s.layers.append(copy.deepcopy(s.layers[0])),
    "order": lambda s: s.layers.insert(0, s.layers.pop(1)),
    "assigned": lambda s: s.load_state_dict(
        {k: v + 0.1 for k, v in s.state_dict().items()}, assign=True
    ),
    "bias": lambda s: setattr(s.layers[0].mixer.conv1d, "bias", None),
    "class": lambda s: setattr(s.layers[1].mixer.in_proj, "__class__", _Doubled),
    "method": lambda s: setattr(s.layers[0].mixer, "_decay", lambda: -torch.ones(32, 16)),
    "pruned": lambda s: prune.random_unstructured(s.layers[0].mixer, "D", 0.5),
    "no parameter": lambda s: _plain_weight(s.layers[1].mixer.in_proj),
}


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _plain_weight(linear):
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = 1.5 * weight


@needs_native
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_never_mistaken_for_what_it_was(change):
    stack = randomised(MambaStack(16, 2))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = stack(x)
        CHANGES[change](stack)
        after = stack(x)
    torch.testing.assert_close(after, by_modules(stack, "forward", x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after)


@torch.no_grad()
def test_a_weight_that_became_its_own_transpose_is_noticed():
    stack, x = randomised(MambaStack(16, 2, expand=1)), torch.randn(2, 5, 16)
    before, weight = stack(x), stack.layers[0].mixer.out_proj.weight
    weight.data = weight.data.t()
    after = stack(x)
    torch.testing.assert_close(after, by_modules(stack, "forward", x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after)


@torch.no_grad()
def test_weights_that_are_no_parameters_are_followed():
    stack, x = randomised(MambaStack(16, 2)), torch.randn(2, 5, 16)
    mixer = stack.layers[0].mixer
    prune.random_unstructured(mixer, "A_log", 0.5)
    _plain_weight(stack.layers[1].mixer.in_proj)
    for factor in (1.0, 1.5):
        mixer.A_log_orig.mul_(factor)
        stack.layers[1].mixer.in_proj.weight *= factor
        wanted = by_modules(stack, "forward", x)
        torch.testing.assert_close(stack(x), wanted, rtol=1e-4, atol=1e-5)


BROKEN = {
    "no D": lambda s: setattr(s.layers[0].mixer, "D", None),
    "short D": lambda s: setattr(s.layers[0].mixer, "D", nn.Parameter(torch.ones(3))),
    "narrow in_proj": lambda s: setattr(s.layers[1].mixer, "in_proj", nn.Linear(16, 6)),
    "narrow x_proj": lambda s: setattr(s.layers[1].mixer, "x_proj", nn.Linear(32, 6, bias=False)),
    "narrow norm": lambda s: setattr(s.layers[0], "norm", nn.LayerNorm(4)),
    "narrow last norm": lambda s: setattr(s, "norm_f", nn.LayerNorm(4)),
    "shrunk": lambda s: setattr(
        s.layers[0].mixer.D, "data", s.layers[0].mixer.D.data[:4]
    ),
}  # fmt: skip


@pytest.mark.parametrize("breakage", BROKEN)
@pytest.mark.parametrize("ran_before", [False, True])
def test_parameters_that_do_not_fit_never_reach_the_kernel(breakage, ran_before):
    stack, x = randomised(MambaStack(16, 2)), torch.randn(2, 5, 16)
    if ran_before:
        ran(lambda: stack(x))
    BROKEN[breakage](stack)
    _, result = ran(lambda: _quietly(lambda: stack(x)))
    if breakage == "no D":  # which only the kernel needs
        wanted = by_modules(stack, "forward", x)
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
    else:
        assert isinstance(result, Exception)
    assert _quietly(lambda: stack.stream(2)).backend == "modules"


def test_a_step_needs_a_state():
    stack = randomised(MambaStack(16, 2))
    assert isinstance(
        ran(lambda: _quietly(lambda: stack.step(torch.zeros(2, 16), None)))[1], Exception
    )


@needs_native
@torch.no_grad()
def test_another_eps_of_a_norm_is_noticed():
    stack, x = randomised(MambaStack(16, 2)), torch.randn(2, 5, 16)
    before = stack(x)
    for module in stack.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1.0
    torch.testing.assert_close(stack(x), by_modules(stack, "forward", x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, stack(x))


@torch.no_grad()
def test_a_shallow_copy_stands_for_itself():
    stack, x = randomised(MambaStack(16, 2)), torch.randn(2, 5, 16)
    stack(x)
    twin = copy.copy(stack)
    twin._modules = dict(stack._modules)
    twin.layers = copy.deepcopy(stack.layers)
    for parameter in twin.layers.parameters():
        parameter.mul_(1.1)
    torch.testing.assert_close(twin(x), by_modules(twin, "forward", x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stack(x), by_modules(stack, "forward", x), rtol=1e-4, atol=1e-5)


def test_a_copy_stands_for_itself():
    stack = randomised(MambaStack(16, 2))
    x = torch.randn(2, 16)
    with torch.no_grad():
        wanted, _ = stack.step(x, stack.init_state(2))
        twin = copy.deepcopy(stack)
        for parameter in stack.parameters():
            parameter.zero_()
        assert torch.equal(twin.step(x, twin.init_state(2))[0], wanted)


WATCHED = ["layers.0", "layers.1.norm", "layers.1.mixer", "layers.0.mixer.in_proj", "norm_f"]


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_on_inner_modules_run(name, kind):
    stack, x, seen = randomised(MambaStack(16, 2)), torch.randn(2, 5, 16), []
    plain = stack(x)
    handle = getattr(stack.get_submodule(name), kind)(lambda *_: seen.append(name))
    hooked = stack(x)
    assert seen == [name]
    torch.testing.assert_close(hooked, plain, rtol=1e-4, atol=1e-5)
    handle.remove()
    stack(x)
    assert seen == [name]


@torch.no_grad()
def test_another_forward_of_an_inner_module_runs():
    stack, x = randomised(MambaStack(16, 2)), torch.randn(2, 5, 16)
    plain = stack(x)
    norm = stack.layers[1].norm
    norm.forward = lambda h: h * 0
    assert not torch.allclose(stack(x), plain)
    del norm.forward
    assert torch.equal(stack(x), plain)


@torch.no_grad()
def test_what_looks_at_operations_gets_to_see_them():
    stack, x = randomised(MambaStack(16, 2)), torch.randn(2, 5, 16)
    found, _ = ran(lambda: torch.func.vmap(lambda row: stack(row[None]))(x))
    assert "mamba_layers" not in found
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "mamba_layers" not in ran(lambda: stack(x))[0]
    with FlopCounterMode(display=False) as counter:
        assert "mamba_layers" not in ran(lambda: stack(x))[0]
    assert counter.get_total_flops() > 0


def test_everything_else_is_left_to_the_modules():
    stack, x = randomised(MambaStack(16, 2)), torch.randn(2, 5, 16)
    mask = torch.ones(2, 5, dtype=torch.bool)
    state = stack.init_state(2)
    assert "mamba_layers" not in ran(lambda: stack(x, mask=mask))[0]
    assert "mamba_layers" not in ran(lambda: stack.prefill(x, mask=mask))[0]
    assert "mamba_layers" not in ran(lambda: by_modules(stack, "step", x[:, 0], state))[0]
    for call in (lambda: stack(x), lambda: stack.step(x[:, 0], state)):
        with use_backend("reference"):
            assert "mamba_layers" not in ran(call)[0]
    with use_backend("torch"):
        assert ran(lambda: stack(x))[0]["selective_scan"] == {"torch"}
    double = copy.deepcopy(stack).double()
    found, y = ran(lambda: double(x.double()))
    assert "mamba_layers" not in found
    torch.testing.assert_close(y.float(), stack(x), rtol=1e-4, atol=1e-5)
    assert ran(lambda: stack(x[:, :0]))[1].shape == (2, 0, 16)
    assert ran(lambda: stack(x[:0]))[1].shape == (0, 5, 16)
    odd = tuple(MambaState(s.history.double(), s.ssm.double()) for s in stack.init_state(2))
    assert "mamba_layers" not in ran(lambda: _quietly(lambda: stack.step(x[:, 0], odd)))[0]


def _quietly(call):
    try:
        return call()
    except Exception as error:
        return error


@needs_native
def test_the_backend_of_the_mixers_counts():
    x = torch.randn(2, 16)
    stack = randomised(MambaStack(16, 2, backend="native"))
    assert ran(lambda: stack.step(x, stack.init_state(2)))[0] == {"mamba_layers": {"native"}}
    for layer in stack.layers:
        layer.mixer.backend = "reference"
    assert "mamba_layers" not in ran(lambda: stack.step(x, stack.init_state(2)))[0]


def test_without_a_compiler_the_modules_run(monkeypatch):
    monkeypatch.setattr(
        "mail_agents.mixers.fused.load", lambda: _native.Native(None, "no compiler")
    )
    stack, x = randomised(MambaStack(16, 2)), torch.randn(2, 16)
    found, (y, _) = ran(lambda: stack.step(x, stack.init_state(2)))
    assert "mamba_layers" not in found
    torch.testing.assert_close(
        y, by_modules(stack, "step", x, stack.init_state(2))[0], rtol=1e-5, atol=1e-5
    )
    assert "mamba_layers" not in ran(lambda: stack(x.unsqueeze(1)))[0]


def test_it_is_in_the_report():
    rows = {row["name"]: row for row in backend_report() if row["op"] == "mamba_layers"}
    assert set(rows) == {"native"}
    assert rows["native"]["available"] == HAS_NATIVE


@needs_native
@torch.no_grad()
def test_memory_does_not_grow_with_the_number_of_steps():
    resource = pytest.importorskip("resource")
    stack = randomised(MambaStack(32, 4))
    x, state = torch.randn(64, 32), stack.init_state(64)  # two megabytes of state
    for _ in range(50):
        _, state = stack.step(x, state)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        _, state = stack.step(x, state)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 16e6


@needs_native
def test_the_kernel_stays_within_its_memory():
    """With pages that cannot be touched right behind every input and output."""
    code = """
import ctypes, mmap, torch
from mail_agents.mixers import MambaStack
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []
def fenced(tensor):
    size, page = tensor.numel() * 4, mmap.PAGESIZE
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(start + pages, page, 0) == 0
    kept.append(memory)
    found = torch.frombuffer(memory, dtype=torch.float32, count=tensor.numel(), offset=pages - size)
    return found.view(tensor.shape).copy_(tensor)
for d, n, w, length in ((7, 3, 2, 5), (24, 8, 4, 1), (33, 17, 3, 130), (16, 1, 1, 2)):
    stack = MambaStack(d, 2, n, w).eval()
    for p in stack.parameters():
        p.data = fenced(p.data)
    x = fenced(torch.randn(3, length, d))
    with torch.no_grad():
        wanted, state = stack.prefill(x)
        state = [[fenced(p.contiguous()) if p.numel() else p for p in s] for s in state]
        y, _ = stack.prefill(x, state)
        assert y.isfinite().all()
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}
    )
    assert done.stdout.strip() == "fine", (done.returncode, done.stderr[-2000:])
    assert ctypes.sizeof(ctypes.c_void_p) == 8
