r"""Compare agents: train every agent on every dataset with every seed, then write a report.

    python scripts/compare.py --agents mail/ed-ma-bc mail/ed-tr-bc random --datasets data/demo \
        --seeds 0 1 --steps 1000 --output runs/comparison

An agent may carry config overrides after commas, and a name for the report in front:
small=mail/ed-ma-bc,encoder.layers=2,decoder.layers=2. Agents that exist already join with --trained
LABEL=path/to/agent.safetensors.

Each cell is one scripts/train.py run in its own process, --workers at a time; cells that are
already done are reused and interrupted ones resumed, so a stopped comparison continues when the
same command is given again. A cell that fails is named, and the report says that it is missing.
Expect a table on the terminal and report.html, PNG charts, table.md, episodes.csv (every evaluated
episode) and results.json under --output.
"""

import json
import os
import queue
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from mail_agents import spec
from mail_agents.config import parse_agent
from mail_agents.data.store import open_dataset
from mail_agents.errors import InvalidInputError, MailAgentsError, unknown_name
from mail_agents.registry import load_entry_point
from mail_agents.report import tables
from mail_agents.report.episodes import write_episodes
from mail_agents.report.html import write_report
from mail_agents.report.plots import learning_curves, performance_profiles, success_bars
from mail_agents.report.results import RunResult, load_results, save_results
from mail_agents.report.settings import overall_measure, settings_of
from mail_agents.storage import write_atomic
from mail_agents.suite import worlds_of
from mail_agents.training.progress import RunsProgress, progress_of_runs
from mail_agents.training.workers import Worker
from mail_baselines.published import load_published

SCRIPTS = Path(__file__).resolve().parent
# A log has no width of its own; tables are unreadable in the 80 columns that rich assumes.
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Args:
    """Compare agents on datasets over seeds."""

    agents: tuple[str, ...]
    """Registered ids, each optionally followed by ',field=value' overrides and preceded by 'NAME='
    for the report."""
    datasets: tuple[str, ...]
    """Dataset directories; one policy is trained on all tasks of a dataset."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    trained: tuple[str, ...] = ()
    """Further rows that exist already, LABEL=ARTIFACT, evaluated like the others; append @DATASET
    (the name of its directory) to leave out the other datasets."""
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
    target_returns: tuple[str, ...] = ()
    """Returns that return-conditioned agents aim for, the headline's first: 3600 1800, or by
    dataset: hopper-medium=3600 hopper-medium=1800. None named means each agent's own choice."""
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
    published: Literal["auto", "none"] = "auto"
    """'auto' adds a section with published scores on datasets of the same names."""


@dataclass(frozen=True)
class Cell:
    """One run of the comparison.

    Attributes:
        label: Row of the report.
        dataset: Directory of the dataset.
        seed: Training seed.
        directory: Where the run lives.
        script: ``"train.py"`` or ``"evaluate.py"``.
        command: Its command line.
    """

    label: str
    dataset: str
    seed: int
    directory: Path
    script: str
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
        if not path.exists():
            return None
        return replace(load_results(path)[0], label=self.label, seed=self.seed)


def flags(overrides: dict[str, object]) -> list[str]:
    """Turns config overrides into flags of scripts/train.py."""
    out: list[str] = []
    for name, value in overrides.items():
        group, dot, leaf = f"config.{name}".replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            out.append(f"--{group}{dot}{leaf if value else f'no-{leaf}'}")
        else:
            values = value if isinstance(value, list) else [value]
            out += [f"--{group}{dot}{leaf}", *(str(item) for item in values)]
    return out


def plan(args: Args) -> list[Cell]:
    """Lists every cell, checking agents and overrides before anything is trained."""
    if min(args.eval_episodes, args.workers, args.steps) < 1:
        raise InvalidInputError("--eval-episodes, --workers and --steps start at 1.")
    ours, others = list(trained_here(args)), list(ready_made(args))
    cells = ours + others
    if taken := {cell.label for cell in ours} & {cell.label for cell in others}:
        raise InvalidInputError(f"--trained {taken.pop()} needs a label that no agent has.")
    if len({cell.directory for cell in cells}) != len(cells):
        raise InvalidInputError(
            "Two cells would share a directory; name each agent and dataset once."
        )
    return cells


