"""From runs to estimates: the score of an agent in a setting, over all of them, and in pairs."""

from collections.abc import Sequence

import numpy as np

from mail_agents.errors import InvalidInputError
from mail_agents.report import stats
from mail_agents.report.results import RunResult, TaskResult
from mail_agents.report.settings import Setting, averageable, overall_measure
from mail_agents.report.stats import Estimate, PairedResult

#: Training seeds from which an interquartile mean over them has a usable bootstrap interval.
SEEDS_FOR_IQM = 3


def estimate(runs: Sequence[RunResult], setting: Setting, which: str = "last") -> Estimate | None:
    """The score of one agent in one setting, over its training seeds.

    A success rate gets Wilson's interval over the episodes of all seeds. A score or return is the
    mean of the seeds' means, with the standard deviation over seeds; of a single seed, the mean
    with a bootstrap interval over its episodes.

    Args:
        runs: The runs of one agent.
        setting: From :func:`~mail_agents.report.settings.settings_of`.
        which: Name of the evaluation.

    Returns:
        The estimate, or None when the agent was not evaluated there.
    """
    found = [task for run in runs if (task := setting.find(run, which)) is not None]
    return _estimate(found, setting) if found else None


def _estimate(found: Sequence[TaskResult], setting: Setting) -> Estimate:
    """The score of one agent in one setting, from the results of its seeds."""
    if setting.measure == "success":
        return _rate(sum(task.successes for task in found), sum(task.n for task in found))
    if len(found) > 1:
        return stats.mean_over_seeds([setting.values(task).mean() for task in found])
    if setting.measure == "score" and setting.reference is None:
        rate = _rate(found[0].successes, found[0].n)
        return Estimate(100 * rate.value, 100 * rate.low, 100 * rate.high)
    return stats.bootstrap_mean(setting.values(found[0]))


def overall(
    runs: Sequence[RunResult], settings: Sequence[Setting], which: str = "last"
) -> Estimate | None:
    """The score of one agent over all settings.

    Success rates pool the episodes. Scores are averaged over settings, with the standard deviation
    of that average over seeds; of a single seed, with a bootstrap interval that resamples the
    episodes within settings.

    Returns:
        The estimate; None when the agent was not evaluated in every setting with every seed, or
        when the settings have raw returns, of which there is no meaningful mean.
    """
    if len(settings) == 1:
        return estimate(runs, settings[0], which)
    if not averageable(settings) or not is_complete(runs, settings, which):
        return None
    if overall_measure(settings) == "success":
        return _rate(*counts(runs, None, which))
    matrix = score_matrix(runs, settings, which)
    if len(matrix) > 1:
        return stats.mean_over_seeds(matrix.mean(axis=1))
    found = {s: task for s in settings for r in runs if (task := s.find(r, which)) is not None}
    return stats.stratified_bootstrap_mean([s.values(task) for s, task in found.items()])


def interquartile(
    runs: Sequence[RunResult], settings: Sequence[Setting], which: str = "last"
) -> Estimate | None:
    """Interquartile mean over seeds and settings with its stratified bootstrap interval.

    Returns:
        The estimate; None with fewer than three seeds, incomplete runs or raw returns of several
        settings.
    """
    if not averageable(settings) or not is_complete(runs, settings, which):
        return None
    matrix = score_matrix(runs, settings, which)
    return stats.stratified_bootstrap_iqm(matrix) if len(matrix) >= SEEDS_FOR_IQM else None


def is_complete(
    runs: Sequence[RunResult], settings: Sequence[Setting], which: str = "last"
) -> bool:
    """Whether every training seed of an agent was evaluated in every setting."""
    seeds = {run.seed for run in runs}
    done = {
        (run.seed, setting)
        for run in runs
        for setting in settings
        if setting.find(run, which) is not None
    }
    return bool(seeds) and len(done) == len(seeds) * len(settings)


def score_matrix(
    runs: Sequence[RunResult], settings: Sequence[Setting], which: str = "last"
) -> np.ndarray:
    """``(seeds, settings)`` scores of one agent, for the functions of ``stats``.

    Raises:
        InvalidInputError: A seed was not evaluated in every setting.
    """
    rows: dict[int, dict[Setting, float]] = {}
    for run in runs:
        for setting in settings:
            task = setting.find(run, which)
            if task is not None:
                rows.setdefault(run.seed, {})[setting] = float(setting.values(task).mean())
    for seed, row in rows.items():
        missing = [setting.name for setting in settings if setting not in row]
        if missing:
            raise InvalidInputError(
                f"{runs[0].label!r} was not evaluated on {', '.join(missing)} with seed {seed}; an "
                "average over settings needs all of them."
            )
    return np.asarray([[row[setting] for setting in settings] for row in rows.values()])


def counts(
    runs: Sequence[RunResult], setting: Setting | None = None, which: str = "last"
) -> tuple[int, int]:
    """Successful and all episodes of one agent in a setting (None: in all of them)."""
    found = [
        task
        for run in runs
        for task in run.tasks(which)
        if setting is None or (run.dataset, task.task) == (setting.dataset, setting.task)
    ]
    return sum(task.successes for task in found), sum(task.n for task in found)


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
    return stats.mcnemar_exact([a[key] for key in shared], [b[key] for key in shared])


def best_target(
    runs: Sequence[RunResult], setting: Setting
) -> tuple[str, dict[str, Estimate]] | None:
    """The target return with the highest score in a setting, and the score of every target.

    The choice is made on the same episodes that give the score, which flatters it.

    Returns:
        The best target and all scores, in the order of the targets; None for agents without
        targets and where the agent was not evaluated.
    """
    found: dict[str, list[TaskResult]] = {}
    for run in runs:
        # A single target may be the agent's own choice and differ between seeds.
        for target, tasks in run.by_target().items() if run.targets else ():
            here = [task for task in tasks if task.task == setting.task]
            if run.dataset == setting.dataset:
                found.setdefault(target, []).extend(here)
    scores = {target: _estimate(tasks, setting) for target, tasks in found.items() if tasks}
    if not scores:
        return None
    return max(scores, key=lambda target: scores[target].value), scores


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


def _rate(successes: int, n: int) -> Estimate:
    return Estimate(successes / n, *stats.wilson_interval(successes, n))
