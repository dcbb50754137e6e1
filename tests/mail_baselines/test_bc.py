"""Behaviour cloning, and %BC."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_baselines.bc import best_episodes


@pytest.mark.parametrize("by", ["timesteps", "trajectories"])
@pytest.mark.parametrize(
    ("fraction", "kept"), [(1.0, [0, 1, 2, 3]), (0.5, [2, 3]), (0.01, [3]), (0.75, [1, 2, 3])]
)
def test_the_best_share_of_equal_episodes(by, fraction, kept):
    returns, lengths = np.array([10.0, 20.0, 30.0, 40.0]), np.full(4, 5)
    assert best_episodes(returns, lengths, fraction, by).tolist() == kept
    order = np.array([2, 0, 3, 1])
    again = best_episodes(returns[order], lengths, fraction, by)
    assert sorted(order[again].tolist()) == kept


def test_time_steps_and_trajectories_count_differently():
    returns, lengths = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1, 1, 1, 7])
    assert best_episodes(returns, lengths, 0.7, "timesteps").tolist() == [3]
    assert best_episodes(returns, lengths, 0.8, "timesteps").tolist() == [2, 3]
    assert best_episodes(returns, lengths, 0.5, "trajectories").tolist() == [2, 3]
    assert best_episodes(returns, lengths, 0.5, "timesteps").tolist() == [3]  # at least one


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 50)), min_size=1, max_size=30))
def test_a_larger_share_keeps_what_a_smaller_one_did(episodes):
    returns, lengths = (np.array(column) for column in zip(*episodes, strict=True))
    for by in ("timesteps", "trajectories"):
        before: set[int] = set()
        for fraction in (0.05, 0.3, 0.8, 1.0):
            kept = set(best_episodes(returns, lengths, fraction, by).tolist())
            assert before <= kept
            worst_kept = min(returns[list(kept)])
            assert all(returns[i] <= worst_kept for i in set(range(len(returns))) - kept)
            before = kept
        assert before == set(range(len(returns)))


@pytest.fixture(scope="module")
def graded(trajectory):
    """Episodes whose states tell their returns apart: episode i shows about 10 i."""
    rng = np.random.default_rng(0)
    episodes = []
    for i in range(4):
        episode = trajectory(5, rng, rewards=[float(i)] * 5)
        episode.observations["state"][:] += 10 * i
        episodes.append(episode)
    return episodes


def test_only_the_best_episodes_are_learnt_from(build, dataset, graded):
    data = MemoryDataset(graded, features=dataset.features)
    agent = build("bc", data, top_fraction=0.5)
    assert agent.training_episodes(data) == [2, 3]
    assert agent.training_episodes(data, [0, 1, 2]) == [2]
    states = agent.normalizers["obs/state"]
    assert 20 < float(states.offset.mean()) < 30  # the middle of the best two
    assert build("bc-10", data).training_episodes(data) == [3]
    assert build("bc", data).training_episodes(data) == [0, 1, 2, 3]
    assert build("bc-kzl", data).training_episodes(data) == [0, 1, 2, 3]


def test_the_best_share_is_taken_of_every_task(build, dataset, graded):
    """Returns of the second task are a thousand times smaller; order of the episodes stays."""
    small = [replace(e, rewards=e.rewards / 1000, task="b") for e in graded]
    large = [replace(e, task="a") for e in graded]
    mixed = [episode for pair in zip(large, small, strict=True) for episode in pair]
    data = MemoryDataset(mixed, features=dataset.features)
    for by in ("timesteps", "trajectories"):
        agent = build("bc", data, top_fraction=0.5, by=by)
        assert agent.training_episodes(data) == [4, 5, 6, 7]
        assert agent.training_episodes(data, [3, 2, 0, 1]) == [3, 2]
    assert build("bc-10", data).training_episodes(data) == [6, 7]


def kinds(agent):
    return [type(layer).__name__ for layer in agent.policy.net]


def test_the_two_published_networks(dataset):
    corl = mail_agents.make("bc", dataset.features, device="cpu")
    assert kinds(corl) == ["Linear", "ReLU", "Linear", "ReLU", "Linear", "Tanh"]
    kzl = mail_agents.make("bc-kzl", dataset.features, device="cpu")
    assert kinds(kzl) == [*["Linear", "ReLU", "Dropout"] * 3, "Linear", "Tanh"]
    linear = [layer for layer in kzl.policy.net if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] == [60, 128, 128, 128]


def test_the_input_is_the_last_states_oldest_first(build, dataset):
    agent = build("bc-kzl", history=3)
    shown = []
    agent.policy.net.register_forward_pre_hook(lambda _, x: shown.append(x[0]))
    view = dataset.windows(agent.window_spec)
    batch = agent.prepare(view[[0, 10]])
    agent.policy.loss(batch)
    torch.testing.assert_close(shown[0][0], batch["obs/state"][0].flatten())
    assert batch["action"].shape == (2, 1, 2)
    actions = dataset.episode(0).actions
    np.testing.assert_array_equal(batch["action"][:, 0], actions[[2, 11]])  # of the last step
    assert batch["mask"].tolist() == [[True] * 3, [False, True, True]]
    stats = dataset.stats()["state"]
    zero = torch.from_numpy((0 - stats.mean) / stats.std).float()
    torch.testing.assert_close(shown[0][1, :3], zero)  # padding of training windows

    agent.reset()
    agent.act(np.ones((1, 3), np.float32))
    assert not shown[1][0, :6].any()  # padding of acting windows
    assert shown[1][0, 6:].all()


def test_short_histories_repeat_the_first_state(build, dataset):
    agent = build("bc", history=3)
    shown = []
    agent.policy.net.register_forward_pre_hook(lambda _, x: shown.append(x[0]))
    agent.reset()
    agent.act(dataset.episode(0).observations["state"][0])
    first = shown[0][0].reshape(3, 3)
    assert torch.equal(first[0], first[2])
    batch = agent.prepare(dataset.windows(agent.window_spec)[[0]])
    agent.policy.loss(batch)
    torch.testing.assert_close(shown[1][0], shown[0][0])


def test_a_target_return_means_nothing_to_it(build):
    agent = build("bc")
    assert not agent.uses_target_return
    assert agent.resolve_target(None) is None
