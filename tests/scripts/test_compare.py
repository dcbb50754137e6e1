"""scripts/compare.py at toy size: reuse, resume, failure, and what it refuses. For plans see
tests/mail_agents/training/test_comparison.py."""

import csv
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from toybox.world import make_dataset

import mail_agents
from mail_agents.report.results import load_results

TINY = (
    "mail/d-ma-bc,decoder.layers=1,decoder.d_state=2,width=8,feature_width=8,history=2,horizon=2,"
    "optim.batch_size=8"
)
#: Kills the process at its 9th file operation: while it writes its checkpoint.
DIE = """
import os, signal
count = iter(range(10**6))
def deadly(function):
    def call(*arguments, **options):
        if next(count) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
os.fsync, os.replace, os.rename = map(deadly, (os.fsync, os.replace, os.rename))
"""


# ---- running ---------------------------------------------------------------------------------


def test_reuse_resume_refusal_and_failure(scripts, tmp_path, point_dataset):
    output = tmp_path / "out"
    base = (
        *("--datasets", point_dataset, "--eval-episodes", 2, "--device", "cpu"),
        *("--workers", 1, "--output", output, "--common", "padding=edge"),
    )
    command = ("--agents", TINY, "mean-action", *base, "--steps", 30)

    # One cell was killed, after all its losses were logged.
    killed = output / "runs" / "mail-d-ma-bc-point-s0"
    flags = [f"--config.{part.replace('_', '-')}" for part in TINY.split(",")[1:]]
    job = scripts.start(
        tmp_path,
        *("train", "--agent", "mail/d-ma-bc", "--dataset", point_dataset, "--steps", 30),
        *("--eval-episodes", 2, "--output", killed, "--device", "cpu"),
        *(piece for flag in flags for piece in flag.split("=")),
        prelude=DIE,
    )
    assert job.wait() == -9, job.output
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == 2

    code, text = scripts.run(tmp_path, "compare", *command, "--title", "Toys", "--notes", "A note.")
    assert code == 0, text
    assert "2 runs, 0 already done" in text
    assert "finished mail/d-ma-bc point s0" in text
    results = load_results(output / "results.json")
    assert [result.agent for result in results] == ["mail/d-ma-bc", "mean-action"]
    assert results[0].train_steps == 30
    assert [step for step, _ in results[0].curve] == [20, 30]  # each once, in spite of the kill
    for name in ("report.html", "success.png", "curves.png", "episodes.csv", "table.md"):
        assert (output / name).stat().st_size > 0
        assert name == "table.md" or name in text
    with open(output / "episodes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["agent"], row["step"]) for row in rows} == {
        ("mail/d-ma-bc", "30"),
        ("mean-action", "0"),
    }
    assert len(rows) == 4
    report = (output / "report.html").read_text()
    assert "Toys" in report
    assert "A note." in report
    assert "compare.py" in report
    assert "mail/d-ma-bc" in (output / "table.md").read_text()

    # Again: everything is done, nothing is trained.
    before = {p: p.stat().st_mtime_ns for p in (output / "runs").rglob("result.json")}
    assert len(before) == 2
    code, text = scripts.run(tmp_path, "compare", *command)
    assert code == 0, text
    assert "2 runs, 2 already done" in text
    assert before == {p: p.stat().st_mtime_ns for p in (output / "runs").rglob("result.json")}

    # Other settings in the same place would compare apples with pears.
    code, text = scripts.run(
        tmp_path, "compare", "--agents", TINY, "mean-action", *base, "--steps", 20
    )
    assert code == 1
    assert "was trained with other settings" in text
    assert "--output" in text
    assert "Traceback" not in text

    # A cell that fails is named with its log; the others are kept, and the report says so.
    (output / "report.html").unlink()
    broken = TINY.replace("d-ma", "d-tr").replace("decoder.d_state=2", "optim.lr=1e30")
    more = ("--agents", broken, *command[1:])
    code, text = scripts.run(tmp_path, "compare", *more)
    assert code == 1
    assert "3 runs, 2 already done" in text
    assert "FAILED   mail/d-tr-bc point s0" in text
    assert "reused   mean-action" in text
    assert "Traceback" not in text
    log = re.search(r"(\S+\.log) ends with:", text)
    assert log is not None
    assert "error: The loss became" in (tmp_path / log[1]).read_text()
    assert "error: The loss became" in text[log.end() :]
    report = (output / "report.html").read_text()
    assert "1 of 3 runs failed and are missing here: mail/d-tr-bc point s0." in report
    assert len(load_results(output / "results.json")) == 2


