"""Time and units: history, chunks, slots, tasks, return-to-go, bounds, modes, updates."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toybox.sequence import SequenceAgent, SequenceConfig
from toybox.world import demonstrations

from mail_agents.agent import Agent
from mail_agents.agents.mail import MailAgent
from mail_agents.config import AgentConfig
from mail_agents.data.dataset import MemoryDataset
from mail_agents.errors import (
    FeatureMismatchError,
    InvalidInputError,
    MissingStatisticsError,
    UnknownNameError,
)
from mail_agents.features import Feature, FeatureSpec
from mail_agents.policy import Policy, resolve_device

FEATURES = FeatureSpec(
    {"state": Feature("state", (2,), "float64")}, Feature("state", (1,), "float64")
)
RAW = {"state_norm": "identity", "action_norm": "identity"}


class ProbePolicy(Policy):
    """Records what it is shown; step j of its chunk is the last observation's first value + j."""

    def __init__(self, horizon, size):
        super().__init__()
        self.horizon, self.size = horizon, size
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []
        self.modes = []

    def loss(self, batch, generator=None):
        error = (batch["action"] - self.weight * batch["obs/state"][:, -1:, :1]).square()
        return error.mean(), {"seen": torch.tensor(float(len(error)))}

    def sample(self, batch, generators, deterministic):
        self.seen.append({key: value.clone() for key, value in batch.items()})
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        first = batch["obs/state"][:, -1, :1]
        chunk = torch.stack([first + j for j in range(self.horizon)], dim=1)
        chunk = chunk.repeat(1, 1, self.size)
        if not deterministic:
            chunk = chunk + torch.stack([torch.rand(1, 1, generator=g) for g in generators])
        return chunk


class ProbeAgent(Agent):
    def build_policy(self):
        return ProbePolicy(self.config.horizon, self.features.action.size)


def probe(features=FEATURES, seed=0, cls=ProbeAgent, **config):
    return cls(AgentConfig(**{**RAW, **config}), features, device="cpu", seed=seed)


def obs(*values):
    """One row per value: (value, -value)."""
    return {"state": np.array([[v, -v] for v in values], float)}


# ---- chunks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("execute", "planned"), [(None, [0, 3, 6]), (2, [0, 2, 4, 6]), (1, None)])
def test_the_network_is_called_when_the_executed_part_is_used_up(execute, planned):
    agent = probe(horizon=3, execute=execute)
    agent.reset()
    calls, actions = [], []
    for t in range(7):
        before = len(agent.policy.seen)
        actions.append(float(agent.act(obs(10 * t))[0, 0]))
        if len(agent.policy.seen) > before:
            calls.append(t)
        agent.step(0.0, False, False)
    assert calls == (list(range(7)) if planned is None else planned)
    assert agent.plans.tolist() == [len(calls)]
    executed = execute or 3
    assert actions == [10 * (t - t % executed) + t % executed for t in range(7)]


def test_reset_forces_a_new_plan_in_its_slots_only():
    agent = probe(horizon=4)
    agent.reset()
    agent.act(obs(0, 100))
    agent.reset([1])
    action = agent.act(obs(7, 107))
    assert action[:, 0].tolist() == [1, 107]  # slot 0 goes on with its chunk, slot 1 plans anew
    assert agent.policy.seen[-1]["obs/state"].shape[0] == 1  # one row, not two
    assert agent.plans.tolist() == [1, 1]
    agent.reset()
    assert agent.plans.tolist() == []
    assert agent.act(obs(5))[0, 0] == 5


def test_slots_out_of_phase_share_network_calls():
    agent = probe(horizon=3)
    agent.reset()
    agent.act(obs(0, 0))
    agent.reset([1])
    agent.act(obs(1, 1))
    agent.reset([0])
    agent.act(obs(2, 2))
    agent.act(obs(3, 3))
    agent.act(obs(4, 4))  # slot 1 is due (planned at 1), slot 0 is not (planned at 2)
    assert [len(batch["obs/state"]) for batch in agent.policy.seen] == [2, 1, 1, 1]
    assert agent.act(obs(5, 5))[:, 0].tolist() == [5, 5]


