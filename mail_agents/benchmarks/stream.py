"""The subject ``stream``: one token after another through a stack of Mamba layers.

Every candidate has its own copy of the weights and makes one step before the next one's turn, so
that weights have to be fetched again, as they are when a simulator runs between steps. The
transformer keeps its keys and values in a buffer of fixed size, in place. The median over rounds
counts.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mail_agents.benchmarks import alternatives
from mail_agents.benchmarks.arguments import Stream
from mail_agents.benchmarks.charts import Chart
from mail_agents.benchmarks.report import MISSING, Bar, Report, Table, duration, ratio
from mail_agents.benchmarks.timing import (
    Candidate,
    Times,
    check_equal,
    describe,
    graphed,
    interleaved,
    peak_bytes,
    stopwatch,
)
from mail_agents.errors import MailAgentsError
from mail_agents.mixers.stack import MambaStack, TransformerStack
from mail_agents.mixers.stream import MambaStream
from mail_agents.ops.backends import use_backend

OFFICIAL, LINEAR = "mamba_ssm", "linears alone"
HEADER = ("batch", "one step of", "median", "minimum", "times faster than mamba_ssm")
CONTEXT_HEADER = ("tokens before", "Mamba", "its state", "transformer", "its cache")
BACKENDS = {"cpu": {"native": "native", "eager": "torch"}, "cuda": {"eager": "auto"}}
#: Times faster than mamba_ssm's step, by batch size.
BARS = {1: {"eager": 1.4, "native": 2.8}, 32: {"eager": 1.8, "native": 2.2}}
_FLAT = 1.1
#: What an allocator may round up to.
_GROWTH_MB = 0.5
_CHECKED = 4
_HEADS = 4


class Stepper:
    """A stack with its state, fed one token at a time."""

    def __init__(self, name: str, begin: Callable[[], Any], step: Callable[[Tensor, Any], Any]):
        self.name, self.begin, self._step = name, begin, step
        self.state = begin()

    def __call__(self, x: Tensor) -> Tensor:
        """Maps one token (B, D) to (B, D)."""
        y, self.state = self._step(x, self.state)
        return y

    def candidate(self, x: Tensor, tokens: Tensor) -> Candidate:
        """For timing with one token, and for checking with several (T, B, D)."""

        def outputs() -> list[Tensor]:
            self.state = self.begin()
            with torch.inference_mode():
                return [self(token) for token in tokens]

        def step() -> Tensor:
            with torch.inference_mode():
                return self(x)

        return Candidate(self.name, step, outputs)


class CachedTransformer:
    """Steps of a :class:`TransformerStack` whose keys and values lie in buffers of fixed size.

    Args:
        stack: Whose weights are used.
        batch: Rows.
        room: Tokens that fit.
    """

    def __init__(self, stack: TransformerStack, batch: int, room: int) -> None:
        self.stack = stack
        weight = stack.norm_f.weight
        shape = (len(stack.layers), 2, batch, _HEADS, room, weight.numel() // _HEADS)
        # Random, as if tokens had been there: what they were does not change the time.
        self.cache = torch.randn(shape, device=weight.device, dtype=weight.dtype)

    def step(self, x: Tensor, place: int) -> Tensor:
        """Maps the token (B, D) that follows ``place`` others to (B, D)."""
        for block, (keys, values) in zip(self.stack.layers, self.cache.unbind(), strict=True):
            layer: Any = block
            query, key, value = (
                part.unflatten(-1, (_HEADS, 1, -1))
                for part in layer.attention.qkv(layer.norm(x)).chunk(3, dim=-1)
            )
            keys[:, :, place : place + 1] = key
            values[:, :, place : place + 1] = value
            seen = slice(0, place + 1)
            y = F.scaled_dot_product_attention(query, keys[:, :, seen], values[:, :, seen])
            x = x + layer.attention.proj(y.flatten(1))
            x = x + layer.mlp(layer.mlp_norm(x))
        return self.stack.norm_f(x)


def run(arguments: Stream) -> Report:
    """Measures steps of every batch size, and the step time against the context."""
    torch.set_num_threads(arguments.threads)
    conditions = f"{describe(arguments.device, arguments.threads)}, {arguments.rounds} rounds"
    report = Report("stream", dataclasses.asdict(arguments), conditions)
    report.absent += alternatives.absences(alternatives.official())
    rows: list[tuple[str, ...]] = []
    panels = {}
    for batch in arguments.batch_sizes:
        times = _time_steps(batch, arguments, report)
        medians = {name: each.median for name, each in times.items()}
        rows += [_row(batch, name, times) for name in times]
        panels[f"batch {batch}"] = {name: 1e3 * seconds for name, seconds in medians.items()}
        report.figures[f"batch {batch}"] = times
        if torch.device(arguments.device).type == "cpu":
            report.bars += [
                Bar(
                    f"step, batch {batch}: {ours} against {OFFICIAL}",
                    ratio(medians, OFFICIAL, ours),
                    required,
                )
                for ours, required in BARS.get(batch, {}).items()
            ]
    title = f"One step of {arguments.layers} layers, width {arguments.width}, weights cold"
    report.tables.append(Table("stream step", title, HEADER, tuple(rows)))
    report.charts.append(Chart(title, "ms", panels, ours=("native", "eager")))
    _time_contexts(arguments, report)
    report.absent = list(dict.fromkeys(report.absent))
    return report


def _row(batch: int, name: str, times: dict[str, Times]) -> tuple[str, ...]:
    each = times[name]
    faster = f"{times[OFFICIAL].median / each.median:.2f}" if OFFICIAL in times else MISSING
    return str(batch), name, duration(each.median), duration(each.best), faster


def _place(arguments: Stream) -> dict[str, Any]:
    return {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}


def mamba_stack(arguments: Stream) -> MambaStack:
    """The stack whose steps are measured."""
    torch.manual_seed(arguments.seed)
    return MambaStack(arguments.width, arguments.layers).to(**_place(arguments)).eval()


def transformer_stack(arguments: Stream) -> TransformerStack:
    """A transformer of the same width and about as many parameters."""
    torch.manual_seed(arguments.seed)
    stack = TransformerStack(arguments.width, max(1, arguments.layers // 2), _HEADS)
    return stack.to(**_place(arguments)).eval()


def our_steppers(
    stack: MambaStack, batch: int, arguments: Stream, absent: list[str]
) -> list[Stepper]:
    """Ours, one per way to make a step."""
    found = []
    for name, backend in BACKENDS[torch.device(arguments.device).type].items():
        own = copy.deepcopy(stack)

        def begin(own: MambaStack = own, backend: str = backend) -> MambaStream:
            with use_backend(backend):
                return own.stream(batch)

        def step(x: Tensor, stream: MambaStream) -> Any:
            return stream.step(x), stream

        try:
            stepper = Stepper(name, begin, step)
        except MailAgentsError as error:
            absent.append(f"step, {name}: {str(error).splitlines()[0]}")
            continue
        found.append(stepper)
    return found


def official_stepper(stack: MambaStack, batch: int) -> Stepper | None:
    """mamba_ssm's own step in the same residual stack, or None when it is not installed."""
    official = alternatives.official()
    if official.absent:
        return None
    norms = [copy.deepcopy(layer.norm) for layer in stack.layers]  # type: ignore[union-attr]
    last, mixers = copy.deepcopy(stack.norm_f), []
    for layer in stack.layers:
        ours: Any = layer.mixer
        mixer = official.mamba.Mamba(
            ours.d_model,
            d_state=ours.d_state,
            d_conv=ours.d_conv,
            expand=ours.d_inner // ours.d_model,
            use_fast_path=False,
        )
        mixer.load_state_dict(ours.state_dict())
        mixers.append(mixer.to(ours.D.device, ours.D.dtype).eval())

    def begin() -> list[tuple[Tensor, Tensor]]:
        return [mixer.allocate_inference_cache(batch, 0) for mixer in mixers]

    def step(x: Tensor, state: list[tuple[Tensor, Tensor]]) -> Any:
        x = x.unsqueeze(1)
        for norm, mixer, (conv, ssm) in zip(norms, mixers, state, strict=True):
            x = x + mixer.step(norm(x), conv, ssm)[0]  # type: ignore[operator]
        return last(x).squeeze(1), state

    return Stepper(OFFICIAL, begin, step)


