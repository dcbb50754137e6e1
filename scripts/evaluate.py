"""Roll out a trained artifact, or an untrained reference agent, on fixed and seeded episodes.

    python scripts/evaluate.py --agent runs/mail-ed-ma-bc-s0 --episodes 50 --output runs/scores
    python scripts/evaluate.py --agent random --env mail_envs:metaworld/reach-v3 --episodes 50

An artifact remembers the environments of its dataset, so --env is only needed to go elsewhere, and
--tasks 'pick_up_*' takes only some. --protocol evaluates LIBERO as a published evaluation did.
Expect one line per task ("42/50 solved, 0.71-0.92" is the 95% Wilson interval), a normalised score
where the dataset has reference returns, and, with --output, episodes.jsonl and summary.json per
task, result.json for reports, and videos when asked for.
"""

import fnmatch
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium
import tyro
from rich.console import Console

import mail_agents
from mail_agents.agent import Agent
from mail_agents.data.references import from_dataset
from mail_agents.errors import InvalidInputError, MailAgentsError, UnknownNameError, unknown_name
from mail_agents.features import FeatureSpec
from mail_agents.report.results import RunResult, group_by_task, save_results
from mail_agents.report.scores import normalised_score
from mail_agents.report.summary import score_lines
from mail_agents.rollout import Evaluation
from mail_agents.storage import write_atomic
from mail_agents.suite import (
    World,
    completed_targets,
    evaluate_worlds,
    played_world,
    recorded_videos,
    worlds_of,
)
from mail_envs.libero_protocols import PROTOCOLS, ProtocolName
from mail_wrappers.datasets.libero_names import SUITES

#: Episodes per task where nobody names a number.
EPISODES = 50


