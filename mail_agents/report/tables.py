"""Result tables for a terminal, for Markdown, and as plain rows for other renderers."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from mail_agents.report import stats, summary
from mail_agents.report.results import RunResult, agents_of, task_names

_SEEDS = 3


@dataclass(frozen=True)
class Rows:
    """A table as text: a header, its rows, and which cells hold the best score of their column."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()


def score_rows(results: Sequence[RunResult], which: str = "last") -> Rows:
    """One row per agent: score with its 95 % interval on each task and on all of them, and cost.

    With three or more training seeds there is also the interquartile mean over seeds and tasks,
    with its stratified bootstrap interval; fewer have too little spread to resample.

    Args:
        results: Runs evaluated under ``which``.
        which: Name of the evaluation, ``"last"`` or ``"best"``.
    """
    groups = agents_of(results)
    tasks = task_names(results, which)
    success = summary.is_success(results, which)
    seeds = max(len({r.seed for r in runs}) for runs in groups.values()) >= _SEEDS
    header = ["agent", *tasks, *(["all tasks"] if len(tasks) > 1 else [])]
    header += ["IQM over seeds"] * seeds + ["parameters", "updates", "training"]
    rows, values = [], []
    for label, runs in groups.items():
        cells: list[str] = [label]
        scores: list[float | None] = [None]
        for task in [*tasks, *([None] if len(tasks) > 1 else [])]:
            present = task is None or any(t.task == task for run in runs for t in run.tasks(which))
            estimate = stats.summarise(runs, task, which) if present else None
            cells.append(summary.format_score(estimate, success) if estimate else "not run")
            scores.append(estimate.value if estimate else None)
        if seeds:
            if len({run.seed for run in runs}) >= _SEEDS:
                estimate = stats.stratified_bootstrap_iqm(stats.score_matrix(runs, which))
                cells.append(summary.format_score(estimate, success))
            else:
                cells.append("too few seeds")
        cells += cost_cells(runs)
        rows.append(tuple(cells))
        values.append(scores)
    best = set()
    for column in range(1, len(values[0])):
        present = [row[column] for row in values if row[column] is not None]
        best |= {(i, column) for i, row in enumerate(values) if row[column] == max(present)}
    return Rows(tuple(header), tuple(rows), frozenset(best))


def pair_rows(results: Sequence[RunResult], which: str = "last") -> Rows:
    """One row per paired comparison: counts, difference in points with its interval, p-value."""
    rows = []
    for pair in summary.pairs(results, which):
        r, d = pair.result, pair.result.difference
        rows.append(
            (
                f"{pair.first} vs {pair.second}" + (" (twin)" if pair.twin else ""),
                str(r.n),
                str(r.only_first),
                str(r.only_second),
                "{} [{}, {}]".format(*map(summary.format_points, (d.value, d.low, d.high))),
                summary.format_p(pair.adjusted_p).removeprefix("p ").removeprefix("= "),
            )
        )
    header = ("pair", "episodes", "only first", "only second", "difference (points)", "p (Holm)")
    return Rows(header, tuple(rows))


def cost_cells(runs: Sequence[RunResult]) -> list[str]:
    """Parameters, updates and mean training time of one agent, for people."""
    if not runs[0].parameters:
        return ["none", "none", "none"]
    seconds = sum(run.train_seconds for run in runs) / len(runs)
    return [human(runs[0].parameters), f"{runs[0].train_steps:,}", duration(seconds)]


def human(count: int) -> str:
    """Writes 2,345,678 as ``2.35 M``."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def duration(seconds: float) -> str:
    """Writes seconds as ``42 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def to_markdown(table: Rows) -> str:
    """Renders a table as Markdown, the best score of each column in bold."""
    lines = [_line(table.header), "|" + "---|" * len(table.header)]
    for i, row in enumerate(table.rows):
        lines.append(_line([f"**{c}**" if (i, j) in table.best else c for j, c in enumerate(row)]))
    return "\n".join(lines) + "\n"


def to_rich(table: Rows, title: str = "") -> Table:
    """Renders a table for the terminal, the best score of each column in bold."""
    rendered = Table(title=title or None, title_justify="left")
    for i, name in enumerate(table.header):
        rendered.add_column(name, justify="left" if i == 0 else "right")
    for i, row in enumerate(table.rows):
        cells = [f"[bold]{c}[/bold]" if (i, j) in table.best else c for j, c in enumerate(row)]
        # "[89, 99]" is text, not markup.
        rendered.add_row(*(cell.replace(" [", " \\[") for cell in cells))
    return rendered


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
