"""Environments in processes of their own, which step at the same time.

They answer like those of :mod:`mail_agents.environments`, so an evaluation cannot tell them apart.
"""

import contextlib
import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple, NoReturn

import gymnasium

from mail_agents.data.env_specs import importable_id
from mail_agents.environments import (
    EnvFacts,
    Environments,
    LocalEnvironments,
    MakeEnv,
    Move,
    Outcome,
    Start,
    env_maker,
    wanted,
)
from mail_agents.errors import InvalidInputError, MailAgentsError

# A process that does not end by itself within this many seconds is killed.
_PATIENCE = 10.0
# Started without the caller's main script: it would be run again, and bring torch into every
# process. The import path is the caller's, which may differ from that of a fresh interpreter.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mail_agents.env_workers import serve; serve(int(sys.argv[2]))"
)


class EnvironmentFailedError(MailAgentsError, RuntimeError):
    """An environment in a process of its own raised an error, or its process ended."""


class WorkerEnvironments:
    """Environments in processes of their own, which step at the same time.

    Environment ``i`` lives in process ``i % workers``. The processes end with this one, even if it
    is killed, and leave Ctrl-C to it.

    Args:
        env_id: Gymnasium id; one without its module must be registered here by an importable one.
        kwargs: Passed to ``gymnasium.make``; whatever can travel between processes.
        max_steps: Step limit, or None for the environment's own.
        count: How many environments; None takes what they suggest, at least one per process.
        workers: How many processes, at least 1.
        most: Never more environments than these.

    Raises:
        EnvironmentFailedError: An environment cannot be made, or a process ended.
        InvalidInputError: Another process could not make such an environment.
    """

    def __init__(
        self,
        env_id: str,
        kwargs: Mapping[str, Any],
        max_steps: int | None,
        *,
        count: int | None,
        workers: int,
        most: int,
    ) -> None:
        known = most if count is None else min(count, most)
        recipe = {"env_id": _travelling_id(env_id), "kwargs": dict(kwargs), "max_steps": max_steps}
        self._workers: list[_Worker] = []
        try:
            for number in range(min(workers, known)):
                self._workers.append(_Worker(number, env_id))
            first = dict.fromkeys(range(len(self._workers)))
            self.facts: EnvFacts = self._ask("make", dict.fromkeys(first, recipe))[0]
            self._count = min(wanted(count, self.facts, len(self._workers)), most)
            share = {i: len(range(i, self._count, len(self._workers))) - 1 for i in first}
            self._ask("add", {i: further for i, further in share.items() if further})
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self._count

    def reset(self, starts: Mapping[int, Start]) -> dict[int, Outcome]:
        """Begins episodes, in all processes at once."""
        return self._distribute("reset", starts)

    def step(self, moves: Mapping[int, Move]) -> dict[int, Outcome]:
        """Steps in all processes at once."""
        return self._distribute("step", moves)

    def _distribute(self, method: str, orders: Mapping[int, Any]) -> dict[int, Outcome]:
        count = len(self._workers)
        shares: dict[int, dict[int, Any]] = {}
        for number, order in orders.items():
            shares.setdefault(number % count, {})[number // count] = order
        answers = self._ask(method, shares)
        return {number: answers[number % count][number // count] for number in orders}

    def _ask(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        """Sends to all before it waits for the first."""
        for number, argument in arguments.items():
            self._workers[number].send(method, argument)
        return {number: self._workers[number].receive() for number in arguments}

    def close(self) -> None:
        """Ends the processes."""
        workers, self._workers = self._workers, []
        try:
            for worker in workers:
                worker.part()
            deadline = time.monotonic() + _PATIENCE
            for worker in workers:
                worker.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                worker.kill()


def _travelling_id(env_id: str) -> str:
    """The id by which a process without our imports finds an environment."""
    if ":" in env_id:
        return env_id
    spec = gymnasium.spec(env_id)
    found = importable_id(spec)
    entry = spec.entry_point
    if ":" not in found and not (isinstance(entry, str) and entry.startswith("gymnasium.")):
        raise InvalidInputError(
            f"A process of its own cannot make {env_id!r}: it is registered by this script only. "
            "Register it in a module that can be imported and give the id as 'module:id', or "
            "leave out workers (--workers)."
        )
    return found


class _Worker:
    """A process and the line to it."""

    def __init__(self, number: int, env_id: str) -> None:
        if sys.platform == "win32":
            raise InvalidInputError(
                "Environments in processes of their own need Linux or macOS; leave out workers "
                "(--workers)."
            )
        self._name = f"Process {number + 1} with environments {env_id!r}"
        self._line, other = Pipe()
        try:
            with ignoring_interrupts():
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(other.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[other.fileno()],
                )
        except BaseException:
            self._line.close()
            raise
        finally:
            other.close()

    def send(self, method: str, argument: Any) -> None:
        try:
            self._line.send((method, argument))
        except OSError:
            raise self._ended() from None
        except Exception as error:  # what cannot be pickled raises anything
            raise InvalidInputError(
                f"{type(error).__name__}: {error}. Arguments of an environment in a process of "
                "its own must be plain values; leave out workers (--workers) otherwise."
            ) from error

    def receive(self) -> Any:
        try:
            answer = self._line.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, _Failure):
            raise self._failed(answer)
        return answer

    def _failed(self, failure: "_Failure") -> Exception:
        if failure.error is not None:
            return failure.error
        return EnvironmentFailedError(f"{self._name} failed:\n{failure.text.rstrip()}")

    def _ended(self) -> EnvironmentFailedError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        code = self._process.poll()
        how = f"exit status {code}"
        hint = "What it printed above may say why."
        if code is not None and code < 0:
            how = f"signal {-code} ({signal.strsignal(-code)})"
            if -code == signal.SIGKILL:
                hint = (
                    "The system does that when memory runs out: try fewer environments (n_envs, "
                    "--n-envs) or processes (workers, --workers)."
                )
        return EnvironmentFailedError(f"{self._name} ended with {how}. {hint}")

    def part(self) -> None:
        """Asks the process to end."""
        with contextlib.suppress(OSError):
            self._line.send(None)
        self._line.close()

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self) -> None:
        self._process.kill()  # does nothing to a process that has ended
        self._process.wait()


@contextlib.contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which reaches all, from their first instruction on.

    Only the process that started them decides what it means.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Failure(NamedTuple):
    """An error in another process: itself, where it is one that explains itself, and its text."""

    error: Exception | None
    text: str


def serve(handle: int) -> NoReturn:
    """Hosts environments for the process at the other end of a line, until that ends.

    Args:
        handle: File descriptor of this end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what a simulator prints is no output of the evaluation
    faulthandler.enable()
    line = Connection(handle)
    orders: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(line, orders), daemon=True).start()
    host = _Host()
    with contextlib.suppress(OSError):  # nobody is left to hear
        while (order := orders.get()) is not None:
            _answer(line, host, *order)
    code = 0
    try:
        host.close()
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # the other thread still listens


def _listen(line: Connection, orders: "queue.SimpleQueue[tuple[str, Any] | None]") -> None:
    """Passes orders on; ends the process at once when the other one is gone without a word."""
    order: Any = ()
    try:
        while order is not None:
            order = line.recv()
            orders.put(order)
    except (EOFError, OSError):
        os._exit(1)
    except Exception as error:  # a class that only the sender can import
        orders.put(("refuse", f"{type(error).__name__}: {error}"))


def _answer(line: Connection, host: "_Host", method: str, argument: Any) -> None:
    try:
        answer = getattr(host, method)(argument)
    except Exception as error:
        explained = isinstance(error, MailAgentsError | gymnasium.error.Error)
        answer = _Failure(error if explained else None, traceback.format_exc())
    try:
        line.send(answer)
    except OSError:
        raise
    except Exception:  # an observation, or an error, that cannot be pickled
        line.send(_Failure(None, traceback.format_exc()))


class _Host:
    """What a process does."""

    def __init__(self) -> None:
        self._envs: LocalEnvironments | None = None

    def make(self, recipe: Mapping[str, Any]) -> EnvFacts:
        self._envs = LocalEnvironments(env_maker(**recipe), 1, 1)
        return self._envs.facts

    def refuse(self, why: str) -> None:
        raise InvalidInputError(
            f"{why}. Arguments of an environment in a process of its own must be plain values, or "
            "of classes that it can import."
        )

    def add(self, count: int) -> None:
        self._made.add(count)

    def reset(self, starts: Mapping[int, Start]) -> dict[int, Outcome]:
        return self._made.reset(starts)

    def step(self, moves: Mapping[int, Move]) -> dict[int, Outcome]:
        return self._made.step(moves)

    def close(self) -> None:
        if self._envs is not None:
            self._envs.close()

    @property
    def _made(self) -> LocalEnvironments:
        if self._envs is None:
            raise InvalidInputError("No environment has been made; send 'make' first.")
        return self._envs


def open_environments(
    env: str | MakeEnv,
    kwargs: Mapping[str, Any],
    max_steps: int | None,
    *,
    n_envs: int | None,
    workers: int,
    most: int,
) -> Environments:
    """Makes environments where they are wanted.

    Args:
        env: Gymnasium id, or a function that makes one environment.
        kwargs: Passed to ``gymnasium.make`` when ``env`` is an id.
        max_steps: Step limit when ``env`` is an id, or None for its own.
        n_envs: How many; None takes what the environment suggests, else :data:`DEFAULT_ENVS`.
        workers: Processes for them; 1 means this one.
        most: Never more than these.

    Raises:
        InvalidInputError: A function comes with arguments for it, or with other processes.
        EnvironmentFailedError: An environment in another process cannot be made.
    """
    if isinstance(env, str):
        if workers == 1:
            return LocalEnvironments(env_maker(env, kwargs, max_steps), n_envs, most)
        return WorkerEnvironments(env, kwargs, max_steps, count=n_envs, workers=workers, most=most)
    if kwargs or max_steps is not None:
        raise InvalidInputError(
            "env_kwargs and max_steps are for environments given by id; a function that makes "
            "the environment must set them itself."
        )
    if workers > 1:
        raise InvalidInputError(
            f"{workers=} needs an environment given by id ('module:id'), which other processes can "
            f"make, too; got the function {getattr(env, '__name__', env)!r}. Leave out workers, or "
            "register the environment with gymnasium.register in a module that can be imported."
        )
    return LocalEnvironments(env, n_envs, most)