def test_scores_targets_and_ready_made_agents(scripts, tmp_path):
    """What offline RL asks of a comparison, with worlds that take milliseconds."""
    data = tmp_path / "hopper-medium"
    scale = {"point": {"min": -100, "max": 0, "source": "measured"}}
    dataset = make_dataset(data, name=data.name, reference_scores=scale)
    expert = mail_agents.make("mean-action", dataset.features, device="cpu")
    expert.fit_statistics(dataset)
    artifact = expert.save(tmp_path / "expert.safetensors")
    output = tmp_path / "out"
    small = "dt,d_model=8,layers=1,history=2,max_timestep=20,optim.batch_size=8"
    code, text = scripts.run(
        tmp_path, "compare",
        *("--agents", small, "random", "--datasets", data, "--seeds", 0, 1, "--steps", 4),
        *("--eval-every", 2, "--eval-episodes", 2, "--device", "cpu", "--output", output),
        *("--target-returns", "hopper-medium=-1", "-3", "--trained", f"Expert={artifact}"),
        *("--workers", 1),
    )  # fmt: skip
    assert code == 0, text
    results = load_results(output / "results.json")
    assert [(r.label, r.seed) for r in results] == [
        ("dt", 0), ("dt", 1), ("random", 0), ("random", 1), ("Expert", 0),
    ]  # fmt: skip
    assert {r.references["point"].source for r in results} == {"measured"}
    assert list(results[0].by_target()) == ["-1", "-3"]
    assert results[2].by_target() == {}
    assert set(results[0].evaluations) == {"last", "best"}
    table = (output / "table.md").read_text()
    assert "| last checkpoint | best checkpoint |" in table
    assert " ± " in table
    assert re.search(r"scores\.png", text)
    assert re.search(r"^ Expert ", text, re.MULTILINE)
    with open(output / "episodes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    dt = [row for row in rows if row["label"] == "dt" and row["seed"] == "1"]
    assert [(row["step"], row["target"]) for row in dt[::2]] == [
        ("2", "-1.0"), ("2", "-3.0"), ("4", "-1.0"), ("4", "-3.0"),
    ]  # fmt: skip
    assert float(dt[0]["score"]) == pytest.approx(float(dt[0]["return"]) + 100)
    assert {row["step"] for row in rows if row["label"] == "Expert"} == {""}
    report = (output / "report.html").read_text()
    assert "Target returns" in report
    # The name is D4RL's, the data are not: its published numbers stand apart, and say so.
    assert "in spite of their names: hopper-medium." in report
    assert "67.6" in report[report.index("Published numbers") :]


def test_a_place_that_cannot_be_written_is_named(scripts, tmp_path, point_dataset):
    (tmp_path / "afile").touch()
    code, text = scripts.run(
        tmp_path, "compare", "--agents", "random", "--datasets", point_dataset, "--output",
        tmp_path / "afile" / "c",
    )  # fmt: skip
    assert code == 1
    assert "error: Cannot write" in text
    assert "afile" in text
    assert "Traceback" not in text


def test_ctrl_c_ends_everything_and_the_same_command_continues(tmp_path, point_dataset, repository):
    output = tmp_path / "out"
    roots = [str(repository / name) for name in (".", "envs", "wrappers", "baselines")]
    roots.append(str(repository / "tests" / "third_party"))
    command = [
        *(sys.executable, str(repository / "scripts" / "compare.py"), "--agents", TINY, "random"),
        *("--datasets", str(point_dataset), "--seeds", "0", "1", "--steps", "1000000"),
        *("--device", "cpu", "--output", str(output), "--workers", "1"),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = output / "runs" / "mail-d-ma-bc-point-s0" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "again to continue" in stdout
    assert stderr == ""
    assert "Traceback" not in "".join(log.read_text() for log in (output / "runs").glob("*.log"))
    # Nothing is left running, and what waited was not started.
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not (output / "runs" / "random-point-s1").exists()


HELP = """
import runpy, sys
sys.argv = ["compare.py", "--help"]
try:
    runpy.run_path({path!r}, run_name="__main__")
except SystemExit as end:
    print("status", end.code, "torch" in sys.modules)
"""


def test_help(scripts, tmp_path, repository):
    code = HELP.format(path=str(repository / "scripts" / "compare.py"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "--agents" in done.stdout
    assert done.stdout.endswith("status 0 False\n")  # quick: planning needs no torch
    code, output = scripts.run(tmp_path, "compare", "--agents", "random")
    assert code == 2
    assert "--datasets" in output
