"""Which implementation of a kernel runs: an ordered choice that is logged and never silent.

Every op lists its implementations in the order in which ``"auto"`` tries them. A name that is given
explicitly (argument, :func:`use_backend` or environment variable ``MAIL_AGENTS_BACKEND``) either
runs or raises with the reason and the command that repairs it; ``"auto"`` always finds something.
"""

import functools
import importlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from mail_agents.errors import InvalidInputError, MissingDependencyError, unknown_name
from mail_agents.ops import _native

logger = logging.getLogger(__name__)

#: Environment variable that names the backend when neither argument nor context manager does.
ENV_VAR = "MAIL_AGENTS_BACKEND"

#: Every backend name of this package, in the order in which ``"auto"`` tries them; an op may
#: implement a part of them.
BACKENDS = ("cuda", "native", "numba", "torch", "reference")

_override: ContextVar[str | None] = ContextVar("mail_agents_backend", default=None)
_recorder: ContextVar[dict[str, set[str]] | None] = ContextVar("mail_agents_ran", default=None)
#: Choices that were logged already, so that a training loop logs each of them once.
_logged: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Extension:
    """A third-party module that a backend needs.

    Attributes:
        module: Importable name.
        distribution: Name on the package index, for the version.
        fix: Shell command that installs it (torch must be installed before).
    """

    module: str
    distribution: str
    fix: str


#: Both need a CUDA build of torch and, when no wheel matches it, nvcc. Build isolation would
#: compile against another torch, so an extra of this distribution cannot replace these commands.
SELECTIVE_SCAN_CUDA = Extension(
    "selective_scan_cuda",
    "mamba-ssm",
    "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-deps --no-build-isolation mamba-ssm==2.3.2.post1",
)
CAUSAL_CONV1D = Extension(
    "causal_conv1d",
    "causal-conv1d",
    "pip install --no-deps --no-build-isolation causal-conv1d==1.7.0",
)
#: Triton kernels: they need no compiled part of mamba-ssm, but Python packages it imports.
SSD_CUDA = Extension(
    "mamba_ssm.ops.triton.ssd_combined",
    "mamba-ssm",
    f"pip install einops triton transformers && {SELECTIVE_SCAN_CUDA.fix}",
)
NUMBA = Extension("numba", "numba", "pip install 'mail-agents[numba]'")


@dataclass(frozen=True)
class Probe:
    """Result of importing an :class:`Extension`: the module, or the text of the failure."""

    module: ModuleType | None
    failure: str


