"""An earlier version of the policy moves the targets of the current one."""

import copy

import numpy as np
import pytest
import torch

import mail_agents
from mail_agents.checkpoint import load_checkpoint, restore_training_state, save_checkpoint
from mail_agents.errors import InvalidInputError
from mail_baselines.config import SelfEvolutionConfig

EVOLVING = {"enabled": True, "stages": 4, "steps_per_stage": 3, "alpha_final": 0.8}
AGENTS = ["dt", "dt-released", "decision-mamba", "dm", "bc", "bc-kzl"]
NO_DROPOUT = {"dt", "dt-released", "decision-mamba", "bc-kzl"}


def test_the_published_schedule():
    config = SelfEvolutionConfig(enabled=True)
    assert config.alpha_final / config.stages == pytest.approx(0.02125)
    assert config.alpha(1) == 0.0  # there is no earlier policy
    assert config.alpha(2) == pytest.approx(0.0425)
    assert config.alpha(23) == pytest.approx(0.48875)
    assert [config.alpha(k) for k in (24, 30, 40, 99)] == [0.5] * 4
    assert [config.stage(n) for n in (0, 2499, 2500, 4999, 5000, 99_999)] == [1, 1, 2, 2, 3, 40]
    uncapped = SelfEvolutionConfig(alpha_final=0.8, alpha_cap=1.0)
    assert uncapped.alpha(1000) == pytest.approx(0.8)  # it stays after the last stage


@pytest.fixture
def train(build, dataset):
    def make(agent_id, steps=0, evolution=EVOLVING, **overrides):
        if agent_id in NO_DROPOUT:
            overrides = {"dropout": 0.0, **overrides}
        agent = build(agent_id, self_evolution=evolution, **overrides)
        agent.configure_optim()
        agent.rows = dataset.windows(agent.window_spec)[np.arange(20)]
        agent.policy.train()
        for _ in range(steps):
            agent.update(agent.rows)
        return agent

    return make


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("agent_id", AGENTS)
def test_the_teacher_is_the_policy_at_the_start_of_the_stage(train, agent_id):
    agent = train(agent_id, 2)
    assert agent.evolution.teacher is None
    agent.update(agent.rows)
    start = weights(agent.policy)
    for _ in range(2):
        assert equal(weights(agent.evolution.teacher), start)
        agent.update(agent.rows)
    assert equal(weights(agent.evolution.teacher), start)
    assert not equal(weights(agent.policy), start)
    agent.update(agent.rows)
    assert equal(weights(agent.evolution.teacher), weights(agent.policy))


@pytest.mark.parametrize("agent_id", AGENTS)
def test_the_first_stage_is_plain_training_to_the_last_bit(train, agent_id):
    agent, plain = train(agent_id, 3), train(agent_id, 3, evolution={"enabled": False})
    assert plain.evolution is None
    assert equal(weights(agent.policy), weights(plain.policy))


@pytest.mark.parametrize("agent_id", ["dt", "decision-mamba", "bc"])
def test_a_teacher_that_equals_the_student_only_rescales_the_gradient(train, agent_id):
    agent, plain = train(agent_id, 3), train(agent_id, 3, evolution={"enabled": False})
    gradients = []
    for each in (agent, plain):
        loss, metrics = each.loss(each.rows)
        each.policy.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in each.policy.parameters()])
    for moved, raw in zip(*gradients, strict=True):
        torch.testing.assert_close(moved, 0.6 * raw, rtol=1e-3, atol=1e-7)
    assert metrics.get("alpha") is None
    assert all(p.grad is None for p in agent.evolution.teacher.parameters())
    assert not any(p.requires_grad for p in agent.evolution.teacher.parameters())


