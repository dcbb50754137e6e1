r"""Train an expert with Stable-Baselines3 and record datasets from it by D4RL's recipe.

    python scripts/collect_sb3.py --env Hopper-v5 --train-steps 200000 --transitions 50000 \
        --output data/sb3

D4RL (Fu et al. 2020, section 5) gives five datasets of one task, written here side by side:

    hopper-random          episodes of the untrained actor
    hopper-medium          episodes of the first actor that earns a third of the expert's return
    hopper-medium-replay   every training episode up to that actor
    hopper-medium-expert   all episodes of medium and of expert
    hopper-expert          episodes of the best actor

Actors are compared every --eval-every steps. Each dataset carries the mean returns of random and
expert as reference scores, so a normalised score of 0 is the untrained actor and 100 the expert;
hopper-training/ keeps the training episodes, every actor, and random, medium and expert.safetensors
to evaluate or compare with. Expect training to take most of the time, then a table. What is already
there is kept when the command is given again; training itself starts over when it was interrupted.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import gymnasium
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from mail_agents import evaluate
from mail_agents.data.episode import Episode
from mail_agents.data.store import StoreDataset, open_dataset
from mail_agents.data.writer import StoreWriter
from mail_agents.errors import InvalidInputError, MailAgentsError, require
from mail_agents.features import FeatureSpec
from mail_agents.report.scores import normalised_score
from mail_agents.seeding import derive_env_seed, derive_seed
from mail_agents.storage import write_atomic
from mail_baselines.sb3 import SB3Agent, from_model
from mail_wrappers import RecordEpisodes

console = Console(soft_wrap=True)

Kind = Literal["random", "medium", "medium-replay", "medium-expert", "expert"]
KINDS: tuple[Kind, ...] = ("random", "expert", "medium", "medium-replay", "medium-expert")


@dataclass(frozen=True)
class Args:
    """Train an expert with Stable-Baselines3 and record datasets from it."""

    env: str = "Hopper-v5"
    """Gymnasium id with vector observations and bounded actions."""
    output: str = "data/sb3"
    """Folder of the datasets."""
    algorithm: Literal["sac", "ppo", "td3"] = "sac"
    """Algorithm of the expert."""
    train_steps: int = 200_000
    """Environment steps of training."""
    transitions: int = 50_000
    """Least number of transitions of random, medium and expert; whole episodes are kept."""
    medium: float = 1 / 3
    """Share of the way from the untrained to the best return that makes an actor 'medium'."""
    hidden: tuple[int, ...] = (256, 256)
    """Units of the hidden layers of actor and critics."""
    eval_every: int = 5_000
    """Training steps between two actors."""
    eval_episodes: int = 10
    """Episodes that measure an actor during training."""
    reference_episodes: int = 50
    """Episodes that measure each reference score."""
    seed: int = 0
    """Decides weights, training and every recorded episode."""
    threads: int = 1
    """Threads of the networks; these are too small to gain from many."""

    @property
    def task(self) -> str:
        """Beginning of the datasets' names: ``hopper`` for ``Hopper-v5``."""
        return self.env.rpartition("/")[2].rpartition(":")[2].rpartition("-v")[0].lower()

    def folder(self, kind: str) -> Path:
        """Where a dataset goes."""
        return Path(self.output) / f"{self.task}-{kind}"

    @property
    def training(self) -> dict[str, Any]:
        """The settings that training depends on."""
        apart = ("output", "transitions", "medium", "reference_episodes", "threads")
        settings = {name: value for name, value in asdict(self).items() if name not in apart}
        return json.loads(json.dumps(settings))


@dataclass(frozen=True)
class World:
    """What every dataset of one environment shares."""

    features: FeatureSpec
    env_specs: dict[str, Any]


def describe(env_id: str) -> World:
    """Checks that Stable-Baselines3 and our agents can both act in an environment."""
    env = RecordEpisodes(gymnasium.make(env_id))
    features = env.features
    box = isinstance(env.observation_space, gymnasium.spaces.Box)
    if not box or features.action.low is None or not features.action.dtype.startswith("float"):
        raise InvalidInputError(
            "The environment must have vector observations and bounded continuous actions; "
            f"{env_id} has {env.observation_space} and {env.action_space}."
        )
    return World(features, env.env_specs)


