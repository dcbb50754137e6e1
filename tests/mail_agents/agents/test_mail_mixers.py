"""Every MaIL agent with every mixer in its encoder, its decoder or both."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import mail_agents
from mail_agents import check_agent
from mail_agents.agents.mail_backbone import MailBackbone
from mail_agents.agents.mail_config import MailConfig, StackConfig
from mail_agents.agents.mail_plan import Denoiser
from mail_agents.data.example import example_dataset, example_features
from mail_agents.errors import InvalidInputError
from mail_agents.mixers.stack import SSM_MIXERS

SMALL = {
    "width": 16,
    "feature_width": 8,
    "history": 3,
    "horizon": 2,
    "diffusion_steps": 3,
    **{f"{part}.{key}": value for part in ("encoder", "decoder") for key, value in {
        "d_state": 4, "headdim": 8, "heads": 2, "dropout": 0.0,
    }.items()},
}  # fmt: skip
NEW = ("mamba2", "bimamba", "hydra")
IDS = [f"mail/{v}-{o}" for v in ("d-ma", "ed-ma", "d-tr", "ed-tr") for o in ("bc", "ddpm")]
PARTS = {"d": ("decoder",), "ed": ("encoder", "decoder")}
CASES = [
    (agent_id, mixer, part)
    for agent_id in IDS
    for mixer in NEW
    for part in PARTS[agent_id[5:].split("-")[0]]
]


def overrides(agent_id, mixer, parts=("encoder", "decoder")):
    layers = {"encoder.layers": int("/ed" in agent_id), "decoder.layers": 1}
    return SMALL | layers | {f"{part}.mixer": mixer for part in parts}


def made(agent_id, mixer, **more):
    agent = mail_agents.make(
        agent_id, example_features(), device="cpu", seed=0, **overrides(agent_id, mixer), **more
    )
    agent.fit_statistics(example_dataset(example_features(), 12))
    return agent


@pytest.mark.parametrize(
    ("agent_id", "mixer", "part"), CASES, ids=["-".join((c[0][5:], *c[1:])) for c in CASES]
)
def test_agents_with_every_mixer_conform(agent_id, mixer, part):
    """Training, saving and loading, acting, padding, steps: see :func:`check_agent`."""
    report = check_agent(agent_id, overrides=overrides(agent_id, mixer, (part,)))
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("mixer", NEW)
@pytest.mark.parametrize("agent_id", ["mail/d-ma-bc", "mail/ed-ma-ddpm", "mail/ed-tr-bc"])
def test_agents_learn(agent_id, mixer):
    agent = made(agent_id, mixer, optim={"lr": 5e-3})
    batch = example_dataset(example_features(), 12).windows(agent.window_spec)[np.arange(16)]
    agent.configure_optim()
    losses = [agent.update(batch)["loss"] for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    missing = [name for name, p in agent.policy.named_parameters() if p.grad is None]
    assert missing == []  # distributed training waits for every parameter


def backbone(mixer, *, encoder=2, diffusion=True, init="mamba", width=16, headdim=8):
    """A model whose state space mixers have weights large enough for dependence to show."""
    torch.manual_seed(0)
    settings = {"mixer": mixer, "d_state": 4, "headdim": headdim}
    return MailBackbone(
        feature_dim=6,
        action_dim=3,
        max_states=3,
        horizon=4,
        width=width,
        encoder=StackConfig(layers=encoder, **settings),
        decoder=StackConfig(layers=2, **settings),
        diffusion=diffusion,
        init=init,
    ).eval()


def enlarged(net):
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "A_" not in name and "dt_" not in name:
                parameter.normal_(std=0.3)
    return net


def inputs(rows=2):
    g = torch.Generator().manual_seed(1)
    noisy = torch.randn(rows, 4, 3, generator=g)
    return torch.randn(rows, 3, 6, generator=g), noisy, torch.arange(rows) + 3


@pytest.mark.parametrize("mixer", SSM_MIXERS)
def test_encoders_and_decoders_are_aligned_for_every_state_space_mixer(mixer):
    net = enlarged(backbone(mixer))
    assert net.aligned
    shapes = []
    for stack in (net.encoder, net.decoder):
        stack.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    assert net(*inputs()).shape == (2, 4, 3)
    assert shapes == [(2, 8, 16)] * 2


@pytest.mark.parametrize("encoder", [0, 2])
@pytest.mark.parametrize("mixer", SSM_MIXERS)
def test_noisy_actions_reach_earlier_outputs_where_the_decoder_is_not_causal(mixer, encoder):
    net = enlarged(backbone(mixer, encoder=encoder))
    features, noisy, t = inputs()
    other = noisy.clone()
    other[:, 2] += 1
    with torch.inference_mode():
        moved = (net(features, noisy, t) - net(features, other, t)).abs().amax((0, 2)) > 1e-7
    assert moved.tolist() == [not net.decoder.causal] * 2 + [True] * 2


@pytest.mark.parametrize("encoder", [0, 2])
@pytest.mark.parametrize("mixer", SSM_MIXERS)
def test_plans_equal_the_model_asked_step_by_step(mixer, encoder):
    net = enlarged(backbone(mixer, encoder=encoder))
    features, noisy, _ = inputs()
    denoiser = Denoiser(net, features)
    with torch.inference_mode():
        for t in (4, 3, 0):
            wanted = net(features, noisy, torch.full((2,), t))
            torch.testing.assert_close(denoiser(noisy, t), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["bimamba", "hydra"])
def test_padded_targets_reach_no_loss_through_decoders_that_are_not_causal(mixer):
    agent = made("mail/d-ma-ddpm", mixer)
    enlarged(agent.policy)
    windows = example_dataset(example_features(), 12).windows(agent.window_spec)
    batch = agent.prepare(windows[np.arange(8)])
    batch["action_mask"][:4, 1:] = False
    batch["action_mask"][4] = False
    other = torch.where(batch["action_mask"][..., None], batch["action"], 7.0)

    def loss(actions, mask):
        changed = batch | {"action": actions, "action_mask": mask}
        return agent.policy.loss(changed, torch.Generator().manual_seed(0))[0]

    assert torch.equal(
        loss(batch["action"], batch["action_mask"]), loss(other, batch["action_mask"])
    )
    everything = torch.ones_like(batch["action_mask"])
    assert loss(batch["action"], everything) != loss(other, everything)


@pytest.mark.parametrize("mixer", SSM_MIXERS)
def test_initial_weights(mixer):
    own, drawn = (
        backbone(mixer, init=init, width=128, headdim=64).decoder.layers[0].mixer
        for init in ("mamba", "upstream")
    )
    # torch's own for linear layers, in the release's way N(0, 0.02^2).
    assert own.in_proj.weight.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.05)
    linears = {name: m for name, m in drawn.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {"in_proj", "out_proj"} < linears.keys() or mixer == "mamba2"
    for linear in linears.values():
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for net in (own, drawn):
        assert (net.D == 1).all()
        low, high = (1, 16.01) if mixer == "mamba2" else (1, 4.01)
        assert low * 0.999 <= net.A_log.exp().min()
        assert net.A_log.exp().max() <= high
    bias = own.dt_bias if mixer in ("mamba2", "hydra") else own.dt_proj.bias
    steps = torch.nn.functional.softplus(bias)
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 0.1 * 1.001


@pytest.mark.parametrize("mixer", NEW)
def test_the_compiled_loss_is_one_graph_and_equals_eager(mixer):
    torch._dynamo.reset()
    agent = made("mail/ed-ma-ddpm", mixer)
    policy = agent.policy.train()
    windows = example_dataset(example_features(), 12).windows(agent.window_spec)
    batch = agent.prepare(windows[np.arange(6)])

    def update():
        policy.zero_grad()
        loss, _ = policy(batch, torch.Generator().manual_seed(7))
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in policy.parameters()]

    expected = update()
    counters.clear()
    policy.compile(backend="aot_eager")
    found = update()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_overrides_by_name():
    features = example_features()
    agent = mail_agents.make("mail/d-ma-bc", features, **{"decoder.mixer": "mamba2"})
    mixer = agent.policy.backbone.decoder.layers[0].mixer
    assert (type(mixer).__name__, mixer.headdim, mixer.d_state) == ("Mamba2", 64, 16)


def test_heads_that_do_not_fit_are_refused_with_the_nearest_that_do():
    fits = {"decoder": {"mixer": "attention", "layers": 1}}
    for mixer in ("mamba2", "hydra"):
        with pytest.raises(
            InvalidInputError, match=r"decoder\.headdim=100 .* decoder\.headdim=128"
        ):
            MailConfig().replace({"decoder.mixer": mixer, "decoder.headdim": 100})
        with pytest.raises(InvalidInputError, match=r"encoder\.headdim=64 .* encoder\.headdim=32"):
            MailConfig().replace(fits | {"encoder.mixer": mixer, "width": 16})
    assert MailConfig().replace({"encoder.mixer": "hydra", "encoder.layers": 0, "width": 20})
    assert MailConfig().replace({"decoder.mixer": "bimamba", "decoder.headdim": 100})
    with pytest.raises(InvalidInputError, match="headdim"):
        StackConfig(headdim=0)
    with pytest.raises(InvalidInputError, match=r"nearest .* decoder\.heads=4"):
        MailConfig().replace({"decoder.mixer": "attention", "decoder.heads": 5})
