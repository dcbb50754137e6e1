"""Scripts in processes of their own, forked from one that has imported everything."""

import os
import subprocess
import sys
import threading
import time

import pytest

from mail_agents.errors import MailAgentsError
from mail_agents.training import workers
from mail_agents.training.workers import Worker

SCRIPT = """
import os, signal, sys
print("hello from", os.getpid(), sys.argv[1:], "json" in sys.modules, flush=True)
marker = "colours" in sys.modules
sys.modules["colours"] = sys
what = sys.argv[1]
if what == "crash":
    raise ValueError("no")
if what == "segfault":
    os.kill(os.getpid(), signal.SIGSEGV)
if what == "complain":
    sys.exit("error: no such thing")
if what == "code":
    sys.exit(3)
if what == "sleep":
    import time
    open(sys.argv[2], "w").write(str(os.getpid()))
    time.sleep(600)
if what == "read":
    sys.exit(0 if sys.stdin.read() == "" else 9)
if what == "threads":
    sys.exit(int(os.environ["OMP_NUM_THREADS"]) * 10 + marker)
if what == "atexit":
    import atexit
    atexit.register(print, "goodbye")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(params=["forked", "started"])
def worker(request, monkeypatch):
    forks = request.param == "forked"
    if forks and sys.platform != "linux":
        pytest.skip("forking is for Linux")
    monkeypatch.setattr(workers, "_FORKS", forks)
    monkeypatch.setattr(workers, "PRELOADED", ("json", "no_such_module"))
    worker = Worker(2)
    yield worker
    worker.close()


def test_each_script_is_a_process_of_its_own(worker, script, tmp_path):
    log = tmp_path / "log"
    assert worker.run(script, ["fine", "a b", "--x=ü"], log) == 0
    assert worker.run(script, ["crash"], log) == 1
    assert worker.run(script, ["segfault"], log) == -11
    assert worker.run(script, ["complain"], log) == 1
    assert worker.run(script, ["code"], log) == 3
    assert worker.run(script, ["read"], log) == 0
    assert worker.run(script, ["threads"], log) == 20  # and nothing is left of earlier scripts
    assert worker.run(script, ["atexit"], log) == 0
    text = log.read_text()
    assert "['fine', 'a b', '--x=ü']" in text
    assert "ValueError: no" in text
    assert "error: no such thing\n" in text
    assert text.endswith("goodbye\n")
    pids = [line.split()[2] for line in text.splitlines() if line.startswith("hello")]
    assert len(set(pids)) == len(pids) == 8
    assert str(os.getpid()) not in pids


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(") ")[2][0] != "Z"


def test_closing_ends_what_runs(worker, script, tmp_path):
    codes, started = [], tmp_path / "pid"
    arguments = (script, ["sleep", str(started)], tmp_path / "log")
    thread = threading.Thread(target=lambda: codes.append(worker.run(*arguments)))
    thread.start()
    deadline = time.monotonic() + 30
    while not (started.exists() and started.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.close()
    thread.join(30)
    assert not thread.is_alive()
    assert codes[0] != 0
    if sys.platform == "linux":
        assert not alive(int(started.read_text()))
    with pytest.raises(MailAgentsError, match="closed"):
        worker.run(script, ["fine"], tmp_path / "log")


POISON = """
import sys, types
sys.modules["torch"] = types.SimpleNamespace(
    cuda=types.SimpleNamespace(_is_in_bad_fork=lambda: True)
)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forking is for Linux")
def test_a_script_that_could_not_use_the_gpu_is_started_from_scratch(script, tmp_path, monkeypatch):
    (tmp_path / "poison.py").write_text(POISON)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(workers, "PRELOADED", ("poison",))
    worker, log = Worker(3), tmp_path / "log"
    try:
        assert worker.run(script, ["threads", "a b"], log) == 30
        assert worker.run(script, ["crash"], log) == 1
    finally:
        worker.close()
    text = log.read_text()
    assert "['threads', 'a b']" in text
    assert "mail_agents" not in text  # the traceback has no frame of the server


PARENT = """
import sys
from pathlib import Path
from mail_agents.training import workers
workers.PRELOADED = ()
script, pid, log = sys.argv[1:]
workers.Worker(1).run(Path(script), ["sleep", pid], Path(log))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forking is for Linux")
def test_nothing_outlives_who_asked_for_it(script, tmp_path):
    started = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(script), str(started), str(tmp_path / "log")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 30
    while not (started.exists() and started.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    while alive(int(started.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="forking is for Linux")
def test_a_killed_server_is_replaced(script, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PRELOADED", ())
    worker = Worker(1)
    try:
        worker._process.kill()
        worker._process.wait()
        assert worker.run(script, ["code"], tmp_path / "log") == 3
        # Killed in the middle of a script, for example for its memory.
        monkeypatch.setattr(worker._process.stdin, "flush", worker._process.kill)
        assert worker.run(script, ["fine"], tmp_path / "log") == -9
        assert worker.run(script, ["code"], tmp_path / "log") == 3
    finally:
        worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="forking is for Linux")
def test_what_is_preloaded_is_safe_to_fork():
    """A thread of the server would be missing in its children, and hold its locks for ever."""
    code = (
        "import importlib, os\n"
        f"for name in {workers.PRELOADED!r}: importlib.import_module(name)\n"
        "import torch, threading\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert threading.active_count() == 1\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"