@functools.cache
def probe(extension: Extension) -> Probe:
    """Imports an extension once per process; ``probe.cache_clear()`` forgets the result."""
    try:
        return Probe(importlib.import_module(extension.module), "")
    except Exception as error:  # mismatched binaries raise OSError, AttributeError, RuntimeError
        return Probe(None, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Candidate:
    """One implementation of an op.

    Attributes:
        name: One of :data:`BACKENDS`.
        run: The implementation; every candidate of an op has the same signature.
        refuse: Called with the arguments of the op; the reason why it cannot run them, or None.
        extension: The compiled module it needs, or None.
        stands_in_for: Names that mean this one for ops which have nothing of their own by them.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None]
    extension: Extension | None = None
    stands_in_for: tuple[str, ...] = ()


def requested_backend(argument: str = "auto") -> str:
    """Returns the backend that is asked for: argument, then :func:`use_backend`, then environment.

    Raises:
        UnknownNameError: The name is neither ``"auto"`` nor one of :data:`BACKENDS`.
    """
    name, source = argument, "argument"
    if name == "auto":
        inner = _override.get()
        if inner is not None:
            name, source = inner, "use_backend"
        else:
            name, source = os.environ.get(ENV_VAR) or "auto", f"environment variable {ENV_VAR}"
    _check_name(name, source)
    return name


def _check_name(name: str, source: str) -> None:
    if name != "auto" and name not in BACKENDS:
        hint = f"It was given by: {source}. Run 'mail-agents doctor' to see what works here."
        raise unknown_name("kernel backend", name, ("auto", *BACKENDS), hint)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Selects the backend of every op called inside the block with ``backend="auto"``.

    ``use_backend("auto")`` hides an outer choice and the environment variable.

    Raises:
        UnknownNameError: There is no such backend.
    """
    _check_name(name, "use_backend")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def choose(op: str, candidates: Sequence[Candidate], argument: str, /, *inputs: Any) -> Candidate:
    """Picks the implementation that runs, and logs it once per op and backend.

    Args:
        op: Name of the op, for messages.
        candidates: Implementations in the order in which ``"auto"`` tries them; the last one
            refuses nothing.
        argument: The ``backend`` argument of the op.
        inputs: Arguments of the op, passed to :attr:`Candidate.refuse`.

    Raises:
        UnknownNameError: There is no such backend.
        MissingDependencyError: An explicit backend needs an extension that cannot be imported, or
            kernels that cannot be compiled.
        InvalidInputError: An explicit backend cannot run these inputs.
    """
    name = requested_backend(argument)
    if name == "auto":
        skipped = []
        for candidate in candidates[:-1]:
            reason = candidate.refuse(*inputs) or _needless(candidate)
            if reason is None:
                note_backend(op, candidate.name, skipped)
                return candidate
            skipped.append(f"{candidate.name}: {reason}")
        note_backend(op, candidates[-1].name, skipped)
        return candidates[-1]
    by_name = {name: c for c in candidates for name in (c.name, *c.stands_in_for)}
    if name not in by_name:
        raise InvalidInputError(
            f"{op} has no {name!r} backend. It has: auto, {', '.join(by_name)}."
        )
    candidate = by_name[name]
    if candidate.extension is not None:
        _require(op, candidate.name, candidate.extension)
    if candidate.name == "native":
        _require_native(op)
    reason = candidate.refuse(*inputs)
    if reason is not None:
        raise InvalidInputError(
            f"Backend {name!r} was requested for {op} and cannot run it: {reason}. "
            "Use backend='auto' to take the fastest one that can."
        )
    own = name == candidate.name
    why = "requested by name" if own else f"{name!r} was requested and has no kernel for it"
    note_backend(op, candidate.name, [why])
    return candidate


def _needless(candidate: Candidate) -> str | None:
    """Why ``"auto"`` leaves out numba, or None; imports it only where it will be used."""
    if candidate.extension is not NUMBA:
        return None
    if not _native.load().failure:
        return "the native kernels work here"
    failure = probe(NUMBA).failure
    return f"cannot import {NUMBA.module} ({failure})" if failure else None


def _require(op: str, backend: str, extension: Extension) -> None:
    failure = probe(extension).failure
    if failure:
        raise MissingDependencyError(
            f"Backend {backend!r} was requested for {op} and needs the module "
            f"{extension.module!r}, which cannot be imported ({failure}). "
            f"Install it with: {extension.fix}\n"
            "Run 'mail-agents doctor' for versions, or use backend='auto'."
        )


def _require_native(op: str) -> None:
    native = _native.load()
    if native.failure:
        repair = f" Repair it with: {native.fix}\n" if native.fix else " "
        raise MissingDependencyError(
            f"Backend 'native' was requested for {op}, but its kernels are not available: "
            f"{native.failure}.{repair}"
            "Run 'mail-agents doctor' for details, or use backend='auto'."
        )


@contextmanager
def recording_backends(into: dict[str, set[str]]) -> Iterator[None]:
    """Adds every backend that runs inside the block to ``into``, by op."""
    token = _recorder.set(into)
    try:
        yield
    finally:
        _recorder.reset(token)


def note_backend(op: str, backend: str, notes: Sequence[str]) -> None:
    """Records that a backend runs an op, and logs it once; ``notes`` say why that one."""
    ran = _recorder.get()
    if ran is not None:
        ran.setdefault(op, set()).add(backend)
    if (op, backend) not in _logged:
        _logged.add((op, backend))
        why = f" ({'; '.join(notes)})" if notes else ""
        logger.info("%s runs on backend %r%s", op, backend, why)


def note_step(op: str) -> None:
    """Records that a single step runs, of which there is one implementation, in PyTorch."""
    if not torch.compiler.is_compiling():
        note_backend(op, "torch", ())


def refuse_without(extension: Extension, on_cuda: bool) -> str | None:
    """Returns why a CUDA extension cannot run, or None; imports it only for CUDA tensors."""
    if not on_cuda:
        return "its kernels need tensors on a CUDA device"
    failure = probe(extension).failure
    return f"cannot import {extension.module} ({failure})" if failure else None


def refuse_torch_func(*_: Any) -> str | None:
    """Returns why hand-written gradients cannot run: they have no rule for vmap and the like."""
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return "a torch.func transform is active" if active is not None and active() else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


#: Where each op lists its implementations in ``_CANDIDATES``.
_OPS = {
    "selective_scan": "mail_agents.ops.selective_scan",
    "causal_conv1d": "mail_agents.ops.causal_conv1d",
    "ssd": "mail_agents.ops.ssd",
    # Whole Mamba layers, without gradients; where it cannot run, they are the ops above.
    "mamba_layers": "mail_agents.mixers.fused",
}


def backend_report() -> list[dict[str, Any]]:
    """Says for every op and backend whether it can run here, and how to repair it when not.

    Compiles the native kernels if they are not in the cache.

    Returns:
        One dictionary per row, in the order in which ``"auto"`` tries them: ``op``, ``name``,
        ``available``, ``reason`` (empty when available), ``versions`` (package -> version or None),
        ``fix`` (shell command, empty when none is needed) and ``auto`` (kinds of device, ``"cpu"``
        or ``"cuda"``, whose float32 tensors ``"auto"`` gives to this backend on this machine).
    """
    rows = []
    for op, module in _OPS.items():
        candidates = importlib.import_module(module)._CANDIDATES
        devices = {"cuda": torch.cuda.is_available(), "cpu": True}
        for candidate in candidates:
            reason, fix, versions = _state(candidate)
            runs_on = {"cuda": ("cuda",), "native": ("cpu",), "numba": ("cpu",)}
            auto = []
            for device in runs_on.get(candidate.name, ("cuda", "cpu")):
                if not reason and devices[device]:
                    auto.append(device)
                    devices[device] = False
            rows.append(
                {
                    "op": op,
                    "name": candidate.name,
                    "available": not reason,
                    "reason": reason,
                    "versions": {"torch": torch.__version__, "cuda": torch.version.cuda} | versions,
                    "fix": fix,
                    "auto": auto,
                }
            )
    return rows


def _state(candidate: Candidate) -> tuple[str, str, dict[str, str | None]]:
    """Why a backend cannot run here (empty when it can), the repair, and what it is made of."""
    if candidate.name == "native":
        native = _native.load()
        return native.failure, native.fix, {"library": str(native.path) if native.path else None}
    extension = candidate.extension
    if extension is None:
        return "", "", {}
    versions = {extension.distribution: _version(extension.distribution)}
    if candidate.name == "numba" and not _native.load().failure:
        # It is imported only where it is used: nothing is missing while the native kernels work.
        absent = "not installed; 'auto' needs it only where the native kernels do not work"
        return "" if versions["numba"] else absent, "", versions
    failure = probe(extension).failure
    reasons = [f"cannot import {extension.module} ({failure})"] if failure else []
    if candidate.name == "cuda" and not torch.cuda.is_available():
        reasons.append("torch sees no CUDA device")
    return "; ".join(reasons), extension.fix if failure else "", versions
