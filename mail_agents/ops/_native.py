"""The compiled CPU kernels: the C++ files of this package, built on first use, called by ctypes.

Nothing is compiled on import. The first op call that may use the kernels builds all of them into
one shared library, in a folder of the user's cache whose name depends on everything that the
result depends on, and that no other user can write to. Whatever goes wrong ends as a text:
``"auto"`` then takes the next backend, and naming ``native`` raises with that text.

A source file ``x.cpp`` may export ``const char *selftest_x(void)``; it returns a null pointer when
the kernels of that file reproduce known numbers, else what differs. It is called once per process,
before anything else in the library.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mail_agents.ops._user_cache import cache_directory, only_ours

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "native"
#: Part of the key of the cache: raise it when callers expect other functions of the same sources.
_ABI = 1
#: Longest time for the whole build, seconds; it takes a few on an idle machine.
_TIMEOUT_S = 120.0
#: Build folders older than this were left by processes that were killed, seconds.
_STALE_S = 3600.0

_PLAIN = (Tensor, torch.nn.Parameter)

#: No -ffast-math: kernels rely on rounding, and NaN and infinity have to propagate.
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-exceptions", "-fno-rtti"),
)
#: The first that a compiler accepts is used.
_TUNING = (("-march=native",), ("-mcpu=native",), ())

_GET_COMPILER = {
    "linux": "apt-get install g++ (Debian and Ubuntu)",
    "darwin": "xcode-select --install",
}
_OTHER_COMPILER = "export CXX=g++ (any GCC from 10 or Clang from 11 on)"


class Native(NamedTuple):
    """The loaded library, or why there is none.

    Attributes:
        library: The kernels, or None.
        failure: Why there is no library; empty when there is one.
        fix: Command that repairs it; empty when there is none or nothing to repair.
        path: The file that was loaded.
    """

    library: ctypes.CDLL | None
    failure: str
    fix: str = ""
    path: Path | None = None


class _Unavailable(Exception):
    """Reason and repair."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.fix = fix


class _NoCompiler(_Unavailable):
    """None was named and there is none of the usual names."""


@functools.cache
def load() -> Native:
    """Builds the kernels if they are not in the cache, and loads them; once per process.

    ``load.cache_clear()`` forgets the result. Never raises.
    """
    try:
        path, library = _find_or_build()
        return Native(library, "", "", path)
    except _Unavailable as error:
        return Native(None, str(error), error.fix)
    except Exception as error:  # whatever it is, the other backends work
        return Native(None, f"{type(error).__name__}: {error}")


def refuse_native(*tensors: Tensor | None) -> str | None:
    """Returns why the kernels cannot run on these tensors, or None; builds them if needed."""
    return refuse_memory(*tensors) or load().failure or None


def refuse_memory(*tensors: Tensor | None) -> str | None:
    """Returns why code that works on the memory of CPU tensors in float32 cannot run, or None."""
    from mail_agents.ops.backends import refuse_torch_func  # it imports this module

    for x in tensors:
        # Every call of an op looks at all of its tensors: first what tells apart at once.
        if x is None or (
            type(x) in _PLAIN and x.is_cpu and x.dtype is not torch.float64 and not x.is_neg()
        ):
            continue
        if not x.is_cpu:
            return "its kernels need tensors on the CPU"
        if x.dtype == torch.float64:
            return "its kernels compute in float32, an input is float64"
        if recorded():
            break
        if type(x) not in _PLAIN:  # for example one without memory, which stands for another
            return f"an input is a {type(x).__name__}, not a plain tensor"
        return "an input is a view that negates its memory"
    return "the call is being traced or recorded" if recorded() else refuse_torch_func()


def recorded() -> bool:
    """Whether something follows single operations: it would miss what a kernel does to memory.

    That is ``torch.compile``, ``torch.jit.trace`` and every dispatch mode, for example those of
    ``make_fx``, of fake tensors and of counters; where they are off, this takes 0.2 us.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
    )


def threads() -> int:
    """Returns the number of threads that a kernel may use: the setting of torch."""
    return torch.get_num_threads()


def _find_or_build() -> tuple[Path, ctypes.CDLL]:
    if sys.platform not in _GET_COMPILER:
        raise _Unavailable("the kernels are built on Linux and macOS only", "")
    sources = sorted(_SOURCES.glob("*.cpp"))
    if not sources:
        raise _Unavailable(f"there are no kernel sources in {_SOURCES}", "")
    try:
        folder = cache_directory("native")
    except (OSError, RuntimeError) as error:
        raise _Unavailable(
            f"no folder for the compiled kernels: {error}",
            "export XDG_CACHE_HOME=... (a folder that belongs to you)",
        ) from error
    try:
        compiler = _compiler()
    except _NoCompiler:
        # What one made of the same sources for this CPU, say of an image's earlier stage, will do.
        found = _find(folder, f"{_key()}-*", sources)
        if found is None:
            raise
        return found
    key = f"{_key()}-{_compiler_key(compiler)}"
    found = _find(folder, key, sources)
    if found is not None:
        return found
    path = _build(compiler, sources, folder, key)
    return path, _open(path, sources)


def _find(folder: Path, key: str, sources: Sequence[Path]) -> tuple[Path, ctypes.CDLL] | None:
    """Opens a library of the cache, and removes those that cannot be trusted or opened."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        if _sound(path):
            with contextlib.suppress(OSError):  # made where other libraries are: build it again
                return path, _open(path, sources)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _sound(path: Path) -> bool:
    """Whether a library is whole, and nobody else can have written it."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or not only_ours(found):
        return False
    return path.stem.rpartition("-")[2] == _digest(path)


def _compiler() -> list[str]:
    """Returns the command of the compiler: that of ``CXX``, else the first usual one."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise _Unavailable(f"CXX is no command line ({error})", "unset CXX") from error
    if named:
        found = shutil.which(named[0])
        if found is None:
            raise _Unavailable(f"CXX names {named[0]!r}, which is not here", "unset CXX")
        return [found, *named[1:]]
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise _NoCompiler("there is no C++ compiler", _GET_COMPILER[sys.platform])


