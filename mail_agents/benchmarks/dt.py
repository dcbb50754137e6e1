"""The subject ``dt``: Decision Transformer training against CORL's single file."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

import mail_agents
from mail_agents.benchmarks.arguments import Dt
from mail_agents.benchmarks.charts import Chart
from mail_agents.benchmarks.report import Report, Table, duration
from mail_agents.benchmarks.timing import interleaved, stopwatch
from mail_agents.data.dataset import MemoryDataset
from mail_agents.data.episode import Episode
from mail_agents.data.windows import BatchSampler
from mail_agents.errors import InvalidInputError, MailAgentsError

OURS, CORL = "dt-corl, ours", "CORL's dt.py"
HEADER = ("update", "minimum", "median", "times ours")
#: What CORL's file imports and an update does not call.
_STANDINS = ("d4rl", "gym", "pyrallis", "wandb")


def make_dataset(episodes: int, seed: int = 0) -> MemoryDataset:
    """Random trajectories with Hopper's sizes: 11 observations, 3 actions, 1000 steps."""
    rng = np.random.default_rng(seed)
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


def corl_update(
    module: Any, dataset: MemoryDataset, arguments: Dt
) -> tuple[Callable[[], None], int]:
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
    loader = torch.utils.data.DataLoader(
        windows, arguments.batch_size, num_workers=arguments.workers
    )
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


def our_update(dataset: MemoryDataset, arguments: Dt) -> tuple[Callable[[], None], int]:
    """One update of ``dt-corl``, and its number of parameters."""
    agent = mail_agents.make(
        "dt-corl", dataset.features, action_norm="identity", device="cpu", seed=arguments.seed
    )
    agent.fit_statistics(dataset)
    agent.configure_optim()
    windows = dataset.windows(agent.window_spec)
    sampler = BatchSampler(len(windows), arguments.batch_size, seed=arguments.seed)

    def update() -> None:
        agent.update(windows[next(sampler)])

    return update, sum(p.numel() for p in agent.policy.parameters())


def _repeated(update: Callable[[], None], count: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(count):
            update()

    return several


def run(arguments: Dt) -> Report:
    """Measures updates of both in turn.

    Raises:
        MailAgentsError: The two models differ in size.
        InvalidInputError: The file is not CORL's.
    """
    torch.set_num_threads(arguments.threads)
    dataset = make_dataset(arguments.episodes, arguments.seed)
    ours, our_size = our_update(dataset, arguments)
    corl, corl_size = corl_update(load_corl(arguments.corl), dataset, arguments)
    if our_size != corl_size:
        raise MailAgentsError(f"{our_size} parameters against {corl_size}: an unfair comparison.")
    # Loader processes do their work outside of this one: only wall time sees it.
    watch = stopwatch("cpu", 0)
    functions = {OURS: _repeated(ours, arguments.updates), CORL: _repeated(corl, arguments.updates)}
    times = interleaved(functions, arguments.rounds, watch, shortest=0.0)
    count = arguments.updates
    rows = tuple(
        (
            name,
            duration(each.best / count),
            duration(each.median / count),
            f"{each.best / times[OURS].best:.2f}",
        )
        for name, each in times.items()
    )
    conditions = (
        f"torch {torch.__version__}, {arguments.threads} thread(s), wall time, "
        f"{arguments.rounds} rounds of {count} updates"
    )
    report = Report("dt", dataclasses.asdict(arguments), conditions)
    report.tables.append(Table("dt", "A whole update of Decision Transformer", HEADER, rows))
    report.notes.append(
        f"{our_size:,} parameters each, batch {arguments.batch_size}, {arguments.workers} loader "
        "processes for CORL"
    )
    best = {name: 1e3 * each.best / count for name, each in times.items()}
    report.charts.append(Chart("Decision Transformer", "ms", {"update": best}, ours=(OURS,)))
    report.figures = {
        "seconds": {name: [t / count for t in each.rounds] for name, each in times.items()}
    }
    return report
