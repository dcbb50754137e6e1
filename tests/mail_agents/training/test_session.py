"""Before and after the training loop."""

import numpy as np
import pytest
import torch
from toybox.world import demonstrations

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.data.windows import BatchSampler
from mail_agents.errors import InvalidInputError
from mail_agents.training.session import (
    open_agent,
    start_training,
    trainable_parameters,
    validation_loss,
)

DATASET = MemoryDataset(demonstrations(4), name="toy")
SMALL = {"width": 8, "decoder": {"layers": 1}, "diffusion_steps": 2}


def make(seed=0, **overrides):
    return mail_agents.make(
        "mail/d-tr-ddpm", DATASET.features, device="cpu", seed=seed, **{**SMALL, **overrides}
    )


def fitted(seed=0, **overrides):
    agent = make(seed, **overrides)
    agent.fit_statistics(DATASET)
    return agent


def test_a_new_agent_takes_statistics_of_the_training_episodes_only(tmp_path):
    agent, state = open_agent(tmp_path, False, DATASET, [0, 1], make, "cpu")
    assert state is None
    mean = np.concatenate([DATASET.episode(i).actions for i in (0, 1)]).mean(axis=0)
    np.testing.assert_allclose(agent.normalizers["action"].offset, mean, rtol=1e-5)
    # Killed before its first checkpoint, a run starts again.
    again, state = open_agent(tmp_path, True, DATASET, [0, 1], make, "cpu")
    assert state is None
    assert again.updates == 0


def test_the_global_stream_that_dropout_draws_from_follows_the_seed():
    draws = []
    for seed, before in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(before)
        agent = fitted(seed)
        assert start_training(agent, None, BatchSampler(8, 4, seed), 10) == (0, 0.0)
        assert agent.optimizer is not None
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_reference_agents_have_nothing_to_optimise():
    agent = mail_agents.make("mean-action", DATASET.features, device="cpu")
    agent.fit_statistics(DATASET)
    assert trainable_parameters(agent) == 0
    assert start_training(agent, None, BatchSampler(8, 4, 0), 0) == (0, 0.0)
    with pytest.raises(InvalidInputError, match="configure_optim"):
        _ = agent.optimizer


def test_frozen_weights_do_not_count():
    agent = fitted()
    whole = trainable_parameters(agent)
    first = next(agent.policy.parameters())
    first.requires_grad_(False)
    assert trainable_parameters(agent) == whole - first.numel()


def test_a_validation_loss_leaves_no_trace():
    agent = fitted()
    windows = DATASET.windows(agent.window_spec)
    noise, stream = agent.generator.get_state(), torch.get_rng_state()
    first, second = validation_loss(agent, windows), validation_loss(agent, windows)
    assert first == second  # without dropout, with the same noise
    assert torch.equal(noise, agent.generator.get_state())
    assert torch.equal(stream, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in agent.policy.parameters())
    assert validation_loss(agent, windows, limit=3) != first


def test_resuming_on_other_data(tmp_path):
    from mail_agents.checkpoint import save_checkpoint

    agent = fitted()
    sampler = BatchSampler(8, 4, 0)
    start_training(agent, None, sampler, 10)
    next(sampler)
    save_checkpoint(tmp_path, 0, agent, {"sampler": sampler.state_dict(), "seconds": 2.5})
    other = MemoryDataset(demonstrations(3), name="other")
    with pytest.raises(InvalidInputError, match="another dataset"):
        open_agent(tmp_path, True, other, [0], make, "cpu")
    agent, state = open_agent(tmp_path, True, DATASET, [0], make, "cpu")
    resumed = BatchSampler(8, 4, 0)
    assert start_training(agent, state, resumed, 10) == (0, 2.5)
    assert resumed.state_dict() == sampler.state_dict()
