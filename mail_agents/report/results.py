"""What a comparison is made of: runs, tasks and episodes, as plain data with a JSON form.

Needs neither torch nor a simulator, so that a report can be made again from ``results.json``.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dacite

from mail_agents.data.references import Reference
from mail_agents.errors import CorruptFileError, InvalidInputError
from mail_agents.storage import write_atomic

_FORMAT = "mail-agents-results"
#: 2 added references, target_return and targets, 3 added worlds and notes; older files are read as
#: having none.
_FORMAT_VERSION = 3
_READABLE = (1, 2, 3)
_EPISODE_KEYS = ("index", "seed", "success", "episode_return", "length")


@dataclass(frozen=True)
class TaskResult:
    """The evaluation episodes of one agent on one task.

    Attributes:
        task: Name of the task.
        episodes: One mapping per episode with at least ``index`` (int), ``seed`` (int), ``success``
            (bool, or None in a world without success), ``episode_return`` (float), ``length``
            (steps, int).
    """

    task: str
    episodes: list[dict[str, Any]]

    def __post_init__(self) -> None:
        if not self.episodes:
            raise InvalidInputError(f"Task {self.task!r} has no evaluation episodes.")
        for episode in self.episodes:
            missing = [key for key in _EPISODE_KEYS if key not in episode]
            if missing:
                raise InvalidInputError(
                    f"An episode of task {self.task!r} lacks {', '.join(missing)}; it has "
                    f"{', '.join(map(str, episode)) or 'nothing'}."
                )

    @property
    def has_success(self) -> bool:
        """Whether every episode says if it succeeded."""
        return all(episode["success"] is not None for episode in self.episodes)

    @property
    def n(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    @property
    def successes(self) -> int:
        """Number of successful episodes."""
        return sum(bool(episode["success"]) for episode in self.episodes)

    @property
    def score(self) -> float:
        """Success rate in [0, 1]; the mean return in a world without success."""
        if self.has_success:
            return self.successes / self.n
        return sum(float(episode["episode_return"]) for episode in self.episodes) / self.n


@dataclass(frozen=True)
class Video:
    """A recorded evaluation episode.

    Attributes:
        path: An mp4 file.
        task: Name of the task.
        success: How the episode ended; None in a world without success.
        caption: What to write below, for example ``"episode 3, 71 steps"``.
    """

    path: str
    task: str
    success: bool | None = None
    caption: str = ""


@dataclass(frozen=True)
class RunResult:
    """One agent, trained once (one seed) and evaluated.

    Attributes:
        agent: Registry id, for example ``"mail/ed-ma-ddpm"``.
        label: Name for people, for example ``"ED-Ma DDPM"``.
        dataset: Name of the demonstrations it was trained on.
        seed: Training seed.
        parameters: Number of trainable parameters; 0 for an agent that does not learn.
        train_steps: Optimiser updates.
        train_seconds: Wall-clock time of training.
        curve: ``(step, loss)`` points of the training loss.
        curve_label: Which loss it is; only curves with the same label share axes.
        evaluations: ``"last"`` and, where a metric was declared before the run, ``"best"``, each
            with one result per task.
        config: The agent's configuration.
        videos: Recorded episodes.
        references: What normalises the returns of a task, by task; from the dataset.
        target_return: Return the agent aimed for in ``evaluations``, its own choice where none was
            given; None for an agent without targets.
        targets: The last evaluation under each further target, by target (``"1800"``).
        worlds: Environment that was played, with its simulator where that is known, by task.
        notes: Sentences that a reader must know of this run, such as warnings it was given.
    """

    agent: str
    label: str
    dataset: str
    seed: int
    parameters: int = 0
    train_steps: int = 0
    train_seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    curve_label: str = "training loss"
    evaluations: dict[str, list[TaskResult]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    videos: list[Video] = field(default_factory=list)
    references: dict[str, Reference] = field(default_factory=dict)
    target_return: float | None = None
    targets: dict[str, list[TaskResult]] = field(default_factory=dict)
    worlds: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tasks(self, which: str = "last") -> list[TaskResult]:
        """The task results of one evaluation.

        Raises:
            InvalidInputError: The run was not evaluated under that name.
        """
        if which not in self.evaluations:
            raise InvalidInputError(
                f"Run {self.label!r} (seed {self.seed}) has no evaluation {which!r}; it has: "
                f"{', '.join(self.evaluations) or 'none'}."
            )
        return self.evaluations[which]

    def by_target(self) -> dict[str, list[TaskResult]]:
        """The last evaluation under every target, the headline's first; empty without targets."""
        if self.target_return is None or "last" not in self.evaluations:
            return {}
        return {f"{self.target_return:g}": self.evaluations["last"], **self.targets}


