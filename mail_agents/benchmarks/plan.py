"""The subject ``plan``: from observations to a chunk of actions with MaIL's diffusion.

The plain loop is what the first version of this project did: at every denoising step it runs
encoder and decoder over all tokens, with the ``torch`` backend. All candidates of ED-Ma have equal
weights and give equal plans, which is checked before they are timed.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mail_agents.agent import Agent
from mail_agents.agents.mail import MailPolicy
from mail_agents.benchmarks.arguments import Plan
from mail_agents.benchmarks.charts import Chart
from mail_agents.benchmarks.gradients import runnable
from mail_agents.benchmarks.report import Bar, Report, Table, ratio, times_row
from mail_agents.benchmarks.timing import (
    Candidate,
    check_equal,
    describe,
    interleaved,
    stopwatch,
)
from mail_agents.data.dataset import MemoryDataset
from mail_agents.data.episode import Episode
from mail_agents.ops.backends import use_backend
from mail_agents.registry import make

PLAIN, COMPILED, ACT, TWIN = "plain loop", "compiled", "act()", "ED-Tr"
BACKENDS = {"cpu": ("native", "torch"), "cuda": ("cuda", "torch")}
#: Two observations of this size: their features are as wide as those of two cameras.
_STATE = 32
_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}


def _dataset(seed: int) -> MemoryDataset:
    rng = np.random.default_rng(seed)
    count = 40
    observations = {
        key: rng.normal(size=(count + 1, _STATE)).astype(np.float32) for key in ("a", "b")
    }
    never = np.zeros(count, bool)
    actions = rng.uniform(-1, 1, (count, 7)).astype(np.float32)
    return MemoryDataset([Episode(observations, actions, np.zeros(count), never, never)], "random")


def build(agent: str, arguments: Plan, **overrides: Any) -> Agent:
    """An untrained agent that can act on random observations."""
    dataset = _dataset(arguments.seed)
    made = make(
        agent,
        dataset.features,
        device=arguments.device,
        seed=arguments.seed,
        history=arguments.history,
        horizon=arguments.horizon,
        **overrides,
    )
    made.fit_statistics(dataset)
    return made


def policy_of(agent: Agent) -> MailPolicy:
    """A copy of the network that acts, in evaluation mode."""
    return cast(MailPolicy, copy.deepcopy(agent.acting_policy).eval())


def plain_plan(policy: MailPolicy, batch: Mapping[str, Tensor]) -> Tensor:
    """The whole sequence model at every denoising step, without random numbers."""
    objective: Any = policy.objective
    features = policy.encode(batch)
    rows = features.shape[0]
    x = features.new_zeros(rows, *policy.chunk)
    low, high = policy.action_low, policy.action_high
    for step in range(objective.steps - 1, -1, -1):
        t = torch.full((rows,), step, dtype=torch.int64, device=x.device)
        noise = policy.backbone(features, x, t).to(x.dtype)
        start = objective.predict_start(x, noise, step).clamp(low, high)
        x = objective.from_start[step] * start + objective.from_noisy[step] * x
    return x.clamp(low, high)


def _batch(rows: int, arguments: Plan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(arguments.seed)
    batch = {
        f"obs/{key}": torch.randn(rows, arguments.history, _STATE, generator=generator)
        for key in ("a", "b")
    }
    batch["mask"] = torch.ones(rows, arguments.history, dtype=torch.bool)
    return {key: value.to(arguments.device) for key, value in batch.items()}


def _planner(plan: Callable[[], Tensor], arguments: Plan, backend: str) -> Callable[[], Tensor]:
    kind = torch.device(arguments.device).type
    half = arguments.dtype != "float32"

    def run() -> Tensor:
        mixed: Any = contextlib.nullcontext()
        if half:
            mixed = torch.autocast(kind, getattr(torch, arguments.dtype))
        with torch.inference_mode(), use_backend(backend), mixed:
            return plan()

    return run


def _sampler(policy: MailPolicy, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    generators = [torch.Generator() for _ in batch["mask"]]
    return lambda: policy.sample(batch, generators, True)


def _acting(agent: Agent, rows: int, seed: int) -> Callable[[], np.ndarray]:
    rng = np.random.default_rng(seed)
    observation = {key: rng.normal(size=(rows, _STATE)).astype(np.float32) for key in ("a", "b")}

    def act() -> np.ndarray:
        agent.reset(seed=0)
        return agent.act(observation)

    return act


def planners(
    agent: Agent, batch: Mapping[str, Tensor], arguments: Plan, absent: list[str]
) -> dict[str, Callable[[], Tensor]]:
    """Ways to plan with the same weights, by column."""
    kind = torch.device(arguments.device).type
    backends = BACKENDS[kind]
    plain = policy_of(agent)
    first = "torch" if kind == "cpu" else "cuda"  # upstream's way uses the official kernels
    made = {PLAIN: _planner(lambda: plain_plan(plain, batch), arguments, first)}
    for name in backends:
        made[name] = _planner(_sampler(policy_of(agent), batch), arguments, name)
    if kind == "cuda":  # pragma: needs gpu
        policy = policy_of(agent)
        policy.compile()
        made[COMPILED] = _planner(_sampler(policy, batch), arguments, "auto")
    return runnable(made, absent, "plan")


def run(arguments: Plan) -> Report:
    """Measures plans of every batch size."""
    torch.set_num_threads(arguments.threads)
    kind = torch.device(arguments.device).type
    conditions = f"{describe(arguments.device, arguments.threads)}, minimum of {arguments.rounds}"
    report = Report("plan", dataclasses.asdict(arguments), f"{conditions} rounds")
    agent = build(arguments.agent, arguments)
    twin = build(arguments.twin, arguments, **{"decoder.layers": arguments.twin_layers})
    graphs = (COMPILED,) if kind == "cuda" else ()
    columns = (PLAIN, *BACKENDS[kind], *graphs, ACT, TWIN)
    rows, panels = [], {}
    watch = stopwatch(arguments.device, arguments.threads)
    for size in arguments.batch_sizes:
        label, batch = f"{size} row{'s' * (size > 1)}", _batch(size, arguments)
        found = planners(agent, batch, arguments, report.absent)
        candidates = [
            Candidate(name, plan, lambda _plan=plan: [_plan()]) for name, plan in found.items()
        ]
        errors = check_equal(candidates, _TOLERANCE[arguments.dtype])
        functions: dict[str, Callable[[], Any]] = dict(found)
        functions[ACT] = _acting(agent, size, arguments.seed)
        functions[TWIN] = _planner(_sampler(policy_of(twin), batch), arguments, "auto")
        times = interleaved(functions, arguments.rounds, watch)
        best = {name: each.best for name, each in times.items()}
        rows.append(times_row(label, best, columns, PLAIN))
        panels[label] = {name: 1e3 * seconds for name, seconds in best.items()}
        report.figures[label] = {"seconds": times, "differences": errors}
        if size == 1 and kind == "cpu":
            ours = min((n for n in best if n not in (PLAIN, ACT, TWIN)), key=best.__getitem__)
            report.bars += [
                Bar(f"plan: {ours} against the plain loop", ratio(best, PLAIN, ours), 3.0),
                Bar(f"plan: {ours} against {TWIN}", ratio(best, TWIN, ours), 1.0),
            ]
    title = f"A plan of {arguments.agent}, 16 denoising steps"
    report.tables.append(Table("plan", title, ("plans at a time", *columns), tuple(rows)))
    report.charts.append(Chart(title, "ms", panels, ours=(*BACKENDS[kind], *graphs, ACT)))
    report.absent = list(dict.fromkeys(report.absent))
    report.notes += _notes(arguments, agent, twin)
    return report


def _notes(arguments: Plan, agent: Agent, twin: Agent) -> list[str]:
    sizes = []
    for each in (agent, twin):
        backbone = cast(MailPolicy, each.policy).backbone
        sizes.append(sum(parameter.numel() for parameter in backbone.parameters()))
    return [
        f"sequence models: {arguments.agent} {sizes[0]:,} parameters, {TWIN} "
        f"({arguments.twin}, {arguments.twin_layers} decoder blocks) {sizes[1]:,}",
        f"{ACT} is a whole call from raw observations, in a new episode; {TWIN} plans as ours does",
    ]
