"""Does training wait for data? The share of a training step that is spent waiting for a batch.

    python scripts/benchmark_loader.py --threads 2
    python scripts/benchmark_loader.py --device cuda --rows 256 --output runs/loader.json

Writes episodes with two cameras of 128 pixels to a store in a temporary folder, and trains MaIL's
ED-Ma with diffusion on it: batches of the paper's 256 windows, with a history of 1 and of 5 frames.
Every batch is read whole, but on a CPU a step on 256 windows takes minutes, so the network trains
on the first --rows of them only. That makes steps shorter and thus waiting look larger: the share
it prints is an upper bound of that of whole batches, which it estimates beside it. Each step is
timed with batches gathered when they are needed and with batches read ahead by a thread. The share
with reading ahead is expected to stay below 5 %; the script exits with status 1 when it does not
(--bar). Also measured: windows per second that the store can deliver. The store is dropped from the
page cache before each measurement, as far as the system does so on request; what a measurement
reads twice comes from memory the second time.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import mail_agents
from mail_agents.agent import Agent
from mail_agents.data import BatchSampler, Episode
from mail_agents.data.prefetch import Prefetcher
from mail_agents.data.store import StoreDataset, open_dataset, write_dataset
from mail_agents.data.views import StepView
from mail_agents.errors import InvalidInputError, MailAgentsError
from mail_agents.training.distributed import Team
from mail_agents.training.session import reading_ahead
from mail_agents.training.step import gradients


@dataclass(frozen=True)
class Args:
    """Benchmark of waiting for data while training."""

    agent: str = "mail/ed-ma-ddpm"
    """What is trained."""
    histories: tuple[int, ...] = (1, 5)
    """Frames of each camera in a window, one measurement each."""
    batch_size: int = 256
    """Windows per batch; the paper's value."""
    rows: int = 16
    """Windows of each batch that the network trains on."""
    steps: int = 5
    """Timed steps, after one that is not."""
    episodes: int = 20
    """Demonstrations in the store."""
    length: int = 150
    """Steps of each."""
    image_size: int = 128
    """Height and width of both cameras, in pixels."""
    device: str = "cpu"
    """'cpu' or 'cuda'."""
    threads: int = 1
    """Threads of torch."""
    seed: int = 0
    """Seed of the data, the order and the network."""
    bar: float = 0.05
    """Largest acceptable share of waiting."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="JSON")] = None
    """Where to write the figures, or nothing."""


def check(args: Args) -> None:
    """Refuses counts that measure nothing."""
    for name in ("rows", "steps", "batch_size", "episodes", "length", "threads"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise InvalidInputError(f"--{flag} starts at 1; got {getattr(args, name)}.")
    if args.rows > args.batch_size:
        raise InvalidInputError(
            f"--rows {args.rows} are more than a batch has (--batch-size {args.batch_size})."
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


def write_store(args: Args, folder: Path) -> StoreDataset:
    """Noise in LIBERO's layout: two cameras and 7 actions."""
    rng = np.random.default_rng(args.seed)
    shape = (args.length + 1, args.image_size, args.image_size, 3)

    def episode() -> Episode:
        keys = ("agentview_rgb", "eye_in_hand_rgb")
        frames = {key: rng.integers(0, 256, shape, dtype=np.uint8) for key in keys}
        actions = rng.normal(size=(args.length, 7)).astype(np.float32)
        rewards, never = np.zeros(args.length), np.zeros(args.length, bool)
        return Episode(frames, actions, rewards, never, never, task="lift")

    return write_dataset(folder, (episode() for _ in range(args.episodes)))


def train(
    agent: Agent, batches: Prefetcher, args: Args, steps: int
) -> tuple[list[float], list[float]]:
    """Seconds of waiting for a batch, and of training on its first rows, step by step."""
    waits, works, team = [], [], Team()
    for _ in range(steps + 1):
        began = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        gradients(agent, _first_rows(batch, args.rows), team)
        agent.apply_gradients()
        if agent.device.type == "cuda":
            torch.cuda.synchronize()
        waits.append(ready - began)
        works.append(time.perf_counter() - ready)
    return waits[1:], works[1:]


