"""Runs scripts one after another, each in a process of its own, importing torch only once.

A :class:`Worker` is a process that has imported what train scripts import, which takes seconds, and
then forks a child for every script. A script that crashes, is killed or leaks ends with its child;
the next one starts from the same clean imports. Where forking is not safe (everything but Linux),
each script is started from scratch.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mail_agents.errors import MailAgentsError
from mail_agents.interrupts import ignoring_interrupts

#: Importing these starts no thread and opens no GPU or display; simulators may, and stay out.
PRELOADED = (
    "torch",
    "torch.optim",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "mail_agents.agent",
    "mail_agents.checkpoint",
    "mail_agents.report.summary",
    "mail_agents.suite",
    "mail_agents.training.session",
    "rich.progress",
    "scipy.special",
)
_FORKS = sys.platform == "linux"
#: Seconds between looks at a running script.
_POLL = 0.02


class Worker:
    """One place of a pool: runs a script at a time.

    Args:
        threads: Threads that each script may use for arithmetic.
        modules: Modules to import once besides the usual ones, for example those of the agents.
    """

    def __init__(self, threads: int, modules: Sequence[str] = ()) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._modules = (*PRELOADED, *modules)
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen | None = None
        if _FORKS:
            self._serve()

    def _serve(self) -> subprocess.Popen:
        # -P: unlike with a script, the working directory would come first on the import path.
        command = [sys.executable, "-P", "-m", "mail_agents.training.workers", *self._modules]
        with ignoring_interrupts():
            return self._launch(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _launch(self, command: Sequence[str], **options) -> subprocess.Popen:
        with self._lock:
            if self._closed:
                raise MailAgentsError("The worker is closed.")
            self._process = subprocess.Popen(command, env=self._environment, **options)
            return self._process

    def run(self, script: Path, arguments: Sequence[str], log: Path) -> int:
        """Runs a Python script to its end.

        Args:
            script: The script.
            arguments: Its command line.
            log: File that receives what it prints, at its end.

        Returns:
            Its exit status; negative for the signal that ended it.

        Raises:
            MailAgentsError: The worker is closed.
        """
        if not _FORKS:
            with open(log, "a", encoding="utf-8") as file:
                command = [sys.executable, str(script), *arguments]
                return self._launch(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file
                ).wait()
        server = self._process
        if server is None or server.poll() is not None:  # killed, perhaps for memory
            _drop(server)
            server = self._serve()
        assert server.stdin is not None
        assert server.stdout is not None
        job = {"script": str(script), "arguments": list(arguments), "log": str(log)}
        with contextlib.suppress(OSError, ValueError):  # it has died, or is being closed
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            if answer := server.stdout.readline():
                return int(answer)
        return server.wait() or 1

    def close(self) -> None:
        """Ends the worker, and the script it is running without a chance to clean up."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None and process.stdin is None:
            process.kill()
        _drop(process)


def _drop(process: subprocess.Popen | None) -> None:
    """Closes the pipes of a process, which makes a server kill its child and end, and waits."""
    if process is None:
        return
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def serve(modules: Sequence[str]) -> NoReturn:
    """Imports modules, then runs a script per line of standard input and answers its exit status.

    A line is ``{"script": path, "arguments": [...], "log": path}``. Ends with standard input.

    Args:
        modules: Names; one that cannot be imported is left for the scripts to complain about.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an import prints is no answer
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # or collecting garbage would copy every page that the children share
    while line := sys.stdin.readline():
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            answers.close()
            _become(job)
        answers.write(f"{_wait(pid)}\n")
        answers.flush()
    os._exit(0)  # at once: taking apart what was imported takes two seconds


def _become(job: dict) -> NoReturn:
    """Runs the script of a job as if Python had been started with it."""
    with open(os.devnull) as nothing, open(job["log"], "a", encoding="utf-8") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    command = [job["script"], *job["arguments"]]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        # Something imported has looked at the GPU, which a forked process can then not use.
        os.execv(sys.executable, [sys.executable, *command])
    sys.argv = command
    sys.path.insert(0, os.path.dirname(job["script"]))
    code: Any = 0
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: taking apart what was imported would copy every page of it first.
    os._exit(code if isinstance(code, int) else int(code is not None))


def _wait(pid: int) -> int:
    """Exit status of a child; kills it when nobody is left to hear."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        # Nothing is written before the answer: readable means that standard input has ended.
        if select.select([0], [], [], _POLL)[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os._exit(1)


if __name__ == "__main__":
    serve(sys.argv[1:])