def test_acting_on_a_choice_of_slots():
    agent = probe(horizon=2)
    agent.reset(range(3))
    assert agent.act(obs(20, 0), slots=[2, 0])[:, 0].tolist() == [20, 0]
    assert agent.act(obs(1, 10), slots=[0, 1])[:, 0].tolist() == [1, 10]
    assert agent.plans.tolist() == [1, 1, 1]


# ---- history ---------------------------------------------------------------------------------


def test_history_holds_the_latest_frames_and_the_first_call_is_padded():
    agent = probe(history=3)
    agent.reset()
    for t in range(5):
        agent.act(obs(t))
        agent.step(1.0, False, False)
    shown = [batch["obs/state"][0, :, 0].tolist() for batch in agent.policy.seen]
    masks = [batch["mask"][0].tolist() for batch in agent.policy.seen]
    assert shown == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert masks[:3] == [[False, False, True], [False, True, True], [True, True, True]]
    timesteps = [batch["timestep"][0].tolist() for batch in agent.policy.seen]
    assert timesteps[0] == [0, 0, 0]
    assert timesteps[4] == [2, 3, 4]


def test_without_padding_the_first_plans_see_only_what_exists():
    agent = probe(history=3, padding="none")
    agent.reset()
    agent.act(obs(0, 0))
    agent.reset([1])
    agent.act(obs(1, 1))
    shapes = [tuple(batch["obs/state"].shape[:2]) for batch in agent.policy.seen]
    assert shapes == [(2, 1), (1, 1), (1, 2)]
    for batch in agent.policy.seen:
        assert batch["mask"].all()
        assert batch["past_action"].shape[1] == batch["obs/state"].shape[1] - 1


def test_between_plans_frames_are_still_remembered():
    agent = probe(history=3, horizon=3)
    agent.reset()
    for t in range(4):
        agent.act(obs(t))
    assert agent.policy.seen[1]["obs/state"][0, :, 0].tolist() == [1, 2, 3]


def test_past_actions_are_those_that_were_executed():
    bounded = FeatureSpec(
        FEATURES.observations, Feature("state", (1,), "float64", low=(-1.0,), high=(2.5,))
    )
    agent = probe(bounded, history=3)
    agent.reset()
    for value in (1.0, 9.0, 0.5):
        agent.act(obs(value))
    assert agent.policy.seen[0]["past_action"][0, :, 0].tolist() == [0, 0]
    assert agent.policy.seen[2]["past_action"][0, :, 0].tolist() == [1.0, 2.5]


def test_a_history_equals_the_training_window_of_the_same_steps():
    dataset = MemoryDataset(demonstrations(3))
    agent = ProbeAgent(AgentConfig(history=3, **RAW), dataset.features, device="cpu")
    view = dataset.windows(agent.window_spec, [1])
    episode = dataset.episode(1)
    agent.policy.horizon = 1
    agent.reset(target_return=float(episode.rewards.sum()))
    agent.policy.sample = lambda batch, *_: (  # type: ignore[method-assign]
        agent.policy.seen.append({k: v.clone() for k, v in batch.items()})
        or torch.tensor(episode.actions[len(agent.policy.seen) - 1]).reshape(1, 1, -1)
    )
    for t in range(len(episode)):
        agent.act(episode.observations["state"][t])
        agent.step(episode.rewards[t], False, False)
    expected = agent.prepare(view[np.arange(len(view))])
    for key in ("obs/state", "mask", "timestep", "rtg", "past_action"):
        shown = torch.cat([batch[key] for batch in agent.policy.seen])
        valid = expected["mask"] if key != "past_action" else expected["mask"][:, :-1]
        if key == "mask":
            assert torch.equal(shown, expected[key])
            continue
        torch.testing.assert_close(shown[valid], expected[key][valid], msg=key)


# ---- return-to-go and ends -------------------------------------------------------------------


