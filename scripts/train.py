"""Train any registered agent on any dataset, evaluate it, and say where everything is.

    python scripts/train.py --agent mail/ed-ma-bc --dataset data/demo --steps 1000

Every field of the agent's own config is a flag: --config.history 5 --config.optim.lr 1e-3. Expect a
progress bar with the loss, then one line per task with the success rate and its 95% interval.
A killed run continues exactly where its last checkpoint was:

    python scripts/train.py --resume runs/mail-ed-ma-bc-s0
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track

import mail_agents
from mail_agents.agent import Agent
from mail_agents.checkpoint import (
    has_checkpoint,
    last_checkpoint,
    load_checkpoint,
    restore_training_state,
    save_checkpoint,
)
from mail_agents.config import AgentConfig
from mail_agents.data.dataset import DatasetInfo, TrajectoryDataset, split_episodes
from mail_agents.data.windows import BatchSampler
from mail_agents.errors import InvalidInputError, MailAgentsError
from mail_agents.report.results import RunResult, save_results
from mail_agents.suite import (
    completed_evaluations,
    evaluate_world,
    evaluation_directory,
    recorded_videos,
    worlds_of,
)
from mail_agents.training.runs import Run, parse_arguments, read_metrics

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Args:
    """Train a registered agent."""

    agent: str = "mail/ed-ma-ddpm"
    """Registered id; see 'mail-agents list'."""
    config: AgentConfig = field(default_factory=AgentConfig)
    """The agent's own settings; --agent decides which there are."""
    dataset: str = "data/demo"
    """Dataset directory, made by scripts/collect.py or 'mail-agents data convert'."""
    output: str | None = None
    """Run directory; None makes runs/<agent>-s<seed>."""
    steps: int = 1000
    """Optimiser updates."""
    seed: int = 0
    """Seeds initial weights, batch order and training noise."""
    validation: float = 0.0
    """Fraction of episodes kept out of training, for a validation loss."""
    eval_episodes: int = 20
    """Episodes per task; 0 for no evaluation."""
    eval_every: int = 0
    """Also evaluate every so many updates, and report the best besides the last; 0 only at the end."""
    eval_seed: int = 0
    """Seeds the evaluation episodes; the same for every training seed, so runs are paired."""
    eval_envs: int = 10
    """Environments stepped side by side."""
    videos: int = 0
    """Successful and failed episodes to record per task at the end."""
    save_every: int = 500
    """Updates between checkpoints."""
    log_every: int = 20
    """Updates between logged losses."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass (bfloat16 by autocast)."""
    compile: bool = False
    """Compile the policy's training pass."""
    resume: str | None = None
    """Run directory to continue; all other settings are taken from it."""

    @property
    def run_dir(self) -> Path:
        """Where this run lives."""
        if self.resume is not None:
            return Path(self.resume)
        return Path(self.output or f"runs/{self.agent.replace('/', '-')}-s{self.seed}")


def prepare(args: Args, dataset: TrajectoryDataset, train: list[int]) -> tuple[Agent, dict]:
    """Makes a new agent, or loads the one to resume with the state of its loop."""
    if args.resume is None or not has_checkpoint(args.run_dir):
        # A run killed before its first checkpoint starts again, with the same seeds.
        agent = mail_agents.make(
            args.agent, dataset.features, config=args.config, device=args.device, seed=args.seed
        )
        agent.fit_statistics(dataset, train)
        if any(p.requires_grad for p in agent.policy.parameters()):
            agent.configure_optim(args.steps)
        return agent, {"step": 0, "seconds": 0.0}
    agent, state = load_checkpoint(last_checkpoint(args.run_dir), device=args.device)
    trained_on = agent.provenance["dataset"]["sha256"]
    if trained_on != dataset.info.sha256:
        raise InvalidInputError(
            f"{args.run_dir} was trained on another dataset (sha256 {trained_on[:12]}) than "
            f"{args.dataset} ({dataset.info.sha256[:12]}); a resumed run must see the same data."
        )
    agent.configure_optim(args.steps)
    restore_training_state(agent, state["agent"])
    return agent, {"step": state["step"], **state["loop"]}


def evaluate_tasks(args: Args, agent: Agent, step: int, videos: int) -> None:
    """Evaluates every task of the dataset, prints one line each and stores the episodes."""
    for world in worlds_of(agent.provenance["dataset"]["env_specs"]):
        evaluation = evaluate_world(
            agent,
            world,
            args.eval_episodes,
            seed=args.eval_seed,
            n_envs=args.eval_envs,
            directory=evaluation_directory(args.run_dir, step) / world.task,
            videos=videos,
        )
        console.print(f"  step {step}  {world.task}: {evaluation}")


