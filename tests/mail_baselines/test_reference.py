"""Floors: uniform random actions, and the mean demonstrated one."""

import numpy as np
import pytest
from toybox.world import demonstrations

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.errors import InvalidInputError
from mail_agents.features import Feature, FeatureSpec

BOX = FeatureSpec(
    {"state": Feature("state", (4,), "float32")},
    Feature("state", (2,), "float32", low=(-1.0, 2.0), high=(1.0, 4.0)),
)
STATE = np.zeros((1, 4), np.float32)


def test_both_are_registered_by_an_installed_entry_point():
    assert set(mail_agents.list_agents(tags=["reference"])) == {"mean-action", "random"}


@pytest.mark.parametrize("overrides", [{}, {"action_norm": "min_max"}, {"horizon": 3}])
def test_the_mean_action_is_the_mean_of_the_training_actions(overrides):
    dataset = MemoryDataset(demonstrations(5))
    agent = mail_agents.make("mean-action", dataset.features, device="cpu", **overrides)
    agent.fit_statistics(dataset, [0, 2])
    actions = np.concatenate([dataset.episode(i).actions for i in (0, 2)])
    agent.reset()
    for _ in range(4):
        np.testing.assert_allclose(agent.act(STATE)[0], actions.mean(axis=0), atol=1e-6)


def test_its_loss_is_the_variance_of_the_actions():
    dataset = MemoryDataset(demonstrations(5))
    agent = mail_agents.make("mean-action", dataset.features, device="cpu")
    agent.fit_statistics(dataset)
    windows = dataset.windows(agent.window_spec)
    loss, _ = agent.loss(windows[np.arange(len(windows))])
    assert float(loss) == pytest.approx(1.0, abs=1e-5)  # in normalised units


def test_random_actions_fill_the_box_evenly():
    agent = mail_agents.make("random", BOX, device="cpu", horizon=2)
    agent.reset(seed=0)
    actions = np.concatenate([agent.act(STATE, deterministic=False) for _ in range(2000)])
    assert actions.dtype == np.float32
    unit = (actions - [-1.0, 2.0]) / 2
    assert ((unit >= 0) & (unit <= 1)).all()
    counts = np.stack([np.histogram(unit[:, i], 10, (0, 1))[0] for i in range(2)])
    assert (np.abs(counts - 200) < 60).all()
    assert abs(np.corrcoef(unit.T)[0, 1]) < 0.08
    assert abs(np.corrcoef(unit[:-1, 0], unit[1:, 0])[0, 1]) < 0.08


def test_random_without_noise_is_the_middle():
    agent = mail_agents.make("random", BOX, device="cpu")
    agent.reset()
    assert agent.act(STATE).tolist() == [[0.0, 3.0]]


def test_random_needs_no_statistics_and_survives_a_file(tmp_path):
    agent = mail_agents.make("random", BOX, device="cpu", seed=3)
    loaded = mail_agents.load(agent.save(tmp_path / "agent.safetensors"), device="cpu")
    for each in (agent, loaded):
        each.reset(seed=1)
    np.testing.assert_array_equal(
        agent.act(STATE, deterministic=False), loaded.act(STATE, deterministic=False)
    )


def test_random_needs_bounds():
    free = FeatureSpec(BOX.observations, Feature("state", (2,), "float32"))
    with pytest.raises(InvalidInputError, match="bounded action space"):
        mail_agents.make("random", free, device="cpu")
    discrete = FeatureSpec(BOX.observations, Feature("scalar", (), "int64", n=3))
    with pytest.raises(InvalidInputError, match="continuous"):
        mail_agents.make("random", discrete, device="cpu")
