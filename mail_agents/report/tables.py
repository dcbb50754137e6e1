"""Result tables for a terminal, for Markdown, and as plain rows for other renderers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mail_agents.report import estimates, summary
from mail_agents.report.results import RunResult, agents_of
from mail_agents.report.settings import Measure, Setting, averageable, overall_measure, settings_of
from mail_agents.report.stats import Estimate

#: With more settings than this they become the rows of a table, and the agents its columns.
MANY_SETTINGS = 6
_COSTS = ("parameters", "updates", "training")


@dataclass(frozen=True)
class Rows:
    """A table as text: a header, its rows, and which cells hold the best score of their setting."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()

    def transposed(self, corner: str) -> "Rows":
        """Rows as columns, with another heading for the first one."""
        (_, *header), *rows = zip(self.header, *self.rows, strict=True)
        best = frozenset((column - 1, row + 1) for row, column in self.best)
        return Rows((corner, *header), tuple(rows), best)


@dataclass(frozen=True)
class _Column:
    """A column of scores: its heading, how to get the score of an agent, what stands for none."""

    heading: str
    measure: Measure
    score: Callable[[Sequence[RunResult]], Estimate | None]
    missing: Callable[[Sequence[RunResult]], str] = lambda runs: "not run"

    def cell(self, runs: Sequence[RunResult], found: Estimate | None) -> str:
        if found is None:
            return self.missing(runs)
        return summary.format_score(found, self.measure)


def score_rows(results: Sequence[RunResult], which: str = "last") -> Rows:
    """The score of every agent in every setting and over all of them, and what it cost.

    One row per agent. With three or more training seeds there is also the interquartile mean over
    seeds and settings with its stratified bootstrap interval; fewer have too little spread to
    resample. With more than six settings there is one row per setting instead, which stays
    readable, and what sums up an agent is left to :func:`overview_rows`.

    Args:
        results: Runs evaluated under ``which``.
        which: Name of the evaluation, ``"last"`` or ``"best"``.
    """
    settings = settings_of(results, which)
    groups = agents_of(results)
    columns = [
        _Column(s.name, s.measure, lambda runs, s=s: estimates.estimate(runs, s, which))
        for s in settings
    ]
    if len(settings) > 1 and averageable(settings):
        columns.append(_overall(results, settings, which))
    many = len(settings) > MANY_SETTINGS
    columns += [] if many else _interquartile(results, settings, which)
    costs = ("parameters",) if many else _COSTS
    table = _scores(groups, columns)
    rows = tuple(
        (*row, *cost_cells(runs)[: len(costs)])
        for row, runs in zip(table.rows, groups.values(), strict=True)
    )
    table = Rows((*table.header, *costs), rows, table.best)
    return table.transposed(_corner(settings)) if many else table


def _corner(settings: Sequence[Setting]) -> str:
    return "task" if len({setting.dataset for setting in settings}) == 1 else "dataset"


def overview_rows(results: Sequence[RunResult]) -> Rows:
    """One row per agent: its score over all settings at the last and best checkpoint, and its cost.

    Raw returns of several settings have no common mean; then only the cost is shown.
    """
    settings = settings_of(results)
    groups = agents_of(results)
    columns = []
    if averageable(settings):
        columns.append(_overall(results, settings, "last", "last checkpoint"))
        if any("best" in run.evaluations for run in results):
            columns.append(_overall(results, settings, "best", "best checkpoint"))
    columns += _interquartile(results, settings, "last")
    table = _scores(groups, columns)
    # The number of parameters stands beside the name: a score is read with the size that bought it.
    rows = tuple(
        (row[0], cost[0], *row[1:], *cost[1:])
        for row, cost in zip(table.rows, map(cost_cells, groups.values()), strict=True)
    )
    best = frozenset((row, column + 1) for row, column in table.best)
    return Rows((table.header[0], _COSTS[0], *table.header[1:], *_COSTS[1:]), rows, best)


def main_tables(results: Sequence[RunResult]) -> list[Rows]:
    """The tables that say it all: scores, after an overview where there is more than one per agent.

    That is with further checkpoints or more than six settings; of a single setting the overview has
    said everything.
    """
    settings = settings_of(results)
    several = any(name != "last" for run in results for name in run.evaluations)
    if not several and len(settings) <= MANY_SETTINGS:
        return [score_rows(results)]
    scores = [score_rows(results)] if len(settings) > 1 else []
    return [overview_rows(results), *scores]


