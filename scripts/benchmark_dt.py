"""Time Decision Transformer training against CORL's single file, data loading included.

    curl -O https://raw.githubusercontent.com/corl-team/CORL/main/algorithms/offline/dt.py
    python scripts/benchmark_dt.py --corl dt.py

Both train the model of CORL's defaults (3 layers of width 128, 20 steps of context, batch 64,
AdamW, clipped gradients) with equal parameter counts on the same trajectories, in one process,
taking turns. A round is --updates whole updates: windows, forward, backward, clip, step. CORL's
file is imported as it is, with stand-ins for the simulator and logging packages, which an update
never calls. Expect a table with the time per update and the ratio.
"""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.data.episode import Episode
from mail_agents.data.windows import BatchSampler
from mail_agents.errors import InvalidInputError, MailAgentsError

#: What CORL's file imports and an update does not call.
_STANDINS = ("d4rl", "gym", "pyrallis", "wandb")


@dataclass(frozen=True)
class Args:
    """Benchmark Decision Transformer training against CORL."""

    corl: Path
    """CORL's algorithms/offline/dt.py."""
    episodes: int = 50
    """Trajectories of 1000 steps, of random numbers in Hopper's shapes."""
    batch_size: int = 64
    """Windows per update."""
    updates: int = 10
    """Updates per round."""
    rounds: int = 5
    """Timed rounds, after one warm-up."""
    threads: int = 1
    """Threads of torch."""
    workers: int = 0
    """CORL's data loader processes; with 0 it samples in the training process, as ours does."""
    output: str | None = None
    """JSON file for the figures."""


def make_dataset(episodes: int) -> MemoryDataset:
    """Random trajectories with Hopper's sizes: 11 observations, 3 actions, 1000 steps."""
    rng = np.random.default_rng(0)
    return MemoryDataset(
        [
            Episode(
                observations={"state": rng.normal(size=(1001, 11)).astype(np.float32)},
                actions=rng.uniform(-1, 1, (1000, 3)).astype(np.float32),
                rewards=rng.uniform(0, 4, 1000),
                terminations=np.zeros(1000, bool),
                truncations=np.arange(1000) == 999,
            )
            for _ in range(episodes)
        ],
        name="random",
    )


@contextmanager
def standins() -> Iterator[None]:
    """Empty modules in place of packages that are only imported."""
    missing = [name for name in _STANDINS if importlib.util.find_spec(name) is None]
    for name in missing:
        module = ModuleType(name)
        module.Env = object  # type: ignore[attr-defined]
        module.wrap = lambda: lambda function: function  # type: ignore[attr-defined]
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def load_corl(path: Path) -> Any:
    """Imports CORL's file.

    Raises:
        InvalidInputError: The file is not CORL's Decision Transformer.
    """
    spec = importlib.util.spec_from_file_location("corl_dt", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InvalidInputError(f"{path} does not exist; download CORL's algorithms/offline/dt.py.")
    module = importlib.util.module_from_spec(spec)
    with standins():
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except (ImportError, SyntaxError) as error:
            raise InvalidInputError(f"{path} cannot be imported: {error}.") from error
    if not hasattr(module, "DecisionTransformer") or not hasattr(module, "SequenceDataset"):
        raise InvalidInputError(f"{path} is not CORL's algorithms/offline/dt.py.")
    return module


def corl_update(module: Any, dataset: MemoryDataset, args: Args) -> tuple[Callable[[], None], int]:
    """One update of CORL's model on CORL's loader, and its number of parameters."""
    flat = [dataset.episode(index) for index in range(len(dataset))]
    arrays = {
        "observations": np.concatenate([e.observations["state"][:-1] for e in flat]),
        "actions": np.concatenate([e.actions for e in flat]),
        "rewards": np.concatenate([e.rewards for e in flat]).astype(np.float32),
        "terminals": np.concatenate([e.terminations for e in flat]),
        "timeouts": np.concatenate([e.truncations for e in flat]),
    }
    source = SimpleNamespace(get_dataset=lambda: arrays)
    module.gym = SimpleNamespace(make=lambda name: source)
    settings = module.TrainConfig()
    windows = module.SequenceDataset("random", settings.seq_len, settings.reward_scale)
    loader = torch.utils.data.DataLoader(windows, args.batch_size, num_workers=args.workers)
    model = module.DecisionTransformer(
        state_dim=11,
        action_dim=3,
        seq_len=settings.seq_len,
        episode_len=settings.episode_len,
        embedding_dim=settings.embedding_dim,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        attention_dropout=settings.attention_dropout,
        residual_dropout=settings.residual_dropout,
        embedding_dropout=settings.embedding_dropout,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    batches = iter(loader)

    def update() -> None:
        states, actions, returns, steps, mask = next(batches)
        # The released loop hands over float64 states and masks where numpy made them so.
        states, returns = states.float(), returns.float()
        predicted = model(states, actions, returns, steps, padding_mask=~mask.bool())
        error = torch.nn.functional.mse_loss(predicted, actions, reduction="none")
        optimizer.zero_grad()
        (error * mask.unsqueeze(-1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()

    return update, sum(p.numel() for p in model.parameters())


def our_update(dataset: MemoryDataset, args: Args) -> tuple[Callable[[], None], int]:
    """One update of ``dt-corl``, and its number of parameters."""
    agent = mail_agents.make(
        "dt-corl", dataset.features, action_norm="identity", device="cpu", seed=0
    )
    agent.fit_statistics(dataset)
    agent.configure_optim()
    windows = dataset.windows(agent.window_spec)
    sampler = BatchSampler(len(windows), args.batch_size, seed=0)

    def update() -> None:
        agent.update(windows[next(sampler)])

    return update, sum(p.numel() for p in agent.policy.parameters())


def main(args: Args) -> dict[str, Any]:
    """Times both and prints the table."""
    torch.set_num_threads(args.threads)
    dataset = make_dataset(args.episodes)
    ours, our_size = our_update(dataset, args)
    corl, corl_size = corl_update(load_corl(args.corl), dataset, args)
    if our_size != corl_size:
        raise MailAgentsError(f"{our_size} parameters against {corl_size}: an unfair comparison.")
    functions = {"dt-corl, ours": ours, "CORL's dt.py": corl}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(args.rounds + 1):
        for name, update in functions.items():
            began = time.perf_counter()
            for _ in range(args.updates):
                update()
            if round_number:
                times[name].append((time.perf_counter() - began) / args.updates)

    best = {name: min(values) for name, values in times.items()}
    table = Table("update", "min ms", "median ms", "times ours")
    for name, values in times.items():
        ratio = best[name] / best["dt-corl, ours"]
        median = f"{1e3 * statistics.median(values):.1f}"
        table.add_row(name, f"{1e3 * best[name]:.1f}", median, f"{ratio:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{our_size:,} parameters each, batch {args.batch_size}, {args.threads} thread(s), "
        f"{args.workers} loader processes for CORL, {args.rounds} rounds of {args.updates} updates"
    )
    figures = {"args": asdict(args) | {"corl": str(args.corl)}, "seconds": times}
    if args.output is not None:
        Path(args.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except MailAgentsError as error:
        sys.exit(f"error: {error}")
