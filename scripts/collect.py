"""Record demonstrations of scripted experts as one dataset.

    python scripts/collect.py --tasks reach-v3 drawer-open-v3 --episodes 20 --output data/mt2

Only solved episodes are kept. The data depend on --seed and the settings, not on --workers: attempt
i of a task always starts from the i-th placement of the seed. Expect many episodes per second, or
about one with --cameras, then a table with each expert's success rate. A command that was
interrupted continues when it is run again. Names may be patterns: --tasks 'door-*'.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from mail_agents.data.store import StoreDataset, StoreWriter, open_dataset
from mail_agents.errors import InvalidInputError, MailAgentsError, unknown_name
from mail_agents.features import FeatureSpec
from mail_envs import METAWORLD_TASKS, list_worlds
from mail_envs.catalogue import env_spec_dict
from mail_envs.experts import collect_episodes, make_expert, worker_pool

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Args:
    """Record demonstrations of scripted experts."""

    tasks: tuple[str, ...]
    """Meta-World tasks, such as reach-v3; shell-style patterns are allowed, '*' is all 50."""
    output: str
    """Folder of the dataset; must not exist."""
    episodes: int = 20
    """Solved episodes per task."""
    noise_std: float = 0.0
    """Standard deviation of Gaussian noise on the expert's actions (which range from -1 to 1). The
    noisy action is executed and recorded."""
    cameras: tuple[str, ...] = ()
    """Cameras to record, such as corner2; none means states only."""
    image_size: int = 128
    """Height and width of the images in pixels."""
    success_hold: int = 10
    """Steps recorded after success, so that policies learn to stay where the task is solved."""
    seed: int = 0
    """Decides placements and noise."""
    workers: int = 1
    """Processes; the data are the same for any number."""
    overwrite: bool = False
    """Replace an existing dataset once the new one is complete."""

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the environments that policies act in."""
        return {"cameras": list(self.cameras), "image_size": self.image_size}

    @property
    def expert_env_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the environments that the expert acts in."""
        return {**self.env_kwargs, "success_hold": self.success_hold}

    @property
    def source(self) -> dict[str, Any]:
        """What the data are; an interrupted collection is continued only when this is the same."""
        return {
            "kind": "scripted-expert",
            "tasks": resolve_tasks(self.tasks),
            "episodes": self.episodes,
            "noise_std": self.noise_std,
            "seed": self.seed,
            "env_kwargs": self.expert_env_kwargs,
        }


def resolve_tasks(patterns: tuple[str, ...]) -> list[str]:
    """Task names in the order given, patterns replaced by what they match."""
    tasks: dict[str, None] = {}
    for pattern in patterns:
        found = [world.rpartition("/")[2] for world in list_worlds(f"metaworld/{pattern}")]
        if not found:
            raise unknown_name("Meta-World task", pattern, METAWORLD_TASKS)
        tasks.update(dict.fromkeys(found))
    return list(tasks)


def next_attempt(completed: set[str], task: str) -> int:
    """Index after the last attempt of a task that is in the dataset already."""
    attempts = [int(name.rpartition("/")[2]) for name in completed if name.startswith(f"{task}/")]
    return max(attempts, default=-1) + 1


def describe(task: str, args: Args) -> tuple[dict, FeatureSpec]:
    """How to make the environment again, and what it observes; fails early without an expert."""
    env = gymnasium.make(f"mail_envs:metaworld/{task}", **args.env_kwargs)
    make_expert(env)
    spec = env_spec_dict(env), FeatureSpec.from_spaces(env.observation_space, env.action_space)
    env.close()
    return spec


def main(args: Args) -> StoreDataset:
    """Collects, writes and reports."""
    tasks = resolve_tasks(args.tasks)
    if not tasks or args.episodes < 1:
        raise InvalidInputError(
            f"There is nothing to collect: give at least one task and at least 1 episode, "
            f"for example --tasks reach-v3 --episodes 20 (got {len(tasks)} and {args.episodes})."
        )
    _, features = describe(tasks[0], args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not sys.stdout.isatty()
    )
    writer = StoreWriter(
        args.output,
        name=Path(args.output).name,
        source=args.source,
        features=features,
        overwrite=args.overwrite,
    )
    with writer, worker_pool(args.workers) as pool, progress:
        bar = progress.add_task("", total=len(tasks) * args.episodes)
        for task in tasks:
            writer.env_specs[task], _ = describe(task, args)
            done = sum(name.startswith(f"{task}/") for name in writer.completed)
            progress.update(bar, advance=done, description=task)
            if done == args.episodes:
                continue
            episodes = collect_episodes(
                f"mail_envs:metaworld/{task}",
                args.episodes - done,
                args.seed,
                noise_std=args.noise_std,
                first_attempt=next_attempt(writer.completed, task),
                env_kwargs=args.expert_env_kwargs,
                executor=pool,
                in_flight=2 * args.workers,
            )
            for episode in episodes:
                writer.add(episode)
                progress.advance(bar)

    dataset = open_dataset(args.output)
    report(dataset, writer.completed)
    return dataset


def report(dataset: StoreDataset, completed: set[str]) -> None:
    """Prints one row per task and where the dataset is."""
    table = Table(
        Column("task", overflow="fold"), "episodes", "attempts", "expert success", "mean steps"
    )
    for index, task in enumerate(dataset.info.tasks):
        lengths = dataset.lengths[dataset.task_ids == index]
        attempts = next_attempt(completed, task)
        row = f"{len(lengths)}", f"{attempts}", f"{len(lengths) / attempts:.0%}"
        table.add_row(task, *row, f"{np.mean(lengths):.1f}")
    console.print(table)
    console.print(
        f"{dataset.info.n_episodes} episodes, {dataset.info.n_steps} steps, "
        f"sha256 {dataset.info.sha256[:12]}\ndataset  {dataset.path}"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except MailAgentsError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        console.print("Interrupted. Run the same command again to continue.")
        sys.exit(130)
