"""Interval estimates and paired tests for success rates and scores.

Every interval is two-sided. Bootstrap functions draw from their own generator with a fixed default
seed, so that a report made twice is the same report.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri
from scipy.stats import binomtest

from mail_agents.errors import InvalidInputError
from mail_agents.report.results import RunResult

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A point estimate and its interval, in the units of what was estimated."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedResult:
    """Two agents on the same episodes.

    Attributes:
        both: Episodes that both solved.
        only_first: Episodes that only the first solved.
        only_second: Episodes that only the second solved.
        neither: Episodes that neither solved.
        difference: Success rate of the first minus that of the second, with its interval.
        p_value: Exact McNemar test, two-sided.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    difference: Estimate
    p_value: float

    @property
    def n(self) -> int:
        """Number of shared episodes."""
        return self.both + self.only_first + self.only_second + self.neither


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a success rate.

    Unlike the normal approximation it stays inside [0, 1] and keeps a width at 0 and 100 %.

    Args:
        successes: Successful episodes, in ``0..n``.
        n: Episodes, at least 1.
        confidence: Coverage, in (0, 1).

    Returns:
        The lower and the upper end, in [0, 1].

    Raises:
        InvalidInputError: A count or the confidence is out of range.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    if n < 1 or not 0 <= successes <= n:
        raise InvalidInputError(
            f"Expected 0 <= successes <= n and n >= 1, got {successes} successes of {n}."
        )
    z = _quantile(confidence)
    rate = successes / n
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # At 0 and n the end is the rate itself, up to rounding.
    low = 0.0 if successes == 0 else float(centre - half)
    return low, 1.0 if successes == n else float(centre + half)


