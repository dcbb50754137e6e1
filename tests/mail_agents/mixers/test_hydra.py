"""Hydra against its matrix, its symmetry, its single token, and what it draws."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mail_agents.mixers import Hydra

SHAPES = {
    "A_log": (4,), "D": (4,), "dt_bias": (4,), "fc_D.weight": (4, 256), "norm.weight": (256,),
    "in_proj.weight": (776, 128), "conv1d.weight": (512, 1, 7), "conv1d.bias": (512,),
    "out_proj.weight": (128, 256),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(d_model=16, **options):
    mixer = Hydra(d_model, **({"d_state": 8, "headdim": 8} | options))
    with torch.no_grad():
        for parameter in (mixer.D, mixer.A_log, mixer.dt_bias, mixer.norm.weight):
            parameter.normal_()
    return mixer.eval()


def matrices(mixer, x):
    """M (H, L, L) by its closed form for x (1, L, d_model), the convolved values, and the gate."""
    inner, n, heads, groups = mixer.d_inner, mixer.d_state, mixer.nheads, mixer.ngroups
    length = x.shape[1]
    z, xbc, dt = mixer.in_proj(x)[0].split([inner, inner + 4 * groups * n, 2 * heads], dim=-1)
    conv = mixer.conv1d
    padding = (conv.kernel_size[0] // 2, (conv.kernel_size[0] - 1) // 2)
    xbc = F.conv1d(F.pad(xbc.T, padding), conv.weight, conv.bias, groups=conv.groups)
    u, *bc = F.silu(xbc).T.split([inner, *[groups * n] * 4], dim=-1)
    per_head = [v.view(length, groups, n).repeat_interleave(heads // groups, 1) for v in bc]
    B_f, C_f, B_b, C_b = per_head
    dt = F.softplus(dt.view(length, 2, heads) + mixer.dt_bias)
    A = -mixer.A_log.exp()
    diagonal = u @ mixer.fc_D.weight.T + mixer.D
    M = torch.zeros(heads, length, length, dtype=x.dtype)
    for h in range(heads):
        for i in range(length):
            M[h, i, i] = diagonal[i, h]
            for j in range(i):
                passed = torch.exp(A[h] * dt[j + 1 : i, 0, h].sum())
                M[h, i, j] = C_f[i - 1, h] @ B_f[j, h] * passed * dt[j, 0, h]
            for j in range(i + 1, length):
                passed = torch.exp(A[h] * dt[i + 1 : j, 1, h].sum())
                M[h, i, j] = C_b[i + 1, h] @ B_b[j, h] * passed * dt[j, 1, h]
    return M, u.view(length, heads, -1), z


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ngroups": 2, "d_conv": 3},
        {"d_conv": 4, "bias": True},
        {"expand": 3, "conv_bias": False},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_output_equals_the_quasiseparable_matrix(options, length):
    mixer = randomised(**options).double()
    x = torch.randn(1, length, 16, dtype=torch.float64)
    M, u, z = matrices(mixer, x)
    y = torch.einsum("hij,jhp->ihp", M, u).flatten(1)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight * F.silu(z)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(y))


def test_the_diagonal_is_free():
    """Row 0 has nothing from earlier, the last row nothing from later steps."""
    mixer = randomised().double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    before = matrices(mixer, x)[0]
    with torch.no_grad():
        mixer.A_log.add_(1)
        mixer.dt_bias.add_(1)
    after = matrices(mixer, x)[0]
    assert torch.equal(before.diagonal(dim1=1, dim2=2), after.diagonal(dim1=1, dim2=2))
    assert not torch.allclose(before, after)

    u = torch.randn(1, 6, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        bc = torch.randn(1, 6, 32, dtype=torch.float64)
        dt = torch.randn(1, 6, 8, dtype=torch.float64)
        y = mixer._off_diagonal(u, bc, dt)
        only_own = u.clone()
        only_own[:, 1:] = 0
        assert (mixer._off_diagonal(only_own, bc, dt)[:, 0] == 0).all()
        only_own = u.clone()
        only_own[:, :-1] = 0
        assert (mixer._off_diagonal(only_own, bc, dt)[:, -1] == 0).all()
    assert (y != 0).all()


def test_equal_directions_commute_with_time_reversal():
    """With equal projections and channels of both directions, and symmetric kernels."""
    mixer = randomised()
    x = torch.randn(2, 9, 16)
    assert not torch.allclose(mixer(x.flip(1)), mixer(x).flip(1), atol=1e-3)
    inner, n, heads = 32, 8, 4
    with torch.no_grad():
        rows = mixer.in_proj.weight
        first, last = 2 * inner, 2 * inner + 4 * n
        rows[first + 2 * n : last] = rows[first : first + 2 * n]
        rows[last + heads :] = rows[last : last + heads]
        for part in (mixer.conv1d.weight, mixer.conv1d.bias):
            part[inner + 2 * n :] = part[inner : inner + 2 * n]
        mixer.conv1d.weight.copy_((mixer.conv1d.weight + mixer.conv1d.weight.flip(2)) / 2)
    torch.testing.assert_close(mixer(x.flip(1)), mixer(x).flip(1), rtol=1e-5, atol=1e-5)


def test_a_single_token_meets_the_diagonal_alone():
    mixer = randomised(128, d_state=64, headdim=64)
    mixer(torch.randn(3, 1, 128)).square().sum().backward()
    assert mixer.A_log.grad.abs().max() == 0
    assert mixer.dt_bias.grad.abs().max() == 0
    reached = mixer.in_proj.weight.grad.abs().sum(1) > 0
    assert reached[:512].all()
    assert (~reached).sum() == 264
    channels = mixer.conv1d.weight.grad[:, 0].abs() > 0
    assert channels[:256, 3].all()
    assert channels.sum() == 256


def test_names_and_shapes_are_those_of_the_release():
    assert {k: tuple(v.shape) for k, v in Hydra(128).state_dict().items()} == SHAPES
    with_bias = Hydra(128, bias=True, conv_bias=False).state_dict()
    assert set(with_bias) == set(SHAPES) - {"conv1d.bias"} | {"in_proj.bias", "out_proj.bias"}
    defaults = Hydra(32)
    assert (defaults.d_state, defaults.d_conv, defaults.headdim) == (64, 7, 64)


def test_the_same_seed_gives_the_weights_of_the_release():
    """The draws of its constructor, one after the other."""
    torch.manual_seed(3)
    drawn = {"in_proj.weight": nn.Linear(128, 776, bias=False).weight}
    conv = nn.Conv1d(512, 512, 7, groups=512, padding=3)
    drawn |= {"conv1d.weight": conv.weight, "conv1d.bias": conv.bias}
    dt = torch.exp(torch.rand(4) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))
    drawn["dt_bias"] = dt + torch.log(-torch.expm1(-dt))
    drawn["fc_D.weight"] = nn.Linear(256, 4, bias=False).weight
    drawn["out_proj.weight"] = nn.Linear(256, 128, bias=False).weight
    drawn |= {"A_log": torch.zeros(4), "D": torch.ones(4), "norm.weight": torch.ones(256)}
    torch.manual_seed(3)
    found = Hydra(128).state_dict()
    assert found.keys() == drawn.keys()
    assert all(torch.equal(found[key], value) for key, value in drawn.items())


def test_initial_decay_and_step_sizes():
    mixer = Hydra(512, headdim=8)
    assert (mixer.A_log.exp() == 1).all()
    steps = F.softplus(mixer.dt_bias)
    assert 1e-3 * 0.999 <= steps.min() < 2e-3
    assert 0.07 < steps.max() <= 0.1 * 1.001
