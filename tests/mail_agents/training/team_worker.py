"""What test_distributed.py runs in each of two processes: some updates on a part of every batch."""

import json
import sys

import numpy as np
import torch
from toybox.world import demonstrations

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.training.distributed import Team
from mail_agents.training.step import gradients

SMALL = {"width": 8, "decoder": {"layers": 1, "d_state": 2}, "history": 2, "horizon": 4}
DATASET = MemoryDataset(demonstrations(4), name="toy")


def make(agent_id):
    """A small agent in double precision, ready to train."""
    agent = mail_agents.make(agent_id, DATASET.features, device="cpu", seed=3, **SMALL)
    agent.fit_statistics(DATASET)
    agent.policy.double()
    agent.normalizers.double()
    if agent.ema is not None:
        agent.ema.double()
    agent.configure_optim(10)
    return agent


def batches(agent, count=3):
    """Batches of 16 windows whose second halves have few real targets."""
    windows = DATASET.windows(agent.window_spec)
    padded = np.flatnonzero(~windows[:]["action_mask"].all(axis=1))
    whole = np.setdiff1d(np.arange(len(windows)), padded)
    for i in range(count):
        yield windows[np.concatenate([np.roll(whole, -i)[:8], np.roll(padded, -i)[:8]])]


def part(batch, rank, size=2):
    """The share of one process."""
    n = len(batch["action"]) // size
    return {key: value[rank * n : (rank + 1) * n] for key, value in batch.items()}


def main(agent_id, output):
    """Trains, and writes losses, the gradients of the first update and the last weights."""
    agent, team = make(agent_id), Team()
    team.join()
    team.begin(agent)
    losses, first = [], None
    for batch in batches(agent):
        loss, _ = gradients(agent, part(batch, team.rank), team)
        if first is None:
            first = {n: p.grad for n, p in agent.policy.named_parameters() if p.grad is not None}
        agent.apply_gradients()
        losses.append(float(loss))
    torch.save({"gradients": first, "weights": agent.policy.state_dict()}, f"{output}.pt")
    with open(f"{output}.json", "w", encoding="utf-8") as file:
        json.dump(losses, file)
    team.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
