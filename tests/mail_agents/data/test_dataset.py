"""Choosing demonstrations and splitting episodes."""

from itertools import pairwise

import numpy as np
import pytest

from mail_agents.data import MemoryDataset, select_demos
from mail_agents.data.dataset import split_episodes
from mail_agents.errors import InvalidInputError

FIFTY = [f"demo_{i}" for i in range(50)]


def numbers(keys: list[str]) -> list[int]:
    return [int(key.removeprefix("demo_")) for key in keys]


def test_first_takes_demonstrations_in_numeric_order():
    shuffled = np.random.default_rng(0).permutation(FIFTY).tolist()
    assert numbers(select_demos(shuffled, 10)) == list(range(10))
    assert select_demos(["demo_10", "demo_9", "demo_2"]) == ["demo_2", "demo_9", "demo_10"]


def test_mail_legacy_reproduces_the_released_selection():
    shuffled = np.random.default_rng(0).permutation(FIFTY).tolist()
    assert numbers(select_demos(shuffled, 10, "mail_legacy")) == [
        0,
        1,
        12,
        23,
        34,
        45,
        46,
        47,
        48,
        49,
    ]
    assert numbers(select_demos(FIFTY, 5, "mail_legacy")) == [0, 1, 12, 23, 34]
    assert set(numbers(select_demos(FIFTY, 20, "mail_legacy"))[10:]) == set(range(2, 12))


@pytest.mark.parametrize("mode", ["first", "mail_legacy"])
def test_smaller_selections_are_contained_in_larger_ones(mode):
    chosen = [set(select_demos(FIFTY, n, mode)) for n in (5, 10, 20, 30, 50)]
    for smaller, larger in pairwise(chosen):
        assert smaller < larger
    assert chosen[-1] == set(FIFTY)


def test_impossible_selections_are_refused():
    with pytest.raises(InvalidInputError, match="51 demonstrations requested, the file has 50"):
        select_demos(FIFTY, 51)
    with pytest.raises(InvalidInputError, match="does not end in a number"):
        select_demos(["demo_0", "mask"])
    with pytest.raises(InvalidInputError, match=r"numbers \[2\].*gaps"):
        select_demos(["demo_0", "demo_1", "demo_5"], 3, "mail_legacy")
    with pytest.raises(InvalidInputError, match="'last' is unknown"):
        select_demos(FIFTY, 3, "last")  # type: ignore[arg-type]


def test_splits_depend_on_the_seed_alone():
    train, held_out = split_episodes(20, 0.25, seed=0)
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted(train + held_out) == list(range(20))
    assert train == sorted(train)
    assert split_episodes(20, 0.25, seed=0) == (train, held_out)
    assert split_episodes(20, 0.25, seed=1)[1] != held_out
    assert split_episodes(3, 0, seed=0) == ([0, 1, 2], [])
    assert len(split_episodes(3, 0.01, seed=0)[1]) == 1
    assert len(split_episodes(3, 0.99, seed=0)[0]) == 1
    for n, share in ((1, 0.5), (5, 1.0), (5, -0.1)):
        with pytest.raises(InvalidInputError):
            split_episodes(n, share, seed=0)


def test_returns_are_sums_of_rewards(make_episode):
    episodes = [make_episode(i, 4 + i) for i in range(3)]
    found = MemoryDataset(episodes).episode_returns
    np.testing.assert_allclose(found, [e.rewards.sum() for e in episodes], rtol=1e-12)
