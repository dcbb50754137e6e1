"""Episodes for the tests of the data layer."""

from collections.abc import Callable

import numpy as np
import pytest

from mail_agents.data import Episode


def build_episode(number: int, length: int, *, images: bool = True, text: bool = True) -> Episode:
    """An episode of everything: states, a nested image key, text of its own width, infos."""
    rng = np.random.default_rng([number, length])
    observations = {"state": rng.normal(size=(length + 1, 3))}
    observations["state"][0, 0] = -0.0
    if images:
        observations["cameras/front"] = rng.integers(0, 256, (length + 1, 4, 5, 3), dtype=np.uint8)
    if text:
        observations["Say"] = np.array(["é" * (1 + number)] * (length + 1))
        observations["say"] = np.array(["x"] * (length + 1))
    infos = {"qpos": rng.normal(size=(length + 1, 2)), "flag": rng.random(length) > 0.5}
    infos["qpos"][0, 0] = np.nan
    return Episode(
        observations=observations,
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        rewards=rng.normal(size=length),
        terminations=np.arange(length) == length - 1,
        truncations=np.zeros(length, bool),
        task=None if number == 2 else f"task {number % 2}",
        seed=None if number == 1 else number + 2**70,
        meta={"success": bool(number % 2), "source_id": f"demo_{number}", "noise": 0.1},
        infos={} if number == 3 else infos,
    )


@pytest.fixture(scope="session")
def make_episode() -> Callable[..., Episode]:
    """Builds episodes: ``make_episode(number, length)``."""
    return build_episode


def assert_same_episode(left: Episode, right: Episode) -> None:
    """Equal to the last bit, dtypes included."""
    for part in ("observations", "infos"):
        ours, theirs = getattr(left, part), getattr(right, part)
        assert set(ours) == set(theirs)
        for key in ours:
            assert_same_array(ours[key], theirs[key], key)
    for part in ("actions", "rewards", "terminations", "truncations"):
        assert_same_array(getattr(left, part), getattr(right, part), part)
    assert (left.task, left.seed, left.meta) == (right.task, right.seed, right.meta)


def assert_same_array(left: np.ndarray, right: np.ndarray, label: str) -> None:
    assert left.dtype == right.dtype, label
    assert left.shape == right.shape, label
    assert left.tobytes() == right.tobytes(), label


@pytest.fixture(scope="session")
def same_episode() -> Callable[[Episode, Episode], None]:
    """Asserts bitwise equality of two episodes."""
    return assert_same_episode
