import importlib.metadata
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from mail_agents import cli, doctor
from mail_agents.data.episode import Episode
from mail_agents.data.store import write_dataset
from mail_agents.errors import InvalidInputError


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [
        Episode(
            observations={
                "state": rng.normal(size=(11, 3)),
                "cam": rng.integers(0, 255, (11, 16, 16, 3), dtype=np.uint8),
            },
            actions=rng.normal(size=(10, 2)).astype(np.float32),
            rewards=rng.random(10),
            terminations=np.zeros(10, bool),
            truncations=np.arange(10) == 9,
            task=f"task-{i % 2}",
            seed=i,
        )
        for i in range(3)
    ]
    path = tmp_path / "store"
    write_dataset(path, episodes, name="made up")
    return path


def test_list(capsys):
    assert cli.main(["list", "mail/ed-ma-*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("mail/ed-ma-ddpm ") for line in lines)
    assert all(line.startswith("mail/ed-ma-") for line in lines)


def test_list_filters_by_tags_and_prints_json(capsys):
    assert cli.main(["list", "--tags", "mail", "mamba", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"mail/d-ma-bc", "mail/ed-ma-ddpm"} <= {item["id"] for item in found}
    assert all({"mail", "mamba"} <= set(item["tags"]) for item in found)


def test_list_without_a_match_fails(capsys):
    assert cli.main(["list", "nobody/*"]) == 1
    assert "No agent matches 'nobody/*'" in capsys.readouterr().err


def test_spec(capsys):
    assert cli.main(["spec", "mail/ed-ma-bc"]) == 0
    text = capsys.readouterr().out
    assert "paper" in text
    assert "optim.lr" in text
    assert cli.main(["spec", "mail/ed-ma-bc", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["id"] == "mail/ed-ma-bc"
    assert document["config"]["optim"]["lr"] > 0


def test_a_wrong_name_is_one_paragraph_and_a_suggestion(capsys):
    assert cli.main(["spec", "mail/ed-ma-dbpm"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: Unknown agent id 'mail/ed-ma-dbpm'.")
    assert "Did you mean 'mail/ed-ma-ddpm'?" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [["speck"], ["spec"], ["data"], ["list", "--jsn"]])
def test_a_wrong_command_line_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_check(capsys):
    assert cli.main(["check", "random"]) == 0
    assert "random: conforms" in capsys.readouterr().out
    assert cli.main(["check", "random", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["ok"] is True
    assert cli.main(["check"]) == 1
    assert "at least one agent" in capsys.readouterr().err


def test_check_fails_when_an_agent_does_not_conform(capsys, monkeypatch):
    import mail_agents.check as check

    failed = check.CheckReport("x", [check.CheckResult("acts", "fail", "no", 0.0)])
    monkeypatch.setattr(check, "check_agent", lambda agent_id: failed)
    assert cli.main(["check", "x"]) == 1
    assert "DOES NOT CONFORM" in capsys.readouterr().out


def test_info_of_an_artifact(tmp_path, capsys):
    import mail_agents
    from mail_agents.data.example import example_dataset, example_features

    features = example_features()
    agent = mail_agents.make("mean-action", features)
    agent.fit_statistics(example_dataset(features, 6))
    path = agent.save(tmp_path / "agent.safetensors")
    assert cli.main(["info", str(path)]) == 0
    text = capsys.readouterr().out
    assert "mean-action" in text
    assert "parameters" in text
    assert cli.main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agent"] == "mean-action"


def test_info_of_another_file(tmp_path, capsys):
    path = tmp_path / "agent.safetensors"
    path.write_bytes(b"PK\x03\x04 not one of ours")
    assert cli.main(["info", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_inspect(store, tmp_path, capsys):
    folder = tmp_path / "frames"
    assert cli.main(["data", "inspect", str(store), "--frames", str(folder)]) == 0
    captured = capsys.readouterr()
    for wanted in ("made up  (3 episodes, 30 steps", "task-1", "state"):
        assert wanted in captured.out
    assert (folder / "cam.png").read_bytes()[:4] == b"\x89PNG"
    assert str(folder / "cam.png") in captured.err
    assert cli.main(["data", "inspect", str(store), "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["tasks"] == {"task-0": 2, "task-1": 1}
    assert description["features"]["action"]["nan"] == 0


def test_inspect_without_images(tmp_path, capsys):
    flags = np.zeros(1, bool)
    episode = Episode({"state": np.zeros((2, 1))}, np.zeros((1, 1)), np.ones(1), flags, flags)
    write_dataset(tmp_path / "s", [episode])
    assert cli.main(["data", "inspect", str(tmp_path / "s"), "--frames", str(tmp_path / "f")]) == 1
    assert "no images to show; the data set observes state" in capsys.readouterr().err


def test_verify_finds_an_altered_byte(store, capsys):
    assert cli.main(["data", "verify", str(store)]) == 0
    assert "in order, 3 episodes, 30 steps" in capsys.readouterr().out
    (column,) = [path for path in store.iterdir() if "action" in path.name]
    data = bytearray(column.read_bytes())
    data[-1] ^= 1
    column.write_bytes(data)
    assert cli.main(["data", "verify", str(store)]) == 1
    assert column.name in capsys.readouterr().err


class Converter:
    """Stands for an installed entry point."""

    def __init__(self, name, function):
        self.name, self.value, self.function = name, "made:up", function

    def load(self):
        if isinstance(self.function, Exception):
            raise self.function
        return self.function


@pytest.fixture
def converters(monkeypatch):
    calls = []
    points = [
        Converter(
            "tape", lambda *arguments, **options: calls.append(("read", *arguments, options))
        ),
        Converter("to-tape", lambda data, output: calls.append(("write", len(data), output))),
        Converter("film", lambda source, output, *, overwrite=False: calls.append(("film",))),
        Converter("broken", ImportError("no tape drive")),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    return calls


def test_convert_reads_and_writes_by_format(store, converters, capsys):
    assert cli.main(["data", "convert", "tape:reel/7", "out"]) == 0
    assert cli.main(["data", "convert", str(store), "tape:mine/reel-v0"]) == 0
    assert cli.main(["data", "convert", "tape:reel/7", "out", "--overwrite"]) == 0
    options = ["--env", "Hopper-v5", "--keep-trailing"]
    assert cli.main(["data", "convert", "tape:reel/7", "out", *options]) == 0
    options = ["--demos", "10", "--demo-selection", "mail_legacy", "--align", "causal"]
    assert cli.main(["data", "convert", "tape:reel/7", "out", *options]) == 0
    assert converters.pop()[-1] == {
        "demos": 10,
        "demo_selection": "mail_legacy",
        "align": "causal",
    }
    assert cli.main(["data", "convert", "tape:reel/7", "out", "--demos", "0"]) == 0
    assert converters.pop()[-1] == {"demos": 0}  # for the conversion to refuse
    assert converters == [
        ("read", "reel/7", "out", {}),
        ("write", 3, "mine/reel-v0"),
        ("read", "reel/7", "out", {"overwrite": True}),
        ("read", "reel/7", "out", {"env": "Hopper-v5", "keep_trailing": True}),
    ]
    assert "wrote tape:mine/reel-v0" in capsys.readouterr().out
    assert cli.main(["data", "convert"]) == 0
    assert "to-tape" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tape:reel"], "Say where to write"),
        (["a", "b"], "exactly one side"),
        (["tape:a", "tape:b"], "exactly one side"),
        (["tap:a", "b"], r"Did you mean 'tape'\?"),
        (["a", "tape:b", "--overwrite"], "--overwrite replaces stores only"),
        (["a", "tape:b", "--env", "Hopper-v5"], "'to-tape' has no such option: .*'env'"),
        (["film:a", "b", "--keep-trailing"], "'film' has no such option: .*'keep_trailing'"),
        (["broken:a", "b"], "no tape drive"),
        (["C:\\data", "D:\\out"], "exactly one side"),
    ],
)
def test_convert_explains(converters, capsys, arguments, message):
    assert cli.main(["data", "convert", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert converters == []


def test_interruption(monkeypatch, capsys):
    def interrupt(command):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._RUN, cli.List, interrupt)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_goes_away_is_no_traceback():
    code = "import sys; from mail_agents import cli; sys.exit(cli.main(['list', '--json']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


@pytest.fixture
def quick_doctor(monkeypatch):
    """Examines two packages, one of them missing, and renders nothing."""
    packages = (
        doctor.Package("json", "numpy", "everything", "reinstall", core=True),
        doctor.Package("no_such_module", "no-such-distribution", "magic", "pip install magic"),
    )
    monkeypatch.setattr(doctor, "PACKAGES", packages)
    monkeypatch.setattr(doctor, "_RENDER", "raise SystemError('no OpenGL here')")


def test_doctor(quick_doctor, capsys, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert [row["ok"] for row in report["packages"]] == [True, False]
    assert report["packages"][1]["problem"] == "not installed"
    assert report["rendering"]["problems"] == {
        "egl": "SystemError: no OpenGL here",
        "osmesa": "SystemError: no OpenGL here",
    }
    assert {row["op"] for row in report["kernels"]} >= {"selective_scan", "causal_conv1d"}
    assert all(row["available"] or row["reason"] for row in report["kernels"])
    assert report["plugins"]["agents"] > 0


def test_doctor_prints_every_repair(quick_doctor, monkeypatch, capsys):
    report = doctor.run_doctor()
    report["plugins"]["problems"] = {"cool": "ImportError: no [cool]"}
    report["kernels"] = [
        {
            **{"op": "scan", "name": name, "available": not reason, "reason": reason},
            **{"versions": {"library": library}, "fix": fix, "auto": auto},
        }
        for name, reason, library, fix, auto in (
            ("cuda", "no GPU", None, "pip install kernels", []),
            ("native", "no compiler", None, "apt-get install g++", []),
            ("torch", "", "/cache/abc.so", "", ["cpu"]),
        )
    ]
    monkeypatch.setenv("MAIL_AGENTS_BACKEND", "torch")
    report["torch"].update(cuda_build=None, nvidia_smi="/usr/bin/nvidia-smi")
    doctor.print_report(report, Console(width=200))
    text = capsys.readouterr().out
    for wanted in (
        "pip install magic", "apt-get install libegl1", "worlds run without images",
        "plugin cool failed: ImportError: no [cool]", "reinstall torch", "the core works",
        "no compiler", "scan on a CPU:\n    apt-get install g++", "native kernels: /cache/abc.so",
        "scan on a GPU:\n    pip install kernels", "MAIL_AGENTS_BACKEND=torch is set",
    ):  # fmt: skip
        assert wanted in text, wanted
    report["torch"].update(cuda_build="13.0", cuda_available=False)
    report["rendering"].update(ok=True, backend="egl")
    report["ok"] = False
    doctor.print_report(report, Console(width=200))
    text = capsys.readouterr().out
    assert "no usable GPU" in text
    assert "works with MUJOCO_GL=egl" in text
    assert "the core is broken" in text
    report["torch"].update(cuda_available=True, devices=["A GPU"])
    doctor.print_report(report, Console(width=200))
    assert "CUDA 13.0 on A GPU" in capsys.readouterr().out


def test_doctor_fails_when_the_core_is_broken(monkeypatch, quick_doctor, capsys):
    broken = doctor.Package("no_such_module", "numpy", "everything", "reinstall", core=True)
    monkeypatch.setattr(doctor, "PACKAGES", (broken,))
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["packages"][0]["problem"].endswith("No module named 'no_such_module'")


def test_doctor_survives_what_it_examines(monkeypatch):
    assert doctor._run("import os; os.kill(os.getpid(), 11)") == "crashed with signal 11"
    assert doctor._run("print('fine')") == ""
    assert doctor._run("import sys; sys.exit(3)") == "exit status 3"
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.2)
    assert doctor._run("input(); import time; time.sleep(9)").startswith(("EOFError", "no answer"))


def test_every_package_the_doctor_knows_has_a_way_to_get_it():
    for package in doctor.PACKAGES:
        assert package.fix.startswith(("pip install", "apt-get install"))


def test_the_module_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mail_agents.cli", "data", "verify", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


def test_errors_of_ours_are_the_only_ones_caught(monkeypatch):
    def bug(command):
        raise RuntimeError("a bug must show its traceback")

    monkeypatch.setitem(cli._RUN, cli.List, bug)
    with pytest.raises(RuntimeError):
        cli.main(["list"])
    assert issubclass(InvalidInputError, ValueError)