@dataclass(frozen=True)
class Args:
    """Evaluate an agent."""

    agent: str
    """An artifact (or checkpoint directory), or the id of an agent that needs no training."""
    env: str | None = None
    """Gymnasium id ('module:id' imports a module first); None takes the environments of the
    artifact's dataset."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keyword arguments for --env, each value in JSON where it parses."""
    task: str | None = None
    """Task name for --env; None takes the last part of the environment id."""
    dataset: str | None = None
    """Dataset that gives an untrained agent its features and statistics."""
    max_steps: int | None = None
    """Steps after which an episode ends; None takes each environment's own limit."""
    tasks: tuple[str, ...] = ()
    """Tasks to evaluate, by name or pattern ('pick_up_*'); none named means all."""
    protocol: ProtocolName | None = None
    """Evaluate LIBERO as a publication did: its episodes, step limits, settling and images."""
    episodes: int | None = None
    """Episodes per task; None takes those of --protocol, else 50."""
    seed: int = 0
    """Seeds the episodes: the same seed gives the same initial states for every agent."""
    n_envs: int | None = None
    """Environments stepped side by side; None takes what the environment suggests, else 20."""
    workers: int = 1
    """Processes that host the environments."""
    deterministic: bool = False
    """Leave out sampling noise."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights that act."""
    target_returns: tuple[float, ...] = ()
    """Returns to aim for, the headline's first, for return-conditioned agents; none named means
    those that the artifact was scored under, else the agent's own."""
    videos: int = 0
    """Successful and failed episodes to record per task."""
    output: str | None = None
    """New directory for results and videos, one folder per task; None writes nothing."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    as_json: bool = False
    """Print the summaries as JSON and nothing else."""


def check(args: Args) -> None:
    """Refuses numbers that are too small, and flags that would change nothing."""
    smallest = {"max_steps": 1, "episodes": 1, "n_envs": 1, "workers": 1, "videos": 0}
    for name, bound in smallest.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise InvalidInputError(f"--{name.replace('_', '-')} starts at {bound}; got {value}.")
    for name in ("env_kwargs", "task"):
        if args.env is None and getattr(args, name):
            raise InvalidInputError(
                f"--{name.replace('_', '-')} describes the environment of --env, which is not "
                "given. The environments of a dataset have their own; --tasks chooses among them."
            )


def resolve_worlds(args: Args, agent: Agent | None) -> list[World]:
    """The environments to evaluate in."""
    worlds = chosen(known_worlds(args, agent), args.tasks)
    if args.protocol is not None:
        worlds = [following(args, world) for world in worlds]
        if agent is not None:
            check_images(str(args.protocol), agent)
    elif args.max_steps is not None:
        worlds = [replace(world, max_steps=args.max_steps) for world in worlds]
    return worlds


def check_images(name: str, agent: Agent) -> None:
    """Refuses an agent that was trained on other images than a protocol shows."""
    protocol = PROTOCOLS[name]
    wanted = f"{protocol.image_size} px {protocol.orientation}"
    for key, image in agent.features.of_kind("image").items():
        orientation = image.orientation or protocol.orientation
        found = f"{image.shape[0]} px {orientation}"
        if found != wanted:
            raise InvalidInputError(
                f"--protocol {name} shows images of {wanted}, and this agent was trained on "
                f"{found} ({key}). Choose a protocol with its images ({', '.join(PROTOCOLS)}), or "
                "train on data of the protocol's images."
            )


def chosen(worlds: list[World], patterns: Sequence[str]) -> list[World]:
    """Those whose task matches one of the patterns; all when there are none."""
    tasks = [world.task for world in worlds]
    for pattern in patterns:
        if not fnmatch.filter(tasks, pattern):
            raise unknown_name("task of --tasks", pattern, tasks)
    wanted = [any(fnmatch.fnmatchcase(task, p) for p in patterns or "*") for task in tasks]
    return [world for world, taken in zip(worlds, wanted, strict=True) if taken]


def following(args: Args, world: World) -> World:
    """The world as --protocol wants it."""
    protocol = PROTOCOLS[str(args.protocol)]
    suite = world.env_id.rpartition(":")[2].partition("/")[0]
    if suite not in SUITES:
        raise InvalidInputError(
            f"--protocol {args.protocol} is for LIBERO, and task {world.task!r} is played in "
            f"{world.env_id!r}. Leave the flag out, or choose tasks with --tasks."
        )
    if args.max_steps is not None:
        raise InvalidInputError(
            f"--protocol {args.protocol} has step limits of its own; leave out --max-steps."
        )
    kwargs = {**world.kwargs, **protocol.env_kwargs}
    return replace(world, kwargs=kwargs, max_steps=protocol.max_steps(suite))


def known_worlds(args: Args, agent: Agent | None) -> list[World]:
    """The environments of --env, of the dataset or of the agent."""
    if args.env is None:
        specs = {} if agent is None else agent.provenance.get("dataset", {}).get("env_specs", {})
        if args.dataset is not None:
            specs = mail_agents.open_dataset(args.dataset).info.env_specs
        return worlds_of(specs)
    kwargs: dict[str, Any] = {}
    for name, value in args.env_kwargs.items():
        try:
            kwargs[name] = json.loads(value)
        except json.JSONDecodeError:
            kwargs[name] = value
    world = World(args.task or args.env.rpartition("/")[2], args.env, kwargs, args.max_steps)
    world.check()
    return [world]


def load_or_make(args: Args) -> Agent:
    """Loads an artifact, or makes an untrained agent from a dataset's or environment's features."""
    if Path(args.agent).exists() or args.agent.endswith(".safetensors"):
        return mail_agents.load(
            args.agent, device=args.device, weights=args.weights, seed=args.seed
        )
    try:
        mail_agents.spec(args.agent)
    except UnknownNameError as error:
        raise UnknownNameError(f"There is no file or folder {args.agent!r}. {error}") from error
    if args.dataset is not None:
        dataset = mail_agents.open_dataset(args.dataset)
        agent = mail_agents.make(args.agent, dataset.features, device=args.device, seed=args.seed)
        agent.fit_statistics(dataset)
    elif args.env is None:
        raise InvalidInputError(
            f"Agent {args.agent!r} was trained in no environment: name one with --env ID, or a "
            "dataset recorded in some with --dataset DIRECTORY."
        )
    else:
        env = resolve_worlds(args, None)[0].maker()()
        features = FeatureSpec.from_spaces(env.observation_space, env.action_space)
        env.close()
        agent = mail_agents.make(args.agent, features, device=args.device, seed=args.seed)
    if any(p.requires_grad for p in agent.policy.parameters()):
        raise InvalidInputError(
            f"Agent {args.agent!r} must be trained first: run 'python scripts/train.py "
            f"--agent {args.agent} --dataset DATASET' and evaluate the artifact it writes."
        )
    return agent


def summarise(args: Args, agent: Agent, evaluations: dict[str, Evaluation]) -> RunResult:
    """What a report needs to know about this evaluation.

    Returns are scored by the references of the dataset whose environments were played; another
    environment (--env) has none.
    """
    known = agent.provenance.get("dataset", {})
    name, scores = known.get("name", ""), known.get("reference_scores", {})
    if args.env is not None:
        name, scores = args.env, {}
    elif args.dataset is not None:
        info = mail_agents.open_dataset(args.dataset).info
        name, scores = info.name, info.reference_scores
    episodes = [episode for each in evaluations.values() for episode in each.episodes]
    return RunResult(
        agent=agent.agent_id,
        label=agent.agent_id,
        dataset=name,
        seed=agent.seed,
        parameters=sum(parameter.numel() for parameter in agent.policy.parameters()),
        evaluations={"last": group_by_task(episodes)},
        config=agent.config.to_dict(),
        videos=recorded_videos(args.output) if args.output else [],
        references={t: r for t, r in from_dataset(scores).items() if t in evaluations},
        target_return=episodes[0].target_return,
        targets=completed_targets(args.output, list(evaluations)) if args.output else {},
        worlds={task: played_world(each.protocol) for task, each in evaluations.items()},
        notes=agent.caveats(),
    )


def main(args: Args) -> None:
    """Evaluates every task and writes the results."""
    check(args)
    console = Console(quiet=args.as_json, soft_wrap=True)
    agent = load_or_make(args)
    output = None if args.output is None else Path(args.output)
    if output is None and args.videos:
        raise InvalidInputError("Videos need a place: give --output DIRECTORY.")
    if output is not None and (output / "summary.json").exists():
        raise InvalidInputError(f"{output} already holds an evaluation; choose another --output.")
    worlds = resolve_worlds(args, agent)
    episodes = args.episodes
    if episodes is None:
        episodes = EPISODES if args.protocol is None else PROTOCOLS[args.protocol].episodes
    console.print(
        f"{agent.agent_id}: history {agent.config.history}, executes {agent.config.executed} of "
        f"{agent.config.horizon} predicted actions"
    )
    evaluations = evaluate_worlds(
        agent,
        worlds,
        episodes,
        seed=args.seed,
        n_envs=args.n_envs,
        workers=args.workers,
        deterministic=args.deterministic,
        target_returns=args.target_returns or agent.provenance.get("target_returns", ()),
        directory=output,
        videos=args.videos,
        say=console.print,
    )
    result = summarise(args, agent, evaluations)
    summaries = {task: evaluation.summary() for task, evaluation in evaluations.items()}
    for task, reference in result.references.items():
        returns = [episode.episode_return for episode in evaluations[task].episodes]
        summaries[task]["normalised_score"] = float(normalised_score(returns, reference).mean())
        summaries[task]["reference"] = asdict(reference)
    text = json.dumps(summaries, indent=2, sort_keys=True)
    for line in score_lines(result):
        console.print(line)
    if args.as_json:
        print(text)
    if output is not None:
        save_results(output / "result.json", [result])
        write_atomic(output / "summary.json", (text + "\n").encode())
        console.print(f"results  {output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (MailAgentsError, gymnasium.error.Error) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again.", file=sys.stderr)
        sys.exit(130)
