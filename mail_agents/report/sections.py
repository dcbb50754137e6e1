"""The sections of the HTML page that show numbers: bars, tables, profiles and curves."""

from collections.abc import Sequence
from html import escape

from mail_agents.report import charts, summary, tables
from mail_agents.report.published import (
    PublishedTable,
    facts,
    foreign_datasets,
    published_rows,
)
from mail_agents.report.results import RunResult, agents_of
from mail_agents.report.settings import averageable, overall_measure, settings_of
from mail_agents.report.tables import MANY_SETTINGS, Rows

_TITLES = {"success": "Success", "score": "Normalised score", "return": "Return"}
_MANY_ROWS, _MANY_COLUMNS, _FEW_COLUMNS = 12, 8, 3
_UNITS = (
    "Scores are normalised returns: 0 is the lower and 100 the upper reference return of the "
    "dataset, listed at the end of this page; they are not clipped. "
)
_SPREAD = (
    "The number after ± is the sample standard deviation over training seeds of the mean over "
    "episodes; brackets hold a 95 % bootstrap interval over the episodes of a single seed. "
)


def scores(results: Sequence[RunResult]) -> str:
    """Bars of every setting; with many settings only their average is open."""
    settings = settings_of(results)
    measure = overall_measure(settings)
    single = [charts.score_panel(results, setting) for setting in settings]
    mean = len(settings) > 1 and averageable(settings)
    first = [charts.score_panel(results, None)] if mean else []
    if measure == "success":
        note = (
            "The line on each bar is the 95 % interval: the range in which the true value "
            "plausibly lies, given this many episodes. Where intervals overlap widely, do not "
            "read a ranking into the bars."
        )
    else:
        note = (
            "The line on each bar is one standard deviation over training seeds to either side; "
            "of a single seed, the 95 % interval over episodes. Where lines overlap widely, do "
            "not read a ranking into the bars."
        )
    if len(settings) > MANY_SETTINGS:
        bars = _panels(first) + _fold(f"Bars of all {summary.noun(settings)}", _panels(single))
    else:
        bars = _panels(first + single)
    return section(f"{_TITLES[measure]} on unseen starts", note, bars)


def _panels(panels: Sequence[str]) -> str:
    return f'<div class="panels">{"".join(panels)}</div>' if panels else ""


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def numbers(results: Sequence[RunResult]) -> str:
    """All scores as tables: an overview where there is more than one, then each checkpoint."""
    settings = settings_of(results)
    names = list(dict.fromkeys(name for run in results for name in run.evaluations))
    overview = len(names) > 1 or len(settings) > MANY_SETTINGS
    blocks = [table(tables.overview_rows(results), results)] if overview else []
    # Of a single setting the overview has said everything.
    for name in () if overview and len(settings) == 1 else names:
        evaluated = [run for run in results if name in run.evaluations]
        rows = table(tables.score_rows(evaluated, name), results)
        if name != "last" and len(settings) > MANY_SETTINGS:
            blocks.append(_fold(f"Checkpoint: {name}", rows))
        else:
            heading = f"<h3>Checkpoint: {escape(name)}</h3>" if len(names) > 1 else ""
            blocks.append(heading + rows)
    if overall_measure(settings) == "success":
        note = (
            "Brackets hold Wilson's 95 % interval. Bold is the best of its setting. Episodes of "
            "different training seeds are pooled; "
        )
    else:
        scored = any(setting.measure == "score" for setting in settings)
        note = (_UNITS if scored else "") + _SPREAD + "Bold is the best of its setting; "
    note += (
        "the interquartile mean (IQM), where shown, resamples seeds within settings for its "
        "95 % interval."
    )
    if "best" in names:
        note += (
            " The best checkpoint was chosen by these same evaluations, which flatters it: compare "
            "the last ones."
        )
    return section("All numbers", note, "".join(blocks))


def targets(results: Sequence[RunResult]) -> str:
    """Scores under every target return, where agents were evaluated under several."""
    rows = tables.target_rows(results)
    if not rows.rows:
        return ""
    note = (
        "Return-conditioned agents were asked for several returns; the tables above show the first "
        "of each list. The best target is picked by the same episodes that give its score, which "
        "flatters it."
    )
    body = table(rows, ())
    many = len(rows.rows) > _MANY_ROWS
    return section("Target returns", note, _fold("Show the table", body) if many else body)


def profile(results: Sequence[RunResult]) -> str:
    """Performance profiles; empty where there are none."""
    panel = charts.profile_panel(results)
    if not panel:
        return ""
    note = (
        "The share of runs (one per setting and seed) that score more than the value below: higher "
        "is better, and a curve that lies above another everywhere is better at every level. Bands "
        "are 95 % bootstrap intervals, for agents with at least three seeds."
    )
    return section("Performance profiles", note, panel)


