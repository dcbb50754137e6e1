"""Runs that are really killed, disks that are full, files that are damaged: through the scripts."""

import json
import random
import time

import pytest
import torch

from mail_agents.checkpoint import last_checkpoint, load_agent, load_checkpoint
from mail_agents.data.files import take_lock

BC = (
    *("--agent", "mail/d-ma-bc", "--config.decoder.layers", 1, "--config.decoder.d-state", 2),
    *("--config.width", 8, "--config.feature-width", 8),
    *("--config.history", 2, "--config.horizon", 2, "--config.optim.batch-size", 8),
)
# Dropout, diffusion noise, an average and a schedule: everything that a resume can get wrong.
DDPM = (
    *("--agent", "mail/ed-tr-ddpm", "--config.encoder.layers", 1, "--config.decoder.layers", 1),
    *("--config.width", 8, "--config.feature-width", 8, "--config.diffusion-steps", 2),
    *("--config.history", 2, "--config.horizon", 2, "--config.optim.batch-size", 8),
    *("--config.optim.schedule", "cosine", "--config.optim.warmup-steps", 3),
)
QUIET = ("--eval-episodes", 0, "--log-every", 1, "--device", "cpu")


class Training:
    """One run directory, and how to start or continue it."""

    def __init__(self, scripts, directory, dataset, agent, *arguments):
        self.scripts, self.directory = scripts, directory
        self.run = directory / "run"
        directory.mkdir(exist_ok=True)
        self.fresh = (*agent, "--dataset", dataset, "--output", self.run, *QUIET, *arguments)

    def command(self):
        """What a person would type: the same command, or --resume once there is a run."""
        started = (self.run / "arguments.json").exists()
        return ("--resume", self.run) if started else self.fresh

    def start(self, **options):
        return self.scripts.start(self.directory, "train", *self.command(), **options)

    def finish(self):
        code, output = self.scripts.run(self.directory, "train", *self.command())
        assert code == 0, output
        return self.outcome()

    def outcome(self):
        """Everything that must be the same, whatever happened on the way."""
        _, state = load_checkpoint(last_checkpoint(self.run), device="cpu")
        state["loop"].pop("seconds")
        return (
            (self.run / "agent.safetensors").read_bytes(),
            (self.run / "metrics.jsonl").read_text(),
            state,
        )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_equal_runs(outcome, expected, steps):
    assert outcome[0] == expected[0], "the artifacts differ"
    assert outcome[1] == expected[1], "the logged losses differ"
    assert same(outcome[2], expected[2]), "optimiser, average, random streams or sampler differ"
    logged = [json.loads(line)["step"] for line in outcome[1].splitlines()]
    assert logged == list(range(1, steps + 1))


@pytest.mark.parametrize("agent", [BC, DDPM], ids=["bc", "ddpm"])
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(
    scripts, tmp_path, point_dataset, agent
):
    steps = 60
    arguments = (agent, "--steps", steps, "--save-every", 7)
    expected = Training(scripts, tmp_path / "whole", point_dataset, *arguments).finish()
    killed = Training(scripts, tmp_path / "killed", point_dataset, *arguments)
    rng, kills = random.Random(str(agent)), 0
    metrics = killed.run / "metrics.jsonl"
    for _ in range(5):
        job = killed.start()
        # At a random logged step, so that slow and fast machines are hit alike.
        target = (metrics.read_bytes().count(b"\n") if metrics.exists() else 0) + rng.randint(1, 16)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= target:
                break
            if (killed.run / "result.json").exists():
                break
        time.sleep(rng.random() * 0.01)
        job.kill()
        kills += job.wait() == -9
    assert kills >= 2
    assert_equal_runs(killed.finish(), expected, steps)


KILL_AT = """
import os, shutil, signal
count = iter(range(10**6))
def deadly(function):
    def call(*arguments, **options):
        if next(count) == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree")):
    setattr(module, name, deadly(getattr(module, name)))
"""


