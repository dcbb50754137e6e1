"""What a column of a comparison is: one task of one dataset, and in which unit it is scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mail_agents.data.references import Reference
from mail_agents.errors import InvalidInputError
from mail_agents.report.results import RunResult, TaskResult
from mail_agents.report.scores import normalised_score

#: ``success``: share of solved episodes in [0, 1]. ``score``: normalised return in percent (or the
#: success rate in percent, beside normalised returns). ``return``: raw return.
Measure = Literal["success", "score", "return"]


@dataclass(frozen=True)
class Setting:
    """One task of one dataset.

    Attributes:
        dataset: Name of the dataset that agents were trained on.
        task: Name of the task they were evaluated on.
        name: Short name that tells it from the other settings of the comparison.
        measure: Its unit.
        reference: What normalises its returns, or None.
        world: The environment that was played, as far as results say; differing ones are all named.
    """

    dataset: str
    task: str
    name: str
    measure: Measure
    reference: Reference | None = None
    world: str = ""

    @property
    def scale(self) -> str:
        """The references with where they come from, and the world that was scored by them."""
        played = f", on {self.world}" if self.world else ""
        return "" if self.reference is None else f"{self.reference}{played}"

    def values(self, task: TaskResult) -> NDArray[np.float64]:
        """``(episodes,)`` values in the setting's unit; their mean is the score of the run."""
        return np.asarray([self._value(episode) for episode in task.episodes], np.float64)

    def _value(self, episode: dict[str, Any]) -> float:
        if self.measure == "return":
            return float(episode["episode_return"])
        if self.measure == "success":
            return float(bool(episode["success"]))
        if self.reference is None:
            return 100.0 * bool(episode["success"])
        return float(normalised_score(episode["episode_return"], self.reference))

    def find(self, run: RunResult, which: str = "last") -> TaskResult | None:
        """The run's result in this setting, or None."""
        if run.dataset != self.dataset:
            return None
        return next((t for t in run.evaluations.get(which, ()) if t.task == self.task), None)


def settings_of(results: Sequence[RunResult], which: str = "last") -> list[Setting]:
    """All settings of a comparison, in order of first appearance.

    A setting with references is scored by its normalised return, also where the world reports
    success: references say how the data set wants to be scored. Others are scored by success where
    every episode reports it, else by the raw return.

    Raises:
        InvalidInputError: Two runs bring different references for the same task of a dataset.
    """
    found: dict[tuple[str, str], list[TaskResult]] = {}
    references: dict[tuple[str, str], Reference] = {}
    worlds: dict[tuple[str, str], dict[str, None]] = {}
    for run in results:
        for task in run.tasks(which):
            key = (run.dataset, task.task)
            found.setdefault(key, []).append(task)
            if task.task in run.worlds:
                worlds.setdefault(key, {})[run.worlds[task.task]] = None
            given = run.references.get(task.task)
            if given is not None and references.setdefault(key, given) != given:
                raise InvalidInputError(
                    f"Task {task.task!r} of {run.dataset!r} has two references: {references[key]} "
                    f"and {given}. Runs on different recordings of a dataset cannot be compared."
                )
    solved = {key: all(task.has_success for task in tasks) for key, tasks in found.items()}
    scored = any(key in references for key in found)
    names = _names(list(found), scored)
    return [
        Setting(
            *key,
            names[key],
            _measure(references.get(key), solved[key], scored),
            references.get(key),
            " and ".join(worlds.get(key, ())),
        )
        for key in found
    ]


def _measure(reference: Reference | None, solved: bool, scored: bool) -> Measure:
    if reference is not None:
        return "score"
    if solved:
        return "score" if scored else "success"
    return "return"


def _names(keys: Sequence[tuple[str, str]], scored: bool) -> dict[tuple[str, str], str]:
    """The shortest names that tell settings apart: of datasets, of tasks, or both."""
    datasets = len({dataset for dataset, _ in keys})
    # Scored tasks have many recordings: "hopper-medium" says more than "hopper".
    if datasets == len(keys) and (datasets > 1 or scored):
        return {key: key[0] for key in keys}
    if datasets == 1:
        return {key: key[1] for key in keys}
    return {key: ": ".join(key) for key in keys}


def overall_measure(settings: Sequence[Setting]) -> Measure:
    """The unit in which settings can be averaged; ``"return"`` when they have none in common."""
    first, *others = settings
    alike = all(setting.measure == first.measure for setting in others)
    return first.measure if alike else "return"


def averageable(settings: Sequence[Setting]) -> bool:
    """Whether a mean over the settings says something: raw returns of two worlds have none."""
    return len(settings) == 1 or overall_measure(settings) != "return"


def mean_score(tasks: Sequence[TaskResult], references: Mapping[str, Reference]) -> float:
    """Mean over the tasks of one evaluation, each in its own unit: what picks the best checkpoint.

    Args:
        tasks: Results of one evaluation.
        references: What normalises the returns of a task, by task.
    """
    scored = any(task.task in references for task in tasks)
    means = []
    for task in tasks:
        reference = references.get(task.task)
        measure = _measure(reference, task.has_success, scored)
        means.append(Setting("", task.task, task.task, measure, reference).values(task).mean())
    return float(np.mean(means))
