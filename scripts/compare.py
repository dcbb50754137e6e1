r"""Compare agents: train every agent on every dataset with every seed, then write a report.

    python scripts/compare.py --agents mail/ed-ma-bc mail/ed-tr-bc random --datasets data/demo \
        --seeds 0 1 --steps 1000 --output runs/comparison

An agent may carry config overrides after commas: mail/ed-ma-bc,encoder.layers=2,decoder.layers=2.
Each cell is one scripts/train.py run in its own process, --workers at a time; cells that are
already done are reused and interrupted ones resumed, so a killed comparison continues when the same
command is given again. Expect a table on the terminal and report.html, PNG charts, table.md and
results.json under --output.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress

from mail_agents import spec
from mail_agents.config import parse_agent
from mail_agents.data.store import open_dataset
from mail_agents.errors import InvalidInputError, MailAgentsError
from mail_agents.report.html import write_report
from mail_agents.report.plots import learning_curves, success_bars
from mail_agents.report.results import RunResult, load_results, save_results
from mail_agents.report.tables import score_rows, to_markdown, to_rich
from mail_agents.storage import write_atomic
from mail_agents.suite import worlds_of
from mail_agents.training.runs import read_metrics

TRAIN = Path(__file__).with_name("train.py")
# A log has no width of its own; tables are unreadable in the 80 columns that rich assumes.
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Args:
    """Compare agents on datasets over seeds."""

    agents: tuple[str, ...]
    """Registered ids, each optionally followed by ',field=value' overrides."""
    datasets: tuple[str, ...]
    """Dataset directories; one policy is trained on all tasks of a dataset."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    common: str = ""
    """Overrides for every agent that learns, for example 'history=1,language=hash'."""
    steps: int = 1000
    """Optimiser updates per run."""
    eval_episodes: int = 20
    """Evaluation episodes per task and run, the same initial states for all."""
    eval_every: int = 0
    """Also evaluate every so many updates, and report the best besides the last."""
    eval_seed: int = 0
    """Seeds the evaluation episodes."""
    videos: int = 0
    """Successful and failed episodes to record per agent and task, for the first seed."""
    workers: int = 2
    """Runs at a time."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    output: str = "runs/comparison"
    """Directory for runs, charts and report."""
    title: str = "Agent comparison"
    """Heading of the report."""
    notes: tuple[str, ...] = ()
    """Sentences to print under the heading, for what a reader must know."""


@dataclass(frozen=True)
class Cell:
    """One training run of the comparison."""

    label: str
    dataset: str
    seed: int
    directory: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """Short name for progress and logs."""
        return f"{self.label} {Path(self.dataset).name} s{self.seed}"

    def beside(self, ending: str) -> Path:
        """A file next to the run's directory, whose name may hold dots of its own."""
        return self.directory.with_name(self.directory.name + ending)

    def result(self) -> RunResult | None:
        """The finished result, or None."""
        path = self.directory / "result.json"
        return replace(load_results(path)[0], label=self.label) if path.exists() else None


def flags(overrides: dict[str, object]) -> list[str]:
    """Turns config overrides into flags of scripts/train.py."""
    out: list[str] = []
    for name, value in overrides.items():
        flag = "--config." + name.replace("_", "-")
        if isinstance(value, bool):
            out.append(flag if value else "--config." + "no-" + name.replace("_", "-"))
        else:
            values = value if isinstance(value, list) else [value]
            out += [flag, *(str(item) for item in values)]
    return out


def plan(args: Args) -> list[Cell]:
    """Lists every cell, checking agents and overrides before anything is trained."""
    if min(args.eval_episodes, args.workers, args.steps) < 1:
        raise InvalidInputError("--eval-episodes, --workers and --steps start at 1.")
    _, common = parse_agent(f"common,{args.common}" if args.common else "common")
    parsed = [(text, *parse_agent(text)) for text in args.agents]
    ids = [agent for _, agent, _ in parsed]
    cells = []
    for text, agent, own in parsed:
        found = spec(agent)
        overrides = own if "reference" in found.tags else {**common, **own}
        found.config(overrides)
        label = agent if ids.count(agent) == 1 else text
        for dataset in args.datasets:
            for seed in args.seeds:
                slug = "".join(c if c.isalnum() or c in "-._" else "-" for c in label)
                directory = Path(args.output) / "runs" / f"{slug}-{Path(dataset).name}-s{seed}"
                command = (
                    *("--agent", agent, "--dataset", dataset, "--seed", str(seed)),
                    *("--steps", str(args.steps), "--eval-episodes", str(args.eval_episodes)),
                    *("--eval-every", str(args.eval_every), "--eval-seed", str(args.eval_seed)),
                    *("--videos", str(args.videos if seed == args.seeds[0] else 0)),
                    *("--device", args.device, "--output", str(directory)),
                    *flags(overrides),
                )
                cells.append(Cell(label, dataset, seed, directory, command))
    if len({cell.directory for cell in cells}) != len(cells):
        raise InvalidInputError(
            "Two cells would share a directory; name each agent and dataset once."
        )
    return cells


