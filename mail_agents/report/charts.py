"""The charts of the HTML page as markup: bars, episode grids and curves that follow its theme."""

from collections.abc import Sequence
from html import escape

import numpy as np

from mail_agents.report import estimates, summary
from mail_agents.report.curves import curves, profiles
from mail_agents.report.results import RunResult, agents_of
from mail_agents.report.settings import Measure, Setting, overall_measure, settings_of
from mail_agents.report.stats import Estimate

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 108, 12, 30
_PER_LINE = 25  # episodes per line of the grid of starts
#: With more agents than this, names at the ends of lines overlap and a legend takes their place.
_MOST_LABELS = 5


def score_panel(results: Sequence[RunResult], setting: Setting | None, which: str = "last") -> str:
    """Bars with intervals, one per agent; ``setting`` None is over all settings."""
    settings = settings_of(results, which)
    measure = overall_measure(settings) if setting is None else setting.measure
    groups = agents_of(results)
    found: dict[str, Estimate | None] = {
        label: estimates.overall(runs, settings, which)
        if setting is None
        else estimates.estimate(runs, setting, which)
        for label, runs in groups.items()
    }
    low, high = _range([e for e in found.values() if e is not None], measure)

    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    rows = []
    for i, (label, runs) in enumerate(groups.items()):
        name = f'<span class="name">{escape(label)}</span>'
        e = found[label]
        if e is None:
            missing = "incomplete" if setting is None else "not run"
            rows.append(f'<div class="bar">{name}<span>{missing}</span></div>')
            continue
        left, right = sorted((place(0.0), place(e.value)))
        bar = f"left: {left:.2f}%; width: {right - left:.2f}%; background: var(--a{i})"
        line = f"left: {place(e.low):.2f}%; width: {place(e.high) - place(e.low):.2f}%"
        value = summary.format_score(e, measure, interval=False)
        if measure == "success":
            solved, n = estimates.counts(runs, setting, which)
            value += f" <small>{solved}/{n}</small>"
        rows.append(
            f'<div class="bar">{name}<span class="track"><span class="fill" style="{bar}"></span>'
            f'<span class="whisker" style="{line}"></span></span>'
            f'<span class="value">{value}</span></div>'
        )
    # Two panels per line: over an even number of settings the summary takes a line of its own.
    wide = " wide" if setting is None and len(settings) % 2 == 0 else ""
    everything = "all tasks" if measure == "success" else "average"
    heading = everything if setting is None else escape(setting.name)
    return f'<div class="panel{wide}"><h3>{heading}</h3>{"".join(rows)}</div>'


def _range(found: Sequence[Estimate], measure: Measure) -> tuple[float, float]:
    """Ends of an axis that holds zero, every interval and, for scores, the upper reference."""
    if measure == "success":
        return 0.0, 1.0
    ends = [0.0, *(x for e in found for x in (e.low, e.high, e.value))]
    if measure == "score":
        ends.append(100.0)
    low, high = min(ends), max(ends)
    return low, high if high > low else low + 1.0


def start_panel(results: Sequence[RunResult], setting: Setting, which: str = "last") -> str:
    """One square per episode and agent, filled where the episode was solved."""
    rows = []
    for i, (label, runs) in enumerate(agents_of(results).items()):
        named = False
        for run in runs:
            task = setting.find(run, which)
            if task is None:
                continue
            squares = []
            for episode in sorted(task.episodes, key=lambda e: e["index"]):
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
    heading = f"<h3>{escape(setting.name)}</h3>"
    return f'<div class="panel">{heading}<div class="starts">{"".join(rows)}</div></div>'


def curve_panels(results: Sequence[RunResult]) -> list[str]:
    """Training curves as SVG, one panel per dataset and kind of loss; none without curves."""
    order = {label: i for i, label in enumerate(agents_of(results))}
    return [
        f"<div><h3>{escape(name)}</h3>{_curve_panel(lines, order)}</div>"
        for name, lines in curves(results).items()
    ]


def profile_panel(results: Sequence[RunResult]) -> str:
    """Performance profiles as SVG with a legend; empty where there are none."""
    grid, found = profiles(results)
    if not found:
        return ""
    order = {label: i for i, label in enumerate(agents_of(results))}
    axes = _Axes((grid[0], grid[-1]), (0.0, 1.0), labels=False)
    parts = axes.grid([0.0, 0.25, 0.5, 0.75, 1.0], "{:.0%}")
    ticks = _ticks(float(grid[0]), float(grid[-1]), False)
    parts += [axes.below(tick, f"{tick:g}", "middle") for tick in ticks]
    for label, (share, low, high) in found.items():
        parts += axes.line(order[label], grid, share, low, high)
    return f'{legend(results, list(found))}<div class="profile">{axes.svg(parts)}</div>'


