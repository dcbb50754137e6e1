"""Before and after the training loop."""

import json

import numpy as np
import pytest
import torch
from toybox.sequence import SequenceAgent, SequenceConfig
from toybox.world import ENV_ID, demonstrations

import mail_agents
from mail_agents.agents.mail import MailPolicy
from mail_agents.agents.mail_config import MailConfig
from mail_agents.data.dataset import MemoryDataset
from mail_agents.data.references import Reference
from mail_agents.data.windows import BatchSampler
from mail_agents.errors import FeatureMismatchError, InvalidInputError
from mail_agents.report.results import load_results, save_results
from mail_agents.report.summary import score_lines
from mail_agents.suite import evaluation_directory
from mail_agents.training.notes import aims, task_warning, trainable_parameters, training_notes
from mail_agents.training.runs import RunArguments
from mail_agents.training.session import (
    evaluator,
    open_agent,
    open_run,
    start_training,
    summarise_run,
    validation_loss,
    what_is_kept,
)

DATASET = MemoryDataset(demonstrations(4), name="toy")
SMALL = {"width": 8, "decoder": {"layers": 1}, "diffusion_steps": 2}


def make(seed=0, **overrides):
    return mail_agents.make(
        "mail/d-tr-ddpm", DATASET.features, device="cpu", seed=seed, **{**SMALL, **overrides}
    )


def fitted(seed=0, **overrides):
    agent = make(seed, **overrides)
    agent.fit_statistics(DATASET)
    return agent


def test_a_new_agent_takes_statistics_of_the_training_episodes_only(tmp_path):
    agent, state = open_agent(tmp_path, False, DATASET, [0, 1], make, "cpu")
    assert state is None
    mean = np.concatenate([DATASET.episode(i).actions for i in (0, 1)]).mean(axis=0)
    np.testing.assert_allclose(agent.normalizers["action"].offset, mean, rtol=1e-5)
    # Killed before its first checkpoint, a run starts again.
    again, state = open_agent(tmp_path, True, DATASET, [0, 1], make, "cpu")
    assert state is None
    assert again.updates == 0


def test_the_global_stream_that_dropout_draws_from_follows_the_seed():
    draws = []
    for seed, before in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(before)
        agent = fitted(seed)
        assert start_training(agent, None, BatchSampler(8, 4, seed), 10) == (0, 0.0)
        assert agent.optimizer is not None
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_reference_agents_have_nothing_to_optimise():
    agent = mail_agents.make("mean-action", DATASET.features, device="cpu")
    agent.fit_statistics(DATASET)
    assert trainable_parameters(agent) == 0
    assert start_training(agent, None, BatchSampler(8, 4, 0), 0) == (0, 0.0)
    with pytest.raises(InvalidInputError, match="configure_optim"):
        _ = agent.optimizer


def test_frozen_weights_do_not_count():
    agent = fitted()
    whole = trainable_parameters(agent)
    first = next(agent.policy.parameters())
    first.requires_grad_(False)
    assert trainable_parameters(agent) == whole - first.numel()


def test_a_validation_loss_leaves_no_trace():
    agent = fitted()
    windows = DATASET.windows(agent.window_spec)
    noise, stream = agent.generator.get_state(), torch.get_rng_state()
    first, second = validation_loss(agent, windows), validation_loss(agent, windows)
    assert first == second  # without dropout, with the same noise
    assert torch.equal(noise, agent.generator.get_state())
    assert torch.equal(stream, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in agent.policy.parameters())
    assert validation_loss(agent, windows, limit=3) != first


def test_resuming_on_other_data(tmp_path):
    from mail_agents.checkpoint import save_checkpoint

    agent = fitted()
    sampler = BatchSampler(8, 4, 0)
    start_training(agent, None, sampler, 10)
    next(sampler)
    save_checkpoint(tmp_path, 0, agent, {"sampler": sampler.state_dict(), "seconds": 2.5})
    other = MemoryDataset(demonstrations(3), name="other")
    with pytest.raises(InvalidInputError, match="another dataset"):
        open_agent(tmp_path, True, other, [0], make, "cpu")
    agent, state = open_agent(tmp_path, True, DATASET, [0], make, "cpu")
    resumed = BatchSampler(8, 4, 0)
    assert start_training(agent, state, resumed, 10) == (0, 2.5)
    assert resumed.state_dict() == sampler.state_dict()


# ---- what is tried before training -----------------------------------------------------------


def arrange(agent, spec=None, targets=(), **arguments):
    """The evaluations of a run in one world."""
    specs = {} if spec is None else {"point": spec}
    data = MemoryDataset(demonstrations(2), features=DATASET.features, env_specs=specs)
    arguments = RunArguments(agent=agent.agent_id, config=agent.config, **arguments)
    return evaluator(arguments, agent, data, print, targets)


