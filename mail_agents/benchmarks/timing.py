"""Times candidates in turn, after checking that they compute the same; measures peak memory."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mail_agents.errors import InvalidInputError, MailAgentsError

#: Mean seconds per call of a function that is called a number of times.
Stopwatch = Callable[[Callable[[], Any], int], float]

#: A shorter measurement consists of several calls, so that reading the clock costs nothing.
SHORTEST = 0.02
_MOST_CALLS = 10_000


class Times(NamedTuple):
    """Seconds per call, one number per round."""

    rounds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The minimum over rounds."""
        return min(self.rounds)

    @property
    def median(self) -> float:
        """The median over rounds."""
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Candidate:
    """One way to compute something.

    Attributes:
        name: Shown in tables.
        run: What is timed.
        outputs: What it computes, in the order and layout that candidates share.
    """

    name: str
    run: Callable[[], Any]
    outputs: Callable[[], Sequence[Tensor]]


def stopwatch(device: str, threads: int) -> Stopwatch:
    """CUDA events on a GPU, CPU time of the process with one thread, else wall time."""
    if torch.device(device).type == "cuda":
        return _cuda_time
    return _cpu_time if threads == 1 else _wall_time


def describe(device: str, threads: int) -> str:
    """Says in words what :func:`stopwatch` reads and on what it runs."""
    if torch.device(device).type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}, CUDA events"
    kind = "CPU time of the process" if threads == 1 else "wall time"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {capability}, {threads} thread(s), {kind}"


def _cpu_time(function: Callable[[], Any], calls: int) -> float:
    began = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - began) / calls


def _wall_time(function: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def _cuda_time(function: Callable[[], Any], calls: int) -> float:  # pragma: needs gpu
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    for _ in range(calls):
        function()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3 / calls


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    watch: Stopwatch,
    shortest: float = SHORTEST,
) -> dict[str, Times]:
    """Times every function once per round, in turn, after one round that does not count.

    Args:
        functions: What to time, by name.
        rounds: Number of rounds, at least 1.
        watch: See :func:`stopwatch`.
        shortest: Functions that take less are called several times in a row, until this many
            seconds have passed. With 0 every function is called once, so that the others have used
            the caches in between.

    Raises:
        InvalidInputError: There are no rounds.
    """
    if rounds < 1:
        raise InvalidInputError(f"--rounds starts at 1; got {rounds}.")
    calls = {}
    for name, function in functions.items():
        once = max(watch(function, 1), 1e-9)
        calls[name] = min(max(1, math.ceil(shortest / once)), _MOST_CALLS) if shortest else 1
    found: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in functions.items():
                found[name].append(watch(function, calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Times(tuple(values)) for name, values in found.items()}


def check_equal(
    candidates: Sequence[Candidate], tolerance: float, judge: Candidate | None = None
) -> dict[str, float]:
    """Refuses candidates that compute something else.

    Args:
        candidates: What is going to be timed.
        tolerance: Largest difference, in units of the judge's largest value of that output.
        judge: Whose outputs are right; the first candidate by default.

    Returns:
        The largest relative difference of each candidate.

    Raises:
        MailAgentsError: A candidate differs by more, in the number of outputs, or by a NaN.
    """
    judge = candidates[0] if judge is None else judge
    wanted = [value.detach().double() for value in judge.outputs()]
    found = {}
    for candidate in candidates:
        given = candidate.outputs()
        same = len(given) == len(wanted) and all(
            a.shape == b.shape for a, b in zip(given, wanted, strict=True)
        )
        worst = relative_error(given, wanted) if same else math.inf
        if not worst <= tolerance:
            raise MailAgentsError(
                f"{candidate.name!r} differs from {judge.name!r} by {worst:.1e} of the largest "
                f"value, more than {tolerance:.0e}: they compute different things, and a "
                "comparison of their times would be unfair."
            )
        found[candidate.name] = worst
    return found


def relative_error(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference of any output, in units of that output's largest wanted value."""
    worst = 0.0
    for a, b in zip(given, wanted, strict=True):
        if b.numel():
            b = b.detach().double()
            scale = float(b.abs().max()) or 1.0
            error = float((a.detach().double() - b).abs().max()) / scale
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def rms_error(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Root mean square difference, in units of the wanted values' own; the worst output counts.

    Unlike the largest difference it does not hang on the rounding of a single number.
    """
    worst = 0.0
    for a, b in zip(given, wanted, strict=True):
        if b.numel():
            a, b = a.detach().double(), b.detach().double()
            scale = float(b.square().mean().sqrt()) or 1.0
            worst = max(worst, float((a - b).square().mean().sqrt()) / scale)
    return worst


def graphed(function: Callable[[], Any]) -> Callable[[], Any]:  # pragma: needs gpu
    """Captures a function of fixed tensors as a CUDA graph and returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes that a call needs at most beyond what is there before it.

    On the CPU this is the resident memory of the process, so that what native code allocates
    counts; None where the system does not report its peak (it does on Linux).
    """
    function()
    if torch.device(device).type == "cuda":  # pragma: needs gpu
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    if not _forget_peak():
        return None
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def _forget_peak() -> bool:
    """Gives free memory back to the system and restarts its record of the peak."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise MailAgentsError(f"/proc/self/status has no {field}.")
