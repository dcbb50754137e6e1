"""Taking turns, refusing unequal candidates, and seeing memory."""

import gc
import sys

import pytest
import torch

from mail_agents.benchmarks.timing import (
    Candidate,
    Times,
    check_equal,
    interleaved,
    peak_bytes,
    relative_error,
    rms_error,
    stopwatch,
)
from mail_agents.errors import InvalidInputError, MailAgentsError


def test_candidates_take_turns_after_a_round_that_does_not_count():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    clock = iter(range(100))
    found = interleaved(functions, 3, lambda f, n: (f(), float(next(clock)))[1], shortest=0.0)
    assert calls == ["a", "b"] * 4
    assert found == {"a": Times((2.0, 4.0, 6.0)), "b": Times((3.0, 5.0, 7.0))}
    assert (found["a"].best, found["b"].median) == (2.0, 5.0)
    assert gc.isenabled()


def test_short_functions_are_called_several_times():
    counts = []
    watch = lambda function, calls: counts.append(calls) or 0.004  # noqa: E731
    interleaved({"a": lambda: None}, 2, watch, shortest=0.02)
    assert counts == [1, 5, 5]


def test_no_rounds_are_refused():
    with pytest.raises(InvalidInputError, match="--rounds starts at 1"):
        interleaved({"a": lambda: None}, 0, stopwatch("cpu", 1))


@pytest.mark.parametrize("threads", [1, 2])
def test_time_is_per_call(threads):
    watch = stopwatch("cpu", threads)
    work = lambda: sum(range(200_000))  # noqa: E731
    one, many = min(watch(work, 1) for _ in range(5)), min(watch(work, 4) for _ in range(5))
    assert 0.3 < many / one < 3.0


def candidate(name, *values):
    return Candidate(name, lambda: None, lambda: [torch.tensor(v) for v in values])


def test_equal_candidates_pass_with_their_differences():
    found = check_equal([candidate("a", [1.0, 4.0]), candidate("b", [1.0, 4.0002])], 1e-4)
    assert found["a"] == 0.0
    assert found["b"] == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize(
    "other",
    [
        candidate("b", [1.0, 4.1]),
        candidate("b", [1.0, float("nan")]),
        candidate("b", [1.0]),
        candidate("b", [1.0, 4.0], [1.0]),
    ],
)
def test_unequal_candidates_are_refused(other):
    with pytest.raises(MailAgentsError, match=r"'b' differs from 'a'.*would be unfair"):
        check_equal([candidate("a", [1.0, 4.0]), other], 1e-4)


def test_a_judge_need_not_be_timed():
    with pytest.raises(MailAgentsError, match="'a' differs from 'judge'"):
        check_equal([candidate("a", [1.0])], 1e-4, candidate("judge", [2.0]))


def test_errors_are_in_units_of_the_largest_value():
    wanted = [torch.tensor([2.0, -8.0]), torch.zeros(0), torch.zeros(1)]
    given = [torch.tensor([2.0, -8.4]), torch.zeros(0), torch.zeros(1)]
    assert relative_error(given, wanted) == pytest.approx(0.05)
    assert rms_error(given, wanted) == pytest.approx(0.4 / (4 + 64) ** 0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's record of the peak")
def test_peak_memory_counts_what_is_freed_again():
    def work():
        torch.ones(16, 2**20).sum()  # 64 MB
        return torch.ones(2**20)

    peak = peak_bytes(work)
    if peak is None:
        pytest.skip("the system does not let the peak be reset")
    assert 60 * 2**20 < peak < 90 * 2**20
