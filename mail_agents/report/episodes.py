"""Every evaluated episode of a comparison as one table, for whoever wants other statistics."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mail_agents.report.results import RunResult
from mail_agents.report.scores import normalised_score
from mail_agents.storage import write_atomic

COLUMNS = (
    *("label", "agent", "dataset", "seed", "step", "task", "target", "episode", "env_seed"),
    *("success", "return", "score", "length"),
)


def write_episodes(path: str | Path, runs: Sequence[tuple[RunResult, Path]]) -> Path:
    """Writes one line per run, evaluated step, task, target return and episode as CSV.

    Other than ``results.json``, which has the last and the best evaluation, this has all of them.
    Empty cells are what does not apply: the step of an agent that was not trained here, the target
    of one that takes none, the success and the score where there is none.

    Args:
        path: File to write; its folder is made.
        runs: Results with the directories they were collected from.

    Raises:
        StorageError: The disk is full or cannot be written to.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for run, directory in runs:
        facts = {"label": run.label, "agent": run.agent, "dataset": run.dataset, "seed": run.seed}
        for step, episode in recorded_episodes(directory):
            writer.writerow({**facts, "step": step, **_row(run, episode)})
    write_atomic(Path(path), text.getvalue().encode())
    return Path(path)


def recorded_episodes(directory: Path) -> Iterator[tuple[int | str, dict[str, Any]]]:
    """Every episode that a run or an evaluation wrote, with its step (empty for an evaluation)."""
    steps: dict[Path, int | str] = {
        folder: int(folder.name.removeprefix("step-"))
        for folder in sorted((directory / "eval").glob("step-*"))
    }
    for folder, step in (steps or {directory: ""}).items():
        # Results of the first target lie in the task's folder, those of others one level below.
        for file in sorted([*folder.glob("*/episodes.jsonl"), *folder.glob("*/*/episodes.jsonl")]):
            for line in file.read_text("utf-8").splitlines():
                yield step, json.loads(line)


def _row(run: RunResult, episode: Mapping[str, Any]) -> dict[str, Any]:
    task, value = str(episode.get("task") or "task"), float(episode["episode_return"])
    reference = run.references.get(task)
    success = episode["success"]
    return {
        "task": task,
        "target": episode.get("target_return"),
        "episode": episode["index"],
        "env_seed": episode["seed"],
        "success": None if success is None else int(success),
        "return": value,
        "score": None if reference is None else float(normalised_score(value, reference)),
        "length": episode["length"],
    }
