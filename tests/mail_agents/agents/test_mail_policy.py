import copy

import numpy as np
import pytest
import torch

import mail_agents
from mail_agents.agents.mail import MailPolicy, repeat_first_valid
from mail_agents.agents.mail_config import MailConfig, StackConfig
from mail_agents.data.stats import FeatureStats
from mail_agents.errors import InvalidInputError, MissingStatisticsError
from mail_agents.features import Feature, FeatureSpec

FEATURES = FeatureSpec(
    observations={
        "state": Feature("state", (3,), "float32"),
        "goal": Feature("state", (2,), "float32"),
    },
    action=Feature("state", (2,), "float32", low=(-1.0, -1.0), high=(1.0, 1.0)),
)
SMALL = {
    "width": 16,
    "feature_width": 8,
    "history": 3,
    "horizon": 4,
    "encoder": {"layers": 1, "d_state": 4, "heads": 2, "dropout": 0.0},
    "decoder": {"layers": 2, "d_state": 4, "heads": 2, "dropout": 0.0},
}


def policy(**overrides):
    torch.manual_seed(0)
    out = MailPolicy(MailConfig().replace(SMALL).replace(overrides), FEATURES).eval()
    out.set_action_bounds(-torch.ones(2), torch.ones(2))
    return out


def batch(rows=3, history=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "obs/state": torch.randn(rows, history, 3, generator=g),
        "obs/goal": torch.randn(rows, history, 2, generator=g),
        "mask": torch.ones(rows, history, dtype=torch.bool),
        "action": torch.randn(rows, 4, 2, generator=g).clamp(-1, 1),
        "action_mask": torch.ones(rows, 4, dtype=torch.bool),
        "task_emb": torch.randn(rows, 512, generator=g),
    }


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(p, b, *, deterministic=False, seeds=None):
    rows = len(b["mask"])
    seeds = range(rows) if seeds is None else seeds
    with torch.inference_mode():
        return p.sample(b, generators(*seeds), deterministic)


def loss(p, b, seed=0):
    return p.loss(b, torch.Generator().manual_seed(seed))[0]


def test_padded_steps_become_the_first_valid_one():
    x = torch.arange(8.0).reshape(2, 4)
    mask = torch.tensor([[False, False, True, True], [True] * 4])
    assert repeat_first_valid(x, mask).tolist() == [[2, 2, 2, 3], [4, 5, 6, 7]]
    images = torch.randint(0, 255, (2, 4, 5, 5, 3), dtype=torch.uint8)
    out = repeat_first_valid(images, mask)
    assert out.dtype == torch.uint8
    assert torch.equal(out[0, 0], images[0, 2])


@pytest.mark.parametrize("objective", ["bc", "ddpm"])
def test_padding_content_changes_nothing(objective):
    p, b = policy(objective=objective), batch()
    b["mask"][0, :2] = False
    changed = {key: value.clone() for key, value in b.items()}
    changed["obs/state"][0, :2] = float("nan")
    assert torch.equal(loss(p, b), loss(p, changed))
    assert torch.equal(sample(p, b), sample(p, changed))
    unpadded = changed | {"mask": torch.ones_like(b["mask"])}
    assert sample(p, unpadded).isnan().any()


def test_padded_targets_carry_no_gradient():
    for objective in ("bc", "ddpm"):
        p, b = policy(objective=objective), batch()
        b["action_mask"][:, 2:] = False
        changed = b | {"action": torch.where(b["action_mask"][..., None], b["action"], 7.0)}
        assert torch.equal(loss(p, b), loss(p, changed))
        assert loss(p, b) != loss(p, b | {"action_mask": torch.ones_like(b["action_mask"])})


@pytest.mark.parametrize("objective", ["bc", "ddpm"])
def test_targets_that_do_not_exist_may_hold_anything(objective):
    """Also where a chunk has none that does, or one is missing between others."""
    p, b = policy(objective=objective, **{"decoder.mixer": "bimamba"}), batch()
    b["action_mask"][0] = False
    b["action_mask"][1, 2:] = False
    b["action_mask"][2, 1] = False
    valid = b["action_mask"][..., None]
    broken = b | {"action": torch.where(valid, b["action"], torch.nan)}
    assert loss(p, b) == loss(p, broken)
    p.loss(broken, torch.Generator().manual_seed(0))[0].backward()
    gradients = [each.grad for each in p.parameters() if each.grad is not None]
    assert gradients
    assert all(each.isfinite().all() for each in gradients)


def test_released_variant_sees_short_histories_and_refuses_padding():
    p, b = policy(padding="none"), batch()
    first = {key: b[key][:, -1:] for key in ("obs/state", "obs/goal", "mask")}
    assert p.encode(first).shape == (3, 1, 16)
    assert sample(p, first).shape == (3, 4, 2)
    b["mask"][0, 0] = False
    with pytest.raises(InvalidInputError, match="padding='none'"):
        loss(p, b)


def test_observations_are_encoded_once_per_plan():
    p = policy(diffusion_steps=5)
    calls = {"observations": 0, "encoder": 0, "head": 0}

    def counter(name):
        def hook(*_):
            calls[name] += 1

        return hook

    p.observation_encoder.register_forward_hook(counter("observations"))
    p.backbone.encoder.register_forward_hook(counter("encoder"))
    p.backbone.head.register_forward_hook(counter("head"))
    sample(p, batch())
    assert calls == {"observations": 1, "encoder": 1, "head": 5}