def test_return_to_go_falls_by_the_rewards_per_slot():
    agent = probe(history=2)
    agent.reset([0, 1], target_return=[10.0, 100.0])
    for t in range(3):
        agent.act(obs(t, t))
        agent.step(np.array([1.0, 20.0]), np.zeros(2, bool), np.zeros(2, bool))
    assert agent.policy.seen[0]["rtg"].tolist() == [[10, 10], [100, 100]]
    assert agent.policy.seen[2]["rtg"].tolist() == [[9, 8], [80, 60]]
    agent.reset([1], target_return=50.0)
    agent.act(obs(3, 3))
    assert agent.policy.seen[3]["rtg"].tolist() == [[8, 7], [50, 50]]
    assert agent.policy.seen[3]["timestep"].tolist() == [[2, 3], [0, 0]]


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_an_ended_slot_must_be_reset(flag):
    agent = probe()
    agent.reset()
    agent.act(obs(0, 0))
    ends = {"terminated": np.zeros(2, bool), "truncated": np.zeros(2, bool)}
    ends[flag] = np.array([False, True])
    agent.step(np.zeros(2), **ends)
    with pytest.raises(InvalidInputError, match=r"slots \[1\].*agent.reset\(slots=\[1\]\)"):
        agent.act(obs(1, 1))
    assert agent.act(obs(1), slots=[0])[0, 0] == 1
    agent.reset([1])
    assert agent.act(obs(2, 2))[:, 0].tolist() == [2, 2]


def test_a_slot_that_was_never_reset_cannot_act():
    agent = probe()
    agent.reset([1])
    assert agent.act(obs(3), slots=[1])[0, 0] == 3
    with pytest.raises(InvalidInputError, match=r"slots \[0\]"):
        agent.act(obs(1, 2))


def test_step_before_act():
    with pytest.raises(InvalidInputError, match=r"act\(observation\) first"):
        probe().step(0.0, False, False)


# ---- shapes, keys, units ---------------------------------------------------------------------


def test_unbatched_and_bare_observations():
    agent = probe()
    agent.reset()
    assert agent.act({"state": np.array([3.0, 0.0])}).tolist() == [3.0]
    agent.reset()
    assert agent.act(np.array([4.0, 0.0])).tolist() == [4.0]
    agent.reset()
    assert agent.act(np.array([[4.0, 0.0], [5.0, 0.0]])).tolist() == [[4.0], [5.0]]


def test_only_known_keys_are_read_and_inputs_never_change():
    agent = probe(history=2)
    agent.reset()
    given_obs = obs(1.0) | {"extra": np.full((1, 3), np.nan)}
    before = copy.deepcopy(given_obs)
    action = agent.act(given_obs)
    np.testing.assert_equal(given_obs, before)
    action[:] = -1
    given_obs["state"][:] = 99  # what the agent remembers is its own copy
    agent.act(obs(2.0))
    assert agent.policy.seen[1]["obs/state"][0, :, 0].tolist() == [1.0, 2.0]


TWO = FeatureSpec(
    {"a": Feature("state", (2,), "float64"), "b": Feature("scalar", (), "float64")},
    FEATURES.action,
)
CAMERA = FeatureSpec({"cam": Feature("image", (4, 4, 3), "uint8")}, FEATURES.action)


@pytest.mark.parametrize(
    ("features", "observation", "error", "words"),
    [
        (
            FEATURES,
            {"stat": np.zeros((1, 2))},
            UnknownNameError,
            ["'state'", "Did you mean 'stat'"],
        ),
        (FEATURES, {"state": np.zeros((1, 3))}, InvalidInputError, ["'state'", "(1, 3)", "(2,)"]),
        (FEATURES, {"state": np.zeros((1, 1, 2))}, InvalidInputError, ["(1, 1, 2)"]),
        (FEATURES, {"state": np.zeros(())}, InvalidInputError, ["()"]),
        (FEATURES, {"state": np.array([[0, np.nan]])}, InvalidInputError, ["'state'", "NaN"]),
        (FEATURES, {"state": np.array([[np.inf, 0]])}, InvalidInputError, ["infinity"]),
        (CAMERA, {"cam": np.zeros((1, 4, 4, 3))}, InvalidInputError, ["'cam'", "uint8"]),
        (TWO, {"a": np.zeros((2, 2)), "b": np.zeros(3)}, InvalidInputError, ["(2, 2)", "(3,)"]),
        (TWO, {"a": np.zeros(2), "b": np.zeros(1)}, InvalidInputError, ["rows"]),
    ],
)
def test_wrong_observations_are_refused_before_anything_changes(
    features, observation, error, words
):
    agent = probe(features, history=2)
    agent.reset()
    with pytest.raises(error) as caught:
        agent.act(observation)
    for word in words:
        assert word in str(caught.value)
    assert agent.plans.tolist() == []


