"""Interval estimates and paired tests for success rates and scores.

Every interval is two-sided. Bootstrap functions draw from their own generator with a fixed default
seed, so that a report made twice is the same report.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from mail_agents.errors import InvalidInputError

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A point estimate and its interval, in the units of what was estimated.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
        spread: Standard deviation over training seeds, when that is what the ends are; None when
            they are a 95 % interval.
    """

    value: float
    low: float
    high: float
    spread: float | None = None


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


def mean_over_seeds(values: ArrayLike) -> Estimate:
    """Mean with the sample standard deviation (n - 1) over training seeds, as papers print it.

    Args:
        values: ``(seeds,)`` one score per training seed, at least two.

    Raises:
        InvalidInputError: There are fewer than two values, or they are not finite.
    """
    data = _finite(values, 1)
    if len(data) < 2:
        raise InvalidInputError("A standard deviation over seeds needs at least two seeds.")
    mean, spread = float(data.mean()), float(data.std(ddof=1))
    return Estimate(mean, mean - spread, mean + spread, spread)


def stratified_bootstrap_mean(
    groups: Sequence[ArrayLike], confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of group means; the bootstrap resamples within each group.

    Args:
        groups: One ``(n,)`` array per group, for example the episodes of each task.
        confidence: Coverage, in (0, 1).
        seed: Of the resampling.

    Raises:
        InvalidInputError: There are no groups, or one is empty or not finite.
    """
    if not groups:
        raise InvalidInputError("A mean over groups needs at least one group.")
    _quantile(confidence)
    generator = np.random.default_rng(seed)
    total, value = np.zeros(_RESAMPLES), 0.0
    for group in groups:
        data = _finite(group, 1)
        picks = generator.integers(0, len(data), (_RESAMPLES, len(data)))
        total += data[picks].mean(axis=1) / len(groups)
        value += float(data.mean()) / len(groups)
    return Estimate(value, *_percentiles(total, confidence))


def performance_profile(
    scores: ArrayLike,
    thresholds: ArrayLike,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of runs that score more than each threshold, with a stratified bootstrap band.

    Args:
        scores: ``(runs, tasks)``, one score per training seed and task.
        thresholds: ``(T,)`` scores.
        confidence: Coverage of the band at each threshold, in (0, 1).
        seed: Of the resampling.
        resamples: Bootstrap resamples.

    Returns:
        Shares, lower and upper ends of the band, each ``(T,)`` in [0, 1].

    Raises:
        InvalidInputError: ``scores`` is empty, not two-dimensional or not finite.

    Source: Agarwal et al. (2021), section 4.2.
    """
    data, levels = _finite(scores, 2), _finite(thresholds, 1)
    _quantile(confidence)
    runs, tasks = data.shape
    above = data[:, :, None] > levels
    picks = np.random.default_rng(seed).integers(0, runs, (resamples, runs, tasks))
    shares = np.zeros((resamples, len(levels)))
    for run in range(runs):  # one run at a time keeps the memory at resamples x tasks x T
        shares += above[picks[:, run], np.arange(tasks)].mean(axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(shares / runs, [tail, 100 - tail], axis=0)
    return above.mean(axis=(0, 1)), low, high


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
        p_value=_binomial_p(only_a, discordant),
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


def _binomial_p(successes: int, n: int) -> float:
    """Exact two-sided p-value of a fair coin."""
    from scipy.stats import binomtest  # imported here: it takes half a second that few runs need

    return float(binomtest(successes, n, 0.5).pvalue) if n else 1.0


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
