"""The table at the end of a run."""

import io

from rich.console import Console

from mail_agents.data.references import Reference
from mail_agents.report.results import RunResult, TaskResult
from mail_agents.training.task_report import task_rows, task_table


def task(name, outcomes, returns=None):
    returns = returns or [float(bool(o)) for o in outcomes]
    episodes = [
        {"index": i, "seed": i, "success": o, "episode_return": r, "length": 10 * (i + 1)}
        for i, (o, r) in enumerate(zip(outcomes, returns, strict=True))
    ]
    return TaskResult(name, episodes)


def run(*tasks, **options):
    return RunResult("mail/d-ma-bc", "x", "data", 0, evaluations={"last": list(tasks)}, **options)


def test_every_task_has_its_rate_and_interval_and_the_last_row_is_their_mean():
    table = task_rows(run(task("lift", [True, True]), task("stack", [True, False])))
    # Wilson: 2 of 2 is [34, 100], 1 of 2 is [9, 91], 3 of 4 is [30, 95].
    assert table.rows == (
        ("lift", "100 % [34, 100]", "2 of 2", "15"),
        ("stack", "50 % [9, 91]", "1 of 2", "15"),
        ("all tasks", "75 % [30, 95]", "3 of 4", "15"),
    )


def test_on_a_narrow_terminal_only_names_are_broken():
    name = "_".join(["pick_up_the_milk_and_place_it"] * 3)
    console = Console(width=70, file=io.StringIO())
    console.print(task_table(run(task(name, [True, False])), "the title"))
    text = console.file.getvalue()
    assert "50 % [9, 91]" in text
    assert "score, 95 % interval" in text
    assert name not in text
    assert name[:20] in text


def test_one_task_needs_no_mean():
    assert len(task_rows(run(task("lift", [True]))).rows) == 1


def test_returns_of_different_worlds_have_no_mean_and_scores_do():
    worlds = task("a", [None, None], [1.0, 3.0]), task("b", [None, None], [5.0, 5.0])
    rows = task_rows(run(*worlds)).rows
    assert [row[0] for row in rows] == ["a", "b"]
    assert rows[0][1].startswith("2.0 [")
    assert rows[0][2] == "unknown"
    references = {name: Reference(0.0, 10.0) for name in "ab"}
    rows = task_rows(run(*worlds, references=references)).rows
    assert rows[2][0] == "all tasks"
    assert rows[2][1].startswith("35.0 [")
    assert rows[2][2] == "unknown"