@pytest.mark.parametrize("objective", ["bc", "ddpm"])
def test_rows_are_independent_and_deterministic(objective):
    p, b = policy(objective=objective), batch()
    together = sample(p, b, seeds=(4, 5, 6))
    assert torch.equal(together, sample(p, b, seeds=(4, 5, 6)))
    alone = {key: value[1:2] for key, value in b.items()}
    torch.testing.assert_close(sample(p, alone, seeds=(5,))[0], together[1], atol=1e-5, rtol=0)
    fixed = sample(p, b, deterministic=True, seeds=(4, 5, 6))
    assert torch.equal(fixed, sample(p, b, deterministic=True, seeds=(7, 8, 9)))


def test_samples_stay_inside_the_action_bounds():
    p = policy()
    p.set_action_bounds(torch.tensor([-0.1, -3.0]), torch.tensor([0.2, 3.0]))
    out = sample(p, batch())
    assert torch.isfinite(out).all()
    assert (out[..., 0] >= -0.1).all()
    assert (out[..., 0] <= 0.2).all()
    assert out[..., 1].abs().max() > 0.2


def test_bounds_are_saved_and_required():
    fresh = MailPolicy(MailConfig().replace(SMALL), FEATURES).eval()
    with pytest.raises(MissingStatisticsError, match="fit_statistics"):
        sample(fresh, batch())
    fresh.load_state_dict(policy().state_dict())
    assert torch.equal(sample(fresh, batch()), sample(policy(), batch()))
    bc = MailPolicy(MailConfig().replace(SMALL | {"objective": "bc"}), FEATURES)
    assert sample(bc, batch()).shape == (3, 4, 2)


@pytest.mark.parametrize("objective", ["bc", "ddpm"])
def test_language_token_is_the_first_state_and_changes_the_output(objective):
    p, b = policy(language="hash", objective=objective), batch()
    assert p.language.weight.shape == (16, 512)
    features = p.encode(b)
    assert features.shape == (3, 4, 16)
    torch.testing.assert_close(features[:, 0], p.language(b["task_emb"]))
    swapped = b | {"task_emb": b["task_emb"].flip(0)}
    assert torch.equal(p.encode(swapped)[:, 1:], features[:, 1:])
    with torch.no_grad():
        for parameter in p.parameters():
            parameter.mul_(2.0)
    assert not torch.equal(sample(p, b), sample(p, swapped))


def unit_stats(size):
    """Mean 0, deviation 1, everything between -1 and 1."""
    return FeatureStats(*(np.full(size, v) for v in (0.0, 1.0, -1.0, 1.0, -1.0, 1.0)), count=10)


def test_language_agent_embeds_its_tasks():
    agent = mail_agents.make("mail/ed-ma-bc", FEATURES, device="cpu", language="hash", **SMALL)
    stats = {key: unit_stats(size) for key, size in (("action", 2), ("goal", 2), ("state", 3))}
    with pytest.raises(InvalidInputError, match="conditioned on language"):
        agent.set_statistics(stats)
    agent.set_statistics(stats, tasks=("open the door", "close the door"))
    assert agent.task_embeddings.shape == (2, 512)
    agent.reset(task="open the door")
    assert agent.act({"state": np.zeros(3, np.float32), "goal": np.zeros(2, np.float32)}).shape == (
        2,
    )


def test_every_parameter_learns():
    for objective in ("bc", "ddpm"):
        p = policy(objective=objective, language="hash").train()
        b = batch(rows=16)
        for _ in range(3):  # zero-initialised parameters need a step before others see gradients
            loss(p, b).backward()
            with torch.no_grad():
                for parameter in p.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        assert all(q.grad is not None and q.grad.abs().sum() > 0 for q in p.parameters())


def test_mixed_stacks_run():
    for encoder in ("mamba", "attention"):
        for decoder in ("mamba", "attention"):
            overrides = {"encoder.mixer": encoder, "decoder.mixer": decoder, "diffusion_steps": 2}
            assert sample(policy(**overrides), batch()).shape == (3, 4, 2)


def test_policies_can_be_copied():
    p, b = policy(), batch()
    assert torch.equal(sample(copy.deepcopy(p), b), sample(p, b))


def two_modes(rows, seed):
    """Actions are +0.8 or -0.8, whatever the observation."""
    out = batch(rows, seed=seed)
    sign = torch.randint(0, 2, (rows, 1, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return out | {"action": (0.8 * sign).expand(rows, 4, 2)}


def train(p, steps, lr=5e-3):
    optimizer = torch.optim.Adam(p.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    p.train()
    losses = []
    for step in range(steps):
        value = p.loss(two_modes(64, step), generator)[0]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    p.eval()
    return losses


def test_diffusion_learns_both_modes_and_regression_their_mean():
    diffusion, regression = policy(objective="ddpm"), policy(objective="bc")
    losses = train(diffusion, 250)
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    drawn = sample(diffusion, batch(40))
    assert ((drawn.abs() - 0.8).abs() < 0.3).float().mean() > 0.65
    assert 5 < (drawn[:, 0, 0] > 0).sum() < 35
    train(regression, 100)
    assert sample(regression, batch(40)).abs().max() < 0.3


def test_bad_configurations_are_explained():
    with pytest.raises(InvalidInputError, match="decoder-only"):
        MailConfig(decoder=StackConfig(layers=0))
    with pytest.raises(InvalidInputError, match=r"not divisible by encoder\.heads=3"):
        MailConfig(encoder=StackConfig(mixer="attention", heads=3))
    with pytest.raises(InvalidInputError, match="width must be even"):
        MailConfig(width=7)
    with pytest.raises(InvalidInputError, match="layers >= 0"):
        StackConfig(layers=-1)
    with pytest.raises(InvalidInputError, match="dropout"):
        StackConfig(dropout=1.0)
    discrete = FeatureSpec(FEATURES.observations, Feature("scalar", (), "int64", n=4))
    with pytest.raises(InvalidInputError, match="Discrete actions"):
        mail_agents.make("mail/ed-ma-bc", discrete, device="cpu")
