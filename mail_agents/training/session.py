"""What train scripts do before and after their loop: start or resume, and sum up."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import mail_agents
from mail_agents.checkpoint import (
    has_checkpoint,
    last_checkpoint,
    load_checkpoint,
    restore_training_state,
)
from mail_agents.config import AgentConfig
from mail_agents.data.prefetch import Prefetcher
from mail_agents.data.references import from_dataset
from mail_agents.data.windows import BatchSampler
from mail_agents.errors import InvalidInputError
from mail_agents.report.results import RunResult, save_results
from mail_agents.report.settings import mean_score
from mail_agents.report.summary import score_lines
from mail_agents.rollout import Evaluation
from mail_agents.seeding import derive_seed
from mail_agents.suite import (
    check_targets,
    completed_evaluations,
    completed_targets,
    evaluate_worlds,
    evaluation_directory,
    played_worlds,
    recorded_videos,
    worlds_of,
)
from mail_agents.training.distributed import Team
from mail_agents.training.notes import trainable_parameters, training_notes
from mail_agents.training.runs import METRICS, RunArguments, read_metrics
from mail_agents.training.step import pinned

if TYPE_CHECKING:
    from mail_agents.agent import Agent
    from mail_agents.data.dataset import TrajectoryDataset
    from mail_agents.data.views import StepView


def open_agent(
    run: Path,
    resume: bool,
    dataset: "TrajectoryDataset",
    episodes: Sequence[int],
    make: Callable[[], "Agent"],
    device: str,
) -> tuple["Agent", dict[str, Any] | None]:
    """Makes and fits a new agent, or loads the one of the run's last checkpoint.

    A run killed before its first checkpoint starts again, with the same seeds.

    Args:
        run: Run directory.
        resume: Whether to continue the run.
        dataset: What it trains on.
        episodes: Training episodes, for the statistics of a new agent.
        make: Makes a new agent.
        device: Where a loaded agent goes.

    Returns:
        The agent, and the saved state for :func:`start_training` (None for a new agent).

    Raises:
        InvalidInputError: The run was trained on other data.
        CorruptFileError: The checkpoint cannot be used.
    """
    if not resume or not has_checkpoint(run):
        agent = make()
        agent.fit_statistics(dataset, episodes)
        return agent, None
    agent, state = load_checkpoint(last_checkpoint(run), device=device)
    trained_on = agent.provenance["dataset"]["sha256"]
    if trained_on != dataset.info.sha256:
        raise InvalidInputError(
            f"{run} was trained on another dataset (sha256 {trained_on[:12]}) than "
            f"{dataset.info.name!r} ({dataset.info.sha256[:12]}); a resumed run must see the same "
            "data."
        )
    return agent, state


class OpenRun(NamedTuple):
    """What a train loop works with.

    Attributes:
        agent: Made and fitted, or loaded.
        state: Saved state for :func:`start_training`; None for a new run.
        windows: Training samples.
        sampler: Draws from them.
    """

    agent: "Agent"
    state: dict[str, Any] | None
    windows: "StepView"
    sampler: BatchSampler


def open_run(
    arguments: RunArguments,
    dataset: "TrajectoryDataset",
    episodes: Sequence[int] | None = None,
    config: AgentConfig | None = None,
    team: Team | None = None,
) -> OpenRun:
    """Makes a new run's agent, or loads that of a resumed one, with the data it trains on.

    Args:
        arguments: Of the script.
        dataset: What the agent trains on.
        episodes: Training episodes; None takes all. The agent may choose among them.
        config: The agent's settings; None takes those of ``arguments``.
        team: The processes that train together; None for one alone.

    Raises:
        InvalidInputError: A resumed run was trained on other data, or the batch cannot be split
            over the processes.
        FeatureMismatchError: The agent cannot use the dataset.
        CorruptFileError: The checkpoint cannot be used.
    """
    team = team or Team()
    chosen = list(range(len(dataset))) if episodes is None else list(episodes)
    device = team.device(arguments.device)

    def make() -> "Agent":
        return mail_agents.make(
            arguments.agent,
            dataset.features.select(arguments.observations),
            config=config or arguments.config,
            device=device,
            seed=arguments.seed,
        )

    resume = arguments.resume is not None
    agent, state = open_agent(arguments.run_dir, resume, dataset, chosen, make, device)
    windows = dataset.windows(agent.window_spec, agent.training_episodes(dataset, chosen))
    team.check_same("dataset", f"{dataset.info.sha256} {len(windows)}")
    team.check_same("configuration", json.dumps(agent.config.to_dict(), sort_keys=True))
    sampler = BatchSampler(
        len(windows),
        team.part(agent.config.optim.batch_size),
        arguments.seed,
        rank=team.rank,
        world_size=team.size,
    )
    if arguments.compile:
        for policy in agent.policies():  # an average of the weights acts
            policy.compile()
    if trainable_parameters(agent):
        team.begin(agent)
    return OpenRun(agent, state, windows, sampler)


def reading_ahead(agent: "Agent", windows: "StepView", sampler: BatchSampler) -> Prefetcher:
    """Batches for a train loop, gathered while it computes; its state is the sampler's.

    Args:
        agent: Its device decides whether batches are copied to pinned memory.
        windows: From :func:`open_run`.
        sampler: From :func:`open_run`, where :func:`start_training` has moved it.
    """
    if agent.device.type == "cuda":
        return Prefetcher(windows, sampler, finish=pinned)
    return Prefetcher(windows, sampler)


def start_training(
    agent: "Agent", state: Mapping[str, Any] | None, sampler: BatchSampler, total_steps: int
) -> tuple[int, float]:
    """Prepares optimiser, random streams and sampler for the next update.

    Args:
        agent: From :func:`open_agent`, as is ``state``.
        state: Saved state, or None for a new run.
        sampler: Moved to where it was.
        total_steps: Length of the run.

    Returns:
        The updates done so far and the seconds they took.

    Raises:
        InvalidInputError: More updates are done than the run is to have.
    """
    if trainable_parameters(agent):
        agent.configure_optim(total_steps)
    if state is None:
        # Dropout draws from torch's global stream.
        torch.manual_seed(derive_seed(agent.seed, "train", 1))
        return 0, 0.0
    done = int(state["step"])
    if done > total_steps:
        raise InvalidInputError(
            f"The run has done {done:,} updates already, more than the {total_steps:,} asked for; "
            "make it longer."
        )
    restore_training_state(agent, state["agent"])
    sampler.load_state_dict(state["loop"]["sampler"])
    return done, float(state["loop"]["seconds"])


def evaluator(
    arguments: RunArguments,
    agent: "Agent",
    dataset: "TrajectoryDataset",
    say: Callable[[str], None],
    target_returns: Sequence[float] = (),
) -> Callable[..., dict[str, Evaluation]]:
    """Returns :func:`~mail_agents.suite.evaluate_worlds` for the tasks of a dataset.

    Takes ``directory`` and ``videos``; evaluates nothing when no episodes are asked for. Everything
    that could stop an evaluation or its summary is tried here, before training; each environment
    is made once. The agent's artifact remembers the targets (``provenance["target_returns"]``).

    Raises:
        InvalidInputError: The agent has no use for targets, an environment is not known, cannot be
            made or has too long episodes, or reference scores cannot be used.
        FeatureMismatchError: An environment does not give what the agent sees.
    """
    check_targets(agent, target_returns)
    from_dataset(agent.provenance["dataset"].get("reference_scores", {}))
    worlds = worlds_of(dataset.info.env_specs) if arguments.eval_episodes else []
    for world in worlds:
        world.check_agent(agent)
    if target_returns:
        agent.provenance["target_returns"] = [float(target) for target in target_returns]
    return partial(
        evaluate_worlds,
        agent,
        worlds,
        arguments.eval_episodes,
        seed=arguments.eval_seed,
        n_envs=arguments.eval_envs,
        workers=arguments.eval_workers,
        target_returns=target_returns,
        say=say,
    )


def what_is_kept(run: Path) -> str:
    """Says what a run that cannot go on has left."""
    kept = has_checkpoint(run)
    return f"The last checkpoint in {run} is intact." if kept else "There is no checkpoint yet."


@torch.no_grad()
def validation_loss(agent: "Agent", windows: "StepView", limit: int = 512) -> float:
    """Loss on held-out windows, without dropout and without advancing the training noise."""
    agent.policy.eval()
    noise = agent.generator.get_state()
    loss, _ = agent.loss(windows[: min(limit, len(windows))])
    agent.generator.set_state(noise)
    return float(loss)


def summarise_run(
    agent: "Agent", run: Path, tasks: Sequence[str], steps: int, seconds: float, seed: int
) -> RunResult:
    """Collects from a finished run what a comparison needs.

    ``"best"`` is the evaluation with the highest mean score over tasks (the later one when equal),
    under the first target return; it is there only when the run was evaluated more than once.

    Args:
        agent: The trained agent.
        run: Run directory.
        tasks: Names of the tasks it was evaluated on.
        steps: Updates done; the evaluation after them is the last one.
        seconds: Time of training.
        seed: Training seed.
    """
    evaluations = completed_evaluations(run, tasks)
    references = from_dataset(agent.provenance["dataset"].get("reference_scores", {}))
    named = {"last": evaluations[steps]} if steps in evaluations else {}
    if len(evaluations) > 1:
        best = max(evaluations, key=lambda s: (mean_score(evaluations[s], references), s))
        named["best"] = evaluations[best]
    aimed = [e.get("target_return") for t in named.get("last", ()) for e in t.episodes]
    rows = [row for row in read_metrics(run) if "loss" in row]
    # What is minimised differs (moved targets, further predictions); this error does not.
    recorded = any("action_loss" in row for row in rows)
    objective = f"{getattr(agent.config, 'objective', 'training')} loss"
    return RunResult(
        agent=agent.agent_id,
        label=agent.agent_id,
        dataset=agent.provenance["dataset"]["name"],
        seed=seed,
        parameters=trainable_parameters(agent),
        train_steps=steps,
        train_seconds=seconds,
        curve=[
            (row["step"], row.get("action_error", row.get("action_loss", row["loss"])))
            for row in rows
        ],
        curve_label="action error" if recorded else objective,
        evaluations=named,
        config=agent.config.to_dict(),
        videos=recorded_videos(evaluation_directory(run, steps)),
        references=references,
        target_return=aimed[0] if aimed else None,
        targets=completed_targets(evaluation_directory(run, steps), tasks),
        worlds=played_worlds(evaluation_directory(run, steps), tasks),
        notes=[*agent.caveats(), *training_notes(agent, steps)],
    )


def finish_run(
    agent: "Agent",
    arguments: RunArguments,
    tasks: Sequence[str],
    steps: int,
    seconds: float,
    say: Callable[[str], None],
) -> RunResult:
    """Writes the artifact and ``result.json`` of a run that has trained and been evaluated.

    Args:
        agent: The trained agent.
        arguments: Of the script.
        tasks: Names of the tasks it was evaluated on.
        steps: Updates done.
        seconds: Time of training.
        say: Receives normalised scores, where there are references, and where everything is.
    """
    run = arguments.run_dir
    artifact = agent.save(run / "agent.safetensors")
    result = summarise_run(agent, run, tasks, steps, seconds, arguments.seed)
    results = save_results(run / "result.json", [result])
    for line in score_lines(result):
        say(line)
    say(
        f"agent    {artifact}\nresults  {results}\nmetrics  {run / METRICS}\n"
        f"curves   tensorboard --logdir {run}"
    )
    return result
