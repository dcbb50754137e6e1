import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_agents.data.references import from_dataset
from mail_agents.errors import InvalidInputError
from mail_agents.report import Reference, normalised_score

HOPPER = Reference(-20.272305, 3234.3, "d4rl:hopper")


def test_known_returns():
    scores = normalised_score([0.0, 1800.0, 3600.0], HOPPER)
    assert scores == pytest.approx([0.622887, 55.929693, 111.236499], abs=5e-7)
    assert float(normalised_score(HOPPER.minimum, HOPPER)) == 0
    assert float(normalised_score(HOPPER.maximum, HOPPER)) == pytest.approx(100)


@given(st.floats(-1e6, 1e6), st.floats(0.1, 1e4), st.floats(-3, 3))
def test_scores_are_linear_and_never_clipped(minimum, span, share):
    reference = Reference(minimum, minimum + span)
    score = float(normalised_score(minimum + share * span, reference))
    assert score == pytest.approx(100 * share, abs=1e-2)


def test_references_as_datasets_store_them_score_as_well():
    entry = {"min": HOPPER.minimum, "max": HOPPER.maximum, "source": "d4rl:hopper"}
    assert normalised_score(1800.0, entry) == normalised_score(1800.0, HOPPER)
    with pytest.raises(InvalidInputError, match=r"got \{'max': 3\}"):
        normalised_score(1.0, {"max": 3})
    with pytest.raises(InvalidInputError, match="maximum above the minimum"):
        normalised_score(1.0, {"min": 3, "max": 3})


def test_there_is_no_score_without_references():
    with pytest.raises(InvalidInputError, match="report the raw return"):
        normalised_score([1.0], None)


def test_references_of_a_dataset():
    found = from_dataset(
        {"hopper": {"min": -1, "max": 9, "source": "d4rl:hopper"}, "reach": {"min": 0, "max": 1.5}}
    )
    assert found == {
        "hopper": Reference(-1.0, 9.0, "d4rl:hopper"),
        "reach": Reference(0.0, 1.5, "dataset"),
    }
    assert str(found["hopper"]) == "-1 to 9 (d4rl:hopper)"
    assert from_dataset({}) == {}


@pytest.mark.parametrize(
    "entry",
    [{"min": 0}, {"min": 0, "max": None}, {"min": 1, "max": 1}, {"min": 2, "max": 1}, 3,
     {"min": float("nan"), "max": 1}, {"min": 0, "max": float("inf")}, {"min": "a", "max": 1}],
)  # fmt: skip
def test_unusable_references_are_named(entry):
    with pytest.raises(InvalidInputError, match="task 'hop'"):
        from_dataset({"hop": entry})


def test_shape_is_kept():
    assert normalised_score(np.zeros((2, 3)), HOPPER).shape == (2, 3)
