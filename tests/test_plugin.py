"""A stranger's package, installed by pip, works everywhere without a change in ours."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from mail_agents.report.results import load_results


@pytest.fixture(scope="module")
def installed(tmp_path_factory, repository):
    """Builds and installs ``tests/third_party`` into a folder of its own."""
    source = tmp_path_factory.mktemp("source") / "toybox-agents"
    shutil.copytree(repository / "tests" / "third_party", source)
    target = tmp_path_factory.mktemp("site-packages")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
            *("--no-build-isolation", "--disable-pip-version-check", "--target", target, source),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named pip" in done.stderr:
        pytest.skip("needs pip in the environment")
    assert done.returncode == 0, done.stderr
    assert (target / "toybox_agents-1.0.dist-info" / "entry_points.txt").exists()
    return target


@pytest.fixture
def run(scripts, tmp_path, installed):
    def call(name, *arguments):
        code, output = scripts.run(tmp_path, name, *arguments, path=[installed])
        assert code == 0, output
        return output

    return call


ASK = """
import json, sys
import mail_agents
before = "toybox" in sys.modules
ids = mail_agents.list_agents("toybox/*")
listed = "toybox.agent" in sys.modules or "torch" in sys.modules
report = mail_agents.check_agent("toybox/mlp-v1")
print(json.dumps({"before": before, "ids": ids, "listed": listed, "ok": report.ok,
                  "report": str(report), "file": sys.modules["toybox"].__file__}))
"""


def test_discovered_lazily_and_conforming(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["before"] is False
    assert answer["ids"] == ["toybox/mlp-v1"]
    assert answer["listed"] is False  # names only: neither its agent nor torch was imported
    assert answer["file"].startswith(str(installed))
    assert answer["ok"], answer["report"]
    assert "pass" in answer["report"]


def test_train_evaluate_and_compare(run, tmp_path, point_dataset):
    agent = tmp_path / "mlp"
    output = run(
        *("train", "--agent", "toybox/mlp-v1", "--config.width", 16, "--dataset", point_dataset),
        *("--steps", 300, "--config.optim.lr", 0.01, "--output", agent, "--eval-episodes", 0),
        *("--device", "cpu"),
    )
    assert "toybox/mlp-v1: " in output

    output = run("evaluate", "--agent", agent, "--episodes", 10, "--device", "cpu", "--as-json")
    trained = json.loads(output)["point"]
    output = run(
        *("evaluate", "--agent", "random", "--env", "toybox:toybox/Point-v0", "--episodes", 10),
        *("--as-json", "--device", "cpu"),
    )
    blind = json.loads(output)["Point-v0"]
    # It is not only run: it has learned from the demonstrations.
    assert trained["success_rate"] >= blind["success_rate"] + 0.3

    output = run(
        *("compare", "--agents", "toybox/mlp-v1,width=16", "mean-action", "--steps", 20),
        *("--datasets", point_dataset, "--eval-episodes", 2, "--output", tmp_path / "compared"),
        *("--device", "cpu", "--workers", 1),
    )
    assert "finished toybox/mlp-v1 point s0" in output
    results = load_results(tmp_path / "compared" / "results.json")
    assert [result.agent for result in results] == ["toybox/mlp-v1", "mean-action"]
    assert results[0].config["width"] == 16
    assert (tmp_path / "compared" / "report.html").exists()
