r"""Train a Decision Transformer on offline data (Chen et al. 2021, arXiv:2106.01345).

    python scripts/train_dt.py --dataset data/sb3/hopper-medium

The recipe of the released code: windows of 20 steps of (return-to-go, state, action), AdamW at 1e-4
after 10,000 updates of warm-up, batches of 64, gradients clipped to 0.25, 10 iterations of 10,000
updates; after each iteration 100 episodes for every target return. Data that D4RL published takes
context, scale and targets from the published tables, other data aims for the best return it holds.
--agent dt-corl is CORL's variant, dt-released the released padding. Expect a line per target and
iteration, and at the end the normalised score where the dataset has reference returns; the last
iteration is the headline. Smaller, for a laptop:

    python scripts/train_dt.py --dataset data/sb3/hopper-medium --iterations 2 --updates 500 \
        --config.d-model 64 --config.history 10 --config.optim.warmup-steps 100 --eval-episodes 10

--resume RUN continues a killed run exactly.
"""

import sys
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import track

import mail_agents
from mail_agents.checkpoint import save_checkpoint
from mail_agents.config import AgentConfig
from mail_agents.errors import InvalidInputError
from mail_agents.suite import evaluation_directory
from mail_agents.training.notes import aims, trainable_parameters, training_notes
from mail_agents.training.runs import Run, RunArguments, run_script
from mail_agents.training.session import (
    evaluator,
    finish_run,
    open_run,
    start_training,
)
from mail_baselines.config import DTConfig
from mail_baselines.d4rl_settings import adapt, published_targets

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Args(RunArguments):
    """Train a Decision Transformer by the published recipe."""

    agent: str = "dt"
    config: AgentConfig = field(default_factory=DTConfig)
    iterations: int = 10
    """Rounds of training, each followed by an evaluation."""
    updates: int = 10_000
    """Optimiser updates per iteration."""
    target_returns: tuple[float, ...] = ()
    """Returns to aim for, the headline's first; none named means the published ones of a D4RL task,
    else the best return in the data."""
    eval_episodes: int = 100
    log_every: int = 100
    """Updates between logged losses."""


def main(args: Args) -> None:
    """Trains iteration by iteration, evaluates and reports."""
    args.check_counts("iterations", "updates", "log_every")
    if not isinstance(args.config, DTConfig):
        raise InvalidInputError(
            f"{args.agent!r} is no Decision Transformer; train it with scripts/train.py."
        )
    dataset = mail_agents.open_dataset(args.dataset)
    config = adapt(args.config, args.agent, dataset.info, say=console.print)
    targets = args.target_returns or published_targets(args.agent, dataset.info)
    agent, state, windows, sampler = open_run(args, dataset, config=config)
    evaluate = evaluator(args, agent, dataset, console.print, targets)
    total = args.iterations * args.updates
    first, seconds = start_training(agent, state, sampler, total)
    for note in training_notes(agent, total):
        console.print(f"note: {note}")
    console.print(
        f"{args.agent}: {trainable_parameters(agent):,} parameters, {len(windows):,} windows of "
        f"{agent.config.history} steps{aims(agent, targets)}, on {agent.device}"
    )

    quiet = not sys.stdout.isatty()
    with Run(args.run_dir, args, first if args.resume else None) as run:
        for iteration in range(first // args.updates, args.iterations):
            clock = time.perf_counter()
            agent.policy.train()
            steps = range(iteration * args.updates + 1, (iteration + 1) * args.updates + 1)
            for step in track(steps, f"iteration {iteration + 1}", console=console, disable=quiet):
                with torch.autocast(
                    agent.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"
                ):
                    loss, metrics = agent.loss(windows[next(sampler)])
                agent.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                metrics = {**metrics, **agent.apply_gradients()}
                if step % args.log_every == 0 or step == steps[-1]:
                    value = loss.item()
                    if not value < float("inf"):
                        raise InvalidInputError(
                            f"The loss became {value} before update {step}. Lower "
                            f"--config.optim.lr; the checkpoint in {args.run_dir} is intact."
                        )
                    run.log(step, {"loss": value} | {k: float(v) for k, v in metrics.items()})
            seconds += time.perf_counter() - clock
            # Evaluating comes before saving: a run killed in between evaluates this step again.
            console.print(f"iteration {iteration + 1}, {steps[-1]:,} updates, loss {value:.4f}")
            if steps[-1] < total:
                evaluate(directory=evaluation_directory(args.run_dir, steps[-1]))
            loop = {"sampler": sampler.state_dict(), "seconds": seconds}
            save_checkpoint(args.run_dir, steps[-1], agent, loop)

    evaluate(directory=evaluation_directory(args.run_dir, total), videos=args.videos)
    finish_run(agent, args, list(dataset.info.env_specs), total, seconds, console.print)


if __name__ == "__main__":
    run_script(main, Args)