def main(args: Args) -> None:
    """Trains, evaluates and reports."""
    dataset = mail_agents.open_dataset(args.dataset)
    train, held_out = split_episodes(len(dataset), args.validation, args.seed)
    agent, start = prepare(args, dataset, train)
    windows = dataset.windows(agent.window_spec, train)
    checks = dataset.windows(agent.window_spec, held_out) if held_out else None
    sampler = BatchSampler(len(windows), args.config.optim.batch_size, args.seed)
    if "sampler" in start:
        sampler.load_state_dict(start["sampler"])
    if args.compile:
        agent.policy.compile()
    parameters = sum(p.numel() for p in agent.policy.parameters() if p.requires_grad)
    total = args.steps if parameters else 0  # reference agents only take statistics
    console.print(
        f"{args.agent}: {parameters:,} parameters, {len(windows):,} windows of "
        f"{len(train)} episodes, {len(dataset.info.tasks)} tasks, on {agent.device}"
    )

    seconds = start["seconds"]
    with Run(args.run_dir, args, start["step"] if args.resume else None) as run:
        clock = time.perf_counter()
        bar = track(
            range(start["step"], total),
            "training",
            console=console,
            disable=not sys.stdout.isatty(),
        )
        for step in bar:
            agent.policy.train()
            with torch.autocast(
                agent.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"
            ):
                loss, metrics = agent.loss(windows[next(sampler)])
            if not torch.isfinite(loss):
                raise InvalidInputError(
                    f"The loss became {float(loss)} at step {step}. Lower --config.optim.lr or set "
                    f"--config.optim.grad-clip; checkpoints in {args.run_dir} are intact."
                )
            agent.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            metrics = {**metrics, **agent.apply_gradients()}

            done = step + 1
            if done % args.log_every == 0 or done == total:
                values = {name: float(value) for name, value in metrics.items()}
                if checks is not None:
                    values["validation_loss"] = validation_loss(agent, checks)
                run.log(
                    done, {"loss": loss.item(), "lr": agent.scheduler.get_last_lr()[0], **values}
                )
            # Evaluating comes before saving: a run killed in between evaluates this step again.
            if args.eval_every and done % args.eval_every == 0 and done < total:
                evaluate_tasks(args, agent, done, videos=0)
            if done % args.save_every == 0 or done == total:
                elapsed = seconds + time.perf_counter() - clock
                loop = {"sampler": sampler.state_dict(), "seconds": elapsed}
                save_checkpoint(args.run_dir, done, agent, loop)
        seconds += time.perf_counter() - clock

    artifact = agent.save(args.run_dir / "agent.safetensors")
    if args.eval_episodes:
        evaluate_tasks(args, agent, total, args.videos)
    result = summarise(args, dataset.info, parameters, total, seconds)
    results = save_results(args.run_dir / "result.json", [result])
    console.print(
        f"agent    {artifact}\nresults  {results}\nmetrics  {args.run_dir / 'metrics.jsonl'}"
    )
    console.print(f"curves   tensorboard --logdir {args.run_dir}")


@torch.no_grad()
def validation_loss(agent: Agent, windows, limit: int = 512) -> float:
    """Loss on held-out windows, without dropout and without advancing the training noise."""
    agent.policy.eval()
    state = agent.generator.get_state()
    loss, _ = agent.loss(windows[: min(limit, len(windows))])
    agent.generator.set_state(state)
    return float(loss)


def summarise(
    args: Args, info: DatasetInfo, parameters: int, steps: int, seconds: float
) -> RunResult:
    """Collects what a comparison needs; "best" is the highest mean score over tasks."""
    evaluations = (
        completed_evaluations(args.run_dir, list(info.env_specs)) if args.eval_episodes else {}
    )
    named = {"last": evaluations[steps]} if steps in evaluations else {}
    if len(evaluations) > 1:
        best = max(evaluations, key=lambda step: (sum(t.score for t in evaluations[step]), step))
        named["best"] = evaluations[best]
    rows = [row for row in read_metrics(args.run_dir) if "loss" in row]
    return RunResult(
        agent=args.agent,
        label=args.agent,
        dataset=info.name,
        seed=args.seed,
        parameters=parameters,
        train_steps=steps,
        train_seconds=seconds,
        curve=[(row["step"], row["loss"]) for row in rows],
        curve_label=f"{getattr(args.config, 'objective', 'training')} loss",
        evaluations=named,
        config=args.config.to_dict(),
        videos=recorded_videos(evaluation_directory(args.run_dir, steps)),
    )


if __name__ == "__main__":
    try:
        main(parse_arguments(Args))
    except MailAgentsError as error:
        sys.exit(f"error: {error}")
