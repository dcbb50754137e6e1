"""Measure how often the scripted experts solve their tasks.

    python scripts/measure_experts.py --tasks 'libero_object/*' robosuite/Lift --attempts 10

Prints one row per task: attempts solved, the rate with its 95 % Wilson interval, and the mean
length of solved attempts; tasks that no expert can do are listed with the reason. With --output the
table is also written as Markdown and as JSON. Attempts are those that scripts/collect.py would
make with the same seed and noise, without images; ten of a LIBERO task take about half a minute.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import tyro
from rich.console import Console

from mail_agents.errors import InvalidInputError, MailAgentsError, UnknownNameError
from mail_agents.report.stats import wilson_interval
from mail_envs.command_line import check_env_kwargs, parse_env_kwargs, resolve_tasks
from mail_envs.experts import collect_episodes, collection_kwargs, make_expert, worker_pool

console = Console(soft_wrap=True)

_REFUSED = {
    "cameras": "experts are measured without images",
    "image_size": "experts are measured without images",
    "success_hold": "--success-hold says it",
    "initial": "attempts start where those of scripts/collect.py do, from new placements",
}


@dataclass(frozen=True)
class Args:
    """Measure scripted experts."""

    tasks: tuple[str, ...]
    """Tasks as for scripts/collect.py; shell-style patterns are allowed."""
    attempts: int = 10
    """Attempts per task."""
    noise_std: float = 0.0
    """Standard deviation of Gaussian noise on the expert's actions."""
    success_hold: int = 10
    """Steps for which the goal must stay reached, or that an episode goes on (Meta-World)."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """More keyword arguments of the environments, each value in JSON where it parses."""
    seed: int = 0
    """Decides placements and noise."""
    workers: int = 1
    """Processes; the numbers are the same for any number."""
    output: str | None = None
    """Where to write the table: OUTPUT.md and OUTPUT.json; None only prints it."""


@dataclass(frozen=True)
class Row:
    """What an expert did in one task.

    Attributes:
        world: Name of the environment, such as ``libero_object/<task>``.
        solved: Attempts that reached the goal.
        attempts: Attempts made; 0 when there is no expert.
        interval: 95 % Wilson interval of the success rate, or None.
        steps: Mean length of the solved attempts, or None.
        reason: Why there is no expert, or None.
    """

    world: str
    solved: int = 0
    attempts: int = 0
    interval: tuple[float, float] | None = None
    steps: float | None = None
    reason: str | None = None

    @property
    def cells(self) -> list[str]:
        """The row of a table."""
        if self.interval is None:
            return [self.world, "-", "no expert", "-"]
        low, high = self.interval
        rate = f"{self.solved / self.attempts:.0%} ({low:.0%} to {high:.0%})"
        steps = "-" if self.steps is None else f"{self.steps:.0f}"
        return [self.world, f"{self.solved} of {self.attempts}", rate, steps]


def missing_expert(env_id: str, kwargs: dict[str, Any]) -> str | None:
    """Why no expert can do a task, or None."""
    env = gymnasium.make(env_id, **kwargs)
    try:
        make_expert(env)
    except (InvalidInputError, UnknownNameError) as error:
        return str(error)
    finally:
        env.close()
    return None


def measure(args: Args) -> Iterator[Row]:
    """Yields a row per task, as soon as it is known.

    Raises:
        InvalidInputError: There is nothing to measure.
        UnknownNameError: A task does not exist.
    """
    worlds = resolve_tasks(args.tasks)
    if not worlds or args.attempts < 1:
        raise InvalidInputError(
            f"There is nothing to measure: give at least one task and at least 1 attempt, for "
            f"example --tasks reach-v3 (got {len(worlds)} and {args.attempts})."
        )
    given = parse_env_kwargs(args.env_kwargs, _REFUSED)
    check_env_kwargs(worlds.values(), given)
    with worker_pool(args.workers) as pool:
        for env_id in worlds.values():
            kwargs = {
                **collection_kwargs(env_id),
                "cameras": [],
                "success_hold": args.success_hold,
                **given,
            }
            world = env_id.partition(":")[2]
            reason = missing_expert(env_id, kwargs)
            if reason is not None:
                yield Row(world, reason=reason)
                continue
            episodes = collect_episodes(
                env_id,
                args.attempts,
                args.seed,
                noise_std=args.noise_std,
                only_successful=False,
                env_kwargs=kwargs,
                executor=pool,
                in_flight=2 * args.workers,
            )
            lengths = [len(episode) for episode in episodes if episode.success]
            yield Row(
                world,
                len(lengths),
                args.attempts,
                wilson_interval(len(lengths), args.attempts),
                float(np.mean(lengths)) if lengths else None,
            )


def markdown(rows: list[Row], args: Args) -> str:
    """The table, and below it why some tasks have no expert."""
    lines = ["| task | solved | rate (95 % interval) | mean steps |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row.cells) + " |" for row in rows]
    lines += ["", f"Noise {args.noise_std:g}, seed {args.seed}."]
    lines += [f"- {row.world}: {row.reason}" for row in rows if row.reason]
    return "\n".join(lines) + "\n"


def main(args: Args) -> list[Row]:
    """Measures, prints, writes."""
    files = [] if args.output is None else [Path(f"{args.output}.{end}") for end in ("md", "json")]
    for file in files:
        if file.exists():
            raise InvalidInputError(f"{file} exists. Choose another --output, or delete it.")
    rows = []
    for row in measure(args):
        rows.append(row)
        console.print("  ".join(row.cells), highlight=False)
        if row.reason:
            console.print(f"    {row.reason}", style="dim", highlight=False)
    if files:
        report = {"settings": asdict(args), "tasks": [asdict(row) for row in rows]}
        files[0].parent.mkdir(parents=True, exist_ok=True)
        files[0].write_text(markdown(rows, args), encoding="utf-8")
        files[1].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {files[0]} and {files[1]}", highlight=False)
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except MailAgentsError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
