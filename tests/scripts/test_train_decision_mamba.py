"""scripts/train_decision_mamba.py at toy size: stages, self-evolution, both models."""

import re

import pytest
import torch
from toybox.world import make_dataset

import mail_agents
from mail_agents.checkpoint import last_checkpoint, load_checkpoint
from mail_agents.report.results import load_results
from mail_agents.training.runs import read_metrics

TINY = (
    *("--config.d-model", 8, "--config.layers", 1, "--config.history", 3),
    *("--config.max-timestep", 12, "--config.optim.batch-size", 8, "--device", "cpu"),
    *("--config.optim.warmup-steps", 2, "--log-every", 1, "--eval-episodes", 2),
    *("--config.self-evolution.steps-per-stage", 3, "--config.self-evolution.stages", 4),
)

#: The process dies in its ``at``-th update.
KILL = """
import os, signal
from mail_agents.agent import Agent
count, update = iter(range(1, 10**6)), Agent.apply_gradients
def deadly(self):
    if next(count) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self)
Agent.apply_gradients = deadly
"""


@pytest.fixture
def train(scripts, tmp_path):
    def run(*arguments, **options):
        return scripts.run(tmp_path, "train_decision_mamba", *arguments, **options)

    return run


def stage_lines(output):
    """``(stage, alpha, label shift)`` of every stage that was printed."""
    pattern = r"stage (\d+), loss [\d.]+(?:, alpha ([\d.]+), label shift ([\d.]+))?"
    return [(int(n), *(float(v) for v in rest if v)) for n, *rest in re.findall(pattern, output)]


def test_a_run_from_end_to_end(train, tmp_path, point_dataset):
    code, output = train(
        *(*TINY, "--dataset", point_dataset, "--stages", 5, "--eval-every", 2),
        *("--target-returns", -1, -5, "--output", "run"),
    )
    assert code == 0, output
    stages = stage_lines(output)
    assert [stage for stage, *_ in stages] == [1, 2, 3, 4, 5]
    assert [alpha for _, alpha, _ in stages] == [0.0, 0.425, 0.5, 0.5, 0.5]
    shifts = [shift for *_, shift in stages]
    assert shifts[0] == 0
    assert min(shifts[1:]) > 0
    # After stages 2 and 4, and after the last one.
    assert output.count("point, target -1: ") == output.count("point, target -5: ") == 3
    run = tmp_path / "run"
    assert sorted(p.name for p in (run / "eval").iterdir()) == [
        f"step-{step:08d}" for step in (6, 12, 15)
    ]
    rows = read_metrics(run)
    assert [row["alpha"] for row in rows[2:5]] == pytest.approx([0, 0.425, 0.425])
    assert all(row["label_shift"] > 0 for row in rows[3:])
    # The loss is that of the moved targets; the error to the recorded actions is beside it.
    assert rows[3]["action_error"] != pytest.approx(rows[3]["loss"])
    (result,) = load_results(run / "result.json")
    assert (result.agent, result.train_steps, result.target_return) == ("dm", 15, -1)
    assert set(result.evaluations) == {"last", "best"}
    assert list(result.targets) == ["-5"]
    agent = mail_agents.load(run, device="cpu")
    assert (agent.updates, agent.config.variant) == (15, "causal")

    code, output = train("--resume", "run", "--stages", 4)
    assert code == 1
    assert "has done 15 updates" in output


def test_the_plain_model_has_stages_without_self_evolution(train, tmp_path):
    source = {"kind": "d4rl-hdf5", "id": "walker2d-medium-v2"}
    data = make_dataset(tmp_path / "data", source=source)
    code, output = train(
        *("--agent", "decision-mamba", *TINY, "--dataset", data.path, "--stages", 2),
        *("--eval-episodes", 0, "--output", "run"),
    )
    assert code == 0, output
    assert stage_lines(output) == [(1,), (2,)]
    assert "settings of walker2d-medium-v2: return_scale 1000.0, optim.lr 0.0001" in output
    assert "targets 2500, 5000, 10000, 50000, 100000" in output
    config = mail_agents.load(tmp_path / "run", device="cpu").config
    assert (config.d_model, config.optim.lr, config.return_scale) == (8, 1e-4, 1000.0)
    assert "alpha" not in read_metrics(tmp_path / "run")[-1]


@pytest.mark.parametrize(
    "agent", [("dm",), ("decision-mamba", "--config.self-evolution.enabled")], ids=lambda a: a[0]
)
def test_killed_and_resumed_a_run_ends_in_the_same_bits(
    train, scripts, tmp_path, point_dataset, agent
):
    command = ("--agent", *agent, *TINY, "--dataset", point_dataset, "--stages", 4)
    command = (*command, "--eval-every", 1, "--eval-episodes", 1)
    code, output = train(*command, "--output", "whole")
    assert code == 0, output
    arguments = (*command, "--output", "killed")
    # In the first stage, and in stages with an earlier policy, which is in the checkpoint only.
    for at, done in ((2, None), (5, 3), (5, 6)):
        prelude = KILL.format(at=at)
        job = scripts.start(tmp_path, "train_decision_mamba", *arguments, prelude=prelude)
        assert job.wait() == -9, job.output
        last = tmp_path / "killed" / "checkpoints" / "last"
        assert (int(last.read_text()[len("step-") :]) if last.exists() else None) == done
        arguments = ("--resume", "killed")
    code, output = train(*arguments)
    assert code == 0, output
    assert [stage for stage, *_ in stage_lines(output)] == [3, 4]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in ("agent.safetensors", "metrics.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    states = [load_checkpoint(last_checkpoint(run), device="cpu")[1] for run in (whole, killed)]
    teachers = [state["agent"]["extra"]["teacher"] for state in states]
    assert teachers[0].keys() == teachers[1].keys()
    assert all(torch.equal(value, teachers[1][name]) for name, value in teachers[0].items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--agent", "dt"), "'dt' is no Decision Mamba; train it with scripts/train.py"),
        (("--agent", "bc"), "'bc' is no Decision Mamba"),
        (("--agent", "mail/d-ma-bc"), "'mail/d-ma-bc' is no Decision Mamba"),
        (("--stages", 0), "--stages"),
        (("--videos", -1), "starts at 0 (none); got -1"),
        ((*TINY, "--config.self-evolution.alpha-cap", 2), "alpha_cap"),
        ((*TINY, "--config.optim.lr", 1e30, "--stages", 9), "Lower --config.optim.lr"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(train, point_dataset, arguments, words):
    code, output = train(*arguments, "--dataset", point_dataset)
    assert code != 0
    assert words in output
    assert "Traceback" not in output


def test_the_leak_of_the_released_trunk_is_said(train, point_dataset):
    code, output = train(
        *("--agent", "dm-released", *TINY, "--dataset", point_dataset, "--stages", 1),
        *("--config.self-evolution.steps-per-stage", 1, "--eval-episodes", 1),
        "--config.self-evolution.enabled",
    )
    assert code == 0, output
    assert "shows the policy the actions it is trained to predict" in output
    # And that so short a run is no self-evolution.
    assert "note: Self-evolution never starts" in output
    assert "note: All 1 updates are warm-up" in output
