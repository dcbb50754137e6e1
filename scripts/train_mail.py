"""Train a MaIL policy by the paper's recipe (Jia et al., CoRL 2024, arXiv:2406.08234).

    python scripts/train_mail.py --agent mail/ed-ma-ddpm --dataset data/demo --demos 10
    python scripts/train_mail.py --agent mail/ed-ma-ddpm --suite libero_object --dataset data/object

--suite takes everything else from the paper: the two cameras where the dataset has them, sizes of
the chosen variant, chunk, batch, and for libero_goal and libero_90 language; flags given beside it
win. Results are published for a history of 1 and of 5 steps only; 5 is taken. The recipe: one
policy on all tasks of a dataset, 10 demonstrations per task (20% of LIBERO's 50), Adam at 5e-4, 50
epochs, EMA weights for the diffusion head, 20 evaluation episodes per task from fixed initial
states; the score is the mean of task success rates after the last epoch. The eight variants are
mail/{d-ma,ed-ma,d-tr,ed-tr}-{bc,ddpm}; add -released for the released code's quirks (and
--demo-selection mail_legacy for its choice of demonstrations). Expect one line per task and epoch
of evaluation, then a table of the tasks and the suite's score. --resume RUN continues a killed run
exactly. On several GPUs, with a batch that stays that of all together:

    torchrun --nproc-per-node 4 scripts/train_mail.py --suite libero_90 --dataset data/libero_90
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

import mail_agents
from mail_agents.agents.mail_config import MailConfig
from mail_agents.checkpoint import save_checkpoint
from mail_agents.config import AgentConfig
from mail_agents.data.dataset import TrajectoryDataset, select_demos
from mail_agents.errors import InvalidInputError
from mail_agents.registry import spec
from mail_agents.suite import World, evaluation_directory
from mail_agents.training.distributed import Team, run_team_script
from mail_agents.training.mail_suites import SUITES, Suite, suite_settings
from mail_agents.training.notes import trainable_parameters, training_notes
from mail_agents.training.runs import Run, RunArguments
from mail_agents.training.session import (
    evaluator,
    finish_run,
    open_run,
    reading_ahead,
    start_training,
    what_is_kept,
)
from mail_agents.training.step import gradients
from mail_agents.training.task_report import task_table
from mail_envs.libero_protocols import PROTOCOLS
from mail_wrappers.datasets.libero_names import tasks_of

console = Console(soft_wrap=True)

#: What the paper's agent sees; no joint angles and the like.
CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")


@dataclass(frozen=True)
class Args(RunArguments):
    """Train a MaIL policy by the paper's recipe."""

    agent: str = "mail/ed-ma-ddpm"
    config: AgentConfig = field(default_factory=MailConfig)
    suite: Suite | None = None
    """LIBERO suite whose published settings to take; the dataset must hold its tasks."""
    demos: int | None = 10
    """Demonstrations per task; None takes all."""
    demo_selection: Literal["first", "mail_legacy"] = "first"
    """'first': the first --demos of each task. 'mail_legacy': the ones the released code picks."""
    epochs: int = 50
    """Passes over all windows."""
    eval_epochs: tuple[int, ...] = (40, 50)
    """Epochs after which to evaluate; the last epoch always is."""

    @classmethod
    def recommended(cls, agent: str, flag: Callable[[str], str | None]) -> Self:
        """Takes the suite's settings where ``--suite`` names one."""
        suite = flag("suite")
        if suite not in SUITES:  # none, or a mistake, which the parser explains
            return super().recommended(agent, flag)
        return cls(agent=agent, config=spec(agent).config(suite_settings(agent, suite)))


def check_suite(tasks: Sequence[str], suite: str) -> str | None:
    """Refuses a dataset with tasks that are not of a suite.

    Args:
        tasks: Names of the dataset's tasks.
        suite: The suite.

    Returns:
        A sentence where tasks of the suite are missing, else None.

    Raises:
        InvalidInputError: A task is not of the suite.
    """
    expected = tasks_of(suite)
    strange = [task for task in tasks if task not in expected]
    if strange or not tasks:
        found = f"{strange[0]!r} is not ({len(strange)} of {len(tasks)})" if strange else "has none"
        raise InvalidInputError(
            f"--suite {suite} needs a dataset with tasks of that suite; {found}. Choose the suite "
            "that the data are of, or drop --suite for other data."
        )
    if len(tasks) == len(expected):
        return None
    return f"The dataset has {len(tasks)} of the {len(expected)} tasks of {suite}."


def paper_observations(args: Args, dataset: TrajectoryDataset) -> Args:
    """Lets the agent see what the paper's does, two cameras, where nothing else is asked for."""
    has_cameras = set(CAMERAS) <= set(dataset.features.observations)
    if args.suite is None or args.resume or args.observations or not has_cameras:
        return args
    return replace(args, observations=CAMERAS)


def suite_notes(args: Args, dataset: TrajectoryDataset, seen: Iterable[str]) -> list[str]:
    """Sentences on where a run with ``--suite`` is not the paper's.

    Args:
        args: With a suite.
        dataset: Its worlds are those of the evaluation.
        seen: Observation keys of the agent.

    Raises:
        InvalidInputError: A task is not of the suite.
    """
    suite = str(args.suite)
    notes = [check_suite(dataset.info.tasks, suite)]
    if set(seen) != set(CAMERAS):
        notes.append(
            f"The paper's agent sees {' and '.join(CAMERAS)}; this one sees "
            f"{', '.join(sorted(seen))}."
        )
    if args.eval_episodes:
        worlds = [World.from_spec(*each) for each in dataset.info.env_specs.items()]
        differences = {line: None for world in worlds for line in _differences(world, suite)}
        if differences:
            notes.append(f"The evaluation is not the paper's protocol: {'; '.join(differences)}.")
    return [note for note in notes if note is not None]


