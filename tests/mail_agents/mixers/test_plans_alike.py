"""Plans and outputs of a row are equal to the last bit, whatever rows are beside it."""

import numpy as np
import pytest
import torch

import mail_agents
from mail_agents.data.example import example_dataset, example_features
from mail_agents.mixers import BiMamba, Hydra, Mamba, Mamba2
from mail_agents.ops import use_backend

# Few heads, and lengths at which step sizes fill no whole number of vectors.
MIXERS = {
    "mamba": lambda: Mamba(64),
    "mamba2": lambda: Mamba2(64, d_state=16),
    "mamba2, one head": lambda: Mamba2(64, d_state=16, headdim=128),
    "bimamba": lambda: BiMamba(64),
    "hydra": lambda: Hydra(64, d_state=16),
    "hydra, one head": lambda: Hydra(64, d_state=16, headdim=128),
}
ROWS = (4, 8, 12, 20)  # as few as an evaluation on a CPU gives to a network, and more


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_rows_of_every_mixer_are_alone(name, backend):
    for seed in range(3):
        torch.manual_seed(seed)
        mixer = MIXERS[name]()
        for length in (1, 5, 11):
            x = torch.randn(32, length, 64)
            with use_backend(backend):
                whole = mixer(x)
                assert all(torch.equal(mixer(x[:n]), whole[:n]) for n in ROWS)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba2, one head"])
@torch.no_grad()
def test_rows_of_steps_are_alone(name, backend):
    for seed in range(5):
        torch.manual_seed(seed)
        mixer, x = MIXERS[name](), torch.randn(32, 3, 64)
        with use_backend(backend):
            _, state = mixer.prefill(x[:, :2])
            whole, after = mixer.step(x[:, 2], state)
            for n in ROWS:
                y, new = mixer.step(x[:n, 2], type(state)(*(part[:n] for part in state)))
                assert torch.equal(y, whole[:n])
                assert all(torch.equal(a, b[:n]) for a, b in zip(new, after, strict=True))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "bimamba", "hydra", "attention"])
@pytest.mark.parametrize("agent_id", ["mail/d-ma-bc", "mail/ed-ma-ddpm"])
def test_plans_of_a_slot_are_alone(agent_id, mixer, backend):
    features = example_features()
    parts = {"decoder.mixer": mixer, "decoder.layers": 2, "decoder.d_state": 16}
    if "/ed" in agent_id:
        parts |= {"encoder.mixer": mixer, "encoder.layers": 1, "diffusion_steps": 2}
    sizes = {"width": 64, "feature_width": 32, "history": 2, "horizon": 3}
    data, rng = example_dataset(features, 12), np.random.default_rng(0)
    state = data.episode(0).observations["state"]
    for seed in range(2):
        agent = mail_agents.make(agent_id, features, device="cpu", seed=seed, **sizes, **parts)
        agent.fit_statistics(data)
        observations = rng.normal(size=(24, *state.shape[1:])).astype(np.float32)

        def plan(n, agent=agent, observations=observations):
            agent.reset(seed=list(range(n)))
            return agent.act({"state": observations[:n]}, deterministic=False)

        with use_backend(backend), agent.planning_alike():
            whole = plan(24)
            for n in (1, 3, 4, 5, 12, 20):
                np.testing.assert_array_equal(plan(n), whole[:n])
