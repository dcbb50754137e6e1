"""One update: its arithmetic, and what a batch weighs."""

import numpy as np
import pytest
import torch
from toybox.world import demonstrations

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.training.distributed import Team
from mail_agents.training.step import gradients, pinned

DATASET = MemoryDataset(demonstrations(3), name="toy")


def make():
    agent = mail_agents.make(
        "mail/d-tr-bc", DATASET.features, device="cpu", width=8, decoder={"layers": 1}
    )
    agent.fit_statistics(DATASET)
    agent.configure_optim(5)
    return agent


def test_alone_it_is_a_plain_update():
    one, two = make(), make()
    windows = DATASET.windows(one.window_spec)
    for step in range(3):
        torch.manual_seed(step)
        expected = one.update(windows[step : step + 6])
        torch.manual_seed(step)
        two.policy.train()
        loss, _ = gradients(two, windows[step : step + 6], Team())
        two.apply_gradients()
        assert float(loss) == expected["loss"]
        assert not loss.requires_grad
    for first, second in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        assert torch.equal(first, second)


def test_bfloat16_computes_in_it_and_keeps_weights_and_gradients_exact():
    agent = make()
    batch = DATASET.windows(agent.window_spec)[:6]
    seen = []
    agent.policy.backbone.head.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    agent.policy.eval()
    exact, _ = gradients(agent, batch, Team())
    loss, _ = gradients(agent, batch, Team(), "bfloat16")
    assert seen == [torch.float32, torch.bfloat16]
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=0.02)
    assert {p.grad.dtype for p in agent.policy.parameters() if p.grad is not None} == {
        torch.float32
    }


def test_a_batch_weighs_as_many_targets_as_it_has():
    agent = make()
    windows = DATASET.windows(agent.window_spec)
    whole = windows[: len(windows)]
    assert agent.loss_weight(whole) == whole["action_mask"].sum() < whole["action_mask"].size
    tensors = {"action_mask": torch.from_numpy(whole["action_mask"])}
    assert agent.loss_weight(tensors) == agent.loss_weight(whole)


def test_padding_weighs_where_the_loss_averages_over_it():
    pytest.importorskip("mail_baselines")
    batch = {"action_mask": np.array([[True, False, False], [True, True, True]])}
    settings = {"d_model": 8, "action_norm": "identity"}
    for average, weight in (("all", 6.0), ("valid", 4.0)):
        settings["loss_average"] = average
        agent = mail_agents.make("dt", DATASET.features, device="cpu", **settings)
        assert agent.loss_weight(batch) == weight


def test_pinning_leaves_text_and_task_numbers_alone(monkeypatch):
    pins = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pins.append(t) or t)
    batch = {"action": np.ones(3, np.float32), "task": np.arange(3), "note": np.array(["a"] * 3)}
    out = pinned(batch)
    assert out["task"] is batch["task"]
    assert out["note"] is batch["note"]
    assert torch.equal(out["action"], torch.ones(3))
    assert len(pins) == 1