def linear_step(stack: nn.Module, batch: int) -> Callable[[], Any]:
    """All linear maps of a stack applied to one token each, and nothing else."""
    own = copy.deepcopy(stack)
    weights = [part.weight for part in own.modules() if isinstance(part, nn.Linear)]
    inputs = [torch.randn(batch, w.shape[1]).to(w) for w in weights]

    def work() -> None:
        with torch.inference_mode():
            for x, weight in zip(inputs, weights, strict=True):
                F.linear(x, weight)

    return work


def _time_steps(batch: int, arguments: Stream, report: Report) -> dict[str, Times]:
    stack, kind = mamba_stack(arguments), torch.device(arguments.device).type
    tokens = torch.randn(_CHECKED, batch, arguments.width).to(**_place(arguments))
    official = official_stepper(stack, batch)
    steppers = ([] if official is None else [official]) + our_steppers(
        stack, batch, arguments, report.absent
    )
    candidates = [each.candidate(tokens[0], tokens) for each in steppers]
    check_equal(candidates, 1e-4 if arguments.dtype == "float32" else 5e-2)
    functions = {each.name: each.run for each in candidates}
    if kind == "cuda":  # pragma: needs gpu
        functions |= {f"{name}, graph": graphed(step) for name, step in functions.items()}
    functions[LINEAR] = linear_step(stack, batch)
    transformer = transformer_stack(arguments)
    for context in arguments.caches:
        functions[f"transformer, {context} cached"] = _cached_step(
            copy.deepcopy(transformer), tokens[0], context
        )
    watch = stopwatch(arguments.device, arguments.threads)
    return interleaved(functions, arguments.rounds, watch, shortest=0.0)


