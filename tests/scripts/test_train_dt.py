"""scripts/train_dt.py at toy size: the published recipe, iteration by iteration."""

import json
import re

import pytest
from toybox.world import ENV_ID, demonstrations, make_dataset

import mail_agents
from mail_agents.checkpoint import last_checkpoint, load_checkpoint
from mail_agents.data.store import write_dataset
from mail_agents.report.results import load_results
from mail_agents.training.runs import read_metrics

TINY = (
    *("--config.d-model", 8, "--config.layers", 1, "--config.history", 3),
    *("--config.max-timestep", 12, "--config.optim.batch-size", 8, "--device", "cpu"),
    *("--config.optim.warmup-steps", 2, "--log-every", 1, "--eval-episodes", 2),
)

#: The process dies in the ``at``-th call of a method of the agent.
KILL = """
import os, signal
from mail_agents.agent import Agent
count, method = iter(range(1, 10**6)), Agent.{method}
def deadly(self, *arguments, **options):
    if next(count) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(self, *arguments, **options)
Agent.{method} = deadly
"""


@pytest.fixture
def train(scripts, tmp_path):
    def run(*arguments, **options):
        return scripts.run(tmp_path, "train_dt", *arguments, **options)

    return run


def test_a_run_from_end_to_end(train, tmp_path):
    data = make_dataset(tmp_path / "data", reference_scores={"point": {"min": -20, "max": 0}})
    code, output = train(
        *(*TINY, "--dataset", data.path, "--iterations", 2, "--updates", 3, "--output", "run"),
        *("--target-returns", -1, -5, "--videos", 1),
    )
    assert code == 0, output
    assert "29 windows of 3 steps, targets -1, -5, on cpu" in output
    assert "iteration 2, 6 updates, loss" in output
    assert output.count("point, target -1: ") == output.count("point, target -5: ") == 2
    assert output.count("point: normalised score") == 1
    run = tmp_path / "run"
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    (result,) = load_results(run / "result.json")
    assert (result.agent, result.train_steps, result.target_return) == ("dt", 6, -1)
    assert set(result.evaluations) == {"last", "best"}
    assert [e["target_return"] for e in result.evaluations["last"][0].episodes] == [-1, -1]
    assert [e["target_return"] for e in result.targets["-5"][0].episodes] == [-5, -5]
    assert result.videos
    agent = mail_agents.load(run, device="cpu")
    assert agent.updates == 6
    assert agent.resolve_target(None) == pytest.approx(data.episode_returns.max())

    # The length of an iteration is part of the run; their number may grow, not shrink.
    code, output = train("--resume", "run", "--updates", 2)
    assert code == 1
    assert "was started with updates=3" in output
    code, output = train("--resume", "run", "--iterations", 1)
    assert code == 1
    assert "has done 6 updates already, more than the 3" in output
    code, output = train("--resume", "run", "--iterations", 3)
    assert code == 0, output
    assert "iteration 3, 9 updates" in output
    assert "iteration 2" not in output
    assert output.count("point, target -5: ") == 1


