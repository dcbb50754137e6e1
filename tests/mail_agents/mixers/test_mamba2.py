"""Mamba-2 against an independent block, its dense matrix, another implementation and its steps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mail_agents.errors import InvalidInputError
from mail_agents.mixers import Mamba2, MambaState

SHAPES = {
    "A_log": (8,),
    "D": (8,),
    "dt_bias": (8,),
    "in_proj.weight": (776, 128),
    "conv1d.weight": (512, 1, 4),
    "conv1d.bias": (512,),
    "norm.weight": (256,),
    "out_proj.weight": (128, 256),
}
OPTIONS = [
    {},
    {"ngroups": 2, "d_conv": 2},
    {"ngroups": 4, "D_has_hdim": True, "bias": True, "conv_bias": False, "expand": 4},
    {"rmsnorm": False, "dt_limit": (0.05, 0.4)},
    {"norm_before_gate": True, "ngroups": 2},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(d_model=16, **options):
    """A mixer without the special values of the initialisation, in eval mode."""
    mixer = Mamba2(d_model, **({"d_state": 8, "headdim": 8} | options))
    with torch.no_grad():
        for parameter in (mixer.D, mixer.A_log, *([mixer.norm.weight] if mixer.norm else [])):
            parameter.copy_(torch.randn(parameter.shape))
        mixer.dt_bias.normal_()
    return mixer.eval()


def silu(v):
    return v / (1 + np.exp(-v))


def naive_block(mixer, x):
    """The block in float64 NumPy from its state dict, time step by time step."""
    p = {k: v.double().numpy() for k, v in mixer.state_dict().items()}
    x = x.double().numpy()
    inner, heads, groups = mixer.d_inner, mixer.nheads, mixer.ngroups
    n, width = mixer.d_state, p["conv1d.weight"].shape[2]
    history = np.zeros((x.shape[0], width, inner + 2 * groups * n))
    h = np.zeros((x.shape[0], heads, inner // heads, n))
    out = []
    for t in range(x.shape[1]):
        row = x[:, t] @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
        z, xbc, dt = np.split(row, [inner, 2 * inner + 2 * groups * n], axis=-1)
        history = np.concatenate([history[:, 1:], xbc[:, None]], 1)
        xbc = silu((history * p["conv1d.weight"][:, 0].T).sum(1) + p.get("conv1d.bias", 0))
        u, B, C = np.split(xbc, [inner, inner + groups * n], axis=-1)
        u = u.reshape(-1, heads, inner // heads)
        B, C = (v.reshape(-1, groups, n).repeat(heads // groups, 1) for v in (B, C))
        dt = np.clip(np.log1p(np.exp(dt + p["dt_bias"])), *mixer.dt_limit)
        decay = np.exp(dt * -np.exp(p["A_log"]))
        h = decay[..., None, None] * h + (dt[..., None] * u)[..., None] * B[:, :, None]
        D = p["D"].reshape(heads, -1)
        y = ((h * C[:, :, None]).sum(-1) + D * u).reshape(-1, inner)
        if mixer.norm is None:
            y = y * silu(z)
        else:
            y = y if mixer.norm.norm_before_gate else y * silu(z)
            parts = y.reshape(-1, groups, inner // groups)
            parts = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)
            y = parts.reshape(-1, inner) * p["norm.weight"]
            y = y * silu(z) if mixer.norm.norm_before_gate else y
        out.append(y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0))
    return np.stack(out, 1)


def test_names_and_shapes_are_those_of_mamba_ssm():
    assert {k: tuple(v.shape) for k, v in Mamba2(128, headdim=32).state_dict().items()} == SHAPES
    other = Mamba2(
        128, headdim=32, ngroups=2, D_has_hdim=True, rmsnorm=False, bias=True, conv_bias=False
    ).state_dict()
    assert {k: tuple(v.shape) for k, v in other.items()} == {
        "A_log": (8,), "D": (256,), "dt_bias": (8,),
        "in_proj.weight": (1032, 128), "in_proj.bias": (1032,),
        "conv1d.weight": (768, 1, 4),
        "out_proj.weight": (128, 256), "out_proj.bias": (128,),
    }  # fmt: skip
    defaults = Mamba2(64)
    assert (defaults.d_state, defaults.d_conv, defaults.headdim) == (128, 4, 64)


def test_the_same_seed_gives_the_weights_of_mamba_ssm():
    """The draws of its constructor, one after the other."""
    torch.manual_seed(3)
    drawn = {"in_proj.weight": nn.Linear(128, 776, bias=False).weight}
    conv = nn.Conv1d(512, 512, 4, groups=512, padding=3)
    drawn |= {"conv1d.weight": conv.weight, "conv1d.bias": conv.bias}
    dt = torch.exp(torch.rand(8) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))
    drawn["dt_bias"] = dt + torch.log(-torch.expm1(-dt))
    drawn["A_log"] = torch.empty(8).uniform_(1, 16).log()
    drawn["out_proj.weight"] = nn.Linear(256, 128, bias=False).weight
    drawn |= {"D": torch.ones(8), "norm.weight": torch.ones(256)}
    torch.manual_seed(3)
    found = Mamba2(128, headdim=32).state_dict()
    assert found.keys() == drawn.keys()
    assert all(torch.equal(found[key], value) for key, value in drawn.items())


def test_initial_decay_and_step_sizes():
    mixer = Mamba2(512, headdim=8)
    assert 1 <= mixer.A_log.exp().min() < 3
    assert 14 < mixer.A_log.exp().max() <= 16 * 1.0001
    steps = F.softplus(mixer.dt_bias)
    assert 1e-3 * 0.999 <= steps.min() < 2e-3
    assert 0.07 < steps.max() <= 0.1 * 1.001
    narrow = Mamba2(64, headdim=8, A_init_range=(2, 2)).A_log.exp()
    torch.testing.assert_close(narrow, torch.full((16,), 2.0))
    with pytest.raises(InvalidInputError, match="A_init_range"):
        Mamba2(64, A_init_range=(0, 1))


@every_option
@pytest.mark.parametrize("length", [1, 2, 11, 70])
def test_forward_equals_an_independent_block(options, length):
    mixer = randomised(**options)
    x = torch.randn(3, length, 16)
    found = mixer(x).detach().numpy()
    np.testing.assert_allclose(found, naive_block(mixer, x), rtol=1e-3, atol=1e-4)


def test_the_mixing_of_tokens_is_a_semiseparable_matrix():
    """M_ij = (C_i . B_j) exp(sum of Delta_k A over k = j+1 .. i) Delta_j below the diagonal."""
    mixer = randomised().double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    z, xbc, dt = mixer._project(x)
    conv = F.conv1d(F.pad(xbc.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=48)
    u, B, C = F.silu(conv)[0].T.split([32, 8, 8], dim=-1)
    dt = F.softplus(dt + mixer.dt_bias)[0]
    total = (dt * -mixer.A_log.exp()).cumsum(0)
    y = torch.zeros(9, 4, 8, dtype=torch.float64)
    for head in range(4):
        M = (C @ B.T) * torch.exp(total[:, None, head] - total[None, :, head]) * dt[None, :, head]
        y[:, head] = (M.tril() + mixer.D[head] * torch.eye(9)) @ u.view(9, 4, 8)[:, head]
    y = y.view(9, 32) * F.silu(z[0])
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    torch.testing.assert_close(mixer(x)[0], y @ mixer.out_proj.weight.T)


def test_a_single_token_is_mapped_without_the_decay():
    mixer = randomised()
    mixer(torch.randn(3, 1, 16)).square().sum().backward()
    assert mixer.A_log.grad.abs().max() == 0
    assert mixer.dt_bias.grad.abs().max() > 0


def test_transformers_loads_the_state_dict_and_agrees():
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = modeling.Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, state_size=16, n_groups=1, expand=2,
        conv_kernel=4, num_hidden_layers=1, chunk_size=8, time_step_limit=(0.0, math.inf),
    )  # fmt: skip
    theirs = modeling.Mamba2Mixer(config, layer_idx=0).eval()
    ours = randomised(32, d_state=16)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 21, 32, requires_grad=True)
    y, wanted = ours(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn(y.shape)
    found = torch.autograd.grad(y, [x, *ours.parameters()], cotangent)
    other = torch.autograd.grad(wanted, [x, *theirs.parameters()], cotangent)
    reference = dict(zip(["x", *(k for k, _ in theirs.named_parameters())], other, strict=True))
    for name, gradient in zip(["x", *(k for k, _ in ours.named_parameters())], found, strict=True):
        scale = reference[name].abs().max().item()
        torch.testing.assert_close(gradient, reference[name], rtol=1e-3, atol=1e-4 * scale)


@every_option
@pytest.mark.parametrize("length", [1, 2, 11])
def test_steps_equal_the_whole(options, length):
    mixer = randomised(**options)
    x = torch.randn(3, length, 16)
    whole, state = mixer(x), mixer.init_state(3)
    for t in range(length):
        y, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    prefix=st.integers(0, 9),
    middle=st.integers(0, 20),
    d_conv=st.integers(1, 5),
    bias=st.booleans(),
)
def test_prefill_then_prefill_then_steps_equal_the_whole(prefix, middle, d_conv, bias):
    mixer = randomised(8, d_state=4, headdim=4, d_conv=d_conv, bias=bias)
    x = torch.randn(2, prefix + middle + 3, 8)
    first, state = mixer.prefill(x[:, :prefix])
    second, state = mixer.prefill(x[:, prefix : prefix + middle], state)
    parts = [first, second]
    for t in range(prefix + middle, x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        parts.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x), rtol=1e-4, atol=1e-4)


def test_gradient_flows_through_a_carried_state():
    mixer = randomised(8, d_state=4).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64, requires_grad=True)
    first, state = mixer.prefill(x[:, :5])
    second, _ = mixer.prefill(x[:, 5:], state)
    split = torch.autograd.grad(torch.cat((first, second), 1).square().sum(), x)[0]
    whole = torch.autograd.grad(mixer(x).square().sum(), x)[0]
    torch.testing.assert_close(split, whole)


def test_masked_steps_hold_the_state():
    mixer = randomised()
    _, state = mixer.prefill(torch.randn(2, 6, 16))
    _, held = mixer.prefill(torch.randn(2, 5, 16), state, torch.zeros(2, 5, dtype=torch.bool))
    torch.testing.assert_close(held.ssm, state.ssm)


def official_step(mixer, x, conv_state, ssm_state):
    """One step with the caches and the update order of ``mamba_ssm.Mamba2.step``."""
    inner, heads, n = mixer.d_inner, mixer.nheads, mixer.d_state
    z, xbc, dt = (x @ mixer.in_proj.weight.T).split([inner, inner + 2 * n, heads], -1)
    conv_state = torch.cat((conv_state[:, :, 1:], xbc.unsqueeze(-1)), -1)
    xbc = F.silu((conv_state * mixer.conv1d.weight[:, 0]).sum(-1) + mixer.conv1d.bias)
    u, B, C = xbc.split([inner, n, n], -1)
    u, dt = u.view(len(x), heads, -1), F.softplus(dt + mixer.dt_bias)
    decay = torch.exp(dt * -mixer.A_log.exp())[..., None, None]
    ssm_state = ssm_state * decay + torch.einsum("bh,bn,bhp->bhpn", dt, B, u)
    y = torch.einsum("bhpn,bn->bhp", ssm_state, C) + mixer.D[:, None] * u
    y = y.flatten(1) * F.silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    return y @ mixer.out_proj.weight.T, conv_state, ssm_state


@torch.no_grad()
def test_states_move_to_and_from_the_official_cache():
    mixer = randomised()
    x = torch.randn(2, 9, 16)
    whole = mixer(x)
    _, state = mixer.prefill(x[:, :5])
    conv_state, ssm_state = state.to_mamba_ssm()
    assert conv_state.shape == (2, 48, 4)
    assert ssm_state.shape == (2, 4, 8, 8)
    for t in (5, 6):
        y, conv_state, ssm_state = official_step(mixer, x[:, t], conv_state, ssm_state)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-4, atol=1e-5)
    state = MambaState.from_mamba_ssm(conv_state, ssm_state)
    for t in (7, 8):
        y, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_reset_of_some_rows_only():
    mixer = randomised()
    x = torch.randn(3, 6, 16)
    _, state = mixer.prefill(x[:, :5])
    y, _ = mixer.step(x[:, 5], state.reset(torch.tensor([False, True, False])))
    fresh, _ = mixer.step(x[:, 5], mixer.init_state(3))
    going, _ = mixer.step(x[:, 5], state)
    torch.testing.assert_close(y, torch.stack((going[0], fresh[1], going[2])))


def test_half_precision_weights_keep_a_float32_state():
    mixer = randomised().to(torch.bfloat16)
    state = mixer.init_state(2)
    assert (state.history.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
    y, state = mixer.step(torch.randn(2, 16, dtype=torch.bfloat16), state)
    assert (y.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
    y, state = mixer.prefill(torch.randn(2, 5, 16, dtype=torch.bfloat16), state)
    assert (y.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