def test_killed_before_every_file_operation_a_run_ends_in_the_same_bits(
    scripts, tmp_path, point_dataset
):
    """Process k dies before its k-th flush, rename or removal; the next one continues."""
    steps = 60
    arguments = (DDPM, "--steps", steps, "--save-every", 2)
    expected = Training(scripts, tmp_path / "whole", point_dataset, *arguments).finish()
    killed = Training(scripts, tmp_path / "killed", point_dataset, *arguments)
    loadable = 0
    for at in range(24):
        job = killed.start(prelude=KILL_AT.format(at=at))
        assert job.wait() == -9, job.output
        if (killed.run / "checkpoints" / "last").exists():
            load_checkpoint(last_checkpoint(killed.run), device="cpu")
            loadable += 1
    assert loadable >= 10
    assert_equal_runs(killed.finish(), expected, steps)
    leftovers = [p.name for p in killed.run.rglob("*.tmp")]
    assert leftovers == []


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


@pytest.mark.parametrize(("size", "named"), [(8000, "checkpoints"), (900, "metrics.jsonl")])
def test_a_full_disk_keeps_the_previous_checkpoint(scripts, tmp_path, point_dataset, size, named):
    steps = 20
    arguments = (BC, "--save-every", 10, "--steps", steps)
    expected = Training(scripts, tmp_path / "whole", point_dataset, *arguments).finish()
    full = Training(scripts, tmp_path / "full", point_dataset, *arguments)
    job = full.start(prelude=KILL_AT.format(at=18))  # in the second checkpoint
    assert job.wait() == -9
    before = last_checkpoint(full.run)
    code, output = scripts.run(
        tmp_path, "train", "--resume", full.run, prelude=LIMIT.format(size=size)
    )
    assert code == 1
    assert "error: Cannot write" in output
    assert named in output
    assert "File too large" in output
    assert "--resume" in output
    assert "Traceback" not in output
    assert last_checkpoint(full.run) == before
    assert load_agent(before, device="cpu").updates == 10
    assert_equal_runs(full.finish(), expected, steps)


def test_a_damaged_checkpoint_names_the_way_out(scripts, tmp_path, point_dataset):
    arguments = (BC, "--save-every", 5, "--steps", 10)
    training = Training(scripts, tmp_path / "a", point_dataset, *arguments)
    expected = training.finish()
    state = last_checkpoint(training.run) / "train_state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    code, output = scripts.run(tmp_path, "train", "--resume", training.run)
    assert code == 1
    assert f"{state} is truncated" in output
    pointer = training.run / "checkpoints" / "last"
    assert f"write its name into {pointer}" in output
    pointer.write_text("step-00000005\n")
    assert_equal_runs(training.finish(), expected, 10)


def test_a_diverging_run_stops_and_keeps_its_checkpoint(scripts, tmp_path, point_dataset):
    lr = ("--config.optim.lr", 1e30)
    training = Training(scripts, tmp_path, point_dataset, BC, "--steps", 9, "--save-every", 1, *lr)
    code, output = scripts.run(tmp_path, "train", *training.fresh)
    assert code == 1
    assert "error: " in output
    assert "--config.optim.lr" in output or "optim.lr" in output
    assert "Traceback" not in output
    if (training.run / "checkpoints" / "last").exists():
        load_agent(last_checkpoint(training.run), device="cpu")
    assert not (training.run / "agent.safetensors").exists()


def test_two_processes_cannot_write_one_run(scripts, tmp_path, point_dataset):
    training = Training(scripts, tmp_path, point_dataset, BC, "--steps", 4)
    expected = training.finish()
    with take_lock(training.run / ".lock"):
        code, output = scripts.run(tmp_path, "train", "--resume", training.run)
    assert code == 1
    assert "Another process is working on the run" in output
    assert_equal_runs(training.outcome(), expected, 4)
