"""scripts/compare.py at toy size: reuse, resume, failure, and what it refuses."""

import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from toybox.world import make_dataset

import mail_agents
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
    assert module.flags(
        {"a_b": True, "c": False, "d": [1, 2], "e.f_g": "x", "e.on": True, "e.off": False}
    ) == [
        "--config.a-b",
        "--config.no-c",
        *("--config.d", "1", "2"),
        *("--config.e.f-g", "x"),
        "--config.e.on",
        "--config.e.no-off",
    ]


def test_flags_of_nested_switches_are_those_of_the_train_script(module, capsys):
    from mail_agents.training.runs import RunArguments, parse_arguments

    for value in (True, False):
        argv = ["--agent", "dt", *module.flags({"self_evolution.enabled": value})]
        config = parse_arguments(RunArguments, argv).config
        assert config.self_evolution.enabled is value


def test_an_agent_may_be_named(module):
    agents = ("Small=dt,d_model=64,layers=2", "dt", "Other=bc")
    cells = module.plan(module.Args(agents=agents, datasets=("a",)))
    assert [cell.label for cell in cells] == ["Small", "dt", "Other"]
    assert [cell.command[1] for cell in cells] == ["dt", "dt", "bc"]
    assert "--config.d-model 64 --config.layers 2" in " ".join(cells[0].command)


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


def test_target_returns_belong_to_datasets_and_to_agents_that_use_them(module):
    args = module.Args(
        agents=("dt", "bc"),
        datasets=("data/hopper", "data/walker"),
        target_returns=("hopper=3600", "hopper=1800", "walker=5000"),
    )
    commands = {(c.label, c.dataset): " ".join(c.command) for c in module.plan(args)}
    assert "--target-returns 3600 1800" in commands["dt", "data/hopper"]
    assert "--target-returns 5000" in commands["dt", "data/walker"]
    assert "--target-returns" not in commands["bc", "data/hopper"]
    everywhere = module.plan(module.Args(("dt",), ("a", "b"), target_returns=("9", "a=-1e3")))
    assert [" ".join(c.command).partition("--target-returns ")[2] for c in everywhere] == [
        "9 -1e3",
        "9",
    ]


def test_ready_made_agents_are_evaluated_where_they_belong(module, tmp_path):
    artifact = tmp_path / "sac@home.safetensors"
    artifact.touch()
    trained = (f"SAC={artifact}@hopper", f"Both={artifact}")
    args = module.Args(("random",), ("d/hopper", "d/walker"), seeds=(3, 4), trained=trained)
    cells = [cell for cell in module.plan(args) if cell.script == "evaluate.py"]
    assert [(c.label, c.dataset, c.seed) for c in cells] == [
        ("SAC", "d/hopper", 3),
        ("Both", "d/hopper", 3),
        ("Both", "d/walker", 3),
    ]
    assert f"--agent {artifact} --dataset d/hopper" in " ".join(cells[0].command)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_returns": ("many",)}, InvalidInputError, "NUMBER or DATASET=NUMBER"),
        ({"target_returns": ("hoper=3",)}, UnknownNameError, "Did you mean 'hopper'"),
        ({"target_returns": ("3",)}, InvalidInputError, "none of --agents is one: random"),
        ({"trained": ("sac",)}, InvalidInputError, "LABEL=ARTIFACT"),
        ({"trained": ("SAC=gone.safetensors",)}, InvalidInputError, "gone.safetensors"),
        ({"trained": (f"SAC={__file__}@walker",)}, UnknownNameError, "walker"),
        ({"trained": (f"random={__file__}",)}, InvalidInputError, "label that no agent has"),
        ({"workers": 0}, InvalidInputError, "start at 1"),
    ],
)
def test_options_that_cannot_work_train_nothing(module, options, error, words):
    with pytest.raises(error, match=words):
        module.plan(module.Args(("random",), ("data/hopper",), **options))


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
