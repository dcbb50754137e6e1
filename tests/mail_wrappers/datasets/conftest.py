"""Comparison shared by the tests of dataset adapters."""

from collections.abc import Callable

import pytest

from mail_agents.data import Episode


@pytest.fixture(scope="session")
def same_episode() -> Callable[[Episode, Episode], None]:
    """Asserts bitwise equality of two episodes, dtypes included."""

    def check(left: Episode, right: Episode) -> None:
        for part in ("observations", "infos"):
            ours, theirs = getattr(left, part), getattr(right, part)
            assert set(ours) == set(theirs)
            for key in ours:
                assert ours[key].dtype == theirs[key].dtype, key
                assert ours[key].tobytes() == theirs[key].tobytes(), key
        for part in ("actions", "rewards", "terminations", "truncations"):
            ours, theirs = getattr(left, part), getattr(right, part)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), part
            assert ours.tobytes() == theirs.tobytes(), part
        assert (left.task, left.seed, left.meta) == (right.task, right.seed, right.meta)

    return check