def train(args: Args, world: World) -> list[dict[str, Any]]:
    """Trains, records every training episode, and measures an actor every so many steps.

    Returns:
        One mapping per actor: ``step``, ``return_mean``, ``return_std`` and ``file``.
    """
    folder = args.folder("training")
    log = folder / "training.json"
    if log.exists():
        found = json.loads(log.read_text("utf-8"))
        if found["settings"] != args.training:
            raise InvalidInputError(
                f"{folder} was trained with other settings ({found['settings']}). Choose another "
                "--output, or delete that folder and the datasets beside it."
            )
        console.print(f"training       kept {folder}")
        return found["actors"]

    algorithms = require("stable_baselines3", "sb3")
    episodes = StoreWriter(
        folder / "episodes",
        name=folder.name,
        source={"kind": "sb3-training", **args.training},
        env_specs=world.env_specs,
        features=world.features,
        overwrite=True,
        resume=False,
    )
    model = getattr(algorithms, args.algorithm.upper())(
        "MlpPolicy",
        RecordEpisodes(gymnasium.make(args.env), episodes),
        seed=args.seed,
        device="cpu",
        policy_kwargs={"net_arch": list(args.hidden)},
    )
    actors = []
    with episodes:
        while True:
            step = model.num_timesteps
            agent = from_model(model, world.features)
            file = agent.save(folder / "actors" / f"step-{step:08d}.safetensors")
            evaluation = evaluate(agent, args.env, args.eval_episodes, seed=args.seed, n_envs=4)
            summary = evaluation.summary()
            measured = {name: summary[name] for name in ("return_mean", "return_std")}
            actors.append({"step": step, **measured, "file": file.name})
            console.print(f"{args.env}  step {step:,}  {evaluation}")
            if step >= args.train_steps:
                break
            model.learn(args.eval_every, reset_num_timesteps=False)
        model.get_env().close()
    document = {"settings": args.training, "actors": actors}
    write_atomic(log, (json.dumps(document, indent=1) + "\n").encode())
    return actors


def choose(actors: list[dict[str, Any]], share: float) -> dict[str, dict[str, Any]]:
    """The untrained, the medium and the best actor."""
    first, best = actors[0], max(actors, key=lambda actor: actor["return_mean"])
    bar = first["return_mean"] + share * (best["return_mean"] - first["return_mean"])
    medium = next(actor for actor in actors if actor["return_mean"] >= bar)
    if not first["step"] < medium["step"] < best["step"]:
        raise InvalidInputError(
            f"Training did not separate the actors: untrained {first['return_mean']:.1f}, medium "
            f"{medium['return_mean']:.1f} at step {medium['step']}, best "
            f"{best['return_mean']:.1f} at step {best['step']}. Start again in another --output, "
            "with more --train-steps or a smaller --eval-every."
        )
    return {"random": first, "medium": medium, "expert": best}


def load_actor(args: Args, actor: dict[str, Any]) -> SB3Agent:
    """Loads an actor of the training run."""
    return SB3Agent.load(args.folder("training") / "actors" / actor["file"], device="cpu")


def play(args: Args, actor: dict[str, Any], kind: Kind) -> Iterator[Episode]:
    """Episodes of a stochastic actor; episode i depends on the seed and i alone."""
    agent = load_actor(args, actor)
    env = RecordEpisodes(gymnasium.make(args.env))
    steps = 0
    for index in count():
        path = (KINDS.index(kind), index)
        observation, _ = env.reset(seed=derive_env_seed(args.seed, "data", *path))
        agent.reset(seed=derive_seed(args.seed, "data", *path))
        over = False
        while not over:
            action = agent.act(observation, deterministic=False)
            observation, reward, terminated, truncated, _ = env.step(action)
            agent.step(float(reward), terminated, truncated)
            over = terminated or truncated
            steps += 1
        yield env.episodes.pop()
        if steps >= args.transitions:
            return


def replay(args: Args, until: int) -> Iterator[Episode]:
    """Training episodes that ended before an actor was saved."""
    dataset = open_dataset(args.folder("training") / "episodes")
    ends = dataset.lengths.cumsum()
    yield from (dataset.episode(index) for index in range(int((ends <= until).sum())))


def mixture(args: Args) -> Iterator[Episode]:
    """All episodes of medium and of expert."""
    for kind in ("medium", "expert"):
        dataset = open_dataset(args.folder(kind))
        yield from (dataset.episode(index) for index in range(len(dataset)))


