"""Small agents and trajectories for the offline-RL baselines."""

import warnings

import gymnasium
import numpy as np
import pytest

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.data.episode import Episode
from mail_agents.features import Feature, FeatureSpec

#: The smallest size at which every part is still there.
TINY = {"d_model": 16, "layers": 2, "history": 4, "max_timestep": 40}
TINY_BC = {"width": 16}


def box(states, actions):
    """Features of a D4RL-like environment."""
    return FeatureSpec(
        {"state": Feature("state", (states,), "float32")},
        Feature("state", (actions,), "float32", low=(-1.0,) * actions, high=(1.0,) * actions),
    )


def make_trajectory(length, rng, *, states=3, actions=2, rewards=None, truncated=True):
    """One episode of noise."""
    last = np.arange(length) == length - 1
    return Episode(
        observations={"state": rng.standard_normal((length + 1, states)).astype(np.float32)},
        actions=np.tanh(rng.standard_normal((length, actions))).astype(np.float32),
        rewards=rng.random(length) if rewards is None else np.asarray(rewards, float),
        terminations=last & (not truncated),
        truncations=last & truncated,
    )


@pytest.fixture(scope="session")
def trajectory():
    """Makes an episode: ``trajectory(length, rng, rewards=...)``."""
    return make_trajectory


@pytest.fixture(scope="session")
def dataset():
    """Episodes of 12, 3, 7 and 1 steps: with a window of 4, some are shorter."""
    rng = np.random.default_rng(0)
    return MemoryDataset([make_trajectory(n, rng) for n in (12, 3, 7, 1)], features=box(3, 2))


@pytest.fixture
def build(dataset):
    """Makes a tiny fitted agent: ``build("dt", padding="left_legacy")``."""

    def make(agent_id, data=dataset, **overrides):
        small = TINY_BC if agent_id.startswith("bc") else TINY
        config = mail_agents.spec(agent_id).config(small).replace(overrides)
        agent = mail_agents.make(agent_id, data.features, config=config, device="cpu", seed=0)
        agent.fit_statistics(data)
        return agent

    return make


class NoiseEnv(gymnasium.Env):
    """Shows noise, pays the sum of the action and ends after 5 to 30 steps, at random."""

    metadata = {"render_modes": []}

    def __init__(self, states=3, actions=2):
        self.render_mode = None
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (states,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(5, 31))
        return self._state(), {}

    def _state(self):
        return self.np_random.standard_normal(self.observation_space.shape).astype(np.float32)

    def step(self, action):
        self.left -= 1
        return self._state(), float(np.sum(action)), self.left == 0, False, {}


@pytest.fixture
def noise_env():
    return NoiseEnv


@pytest.fixture(autouse=True)
def quiet_leak():
    """The leaky trunk warns when it is built; tests of it expect so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*shows the policy the actions.*")
        yield