def bootstrap_mean(values: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean with a percentile bootstrap interval.

    Args:
        values: ``(n,)`` finite numbers, at least one.
        confidence: Coverage, in (0, 1).
        seed: Of the resampling.

    Raises:
        InvalidInputError: ``values`` is empty, not one-dimensional or not finite.
    """
    data = _finite(values, 1)
    _quantile(confidence)
    picks = np.random.default_rng(seed).integers(0, len(data), (_RESAMPLES, len(data)))
    return Estimate(float(data.mean()), *_percentiles(data[picks].mean(axis=1), confidence))


def iqm(values: ArrayLike) -> float:
    """Interquartile mean: the mean after cutting a quarter of the values from either end.

    The number cut is rounded down.

    Raises:
        InvalidInputError: There are no values, or they are not finite.

    Source: Agarwal et al. (2021), "Deep reinforcement learning at the edge of the statistical
    precipice", section 4.3.
    """
    return float(_iqm(_finite(values).reshape(1, -1))[0])


def stratified_bootstrap_iqm(
    scores: ArrayLike, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Interquartile mean over runs and tasks; the bootstrap resamples the runs of each task.

    Args:
        scores: ``(runs, tasks)``, one score per training seed and task.
        confidence: Coverage, in (0, 1).
        seed: Of the resampling.

    Raises:
        InvalidInputError: ``scores`` is empty, not two-dimensional or not finite.

    Source: Agarwal et al. (2021), section 4.1.
    """
    data = _finite(scores, 2)
    _quantile(confidence)
    runs, tasks = data.shape
    picks = np.random.default_rng(seed).integers(0, runs, (_RESAMPLES, runs, tasks))
    resampled = data[picks, np.arange(tasks)].reshape(_RESAMPLES, -1)
    return Estimate(float(_iqm(data.reshape(1, -1))[0]), *_percentiles(_iqm(resampled), confidence))


def mcnemar_exact(
    first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95
) -> PairedResult:
    """Compares two agents on the same episodes.

    The p-value is the exact binomial test on the episodes where they differ (McNemar). The interval
    of the difference is the adjusted Wald interval, which, unlike a bootstrap, keeps a width when
    the agents never differ.

    Args:
        first: Success of the first agent per episode.
        second: Success of the second agent on the same episodes, in the same order.
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        InvalidInputError: The lengths differ or are zero.

    Source: McNemar (1947); Bonett and Price (2012), "Adjusted Wald confidence interval for a
    difference of binomial proportions based on paired data".
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InvalidInputError(
            f"Expected two equally long lists of outcomes, got shapes {a.shape} and {b.shape}."
        )
    z = _quantile(confidence)
    n = len(a)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    p_a, p_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = z * np.sqrt((p_a + p_b - (p_a - p_b) ** 2) / (n + 2))
    interval = max(-1.0, float(p_a - p_b - half)), min(1.0, float(p_a - p_b + half))
    discordant = only_a + only_b
    return PairedResult(
        both=int((a & b).sum()),
        only_first=only_a,
        only_second=only_b,
        neither=int((~a & ~b).sum()),
        difference=Estimate((only_a - only_b) / n, *interval),
        p_value=float(binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for having made several comparisons.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    highest = 0.0
    for rank, position in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * float(p_values[position])))
        adjusted[position] = highest
    return [float(value) for value in adjusted]


def summarise(runs: Sequence[RunResult], task: str | None = None, which: str = "last") -> Estimate:
    """The score of one agent on a task, or on all of them, over all of its training seeds.

    A success rate gets Wilson's interval over the pooled episodes, a return a bootstrap interval.

    Args:
        runs: The runs of one agent.
        task: One task; None pools the episodes of all tasks.
        which: Name of the evaluation.

    Raises:
        InvalidInputError: No run has such episodes.
    """
    results = [t for run in runs for t in run.tasks(which) if task in (None, t.task)]
    if not results:
        raise InvalidInputError(f"No episodes of task {task!r} in evaluation {which!r}.")
    if all(result.has_success for result in results):
        successes, n = sum(r.successes for r in results), sum(r.n for r in results)
        return Estimate(successes / n, *wilson_interval(successes, n))
    return bootstrap_mean([float(e["episode_return"]) for r in results for e in r.episodes])


def counts(
    runs: Sequence[RunResult], task: str | None = None, which: str = "last"
) -> tuple[int, int]:
    """Successful and all episodes of one agent on a task (None: on all of them)."""
    results = [t for run in runs for t in run.tasks(which) if task in (None, t.task)]
    return sum(r.successes for r in results), sum(r.n for r in results)


def score_matrix(runs: Sequence[RunResult], which: str = "last") -> np.ndarray:
    """``(seeds, tasks)`` scores of one agent, for :func:`stratified_bootstrap_iqm`.

    A task of two datasets counts as two tasks.

    Raises:
        InvalidInputError: The seeds were not evaluated on the same tasks.
    """
    by_seed: dict[int, dict[tuple[str, str], float]] = {}
    for run in runs:
        scores = {(run.dataset, t.task): t.score for t in run.tasks(which)}
        by_seed.setdefault(run.seed, {}).update(scores)
    first, *others = by_seed
    for seed in others:
        differing = by_seed[first].keys() ^ by_seed[seed].keys()
        if differing:
            raise InvalidInputError(
                f"Seeds {first} and {seed} of {runs[0].label!r} were evaluated on different tasks; "
                f"only one has {', '.join(f'{task} ({data})' for data, task in differing)}."
            )
    return np.asarray([[row[key] for key in by_seed[first]] for row in by_seed.values()])


def compare_paired(
    first: Sequence[RunResult], second: Sequence[RunResult], which: str = "last"
) -> PairedResult:
    """Compares two agents on the episodes they share: same dataset, training seed, task and start.

    Raises:
        InvalidInputError: They share no episode, or an episode has no success.
    """
    a, b = _outcomes(first, which), _outcomes(second, which)
    shared = [key for key in a if key in b]
    if not shared:
        raise InvalidInputError(
            f"{first[0].label!r} and {second[0].label!r} share no evaluation episode, so they "
            "cannot be compared in pairs. Evaluate both with the same seeds and episodes."
        )
    return mcnemar_exact([a[key] for key in shared], [b[key] for key in shared])


def _outcomes(runs: Sequence[RunResult], which: str) -> dict[tuple, bool]:
    outcomes = {}
    for run in runs:
        for task in run.tasks(which):
            if not task.has_success:
                raise InvalidInputError(f"Task {task.task!r} has no success to compare in pairs.")
            for episode in task.episodes:
                key = (run.dataset, run.seed, task.task, episode["index"], episode["seed"])
                outcomes[key] = bool(episode["success"])
    return outcomes


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise InvalidInputError(f"Expected a confidence between 0 and 1, got {confidence}.")
    return float(ndtri(0.5 + confidence / 2))


def _finite(values: ArrayLike, dimensions: int | None = None) -> np.ndarray:
    data = np.asarray(values, np.float64)
    if not data.size or (dimensions and data.ndim != dimensions) or not np.isfinite(data).all():
        wanted = f"{dimensions}-dimensional " if dimensions else ""
        raise InvalidInputError(
            f"Expected a non-empty {wanted}array of finite numbers, got shape {data.shape} with "
            f"{int((~np.isfinite(data)).sum())} values that are not finite."
        )
    return data


def _iqm(rows: np.ndarray) -> np.ndarray:
    """Interquartile mean of every row of ``(n, values)``."""
    cut = int(0.25 * rows.shape[1])
    return np.sort(rows, axis=1)[:, cut : rows.shape[1] - cut].mean(axis=1)


def _percentiles(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)
