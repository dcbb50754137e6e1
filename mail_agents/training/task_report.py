"""What one run achieved, task by task."""

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mail_agents.report import estimates, summary
from mail_agents.report.results import RunResult
from mail_agents.report.settings import averageable, overall_measure, settings_of
from mail_agents.report.tables import Rows


def task_rows(run: RunResult, which: str = "last") -> Rows:
    """One row per task, and one over all of them where a mean says something.

    Args:
        run: Evaluated under ``which``.
        which: Name of the evaluation.

    Returns:
        Task, score with its 95 % interval (success rate, normalised score or return), episodes
        solved, mean length of an episode. The last row is the mean of the tasks.
    """
    settings = settings_of([run], which)
    rows = []
    for setting, task in zip(settings, run.tasks(which), strict=True):
        found = estimates.estimate([run], setting, which)
        assert found is not None  # settings are those of this run
        solved = f"{task.successes} of {task.n}" if task.has_success else "unknown"
        steps = np.mean([episode["length"] for episode in task.episodes])
        score = summary.format_score(found, setting.measure)
        rows.append((task.task, score, solved, f"{steps:.0f}"))
    if len(settings) > 1 and averageable(settings):
        total = estimates.overall([run], settings, which)
        assert total is not None
        tasks = run.tasks(which)
        score = summary.format_score(total, overall_measure(settings))
        solved = f"{sum(t.successes for t in tasks)} of {sum(t.n for t in tasks)}"
        known = all(task.has_success for task in tasks)
        steps = np.mean([e["length"] for task in tasks for e in task.episodes])
        rows.append(("all tasks", score, solved if known else "unknown", f"{steps:.0f}"))
    return Rows(("task", "score, 95 % interval", "solved", "mean steps"), tuple(rows))


def task_table(run: RunResult, title: str) -> Table:
    """:func:`task_rows` of the last evaluation for a terminal.

    Tasks come last: names of LIBERO's fill a line, and only they may be broken.
    """
    rows = task_rows(run)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in rows.header[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(rows.header[0], overflow="fold")
    for task, *cells in rows.rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in cells), task)
    return table
