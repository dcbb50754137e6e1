"""Time one ED-Ma training step against the same model with transformers' slow Mamba path inside.

    pip install transformers
    python scripts/benchmark_train_step.py --threads 2

Both models have equal weights: every Mamba mixer is replaced by transformers' MambaMixer through
the shared state dict, and the outputs are checked before timing. Each round times one step
(forward, backward, Adam) of every model in turn; the minimum and the median over rounds are
reported, and the ratio is taken within the run. Expect a table and, with --output, the figures as
JSON.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mail_agents.agents.mail_backbone import MailBackbone
from mail_agents.errors import MailAgentsError, require
from mail_agents.mixers.mamba import Mamba
from mail_agents.registry import spec


@dataclass(frozen=True)
class Args:
    """Benchmark one training step of MaIL's sequence model."""

    agent: str = "mail/ed-ma-ddpm"
    """Preset whose sizes are used (blocks, width, state, convolution)."""
    twin: str = "mail/ed-tr-ddpm"
    """Transformer preset that is timed beside it."""
    batch_size: int = 256
    """Windows per step; the paper's value."""
    history: int = 5
    """Observed steps."""
    horizon: int = 5
    """Predicted actions."""
    rounds: int = 5
    """Timed rounds, after one warm-up."""
    threads: int = 1
    """Threads of torch."""
    output: str | None = None
    """JSON file for the figures."""


class Slow(nn.Module):
    """transformers' MambaMixer (pure torch) with the weights and the call of our mixer."""

    def __init__(self, mixer: Mamba) -> None:
        super().__init__()
        transformers = require("transformers", "dev", purpose="this benchmark")
        module = require("transformers.models.mamba.modeling_mamba", "dev")
        inner, state = mixer.A_log.shape
        config = transformers.MambaConfig(
            hidden_size=mixer.d_model,
            state_size=state,
            conv_kernel=mixer.conv1d.weight.shape[-1],
            expand=inner // mixer.d_model,
            time_step_rank=mixer.dt_proj.weight.shape[1],
            use_mambapy=False,
        )
        self.inner = module.MambaMixer(config, layer_idx=0)
        self.inner.load_state_dict(mixer.state_dict())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        return self.inner(x)


def with_slow_mixers(model: nn.Module) -> nn.Module:
    """Returns a copy whose Mamba mixers are transformers' ones, with equal weights."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Mamba):
                setattr(parent, name, Slow(child))
    return model


def build(agent: str, args: Args) -> MailBackbone:
    """The sequence model of a preset at the paper's feature and action sizes."""
    config = spec(agent).config({"history": args.history, "horizon": args.horizon})
    torch.manual_seed(0)
    return MailBackbone(
        feature_dim=256,
        action_dim=7,
        max_states=args.history,
        horizon=args.horizon,
        width=config.width,  # type: ignore[attr-defined]
        encoder=config.encoder,  # type: ignore[attr-defined]
        decoder=config.decoder,  # type: ignore[attr-defined]
        diffusion=config.objective == "ddpm",  # type: ignore[attr-defined]
        init=config.init,  # type: ignore[attr-defined]
    )


def make_step(model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Callable[[], None]:
    """One optimisation step as a function."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)

    def step() -> None:
        loss = (model(*inputs) - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def main(args: Args) -> dict:
    """Times every model and prints the table."""
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(args.batch_size, args.history, 256, generator=generator)
    noisy = torch.randn(args.batch_size, args.horizon, 7, generator=generator)
    steps = torch.randint(16, (args.batch_size,), generator=generator)
    ours, twin = build(args.agent, args), build(args.twin, args)
    inputs = (
        (features, noisy, steps) if spec(args.agent).kwargs["objective"] == "ddpm" else (features,)
    )
    slow = with_slow_mixers(ours)
    with torch.no_grad():
        error = float((ours(*inputs) - slow(*inputs)).abs().max())
    if error > 1e-4:
        raise MailAgentsError(f"The two models differ by {error}; the comparison would be unfair.")

    models = {
        f"{args.agent}": ours,
        f"{args.agent}, transformers' slow Mamba": slow,
        f"{args.twin}": twin,
    }
    functions = {name: make_step(model, inputs, noisy) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(args.rounds + 1):
        for name, step in functions.items():
            began = time.perf_counter()
            step()
            if round_number:
                times[name].append(time.perf_counter() - began)

    best = {name: min(values) for name, values in times.items()}
    table = Table("model", "min ms", "median ms", "times ours")
    for name, values in times.items():
        ratio = best[name] / best[args.agent]
        median = f"{1e3 * statistics.median(values):.1f}"
        table.add_row(name, f"{1e3 * best[name]:.1f}", median, f"{ratio:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"batch {args.batch_size}, history {args.history}, horizon {args.horizon}, "
        f"{args.threads} thread(s), {args.rounds} rounds, outputs agree to {error:.1e}"
    )
    figures = {"args": asdict(args), "seconds": times, "max_output_difference": error}
    if args.output is not None:
        Path(args.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except MailAgentsError as error:
        sys.exit(f"error: {error}")
