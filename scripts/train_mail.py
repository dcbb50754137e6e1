"""Train a MaIL policy by the paper's recipe (Jia et al., CoRL 2024, arXiv:2406.08234).

    python scripts/train_mail.py --agent mail/ed-ma-ddpm --dataset data/demo --demos 10

The recipe: one policy on all tasks of a dataset, 10 demonstrations per task (20% of LIBERO's 50),
Adam at 5e-4, 50 epochs, EMA weights for the diffusion head, 20 evaluation episodes per task from
fixed initial states; the score is the mean of task success rates after the last epoch. The eight
variants are mail/{d-ma,ed-ma,d-tr,ed-tr}-{bc,ddpm}; add -released for the released code's quirks
(and --demo-selection mail_legacy for its choice of demonstrations). Expect one line per task and
epoch of evaluation, then the suite's score. --resume RUN continues a killed run exactly.
"""

import sys
import time
from dataclasses import dataclass, field
from typing import Literal

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
from mail_agents.suite import evaluation_directory
from mail_agents.training.runs import Run, RunArguments, run_script
from mail_agents.training.session import (
    evaluator,
    finish_run,
    open_run,
    start_training,
    trainable_parameters,
    training_notes,
)

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Args(RunArguments):
    """Train a MaIL policy by the paper's recipe."""

    agent: str = "mail/ed-ma-ddpm"
    config: AgentConfig = field(default_factory=MailConfig)
    demos: int | None = 10
    """Demonstrations per task; None takes all."""
    demo_selection: Literal["first", "mail_legacy"] = "first"
    """'first': the first --demos of each task. 'mail_legacy': the ones the released code picks."""
    epochs: int = 50
    """Passes over all windows."""
    eval_epochs: tuple[int, ...] = (40, 50)
    """Epochs after which to evaluate; the last epoch always is."""


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


def main(args: Args) -> None:
    """Trains epoch by epoch, evaluates and reports."""
    args.check_counts("epochs")
    if not args.agent.startswith("mail/"):
        raise InvalidInputError(f"{args.agent!r} is no MaIL agent; train it with scripts/train.py.")
    dataset = mail_agents.open_dataset(args.dataset)
    episodes = select_episodes(dataset, args)
    agent, state, windows, sampler = open_run(args, dataset, episodes)
    evaluate = evaluator(args, agent, dataset, console.print)
    per_epoch = sampler.batches_per_epoch
    total = args.epochs * per_epoch
    first, seconds = start_training(agent, state, sampler, total)
    for note in training_notes(agent, total):
        console.print(f"note: {note}")
    console.print(
        f"{args.agent}: {trainable_parameters(agent):,} parameters, {len(windows):,} windows of "
        f"{len(episodes)} demonstrations of {len(dataset.info.tasks)} tasks, "
        f"{per_epoch} updates per epoch, on {agent.device}"
    )

    quiet = not sys.stdout.isatty()
    with Run(args.run_dir, args, first if args.resume else None) as run:
        epochs = range(first // per_epoch, args.epochs)
        for epoch in track(epochs, "epochs", console=console, disable=quiet):
            clock = time.perf_counter()
            losses = []
            agent.policy.train()
            for _ in range(per_epoch):
                with torch.autocast(
                    agent.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"
                ):
                    loss, _ = agent.loss(windows[next(sampler)])
                agent.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                agent.apply_gradients()
                losses.append(loss.detach())
            mean_loss = float(torch.stack(losses).mean())
            if not np.isfinite(mean_loss):
                raise InvalidInputError(
                    f"The loss became {mean_loss} in epoch {epoch + 1}. Lower --config.optim.lr; "
                    f"the checkpoint in {args.run_dir} is intact."
                )
            seconds += time.perf_counter() - clock
            done = (epoch + 1) * per_epoch
            run.log(done, {"loss": mean_loss, "epoch": epoch + 1})
            # Evaluating comes before saving: a run killed in between evaluates this epoch again.
            if epoch + 1 in args.eval_epochs and epoch + 1 < args.epochs:
                console.print(f"epoch {epoch + 1}, loss {mean_loss:.4f}")
                evaluate(directory=evaluation_directory(args.run_dir, done))
            loop = {"sampler": sampler.state_dict(), "seconds": seconds}
            save_checkpoint(args.run_dir, done, agent, loop)

    final = evaluate(directory=evaluation_directory(args.run_dir, total), videos=args.videos)
    if final:
        rates = [each.success_rate for each in final.values() if each.success_rate is not None]
        console.print(f"suite score {np.mean(rates):.3f}: mean of {len(rates)} task success rates")
    finish_run(agent, args, list(dataset.info.env_specs), total, seconds, console.print)


if __name__ == "__main__":
    run_script(main, Args)
