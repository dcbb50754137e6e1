r"""Train a Decision Mamba on offline data: multi-grained (Lv et al.) or plain (Ota).

    python scripts/train_decision_mamba.py --agent dm --dataset data/sb3/hopper-medium

dm is Decision Mamba with multi-grained blocks and self-evolution (NeurIPS 2024, arXiv:2406.05427):
40 stages of 2,500 updates; from the second stage on the targets move from the recorded actions
toward the policy of the stage before, by a weight that grows to one half. decision-mamba is the
plain one (arXiv:2403.19925): Decision Transformer with attention replaced, here with the same
stages for its evaluations. Self-evolution can be had with every agent, or without:

    --config.self-evolution.enabled          (or --config.self-evolution.no-enabled)

dm-released is the published trunk, which shows the network the actions it is to predict; it is for
parity, not for use. Expect a line per stage with the loss, the weight of the earlier policy and how
far it moved the targets, and every --eval-every stages a line per target return; the last stage is
the headline. Smaller, for a laptop:

    python scripts/train_decision_mamba.py --agent dm --dataset data/sb3/hopper-medium --stages 4 \
        --config.self-evolution.steps-per-stage 250 --config.self-evolution.stages 4 \
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
from mail_baselines.config import DecisionMambaConfig, MultiGrainedConfig
from mail_baselines.d4rl_settings import adapt, published_targets

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Args(RunArguments):
    """Train a Decision Mamba by the published recipe."""

    agent: str = "dm"
    config: AgentConfig = field(default_factory=MultiGrainedConfig)
    stages: int = 40
    """Stages of --config.self-evolution.steps-per-stage updates."""
    eval_every: int = 4
    """Stages between evaluations; the last stage always has one."""
    target_returns: tuple[float, ...] = ()
    """Returns to aim for, the headline's first; none named means the published ones of a D4RL task,
    else the best return in the data."""
    log_every: int = 50
    """Updates between logged losses."""


def main(args: Args) -> None:
    """Trains stage by stage, evaluates and reports."""
    args.check_counts("stages", "eval_every", "log_every")
    if not isinstance(args.config, DecisionMambaConfig | MultiGrainedConfig):
        raise InvalidInputError(
            f"{args.agent!r} is no Decision Mamba; train it with scripts/train.py."
        )
    dataset = mail_agents.open_dataset(args.dataset)
    config = adapt(args.config, args.agent, dataset.info, say=console.print)
    targets = args.target_returns or published_targets(args.agent, dataset.info)
    agent, state, windows, sampler = open_run(args, dataset, config=config)
    evaluate = evaluator(args, agent, dataset, console.print, targets)
    updates = args.config.self_evolution.steps_per_stage
    total = args.stages * updates
    first, seconds = start_training(agent, state, sampler, total)
    for note in training_notes(agent, total):
        console.print(f"note: {note}")
    console.print(
        f"{args.agent}: {trainable_parameters(agent):,} parameters, {len(windows):,} windows of "
        f"{agent.config.history} steps{aims(agent, targets)}, on {agent.device}"
    )

    quiet = not sys.stdout.isatty()
    with Run(args.run_dir, args, first if args.resume else None) as run:
        for stage in range(first // updates + 1, args.stages + 1):
            clock = time.perf_counter()
            agent.policy.train()
            steps = range((stage - 1) * updates + 1, stage * updates + 1)
            for step in track(steps, f"stage {stage}", console=console, disable=quiet):
                with torch.autocast(
                    agent.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"
                ):
                    loss, metrics = agent.loss(windows[next(sampler)])
                agent.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                metrics = {**metrics, **agent.apply_gradients()}
                if step % args.log_every == 0 or step == steps[-1]:
                    values = {name: float(value) for name, value in metrics.items()}
                    values["loss"] = loss.item()
                    if not values["loss"] < float("inf"):
                        raise InvalidInputError(
                            f"The loss became {values['loss']} before update {step}. Lower "
                            f"--config.optim.lr; the checkpoint in {args.run_dir} is intact."
                        )
                    run.log(step, values)
            seconds += time.perf_counter() - clock
            evolution = "".join(
                f", {name.replace('_', ' ')} {values[name]:.4f}"
                for name in ("alpha", "label_shift")
                if name in values
            )
            console.print(f"stage {stage}, loss {values['loss']:.4f}{evolution}")
            # Evaluating comes before saving: a run killed in between evaluates this stage again.
            if stage % args.eval_every == 0 and stage < args.stages:
                evaluate(directory=evaluation_directory(args.run_dir, steps[-1]))
            loop = {"sampler": sampler.state_dict(), "seconds": seconds}
            save_checkpoint(args.run_dir, steps[-1], agent, loop)

    evaluate(directory=evaluation_directory(args.run_dir, total), videos=args.videos)
    finish_run(agent, args, list(dataset.info.env_specs), total, seconds, console.print)


if __name__ == "__main__":
    run_script(main, Args)