def group_by_task(episodes: Iterable[Any]) -> list[TaskResult]:
    """Groups evaluation episodes by task, in order of first appearance.

    Args:
        episodes: Mappings or dataclass instances (``rollout.EpisodeResult``) with the keys of
            :class:`TaskResult` and ``task``.
    """
    tasks: dict[str, list[dict[str, Any]]] = {}
    for episode in episodes:
        record = dict(episode) if isinstance(episode, Mapping) else dataclasses.asdict(episode)
        tasks.setdefault(str(record.get("task") or "task"), []).append(record)
    return [TaskResult(task, records) for task, records in tasks.items()]


def agents_of(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Groups runs by label, in order of first appearance.

    Raises:
        InvalidInputError: There are no runs, one label stands for two agents, or an agent has two
            runs with one seed on datasets of one name.
    """
    if not results:
        raise InvalidInputError("There are no results to report.")
    groups: dict[str, list[RunResult]] = {}
    for run in results:
        group = groups.setdefault(run.label, [])
        if group and group[0].agent != run.agent:
            raise InvalidInputError(
                f"Label {run.label!r} is used for {group[0].agent!r} and {run.agent!r}. "
                "Give each agent its own label."
            )
        if any((run.dataset, run.seed) == (other.dataset, other.seed) for other in group):
            raise InvalidInputError(
                f"{run.label!r} has two runs on {run.dataset!r} with seed {run.seed}. Runs are "
                "told apart by agent, dataset and seed: give every dataset once, and under a name "
                "of its own."
            )
        group.append(run)
    return groups


def task_names(results: Sequence[RunResult], which: str = "last") -> list[str]:
    """Names of all tasks, in order of first appearance."""
    return list(dict.fromkeys(task.task for run in results for task in run.tasks(which)))


def save_results(path: str | Path, results: Sequence[RunResult]) -> Path:
    """Writes results as JSON; :func:`load_results` reads them back equal.

    Raises:
        InvalidInputError: A configuration or an episode holds something JSON cannot hold.
        StorageError: The disk is full or cannot be written to.
    """
    path = Path(path)
    document = {
        "format": _FORMAT,
        "version": _FORMAT_VERSION,
        "results": [dataclasses.asdict(run) for run in results],
    }
    try:
        text = json.dumps(document, indent=1, default=_plain)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"Results cannot be written to {path}: {error}.") from error
    write_atomic(path, (text + "\n").encode())
    return path


def load_results(path: str | Path) -> list[RunResult]:
    """Reads what :func:`save_results` wrote.

    Raises:
        CorruptFileError: The file is missing, is not such a file, or has unknown fields.
    """
    path = Path(path)
    remedy = "Make it again with scripts/compare.py."
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"Cannot read results from {path}: {error}. {remedy}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise CorruptFileError(f"{path} is not a results file of mail-agents. {remedy}")
    if document.get("version") not in _READABLE:
        raise CorruptFileError(
            f"{path} has results version {document.get('version')}; this release reads versions "
            f"{', '.join(map(str, _READABLE))}. {remedy}"
        )
    # JSON has no tuples: curve points come back as lists.
    config = dacite.Config(strict=True, cast=[tuple])
    try:
        return [dacite.from_dict(RunResult, run, config) for run in document["results"]]
    except (dacite.DaciteError, KeyError, TypeError, AttributeError, InvalidInputError) as error:
        raise CorruptFileError(f"{path} does not hold valid results: {error}. {remedy}") from error


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays, and paths, in JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
