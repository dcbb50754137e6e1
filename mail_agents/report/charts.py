"""The charts of the HTML page as markup: bars, episode grids and curves that follow its theme."""

from collections.abc import Sequence
from html import escape

import numpy as np

from mail_agents.report import stats, summary
from mail_agents.report.plots import curves
from mail_agents.report.results import RunResult, agents_of, task_names

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 108, 12, 30
_PER_LINE = 25  # episodes per line of the grid of starts


def score_panel(results: Sequence[RunResult], task: str | None, which: str = "last") -> str:
    """Bars with 95 % intervals, one per agent; ``task`` None is over all tasks."""
    success = summary.is_success(results, which)
    groups = agents_of(results)
    found = {}
    for label, runs in groups.items():
        if task is None or any(t.task == task for run in runs for t in run.tasks(which)):
            found[label] = stats.summarise(runs, task, which)
    ends = [0.0, *(x for e in found.values() for x in (e.low, e.high, e.value))]
    low, high = (0.0, 1.0) if success else (min(ends), max(ends))
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return 100 * (value - low) / span

    rows = []
    for i, (label, runs) in enumerate(groups.items()):
        name = f'<span class="name">{escape(label)}</span>'
        if label not in found:
            rows.append(f'<div class="bar">{name}<span>not run</span></div>')
            continue
        e = found[label]
        left, right = sorted((place(0.0), place(e.value)))
        bar = f"left: {left:.2f}%; width: {right - left:.2f}%; background: var(--a{i})"
        line = f"left: {place(e.low):.2f}%; width: {place(e.high) - place(e.low):.2f}%"
        value = summary.format_score(e, success, interval=False)
        if success:
            solved, n = stats.counts(runs, task, which)
            value += f" <small>{solved}/{n}</small>"
        rows.append(
            f'<div class="bar">{name}<span class="track"><span class="fill" style="{bar}"></span>'
            f'<span class="whisker" style="{line}"></span></span>'
            f'<span class="value">{value}</span></div>'
        )
    # Two panels per line: over an even number of tasks the summary takes a line of its own.
    wide = " wide" if task is None and len(task_names(results, which)) % 2 == 0 else ""
    heading = escape(task) if task is not None else "all tasks"
    return f'<div class="panel{wide}"><h3>{heading}</h3>{"".join(rows)}</div>'


def start_panel(results: Sequence[RunResult], task: str, which: str = "last") -> str:
    """One square per episode and agent, filled where the episode was solved."""
    rows = []
    for i, (label, runs) in enumerate(agents_of(results).items()):
        named = False
        for run in runs:
            episodes = [e for t in run.tasks(which) if t.task == task for e in t.episodes]
            if not episodes:
                continue
            squares = []
            for episode in sorted(episodes, key=lambda e: e["index"]):
                solved = bool(episode["success"])
                tip = f"start {episode['index']}: {'solved' if solved else 'failed'}"
                tip += f", {episode['length']} steps"
                hollow = "" if solved else ' class="no"'
                squares.append(f'<i{hollow} title="{tip}" style="background: var(--a{i})"></i>')
            name = f"<small>seed {run.seed}</small>" if named else escape(label)
            named = True
            columns = min(len(squares), _PER_LINE)
            rows.append(
                f'<span class="name">{name}</span>'
                f'<span class="dots" style="--n: {columns}">{"".join(squares)}</span>'
            )
    return (
        f'<div class="panel"><h3>{escape(task)}</h3><div class="starts">{"".join(rows)}</div></div>'
    )


def curve_panels(results: Sequence[RunResult]) -> str:
    """Training curves as SVG, one panel per kind of loss; empty when no run has a curve."""
    order = {label: i for i, label in enumerate(agents_of(results))}
    return "".join(
        f"<div><h3>{escape(name)}</h3>{_curve_panel(lines, order)}</div>"
        for name, lines in curves(results).items()
    )


def _curve_panel(lines: dict[str, tuple[np.ndarray, np.ndarray]], order: dict[str, int]) -> str:
    steps = np.concatenate([grid for grid, _ in lines.values()])
    losses = np.concatenate([values.ravel() for _, values in lines.values()])
    log = bool((losses > 0).all())
    y_low, y_high = _scaled(losses.min(), log), _scaled(losses.max(), log)
    x_low, x_high = float(steps.min()), float(steps.max())

    def x(step: float) -> float:
        return _LEFT + (step - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(loss: float) -> float:
        share = (_scaled(loss, log) - y_low) / ((y_high - y_low) or 1)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in _ticks(float(losses.min()), float(losses.max()), log)
    ]
    base = _HEIGHT - 8
    parts.append(f'<text x="{_LEFT}" y="{base}">{x_low:,.0f}</text>')
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{base}" text-anchor="end">{x_high:,.0f} updates</text>'
    )
    for label, (grid, values) in lines.items():
        colour = f"var(--a{order[label]})"
        if len(values) > 1:
            top = [(x(s), y(v)) for s, v in zip(grid, values.max(axis=0), strict=True)]
            bottom = [(x(s), y(v)) for s, v in zip(grid, values.min(axis=0), strict=True)]
            parts.append(
                f'<polygon points="{_points(top + bottom[::-1])}" style="fill: {colour}" '
                'fill-opacity="0.18"/>'
            )
        mean = [(x(s), y(v)) for s, v in zip(grid, values.mean(axis=0), strict=True)]
        parts.append(
            f'<polyline points="{_points(mean)}" fill="none" style="stroke: {colour}" '
            'stroke-width="2" stroke-linejoin="round"/>'
        )
    parts += _end_labels(
        {k: (x(g[-1]), y(v.mean(axis=0)[-1])) for k, (g, v) in lines.items()}, order
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _end_labels(ends: dict[str, tuple[float, float]], order: dict[str, int]) -> list[str]:
    """Names beside the line ends, lowest first, moved up where they would overlap."""
    parts, ceiling = [], float("inf")
    for label, (_, height) in sorted(ends.items(), key=lambda item: -item[1][1]):
        ceiling = min(height, ceiling - 15)
        parts.append(
            f'<text x="{_WIDTH - _RIGHT + 6}" y="{ceiling + 4:.1f}" '
            f'style="fill: var(--a{order[label]}); font-weight: 600">{escape(label)}</text>'
        )
    return parts


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            found = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
            if len(found) >= 3:
                return found
    raw = (high - low) / 4 or 1.0
    magnitude = 10.0 ** np.floor(np.log10(raw))
    step = next(s * magnitude for s in (1, 2, 5, 10) if s * magnitude >= raw)
    first = np.ceil(low / step)
    return [round(float(first + i) * step, 12) for i in range(5) if (first + i) * step <= high]


def _scaled(value: float, log: bool) -> float:
    return float(np.log10(value)) if log else float(value)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