def test_a_world_that_cannot_be_played_stops_a_run_before_training():
    agent = fitted()
    with pytest.raises(InvalidInputError, match=r"of task 'point' cannot be made.*colour"):
        arrange(agent, {"id": ENV_ID, "kwargs": {"colour": "red"}})
    with pytest.raises(FeatureMismatchError, match="environment of task 'point'"):
        arrange(agent, {"id": ENV_ID, "kwargs": {"size": 3}})
    arrange(agent, {"id": ENV_ID, "kwargs": {"colour": "red"}}, eval_episodes=0)
    arrange(agent, {"id": ENV_ID, "kwargs": {}})


def test_episodes_longer_than_an_agent_can_act_for(monkeypatch):
    agent, asked = fitted(), []

    def refuse(steps):
        asked.append(steps)
        raise InvalidInputError("Too long.")

    monkeypatch.setattr(agent, "check_episode_length", refuse)
    for spec in ({"id": ENV_ID}, {"id": ENV_ID, "max_episode_steps": 30}):
        with pytest.raises(InvalidInputError, match=r"task 'point' may have .*Too long"):
            arrange(agent, spec)
    assert asked == [12, 30]  # the world's own limit, and the dataset's in its place


@pytest.mark.parametrize("scores", [{"min": 1.0, "max": 1.0}, {"min": 0.0, "max": float("nan")}])
def test_references_that_could_not_be_used_afterwards(scores):
    agent = fitted()
    agent.provenance["dataset"]["reference_scores"] = {"point": scores}
    with pytest.raises(InvalidInputError, match="reference scores of task 'point'"):
        arrange(agent, eval_episodes=0)


def test_an_agent_remembers_the_targets_that_it_is_scored_under():
    agent = SequenceAgent(SequenceConfig(action_norm="min_max"), DATASET.features, device="cpu")
    agent.fit_statistics(DATASET)
    arrange(agent, eval_episodes=0)
    assert "target_returns" not in agent.provenance
    arrange(agent, targets=(3600, 1800), eval_episodes=0)
    assert agent.provenance["target_returns"] == [3600.0, 1800.0]
    assert aims(agent, (3600, 0.5)) == ", targets 3600, 0.5"
    assert aims(agent) == ", target 0 (the agent's choice)"
    assert aims(fitted()) == ""


# ---- notes -----------------------------------------------------------------------------------


def with_tasks(agent, *tasks):
    agent.tasks = tasks
    return agent


def test_an_agent_that_must_guess_its_task():
    assert task_warning(with_tasks(fitted(), "a")) is None
    assert "add --config.language hash, or the id of a text model, unless" in task_warning(
        with_tasks(fitted(), "a", "b")
    )
    # Only where there is such a flag.
    agent = mail_agents.make("mean-action", DATASET.features, device="cpu")
    note = task_warning(with_tasks(agent, "a", "b"))
    assert "not told which of the 2 tasks" in note
    assert "language" not in note


def test_a_run_too_short_for_its_own_schedule_says_so(tmp_path):
    assert training_notes(fitted(), 1) == []
    agent = fitted(optim={"warmup_steps": 10})
    (note,) = training_notes(agent, 10)
    assert "All 10 updates are warm-up: the learning rate rises for 10 updates" in note
    assert training_notes(agent, 11) == []
    assert summarise_run(agent, tmp_path, ["point"], 10, 1.0, seed=0).notes == [note]

    small = {"d_model": 8, "layers": 1, "history": 2, "action_norm": "min_max"}
    small["optim"] = {"warmup_steps": 0}
    evolving = {"enabled": True, "steps_per_stage": 5}
    agent = mail_agents.make("dt", DATASET.features, **small, self_evolution=evolving)
    (note,) = training_notes(agent, 5)
    assert "Self-evolution never starts: its first stage takes 5 updates" in note
    assert training_notes(agent, 6) == []
    agent = mail_agents.make("dt", DATASET.features, **small)
    assert training_notes(agent, 5) == []


# ---- summing up ------------------------------------------------------------------------------


