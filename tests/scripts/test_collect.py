"""scripts/collect.py: the same dataset for any number of workers and after any interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec

from mail_agents.data.store import open_dataset

pytest.importorskip("metaworld", reason="metaworld is not installed (extra 'sim')")

TASKS = ["--tasks", "reach-v3", "drawer-close-v3", "--episodes", "3"]


@pytest.fixture
def command(repository: Path) -> list[str]:
    return [sys.executable, str(repository / "scripts" / "collect.py")]


@pytest.fixture
def environment(repository: Path) -> dict[str, str]:
    roots = [str(repository), *(str(repository / name) for name in ("envs", "wrappers"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}


def group_ends(group: int, patience: float = 20.0) -> bool:
    """Waits until no process of a group is left."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def collect(command: list[str], environment: dict[str, str], *args: str) -> str:
    result = subprocess.run(
        [*command, *args], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_collects_and_refuses_to_overwrite(
    command: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "demo"
    printed = collect(command, environment, *TASKS, "--output", str(path), "--noise-std", "0.1")
    assert str(path) in printed
    assert "drawer-close-v3" in printed
    assert printed.startswith("Making 2 environments")
    assert "100%" in printed
    dataset = open_dataset(path)
    assert all("success_hold" not in s["kwargs"] for s in dataset.info.env_specs.values())
    assert dataset.info.source["env_kwargs"]["success_hold"] == 10
    dataset = open_dataset(path, verify=True)
    assert dataset.info.tasks == ("reach-v3", "drawer-close-v3")
    assert dataset.info.n_episodes == 6
    assert dataset.info.source["noise_std"] == 0.1
    assert all(dataset.episode(i).success for i in range(6))
    assert dataset.features.action.low == (-1.0,) * 4
    spec = dataset.info.env_specs["drawer-close-v3"]
    assert spec["id"] == "mail_envs:metaworld/drawer-close-v3"
    env = gymnasium.make(EnvSpec(**{k: spec[k] for k in ("id", "entry_point", "kwargs")}))
    first = dataset.episode(3)
    assert (env.reset(seed=first.seed)[0]["state"] == first.observations["state"][0]).all()

    result = subprocess.run(
        [*command, *TASKS, "--output", str(path)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "--overwrite" in result.stderr


def test_workers_and_kills_do_not_change_the_data(
    command: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    settings = ["--tasks", "reach-v3", "--episodes", "30", "--noise-std", "0.1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    collect(command, environment, *settings, "--output", str(whole), "--workers", "2")

    partial = tmp_path / ".broken.partial" / "journal.jsonl"
    process = subprocess.Popen(
        [*command, *settings, "--output", str(broken), "--workers", "2"],
        env=environment,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (partial.is_file() and partial.read_bytes().count(b"\n") > 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert group_ends(process.pid), "workers outlived their parent"
    assert not broken.exists()
    kept = partial.read_bytes().count(b"\n") - 1
    assert 3 <= kept < 30, "killed too late to test anything"

    collect(command, environment, *settings, "--output", str(broken))
    assert open_dataset(broken).info.sha256 == open_dataset(whole).info.sha256


def test_ctrl_c_leaves_no_process_and_no_traceback(
    command: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    settings = ["--tasks", "*", "--episodes", "500", "--workers", "2"]
    process = subprocess.Popen(
        [*command, *settings, "--output", str(tmp_path / "big")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background of a shell ignores Ctrl-C, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    journal = tmp_path / ".big.partial" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.is_file() and journal.read_bytes().count(b"\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "again to continue" in stdout
    assert stderr == ""
    assert group_ends(process.pid)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "reach-v2"], "Did you mean 'reach-v3'"),
        (["--tasks", "reach-v3", "--cameras", "corner_2"], "Did you mean 'corner2'"),
        (["--tasks", "reach-v3", "--episodes", "0"], "at least 1"),
        (["--tasks", "reach-v3", "--workers", "0"], "at least 1"),
        (["--tasks", "libero_objects/*"], "Did you mean 'libero_object'"),
        (["--tasks", "reach-v3", "--env-kwargs", "initial", "stored"], "states of the evaluation"),
        (["--tasks", "reach-v3", "--env-kwargs", "success_hold", "0"], "--success-hold"),
        (["--tasks", "reach-v3", "--env-kwargs", "goal_state", "true"], "'goal_state'"),
    ],
)
def test_mistakes_are_explained(
    command: list[str],
    environment: dict[str, str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    result = subprocess.run(
        [*command, *arguments, "--output", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()


def test_worlds_that_look_different_do_not_mix(
    command: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("robosuite", reason="robosuite is not installed (extra 'robosuite')")
    result = subprocess.run(
        [*command, "--tasks", "reach-v3", "robosuite/Lift", "--output", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 1
    assert "different datasets" in result.stderr
    assert not (tmp_path / "x").exists()


def test_collects_libero(
    command: list[str], environment: dict[str, str], libero_assets: Path, tmp_path: Path
) -> None:
    environment["MAIL_AGENTS_LIBERO_ASSETS"] = str(libero_assets)
    task = "pick_up_the_ketchup_and_place_it_in_the_basket"
    settings = ["--tasks", f"libero_object/{task}", "--episodes", "1", "--noise-std", "0.1"]
    more = ["--env-kwargs", "goal_state", "true", "--output", str(tmp_path / "demo")]
    assert task[:20] in collect(command, environment, *settings, *more)
    dataset = open_dataset(tmp_path / "demo")
    assert dataset.info.tasks == (task,)
    assert dataset.info.source["env_kwargs"]["initial"] == "sampled"
    spec = dataset.info.env_specs[task]
    assert spec["id"] == f"mail_envs:libero_object/{task}"
    assert "initial" not in spec["kwargs"]
    assert "success_hold" not in spec["kwargs"]
    assert spec["kwargs"]["goal_state"] is True
    episode = dataset.episode(0)
    assert episode.success
    assert episode.observations["goal_state"].shape == (len(episode) + 1, 28)
