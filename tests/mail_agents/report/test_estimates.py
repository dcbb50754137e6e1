"""From runs to estimates, and which unit they are in."""

from dataclasses import replace

import numpy as np
import pytest

from mail_agents.errors import InvalidInputError
from mail_agents.report import Reference, RunResult, TaskResult, estimates
from mail_agents.report.settings import averageable, overall_measure, settings_of

TEN = Reference(0.0, 10.0, "test")


def run(returns, dataset="hop", seed=0, task="hop", reference=TEN, success=None, **fields):
    episodes = [
        {"index": i, "seed": i, "success": success, "episode_return": float(x), "length": 5}
        for i, x in enumerate(returns)
    ]
    return RunResult(
        "a", fields.pop("label", "A"), dataset, seed, 10,
        evaluations={"last": [TaskResult(task, episodes)]},
        references={} if reference is None else {task: reference},
        **fields,
    )  # fmt: skip


# ---- settings --------------------------------------------------------------------------------


def test_a_setting_is_a_task_of_a_dataset():
    # Two data sets of one world are two settings, although the task has the same name.
    runs = [run([5], "hop-medium"), run([9], "hop-expert")]
    settings = settings_of(runs)
    assert [(s.dataset, s.task, s.name) for s in settings] == [
        ("hop-medium", "hop", "hop-medium"),
        ("hop-expert", "hop", "hop-expert"),
    ]
    assert [estimates.estimate(runs, s).value for s in settings] == [50, 90]


def test_names_are_short_and_tell_settings_apart(results):
    assert [s.name for s in settings_of(results)] == ["reach", "pick"]
    more = [*results, replace(results[0], dataset="second")]
    names = [s.name for s in settings_of(more)]
    assert names == ["demo: reach", "demo: pick", "second: reach", "second: pick"]


def test_the_unit_follows_from_references_and_success(results):
    assert overall_measure(settings_of(results)) == "success"
    assert overall_measure(settings_of([run([1])])) == "score"
    # References say how the data set wants to be scored, also where success is known.
    assert overall_measure(settings_of([run([1], success=True)])) == "score"
    assert overall_measure(settings_of([run([1], reference=None)])) == "return"
    mixed = settings_of([*results, run([1])])
    assert {s.measure for s in mixed} == {"score"}
    assert estimates.estimate(results[:1], mixed[0]).value == 100  # per cent, like the scores
    assert estimates.estimate(results[:1], mixed[0]).low == pytest.approx(83.9, abs=0.1)
    apart = settings_of([run([1]), run([1], "walk", task="walk", reference=None)])
    assert [s.measure for s in apart] == ["score", "return"]
    assert not averageable(apart)


def test_two_references_for_one_task_are_refused():
    other = run([1], seed=1, reference=Reference(0, 20))
    with pytest.raises(InvalidInputError, match=r"two references: 0 to 10 \(test\) and 0 to 20"):
        settings_of([run([1]), other])
    # A result from before references were stored takes those of the others.
    old = run([1], seed=1, reference=None)
    assert settings_of([old, run([1])])[0].reference == TEN


# ---- estimates -------------------------------------------------------------------------------


def test_spread_is_over_seeds_not_over_episodes():
    runs = [run([0, 10], seed=0), run([4, 8], seed=1), run([6, 8], seed=2)]
    (setting,) = settings_of(runs)
    found = estimates.estimate(runs, setting)
    assert found.value == pytest.approx(60)  # means 50, 60, 70
    assert found.spread == pytest.approx(10)
    single = estimates.estimate(runs[:1], setting)
    assert single.spread is None
    assert (single.low, single.high) == (0, 100)  # bootstrap over its two episodes


def test_an_average_is_over_settings_with_its_spread_over_seeds():
    runs = [
        run([2], "a", 0), run([4], "b", 0),
        run([4], "a", 1), run([8], "b", 1),
    ]  # fmt: skip
    settings = settings_of(runs)
    found = estimates.overall(runs, settings)
    assert found.value == pytest.approx(45)  # 30 and 60
    assert found.spread == pytest.approx(np.std([30, 60], ddof=1))
    assert estimates.score_matrix(runs, settings).tolist() == [[20, 40], [40, 80]]
    one = estimates.overall(runs[:2], settings)
    assert (one.value, one.spread) == (pytest.approx(30), None)


def test_there_is_no_average_of_a_part():
    runs = [run([2], "a", 0), run([4], "b", 0), run([4], "a", 1)]
    settings = settings_of(runs)
    assert estimates.overall(runs, settings) is None
    assert not estimates.is_complete([], settings)
    with pytest.raises(InvalidInputError, match="not evaluated on b with seed 1"):
        estimates.score_matrix(runs, settings)
    returns = [run([2], "a", reference=None), run([4], "b", reference=None)]
    assert estimates.overall(returns, settings_of(returns)) is None


def test_interquartile_mean_needs_three_seeds():
    runs = [run([v], "ab"[d], s) for s in range(3) for d, v in enumerate((s, 10 - s))]
    settings = settings_of(runs)
    found = estimates.interquartile(runs, settings)
    assert found.value == pytest.approx(50)  # of 0 10 20 80 90 100 the middle four
    assert found.low < 50 < found.high
    assert estimates.interquartile(runs[:4], settings) is None


def test_summaries_pool_the_episodes_of_success_rates(results):
    settings = settings_of(results)
    assert estimates.counts(results[:1]) == (35, 40)
    assert estimates.overall(results[:1], settings).value == 35 / 40
    assert estimates.estimate(results[:1], settings[1]).value == 15 / 20
    other = replace(results[0], dataset="elsewhere")
    assert estimates.estimate([other], settings[1]) is None


def test_a_world_without_success_has_no_pairs():
    with pytest.raises(InvalidInputError, match="no success"):
        estimates.compare_paired([run([1])], [run([1])])


def test_pairs_share_seed_task_and_start(results):
    paired = estimates.compare_paired(results[:1], results[1:2])
    assert (paired.n, paired.only_first, paired.only_second) == (40, 10, 0)
    elsewhere = RunResult("x", "X", "d", 7, evaluations=results[1].evaluations)
    with pytest.raises(InvalidInputError, match="share no evaluation episode"):
        estimates.compare_paired(results[:1], [elsewhere])


# ---- targets ---------------------------------------------------------------------------------


def test_best_target():
    def targeted(first, second, seed):
        other = run([second]).evaluations["last"]
        return run([first], seed=seed, target_return=10.0, targets={"5": other})

    runs = [targeted(3, 6, 0), targeted(5, 8, 1)]
    (setting,) = settings_of(runs)
    best, scores = estimates.best_target(runs, setting)
    assert best == "5"
    assert list(scores) == ["10", "5"]
    assert scores["10"].value == pytest.approx(40)
    assert scores["5"].value == pytest.approx(70)
    assert scores["5"].spread == pytest.approx(np.std([60, 80], ddof=1))
    assert estimates.best_target([run([1])], setting) is None
    assert runs[0].by_target().keys() == {"10", "5"}
    assert run([1]).by_target() == {}
