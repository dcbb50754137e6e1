"""Two processes train as one does on both their batches."""

import importlib.util
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from mail_agents.errors import InvalidInputError
from mail_agents.training.distributed import LostProcessError, Team, lost_processes
from mail_agents.training.step import gradients

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("team_worker", HERE / "team_worker.py")
assert _spec is not None
assert _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


def environment(rank, port, size=2):
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def train_in_two(scripts, tmp_path):
    """Runs the worker in two processes; losses, first gradients and weights of each."""

    def run(agent_id):
        port, jobs = free_port(), []
        for rank in range(2):
            work = (
                f"import team_worker; team_worker.main({agent_id!r}, {str(tmp_path / str(rank))!r})"
            )
            jobs.append(
                scripts.start(
                    tmp_path,
                    "train",
                    prelude=f"import sys; sys.path.insert(0, {str(HERE)!r}); {work}; sys.exit()",
                    environment=environment(rank, port),
                )
            )
        for job in jobs:
            assert job.wait() == 0, job.output
        return [
            (
                json.loads((tmp_path / f"{rank}.json").read_text()),
                torch.load(tmp_path / f"{rank}.pt", weights_only=True),
            )
            for rank in range(2)
        ]

    return run


def assert_close(found, expected, rtol):
    assert set(found) == set(expected)
    for name, want in expected.items():
        error = (found[name] - want).abs().max() / want.abs().max().clamp(min=1e-12)
        assert error < rtol, name


def test_two_processes_equal_one_on_the_whole_batch(train_in_two):
    (losses, first), (others, second) = train_in_two("mail/d-ma-bc")
    agent = worker.make("mail/d-ma-bc")
    expected = []
    for number, batch in enumerate(worker.batches(agent)):
        # The test is about targets that do not exist: the processes have different numbers of them.
        counts = [worker.part(batch, rank)["action_mask"].sum() for rank in range(2)]
        assert counts[0] > 1.3 * counts[1]
        loss, _ = gradients(agent, batch, Team())
        if number == 0:
            mine = {
                n: p.grad.clone() for n, p in agent.policy.named_parameters() if p.grad is not None
            }
            assert_close(first["gradients"], mine, 1e-9)
        agent.apply_gradients()
        expected.append(float(loss))
    assert losses == others
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))
    assert_close(first["weights"], agent.policy.state_dict(), 1e-6)
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


def test_every_process_has_noise_of_its_own(train_in_two):
    (losses, first), (others, _) = train_in_two("mail/d-tr-ddpm")
    assert losses == others
    agent = worker.make("mail/d-tr-ddpm")
    batch = next(worker.batches(agent))
    agent.policy.train()
    parts, weights, draws = [], [], []
    for rank in range(2):
        team = Team()
        team.rank, team.size = rank, 2
        team.reseed(agent)
        draws.append(torch.rand(3))
        team.reseed(agent)
        share = worker.part(batch, rank)
        parts.append(agent.loss(share)[0])
        weights.append(agent.loss_weight(share))
    assert not torch.equal(*draws)
    loss = sum(p * w for p, w in zip(parts, weights, strict=True)) / sum(weights)
    loss.backward()
    assert losses[0] == pytest.approx(float(loss.detach()), rel=1e-6)
    mine = {n: p.grad for n, p in agent.policy.named_parameters() if p.grad is not None}
    assert_close(first["gradients"], mine, 1e-9)


def test_random_numbers_of_an_update_depend_on_nothing_before_it():
    agent, team = worker.make("mail/d-tr-ddpm"), Team()
    team.size = 2
    draws = {}
    for before, updates, rank in ((0, 4, 0), (1, 4, 0), (0, 5, 0), (0, 4, 1)):
        torch.manual_seed(before)
        agent.updates, team.rank = updates, rank
        team.reseed(agent)
        found = torch.rand(4), torch.rand(4, generator=agent.generator)
        draws.setdefault((updates, rank), []).append(torch.cat(found))
    assert torch.equal(*draws[4, 0])
    values = [found[0] for found in draws.values()]
    assert len({tuple(value.tolist()) for value in values}) == 3


def test_one_process_keeps_its_streams_and_needs_nobody():
    agent, team = worker.make("mail/d-ma-bc"), Team()
    team.join()
    assert (team.rank, team.size, team.leads) == (0, 1, True)
    before = agent.generator.get_state()
    team.reseed(agent)
    assert torch.equal(agent.generator.get_state(), before)
    team.begin(agent)
    team.wait()
    team.check_same("dataset", "x")
    assert team.first_to_fail()
    assert team.part(7) == 7
    assert team.device("auto") == "auto"
    team.leave()


def test_a_batch_must_split_evenly():
    team = Team()
    team.size = 3
    assert team.part(12) == 4
    with pytest.raises(InvalidInputError, match=r"256 is the batch of all .* multiple of 3"):
        team.part(256)


def test_a_gpu_each(monkeypatch):
    team = Team()
    team.size = 2
    team._local_rank = 1
    assert team.device("cpu") == "cpu"
    monkeypatch.setattr(
        "mail_agents.training.distributed.resolve_device", lambda name: torch.device("cuda")
    )
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InvalidInputError, match="no GPU of its own: there are 1"):
        team.device("auto")
    chosen = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert team.device("auto") == "cuda:1"
    assert chosen == [1]


def test_only_errors_of_communication_mean_a_lost_process():
    with pytest.raises(LostProcessError, match="cannot be reached"), lost_processes():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shapes"), lost_processes():
        raise RuntimeError("shapes cannot be multiplied")


def test_shares_of_a_batch_of_hardly_any_targets(monkeypatch):
    team = Team()
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total: total.mul_(2))
    assert team.share(0.25) == 0.5
    assert team.share(0.0) == 0.0


def test_processes_must_begin_alike(monkeypatch):
    agent, team, said = worker.make("mail/d-ma-bc"), Team(), []
    team.size = 2
    monkeypatch.setattr(team, "check_same", lambda *what: said.append(what))
    monkeypatch.setattr("torch.distributed.new_group", lambda **_: None)
    monkeypatch.setattr(
        "mail_agents.training.distributed.DistributedDataParallel", lambda policy, **_: policy
    )
    team.begin(agent)
    agent.normalizers["action"].load_state_dict(
        {k: v + 1 for k, v in agent.normalizers["action"].state_dict().items()}
    )
    team.begin(agent)
    agent.task_embeddings = np.ones((1, 3), np.float32)
    team.begin(agent)
    statistics = [value for what, value in said if what == "set of statistics"]
    assert len(set(statistics)) == 3


def test_a_broken_part_that_counts_breaks_the_whole(monkeypatch):
    team = Team()
    team.size = 2
    monkeypatch.setattr("torch.distributed.all_reduce", lambda parts, group=None: None)
    values = {"loss": torch.tensor(float("nan"))}
    assert team.mean(values, 0.5)["loss"].isnan()
    assert team.mean(values, 0.0)["loss"] == 0  # a process without any target has no mean
