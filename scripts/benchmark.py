"""Measure ours against named alternatives: kernels, blocks, training, plans, steps, data.

    pip install 'mail-agents[benchmark]'
    python scripts/benchmark.py ops
    python scripts/benchmark.py stream --output runs/benchmark
    python scripts/benchmark.py docs --from runs/benchmark

Each subcommand has its own help. Candidates of a comparison take turns within one run; those that
should compute the same are checked before they are timed. Expect tables on the terminal, and with
--output the same as markdown, JSON and PNG. With --bars the exit status is 1 when a bar is missed.
Compare ratios, not milliseconds: the speed of a machine drifts.
"""

import importlib
import sys
from typing import Annotated, Any

import tyro
from rich.console import Console

from mail_agents.benchmarks import arguments as subjects
from mail_agents.benchmarks.arguments import Common, Docs, OnDevice, Windows
from mail_agents.errors import InvalidInputError, MailAgentsError
from mail_agents.storage import write_atomic

# A log has no width of its own; tables are unreadable in the 80 columns that rich assumes.
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)

Subject = (
    Annotated[subjects.Ops, tyro.conf.subcommand("ops")]
    | Annotated[subjects.Block, tyro.conf.subcommand("block")]
    | Annotated[subjects.Train, tyro.conf.subcommand("train")]
    | Annotated[subjects.Plan, tyro.conf.subcommand("plan")]
    | Annotated[subjects.Stream, tyro.conf.subcommand("stream")]
    | Annotated[subjects.Loader, tyro.conf.subcommand("loader")]
    | Annotated[subjects.Windows, tyro.conf.subcommand("windows")]
    | Annotated[subjects.Dt, tyro.conf.subcommand("dt")]
    | Annotated[subjects.Docs, tyro.conf.subcommand("docs")]
)


def measure(arguments: Common) -> Any:
    """Runs a subject and returns its report.

    Raises:
        InvalidInputError: There are no threads or rounds, or no such device.
    """
    for flag in ("threads", "rounds"):
        if getattr(arguments, flag) < 1:
            raise InvalidInputError(f"--{flag} starts at 1; got {getattr(arguments, flag)}.")
    if isinstance(arguments, OnDevice):
        from mail_agents.policy import resolve_device

        resolve_device(arguments.device)
    name = type(arguments).__name__.lower()
    module = importlib.import_module(f"mail_agents.benchmarks.{name}")
    if isinstance(arguments, Windows):
        from mail_wrappers.datasets.minari import convert_minari, write_minari

        return module.run(arguments, write_minari, convert_minari)
    return module.run(arguments)


def update_docs(arguments: Docs) -> None:
    """Puts measured tables into a page.

    Raises:
        InvalidInputError: There is no page, or there are no results.
    """
    from mail_agents.benchmarks.report import load_tables, refresh

    if not arguments.page.is_file():
        raise InvalidInputError(f"{arguments.page} does not exist; name a page with --page.")
    page = arguments.page.read_text(encoding="utf-8")
    text, replaced, kept = refresh(page, load_tables(arguments.source))
    write_atomic(arguments.page, text.encode())
    console.print(f"Replaced in {arguments.page}: {', '.join(replaced) or 'nothing'}")
    if kept:
        console.print(f"Without results in {arguments.source}: {', '.join(kept)}")


def main(arguments: Common | Docs) -> int:
    """Measures, prints and writes; returns the exit status."""
    if isinstance(arguments, Docs):
        update_docs(arguments)
        return 0
    report = measure(arguments)
    report.show(console)
    if arguments.output is not None:
        for path in report.write(arguments.output):
            console.print(f"Wrote {path}")
    return int(arguments.bars and not report.met)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Subject, description=__doc__)))  # type: ignore[arg-type]
    except MailAgentsError as error:
        sys.exit(f"error: {error}")