def test_the_number_of_rows_is_fixed_until_reset():
    agent = probe()
    agent.reset()
    agent.act(obs(0, 0))
    with pytest.raises(InvalidInputError, match="3 observations for 2 slots"):
        agent.act(obs(0, 0, 0))
    with pytest.raises(InvalidInputError, match=r"\[0, 2\] are not distinct numbers in 0..1"):
        agent.act(obs(0, 0), slots=[0, 2])
    with pytest.raises(InvalidInputError, match="not distinct"):
        agent.act(obs(0, 0), slots=[1, 1])
    with pytest.raises(InvalidInputError, match=r"outside 0\.\.1"):
        agent.reset([2])
    with pytest.raises(InvalidInputError, match="not distinct"):
        agent.step(0.0, False, False, slots=[-1])
    agent.reset()
    assert len(agent.act(obs(0, 0, 0))) == 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_actions_are_clipped_to_the_bounds_exactly_and_typed(dtype):
    # 0.1 is not a float32: rounding after the clip would leave a float64 box.
    bounds = np.array([0.1, -0.3], dtype)
    features = FeatureSpec(
        FEATURES.observations,
        Feature("state", (1,), dtype, low=(float(bounds[1]),), high=(float(bounds[0]),)),
    )
    agent = probe(features)
    agent.reset()
    action = agent.act(obs(5.0, -5.0, 0.05))
    assert action.dtype == np.dtype(dtype)
    assert action[:2, 0].tolist() == bounds.tolist()
    assert action[2, 0] == pytest.approx(0.05)


def test_unbounded_actions_are_not_clipped():
    agent = probe()
    agent.reset()
    assert agent.act(obs(1e6))[0, 0] == 1e6


def test_units_are_those_of_the_environment():
    episodes = list(demonstrations(4))
    dataset = MemoryDataset(episodes)
    agent = ProbeAgent(AgentConfig(action_norm="min_max"), dataset.features, device="cpu")
    agent.fit_statistics(dataset)
    states = np.concatenate([episode.observations["state"][:-1] for episode in episodes])
    agent.reset()
    action = agent.act(states[0])
    shown = agent.policy.seen[0]["obs/state"][0, 0].numpy()
    np.testing.assert_allclose(shown, (states[0] - states.mean(0)) / states.std(0), rtol=1e-4)
    actions = np.concatenate([episode.actions for episode in episodes])
    middle, half = (actions.max(0) + actions.min(0)) / 2, (actions.max(0) - actions.min(0)) / 2
    expected = (
        np.clip(shown[0] * half + middle, -1, 1)
        if dataset.features.action.low
        else (shown[0] * half + middle)
    )
    np.testing.assert_allclose(action, expected, rtol=1e-4)


def test_a_broken_network_is_not_played():
    agent = probe(horizon=2)
    agent.reset()
    agent.policy.sample = lambda batch, *_: torch.zeros((1, 1, 1))  # type: ignore
    with pytest.raises(InvalidInputError, match=r"planned \(1, 1, 1\).*\(1, 2, 1\)"):
        agent.act(obs(0))
    agent = probe()
    agent.reset()
    agent.policy.sample = lambda batch, *_: torch.full((1, 1, 1), torch.nan)  # type: ignore
    with pytest.raises(InvalidInputError, match="NaN or infinite action"):
        agent.act(obs(0))


# ---- noise and modes -------------------------------------------------------------------------


def noisy(agent, steps, slots=2):
    return np.stack([agent.act(obs(*range(slots)), deterministic=False) for _ in range(steps)])


def test_noise_comes_from_the_slot_seed_alone():
    agent = probe()
    runs = []
    for seeds in ([5, 6], [5, 7], [6, 5]):
        agent.reset()
        agent.reset([0, 1], seed=seeds)
        runs.append(noisy(agent, 3) - [[[0.0], [1.0]]])
    np.testing.assert_array_equal(runs[0][:, 0], runs[1][:, 0])
    assert not np.array_equal(runs[0][:, 1], runs[1][:, 1])
    np.testing.assert_allclose(runs[0], runs[2][:, ::-1], atol=1e-6)