def episodes_of(args: Args, kind: Kind, actors: dict[str, dict[str, Any]]) -> Iterator[Episode]:
    """What a dataset holds."""
    if kind == "medium-replay":
        return replay(args, actors["medium"]["step"])
    if kind == "medium-expert":
        return mixture(args)
    return play(args, actors[kind], kind)


def measured_references(args: Args, actors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean returns of the untrained and of the best actor, on episodes that chose neither."""
    file = args.folder("training") / "references.json"
    source = (
        f"untrained and best {args.algorithm.upper()} actor of this collection, "
        f"{args.reference_episodes} episodes each"
    )
    if file.exists():
        found = json.loads(file.read_text("utf-8"))
        if found["source"] != source:
            raise InvalidInputError(
                f"{file} was measured otherwise ({found['source']}), and the datasets carry it. "
                "Give the same --reference-episodes, or choose another --output."
            )
        return found
    means = {}
    for bound, kind in (("min", "random"), ("max", "expert")):
        agent = load_actor(args, actors[kind])
        episodes = range(args.eval_episodes, args.eval_episodes + args.reference_episodes)
        summary = evaluate(agent, args.env, episodes, seed=args.seed, n_envs=10).summary()
        means[bound] = summary["return_mean"]
    if means["min"] >= means["max"]:
        raise InvalidInputError(
            f"Over {args.reference_episodes} episodes the best actor earns {means['max']:.1f}, no "
            f"more than the untrained one ({means['min']:.1f}). Start again in another --output, "
            "with more --train-steps or more --eval-episodes."
        )
    references = {**means, "source": source}
    write_atomic(file, (json.dumps(references, indent=1) + "\n").encode())
    return references


def record(
    args: Args,
    kind: Kind,
    world: World,
    actors: dict[str, dict[str, Any]],
    references: dict[str, Any],
) -> StoreDataset:
    """Writes one dataset, or keeps the one that is there."""
    folder = args.folder(kind)
    source = {
        **{"kind": "sb3", "dataset": kind, "transitions": args.transitions},
        **{"actor": actors.get(kind, actors["medium"]), **args.training},
    }
    if folder.exists():
        dataset = open_dataset(folder)
        if dataset.info.source != json.loads(json.dumps(source)):
            raise InvalidInputError(
                f"{folder} was recorded with other settings. Choose another --output, or delete "
                "that folder."
            )
        console.print(f"{kind:14s} kept {folder}")
        return dataset
    writer = StoreWriter(
        folder,
        name=folder.name,
        source=source,
        env_specs=world.env_specs,
        features=world.features,
        resume=False,
    )
    with writer:
        for episode in track(
            episodes_of(args, kind, actors), kind, console=console, disable=not sys.stdout.isatty()
        ):
            writer.add(episode)
        writer.reference_scores = dict.fromkeys(writer.tasks, references)
    return open_dataset(folder)


def main(args: Args) -> list[StoreDataset]:
    """Trains, records and reports."""
    counts = (args.train_steps, args.transitions, args.eval_every, args.eval_episodes)
    if min(*counts, args.reference_episodes, *args.hidden) < 1 or not 0 < args.medium < 1:
        raise InvalidInputError("--medium lies between 0 and 1, and every count starts at 1.")
    torch.set_num_threads(args.threads)
    world = describe(args.env)
    actors = choose(train(args, world), args.medium)
    folder = args.folder("training")
    for kind, actor in actors.items():
        chosen = (folder / "actors" / actor["file"]).read_bytes()
        write_atomic(folder / f"{kind}.safetensors", chosen)
    references = measured_references(args, actors)
    datasets = [record(args, kind, world, actors, references) for kind in KINDS]

    name = Column("dataset", overflow="fold")
    table = Table(name, "episodes", "transitions", "return", "normalised")
    for dataset in datasets:
        returns = dataset.episode_returns
        table.add_row(
            dataset.info.name,
            f"{len(dataset)}",
            f"{dataset.info.n_steps:,}",
            f"{returns.mean():.0f} ± {returns.std():.0f}",
            f"{normalised_score(returns, references).mean():.1f}",
        )
    console.print(table)
    for dataset in datasets:
        console.print(f"dataset  {dataset.path}")
    return datasets


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (MailAgentsError, gymnasium.error.Error) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        console.print("Interrupted. The same command starts the unfinished part again.")
        sys.exit(130)
