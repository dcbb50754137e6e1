import pytest

from mail_agents.report import plots


@pytest.mark.parametrize(
    "name",
    [
        "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate",
        "hopper-medium-replay / walker2d-medium-expert",
        "reach-v3",
    ],
)
def test_long_headings_are_broken_between_words(name):
    lines = plots._wrapped(name).split("\n")
    assert "".join(lines) == name
    assert max(map(len, lines)) <= 34


def test_a_word_that_fits_nowhere_stays_whole():
    assert plots._wrapped("x" * 60) == "x" * 60