def outcome(run):
    """Everything that must be the same, whatever happened on the way."""
    _, state = load_checkpoint(last_checkpoint(run), device="cpu")
    episodes = {}
    for path in run.rglob("episodes.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        episodes[path.parent.parent.name] = [row["episode_return"] for row in rows]
    return {
        "artifact": (run / "agent.safetensors").read_bytes(),
        "metrics": (run / "metrics.jsonl").read_text(),
        "sampler": state["loop"]["sampler"],
        "episodes": episodes,
    }


def test_killed_and_resumed_a_run_ends_in_the_same_bits(train, scripts, tmp_path, point_dataset):
    command = (*TINY, "--dataset", point_dataset, "--iterations", 4, "--updates", 5)
    code, output = train(*command, "--output", "whole")
    assert code == 0, output
    arguments = (*command, "--output", "killed")
    for method, at, done in (
        ("apply_gradients", 3, None),
        ("act", 5, None),  # an evaluation has 12 steps: in the first one
        ("apply_gradients", 8, 5),
        ("act", 15, 10),
        ("act", 20, 20),  # in the last one
    ):
        prelude = KILL.format(method=method, at=at)
        job = scripts.start(tmp_path, "train_dt", *arguments, prelude=prelude)
        assert job.wait() == -9, job.output
        last = tmp_path / "killed" / "checkpoints" / "last"
        assert (int(last.read_text()[len("step-") :]) if last.exists() else None) == done
        arguments = ("--resume", "killed")
    code, output = train(*arguments)
    assert code == 0, output
    found, expected = (outcome(tmp_path / name) for name in ("killed", "whole"))
    assert sorted(expected["episodes"]) == [f"step-{step:08d}" for step in (5, 10, 15, 20)]
    for name, value in expected.items():
        assert found[name] == value, name


def test_data_that_d4rl_published_sets_the_agent_up(train, tmp_path):
    source = {"kind": "d4rl-hdf5", "id": "hopper-medium-v2"}
    data = make_dataset(tmp_path / "data", source=source)
    command = ("--dataset", data.path, "--iterations", 1, "--updates", 1, *TINY)
    code, output = train(*command, "--output", "run")
    assert code == 0, output
    assert "published settings of hopper-medium-v2: return_scale 1000.0" in output
    assert output.count("point, target 3600: ") == output.count("point, target 1800: ") == 1
    agent = mail_agents.load(tmp_path / "run", device="cpu")
    assert (agent.config.return_scale, float(agent.policy.return_scale)) == (1000.0, 1000.0)
    assert (agent.config.history, agent.config.max_timestep) == (3, 12)  # as the flags say
    # The arguments keep what was typed, so a resumed run is set up in the same way.
    stored = json.loads((tmp_path / "run" / "arguments.json").read_text())["arguments"]
    assert stored["config"]["return_scale"] is None

    changed = ("--config.return-scale", 50, "--target-returns", -3, "--agent", "dt-corl")
    code, output = train(*command, *changed, "--output", "changed")
    assert code == 0, output
    assert "published settings" not in output
    assert "point, target 3600" not in output
    assert mail_agents.load(tmp_path / "changed", device="cpu").config.return_scale == 50.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--agent", "bc"), "'bc' is no Decision Transformer; train it with scripts/train.py"),
        (("--agent", "dm"), "'dm' is no Decision Transformer"),
        (("--agent", "dtt"), "Did you mean"),
        (("--updates", 0), "--updates"),
        (("--eval-episodes", -1), "starts at 0 (none); got -1"),
        ((*TINY, "--config.max-timestep", 3), "--config.max-timestep"),
        ((*TINY, "--target-returns", 1, 1), "Target returns must"),
        ((*TINY, "--config.optim.lr", 1e30, "--updates", 50), "Lower --config.optim.lr"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(train, point_dataset, arguments, words):
    code, output = train(*arguments, "--dataset", point_dataset)
    assert code == 1, output
    assert words in output
    assert "Traceback" not in output


def test_a_world_with_longer_episodes_is_refused_before_training(train, tmp_path, point_dataset):
    data = write_dataset(
        tmp_path / "data",
        demonstrations(2),
        name="d",
        features=mail_agents.open_dataset(point_dataset).features,
        env_specs={"point": {"id": ENV_ID, "kwargs": {}, "max_episode_steps": 12}},
    )
    assert data.lengths.max() < 11
    command = (*TINY, "--dataset", data.path, "--iterations", 1, "--updates", 1, "--output", "run")
    code, output = train(*command, "--config.max-timestep", 11)
    assert code == 1
    assert "Episodes of task 'point' may have 12 steps" in output
    assert "--config.max-timestep" in output
    assert not (tmp_path / "run").exists()
    code, output = train(*command, "--config.max-timestep", 12)
    assert code == 0, output
    assert re.search(r"3 steps, target -\d\S* \(the agent's choice\), on cpu", output)
    # Where nothing is evaluated, the data's own episodes are all that counts.
    longer = ("--config.max-timestep", 11, "--eval-episodes", 0, "--output", "data-only")
    code, output = train(*command, *longer)
    assert code == 0, output


def test_a_world_that_cannot_be_made_is_known_before_training(train, tmp_path, point_dataset):
    data = write_dataset(
        tmp_path / "data",
        demonstrations(2),
        name="d",
        features=mail_agents.open_dataset(point_dataset).features,
        env_specs={"point": {"id": ENV_ID, "kwargs": {"colour": "red"}}},
    )
    command = (*TINY, "--dataset", data.path, "--iterations", 1, "--updates", 1, "--output", "run")
    code, output = train(*command)
    assert code == 1
    assert "of task 'point' cannot be made here: TypeError" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_the_length_of_a_cosine_schedule_cannot_change(train, point_dataset):
    command = (*TINY, "--iterations", 1, "--updates", 1, "--eval-episodes", 0, "--output", "run")
    code, output = train(*command, "--dataset", point_dataset, "--config.optim.schedule", "cosine")
    assert code == 0, output
    code, output = train("--resume", "run", "--iterations", 2)
    assert code == 1
    assert "was started with iterations=1" in output
