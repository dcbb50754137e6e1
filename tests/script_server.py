"""Runs scripts in forked processes, so that tests pay for importing torch once.

Reads one JSON job per line from standard input. ``{"argv": [...], ...}`` starts a script in a child
of its own and prints its process id; ``{"wait": pid}`` prints its exit status. The child is a real
process: tests kill it with SIGKILL.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback

LIMIT = 120.0


def child(job):
    """Becomes the script."""
    out = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["directory"])
    sys.argv = job["argv"]
    sys.path[:0] = [os.path.dirname(job["argv"][0]), *job["path"]]
    code = 0
    try:
        exec(job["prelude"], {})
        runpy.run_path(job["argv"][0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid):
    """Returns the exit status, negative for the signal that ended the process."""
    deadline = time.monotonic() + LIMIT
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.002)


def main():
    """Serves jobs until standard input ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(wait(job["wait"]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(job)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
