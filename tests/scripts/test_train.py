"""scripts/train.py at toy size, as a person would use it."""

import json

import numpy as np
import pytest
import torch
from toybox.world import demonstrations

import mail_agents
from mail_agents.data.store import write_dataset
from mail_agents.report.results import load_results
from mail_agents.training.runs import read_metrics

TINY = (
    *("--agent", "mail/d-ma-bc", "--config.decoder.layers", 1, "--config.decoder.d-state", 2),
    *("--config.width", 8, "--config.feature-width", 8, "--config.history", 2),
    *("--config.horizon", 2, "--config.optim.batch-size", 8, "--device", "cpu"),
)


@pytest.fixture
def train(scripts, tmp_path):
    def run(*arguments, **options):
        return scripts.run(tmp_path, "train", *arguments, **options)

    return run


def test_help_shows_the_flags_of_the_chosen_agent(train):
    code, output = train("--help")
    assert code == 0
    assert "--config.encoder.layers" in output
    assert "Optimiser updates" in output
    code, output = train("--agent", "mean-action", "--help")
    assert code == 0
    assert "--config.history" in output
    assert "--config.encoder" not in output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--agent", "mail/ed-ma-cb"), 1, ["error: Unknown agent id", "Did you mean"]),
        ((*TINY, "--config.widht", 4), 2, ["--config.width"]),
        ((*TINY, "--stepz", 4), 2, ["--steps"]),
        ((*TINY, "--config.width", "wide"), 2, ["wide"]),
        ((*TINY, "--config.history", 0), None, ["history"]),
        ((*TINY, "--dataset", "nowhere"), 1, ["error: ", "nowhere"]),
        (("--resume", "nowhere"), 1, ["Cannot resume nowhere", "arguments.json"]),
        ((*TINY, "--dataset", "{point}", "--validation", 1.5), 1, ["error: ", "1.5"]),
        ((*TINY, "--dataset", "{point}", "--device", "warp"), 1, ["error: ", "'warp'"]),
        (
            (*TINY, "--dataset", "{point}", "--target-returns", 1, 2),
            1,
            ["error: ", "'mail/d-ma-bc' does not use target returns"],
        ),
    ],
)
def test_mistakes_are_explained_without_a_traceback(train, point_dataset, arguments, code, words):
    found, output = train(*[str(a).format(point=point_dataset) for a in arguments])
    assert found == code if code is not None else found != 0
    for word in words:
        assert word in output
    assert "Traceback" not in output


