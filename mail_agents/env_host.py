"""A process that hosts environments for another one, see :mod:`mail_agents.env_workers`."""

import contextlib
import faulthandler
import gc
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

import gymnasium

from mail_agents.environments import EnvFacts, LocalEnvironments, Move, Outcome, Start, env_maker
from mail_agents.errors import InvalidInputError, MailAgentsError


class Failure(NamedTuple):
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
        host.close(None)
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
        answer = Failure(error if explained else None, traceback.format_exc())
    try:
        line.send(answer)
    except OSError:
        raise
    except Exception:  # an observation, or an error, that cannot be pickled
        line.send(Failure(None, traceback.format_exc()))


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

    def close(self, _: None) -> None:
        envs, self._envs = self._envs, None
        if envs is not None:
            envs.close()
            gc.collect()  # simulators hold their scenes in reference cycles

    @property
    def _made(self) -> LocalEnvironments:
        if self._envs is None:
            raise InvalidInputError("No environment has been made; send 'make' first.")
        return self._envs
