"""How fast can random training windows be read? The store against Minari, on the same data.

    python scripts/benchmark_data.py
    python scripts/benchmark_data.py --episodes 10 --steps 150 --output runs/benchmark_data.json

Writes random episodes with two cameras as a lossless Minari dataset (HDF5), converts that to a
store, and reads random windows from both in one process with warm caches. Minari gives whole
episodes, so a window costs an episode there. Each rate is the median of several rounds that
alternate between the readers. The ratio compares one window at a time with one window at a time and
is expected to exceed 500; the script exits with status 1 when it does not (--bar). Batches are
limited by writing them to memory and are shown beside it.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from mail_agents.data import BatchSampler, Episode, MemoryDataset, WindowSpec


@dataclass(frozen=True)
class Args:
    """Benchmark of random windows."""

    episodes: int = 10
    """Number of episodes."""
    steps: int = 150
    """Steps per episode."""
    image_size: int = 128
    """Height and width of both cameras, in pixels."""
    history: int = 10
    """Frames of each camera in a window."""
    batch_size: int = 64
    """Windows that the store gathers at once."""
    rounds: int = 5
    """Rounds; the median rate counts."""
    seconds: float = 2.0
    """Time per reader and round."""
    seed: int = 0
    """Seed of the data and of the order."""
    bar: float = 500.0
    """Smallest acceptable ratio."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="JSON")] = None
    """Where to write the result, or nothing."""


def make_episodes(args: Args) -> list[Episode]:
    """Noise images, which no codec can shrink, beside a small state."""
    rng = np.random.default_rng(args.seed)
    shape, episodes = (args.steps + 1, args.image_size, args.image_size, 3), []
    for _ in range(args.episodes):
        observations = {
            "agentview": rng.integers(0, 256, shape, dtype=np.uint8),
            "eye_in_hand": rng.integers(0, 256, shape, dtype=np.uint8),
            "state": rng.normal(size=(args.steps + 1, 9)),
        }
        actions = rng.normal(size=(args.steps, 7)).astype(np.float32)
        rewards, never = np.zeros(args.steps), np.zeros(args.steps, bool)
        episodes.append(Episode(observations, actions, rewards, never, never))
    return episodes


def rate(read: Callable[[], int], seconds: float) -> float:
    """Windows per second of a function that reads some and says how many."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        count += read()
    return count / elapsed


def readers(args: Args, folder: Path) -> dict[str, Callable[[], int]]:
    """Builds both datasets and returns what reads random windows from each."""
    from mail_wrappers.datasets.minari import convert_minari, write_minari

    minari_data = write_minari(MemoryDataset(make_episodes(args)), "benchmark/windows-v0")
    store = convert_minari(minari_data, folder / "store")
    view = store.windows(WindowSpec(history=args.history, padding="none"))
    sampler = BatchSampler(len(view), args.batch_size, args.seed)
    single = BatchSampler(len(view), 1, args.seed)

    def from_store() -> int:
        return len(view[next(sampler)]["action"])

    def from_store_singly() -> int:
        return len(view[next(single)]["action"])

    def from_minari() -> int:
        episode, step = (int(x[0]) for x in view.locate(next(single)))
        data, window = minari_data[episode], slice(step - args.history + 1, step + 1)
        frames = {key: value[window].copy() for key, value in data.observations.items()}
        return int(len(frames["agentview"]) == args.history)

    one = np.arange(1) + len(view) // 2
    episode, step = (int(x[0]) for x in view.locate(one))
    expected = minari_data[episode].observations["agentview"][step - args.history + 1 : step + 1]
    assert np.array_equal(view[one]["obs/agentview"][0], expected), "both must read the same frames"
    name = f"store, batches of {args.batch_size}"
    return {"minari, hdf5": from_minari, "store, one by one": from_store_singly, name: from_store}


def main(args: Args) -> int:
    """Measures, prints and saves; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        read = readers(args, Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in read}
        for _ in range(args.rounds):
            for name, function in read.items():
                rates[name].append(rate(function, args.seconds))
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    slowest = medians["minari, hdf5"]
    table = Table("reader", "windows/s", "lowest", "highest", "ratio", title="Random windows")
    for name, value in medians.items():
        low, high = min(rates[name]), max(rates[name])
        table.add_row(name, f"{value:.1f}", f"{low:.1f}", f"{high:.1f}", f"{value / slowest:.0f}x")
    console = Console()
    console.print(table)
    ratio = medians["store, one by one"] / slowest
    console.print(f"Store against Minari: {ratio:.0f}x (bar {args.bar:.0f}x)")
    result: dict[str, Any] = {"rates": rates, "medians": medians, "ratio": ratio}
    result["args"] = {k: v for k, v in asdict(args).items() if k != "output"}
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"Wrote {args.output}")
    return 0 if ratio >= args.bar else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