def _overall(
    results: Sequence[RunResult],
    settings: Sequence[Setting],
    which: str,
    heading: str = "",
) -> _Column:
    alike = overall_measure(settings) == "success" or len({s.dataset for s in settings}) == 1
    everything = "all tasks" if alike else "average"

    def evaluated(runs: Sequence[RunResult]) -> list[RunResult]:
        return [run for run in runs if which in run.evaluations]

    return _Column(
        heading or everything,
        overall_measure(settings),
        lambda runs: estimates.overall(evaluated(runs), settings, which),
        lambda runs: "incomplete" if evaluated(runs) else "none",
    )


def _interquartile(
    results: Sequence[RunResult], settings: Sequence[Setting], which: str
) -> list[_Column]:
    seeds = max(len({r.seed for r in runs}) for runs in agents_of(results).values())
    if seeds < estimates.SEEDS_FOR_IQM or not averageable(settings):
        return []
    return [
        _Column(
            "IQM over seeds",
            overall_measure(settings),
            lambda runs: estimates.interquartile(runs, settings, which),
            lambda runs: (
                "too few seeds" if estimates.is_complete(runs, settings, which) else "incomplete"
            ),
        )
    ]


def _scores(groups: dict[str, list[RunResult]], columns: Sequence[_Column]) -> Rows:
    """One row per agent; the best value of every column is marked."""
    found = {label: [c.score(runs) for c in columns] for label, runs in groups.items()}
    rows = tuple(
        (label, *(c.cell(groups[label], e) for c, e in zip(columns, row, strict=True)))
        for label, row in found.items()
    )
    best = set()
    for j in range(len(columns)):
        values = [row[j].value if row[j] else None for row in found.values()]  # type: ignore[union-attr]
        top = max((v for v in values if v is not None), default=None)
        best |= {(i, j + 1) for i, v in enumerate(values) if v is not None and v == top}
    return Rows(("agent", *(c.heading for c in columns)), rows, frozenset(best))


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


def target_rows(results: Sequence[RunResult]) -> Rows:
    """One row per setting and return-conditioned agent: its score under every target return.

    Empty when no agent was evaluated under several targets.
    """
    rows = []
    for setting in settings_of(results):
        for label, runs in agents_of(results).items():
            found = estimates.best_target(runs, setting)
            if found is None or len(found[1]) < 2:
                continue
            best, scores = found
            each = [f"{t}: {summary.format_score(e, setting.measure)}" for t, e in scores.items()]
            top = summary.format_score(scores[best], setting.measure)
            rows.append((setting.name, label, ", ".join(each), best, top))
    header = ("setting", "agent", "score by target return", "best target", "score there")
    return Rows(header, tuple(rows))


def cost_cells(runs: Sequence[RunResult]) -> list[str]:
    """Parameters, updates and mean training time of one agent, for people."""
    sizes = sorted({run.parameters for run in runs})
    if not sizes[-1]:
        return ["none", "none", "none"]
    # Observations and actions of different worlds give networks of different sizes.
    size = _span(human(sizes[0]), human(sizes[-1]))
    if not runs[0].train_steps:
        return [size, "ready-made", "ready-made"]
    seconds = sum(run.train_seconds for run in runs) / len(runs)
    return [size, f"{runs[0].train_steps:,}", duration(seconds)]


def _span(low: str, high: str) -> str:
    """``600 to 607 k``, naming a common unit once."""
    if low == high:
        return low
    (number, unit), other = low.partition(" ")[::2], high.partition(" ")[2]
    return f"{number if unit == other else low} to {high}"


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
    """Renders a table as Markdown, the best score of each setting in bold."""
    lines = [_line(table.header), "|" + "---|" * len(table.header)]
    for i, row in enumerate(table.rows):
        lines.append(_line([f"**{c}**" if (i, j) in table.best else c for j, c in enumerate(row)]))
    return "\n".join(lines) + "\n"


def to_rich(table: Rows, title: str = "") -> Table:
    """Renders a table for the terminal, the best score of each setting in bold."""
    rendered = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(table.header):
        first = i == 0
        rendered.add_column(
            name, justify="left" if first else "right", no_wrap=first, overflow="fold"
        )
    for i, row in enumerate(table.rows):
        cells = [f"[bold]{c}[/bold]" if (i, j) in table.best else c for j, c in enumerate(row)]
        # "[89, 99]" is text, not markup.
        rendered.add_row(*(cell.replace(" [", " \\[") for cell in cells))
    return rendered


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
