"""Environments in processes of their own, which step at the same time.

They answer like those of :mod:`mail_agents.environments`, so an evaluation cannot tell them apart.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Pipe
from typing import Any

import gymnasium

from mail_agents.data.env_specs import importable_id
from mail_agents.env_host import Failure
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
from mail_agents.interrupts import ignoring_interrupts

# A process that does not end by itself within this many seconds is killed.
_PATIENCE = 10.0
# Started without the caller's main script: it would be run again, and bring torch into every
# process. The import path is the caller's, which may differ from that of a fresh interpreter.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mail_agents.env_host import serve; serve(int(sys.argv[2]))"
)


class EnvironmentFailedError(MailAgentsError, RuntimeError):
    """An environment in a process of its own raised an error, or its process ended."""


class WorkerPool:
    """Processes that host the environments of one evaluation after the other.

    They start when they are first needed, keep what they have imported, end with this process, even
    if it is killed, and leave Ctrl-C to it. After any error all of them end.

    Args:
        workers: How many processes, at least 1.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._started: list[_Worker] = []

    def start(self, count: int) -> int:
        """Starts what is missing of a number of processes; returns how many there may be."""
        count = min(count, self.workers)
        with self._ending_on_error():
            for number in range(len(self._started), count):
                self._started.append(_Worker(number))
        return count

    def ask(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        """Sends orders to several processes before it waits for the first answer.

        Args:
            method: What to do, a method of what the processes run.
            arguments: Its argument by number of the process.

        Raises:
            EnvironmentFailedError: An environment raised an error, or a process ended.
            InvalidInputError: An argument cannot travel to another process.
        """
        with self._ending_on_error():
            for number, argument in arguments.items():
                self._started[number].send(method, argument)
            return {number: self._started[number].receive() for number in arguments}

    @property
    def running(self) -> bool:
        """Whether there are processes; there are none after an error."""
        return bool(self._started)

    @contextlib.contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()  # answers that nobody has taken would be those to the next order
            raise

    def close(self) -> None:
        """Ends the processes."""
        workers, self._started = self._started, []
        try:
            for worker in workers:
                worker.part()
            deadline = time.monotonic() + _PATIENCE
            for worker in workers:
                worker.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                worker.kill()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WorkerEnvironments:
    """Environments in the processes of a pool, which step at the same time.

    Environment ``i`` lives in process ``i`` modulo their number.

    Args:
        pool: The processes; they host nothing else meanwhile.
        env_id: Gymnasium id; one without its module must be registered here by an importable one.
        kwargs: Passed to ``gymnasium.make``; whatever can travel between processes.
        max_steps: Step limit, or None for the environment's own.
        count: How many environments; None takes what they suggest, at least one per process.
        most: Never more environments than these.

    Raises:
        EnvironmentFailedError: An environment cannot be made, or a process ended.
        InvalidInputError: Another process could not make such an environment.
    """

    def __init__(
        self,
        pool: WorkerPool,
        env_id: str,
        kwargs: Mapping[str, Any],
        max_steps: int | None,
        *,
        count: int | None,
        most: int,
    ) -> None:
        recipe = {"env_id": _travelling_id(env_id), "kwargs": dict(kwargs), "max_steps": max_steps}
        self._pool = pool
        self._hosts = pool.start(most if count is None else min(count, most))
        first = dict.fromkeys(range(self._hosts))
        self.facts: EnvFacts = pool.ask("make", dict.fromkeys(first, recipe))[0]
        self._count = min(wanted(count, self.facts, self._hosts), most)
        share = {i: len(range(i, self._count, self._hosts)) - 1 for i in first}
        pool.ask("add", {i: further for i, further in share.items() if further})

    def __len__(self) -> int:
        return self._count

    def reset(self, starts: Mapping[int, Start]) -> dict[int, Outcome]:
        """Begins episodes, in all processes at once."""
        return self._distribute("reset", starts)

    def step(self, moves: Mapping[int, Move]) -> dict[int, Outcome]:
        """Steps in all processes at once."""
        return self._distribute("step", moves)

    def _distribute(self, method: str, orders: Mapping[int, Any]) -> dict[int, Outcome]:
        shares: dict[int, dict[int, Any]] = {}
        for number, order in orders.items():
            shares.setdefault(number % self._hosts, {})[number // self._hosts] = order
        answers = self._pool.ask(method, shares)
        return {n: answers[n % self._hosts][n // self._hosts] for n in orders}

    def close(self) -> None:
        """Closes the environments; the processes stay."""
        if self._pool.running:
            self._pool.ask("close", dict.fromkeys(range(self._hosts)))


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

    def __init__(self, number: int) -> None:
        if sys.platform == "win32":
            raise InvalidInputError(
                "Environments in processes of their own need Linux or macOS; leave out workers "
                "(--workers)."
            )
        self._name, self._number = "", number
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
        if method == "make":
            env_id = argument["env_id"]
            self._name = f"Process {self._number + 1} with environments {env_id!r}"
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
        if isinstance(answer, Failure):
            raise self._failed(answer)
        return answer

    def _failed(self, failure: Failure) -> Exception:
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
def open_environments(
    env: str | MakeEnv,
    kwargs: Mapping[str, Any],
    max_steps: int | None,
    *,
    n_envs: int | None,
    workers: int | WorkerPool,
    most: int,
) -> Iterator[Environments]:
    """Makes environments where they are wanted, and closes them after.

    Args:
        env: Gymnasium id, or a function that makes one environment.
        kwargs: Passed to ``gymnasium.make`` when ``env`` is an id.
        max_steps: Step limit when ``env`` is an id, or None for its own.
        n_envs: How many; None takes what the environment suggests, else
            :data:`~mail_agents.environments.DEFAULT_ENVS`.
        workers: Processes for them, or how many; 1 means this one.
        most: Never more than these.

    Raises:
        InvalidInputError: A function comes with arguments for it, or with other processes.
        EnvironmentFailedError: An environment in another process cannot be made.
    """
    if not isinstance(env, str):
        _check_function(env, kwargs, max_steps, workers)
    with contextlib.ExitStack() as stack:
        found: Environments
        if not isinstance(env, str):
            found = LocalEnvironments(env, n_envs, most)
        elif workers == 1:
            found = LocalEnvironments(env_maker(env, kwargs, max_steps), n_envs, most)
        else:
            pool = workers
            if not isinstance(pool, WorkerPool):
                pool = stack.enter_context(WorkerPool(pool))
            found = WorkerEnvironments(pool, env, kwargs, max_steps, count=n_envs, most=most)
        stack.callback(found.close)
        yield found


def _check_function(
    env: MakeEnv, kwargs: Mapping[str, Any], max_steps: int | None, workers: int | WorkerPool
) -> None:
    if kwargs or max_steps is not None:
        raise InvalidInputError(
            "env_kwargs and max_steps are for environments given by id; a function that makes "
            "the environment must set them itself."
        )
    if workers != 1:
        count = workers.workers if isinstance(workers, WorkerPool) else workers
        raise InvalidInputError(
            f"workers={count} needs an environment given by id ('module:id'), which other "
            f"processes can make, too; got the function {getattr(env, '__name__', env)!r}. Leave "
            "out workers, or register the environment with gymnasium.register in a module that "
            "can be imported."
        )
