"""Bars for many runs at a time: how many are done, and how far those are that are running."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from mail_agents.training.runs import read_metrics


class RunsProgress:
    """What is running, as bars on a terminal; nothing elsewhere.

    Args:
        bars: Where to draw, or None.
        total: Number of runs.
        steps: Updates per run.
    """

    def __init__(self, bars: Progress | None, total: int, steps: int) -> None:
        self._bars = bars
        self._steps = steps
        self._overall = None if bars is None else bars.add_task("all runs", total=total)
        self._running: dict[Path, TaskID] = {}

    def begin(self, name: str, run: Path) -> None:
        """Shows a bar for a run that starts; from any thread.

        Args:
            name: For people.
            run: Run directory, whose metrics tell how far it is.
        """
        if self._bars is not None:
            self._running[run] = self._bars.add_task(name, total=self._steps)

    def end(self, run: Path) -> None:
        """Takes the bar away; from any thread."""
        bar = self._running.pop(run, None)
        if self._bars is not None and bar is not None:
            self._bars.remove_task(bar)

    def refresh(self, done: int) -> None:
        """Moves each bar to the last logged step of its run.

        Args:
            done: Runs that have ended.
        """
        if self._bars is None or self._overall is None:
            return
        self._bars.update(self._overall, completed=done)
        for run, bar in list(self._running.items()):
            rows = read_metrics(run)
            if rows and run in self._running:
                self._bars.update(bar, completed=rows[-1]["step"])


@contextmanager
def progress_of_runs(console: Console, total: int, steps: int) -> Iterator[RunsProgress]:
    """Bars on a terminal, while runs go on in other threads.

    Args:
        console: Where to draw.
        total: Number of runs.
        steps: Updates per run.
    """
    if not sys.stdout.isatty():
        yield RunsProgress(None, total, steps)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console) as bars:
        yield RunsProgress(bars, total, steps)