def published(results: Sequence[RunResult], found: Sequence[PublishedTable]) -> str:
    """Numbers of others on datasets with the same names, apart from ours."""
    settings = settings_of(results)
    blocks = []
    for source in found:
        rows = published_rows(source, settings)
        if rows is not None:
            heading = f'<h3>{escape(source.name)}</h3><p class="note">{escape(facts(source))}</p>'
            blocks.append(heading + table(rows, ()))
    if not blocks:
        return ""
    note = (
        "Not measured here: other simulators, training budgets, seeds and evaluation protocols. "
        "They say what to expect, and do not rank against the tables above."
    )
    others = foreign_datasets(settings)
    if others:
        note += (
            " Of the datasets compared here, these are other recordings on another scale, "
            f"in spite of their names: {', '.join(others)}."
        )
    return section("Published numbers", note, _fold("Show the tables", "".join(blocks)))


def pairs(results: Sequence[RunResult]) -> str:
    """Paired comparisons; empty in a world without success."""
    found = summary.pairs(results)
    if not found:
        return ""
    sentences = "".join(f"<li>{escape(summary.verdict(pair))}</li>" for pair in found if pair.twin)
    note = (
        "Both agents of a pair met exactly the same starts, so only the episodes where they differ "
        "carry information. p is McNemar's exact test, corrected for the number of pairs (Holm); "
        "the interval is the adjusted Wald interval for paired rates and is not corrected. A twin "
        "has a Transformer in place of Mamba; sizes are in the table above. The leader was picked "
        "by these same episodes, which flatters its other comparisons a little."
    )
    body = f'<ul class="verdicts">{sentences}</ul>{table(tables.pair_rows(results), ())}'
    return section("Head to head", note, body)


def starts(results: Sequence[RunResult]) -> str:
    """Which episodes were solved; empty in a world without success."""
    if not summary.is_success(results):
        return ""
    settings = settings_of(results)
    panels = "".join(charts.start_panel(results, setting) for setting in settings)
    note = (
        "One square per evaluation episode, in the same order for every agent, and a line per "
        "training seed: filled is solved, empty is not. A column that is empty throughout is a "
        "start that nobody solved."
    )
    body = f'<div class="panels narrow">{panels}</div>'
    many = len(settings) > MANY_SETTINGS
    return section("Which starts are hard", note, _fold("Show the starts", body) if many else body)


def curves(results: Sequence[RunResult]) -> str:
    """Training curves; empty when no run has one."""
    panels = charts.curve_panels(results)
    if not panels:
        return ""
    note = (
        "Error or loss, as written above each chart, against updates, smoothed; with several "
        "seeds, their mean and range. The action error is the mean squared error to the recorded "
        "actions, the same for all agents of a dataset; a loss means the same only for agents that "
        "minimise the same. A lower curve "
        "is not a better agent, and the curve of one that sees the actions it predicts says "
        "nothing beside others; such an agent is named where this page says how it was measured."
    )
    legend = charts.legend(results) if charts.needs_legend(results) else ""
    body = f'{legend}<div class="curves">{"".join(panels)}</div>'
    many = len(panels) > MANY_SETTINGS
    return section("Training", note, _fold(f"Show {len(panels)} charts", body) if many else body)


def section(heading: str, note: str, body: str) -> str:
    """A box with a heading and a sentence on how to read it."""
    return f'<section><h2>{heading}</h2><p class="note">{escape(note)}</p>{body}</section>'


def table(rows: Rows, results: Sequence[RunResult]) -> str:
    """Renders rows; with ``results``, names of agents carry their colours."""
    tags = {label: i for i, label in enumerate(agents_of(results))} if results else {}

    def key(text: str) -> str:
        if text not in tags:
            return ""
        return f'<span class="key" style="background: var(--a{tags[text]})"></span>'

    head = "".join(f"<th>{key(name)}{escape(name)}</th>" for name in rows.header)
    lines = []
    for i, row in enumerate(rows.rows):
        cells = []
        for j, cell in enumerate(row):
            best = ' class="best"' if (i, j) in rows.best else ""
            cells.append(f"<td{best}>{key(cell) if j == 0 else ''}{_cell(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    columns = len(rows.header)
    width = " dense" if columns > _MANY_COLUMNS else " slim" if columns <= _FEW_COLUMNS else ""
    return (
        f'<div class="scroll"><table class="numbers{width}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(cell: str) -> str:
    """A score with its interval or spread in small print."""
    for mark in (" [", " ± "):
        main, found, rest = cell.partition(mark)
        if found and mark not in rest:
            return f"{escape(main)} <small>{escape(found.strip())}{_rest(mark, rest)}</small>"
    return escape(cell)


def _rest(mark: str, rest: str) -> str:
    return escape(rest if mark == " [" else f" {rest}")
