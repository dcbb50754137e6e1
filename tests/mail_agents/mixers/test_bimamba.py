"""Bidirectional Mamba as two Mambas, its symmetry, and what it draws."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mail_agents.errors import InvalidInputError
from mail_agents.mixers import BiMamba, Mamba

SHAPES = {
    "A_log": (256, 16), "D": (256,), "A_b_log": (256, 16), "D_b": (256,),
    "in_proj.weight": (512, 128), "out_proj.weight": (128, 256),
    "conv1d.weight": (256, 1, 4), "conv1d.bias": (256,),
    "x_proj.weight": (40, 256), "dt_proj.weight": (256, 8), "dt_proj.bias": (256,),
    "conv1d_b.weight": (256, 1, 4), "conv1d_b.bias": (256,),
    "x_proj_b.weight": (40, 256), "dt_proj_b.weight": (256, 8), "dt_proj_b.bias": (256,),
}  # fmt: skip
#: Parameters of the second direction, and what they are called in the first.
SECOND = {name: name.replace("_b", "") for name in SHAPES if "_b" in name}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(d_model=16, **options):
    mixer = BiMamba(d_model, **({"d_state": 8} | options))
    with torch.no_grad():
        for parameter in (mixer.D, mixer.A_log, mixer.D_b, mixer.A_b_log):
            parameter.normal_()
    return mixer.eval()


def one_direction(mixer, second):
    """The Mamba that has the parameters of one direction."""
    mamba = Mamba(mixer.d_model, mixer.d_state, mixer.d_conv).eval()
    state = mixer.state_dict()
    if second:
        state |= {name: state[of] for of, name in SECOND.items()}
    mamba.load_state_dict({key: state[key] for key in mamba.state_dict()})
    return mamba


@pytest.mark.parametrize("divide_out", [False, True])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_it_is_the_sum_of_two_mambas(divide_out, length):
    mixer = randomised(divide_out=divide_out)
    x = torch.randn(2, length, 16)
    forward = one_direction(mixer, second=False)(x)
    backward = one_direction(mixer, second=True)(x.flip(1)).flip(1)
    wanted = (forward + backward) / (2 if divide_out else 1)
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-5, atol=1e-5)


def test_both_directions_with_equal_parameters_commute_with_time_reversal():
    mixer = randomised()
    x = torch.randn(2, 9, 16)
    assert not torch.allclose(mixer(x.flip(1)), mixer(x).flip(1), atol=1e-3)
    state = mixer.state_dict()
    mixer.load_state_dict(state | {of: state[name] for of, name in SECOND.items()})
    assert torch.equal(mixer(x.flip(1)), mixer(x).flip(1))


def test_a_single_token_needs_no_decay():
    mixer = randomised()
    x = torch.randn(3, 1, 16)
    mixer(x).square().sum().backward()
    assert mixer.A_log.grad.abs().max() == 0
    assert mixer.A_b_log.grad.abs().max() == 0


def test_names_and_shapes_are_those_of_the_releases():
    assert {k: tuple(v.shape) for k, v in BiMamba(128).state_dict().items()} == SHAPES
    with_bias = BiMamba(128, bias=True, conv_bias=False).state_dict()
    without = {"conv1d.bias", "conv1d_b.bias"}
    assert set(with_bias) == set(SHAPES) - without | {"in_proj.bias", "out_proj.bias"}


def test_the_same_seed_gives_the_weights_of_the_release():
    """The draws of its constructor, one after the other; ours of ``dt_proj_b`` come after them."""

    def direction(tail):
        conv = nn.Conv1d(64, 64, 4, groups=64, padding=3)
        drawn[f"conv1d{tail}.weight"], drawn[f"conv1d{tail}.bias"] = conv.weight, conv.bias
        drawn[f"x_proj{tail}.weight"] = nn.Linear(64, 34, bias=False).weight
        return nn.Linear(2, 64)

    torch.manual_seed(3)
    drawn = {"in_proj.weight": nn.Linear(32, 128, bias=False).weight}
    drawn["dt_proj.weight"] = nn.init.uniform_(direction("").weight, -(2**-0.5), 2**-0.5)
    dt = torch.exp(torch.rand(64) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))
    drawn["dt_proj.bias"] = dt + torch.log(-torch.expm1(-dt))
    direction("_b")
    drawn["out_proj.weight"] = nn.Linear(64, 32, bias=False).weight
    torch.manual_seed(3)
    found = BiMamba(32).state_dict()
    constant = {"A_log", "D", "A_b_log", "D_b"}
    assert found.keys() - drawn.keys() - constant == {"dt_proj_b.weight", "dt_proj_b.bias"}
    assert all(torch.equal(found[key], value) for key, value in drawn.items())


def test_both_directions_start_with_the_step_sizes_and_decays_of_mamba():
    mixer = BiMamba(128)
    for projection in (mixer.dt_proj, mixer.dt_proj_b):
        steps = F.softplus(projection.bias)
        assert 1e-3 * 0.999 <= steps.min() < 2e-3
        assert 0.05 < steps.max() <= 0.1 * 1.001
        assert projection.bias._no_reinit is True
        assert projection.weight.abs().max() <= 8**-0.5
    for A_log, D in ((mixer.A_log, mixer.D), (mixer.A_b_log, mixer.D_b)):
        torch.testing.assert_close(A_log.data, torch.arange(1.0, 17.0).log().expand(256, 16))
        assert (D == 1).all()


def test_ranks():
    assert BiMamba(40).dt_rank == 3
    assert BiMamba(40, dt_rank=7).dt_proj_b.weight.shape == (80, 7)
    with pytest.raises(InvalidInputError, match="dt_rank=0"):
        BiMamba(40, dt_rank=0)
