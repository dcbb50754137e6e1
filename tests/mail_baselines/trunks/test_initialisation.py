"""How trunks start: step sizes of Mamba, and which linear layers are drawn as in GPT-2."""

import pytest
import torch
import torch.nn.functional as F

import mail_agents
from mail_baselines.trunks import GPTTrunk, MambaTrunk, MultiGrainedTrunk


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def stds(trunk, *endings: str) -> list[float]:
    return [p.std().item() for n, p in trunk.named_parameters() if n.endswith(endings)]


def test_transformer_starts_as_gpt2():
    trunk = GPTTrunk(128, 2)
    assert stds(trunk, "qkv.weight", "proj.weight", "0.weight") == pytest.approx(
        [0.02] * 6, rel=0.05
    )
    biases = [p for n, p in trunk.named_parameters() if n.endswith("bias")]
    assert all((bias == 0).all() for bias in biases)
    wide = GPTTrunk(128, 2, xavier_qkv=True)
    assert stds(wide, "qkv.weight") == pytest.approx([0.0625] * 2, rel=0.05)
    assert stds(wide, "proj.weight", "0.weight") == pytest.approx([0.02] * 4, rel=0.05)


@pytest.mark.parametrize(("agent_id", "std"), [("dt", 0.02), ("dt-corl", 0.0625)])
def test_projections_of_presets_start_as_in_their_code(agent_id, std):
    trunk = mail_agents.spec(agent_id).config().make_trunk()
    assert stds(trunk, "qkv.weight") == pytest.approx([std] * 3, rel=0.05)


def step_sizes(mixer) -> torch.Tensor:
    return F.softplus(mixer.dt_proj.bias)


@pytest.mark.parametrize("variant", ["causal", "figure"])
def test_step_sizes_of_multi_grained_mixers(variant):
    block = MultiGrainedTrunk(128, 1, variant).layers[0]
    names = ("mixer", "mixer_group") if variant == "causal" else ("coarse", "fine")
    for name in names:
        mixer = getattr(block, name)
        assert ((step_sizes(mixer) > 0.9e-3) & (step_sizes(mixer) < 0.11)).all()
        assert mixer.dt_proj.weight.abs().max() <= 8**-0.5
        torch.testing.assert_close(mixer.A_log.exp()[0], torch.arange(1.0, 17.0))


def test_mamba_keeps_its_step_sizes_unless_the_released_start_is_asked_for():
    ours, released = (MambaTrunk(128, 1, released_init=flag) for flag in (False, True))
    assert step_sizes(ours.layers[0].mixer).max() < 0.11
    assert stds(ours, "in_proj.weight")[0] > 0.04
    assert stds(ours, "mlp.0.weight") == pytest.approx([0.02], rel=0.05)
    torch.testing.assert_close(step_sizes(released.layers[0].mixer), torch.full((256,), 2.0).log())
    names = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight", "0.weight")
    assert stds(released, *names) == pytest.approx([0.02] * 5, rel=0.06)
    assert stds(released, "conv1d.weight")[0] > 0.2  # a convolution is no linear layer
