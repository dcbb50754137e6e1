"""The subject ``windows``: random windows from our store and from Minari, on the same data."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mail_agents.benchmarks.arguments import Windows
from mail_agents.benchmarks.charts import Chart
from mail_agents.benchmarks.report import Bar, Report, Table
from mail_agents.data import BatchSampler, Episode, MemoryDataset, WindowSpec
from mail_agents.errors import MailAgentsError

MINARI, SINGLE = "minari, hdf5", "store, one by one"
HEADER = ("reader", "windows/s", "lowest", "highest", "ratio")
_ROOT = "MINARI_DATASETS_PATH"


def make_episodes(arguments: Windows) -> list[Episode]:
    """Noise images, which no codec can shrink, beside a small state."""
    rng = np.random.default_rng(arguments.seed)
    size, count = arguments.image_size, arguments.steps
    shape, episodes = (count + 1, size, size, 3), []
    for _ in range(arguments.episodes):
        observations = {
            "agentview": rng.integers(0, 256, shape, dtype=np.uint8),
            "eye_in_hand": rng.integers(0, 256, shape, dtype=np.uint8),
            "state": rng.normal(size=(count + 1, 9)),
        }
        actions = rng.normal(size=(count, 7)).astype(np.float32)
        rewards, never = np.zeros(count), np.zeros(count, bool)
        episodes.append(Episode(observations, actions, rewards, never, never))
    return episodes


def rate(read: Callable[[], int], seconds: float) -> float:
    """Windows per second of a function that reads some and says how many."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        count += read()
    return count / elapsed


def readers(
    arguments: Windows,
    folder: Path,
    write_minari: Callable[..., Any],
    convert_minari: Callable[..., Any],
) -> dict[str, Callable[[], int]]:
    """Builds both datasets and returns what reads random windows from each.

    Raises:
        MailAgentsError: The two do not hold the same frames.
    """
    minari_data = write_minari(MemoryDataset(make_episodes(arguments)), "benchmark/windows-v0")
    store = convert_minari(minari_data, folder / "store")
    view = store.windows(WindowSpec(history=arguments.history, padding="none"))
    sampler = BatchSampler(len(view), arguments.batch_size, arguments.seed)
    single = BatchSampler(len(view), 1, arguments.seed)

    def frames_of(index: np.ndarray) -> dict[str, np.ndarray]:
        episode, step = (int(x[0]) for x in view.locate(index))
        data, window = minari_data[episode], slice(step - arguments.history + 1, step + 1)
        return {key: value[window].copy() for key, value in data.observations.items()}

    def from_store() -> int:
        return len(view[next(sampler)]["action"])

    def from_store_singly() -> int:
        return len(view[next(single)]["action"])

    def from_minari() -> int:
        return int(len(frames_of(next(single))["agentview"]) == arguments.history)

    one = np.arange(1) + len(view) // 2
    if not np.array_equal(view[one]["obs/agentview"][0], frames_of(one)["agentview"]):
        raise MailAgentsError("Store and Minari hold different frames; comparing them is unfair.")
    name = f"store, batches of {arguments.batch_size}"
    return {MINARI: from_minari, SINGLE: from_store_singly, name: from_store}


@contextmanager
def _minari_in(folder: str) -> Iterator[None]:
    """Minari's datasets go into a folder meanwhile, not among those of the user."""
    before = os.environ.get(_ROOT)
    os.environ[_ROOT] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ROOT]
        else:
            os.environ[_ROOT] = before


def run(
    arguments: Windows, write_minari: Callable[..., Any], convert_minari: Callable[..., Any]
) -> Report:
    """Measures all readers in turn.

    Args:
        arguments: Sizes.
        write_minari: Writes a dataset as Minari's, ``(dataset, id)``.
        convert_minari: Converts Minari's to a store, ``(dataset, folder)``.
    """
    with tempfile.TemporaryDirectory() as folder, _minari_in(folder):
        read = readers(arguments, Path(folder), write_minari, convert_minari)
        rates: dict[str, list[float]] = {name: [] for name in read}
        for _ in range(arguments.rounds):
            for name, function in read.items():
                rates[name].append(rate(function, arguments.seconds))
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    slowest = medians[MINARI]
    rows = tuple(
        (
            name,
            f"{medians[name]:,.1f}",
            f"{min(values):,.1f}",
            f"{max(values):,.1f}",
            f"{medians[name] / slowest:.0f}",
        )
        for name, values in rates.items()
    )
    conditions = f"medians of {arguments.rounds} rounds, wall time, caches warm"
    report = Report("windows", dataclasses.asdict(arguments), conditions)
    report.tables.append(Table("windows", "Random windows", HEADER, rows))
    ratio = medians[SINGLE] / slowest
    report.bars.append(Bar("store against Minari, one window at a time", ratio, arguments.bar))
    title = "Random windows"
    report.charts.append(Chart(title, "per second", {title: medians}, ours=tuple(medians)[1:]))
    report.figures = {"rates": rates, "medians": medians, "ratio": ratio}
    return report
