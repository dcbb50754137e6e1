"""The train scripts in two processes, as torchrun starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import mail_agents
from mail_agents.report.results import load_results
from mail_agents.training.runs import read_metrics

TINY = (
    *("--config.decoder.layers", 1, "--config.decoder.d-state", 2, "--config.width", 8),
    *("--config.feature-width", 8, "--config.history", 2, "--config.horizon", 2),
    *("--config.optim.batch-size", 8, "--device", "cpu"),
)
MAIL = (*TINY, "--demos", 2, "--epochs", 3, "--eval-epochs", 1, "--eval-episodes", 2)


@pytest.fixture
def team(scripts, tmp_path):
    """Starts a script in two processes that know of each other."""

    def start(name, *arguments):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        return [
            scripts.start(
                tmp_path,
                name,
                *arguments,
                environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]

    return start


def finish(jobs):
    return [job.wait() for job in jobs], [job.output for job in jobs]


def curve(run):
    return [row["loss"] for row in read_metrics(run)]


def test_a_run_in_two_processes_is_that_of_one_and_resumes_exactly(
    team, scripts, tmp_path, point_dataset
):
    lengths = np.cumsum(mail_agents.open_dataset(point_dataset).lengths)
    demos = int(np.flatnonzero(lengths % 2)[-1]) + 1  # the last batch does not split evenly
    arguments = ("--agent", "mail/d-ma-bc", *MAIL, "--dataset", point_dataset, "--demos", demos)
    codes, (lead, other) = finish(team("train_mail", *arguments, "--output", "two"))
    assert codes == [0, 0], lead + other
    assert "on 2 x cpu" in lead
    assert "suite score" in lead
    assert other == ""
    (result,) = load_results(tmp_path / "two" / "result.json")
    assert set(result.evaluations) == {"last", "best"}
    code, output = scripts.run(tmp_path, "train_mail", *arguments, "--output", "one")
    assert code == 0, output
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)

    run = tmp_path / "two"
    artifact, losses = (run / "agent.safetensors").read_bytes(), curve(run)
    (run / "agent.safetensors").unlink()
    steps = [row["step"] for row in read_metrics(run)]
    (run / "checkpoints" / "last").write_text(f"step-{steps[1]:08d}\n")
    codes, outputs = finish(team("train_mail", "--resume", "two"))
    assert codes == [0, 0], outputs
    assert (run / "agent.safetensors").read_bytes() == artifact
    assert curve(run) == losses


def test_noise_and_dropout_resume_exactly_too(team, tmp_path, point_dataset):
    arguments = ("--agent", "mail/d-tr-ddpm", *TINY, "--dataset", point_dataset, "--steps", 4)
    arguments = (*arguments, "--save-every", 2, "--log-every", 1, "--eval-episodes", 0)
    # The first process alone computes the validation loss, and the other must not be waited for.
    arguments = (*arguments, "--validation", 0.3)
    codes, outputs = finish(team("train", *arguments, "--output", "run"))
    assert codes == [0, 0], outputs
    run = tmp_path / "run"
    artifact = (run / "agent.safetensors").read_bytes()
    (run / "checkpoints" / "last").write_text("step-00000002\n")
    codes, outputs = finish(team("train", "--resume", "run"))
    assert codes == [0, 0], outputs
    assert (run / "agent.safetensors").read_bytes() == artifact
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("train", ("--resume", "{alone}"), "in 1 process(es), not 2"),
        ("train_mail", ("--dataset", "nowhere"), "nowhere"),
        ("train_mail", ("--agent", "mail/ed-ma-cb"), "Did you mean"),
        ("train", ("--dataset", "{point}", *TINY, "--output", "{taken}"), "already holds a run"),
        ("train", ("--dataset", "{point}", *TINY, "--config.optim.batch-size", 7), "evenly over 2"),
        ("train_dt", (), "train_dt.py works in one process, and torchrun started 2"),
    ],
)
def test_all_processes_end_with_one_message(team, tmp_path, point_dataset, name, arguments, words):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "arguments.json").write_text("{}")
    alone = tmp_path / "alone"
    alone.mkdir()
    stored = {"agent": "mail/d-ma-bc", "config": {}}
    written = {"script": "train.py", "arguments": stored, "processes": 1}
    (alone / "arguments.json").write_text(json.dumps(written))
    places = {"point": point_dataset, "taken": taken, "alone": alone}
    given = [str(each).format(**places) for each in arguments]
    began = time.monotonic()
    codes, outputs = finish(team(name, *given))
    assert time.monotonic() - began < 60
    assert all(code == 1 for code in codes), outputs
    assert "".join(outputs).count("error: ") == 1
    assert words in "".join(outputs)
    assert "Traceback" not in "".join(outputs)


def test_a_run_of_two_processes_cannot_be_continued_by_one(scripts, tmp_path):
    written = {"script": "train.py", "arguments": {"agent": "mail/d-ma-bc", "config": {}}}
    (tmp_path / "arguments.json").write_text(json.dumps({**written, "processes": 2}))
    code, output = scripts.run(tmp_path, "train", "--resume", tmp_path)
    assert code == 1
    assert "was started in 2 process(es), not 1" in output
    assert "torchrun" in output


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK=, MASTER_PORT=, MASTER_ADDR= cannot be used"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many, RANK="),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "RANK=2 cannot be used",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "99999"},
            "did not meet at 192.0.2.1:99999",
        ),
    ],
)
def test_what_torchrun_sets_must_be_complete(scripts, tmp_path, given, words):
    everything = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "")
    code, output = scripts.run(tmp_path, "train", environment={**everything, **given})
    assert code == 1
    assert words in output
    assert "WORLD_SIZE" in output
    assert "Traceback" not in output


def test_a_mistake_in_a_flag_is_shown_once(team):
    codes, outputs = finish(team("train", "--bogus"))
    assert codes == [2, 2]
    assert "Unrecognized options: --bogus" in outputs[0]
    assert outputs[1] == ""


def test_when_a_process_is_killed_the_other_ends_and_says_so(team, tmp_path, point_dataset):
    arguments = (*TINY, "--agent", "mail/d-ma-bc", "--dataset", point_dataset)
    arguments = (*arguments, "--steps", 10**6, "--eval-episodes", 0, "--output", "run")
    lead, other = team("train", *arguments)
    deadline = time.monotonic() + 60
    while not read_metrics(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.05)
    other.kill()
    assert other.wait() == -9
    assert lead.wait() == 1, lead.output
    assert "cannot be reached" in lead.output
    assert "--resume" in lead.output
    assert "Traceback" not in lead.output


def test_torchrun_starts_it(tmp_path, point_dataset, repository):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(repository / "scripts" / "train.py")]
    arguments = (*TINY, "--agent", "mail/d-ma-bc", "--steps", 2, "--eval-episodes", 1)
    arguments = (*arguments, "--dataset", point_dataset, "--output", "run")
    paths = [repository, *(repository / f for f in ("envs", "wrappers", "baselines"))]
    paths.append(repository / "tests" / "third_party")
    with subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun and what it has started
            raise
    assert process.returncode == 0, output
    assert output.count("on 2 x cpu") == 1
    run = tmp_path / "run"
    assert (run / "result.json").exists()
    assert "torchrun --nproc-per-node 2" in (run / "arguments.json").read_text()
