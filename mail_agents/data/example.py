"""Small made-up data that any agent can be made for: what conformance checks and tests use."""

import numpy as np

from mail_agents.data.dataset import MemoryDataset
from mail_agents.data.episode import Episode
from mail_agents.features import Feature, FeatureSpec


def example_features() -> FeatureSpec:
    """The features that agents are checked with: one state of 6, actions of 3 in [-1, 1]."""
    return FeatureSpec(
        observations={"state": Feature("state", (6,), "float32")},
        action=Feature("state", (3,), "float32", low=(-1.0,) * 3, high=(1.0,) * 3),
    )


def example_dataset(features: FeatureSpec, length: int, seed: int = 0) -> MemoryDataset:
    """Three short episodes whose actions depend on the observations, of two tasks."""
    rng = np.random.default_rng(seed)
    episodes = []
    for number in range(3):
        observations = {
            key: random_observation(feature, length + 1, rng)
            for key, feature in features.observations.items()
        }
        mixed = np.stack(
            [array.reshape(length + 1, -1).mean(axis=1) for array in observations.values()], axis=1
        )
        weights = rng.standard_normal((mixed.shape[1], features.action.size))
        actions = np.tanh(mixed[:-1] @ weights + 0.1 * rng.standard_normal((length, 1)))
        flags = np.zeros(length, bool)
        episodes.append(
            Episode(
                observations=observations,
                actions=actions.reshape(length, *features.action.shape).astype(np.float32),
                rewards=rng.random(length),
                terminations=flags,
                truncations=np.arange(length) == length - 1,
                task=f"task-{number % 2}",
                seed=number,
            )
        )
    return MemoryDataset(episodes, name="example")


def random_observation(feature: Feature, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Noise ``(rows, *shape)`` in a feature's own type."""
    if feature.kind == "image":
        return rng.integers(0, 256, (rows, *feature.shape), dtype=np.uint8)
    return rng.standard_normal((rows, *feature.shape)).astype(feature.dtype)