def test_one_seed_is_spread_over_the_slots_and_none_continues():
    agent = probe()
    agent.reset(seed=3)
    first = noisy(agent, 2)
    assert first[0, 0] != first[0, 1] - 1
    agent.reset(seed=3)
    np.testing.assert_array_equal(first, noisy(agent, 2))
    agent.reset()
    second = noisy(agent, 2)
    assert not np.array_equal(first, second)
    agent.reset()
    assert not np.array_equal(second, noisy(agent, 2))
    # The same life from the start gives the same noise: nothing outside the agent is drawn from.
    other = probe()
    for _ in range(3):
        other.reset()
    again = noisy(other, 2)
    assert not np.array_equal(first, again)


def test_the_seed_of_the_agent_decides_when_none_is_given():
    runs = []
    for seed in (1, 1, 2):
        agent = probe(seed=seed)
        agent.reset()
        runs.append(noisy(agent, 2))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize("training", [True, False])
def test_act_is_inference_and_restores_the_mode(training):
    agent = probe()
    agent.policy.train(training)
    agent.reset()
    agent.act(obs(0))
    assert agent.policy.modes == [(False, True)]
    assert agent.policy.training is training
    agent.policy.sample = lambda *_: 1 / 0  # type: ignore[method-assign]
    agent.reset()
    with pytest.raises(ZeroDivisionError):
        agent.act(obs(0))
    assert agent.policy.training is training
    assert not torch.is_inference_mode_enabled()


def test_modules_are_told_the_mode_only_where_it_changes(monkeypatch):
    """It takes longer than a step of a small network."""
    agent, told = probe(), []
    monkeypatch.setattr(agent.policy, "train", lambda mode=True: told.append(mode))
    agent.policy.training = False
    agent.reset()
    agent.act(obs(0))
    assert told == []
    agent.policy.training = True
    agent.reset()
    agent.act(obs(0))
    assert told == [False]
    assert agent.policy.training


@pytest.mark.parametrize("reset", [None, [0]])
def test_parts_added_to_a_policy_that_acts_are_in_evaluation_mode_too(reset):
    """A new head of a loaded agent is in training mode, where dropout would act."""
    agent = probe()
    agent.policy.eval()
    agent.act(obs(0))
    agent.policy.head = torch.nn.Sequential(torch.nn.Dropout())
    agent.reset(reset, seed=0)
    agent.act(obs(0))
    assert not any(part.training for part in agent.policy.modules())
    agent.policy.head = torch.nn.Dropout()
    with agent.planning_alike():
        assert not agent.policy.head.training


def test_parts_that_were_frozen_stay_so_when_training_goes_on():
    agent = probe()
    agent.policy.frozen, agent.policy.free = torch.nn.Dropout().eval(), torch.nn.Dropout()
    agent.act(obs(0))
    with agent.planning_alike():
        assert not agent.policy.free.training
    assert [part.training for part in agent.policy.modules()] == [True, False, True]


def test_an_evaluation_changes_the_mode_once():
    agent = probe()
    agent.reset()
    with agent.planning_alike():
        assert not agent.policy.training
        agent.act(obs(0))
        assert not agent.policy.training
    assert agent.policy.training


def test_the_average_acts_where_there_is_one():
    agent = probe(ema_decay=0.9)
    assert agent.acting_policy is not agent.policy
    agent.reset()
    agent.act(obs(0))
    assert not agent.policy.seen
    assert len(agent.acting_policy.seen) == 1  # type: ignore[arg-type]


# ---- tasks -----------------------------------------------------------------------------------


class Spoken(ProbeAgent):
    def task_embedder(self):
        return lambda texts: np.array([[len(text)] for text in texts], np.float32)


def spoken(dataset_tasks):
    dataset = MemoryDataset([e for t in dataset_tasks for e in demonstrations(1, task=t)])
    agent = Spoken(AgentConfig(**RAW), dataset.features, device="cpu")
    agent.fit_statistics(dataset)
    agent.policy.seen.clear()
    return agent, dataset.episode(0).observations["state"][:2]


def test_each_slot_is_told_its_own_task():
    agent, states = spoken(["a", "bbb"])
    agent.reset([0, 1], task=["bbb", "a"])
    agent.act(states)
    assert agent.policy.seen[0]["task_emb"].tolist() == [[3], [1]]
    agent.reset(task="a")
    agent.act(states)
    assert agent.policy.seen[1]["task_emb"].tolist() == [[1], [1]]