def test_a_run_from_end_to_end(train, tmp_path, point_dataset):
    code, output = train(
        *TINY,
        *("--dataset", point_dataset, "--steps", 30, "--log-every", 5, "--save-every", 20),
        *("--eval-episodes", 3, "--eval-every", 10, "--eval-envs", 2, "--validation", 0.3),
        *("--videos", 1, "--seed", 3),
    )
    assert code == 0, output
    run = tmp_path / "runs" / "mail-d-ma-bc-s3"
    assert "of 6 episodes" in output  # of eight: two are held out
    assert output.count("point: ") == 3
    for name in ("agent.safetensors", "result.json", "metrics.jsonl"):
        assert str(run / name).removeprefix(str(tmp_path) + "/") in output
        assert (run / name).exists()
    assert list((run / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == [
        "step-00000020",
        "step-00000030",
    ]
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]
    assert all(np.isfinite([row["loss"], row["validation_loss"], row["lr"]]).all() for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]

    (result,) = load_results(run / "result.json")
    assert (result.agent, result.dataset, result.seed) == ("mail/d-ma-bc", "point", 3)
    assert (result.train_steps, result.parameters > 500) == (30, True)
    assert [point[0] for point in result.curve] == [5, 10, 15, 20, 25, 30]
    assert set(result.evaluations) == {"last", "best"}
    assert [task.task for task in result.evaluations["last"]] == ["point"]
    assert result.evaluations["last"][0].n == 3
    assert result.videos
    assert all(video.path.endswith(".mp4") for video in result.videos)

    agent = mail_agents.load(run, device="cpu")
    agent.reset()
    assert agent.act(np.zeros(4, np.float32)).shape == (2,)
    arguments = json.loads((run / "arguments.json").read_text())
    assert arguments["arguments"]["config"]["width"] == 8

    # The same command again must not touch what is there.
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    code, output = train(*TINY, "--dataset", point_dataset, "--seed", 3)
    assert code == 1
    assert "already holds a run" in output
    assert "--resume" in output
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }

    # Resuming keeps what decides the weights.
    changes = (("--config.width", 16), ("--seed", 4), ("--agent", "mail/d-tr-bc"))
    for change in (*changes, ("--eval-episodes", 0)):
        code, output = train("--resume", run, *change)
        assert code == 1, output
        assert "was started with" in output
        assert "Traceback" not in output
    # A finished run may go on for longer.
    code, output = train("--resume", run, "--steps", 35)
    assert code == 0, output
    assert mail_agents.load(run, device="cpu").updates == 35


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(train, tmp_path, point_dataset):
    # Dropout, which draws from the global stream, included.
    agent = ("--agent", "mail/d-tr-bc", "--config.decoder.layers", 1, "--config.width", 8)
    small = ("--config.optim.batch-size", 8, "--device", "cpu", "--eval-episodes", 0)
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, output = train(
            *(*agent, *small, "--dataset", point_dataset, "--steps", 4, "--log-every", 1),
            *("--output", tmp_path / name, "--seed", seed),
        )
        assert code == 0, output
        losses.append([row["loss"] for row in read_metrics(tmp_path / name)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    files = [(tmp_path / name / "agent.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_a_reference_agent_takes_statistics_only(train, tmp_path, point_dataset):
    code, output = train(
        *("--agent", "mean-action", "--dataset", point_dataset, "--output", tmp_path / "mean"),
        *("--eval-episodes", 2),
    )
    assert code == 0, output
    assert "0 parameters" in output
    (result,) = load_results(tmp_path / "mean" / "result.json")
    assert (result.parameters, result.train_steps, result.curve) == (0, 0, [])
    assert result.evaluations["last"][0].n == 2


SEQUENCE = """
import mail_agents
mail_agents.register(
    "toybox/sequence",
    entry_point="toybox.sequence:SequenceAgent",
    config_entry_point="toybox.sequence:SequenceConfig",
)
"""


def test_a_return_conditioned_agent_is_evaluated_at_every_target(
    train, scripts, tmp_path, point_dataset
):
    run = tmp_path / "run"
    code, output = train(
        *("--agent", "toybox/sequence", "--dataset", point_dataset, "--output", run),
        *("--steps", 4, "--eval-episodes", 2, "--eval-every", 2, "--device", "cpu"),
        *("--target-returns", -2, 1.5),
        prelude=SEQUENCE,
    )
    assert code == 0, output
    assert output.count("point, target -2: ") == output.count("point, target 1.5: ") == 2
    for step in (2, 4):
        further = run / "eval" / f"step-{step:08d}" / "point" / "target-1.5" / "episodes.jsonl"
        rows = [json.loads(line) for line in further.read_text().splitlines()]
        assert [row["target_return"] for row in rows] == [1.5, 1.5]
    (result,) = load_results(run / "result.json")
    assert [e["target_return"] for e in result.evaluations["last"][0].episodes] == [-2, -2]
    # A resumed run has the same targets.
    code, output = train("--resume", run, "--steps", 5, prelude=SEQUENCE)
    assert code == 0, output
    assert "point, target 1.5: " in output
    assert "targets -2, 1.5, on cpu" in output
    # So has an evaluation of the artifact that names none.
    code, output = scripts.run(
        *(tmp_path, "evaluate", "--agent", run, "--episodes", 1, "--device", "cpu"),
        prelude=SEQUENCE,
    )
    assert code == 0, output
    assert output.count("point, target -2: ") == output.count("point, target 1.5: ") == 1


#: Ctrl-C in the third update.
INTERRUPT = """
import os, signal
from mail_agents.agent import Agent
count, update = iter(range(1, 10**6)), Agent.apply_gradients
def interrupted(self):
    if next(count) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return update(self)
Agent.apply_gradients = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


def test_an_interrupted_run_says_how_to_go_on(train, scripts, tmp_path, point_dataset):
    short = ("--dataset", point_dataset, "--steps", 4, "--save-every", 1, "--eval-episodes", 0)
    code, output = train(*TINY, *short, "--output", "run", prelude=INTERRUPT)
    assert code == 130
    assert "Traceback" not in output
    assert "Interrupted. Continue with: python " in output
    assert output.rstrip().endswith("train.py --resume run")
    # Another script's run is no broken file.
    code, output = scripts.run(tmp_path, "train_mail", "--resume", "run")
    assert code == 1
    assert "started with train.py" in output
    assert "continue with scripts/train.py --resume run" in output
    code, output = train("--resume", "run")
    assert code == 0, output
    assert mail_agents.load(tmp_path / "run", device="cpu").updates == 4


def test_a_dataset_without_worlds_is_refused_before_training(train, tmp_path):
    write_dataset(tmp_path / "homeless", demonstrations(2), name="homeless")
    arguments = (
        *TINY,
        "--dataset",
        tmp_path / "homeless",
        "--steps",
        2,
        "--output",
        tmp_path / "r",
    )
    code, output = train(*arguments)
    assert code == 1
    assert "--eval-episodes 0" in output
    assert not (tmp_path / "r" / "arguments.json").exists()
    code, output = train(*arguments, "--eval-episodes", 0)
    assert code == 0, output


def test_resuming_on_other_data_is_refused(train, tmp_path):
    run = tmp_path / "run"
    write_dataset(tmp_path / "data", demonstrations(2), name="d")
    code, output = train(
        *(*TINY, "--dataset", tmp_path / "data", "--steps", 2, "--output", run),
        *("--eval-episodes", 0),
    )
    assert code == 0, output
    write_dataset(tmp_path / "data", demonstrations(3), name="d", overwrite=True)
    code, output = train("--resume", run, "--steps", 4)
    assert code == 1
    assert "another dataset" in output


def test_bfloat16_trains(train, tmp_path, point_dataset):
    code, output = train(
        *(*TINY, "--dataset", point_dataset, "--steps", 3, "--precision", "bfloat16"),
        *("--eval-episodes", 0, "--output", tmp_path / "run", "--log-every", 1),
    )
    assert code == 0, output
    agent = mail_agents.load(tmp_path / "run", device="cpu")
    assert all(p.dtype == torch.float32 for p in agent.policy.parameters())
