"""Training curves and performance profiles as numbers, for the page and the PNG figures alike."""

from collections.abc import Sequence

import numpy as np

from mail_agents.report import estimates, stats
from mail_agents.report.results import RunResult, agents_of
from mail_agents.report.settings import overall_measure, settings_of

#: Runs (settings times seeds) that an agent needs for a profile to have a shape.
_PROFILE_RUNS = 4


def curves(
    results: Sequence[RunResult], points: int = 80
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Training curves on one grid per agent: ``{panel: {label: (steps, losses)}}``.

    Losses share a panel when they have the same ``curve_label`` and come from the same dataset.

    Returns:
        ``steps`` has shape ``(P,)`` with P at most ``points``; ``losses`` has shape ``(seeds, P)``.
        Each loss is the mean of its neighbourhood, so that thinning does not pick lucky batches.
    """
    several = len({run.dataset for run in results}) > 1
    groups: dict[tuple[str, str], list[np.ndarray]] = {}
    for label, runs in agents_of(results).items():
        for run in runs:
            if len(run.curve) > 1:
                panel = f"{run.dataset}, {run.curve_label}" if several else run.curve_label
                groups.setdefault((panel, label), []).append(np.asarray(run.curve, np.float64))
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for (panel, label), lines in groups.items():
        start, end = max(c[0, 0] for c in lines), min(c[-1, 0] for c in lines)
        grid = np.linspace(start, end, min(points, *(len(line) for line in lines)))
        losses = np.stack([_smooth(line, grid) for line in lines])
        panels.setdefault(panel, {})[label] = (grid, losses)
    return panels


def _smooth(curve: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Means of a ``(N, 2)`` curve over windows two grid cells wide, sampled at ``grid``."""
    if len(grid) >= len(curve):
        return np.interp(grid, curve[:, 0], curve[:, 1])
    half = (grid[-1] - grid[0]) / (len(grid) - 1)
    near = np.abs(curve[:, 0] - grid[:, None]) <= half
    return (near @ curve[:, 1]) / near.sum(axis=1)


def profiles(
    results: Sequence[RunResult], points: int = 101
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Performance profiles: the share of runs that score more than each threshold, by agent.

    Only for normalised scores, and for agents evaluated in every setting with every seed, in at
    least four runs.

    Returns:
        Thresholds ``(T,)`` in percent, and by label the share and the ends of its 95 % bootstrap
        band, each ``(T,)`` in [0, 1]. The band of an agent with fewer than three seeds, too few to
        resample, is the profile itself. Without any such agent, nothing.
    """
    settings = settings_of(results)
    matrices = {
        label: estimates.score_matrix(runs, settings)
        for label, runs in agents_of(results).items()
        if overall_measure(settings) == "score" and estimates.is_complete(runs, settings)
    }
    matrices = {label: matrix for label, matrix in matrices.items() if matrix.size >= _PROFILE_RUNS}
    if not matrices:
        return np.empty(0), {}
    top = max(100.0, *(float(matrix.max()) for matrix in matrices.values()))
    low = min(0.0, *(float(matrix.min()) for matrix in matrices.values()))
    grid = np.linspace(low, top, points)
    found = {}
    for label, matrix in matrices.items():
        share, *band = stats.performance_profile(matrix, grid)
        if len(matrix) < estimates.SEEDS_FOR_IQM:
            band = [share, share]
        found[label] = (share, band[0], band[1])
    return grid, found
