"""Figures as PNG: score bars with intervals, performance profiles and training curves.

Colours follow :func:`mail_agents.report.summary.colours`: an agent has one colour everywhere.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mail_agents.report import estimates, summary
from mail_agents.report.curves import curves, profiles
from mail_agents.report.results import RunResult, agents_of
from mail_agents.report.settings import Setting, averageable, overall_measure, settings_of

_INK, _FAINT = "#22262b", "#d5d9de"
_COLUMNS = 4
#: Characters of a heading that fit above a panel, and the height of a further line in inches.
_HEADING, _LINE = 34, 0.17


def success_bars(
    results: Sequence[RunResult], path: str | Path, *, which: str = "last", title: str = ""
) -> Path:
    """Draws a panel per setting with a bar per agent, its interval, and the score beside it.

    Bars are success rates with their 95 % interval, or normalised scores or returns with the
    standard deviation over training seeds (of a single seed, the 95 % interval over episodes).

    Args:
        results: Runs evaluated under ``which``.
        path: PNG file to write; its folder is made.
        which: Name of the evaluation.
        title: Written above the panels.

    Returns:
        The path.
    """
    groups, tints = agents_of(results), summary.colours(results)
    settings = settings_of(results, which)
    success = overall_measure(settings) == "success"
    panels: list[Setting | None] = [*settings]
    if len(settings) > 1 and averageable(settings):
        panels.append(None)
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    everything = "all tasks" if success else "average"
    headings = [_wrapped(everything if each is None else each.name) for each in panels]
    height = 0.42 * len(groups) + 0.75 + _LINE * max(heading.count("\n") for heading in headings)
    figure = _figure(3.1 * columns + 1.2, height * lines + 0.4 * bool(title))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=success)
    for spare in axes.flat[len(panels) :]:
        spare.set_visible(False)
    for position, (setting, ax) in enumerate(zip(panels, axes.flat, strict=False)):
        _bars(ax, groups, tints, setting, settings, which)
        ax.set_title(headings[position], loc="left", fontsize=10, weight="bold", color=_INK)
        labels = list(groups) if position % columns == 0 else [""] * len(groups)
        ax.set_yticks(range(len(groups)), labels, fontsize=9, color=_INK)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
    return _save(figure, path)


def performance_profiles(
    results: Sequence[RunResult], path: str | Path, *, title: str = ""
) -> Path | None:
    """Draws the share of runs that score more than each threshold, with 95 % bootstrap bands.

    Args:
        results: Runs with normalised scores.
        path: PNG file to write; its folder is made.
        title: Written above the panel.

    Returns:
        The path; None, with nothing written, when there are no profiles to draw (see
        :func:`~mail_agents.report.curves.profiles`).
    """
    grid, found = profiles(results)
    if not found:
        return None
    tints = summary.colours(results)
    figure = _figure(7.2, 4.0)
    ax = figure.subplots()
    for label, (share, low, high) in found.items():
        ax.plot(grid, 100 * share, color=tints[label], linewidth=1.8, label=label)
        ax.fill_between(grid, 100 * low, 100 * high, color=tints[label], alpha=0.15, linewidth=0)
    ax.set_xlabel("normalised score", fontsize=9)
    ax.set_title("% of runs that score more", loc="left", fontsize=10, weight="bold", color=_INK)
    ax.set_ylim(0, 102)
    ax.grid(axis="y", color=_FAINT, linewidth=0.6)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _plain_frame(ax)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
    return _save(figure, path)


def learning_curves(results: Sequence[RunResult], path: str | Path, *, title: str = "") -> Path:
    """Draws the training loss against updates: mean over seeds, and the range they span as a band.

    Losses with different ``curve_label`` or of different datasets do not share axes, because their
    sizes cannot be compared.

    Args:
        results: Runs; those without a curve are left out.
        path: PNG file to write; its folder is made.
        title: Written above the panels.

    Returns:
        The path.
    """
    tints = summary.colours(results)
    panels = curves(results)
    columns = max(1, min(len(panels), _COLUMNS))
    lines_of_panels = max(1, -(-len(panels) // columns))
    figure = _figure(4.6 * columns, 3.2 * lines_of_panels)
    axes = list(figure.subplots(lines_of_panels, columns, squeeze=False).flat)
    for spare in axes[max(1, len(panels)) :]:
        spare.set_visible(False)
    for ax, (name, lines) in zip(axes, panels.items(), strict=False):
        for label, (steps, losses) in lines.items():
            mean = losses.mean(axis=0)
            ax.plot(steps, mean, color=tints[label], linewidth=1.8)
            if len(losses) > 1:
                band = losses.min(axis=0), losses.max(axis=0)
                ax.fill_between(steps, *band, color=tints[label], alpha=0.18, linewidth=0)
        if all((losses > 0).all() for _, losses in lines.values()):
            ax.set_yscale("log")
        _label_ends(ax, lines, tints)
        ax.set_xlabel("updates", fontsize=9)
        ax.set_title(name, loc="left", fontsize=10, weight="bold", color=_INK)
        ax.grid(axis="y", color=_FAINT, linewidth=0.6)
        _plain_frame(ax)
    if not panels:
        axes[0].text(0.5, 0.5, "no training curves", ha="center", va="center")
        axes[0].set_axis_off()
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
    return _save(figure, path)


def _bars(
    ax: Axes,
    groups: dict[str, list[RunResult]],
    tints: dict[str, str],
    setting: Setting | None,
    settings: Sequence[Setting],
    which: str,
) -> None:
    measure = overall_measure(settings) if setting is None else setting.measure
    success = measure == "success"
    scale = 100.0 if success else 1.0
    for row, (label, runs) in enumerate(groups.items()):
        if setting is None:
            estimate, missing = estimates.overall(runs, settings, which), " incomplete"
        else:
            estimate, missing = estimates.estimate(runs, setting, which), " not run"
        if estimate is None:
            ax.text(0, row, missing, va="center", fontsize=8, color=_INK)
            continue
        value, low, high = (scale * x for x in (estimate.value, estimate.low, estimate.high))
        ax.barh(row, value, color=tints[label], height=0.62)
        ax.plot([low, high], [row, row], color=_INK, linewidth=1.3, solid_capstyle="butt")
        text = summary.format_score(estimate, measure, interval=False)
        ax.text(max(high, value), row, f" {text}", va="center", fontsize=9, color=_INK)
    ax.invert_yaxis()
    if success:
        ax.set_xlim(0, 122)
        ax.set_xticks([0, 50, 100], ["0", "50", "100 %"])
    else:
        ax.margins(x=0.2)
    ax.grid(axis="x", color=_FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    _plain_frame(ax)
    ax.tick_params(axis="y", length=0)


def _label_ends(ax: Axes, lines: dict, tints: dict[str, str]) -> None:
    """Writes each agent's name at the end of its line, moved apart where they would overlap."""
    ax.margins(x=0.02)
    ax.autoscale_view()
    ends = {label: losses.mean(axis=0)[-1] for label, (_, losses) in lines.items()}
    to_axes = ax.transData + ax.transAxes.inverted()
    steps = {label: grid[-1] for label, (grid, _) in lines.items()}
    height = {name: to_axes.transform((steps[name], y))[1] for name, y in ends.items()}
    floor = -np.inf
    for label in sorted(height, key=height.__getitem__):
        floor = max(height[label], floor + 0.075)
        ax.text(
            1.01, floor, label, transform=ax.transAxes, color=tints[label], fontsize=9, va="center"
        )


def _plain_frame(ax: Axes) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(_FAINT)
    ax.tick_params(labelsize=8, colors=_INK)


def _wrapped(heading: str) -> str:
    """Breaks a name like LIBERO's, of sixty letters and more, between its words."""
    lines = [""]
    for word in re.findall(r"[^ _/-]*[ _/-]|[^ _/-]+", heading):
        if lines[-1] and len(lines[-1]) + len(word) > _HEADING:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def _figure(width: float, height: float) -> Figure:
    # No pyplot: it keeps global state and may look for a display.
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return path