def _key() -> str:
    """A name for everything that the library depends on, but the compiler."""
    parts = [_ABI, _FLAGS, _TUNING, platform.machine()]
    parts += [torch.backends.cpu.get_cpu_capability(), _cpu_features()]
    for source in sorted((*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h"))):
        parts += [source.name, hashlib.sha256(source.read_bytes()).hexdigest()]
    return _hash(parts, 24)


def _compiler_key(compiler: Sequence[str]) -> str:
    """A name for a compiler, its version and its options."""
    program = Path(compiler[0]).resolve()
    found = program.stat()
    return _hash([list(compiler), program, found.st_size, found.st_mtime_ns], 8)


def _hash(parts: Sequence[object], digits: int) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:digits]


def _cpu_features() -> str:
    """The instructions of this CPU; folders may be shared by machines that differ."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    return platform.processor()


def _digest(path: Path) -> str:
    """Part of the name of a library, so that one that was cut short is never opened."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _open(path: Path, sources: Sequence[Path]) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for source in sources:
        test = getattr(library, f"selftest_{source.stem}", None)
        if test is None:
            continue
        test.argtypes, test.restype = [], ctypes.c_char_p
        problem = test()
        if problem:
            raise _Unavailable(
                f"{source.name} as compiled here gives wrong numbers ({problem.decode()})",
                _OTHER_COMPILER,
            )
    return library


def _build(compiler: Sequence[str], sources: Sequence[Path], folder: Path, key: str) -> Path:
    """Compiles and links; the finished file appears in the cache at once, or not at all."""
    started = time.monotonic()
    logger.info("compiling the CPU kernels with %s, once; this takes some seconds", compiler[0])
    try:
        _remove_stale(folder)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as temporary:
            made = _compile(compiler, sources, Path(temporary), started + _TIMEOUT_S)
            path = folder / f"{key}-{_digest(made)}.so"
            made.chmod(0o700)  # whatever the umask is
            os.replace(made, path)
    except OSError as error:
        raise _Unavailable(
            f"cannot write the compiled kernels to {folder}: {error}",
            "export XDG_CACHE_HOME=... (a folder that you can write to)",
        ) from error
    except _Unavailable as error:
        logger.warning(
            "the CPU kernels could not be compiled, others run instead: %s. "
            "MAIL_AGENTS_BACKEND=torch leaves out the attempt",
            error,
        )
        raise
    logger.info("compiled the CPU kernels in %.1f s: %s", time.monotonic() - started, path)
    return path


def _remove_stale(folder: Path) -> None:
    for left in folder.glob("build-*"):
        if time.time() - left.stat().st_mtime > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)


def _compile(
    compiler: Sequence[str], sources: Sequence[Path], folder: Path, deadline: float
) -> Path:
    flags = [*_FLAGS, *_tuning(compiler, folder, deadline)]
    objects = [folder / f"{source.stem}.o" for source in sources]
    _run_all(
        [
            [*compiler, *flags, "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ],
        deadline,
    )
    library = folder / "kernels.so"
    _run_all(
        [[*compiler, *flags, "-shared", *map(str, objects), "-lm", "-o", str(library)]], deadline
    )
    return library


def _tuning(compiler: Sequence[str], folder: Path, deadline: float) -> list[str]:
    """Returns the flags for this CPU and for threads that the compiler takes."""
    empty = folder / "empty.cpp"
    empty.write_text('extern "C" int nothing(void) { return 0; }\n')

    def takes(*flags: str, code: Path = empty) -> bool:
        command = [*compiler, *flags, "-shared", "-fPIC", str(code), "-o", str(folder / "empty.so")]
        try:
            _run_all([command], deadline)
        except _CompileError:
            return False
        return True

    tuning = next(flags for flags in _TUNING if not flags or takes(*flags))
    # Only GCC: the OpenMP library of Clang ends the process when torch brings another copy of it.
    gnu = folder / "gnu.cpp"
    gnu.write_text("#ifdef __clang__\n#error\n#endif\n#include <omp.h>\n")
    return [*tuning, *(["-fopenmp"] if takes("-fopenmp", code=gnu) else [])]


class _CompileError(_Unavailable):
    """The compiler ran and reported an error."""


def _run_all(commands: Sequence[Sequence[str]], deadline: float) -> None:
    """Runs commands side by side; raises _Unavailable when one fails or time is up."""
    running: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            running.append(
                # A session of its own: a compiler is several processes, which end together.
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    env={**os.environ, "LC_ALL": "C"},
                    start_new_session=True,
                )
            )
        for process in running:
            message = process.communicate(timeout=max(0.0, deadline - time.monotonic()))[1]
            if process.returncode:
                raise _CompileError(
                    f"{process.args[0]} failed: {_first_error(message, process.returncode)}",  # type: ignore[index]
                    _OTHER_COMPILER,
                )
    except subprocess.TimeoutExpired as error:
        raise _Unavailable(
            f"{commands[0][0]} had not finished after {_TIMEOUT_S:.0f} s", _OTHER_COMPILER
        ) from error
    except OSError as error:
        raise _CompileError(f"cannot run {commands[0][0]}: {error}", _OTHER_COMPILER) from error
    finally:
        for process in running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def _first_error(message: str, status: int) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit status {status}"])[0][:300]
