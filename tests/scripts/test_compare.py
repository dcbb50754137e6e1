"""scripts/compare.py at toy size: reuse, resume, failure, and what it refuses."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from mail_agents.errors import InvalidInputError, UnknownNameError
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


@pytest.fixture
def module(repository):
    path = repository / "scripts" / "compare.py"
    spec = importlib.util.spec_from_file_location("compare_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


# ---- the plan --------------------------------------------------------------------------------


def test_cells_are_agents_by_datasets_by_seeds(module):
    args = module.Args(
        agents=("mail/d-ma-bc,optim.lr=0.1", "mail/d-ma-bc,optim.lr=0.2", "random"),
        datasets=("a/x.v1", "a/x.v2"),
        seeds=(0, 1),
        common="history=2,language=hash,ema_decay=null",
        videos=2,
        output="out",
    )
    cells = module.plan(args)
    assert len(cells) == 3 * 2 * 2
    # Names with dots keep apart what lies beside the run directories.
    for ending in (".json", ".log"):
        assert len({cell.beside(ending) for cell in cells}) == len(cells)
    first, last = cells[0].command, cells[-1].command
    text = " ".join(first)
    assert "--config.history 2 --config.language hash --config.ema-decay None" in text
    assert "--config.optim.lr 0.1" in text
    assert "--videos 2" in text
    assert "--videos 0" in " ".join(cells[1].command)  # only for the first seed
    assert "--config" not in " ".join(last)  # common overrides are for agents that learn
    assert {cell.label for cell in cells} == set(args.agents)


def test_flags(module):
    assert module.flags({"a_b": True, "c": False, "d": [1, 2], "e.f_g": "x"}) == [
        "--config.a-b",
        "--config.no-c",
        *("--config.d", "1", "2"),
        *("--config.e.f-g", "x"),
    ]


@pytest.mark.parametrize(
    ("agents", "datasets", "error", "words"),
    [
        (("mail/d-ma-cb",), ("a",), UnknownNameError, "Did you mean 'mail/d-ma-bc'"),
        (("mail/d-ma-bc,widht=3",), ("a",), UnknownNameError, "Did you mean 'width'"),
        (("mail/d-ma-bc,width",), ("a",), InvalidInputError, "field=value"),
        (("random",), ("a/x", "b/x"), InvalidInputError, "share a directory"),
        (("random", "random"), ("a",), InvalidInputError, "share a directory"),
    ],
)
def test_a_plan_that_cannot_work_trains_nothing(module, agents, datasets, error, words):
    with pytest.raises(error, match=words):
        module.plan(module.Args(agents=agents, datasets=datasets))


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
    for name in ("report.html", "success.png", "curves.png", "table.md"):
        assert (output / name).stat().st_size > 0
        assert name == "table.md" or name == "curves.png" or name in text
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

    # A cell that fails is named with its log; the finished ones are kept, no report is written.
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
    assert not (output / "report.html").exists()


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
