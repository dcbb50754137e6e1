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

import os
import queue
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import tyro
from rich.console import Console

from mail_agents.errors import MailAgentsError
from mail_agents.report import tables
from mail_agents.report.episodes import write_episodes
from mail_agents.report.html import write_report
from mail_agents.report.plots import learning_curves, performance_profiles, success_bars
from mail_agents.report.results import RunResult, save_results
from mail_agents.report.settings import overall_measure, settings_of
from mail_agents.storage import storing, write_atomic
from mail_agents.training.comparison import (
    Cell,
    ComparisonArguments,
    check_datasets,
    check_reusable,
    modules_of,
    plan,
)
from mail_agents.training.progress import RunsProgress, progress_of_runs
from mail_agents.training.workers import Worker
from mail_baselines.published import load_published

SCRIPTS = Path(__file__).resolve().parent
# A log has no width of its own; tables are unreadable in the 80 columns that rich assumes.
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def run_cell(cell: Cell, idle: "queue.Queue[Worker]", progress: RunsProgress) -> RunResult:
    """Trains and evaluates one cell in a process of its own, or continues an interrupted one."""
    resumable = cell.script == "train.py" and (cell.directory / "arguments.json").exists()
    arguments = ("--resume", str(cell.directory)) if resumable else cell.command
    arguments = (*arguments, *cell.speed)
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


def run_all(
    args: ComparisonArguments, cells: list[Cell]
) -> tuple[dict[Cell, RunResult], dict[Cell, str]]:
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


def write_all(args: ComparisonArguments, done: dict[Cell, RunResult], failed: list[Cell]) -> None:
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


def main(args: ComparisonArguments) -> None:
    """Trains what is missing and writes the report."""
    cells = plan(args)
    check_datasets(args.datasets)
    runs = Path(args.output) / "runs"
    with storing(runs):
        runs.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        check_reusable(cell)
    results, failures = run_all(args, cells)
    if results:
        write_all(args, results, list(failures))
    if failures:
        raise MailAgentsError("\n".join(failures.values()))


if __name__ == "__main__":
    try:
        main(tyro.cli(ComparisonArguments))
    except MailAgentsError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        console.print("interrupted; give the same command again to continue")
        sys.exit(130)
