"""Record maze2d data the way D4RL made it: a planner between random goals, never reset.

    python scripts/collect_maze.py --maze umaze --transitions 50000 --output data/maze2d-umaze

Takes seconds and prints the number of episodes, their mean length and the two reference returns
(random actions and the planner, on the fixed goal of the evaluation), which are stored with the
data for normalised scores. The same seed gives the same data; nothing is downloaded.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import gymnasium
import numpy as np
import tyro
from rich.console import Console

from mail_agents.data.store import StoreDataset, write_dataset
from mail_agents.errors import InvalidInputError, MailAgentsError
from mail_agents.features import FeatureSpec
from mail_envs.catalogue import env_spec_dict
from mail_envs.pointmaze import Maze2dEnv, collect_maze, reference_returns
from mail_wrappers.datasets.d4rl_names import WORLDS

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Args:
    """Record maze2d data."""

    output: str
    """Folder of the dataset; must not exist."""
    maze: Literal["umaze", "medium", "large"] = "umaze"
    """Size of the maze."""
    transitions: int = 50_000
    """Steps in all; D4RL has a million."""
    dense: bool = False
    """Reward exp(-distance to the goal) instead of 1 near the goal."""
    reference_episodes: int = 100
    """Episodes behind each of the two reference returns; D4RL used 100."""
    seed: int = 0
    """Decides starts, goals and waypoints."""
    overwrite: bool = False
    """Replace an existing dataset once the new one is complete."""


def main(args: Args) -> StoreDataset:
    """Collects, measures the references, writes and reports."""
    task = f"maze2d-{args.maze}" + ("-dense" if args.dense else "")
    world = gymnasium.make(f"mail_envs:d4rl/{task}")
    steps, env = WORLDS[task].max_episode_steps, cast(Maze2dEnv, world.unwrapped)
    scores = reference_returns(env, args.reference_episodes, args.seed, max_steps=steps)
    if scores["max"] <= scores["min"]:
        raise InvalidInputError(
            f"In {args.reference_episodes} episodes the planner ({scores['max']:g}) was not better "
            f"than random actions ({scores['min']:g}): no scale. Raise --reference-episodes."
        )
    measured = f"random actions and planner, {args.reference_episodes} episodes, seed {args.seed}"
    dataset = write_dataset(
        args.output,
        collect_maze(env, args.transitions, args.seed, max_steps=steps, task=task),
        name=Path(args.output).name,
        source={
            "kind": "maze-planner",
            "world": task,
            "transitions": args.transitions,
            "seed": args.seed,
        },
        env_specs={task: env_spec_dict(world)},
        reference_scores={task: {**scores, "source": f"measured: {measured}"}},
        features=FeatureSpec.from_spaces(world.observation_space, world.action_space),
        overwrite=args.overwrite,
    )
    world.close()
    report(dataset, scores)
    return dataset


def report(dataset: StoreDataset, scores: dict[str, float]) -> None:
    """Prints what is in the dataset and where it is."""
    rewards = dataset.column("reward")
    reached = np.mean([meta["reached"] for meta in dataset.table.metas])
    console.print(
        f"{len(dataset)} episodes, {dataset.info.n_steps} steps, {dataset.lengths.mean():.0f} a "
        f"piece, {reached:.0%} reached their goal; mean reward {rewards.mean():.3f}\n"
        f"reference returns: {scores['min']:.1f} (random), {scores['max']:.1f} (planner)\n"
        f"dataset  {dataset.path}"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except MailAgentsError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        console.print("Interrupted. Run the same command again to continue.")
        sys.exit(130)