def test_a_single_task_may_be_left_out():
    agent, states = spoken(["a"])
    agent.reset()
    agent.act(states)
    assert agent.policy.seen[0]["task_emb"].tolist() == [[1], [1]]


def test_unknown_and_missing_tasks():
    agent, states = spoken(["reach", "push"])
    with pytest.raises(UnknownNameError, match=r"'reech'. Did you mean 'reach'.*reset\(task="):
        agent.reset([0], task="reech")
    agent.reset()
    with pytest.raises(UnknownNameError, match=r"Valid: push, reach"):
        agent.act(states)
    with pytest.raises(InvalidInputError, match="task has 1 entries for 2 slots"):
        agent.reset([0, 1], task=["reach"])
    with pytest.raises(InvalidInputError, match="seed has 3 entries for 2 slots"):
        agent.reset([0, 1], task="push", seed=[1, 2, 3])


def test_tasks_are_ignored_without_language():
    agent = probe()
    agent.reset(task="anything")
    agent.act(obs(0))
    assert "task_emb" not in agent.policy.seen[0]


def test_language_needs_named_tasks():
    episodes = [copy.copy(e) for e in demonstrations(1)]
    object.__setattr__(episodes[0], "task", None)
    dataset = MemoryDataset(episodes)
    agent = Spoken(AgentConfig(**RAW), dataset.features, device="cpu")
    with pytest.raises(InvalidInputError, match="names no tasks"):
        agent.fit_statistics(dataset)


# ---- statistics and updates ------------------------------------------------------------------


def test_nothing_works_without_statistics():
    agent = ProbeAgent(AgentConfig(), FEATURES, device="cpu")
    assert not agent.fitted
    for call in (lambda: agent.act(obs(0)), lambda: agent.loss({}), lambda: agent.save("x")):
        with pytest.raises(MissingStatisticsError, match="fit_statistics"):
            call()


def test_statistics_of_other_data_are_refused():
    dataset = MemoryDataset(demonstrations(2))
    agent = ProbeAgent(AgentConfig(), FEATURES, device="cpu")
    with pytest.raises(FeatureMismatchError, match=r"'state': expected state \(2,\), found"):
        agent.fit_statistics(dataset)
    with pytest.raises(UnknownNameError, match="statistics key 'action'"):
        agent.set_statistics({})


def batch(n=4, target=0.0):
    return {
        "obs/state": np.ones((n, 1, 2)),
        "mask": np.ones((n, 1), bool),
        "action": np.full((n, 1, 1), target),
        "action_mask": np.ones((n, 1), bool),
    }