def _cached_step(stack: TransformerStack, x: Tensor, context: int) -> Callable[[], Tensor]:
    cached = CachedTransformer(stack, x.shape[0], context + 1)

    def step() -> Tensor:
        with torch.inference_mode():
            return cached.step(x, context)

    return step


def _bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(_bytes(part) for part in state) if isinstance(state, Sequence) else 0


def _time_contexts(arguments: Stream, report: Report) -> None:
    """Adds the time of a step after many tokens, at batch size 1."""
    stack, transformer = mamba_stack(arguments), transformer_stack(arguments)
    x = torch.randn(1, arguments.width).to(**_place(arguments))
    watch = stopwatch(arguments.device, arguments.threads)
    functions: dict[str, dict[str, Callable[[], Any]]] = {"Mamba": {}, "transformer": {}}
    memory, grown = {}, None
    for context in sorted(arguments.contexts):
        stream = stack.stream(1)
        half = functools.partial(_advance, stream, x, context // 2)
        grown = peak_bytes(half, arguments.device)  # it calls twice
        memory["Mamba", context] = _bytes(stack.init_state(1))
        functions["Mamba"][f"Mamba, {context}"] = functools.partial(stream.step, x)
        cached = CachedTransformer(transformer, 1, context + 1)
        memory["transformer", context] = _bytes(cached.cache)
        step = _cached_step(transformer, x, context)
        functions["transformer"][f"transformer, {context}"] = step
    # Apart, because a cache of hundreds of megabytes slows down whoever comes after it.
    times: dict[str, Times] = {}
    for turns in functions.values():
        times |= interleaved(turns, arguments.rounds, watch, shortest=0.0)
    lines, rows = {}, []
    for context in sorted(arguments.contexts):
        cells = [f"{context:,}"]
        for name in ("Mamba", "transformer"):
            median = times[f"{name}, {context}"].median
            lines.setdefault(name, []).append((context, 1e3 * median))
            cells += [duration(median), f"{memory[name, context] / 2**20:.3g} MB"]
        rows.append(tuple(cells))
    first, last = min(arguments.contexts), max(arguments.contexts)
    title = "One step after many tokens, batch 1"
    report.tables.append(Table("stream context", title, CONTEXT_HEADER, tuple(rows)))
    report.charts.append(Chart(title, "ms", {}, lines=lines, x="tokens before"))
    report.figures["contexts"] = times
    slower = times[f"Mamba, {last}"].median / times[f"Mamba, {first}"].median
    megabytes = None if grown is None else grown / 2**20
    report.bars += [
        Bar(f"step after {last:,} / after {first:,} tokens, time", slower, _FLAT, True),
        Bar(f"memory that {last // 2:,} more steps take, MB", megabytes, _GROWTH_MB, True),
    ]


def _advance(stream: MambaStream, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        stream.step(x)
