"""The subject ``loader``: the share of a training step that is spent waiting for a batch."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mail_agents
from mail_agents.agent import Agent
from mail_agents.benchmarks.arguments import Loader
from mail_agents.benchmarks.charts import Chart
from mail_agents.benchmarks.report import Bar, Report, Table
from mail_agents.data import BatchSampler, Episode
from mail_agents.data.prefetch import Prefetcher
from mail_agents.data.store import StoreDataset, open_dataset, write_dataset
from mail_agents.data.views import StepView
from mail_agents.errors import InvalidInputError
from mail_agents.training.distributed import Team
from mail_agents.training.session import reading_ahead
from mail_agents.training.step import gradients

HEADER = ("history", "batches", "wait", "step", "share of waiting", "at whole batches")
_LABELS = {"on_demand": "on demand", "ahead": "read ahead"}


def check(arguments: Loader) -> None:
    """Refuses counts that measure nothing.

    Raises:
        InvalidInputError: A count is below 1, or more rows are asked for than a batch has.
    """
    for name in ("rows", "rounds", "batch_size", "episodes", "length", "threads"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise InvalidInputError(f"--{flag} starts at 1; got {getattr(arguments, name)}.")
    if arguments.rows > arguments.batch_size:
        raise InvalidInputError(
            f"--rows {arguments.rows} are more than a batch has (--batch-size "
            f"{arguments.batch_size})."
        )


def opened_cold(folder: Path) -> StoreDataset:
    """Opens the store when the system has been asked to forget it.

    It keeps what is still in use, so that whoever opened it before must have let go of it.
    """
    drop_cache(folder)
    return open_dataset(folder)


def drop_cache(folder: Path) -> None:
    """Asks the system to forget files that were just written or read."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_store(arguments: Loader, folder: Path) -> StoreDataset:
    """Noise in LIBERO's layout: two cameras and 7 actions."""
    rng = np.random.default_rng(arguments.seed)
    shape = (arguments.length + 1, arguments.image_size, arguments.image_size, 3)

    def episode() -> Episode:
        keys = ("agentview_rgb", "eye_in_hand_rgb")
        frames = {key: rng.integers(0, 256, shape, dtype=np.uint8) for key in keys}
        actions = rng.normal(size=(arguments.length, 7)).astype(np.float32)
        rewards, never = np.zeros(arguments.length), np.zeros(arguments.length, bool)
        return Episode(frames, actions, rewards, never, never, task="lift")

    return write_dataset(folder, (episode() for _ in range(arguments.episodes)))


def train(agent: Agent, batches: Prefetcher, arguments: Loader) -> tuple[list[float], list[float]]:
    """Seconds of waiting for a batch, and of training on its first rows, step by step."""
    waits, works, team = [], [], Team()
    for _ in range(arguments.rounds + 1):
        began = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        gradients(agent, _first_rows(batch, arguments.rows), team)
        agent.apply_gradients()
        if agent.device.type == "cuda":
            torch.cuda.synchronize()
        waits.append(ready - began)
        works.append(time.perf_counter() - ready)
    return waits[1:], works[1:]


def _first_rows(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    return {key: value[:rows] for key, value in batch.items()}


def delivered(windows: StepView, arguments: Loader) -> float:
    """Windows per second that the store delivers when nothing else is done."""
    sampler = BatchSampler(len(windows), arguments.batch_size, arguments.seed)
    windows[next(sampler)]
    began, count = time.perf_counter(), 0
    for _ in range(arguments.rounds):
        count += len(windows[next(sampler)]["action"])
    return count / (time.perf_counter() - began)


def timed(
    agent: Agent, windows: StepView, arguments: Loader, ahead: bool
) -> tuple[list[float], list[float]]:
    """Like :func:`train`, with batches read ahead or when they are needed."""
    sampler = BatchSampler(len(windows), arguments.batch_size, arguments.seed)
    opened = (
        reading_ahead(agent, windows, sampler) if ahead else Prefetcher(windows, sampler, ahead=0)
    )
    with opened as batches:
        return train(agent, batches, arguments)


def measure(arguments: Loader, store: StoreDataset, history: int) -> dict[str, float]:
    """All figures for one length of history."""
    agent = mail_agents.make(
        arguments.agent,
        store.features,
        device=arguments.device,
        seed=arguments.seed,
        history=history,
    )
    agent.fit_statistics(store)
    agent.configure_optim(4 * arguments.rounds)
    agent.policy.train()
    spec = agent.window_spec
    speed = delivered(opened_cold(store.path).windows(spec), arguments)
    figures = {"history": float(history), "windows_per_second": speed}
    for name in _LABELS:
        windows = opened_cold(store.path).windows(spec)
        waits, works = timed(agent, windows, arguments, name == "ahead")
        wait, work = float(np.mean(waits)), float(np.mean(works))
        whole = work * arguments.batch_size / arguments.rows
        figures |= {
            f"{name}_wait_seconds": wait,
            f"{name}_step_seconds": work,
            f"{name}_share": wait / (wait + work),
            f"{name}_share_of_whole_batches": wait / (wait + whole),
        }
    return figures


def run(arguments: Loader) -> Report:
    """Measures every length of history."""
    check(arguments)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(arguments, Path(folder) / "store")
        found = [measure(arguments, store, history) for history in arguments.histories]
    conditions = f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.device}"
    report = Report("loader", dataclasses.asdict(arguments), conditions)
    rows = tuple(_row(row, *each) for row in found for each in _LABELS.items())
    title = (
        f"Waiting for batches of {arguments.batch_size}, training on {arguments.rows} windows of "
        "each"
    )
    report.tables.append(Table("loader", title, HEADER, rows))
    for row in found:
        rate = f"{row['windows_per_second']:,.0f} windows/s"
        report.notes.append(f"history {row['history']:.0f}: the store delivers {rate}")
    report.notes.append("the store was just written, and dropped from the page cache if possible")
    worst = max(row["ahead_share"] for row in found)
    report.bars.append(Bar("largest share with reading ahead", worst, arguments.bar, True))
    panels = {
        f"history {row['history']:.0f}": {
            label: 100 * row[f"{name}_share"] for name, label in _LABELS.items()
        }
        for row in found
    }
    report.charts.append(Chart("Waiting for data", "% of a step", panels, ours=("read ahead",)))
    report.figures = {"rows": found, "worst": worst}
    return report


def _row(row: Mapping[str, float], name: str, label: str) -> tuple[str, ...]:
    return (
        f"{row['history']:.0f}",
        label,
        f"{1000 * row[f'{name}_wait_seconds']:.2f} ms",
        f"{row[f'{name}_step_seconds']:.2f} s",
        f"{100 * row[f'{name}_share']:.2f} %",
        f"{100 * row[f'{name}_share_of_whole_batches']:.3f} %",
    )