def check_reusable(cell: Cell) -> None:
    """Refuses to mix cells of two different comparisons in one directory."""
    path = cell.beside(".json")
    if path.exists() and json.loads(path.read_text("utf-8")) != list(cell.command):
        raise InvalidInputError(
            f"{cell.directory} was trained with other settings ({path}). Choose another --output, "
            "or delete that directory."
        )
    write_atomic(path, json.dumps(list(cell.command)).encode())


def run_cell(cell: Cell, threads: int) -> RunResult:
    """Trains and evaluates one cell in a process of its own, or reuses a finished one."""
    done = cell.result()
    if done is not None:
        return done
    started = (cell.directory / "arguments.json").exists()
    arguments = ("--resume", str(cell.directory)) if started else cell.command
    log = cell.beside(".log")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.call(
            [sys.executable, str(TRAIN), *arguments], stdout=file, stderr=file, env=environment
        )
    result = cell.result()
    if code != 0 or result is None:
        tail = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-8:])
        raise MailAgentsError(
            f"{cell.name} failed with exit status {code}; {log} ends with:\n{tail}"
        )
    return result


@contextmanager
def progress(cells: list[Cell], steps: int) -> Iterator[Progress | None]:
    """One bar per cell on a terminal; nothing elsewhere."""
    if not sys.stdout.isatty():
        yield None
        return
    with Progress(console=console) as bars:
        for cell in cells:
            bars.add_task(cell.name, total=steps)
        yield bars


def refresh(bars: Progress | None, cells: list[Cell]) -> None:
    """Moves each bar to the last logged step of its cell."""
    if bars is None:
        return
    for task, cell in zip(bars.task_ids, cells, strict=True):
        rows = read_metrics(cell.directory)
        if rows:
            bars.update(task, completed=rows[-1]["step"])


def run_all(args: Args, cells: list[Cell]) -> list[RunResult]:
    """Runs the cells in a pool; every failure is reported, after the others have finished."""
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    done = {cell for cell in cells if cell.result() is not None}
    console.print(f"{len(cells)} runs, {len(done)} already done, {args.workers} at a time")
    failures = []
    with ThreadPoolExecutor(args.workers) as pool, progress(cells, args.steps) as bars:
        futures = {pool.submit(run_cell, cell, threads): cell for cell in cells}
        for future in as_completed(futures) if bars is None else poll(futures, bars, cells):
            cell = futures[future]
            try:
                result = future.result()
            except MailAgentsError as error:
                failures.append(str(error))
                console.print(f"FAILED   {cell.name}")
                continue
            word = "reused  " if cell in done else "finished"
            console.print(f"{word} {cell.name}  ({result.train_seconds:.0f} s of training)")
    if failures:
        raise MailAgentsError("\n".join(failures))
    return [result for cell in cells if (result := cell.result()) is not None]


def poll(futures: dict, bars: Progress, cells: list[Cell]) -> Iterator:
    """Yields futures as they finish, refreshing the bars in between."""
    waiting = set(futures)
    while waiting:
        done = {future for future in waiting if future.done()}
        yield from done
        waiting -= done
        refresh(bars, cells)
        time.sleep(0.5)


def main(args: Args) -> None:
    """Trains what is missing and writes the report."""
    cells = plan(args)
    for dataset in args.datasets:
        worlds_of(open_dataset(dataset).info.env_specs)
    output = Path(args.output)
    (output / "runs").mkdir(parents=True, exist_ok=True)
    for cell in cells:
        check_reusable(cell)
    results = run_all(args, cells)

    save_results(output / "results.json", results)
    table = score_rows(results)
    write_atomic(output / "table.md", (to_markdown(table) + "\n").encode())
    success_bars(results, output / "success.png")
    if any(result.curve for result in results):
        learning_curves(results, output / "curves.png")
    command = " ".join(["python", "scripts/compare.py", *sys.argv[1:]])
    report = write_report(
        results, output / "report.html", title=args.title, commands=[command], notes=args.notes
    )
    console.print(to_rich(table, args.title))
    console.print(
        f"report   {report}\ncharts   {output / 'success.png'}\nresults  {output / 'results.json'}"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except MailAgentsError as error:
        sys.exit(f"error: {error}")
