import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_agents.errors import MailAgentsError
from mail_agents.seeding import STREAMS, derive_env_seed, derive_seed


def test_golden_values():
    # Part of the format: a change here changes every published evaluation.
    assert STREAMS == ("train", "data", "eval", "model")
    assert derive_seed(0, "train") == 8668861027912758289
    assert derive_seed(0, "eval", 7) == 2625362333996519307
    assert derive_env_seed(3, "eval", 2) == 1985601730


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**31), max_size=3))
def test_ranges(seed, path):
    for stream in STREAMS:
        assert 0 <= derive_seed(seed, stream, *path) < 2**63
        assert 0 <= derive_env_seed(seed, stream, *path) < 2**31


def test_streams_paths_and_roots_are_apart():
    seeds = {
        derive_seed(root, stream, *path)
        for root in range(5)
        for stream in STREAMS
        for path in [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    }
    assert len(seeds) == 5 * 4 * 6


@pytest.mark.parametrize("arguments", [(0, "tain"), (-1, "train"), (0, "eval", -1)])
def test_refused(arguments):
    with pytest.raises(MailAgentsError, match=r"train|negative"):
        derive_seed(*arguments)