def write_episodes(folder, returns, **fields):
    folder.mkdir(parents=True)
    rows = [
        {"index": i, "seed": i, "task": "hop", "success": None, "episode_return": x, "length": 3,
         **fields}
        for i, x in enumerate(returns)
    ]  # fmt: skip
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_summed_up_with_its_references_and_targets(tmp_path):
    agent = fitted()
    scores = {"hop": {"min": 0, "max": 10, "source": "test"}}
    agent.provenance["dataset"]["reference_scores"] = scores
    steps = {step: evaluation_directory(tmp_path, step) for step in (10, 20, 30)}
    write_episodes(steps[10] / "hop", [1.0, 1.0], target_return=8.0)
    write_episodes(steps[20] / "hop", [6.0, 6.0], target_return=8.0)
    write_episodes(steps[30] / "hop", [4.0, 5.0], target_return=8.0)
    write_episodes(steps[30] / "hop" / "target-4", [9.0, 9.0], target_return=4.0)
    result = summarise_run(agent, tmp_path, ["hop"], 30, 1.5, 7)
    assert result.references == {"hop": Reference(0.0, 10.0, "test")}
    assert result.evaluations["last"][0].score == 4.5
    assert result.evaluations["best"][0].score == 6  # under the first target, not the 9 of another
    assert result.target_return == 8
    assert list(result.by_target()) == ["8", "4"]
    assert score_lines(result) == ["hop: normalised score 45.0 [40.0, 50.0], of 0 to 10 (test)"]
    protocol = {"env": "hop-v1", "simulator": "Bouncy 3"}
    (steps[30] / "hop" / "summary.json").write_text(json.dumps({"protocol": protocol}))
    agent.caveats = lambda: ["It peeps."]
    result = summarise_run(agent, tmp_path, ["hop"], 30, 1.5, 7)
    assert (result.worlds, result.notes) == ({"hop": "hop-v1 (Bouncy 3)"}, ["It peeps."])
    assert score_lines(result)[0].endswith("of 0 to 10 (test), on hop-v1 (Bouncy 3)")
    path = save_results(tmp_path / "result.json", [result])
    assert load_results(path) == [result]


def test_a_run_without_references_or_targets(tmp_path):
    agent = fitted()
    write_episodes(evaluation_directory(tmp_path, 5) / "hop", [1.0])
    result = summarise_run(agent, tmp_path, ["hop"], 5, 1.5, 7)
    assert (result.references, result.target_return, result.targets) == ({}, None, {})
    assert score_lines(result) == []
    assert list(result.evaluations) == ["last"]
    unevaluated = summarise_run(agent, tmp_path / "none", ["hop"], 5, 1.5, 7)
    assert unevaluated.evaluations == {}
    assert score_lines(unevaluated) == []


@pytest.mark.parametrize(
    ("rows", "curve", "label"),
    [
        ([{"loss": 3.0}, {"loss": 2.0}], [3.0, 2.0], "training loss"),
        (
            [{"loss": 3.0, "action_loss": 1.0}, {"loss": 2, "action_loss": 0.1, "action_error": 4}],
            [1.0, 4.0],
            "action error",
        ),
    ],
)
def test_curves_show_what_means_the_same_for_every_agent(rows, curve, label, tmp_path):
    agent = mail_agents.make("mean-action", DATASET.features, device="cpu")
    agent.fit_statistics(DATASET)
    lines = (json.dumps({"step": step, **row}) for step, row in enumerate(rows))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = summarise_run(agent, tmp_path, ["point"], 2, 1.0, seed=0)
    assert result.curve == list(enumerate(curve))
    assert result.curve_label == label


def test_evaluation_is_hosted_as_the_arguments_say(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "mail_agents.training.session.evaluate_worlds", lambda *_, **options: seen.update(options)
    )
    for changes, expected in (({}, (None, 1)), ({"eval_envs": 3, "eval_workers": 2}, (3, 2))):
        arguments = RunArguments("mail/d-tr-ddpm", MailConfig(), eval_episodes=0, **changes)
        evaluator(arguments, fitted(), DATASET, print)()
        assert (seen["n_envs"], seen["workers"]) == expected


def test_what_is_kept_is_only_what_there_is(tmp_path):
    from mail_agents.checkpoint import save_checkpoint

    assert what_is_kept(tmp_path) == "There is no checkpoint yet."
    agent = fitted()
    agent.configure_optim(4)
    save_checkpoint(tmp_path, 1, agent, {})
    assert "is intact" in what_is_kept(tmp_path)


def test_all_networks_of_a_compiled_run_are_compiled(tmp_path, monkeypatch):
    """Training compiles the network that trains, acting the average that acts."""
    asked = []
    monkeypatch.setattr(MailPolicy, "compile", lambda policy: asked.append(policy))
    config = mail_agents.spec("mail/d-tr-ddpm").config({**SMALL, "optim.batch_size": 2})
    run = str(tmp_path / "run")
    arguments = RunArguments("mail/d-tr-ddpm", config, output=run, device="cpu", compile=True)
    agent = open_run(arguments, DATASET).agent
    assert asked == agent.policies()
    assert len(asked) == 2