@pytest.mark.parametrize("agent_id", AGENTS)
@pytest.mark.parametrize("teacher", ["snapshot", "ema"])
def test_targets_move_further_from_stage_to_stage(train, agent_id, teacher):
    agent = train(agent_id, 0, {**EVOLVING, "teacher": teacher, "ema_decay": 0.5})
    rows = []
    for _ in range(12):
        rows.append(agent.update(agent.rows))
    shifts = [np.mean([row["label_shift"] for row in rows[i : i + 3]]) for i in (0, 3, 6)]
    assert [row["alpha"] for row in rows[::3]] == pytest.approx([0, 0.4, 0.5, 0.5])
    assert shifts[0] == 0
    assert 0 < shifts[1] < shifts[2]
    assert "action_error" not in rows[0]
    assert rows[-1]["action_error"] > 0


def test_the_target_is_the_blend_with_the_teachers_prediction(train):
    agent = train("dt", 4)
    agent.evolution.teacher = copy.deepcopy(agent.policy).eval()
    agent.evolution.teacher.predict = lambda batch: torch.full_like(batch["action"], 3.0)
    batch = agent.prepare(agent.rows)
    refined, metrics = agent.evolution.refine(batch, 4)
    torch.testing.assert_close(refined["target"], 0.6 * batch["action"] + 0.4 * 3.0)
    assert refined["action"] is batch["action"]  # what the trunk reads stays as recorded
    assert "target" not in batch
    shift = (refined["target"] - batch["action"]).abs()[batch["mask"]].mean()
    torch.testing.assert_close(metrics["label_shift"], shift)


def test_in_evaluation_mode_the_loss_is_that_of_the_recorded_actions(train):
    agent = train("dt", 7)
    agent.policy.eval()
    loss, metrics = agent.loss(agent.rows)
    assert "alpha" not in metrics
    torch.testing.assert_close(loss, metrics["action_loss"], check_device=False)
    agent.policy.train()
    assert not torch.equal(agent.loss(agent.rows)[0], loss)


def test_an_average_follows_the_policy(train):
    agent = train("dt", 1, {**EVOLVING, "teacher": "ema", "ema_decay": 0.9})
    expected = dict(agent.policy.named_parameters())
    average = {k: v.detach().clone() for k, v in expected.items()}
    for _ in range(5):
        agent.update(agent.rows)
        for name, value in agent.policy.named_parameters():
            average[name] = 0.9 * average[name] + 0.1 * value.detach()
    for name, value in agent.evolution.teacher.named_parameters():
        torch.testing.assert_close(value, average[name])


@pytest.mark.parametrize("agent_id", ["dt", "dm", "bc"])
@pytest.mark.parametrize("teacher", ["snapshot", "ema"])
@pytest.mark.parametrize("cut", [2, 4])
def test_a_resumed_run_has_the_same_teacher(train, tmp_path, agent_id, teacher, cut):
    options = {**EVOLVING, "teacher": teacher}
    dropout = {"dropout": 0.1} if agent_id != "dm" else {}
    torch.manual_seed(5)
    whole = train(agent_id, 8, options, **dropout)
    torch.manual_seed(5)
    part = train(agent_id, cut, options, **dropout)
    saved = save_checkpoint(tmp_path, cut, part, {})
    torch.manual_seed(99)
    agent, state = load_checkpoint(saved, device="cpu")
    agent.configure_optim()
    restore_training_state(agent, state["agent"])
    agent.policy.train()
    for _ in range(8 - cut):
        agent.update(part.rows)
    assert equal(weights(agent.policy), weights(whole.policy))
    assert equal(weights(agent.evolution.teacher), weights(whole.evolution.teacher))


def test_a_run_without_its_teacher_is_refused(train, tmp_path):
    agent = train("dt", 4)
    loaded = mail_agents.load(agent.save(tmp_path / "agent.safetensors"), device="cpu")
    loaded.configure_optim()
    with pytest.raises(InvalidInputError, match=r"no earlier policy after 4 updates.*checkpoint"):
        loaded.update(agent.rows)
    loaded.reset()
    loaded.act(np.zeros(3, np.float32))  # acting needs none


def test_the_teacher_is_not_part_of_an_artifact(train, tmp_path):
    evolving, plain = train("dt", 4), train("dt", 4, {"enabled": False})
    sizes = []
    for agent in (evolving, plain):
        sizes.append(agent.save(tmp_path / "agent.safetensors").stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 100