def _first_rows(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    return {key: value[:rows] for key, value in batch.items()}


def delivered(windows: StepView, args: Args) -> float:
    """Windows per second that the store delivers when nothing else is done."""
    sampler = BatchSampler(len(windows), args.batch_size, args.seed)
    windows[next(sampler)]
    began, count = time.perf_counter(), 0
    for _ in range(args.steps):
        count += len(windows[next(sampler)]["action"])
    return count / (time.perf_counter() - began)


def timed(
    agent: Agent, windows: StepView, args: Args, ahead: bool
) -> tuple[list[float], list[float]]:
    """Like :func:`train`, with batches read ahead or when they are needed."""
    sampler = BatchSampler(len(windows), args.batch_size, args.seed)
    opened = (
        reading_ahead(agent, windows, sampler) if ahead else Prefetcher(windows, sampler, ahead=0)
    )
    with opened as batches:
        return train(agent, batches, args, args.steps)


def measure(args: Args, store: StoreDataset, history: int) -> dict[str, float]:
    """All figures for one length of history."""
    agent = mail_agents.make(
        args.agent, store.features, device=args.device, seed=args.seed, history=history
    )
    agent.fit_statistics(store)
    agent.configure_optim(4 * args.steps)
    agent.policy.train()
    spec = agent.window_spec
    speed = delivered(opened_cold(store.path).windows(spec), args)
    figures = {"history": float(history), "windows_per_second": speed}
    for name in ("on_demand", "ahead"):
        waits, works = timed(agent, opened_cold(store.path).windows(spec), args, name == "ahead")
        wait, work = float(np.mean(waits)), float(np.mean(works))
        whole = work * args.batch_size / args.rows
        figures |= {
            f"{name}_wait_seconds": wait,
            f"{name}_step_seconds": work,
            f"{name}_share": wait / (wait + work),
            f"{name}_share_of_whole_batches": wait / (wait + whole),
        }
    return figures


def main(args: Args) -> int:
    """Measures, prints and saves; returns the exit status."""
    check(args)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(args, Path(folder) / "store")
        rows = [measure(args, store, history) for history in args.histories]
    title = (
        f"Waiting for batches of {args.batch_size}, training on {args.rows} windows of each, "
        f"on {args.device}"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("history", "batches", "wait", "step", "share of waiting", "at whole batches"):
        table.add_column(name, justify="right")
    for row in rows:
        for name, label in (("on_demand", "on demand"), ("ahead", "read ahead")):
            table.add_row(
                f"{row['history']:.0f}",
                label,
                f"{1000 * row[f'{name}_wait_seconds']:.2f} ms",
                f"{row[f'{name}_step_seconds']:.2f} s",
                f"{100 * row[f'{name}_share']:.2f} %",
                f"{100 * row[f'{name}_share_of_whole_batches']:.3f} %",
            )
    console = Console()
    console.print(table)
    for row in rows:
        rate = row["windows_per_second"]
        console.print(f"history {row['history']:.0f}: the store delivers {rate:,.0f} windows/s")
    console.print("The store was just written, and dropped from the page cache where possible.")
    worst = max(row["ahead_share"] for row in rows)
    console.print(f"Largest share with reading ahead: {100 * worst:.2f} % (bar {args.bar:.0%})")
    if args.output is not None:
        settings = {k: v for k, v in dataclasses.asdict(args).items() if k != "output"}
        text = json.dumps({"args": settings, "rows": rows, "worst": worst}, indent=2)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n", encoding="utf-8")
    return int(worst > args.bar)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except MailAgentsError as error:
        sys.exit(f"error: {error}")