def trained_here(args: Args) -> Iterator[Cell]:
    """The cells of --agents."""
    _, common = parse_agent(f"common,{args.common}" if args.common else "common")
    parsed = [(name, text, *parse_agent(text)) for name, text in map(split_name, args.agents)]
    ids = [agent for _, _, agent, _ in parsed]
    targets = targets_by_dataset(args, ids)
    for name, text, agent, own in parsed:
        found = spec(agent)
        overrides = own if "reference" in found.tags else {**common, **own}
        found.config(overrides)
        label = name or (agent if ids.count(agent) == 1 else text)
        for dataset in args.datasets:
            aims = targets.get((agent, dataset), ())
            for seed in args.seeds:
                directory = place(args, label, dataset, f"s{seed}")
                command = (
                    *("--agent", agent, "--dataset", dataset, "--seed", str(seed)),
                    *("--steps", str(args.steps), "--eval-episodes", str(args.eval_episodes)),
                    *("--eval-every", str(args.eval_every), "--eval-seed", str(args.eval_seed)),
                    *("--videos", str(args.videos if seed == args.seeds[0] else 0)),
                    *("--device", args.device, "--output", str(directory)),
                    *(("--target-returns", *aims) if aims else ()),
                    *flags(overrides),
                )
                yield Cell(label, dataset, seed, directory, "train.py", command)


def split_name(text: str) -> tuple[str, str]:
    """Takes the name off 'NAME=id,field=value'; '' where there is none."""
    first, comma, rest = text.partition(",")
    name, _, agent = first.rpartition("=")
    return name.strip(), f"{agent}{comma}{rest}"


def targets_by_dataset(args: Args, ids: list[str]) -> dict[tuple[str, str], tuple[str, ...]]:
    """``--target-returns`` by agent and dataset, for the agents that use them."""
    if not args.target_returns:
        return {}
    given: dict[str, list[str]] = {dataset: [] for dataset in args.datasets}
    by_name = {Path(dataset).name: dataset for dataset in args.datasets}
    for text in args.target_returns:
        name, _, value = text.rpartition("=")
        try:
            float(value)
        except ValueError:
            raise InvalidInputError(
                f"--target-returns takes NUMBER or DATASET=NUMBER, got {text!r}."
            ) from None
        if name and name not in by_name:
            raise unknown_name("dataset of --target-returns", name, by_name)
        for dataset in [by_name[name]] if name else args.datasets:
            given[dataset].append(value)
    users = [i for i in ids if load_entry_point(spec(i).entry_point).uses_target_return]
    if not users:
        raise InvalidInputError(
            "--target-returns is for return-conditioned agents, and none of --agents is one: "
            f"{', '.join(ids)}."
        )
    return {(agent, dataset): tuple(aims) for agent in users for dataset, aims in given.items()}


def ready_made(args: Args) -> Iterator[Cell]:
    """The cells of --trained."""
    by_name = {Path(dataset).name: dataset for dataset in args.datasets}
    for text in args.trained:
        label, _, path = text.partition("=")
        if not label or not path:
            raise InvalidInputError(f"--trained takes LABEL=ARTIFACT[@DATASET], got {text!r}.")
        chosen = list(args.datasets)
        artifact, _, name = path.rpartition("@")
        if artifact and not Path(path).exists():
            if name not in by_name:
                raise unknown_name("dataset of --trained", name, by_name)
            path, chosen = artifact, [by_name[name]]
        if not Path(path).exists():
            raise InvalidInputError(f"--trained {label}: there is no file or folder {path!r}.")
        for dataset in chosen:
            directory = place(args, label, dataset, "trained")
            command = (
                *("--agent", path, "--dataset", dataset, "--episodes", str(args.eval_episodes)),
                *("--seed", str(args.eval_seed), "--videos", str(args.videos)),
                *("--device", args.device, "--output", str(directory)),
            )
            yield Cell(label, dataset, args.seeds[0], directory, "evaluate.py", command)


def place(args: Args, label: str, dataset: str, ending: str) -> Path:
    """Directory of a cell."""
    slug = "".join(c if c.isalnum() or c in "-._" else "-" for c in label)
    return Path(args.output) / "runs" / f"{slug}-{Path(dataset).name}-{ending}"


def check_reusable(cell: Cell) -> None:
    """Refuses to mix cells of two different comparisons in one directory."""
    path = cell.beside(".json")
    if not path.exists():
        write_atomic(path, json.dumps(list(cell.command)).encode())
    elif json.loads(path.read_text("utf-8")) != list(cell.command):
        raise InvalidInputError(
            f"{cell.directory} was trained with other settings ({path}). Choose another --output, "
            "or delete that directory."
        )


def run_cell(cell: Cell, idle: "queue.Queue[Worker]", progress: RunsProgress) -> RunResult:
    """Trains and evaluates one cell in a process of its own, or continues an interrupted one."""
    resumable = cell.script == "train.py" and (cell.directory / "arguments.json").exists()
    arguments = ("--resume", str(cell.directory)) if resumable else cell.command
    log = cell.beside(".log")
    worker = idle.get()
    progress.begin(cell.name, cell.directory)
    try:
        code = worker.run(SCRIPTS / cell.script, arguments, log)
    finally:
        progress.end(cell.directory)
        idle.put(worker)
    result = cell.result()
    if code != 0 or result is None:
        tail = log.read_text("utf-8", errors="replace").splitlines()[-8:] if log.exists() else []
        raise MailAgentsError(
            "\n".join([f"{cell.name} failed with exit status {code}; {log} ends with:", *tail])
        )
    return result


