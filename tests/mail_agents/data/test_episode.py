"""Episodes refuse what cannot be learned from, and say where it is."""

import numpy as np
import pytest

from mail_agents.data import Episode
from mail_agents.errors import InvalidInputError


def build(**changes) -> Episode:
    fields = {
        "observations": {"state": np.zeros((4, 2))},
        "actions": np.zeros((3, 1)),
        "rewards": np.zeros(3),
        "terminations": [False, False, True],
        "truncations": np.zeros(3, bool),
    }
    return Episode(**{**fields, **changes})


def test_a_plain_episode():
    episode = build(meta={"success": 1}, infos={"q": np.full((4, 1), np.nan)})
    assert len(episode) == 3
    assert episode.success is True
    assert build().success is None
    assert episode.terminations.dtype == bool
    assert episode.features().observations["state"].shape == (2,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"observations": {"state": np.zeros((3, 2))}}, "'state' has 3 rows, expected 4"),
        ({"rewards": np.zeros(4)}, "'rewards' has 4 rows, expected 3"),
        ({"rewards": np.zeros((3, 1))}, "expected (T,)"),
        ({"terminations": np.zeros((3, 1), bool)}, "'terminations' has shape (3, 1)"),
        ({"truncations": np.zeros((3, 1), bool)}, "'truncations' has shape (3, 1)"),
        ({"actions": np.zeros((0, 1))}, "no actions"),
        ({"actions": np.float64(3)}, "no actions"),
        ({"observations": {}}, "no observations"),
        ({"observations": {"state": np.array([[0], [0, 1], [], []], object)}}, "Python objects"),
        ({"infos": {"q": np.zeros(2)}}, "'infos/q' has 2 rows, expected 3 or 4"),
        ({"infos": {"q": 1.0}}, "'infos/q' has no rows"),
        ({"actions": np.array([[0.0], [np.nan], [0.0]])}, "first at step 1"),
        ({"rewards": np.array([0, 0, np.inf])}, "first at step 2"),
    ],
)
def test_malformed_episodes_are_refused(changes, words):
    with pytest.raises(InvalidInputError) as caught:
        build(**changes, meta={"source_id": "demo_7"})
    assert words in str(caught.value)
    assert "demo_7" in str(caught.value)
