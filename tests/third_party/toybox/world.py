"""Reach a point: a world that needs no simulator, and demonstrations of it."""

import gymnasium
import numpy as np

from mail_agents.data.episode import Episode
from mail_agents.data.store import write_dataset
from mail_agents.features import FeatureSpec

#: Gymnasium imports the module before the colon, which registers the world.
ENV_ID = "toybox:toybox/Point-v0"
STEP = 0.25


class PointEnv(gymnasium.Env):
    """Moves at most 0.25 per axis and step; solved within 0.2 of the goal.

    The observation is (position, goal); the reward is minus the distance.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, render_mode=None, terminate=False, size=2):
        self.render_mode, self.terminate, self.size = render_mode, terminate, size
        self.observation_space = gymnasium.spaces.Box(-4.0, 4.0, (2 * size,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (size,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, self.size)
        self.goal = self.np_random.uniform(-1, 1, self.size)
        return self._observe(), {"success": False}

    def _observe(self):
        return np.concatenate([self.position, self.goal]).astype(np.float32)

    def step(self, action):
        assert action.dtype == np.float32
        assert self.action_space.contains(action)
        self.position = self.position + STEP * np.asarray(action, np.float64)
        distance = float(np.linalg.norm(self.goal - self.position))
        success = distance < 0.2
        ended = self.terminate and success
        return self._observe(), -distance, ended, False, {"success": success}

    def render(self):
        frame = np.zeros((32, 32, 3), np.uint8)
        for point, channel in ((self.position, 0), (self.goal, 1)):
            x, y = np.clip((point[:2] + 2) * 8, 0, 31).astype(int)
            frame[x, y, channel] = 255
        return frame


def expert(observation):
    """Goes straight to the goal."""
    half = len(observation) // 2
    return np.clip((observation[half:] - observation[:half]) / STEP, -1, 1).astype(np.float32)


def demonstrations(episodes=8, task="point"):
    """Solved episodes of the expert."""
    env = gymnasium.make(ENV_ID, terminate=True)
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        observations, actions, rewards, ended = [observation], [], [], False
        while not ended:
            actions.append(expert(observation))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
            ended = terminated or truncated
        last = np.arange(len(actions)) == len(actions) - 1
        yield Episode(
            observations={"state": np.stack(observations)},
            actions=np.stack(actions),
            rewards=np.array(rewards),
            terminations=last & terminated,
            truncations=last & truncated,
            task=task,
            seed=seed,
            meta={"success": True},
        )


def make_dataset(path, episodes=8, name="point", **options):
    """Writes demonstrations, with the world they come from."""
    env = gymnasium.make(ENV_ID)
    return write_dataset(
        path,
        demonstrations(episodes),
        name=name,
        features=FeatureSpec.from_spaces(env.observation_space, env.action_space),
        env_specs={"point": {"id": ENV_ID, "kwargs": {}}},
        **options,
    )
