"""Mamba against an independent block, another implementation, its own steps, and its mask."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_agents.errors import InvalidInputError, MissingDependencyError
from mail_agents.mixers import Mamba, MambaState, Mixer

SHAPES = {
    "A_log": (256, 16),
    "D": (256,),
    "in_proj.weight": (512, 128),
    "conv1d.weight": (256, 1, 4),
    "conv1d.bias": (256,),
    "x_proj.weight": (40, 256),
    "dt_proj.weight": (256, 8),
    "dt_proj.bias": (256,),
    "out_proj.weight": (128, 256),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(*args, **kwargs):
    """A mixer without the special values of the initialisation, in eval mode."""
    mixer = Mamba(*args, **kwargs)
    with torch.no_grad():
        mixer.D.normal_()
        mixer.A_log.normal_()
    return mixer.eval()


def naive_block(mixer: Mamba, x: torch.Tensor) -> np.ndarray:
    """The block in float64 NumPy from its state dict, time step by time step."""
    p = {k: v.double().numpy() for k, v in mixer.state_dict().items()}
    x = x.double().numpy()
    inner, rank, n = mixer.d_inner, mixer.dt_rank, mixer.d_state
    width = p["conv1d.weight"].shape[2]

    def silu(v):
        return v / (1 + np.exp(-v))

    history = np.zeros((x.shape[0], width, inner))
    h = np.zeros((x.shape[0], inner, n))
    out = []
    for t in range(x.shape[1]):
        xz = x[:, t] @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
        history = np.concatenate([history[:, 1:], xz[:, None, :inner]], 1)
        u = (history * p["conv1d.weight"][:, 0].T).sum(1) + p.get("conv1d.bias", 0)
        u = silu(u)
        dbc = u @ p["x_proj.weight"].T
        dt = np.log1p(np.exp(dbc[:, :rank] @ p["dt_proj.weight"].T + p["dt_proj.bias"]))
        B, C = dbc[:, rank : rank + n], dbc[:, rank + n :]
        h = np.exp(dt[..., None] * -np.exp(p["A_log"])) * h + (dt * u)[..., None] * B[:, None]
        y = ((h * C[:, None]).sum(-1) + p["D"] * u) * silu(xz[:, inner:])
        out.append(y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0))
    return np.stack(out, 1)


def test_names_and_shapes_are_those_of_mamba_ssm():
    assert {k: tuple(v.shape) for k, v in Mamba(128).state_dict().items()} == SHAPES
    with_bias = Mamba(128, bias=True, conv_bias=False).state_dict()
    assert set(with_bias) == set(SHAPES) - {"conv1d.bias"} | {"in_proj.bias", "out_proj.bias"}


@pytest.mark.parametrize(("d_state", "d_conv"), [(16, 4), (16, 2), (8, 4), (8, 2)])
def test_parameter_count(d_state, d_conv):
    count = sum(p.numel() for p in Mamba(128, d_state, d_conv).parameters())
    # The published block formula includes the LayerNorm in front (2 * 128).
    assert count == 103_424 + 256 * d_conv + 768 * d_state - 256


def test_initialisation_is_that_of_mamba_ssm():
    mixer = Mamba(128)
    wanted = torch.arange(1, 17).float().log().expand(256, 16)
    torch.testing.assert_close(mixer.A_log.data, wanted)
    assert torch.equal(mixer.D.data, torch.ones(256))
    bound = 8**-0.5
    assert mixer.dt_proj.weight.abs().max() <= bound
    assert mixer.dt_proj.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias.data)
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert steps.log().mean().item() == pytest.approx(math.log(0.01), abs=0.3)
    assert mixer.A_log._no_weight_decay is True
    assert mixer.D._no_weight_decay is True
    assert mixer.dt_proj.bias._no_reinit is True


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_state": 8, "d_conv": 2},
        {"bias": True, "conv_bias": False, "expand": 3, "dt_rank": 5},
    ],
)
@pytest.mark.parametrize("length", [1, 2, 11, 40])
def test_forward_equals_an_independent_block(backend, options, length):
    mixer = randomised(16, backend=backend, **options)
    x = torch.randn(3, length, 16)
    found = mixer(x).detach().numpy()
    np.testing.assert_allclose(found, naive_block(mixer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("d_state", "d_conv", "bias"), [(16, 4, False), (8, 2, True)])
def test_transformers_loads_the_state_dict_and_agrees(d_state, d_conv, bias):
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = modeling.MambaConfig(
        hidden_size=32,
        intermediate_size=64,
        state_size=d_state,
        conv_kernel=d_conv,
        time_step_rank=2,
        use_bias=bias,
        num_hidden_layers=1,
    )
    theirs = modeling.MambaMixer(config, layer_idx=0).eval()
    ours = randomised(32, d_state, d_conv, bias=bias)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 21, 32, requires_grad=True)
    y, wanted = ours(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    cotangent = torch.randn(y.shape)
    found = torch.autograd.grad(y, [x, *ours.state_dict(keep_vars=True).values()], cotangent)
    other = torch.autograd.grad(wanted, [x, *theirs.state_dict(keep_vars=True).values()], cotangent)
    names = ["x", *ours.state_dict()]
    reference = dict(zip(["x", *theirs.state_dict()], other, strict=True))
    for name, gradient in zip(names, found, strict=True):
        scale = reference[name].abs().max().item()
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(("d_state", "d_conv"), [(16, 4), (8, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_steps_equal_the_whole(d_state, d_conv, length):
    mixer = randomised(32, d_state, d_conv)
    x = torch.randn(3, length, 32)
    whole = mixer(x)
    state = mixer.init_state(3)
    for t in range(length):
        y, state = mixer.step(x[:, t], state)
        assert (y - whole[:, t]).abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    prefix=st.integers(0, 9),
    middle=st.integers(0, 20),
    d_conv=st.integers(1, 5),
    bias=st.booleans(),
)
def test_prefill_then_prefill_then_steps_equal_the_whole(prefix, middle, d_conv, bias):
    mixer = randomised(8, 4, d_conv, bias=bias)
    x = torch.randn(2, prefix + middle + 3, 8)
    first, state = mixer.prefill(x[:, :prefix])
    second, state = mixer.prefill(x[:, prefix : prefix + middle], state)
    parts = [first, second]
    for t in range(prefix + middle, x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        parts.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x), rtol=1e-5, atol=1e-5)


def test_gradient_flows_through_a_carried_state():
    mixer = randomised(8, 4).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64, requires_grad=True)
    first, state = mixer.prefill(x[:, :5])
    second, _ = mixer.prefill(x[:, 5:], state)
    split = torch.autograd.grad(torch.cat((first, second), 1).square().sum(), x)[0]
    whole = torch.autograd.grad(mixer(x).square().sum(), x)[0]
    torch.testing.assert_close(split, whole)
    truncated = torch.autograd.grad(mixer.prefill(x[:, 5:], state.detach())[0].sum(), x)[0]
    assert truncated[:, :5].abs().max() == 0


@pytest.mark.parametrize("d_conv", [2, 4])
def test_later_tokens_change_no_earlier_output(d_conv):
    mixer = randomised(16, 8, d_conv)
    x = torch.randn(2, 20, 16)
    changed = x.clone()
    changed[:, 9] += 1
    before, after = mixer(x), mixer(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all()


@pytest.mark.parametrize("bias", [False, True])
def test_leading_masked_steps_are_as_if_absent(bias):
    mixer = randomised(16, 8, bias=bias)
    x = torch.randn(2, 10, 16)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :4] = False
    dirty = x.clone()
    dirty[0, :4] = torch.nan
    dirty.requires_grad_()
    y = mixer(dirty, mask)
    torch.testing.assert_close(y[0:1, 4:], mixer(x[0:1, 4:]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y[1], mixer(x)[1], rtol=1e-5, atol=1e-6)
    assert (y[0, :4] == 0).all()
    y.sum().backward()
    assert (dirty.grad[0, :4] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


def test_masked_steps_anywhere_influence_nothing_and_hold_the_state():
    mixer = randomised(16, 8)
    x = torch.randn(2, 12, 16)
    mask = torch.rand(2, 12) < 0.6
    other = torch.where(mask.unsqueeze(-1), x, torch.randn(2, 12, 16) * 100)
    assert torch.equal(mixer(x, mask), mixer(other, mask))
    _, state = mixer.prefill(x[:, :6])
    _, held = mixer.prefill(x[:, 6:], state, torch.zeros(2, 6, dtype=torch.bool))
    torch.testing.assert_close(held.ssm, state.ssm)


def test_all_true_mask_changes_nothing():
    mixer = randomised(16, 8)
    x = torch.randn(2, 12, 16)
    mask = torch.ones(2, 12, dtype=torch.bool)
    assert torch.equal(mixer(x, mask), mixer(x))


def test_empty_sequence_and_empty_batch():
    mixer = randomised(16, 8)
    assert mixer(torch.zeros(2, 0, 16)).shape == (2, 0, 16)
    assert mixer(torch.zeros(0, 5, 16)).shape == (0, 5, 16)


def official_step(mixer, x, conv_state, ssm_state):
    """One step with the caches and the update order of ``mamba_ssm.Mamba.step``."""
    xz = x @ mixer.in_proj.weight.T
    u, z = xz.chunk(2, -1)
    conv_state = torch.cat((conv_state[:, :, 1:], u.unsqueeze(-1)), -1)
    u = (conv_state * mixer.conv1d.weight[:, 0]).sum(-1) + mixer.conv1d.bias
    u = torch.nn.functional.silu(u)
    sizes = [mixer.dt_rank, mixer.d_state, mixer.d_state]
    dt, B, C = (u @ mixer.x_proj.weight.T).split(sizes, -1)
    dt = torch.nn.functional.softplus(dt @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    decay = torch.exp(dt.unsqueeze(-1) * -mixer.A_log.exp())
    ssm_state = ssm_state * decay + (dt * u).unsqueeze(-1) * B.unsqueeze(1)
    y = (ssm_state * C.unsqueeze(1)).sum(-1) + mixer.D * u
    y = y * torch.nn.functional.silu(z)
    return y @ mixer.out_proj.weight.T, conv_state, ssm_state


@torch.no_grad()
def test_states_move_to_and_from_the_official_cache():
    mixer = randomised(16, 8, 4)
    x = torch.randn(2, 9, 16)
    whole = mixer(x)
    _, state = mixer.prefill(x[:, :5])
    conv_state, ssm_state = state.to_mamba_ssm()
    assert conv_state.shape == (2, 32, 4)
    assert ssm_state.shape == (2, 32, 8)
    for t in (5, 6):
        y, conv_state, ssm_state = official_step(mixer, x[:, t], conv_state, ssm_state)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-5, atol=1e-6)
    state = MambaState.from_mamba_ssm(conv_state, ssm_state)
    for t in (7, 8):
        y, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_reset_of_some_rows_only():
    mixer = randomised(16, 8)
    x = torch.randn(3, 6, 16)
    _, state = mixer.prefill(x[:, :5])
    before = MambaState(*(t.clone() for t in state))
    y, _ = mixer.step(x[:, 5], state.reset(torch.tensor([False, True, False])))
    fresh, _ = mixer.step(x[:, 5], mixer.init_state(3))
    going, _ = mixer.step(x[:, 5], state)
    torch.testing.assert_close(y, torch.stack((going[0], fresh[1], going[2])))
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_half_precision_weights_keep_a_float32_state():
    mixer = randomised(16, 8).to(torch.bfloat16)
    state = mixer.init_state(2)
    assert (state.history.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
    y, state = mixer.step(torch.randn(2, 16, dtype=torch.bfloat16), state)
    assert (y.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
    y, state = mixer.prefill(torch.randn(2, 5, 16, dtype=torch.bfloat16), state)
    assert (y.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_runs_and_stays_close():
    mixer = randomised(16, 8)
    x = torch.randn(2, 12, 16)
    wanted = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
        y.float().sum().backward()
    assert (y.float() - wanted).abs().max() < 0.05 * wanted.abs().max() + 0.02


def test_backend_is_passed_on():
    with pytest.raises(MissingDependencyError):
        Mamba(16, backend="cuda")(torch.zeros(1, 2, 16))


def test_it_is_a_mixer_and_rejects_nonsense():
    assert isinstance(Mamba(16), Mixer)
    with pytest.raises(InvalidInputError, match="d_conv=0"):
        Mamba(16, d_conv=0)
