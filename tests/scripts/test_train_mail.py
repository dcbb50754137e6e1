"""scripts/train_mail.py at toy size: the paper's recipe, epoch by epoch."""

import json

import pytest

import mail_agents
from mail_agents.report.results import load_results
from mail_agents.training.runs import read_metrics

TINY = (
    *("--agent", "mail/d-ma-ddpm", "--config.decoder.layers", 1, "--config.decoder.d-state", 2),
    *("--config.width", 8, "--config.feature-width", 8, "--config.history", 2),
    *("--config.horizon", 2, "--config.optim.batch-size", 8, "--device", "cpu"),
    *("--demos", 2, "--epochs", 3, "--eval-epochs", 1, "--eval-episodes", 2),
)


@pytest.fixture
def train(scripts, tmp_path):
    def run(*arguments, **options):
        return scripts.run(tmp_path, "train_mail", *arguments, **options)

    return run


def test_a_run_from_end_to_end_and_again_from_a_checkpoint(train, tmp_path, point_dataset):
    code, output = train(*TINY, "--dataset", point_dataset, "--output", "run")
    assert code == 0, output
    dataset = mail_agents.open_dataset(point_dataset)
    assert f"{2 * len(dataset.info.tasks)} demonstrations" in output
    assert "suite score" in output
    run = tmp_path / "run"
    rows = read_metrics(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    (result,) = load_results(run / "result.json")
    assert set(result.evaluations) == {"last", "best"}
    assert result.train_steps == rows[-1]["step"]
    agent = mail_agents.load(run / "agent.safetensors")
    assert agent.updates == rows[-1]["step"]
    assert agent.ema is not None

    artifact, metrics = (
        (run / "agent.safetensors").read_bytes(),
        (run / "metrics.jsonl").read_text(),
    )
    (run / "agent.safetensors").unlink()
    last = run / "checkpoints" / "last"
    assert last.read_text().strip() == f"step-{rows[2]['step']:08d}"
    last.write_text(f"step-{rows[1]['step']:08d}\n")
    code, output = train("--resume", "run")
    assert code == 0, output
    assert (run / "agent.safetensors").read_bytes() == artifact
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == [
        row["step"] for row in read_metrics(run)
    ]


def test_demos_are_chosen_per_task(load_script, point_dataset):
    script = load_script("train_mail")
    dataset = mail_agents.open_dataset(point_dataset)
    args = script.Args(dataset=str(point_dataset), demos=1)
    chosen = script.select_episodes(dataset, args)
    assert sorted(dataset.task_ids[chosen]) == list(range(len(dataset.info.tasks)))
    everything = script.select_episodes(dataset, script.Args(demos=None))
    assert everything == list(range(len(dataset)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--agent", "random"), "is no MaIL agent; train it with scripts/train.py"),
        ((*TINY, "--demos", 99), "--demos asks for 99"),
        ((*TINY, "--dataset", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(train, point_dataset, arguments, words):
    if "--dataset" not in arguments:
        arguments = (*arguments, "--dataset", point_dataset)
    code, output = train(*arguments)
    assert code == 1
    assert words in output
    assert "Traceback" not in output