def _differences(world: World, suite: str) -> list[str]:
    """Where a world is not as the paper plays it; LIBERO's worlds are, unless told otherwise."""
    if not world.env_id.rpartition(":")[2].startswith(f"{suite}/"):
        return [f"{world.env_id} is no world of {suite}"]
    protocol = PROTOCOLS["mail"]
    lines = [
        f"{name} is {world.kwargs[name]!r}, not {value!r}"
        for name, value in protocol.env_kwargs.items()
        if world.kwargs.get(name, value) != value
    ]
    steps = protocol.max_steps(suite)
    if world.max_steps not in (None, steps):
        lines.append(f"episodes end after {world.max_steps} steps, not {steps}")
    return lines


def select_episodes(dataset: TrajectoryDataset, args: Args) -> list[int]:
    """The training episodes: --demos of each task, in the order of the dataset."""
    chosen: list[int] = []
    for task, name in enumerate(dataset.info.tasks):
        episodes = np.flatnonzero(dataset.task_ids == task)
        keys = [f"demo_{number}" for number in range(len(episodes))]
        if args.demos is not None and args.demos > len(keys):
            raise InvalidInputError(
                f"Task {name!r} has {len(keys)} demonstrations, --demos asks for {args.demos}. "
                "Record more with scripts/collect.py --episodes, or give a smaller number."
            )
        picked = select_demos(keys, args.demos, args.demo_selection)
        chosen += [int(episodes[keys.index(key)]) for key in picked]
    return sorted(chosen)


def main(args: Args, team: Team) -> None:
    """Trains epoch by epoch, evaluates and reports."""
    args.check_counts("epochs")
    if not args.agent.startswith("mail/"):
        raise InvalidInputError(f"{args.agent!r} is no MaIL agent; train it with scripts/train.py.")
    dataset = mail_agents.open_dataset(args.dataset)
    if args.suite:
        check_suite(dataset.info.tasks, args.suite)
    args = paper_observations(args, dataset)
    episodes = select_episodes(dataset, args)
    agent, state, windows, sampler = open_run(args, dataset, episodes, team=team)
    evaluate = evaluator(args, agent, dataset, console.print) if team.leads else None
    per_epoch = sampler.batches_per_epoch
    total = args.epochs * per_epoch
    first, seconds = start_training(agent, state, sampler, total)
    console.quiet = not team.leads
    seen = agent.features.observations
    published = suite_notes(args, dataset, seen) if args.suite else []
    for note in (*published, *training_notes(agent, total)):
        console.print(f"note: {note}")
    console.print(
        f"{args.agent}: {trainable_parameters(agent):,} parameters, {len(windows):,} windows of "
        f"{len(episodes)} demonstrations of {len(dataset.info.tasks)} tasks, "
        f"{per_epoch} updates per epoch, on {team.describe(agent)}"
    )

    quiet = not sys.stdout.isatty()
    resumed = first if args.resume else None
    opened = Run(args.run_dir, args, resumed) if team.leads else nullcontext()
    with opened as run, reading_ahead(agent, windows, sampler) as batches:
        epochs = range(first // per_epoch, args.epochs)
        for epoch in track(epochs, "epochs", console=console, disable=quiet):
            clock = time.perf_counter()
            losses = []
            agent.policy.train()
            for _ in range(per_epoch):
                loss, _ = gradients(agent, next(batches), team, args.precision)
                agent.apply_gradients()
                losses.append(loss)
            mean_loss = float(torch.stack(losses).mean())
            if not np.isfinite(mean_loss):
                raise InvalidInputError(
                    f"The loss became {mean_loss} in epoch {epoch + 1}. Lower --config.optim.lr. "
                    f"{what_is_kept(args.run_dir)}"
                )
            seconds += time.perf_counter() - clock
            done = (epoch + 1) * per_epoch
            if run is not None and evaluate is not None:
                run.log(done, {"loss": mean_loss, "epoch": epoch + 1})
                # Evaluating comes before saving: a run killed in between does this epoch again.
                if epoch + 1 in args.eval_epochs and epoch + 1 < args.epochs:
                    console.print(f"epoch {epoch + 1}, loss {mean_loss:.4f}")
                    evaluate(directory=evaluation_directory(args.run_dir, done))
                loop = {"sampler": batches.state_dict(), "seconds": seconds}
                save_checkpoint(args.run_dir, done, agent, loop)
            team.wait()

    if evaluate is None:
        return
    final = evaluate(directory=evaluation_directory(args.run_dir, total), videos=args.videos)
    tasks = list(dataset.info.env_specs)
    result = finish_run(agent, args, tasks, total, seconds, console.print)
    if "last" in result.evaluations:
        # In a file, lines may be as long as the names of LIBERO's tasks make them.
        epochs = "1 epoch" if args.epochs == 1 else f"{args.epochs} epochs"
        table = task_table(result, f"{args.agent} after {epochs}")
        (Console(width=200) if quiet else console).print(table)
    rates = [each.success_rate for each in final.values() if each.success_rate is not None]
    if rates:
        console.print(f"suite score {np.mean(rates):.3f}: mean of {len(rates)} task success rates")


if __name__ == "__main__":
    run_team_script(main, Args)
