"""Record demonstrations of scripted experts as one dataset.

    python scripts/collect.py --tasks reach-v3 drawer-open-v3 --episodes 20 --output data/mt2
    python scripts/collect.py --tasks 'libero_object/*' --episodes 50 --output data/object \
        --noise-std 0.1 --env-kwargs goal_state true

Bare names are Meta-World's; 'libero_object/*' or 'robosuite/Lift' name other worlds. Only solved
episodes are kept. The data depend on --seed and the settings, not on --workers: attempt i of a task
always starts from the i-th placement of the seed. Expect many episodes of Meta-World per second and
one of LIBERO in two, far fewer with --cameras, then a table with each expert's success rate. A
command that was interrupted continues when it is run again. Names may be patterns: 'door-*'.

LIBERO's demonstrations start from newly drawn placements; its stored initial states are left to the
evaluation. Not every task has an expert that solves it: scripts/measure_experts.py tells.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Column, Table

from mail_agents.data.store import StoreDataset, StoreWriter, open_dataset
from mail_agents.errors import InvalidInputError, MailAgentsError
from mail_agents.features import FeatureSpec
from mail_envs.catalogue import env_spec_dict
from mail_envs.command_line import check_env_kwargs, parse_env_kwargs, resolve_tasks
from mail_envs.experts import collect_episodes, collection_kwargs, make_expert, worker_pool

console = Console(soft_wrap=True)

_REFUSED = {
    "cameras": "--cameras says which to record",
    "image_size": "--image-size says it",
    "success_hold": "--success-hold says it",
    "initial": "demonstrations start from new placements, never from states of the evaluation",
}


@dataclass(frozen=True)
class Args:
    """Record demonstrations of scripted experts."""

    tasks: tuple[str, ...]
    """Tasks: reach-v3 (Meta-World), 'libero_object/*', robosuite/Lift. Shell-style patterns are
    allowed; '*' is all 50 of Meta-World."""
    output: str
    """Folder of the dataset; must not exist."""
    episodes: int = 20
    """Solved episodes per task."""
    noise_std: float = 0.0
    """Standard deviation of Gaussian noise on the expert's actions (which range from -1 to 1). The
    noisy action is executed and recorded."""
    cameras: tuple[str, ...] = ()
    """Cameras to record, such as corner2 (in LIBERO agentview and eye_in_hand); none means states
    only."""
    image_size: int = 128
    """Height and width of the images in pixels."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """More keyword arguments of the environments, each value in JSON where it parses, such as
    goal_state true."""
    success_hold: int = 10
    """Steps recorded after success, so that policies learn to stay where the task is solved."""
    seed: int = 0
    """Decides placements and noise."""
    workers: int = 1
    """Processes; the data are the same for any number."""
    overwrite: bool = False
    """Replace an existing dataset once the new one is complete."""

    @property
    def policy_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the environments that policies act in."""
        own = {"cameras": list(self.cameras), "image_size": self.image_size}
        return {**own, **parse_env_kwargs(self.env_kwargs, _REFUSED)}

    def expert_kwargs(self, env_id: str) -> dict[str, Any]:
        """Keyword arguments of the environment that the expert acts in."""
        return {
            **collection_kwargs(env_id),
            "success_hold": self.success_hold,
            **self.policy_kwargs,
        }

    def source(self, worlds: Mapping[str, str]) -> dict[str, Any]:
        """What the data are; an interrupted collection is continued only when this is the same."""
        return {
            "kind": "scripted-expert",
            "tasks": [short_name(env_id) for env_id in worlds.values()],
            "episodes": self.episodes,
            "noise_std": self.noise_std,
            "seed": self.seed,
            "env_kwargs": self.expert_kwargs(next(iter(worlds.values()))),
        }


def short_name(env_id: str) -> str:
    """How --tasks names an environment: reach-v3, libero_object/<task>."""
    return env_id.partition(":")[2].removeprefix("metaworld/")


def next_attempt(completed: set[str], task: str) -> int:
    """Index after the last attempt of a task that is in the dataset already."""
    attempts = [int(key.rpartition("/")[2]) for key in completed if key.startswith(f"{task}/")]
    return max(attempts, default=-1) + 1


def describe(env_id: str, args: Args) -> tuple[dict, FeatureSpec]:
    """How to make the environment again, and what it observes; fails early without an expert."""
    env = gymnasium.make(env_id, **args.policy_kwargs)
    try:
        make_expert(env)
        return env_spec_dict(env), FeatureSpec.from_spaces(env.observation_space, env.action_space)
    finally:
        env.close()


def main(args: Args) -> StoreDataset:
    """Collects, writes and reports."""
    worlds = resolve_tasks(args.tasks)
    if not worlds or args.episodes < 1:
        raise InvalidInputError(
            f"There is nothing to collect: give at least one task and at least 1 episode, "
            f"for example --tasks reach-v3 --episodes 20 (got {len(worlds)} and {args.episodes})."
        )
    check_env_kwargs(worlds.values(), args.policy_kwargs)
    specs, features = check_worlds(worlds, args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not sys.stdout.isatty()
    )
    writer = StoreWriter(
        args.output,
        name=Path(args.output).name,
        source=args.source(worlds),
        features=features,
        env_specs=specs,
        overwrite=args.overwrite,
    )
    with writer, worker_pool(args.workers) as pool, progress:
        bar = progress.add_task("", total=len(worlds) * args.episodes)
        for task, env_id in worlds.items():
            done = sum(key.startswith(f"{task}/") for key in writer.completed)
            progress.update(bar, advance=done, description=task)
            if done == args.episodes:
                continue
            episodes = collect_episodes(
                env_id,
                args.episodes - done,
                args.seed,
                noise_std=args.noise_std,
                first_attempt=next_attempt(writer.completed, task),
                env_kwargs=args.expert_kwargs(env_id),
                executor=pool,
                in_flight=2 * args.workers,
            )
            for episode in episodes:
                writer.add(episode)
                progress.advance(bar)

    dataset = open_dataset(args.output)
    report(dataset, writer.completed)
    return dataset


def check_worlds(worlds: Mapping[str, str], args: Args) -> tuple[dict[str, dict], FeatureSpec]:
    """Environment specs by task and what all of them observe, before anything is written."""
    specs: dict[str, dict] = {}
    features: dict[str, FeatureSpec] = {}
    terminal = sys.stdout.isatty()
    if not terminal:
        console.print(f"Making {len(worlds)} environments, to check that they fit together.")
    items = track(list(worlds.items()), "checking tasks", console=console, disable=not terminal)
    for task, env_id in items:
        specs[task], features[task] = describe(env_id, args)
        first = next(iter(features))
        if features[task] != features[first]:
            raise InvalidInputError(
                f"{task} and {first} differ in what they observe, and a dataset has one form:\n"
                f"  {task}: {features[task]}\n  {first}: {features[first]}\n"
                "Collect them into different datasets."
            )
    return specs, features[next(iter(features))]


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