def legend(results: Sequence[RunResult], shown: Sequence[str] | None = None) -> str:
    """The agents (those ``shown``; None: all) with their colours."""
    names = "".join(
        f'<span><span class="key" style="background: var(--a{i})"></span>{escape(label)}</span>'
        for i, label in enumerate(agents_of(results))
        if shown is None or label in shown
    )
    return f'<p class="legend">{names}</p>'


def needs_legend(results: Sequence[RunResult]) -> bool:
    """Whether there are too many agents to name them at the ends of their lines."""
    return len(agents_of(results)) > _MOST_LABELS


class _Axes:
    """A coordinate system of an SVG chart: ``x`` and ``y`` in data units, ``y`` perhaps as log."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        log: bool = False,
        labels: bool = True,
    ) -> None:
        self.log = log
        self.x_low, self.x_high = x_range
        self.y_low, self.y_high = (_scaled(y, log) for y in y_range)
        self.right = _WIDTH - (_RIGHT if labels else 16)

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1)
        return _LEFT + share * (self.right - _LEFT)

    def y(self, value: float) -> float:
        share = (_scaled(value, self.log) - self.y_low) / ((self.y_high - self.y_low) or 1)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def grid(self, ticks: Sequence[float], form: str) -> list[str]:
        return [
            f'<line class="grid" x1="{_LEFT}" x2="{self.right}" y1="{self.y(t):.1f}" '
            f'y2="{self.y(t):.1f}"/><text x="{_LEFT - 8}" y="{self.y(t) + 4:.1f}" '
            f'text-anchor="end">{form.format(t)}</text>'
            for t in ticks
        ]

    def below(self, value: float, text: str, anchor: str) -> str:
        x, y = self.x(value), _HEIGHT - 8
        return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{text}</text>'

    def line(
        self, agent: int, xs: np.ndarray, middle: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> list[str]:
        """A line, within a band where its ends differ."""
        colour = f"var(--a{agent})"
        parts = []
        if not np.array_equal(low, high):
            top = [(self.x(x), self.y(y)) for x, y in zip(xs, high, strict=True)]
            bottom = [(self.x(x), self.y(y)) for x, y in zip(xs, low, strict=True)]
            parts.append(
                f'<polygon points="{_points(top + bottom[::-1])}" style="fill: {colour}" '
                'fill-opacity="0.15"/>'
            )
        points = [(self.x(x), self.y(y)) for x, y in zip(xs, middle, strict=True)]
        parts.append(
            f'<polyline points="{_points(points)}" fill="none" style="stroke: {colour}" '
            'stroke-width="2" stroke-linejoin="round"/>'
        )
        return parts

    def svg(self, parts: Sequence[str]) -> str:
        return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _curve_panel(lines: dict[str, tuple[np.ndarray, np.ndarray]], order: dict[str, int]) -> str:
    steps = np.concatenate([grid for grid, _ in lines.values()])
    losses = np.concatenate([values.ravel() for _, values in lines.values()])
    low, high = float(losses.min()), float(losses.max())
    log = low > 0
    first, last = float(steps.min()), float(steps.max())
    named = len(order) <= _MOST_LABELS
    axes = _Axes((first, last), (low, high), log=log, labels=named)
    parts = axes.grid(_ticks(low, high, log), "{:g}")
    parts += [axes.below(first, f"{first:,.0f}", "start")]
    parts += [axes.below(last, f"{last:,.0f} updates", "end")]
    for label, (grid, values) in lines.items():
        band = values.min(axis=0), values.max(axis=0)
        parts += axes.line(order[label], grid, values.mean(axis=0), *band)
    if named:
        ends = {k: axes.y(v.mean(axis=0)[-1]) for k, (_, v) in lines.items()}
        parts += _end_labels(ends, order)
    return axes.svg(parts)


def _end_labels(ends: dict[str, float], order: dict[str, int]) -> list[str]:
    """Names beside the line ends, lowest first, moved up where they would overlap."""
    parts, ceiling = [], float("inf")
    for label, height in sorted(ends.items(), key=lambda item: -item[1]):
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
