"""The subject ``train``: one training step of MaIL's sequence model.

All models but the twin have equal weights: every Mamba mixer is replaced by another package's
through the shared state dict, and the outputs are checked before timing.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mail_agents.agents.mail_backbone import MailBackbone
from mail_agents.benchmarks import alternatives
from mail_agents.benchmarks.arguments import Train
from mail_agents.benchmarks.charts import Chart
from mail_agents.benchmarks.gradients import runnable
from mail_agents.benchmarks.report import Report, Table, duration
from mail_agents.benchmarks.timing import (
    Candidate,
    check_equal,
    describe,
    graphed,
    interleaved,
    stopwatch,
)
from mail_agents.mixers.mamba import Mamba
from mail_agents.ops.backends import use_backend
from mail_agents.registry import spec

HEADER = ("model", "minimum", "median", "times ours")
BACKENDS = {"cpu": ("native", "torch"), "cuda": ("cuda", "torch")}


class Slow(nn.Module):
    """transformers' MambaMixer (pure torch) with the weights and the call of our mixer."""

    def __init__(self, mixer: Mamba) -> None:
        super().__init__()
        slow = alternatives.transformers()
        inner, state = mixer.A_log.shape
        config = slow.package.MambaConfig(
            hidden_size=mixer.d_model,
            state_size=state,
            conv_kernel=mixer.conv1d.weight.shape[-1],
            expand=inner // mixer.d_model,
            time_step_rank=mixer.dt_proj.weight.shape[1],
            use_mambapy=False,
        )
        self.inner = slow.mamba.MambaMixer(config, layer_idx=0)
        self.inner.load_state_dict(mixer.state_dict())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        return self.inner(x)


class Official(nn.Module):  # pragma: needs gpu
    """mamba_ssm's Mamba with its fused kernels, and the weights and the call of our mixer."""

    def __init__(self, mixer: Mamba) -> None:
        super().__init__()
        self.inner = alternatives.official().mamba.Mamba(
            mixer.d_model,
            d_state=mixer.d_state,
            d_conv=mixer.d_conv,
            expand=mixer.d_inner // mixer.d_model,
        )
        self.inner.load_state_dict(mixer.state_dict())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        return self.inner(x)


def with_mixers(model: nn.Module, kind: Callable[[Mamba], nn.Module]) -> nn.Module:
    """Returns a copy whose Mamba mixers are others, with equal weights."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Mamba):
                setattr(parent, name, kind(child))
    return model


def build(agent: str, arguments: Train) -> MailBackbone:
    """The sequence model of a preset at the paper's feature and action sizes."""
    config: Any = spec(agent).config({"history": arguments.history, "horizon": arguments.horizon})
    torch.manual_seed(arguments.seed)
    return MailBackbone(
        feature_dim=256,
        action_dim=7,
        max_states=arguments.history,
        horizon=arguments.horizon,
        width=config.width,
        encoder=config.encoder,
        decoder=config.decoder,
        diffusion=config.objective == "ddpm",
        init=config.init,
    )


def make_step(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    target: Tensor,
    arguments: Train,
    backend: str = "auto",
) -> Callable[[], None]:
    """One optimisation step as a function."""
    kind = torch.device(arguments.device).type
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, capturable=kind == "cuda")
    half: Any = contextlib.nullcontext()
    if arguments.dtype != "float32":
        half = torch.autocast(kind, getattr(torch, arguments.dtype))

    def step() -> None:
        with use_backend(backend):
            with half:
                loss = (model(*inputs) - target).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return step


def run(arguments: Train) -> Report:
    """Measures a step of ours, of ours with other mixers, and of the Transformer twin."""
    torch.set_num_threads(arguments.threads)
    conditions = f"{describe(arguments.device, arguments.threads)}, minimum of {arguments.rounds}"
    report = Report("train", dataclasses.asdict(arguments), f"{conditions} rounds")
    generator = torch.Generator().manual_seed(arguments.seed)
    rows, device = arguments.batch_size, arguments.device
    features = torch.randn(rows, arguments.history, 256, generator=generator).to(device)
    noisy = torch.randn(rows, arguments.horizon, 7, generator=generator).to(device)
    steps = torch.randint(16, (rows,), generator=generator).to(device)
    inputs = (features, noisy, steps)
    if spec(arguments.agent).kwargs["objective"] != "ddpm":
        inputs = (features,)
    ours = build(arguments.agent, arguments)
    twin = build(arguments.twin, arguments).to(device)
    models = _models(arguments, ours, report)
    candidates = [
        Candidate(name, lambda: None, _outputs(model, inputs, backend))
        for name, (model, backend) in models.items()
    ]
    equal = _those_that_run(candidates, report)
    error = max(check_equal(equal, 1e-4).values())
    chosen = {each.name: models[each.name] for each in equal} | {arguments.twin: (twin, "auto")}
    functions = {
        name: make_step(model, inputs, noisy, arguments, backend)
        for name, (model, backend) in chosen.items()
    }
    if torch.device(device).type == "cuda":  # pragma: needs gpu
        functions |= {f"{name}, graph": graphed(step) for name, step in functions.items()}
    times = interleaved(functions, arguments.rounds, stopwatch(device, arguments.threads), 0.0)
    first = times[equal[0].name].best
    table = tuple(
        (f"`{name}`", duration(t.best), duration(t.median), f"{t.best / first:.2f}")
        for name, t in times.items()
    )
    title = f"Training step, batch {rows}, history {arguments.history}"
    report.tables.append(Table("train step", title, HEADER, table))
    best = {name: 1e3 * each.best for name, each in times.items()}
    report.charts.append(Chart("Training step", "ms", {title: best}, ours=tuple(models)[:2]))
    report.figures = {"seconds": times, "max_output_difference": error}
    report.notes.append(f"outputs of the models with equal weights agree to {error:.1e}")
    return report


def _models(
    arguments: Train, ours: MailBackbone, report: Report
) -> dict[str, tuple[nn.Module, str]]:
    """Models with equal weights, and the backend of their kernels, by name."""
    kind = torch.device(arguments.device).type
    models: dict[str, tuple[nn.Module, str]] = {
        f"{arguments.agent}, {backend}": (copy.deepcopy(ours), backend)
        for backend in BACKENDS[kind]
    }
    slow = alternatives.transformers()
    report.absent += alternatives.absences(slow)
    if not slow.absent:
        name = f"{arguments.agent}, transformers' slow Mamba"
        models[name] = (with_mixers(ours, Slow), "auto")
    if kind == "cuda":  # pragma: needs gpu
        official = alternatives.official()
        report.absent += alternatives.absences(official)
        if not official.absent:
            name = f"{arguments.agent}, mamba_ssm's Mamba"
            models[name] = (with_mixers(ours, Official), "auto")
    for model, _ in models.values():
        model.to(arguments.device)
    return models


def _outputs(
    model: nn.Module, inputs: tuple[Tensor, ...], backend: str
) -> Callable[[], list[Tensor]]:
    def compute() -> list[Tensor]:
        # With gradients, as in training: without them other code may run.
        with use_backend(backend):
            return [model(*inputs).detach()]

    return compute


def _those_that_run(candidates: list[Candidate], report: Report) -> list[Candidate]:
    found = runnable({each.name: each.outputs for each in candidates}, report.absent, "train")
    return [each for each in candidates if each.name in found]
