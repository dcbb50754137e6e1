"""Train any registered agent on any dataset, evaluate it, and say where everything is.

    python scripts/train.py --agent mail/ed-ma-bc --dataset data/demo --steps 1000

Every field of the agent's own config is a flag: --config.history 5 --config.optim.lr 1e-3. Expect a
progress bar with the loss, then one line per task with the success rate and its 95% interval.
A killed run continues exactly where its last checkpoint was:

    python scripts/train.py --resume runs/mail-ed-ma-bc-s0

Several processes share every batch when torchrun starts the script:

    torchrun --nproc-per-node 2 scripts/train.py --agent mail/ed-ma-bc --dataset data/demo
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import track

import mail_agents
from mail_agents.checkpoint import save_checkpoint
from mail_agents.config import AgentConfig
from mail_agents.data.dataset import split_episodes
from mail_agents.errors import InvalidInputError
from mail_agents.suite import evaluation_directory
from mail_agents.training.distributed import Team, run_team_script
from mail_agents.training.notes import aims, trainable_parameters, training_notes
from mail_agents.training.runs import Run, RunArguments
from mail_agents.training.session import (
    evaluator,
    finish_run,
    open_run,
    reading_ahead,
    start_training,
    validation_loss,
    what_is_kept,
)
from mail_agents.training.step import gradients

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Args(RunArguments):
    """Train a registered agent."""

    agent: str = "mail/ed-ma-ddpm"
    config: AgentConfig = field(default_factory=AgentConfig)
    steps: int = 1000
    """Optimiser updates."""
    validation: float = 0.0
    """Fraction of episodes kept out of training, for a validation loss."""
    eval_every: int = 0
    """Updates between further evaluations, to report the best besides the last; 0 for none."""
    target_returns: tuple[float, ...] = ()
    """Returns to aim for, the headline's first, for return-conditioned agents; none named means the
    agent's own."""
    save_every: int = 500
    """Updates between checkpoints."""
    log_every: int = 20
    """Updates between logged losses."""


def main(args: Args, team: Team) -> None:
    """Trains, evaluates and reports."""
    args.check_counts("steps", "save_every", "log_every")
    dataset = mail_agents.open_dataset(args.dataset)
    train, held_out = split_episodes(len(dataset), args.validation, args.seed)
    agent, state, windows, sampler = open_run(args, dataset, train, team=team)
    checks = dataset.windows(agent.window_spec, held_out) if held_out else None
    evaluate = None
    if team.leads:
        evaluate = evaluator(args, agent, dataset, console.print, args.target_returns)
    first, seconds = start_training(agent, state, sampler, args.steps)
    episodes, parameters = agent.training_episodes(dataset, train), trainable_parameters(agent)
    total = args.steps if parameters else 0  # reference agents only take statistics
    console.quiet = not team.leads
    for note in training_notes(agent, total):
        console.print(f"note: {note}")
    console.print(
        f"{args.agent}: {parameters:,} parameters, {len(windows):,} windows of "
        f"{len(episodes)} episodes, {len(dataset.info.tasks)} tasks"
        f"{aims(agent, args.target_returns)}, on {team.describe(agent)}"
    )

    resumed = first if args.resume else None
    opened = Run(args.run_dir, args, resumed) if team.leads else nullcontext()
    with opened as run, reading_ahead(agent, windows, sampler) as batches:
        clock = time.perf_counter()
        quiet = not sys.stdout.isatty()
        for step in track(range(first, total), "training", console=console, disable=quiet):
            agent.policy.train()
            loss, metrics = gradients(agent, next(batches), team, args.precision)
            if not torch.isfinite(loss):
                raise InvalidInputError(
                    f"The loss became {loss.item()} at step {step}. Lower --config.optim.lr or set "
                    f"--config.optim.grad-clip. {what_is_kept(args.run_dir)}"
                )
            metrics = {**metrics, **agent.apply_gradients()}

            done = step + 1
            if run is None or evaluate is None:
                if _pauses(args, done, total):
                    team.wait()
                continue
            if done % args.log_every == 0 or done == total:
                values = {name: float(value) for name, value in metrics.items()}
                values |= {"loss": loss.item(), "lr": float(agent.scheduler.get_last_lr()[0])}
                if checks is not None:
                    values["validation_loss"] = validation_loss(agent, checks)
                run.log(done, values)
            # Evaluating comes before saving: a run killed in between evaluates this step again.
            if args.eval_every and done % args.eval_every == 0 and done < total:
                evaluate(directory=evaluation_directory(args.run_dir, done))
            if done % args.save_every == 0 or done == total:
                elapsed = seconds + time.perf_counter() - clock
                loop = {"sampler": batches.state_dict(), "seconds": elapsed}
                save_checkpoint(args.run_dir, done, agent, loop)
            if _pauses(args, done, total):
                team.wait()
        seconds += time.perf_counter() - clock

    if evaluate is None:
        return
    evaluate(directory=evaluation_directory(args.run_dir, total), videos=args.videos)
    finish_run(agent, args, list(dataset.info.env_specs), total, seconds, console.print)


def _pauses(args: Args, done: int, total: int) -> bool:
    """Whether the first process has more to do after an update than the others."""
    intervals = (args.eval_every, args.save_every)
    return done == total or any(every and done % every == 0 for every in intervals)


if __name__ == "__main__":
    run_team_script(main, Args)