def test_update_needs_an_optimiser_and_learns():
    agent = probe()
    with pytest.raises(InvalidInputError, match="configure_optim"):
        agent.update(batch())
    agent.configure_optim()
    losses = [agent.update(batch())["loss"] for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert agent.updates == 5
    assert agent.policy.training


def test_update_reports_the_policy_metrics_and_the_clipped_norm():
    config = AgentConfig(**RAW).replace({"optim.grad_clip": 0.5})  # type: ignore[arg-type]
    agent = ProbeAgent(config, FEATURES, device="cpu")
    agent.configure_optim()
    values = agent.update(batch(target=3.0))
    assert values["seen"] == 4
    assert values["grad_norm"] == pytest.approx(4.0)  # 2 * (1 - 3), before clipping


@pytest.mark.parametrize("target", [math.nan, math.inf])
def test_a_broken_loss_leaves_the_weights_alone(target):
    agent = probe(ema_decay=0.5)
    agent.configure_optim()
    with pytest.raises(InvalidInputError, match=r"loss became (nan|inf) at update 0.*optim.lr"):
        agent.update(batch(target=target))
    assert agent.policy.weight.item() == 1.0
    assert agent.updates == 0


def test_training_noise_depends_on_the_seed_only():
    import mail_agents

    dataset = MemoryDataset(demonstrations(3))
    losses = []
    for seed, disturbance in ((1, 0), (1, 7), (2, 0)):
        torch.manual_seed(disturbance)
        agent = mail_agents.make(
            "mail/d-ma-ddpm",
            dataset.features,
            width=8,
            decoder={"layers": 1},
            seed=seed,
            device="cpu",
        )
        agent.fit_statistics(dataset)
        agent.configure_optim()
        windows = dataset.windows(agent.window_spec)[np.arange(8)]
        losses.append([agent.update(windows)["loss"] for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


# ---- what an agent refuses -------------------------------------------------------------------


@pytest.mark.parametrize(
    "action",
    [
        Feature("scalar", (), "int64", n=4),
        Feature("state", (2, 3), "float32"),
        Feature("state", (2,), "int64"),
    ],
)
def test_actions_that_are_not_continuous_vectors(action):
    with pytest.raises(InvalidInputError, match="ProbeAgent needs continuous actions"):
        probe(FeatureSpec(FEATURES.observations, action))


def test_resolve_device():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InvalidInputError, match="doctor"):
        resolve_device("nonsense:0")


def test_load_checks_the_class(tmp_path):
    import mail_agents

    dataset = MemoryDataset(demonstrations(2))
    agent = mail_agents.make("mean-action", dataset.features, device="cpu")
    agent.fit_statistics(dataset)
    path = agent.save(tmp_path / "agent.safetensors")
    assert type(agent).load(path).agent_id == "mean-action"
    with pytest.raises(InvalidInputError, match="holds a MeanActionAgent, not a MailAgent"):
        MailAgent.load(path)


# ---- hooks of offline RL ---------------------------------------------------------------------


def test_paddings_an_agent_does_not_know_are_refused_by_name():
    with pytest.raises(
        InvalidInputError, match=r"ProbeAgent cannot use padding='right'.*'edge', 'none'"
    ):
        probe(padding="right")
    with pytest.raises(InvalidInputError, match=r"'edge'; valid here: 'right', 'left_legacy'"):
        sequence(padding="edge")


def sequence(features=FEATURES, **config):
    units = {"state_norm": "identity", "action_norm": "identity"}
    return SequenceAgent(SequenceConfig(**{**units, **config}), features, device="cpu")


def spied(agent):
    """What the policy of an agent is shown, plan by plan."""
    seen, sample = [], agent.policy.sample

    def spy(batch, *rest):
        seen.append({key: value.clone() for key, value in batch.items()})
        return sample(batch, *rest)

    agent.policy.sample = spy
    return seen


def test_with_right_padding_the_policy_acts_on_the_steps_that_exist():
    agent = sequence(history=3)
    seen = spied(agent)
    agent.reset([0], seed=0, target_return=10.0)
    actions = []
    for t in range(6):
        actions.append(agent.act(obs(t))[0])
        agent.step(1.0, False, False)
    assert [batch["mask"].shape[1] for batch in seen] == [1, 2, 3, 3, 3, 3]
    assert all(batch["mask"].all() for batch in seen)
    assert [batch["rtg"][0].tolist() for batch in seen][:2] == [[10], [10, 9]]
    last = seen[5]
    assert last["rtg"][0].tolist() == [7, 6, 5]
    assert last["timestep"][0].tolist() == [3, 4, 5]
    np.testing.assert_array_equal(last["past_action"][0], np.stack(actions[3:5]).astype("f4"))


def test_with_legacy_padding_the_policy_is_shown_the_whole_history():
    agent = sequence(history=3, padding="left_legacy")
    seen = spied(agent)
    agent.reset([0], seed=0)
    for t in range(3):
        agent.act(obs(t))
    assert [batch["mask"][0].tolist() for batch in seen] == [
        [False, False, True],
        [False, True, True],
        [True, True, True],
    ]


def test_an_agent_may_show_the_policy_fewer_steps():
    class Shy(ProbeAgent):
        def visible_steps(self, valid):
            return np.minimum(valid.sum(axis=1), 2)

    agent = probe(history=5, cls=Shy)
    agent.reset()
    for t in range(4):
        agent.act(obs(t))
    assert [batch["obs/state"].shape[1] for batch in agent.policy.seen] == [1, 2, 2, 2]


def test_an_agent_may_choose_its_own_target():
    agent = sequence()
    asked = []

    def resolve(target, task=None):
        asked.append(task)
        return 40.0 if target is None else target / 2

    agent.resolve_target = resolve
    seen = spied(agent)
    agent.reset([0, 1], seed=0)
    agent.act(obs(0, 0))
    agent.reset([1], target_return=[10.0], task=["far"])
    agent.act(obs(0), slots=[1])
    assert asked == [None, None, "far"]
    assert seen[0]["rtg"].tolist() == [[40], [40]]
    assert seen[1]["rtg"].tolist() == [[5]]
    agent.reset()  # without slots, their number comes with the observation
    agent.act(obs(0))
    assert seen[2]["rtg"].tolist() == [[40]]


def test_statistics_come_from_the_episodes_an_agent_learns_from():
    class Choosy(ProbeAgent):
        def training_episodes(self, dataset, episodes=None):
            given = super().training_episodes(dataset, episodes)
            returns = dataset.episode_returns[given]
            return [given[int(np.argmax(returns))]]

    dataset = MemoryDataset(demonstrations(6))
    best = int(np.argmax(dataset.episode_returns))
    others = [i for i in range(6) if i != best]
    second = others[int(np.argmax(dataset.episode_returns[others]))]
    for part, expected in ((None, best), (others, second)):
        agent = Choosy(AgentConfig(), dataset.features, device="cpu")
        agent.fit_statistics(dataset, part)
        mean = agent.normalizers["obs/state"].offset.numpy()
        actions = dataset.episode(expected).observations["state"][:-1]
        np.testing.assert_allclose(mean, actions.mean(0), rtol=1e-5)
    plain = ProbeAgent(AgentConfig(), dataset.features, device="cpu")
    assert plain.training_episodes(dataset) == list(range(6))
    assert plain.training_episodes(dataset, [4, 2]) == [4, 2]


def test_every_update_is_told_after_it_is_counted():
    told = []

    class Told(ProbeAgent):
        def on_update(self):
            told.append((self.updates, self.policy.weight.item()))

    agent = probe(cls=Told)
    agent.configure_optim()
    weights = []
    for _ in range(3):
        agent.update(batch(target=3.0))
        weights.append(agent.policy.weight.item())
    assert told == list(zip([1, 2, 3], weights, strict=True))


def test_actions_are_scaled_by_the_box_of_the_action_space():
    box = FeatureSpec(
        FEATURES.observations, Feature("state", (1,), "float64", low=(0.0,), high=(4.0,))
    )
    agent = probe(box, action_norm="bounds")
    assert agent.fitted  # no statistics are needed
    agent.reset()
    assert agent.act(obs(0.5)).tolist() == [[3.0]]
    assert agent.prepare({"action": np.array([[[4.0]]])})["action"].tolist() == [[[1.0]]]
    with pytest.raises(InvalidInputError, match=r"'action'.*finite.*'min_max'"):
        probe(FEATURES, action_norm="bounds")


# ---- any order of events ---------------------------------------------------------------------


@given(st.data())
def test_slots_behave_as_separate_agents_whatever_happens(data):
    """Random resets, ends and partial acts; each slot must equal an agent of its own."""
    history, horizon = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    execute = data.draw(st.integers(1, horizon))
    padding = data.draw(st.sampled_from(["edge", "none"]))
    config = {"history": history, "horizon": horizon, "execute": execute, "padding": padding}
    together = probe(**config)
    alone = [probe(**config) for _ in range(3)]
    together.reset(range(3), seed=[0, 1, 2])
    for slot, agent in enumerate(alone):
        agent.reset([0], seed=[slot])
    for t in range(data.draw(st.integers(1, 8))):
        chosen = sorted(data.draw(st.sets(st.integers(0, 2), min_size=1)))
        for slot in data.draw(st.sets(st.integers(0, 2))):
            together.reset([slot], seed=[10 * t + slot])
            alone[slot].reset([0], seed=[10 * t + slot])
        values = [10.0 * slot + t for slot in chosen]
        actions = together.act(obs(*values), deterministic=False, slots=chosen)
        together.step(
            np.ones(len(chosen)), np.zeros(len(chosen)), np.zeros(len(chosen)), slots=chosen
        )
        for row, slot in enumerate(chosen):
            single = alone[slot].act(obs(values[row]), deterministic=False)
            alone[slot].step(1.0, False, False)
            assert single[0] == actions[row]
    shown = {slot: agent.policy.seen for slot, agent in enumerate(alone)}
    assert sum(len(b["mask"]) for b in together.policy.seen) == sum(map(len, shown.values()))