def run_all(args: Args, cells: list[Cell]) -> tuple[dict[Cell, RunResult], dict[Cell, str]]:
    """Runs the cells in a pool.

    Returns:
        Results in the order of the cells, and what went wrong with those that failed.
    """
    results = {cell: result for cell in cells if (result := cell.result()) is not None}
    todo = [cell for cell in cells if cell not in results]
    console.print(f"{len(cells)} runs, {len(results)} already done, {args.workers} at a time")
    for cell in results:
        console.print(f"reused   {cell.name}")
    failures: dict[Cell, str] = {}
    size = min(args.workers, len(todo))
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    idle: queue.Queue[Worker] = queue.Queue()
    workers: list[Worker] = []
    pool = ThreadPoolExecutor(max(1, size))
    try:
        for _ in range(size):
            workers.append(Worker(threads, modules_of(args)))
            idle.put(workers[-1])
        with progress_of_runs(console, len(todo), args.steps) as progress:
            futures = {pool.submit(run_cell, cell, idle, progress): cell for cell in todo}
            for done, future in enumerate(as_they_finish(futures, progress), start=1):
                cell = futures[future]
                try:
                    results[cell] = future.result()
                except MailAgentsError as error:
                    failures[cell] = str(error)
                    console.print(f"FAILED   {cell.name}")
                else:
                    seconds = results[cell].train_seconds
                    console.print(f"finished {cell.name}  ({seconds:.0f} s of training)")
                progress.refresh(done)
    finally:
        # After Ctrl-C nothing new starts, and what runs ends at once: it is resumed another time.
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()
        pool.shutdown()
    return {cell: results[cell] for cell in cells if cell in results}, failures


def as_they_finish(futures: dict[Future, Cell], progress: RunsProgress) -> Iterator[Future]:
    """Yields futures as they finish, refreshing the bars in between."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, 0.5, FIRST_COMPLETED)
        yield from done
        progress.refresh(len(futures) - len(waiting))


def modules_of(args: Args) -> list[str]:
    """Modules that the agents of the comparison will import."""
    found = [spec(parse_agent(split_name(text)[1])[0]) for text in args.agents]
    modules = [one.entry_point.partition(":")[0] for one in found]
    if any("ddpm" in one.tags for one in found):
        modules.append("diffusers")
    return list(dict.fromkeys(modules))


def write_all(args: Args, done: dict[Cell, RunResult], failed: list[Cell]) -> None:
    """Writes the report and everything beside it, and prints the tables."""
    output, results = Path(args.output), list(done.values())
    settings = settings_of(results)
    save_results(output / "results.json", results)
    write_episodes(
        output / "episodes.csv", [(result, cell.directory) for cell, result in done.items()]
    )
    shown = tables.main_tables(results)
    text = "\n".join(tables.to_markdown(table) for table in shown)
    write_atomic(output / "table.md", (text + "\n").encode())
    bars = "success.png" if overall_measure(settings) == "success" else "scores.png"
    charts = [success_bars(results, output / bars)]
    if profiles := performance_profiles(results, output / "profiles.png"):
        charts.append(profiles)
    if any(result.curve for result in results):
        charts.append(learning_curves(results, output / "curves.png"))
    notes = list(args.notes)
    if failed:
        names = ", ".join(cell.name for cell in failed)
        total = len(done) + len(failed)
        notes.append(f"{len(failed)} of {total} runs failed and are missing here: {names}.")
    report = write_report(
        results,
        output / "report.html",
        title=args.title,
        commands=[" ".join(["python", "scripts/compare.py", *sys.argv[1:]])],
        notes=notes,
        published=load_published() if args.published == "auto" else (),
    )
    for table, title in zip(shown, [args.title, ""], strict=False):
        console.print(tables.to_rich(table, title))
    console.print(
        f"report   {report}\ncharts   {', '.join(map(str, charts))}\n"
        f"episodes {output / 'episodes.csv'}\nresults  {output / 'results.json'}"
    )


def main(args: Args) -> None:
    """Trains what is missing and writes the report."""
    cells = plan(args)
    for dataset in args.datasets:
        worlds_of(open_dataset(dataset).info.env_specs)
    (Path(args.output) / "runs").mkdir(parents=True, exist_ok=True)
    for cell in cells:
        check_reusable(cell)
    results, failures = run_all(args, cells)
    if results:
        write_all(args, results, list(failures))
    if failures:
        raise MailAgentsError("\n".join(failures.values()))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except MailAgentsError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        console.print("interrupted; give the same command again to continue")
        sys.exit(130)
