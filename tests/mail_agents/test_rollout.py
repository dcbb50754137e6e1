"""Evaluation: fixed, seeded episodes whatever the number of environments, and honest summaries."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from toybox.sequence import SequenceAgent, SequenceConfig
from toybox.world import ENV_ID, PointEnv, demonstrations

import mail_agents
from mail_agents.agent import Agent
from mail_agents.config import AgentConfig
from mail_agents.data.dataset import MemoryDataset
from mail_agents.data.example import example_dataset
from mail_agents.errors import FeatureMismatchError, InvalidInputError
from mail_agents.features import Feature, FeatureSpec
from mail_agents.policy import Policy
from mail_agents.rollout import EpisodeResult, Evaluation, evaluate
from mail_agents.seeding import derive_env_seed


class GreedyPolicy(Policy):
    """Goes straight to the goal, with noise from its own stream; the same arithmetic per row."""

    def loss(self, batch, generator=None):
        return torch.zeros(()), {}

    def sample(self, batch, generators, deterministic):
        position, goal = batch["obs/state"][:, -1].chunk(2, dim=1)
        action = (goal - position) / 0.25
        if not deterministic:
            noise = torch.stack([torch.randn(2, generator=each) for each in generators])
            action = action + noise.to(action)
        return action.unsqueeze(1)


class Greedy(Agent):
    def build_policy(self):
        return GreedyPolicy()


def point(**kwargs):
    """A maker of worlds that end after 12 steps."""
    return lambda: gymnasium.make(ENV_ID, **kwargs)


FEATURES = FeatureSpec.from_spaces(PointEnv().observation_space, PointEnv().action_space)


@pytest.fixture
def greedy():
    raw = AgentConfig(state_norm="identity", action_norm="identity")
    return Greedy(raw, FEATURES, agent_id="greedy", device="cpu")


def facts(evaluation):
    return [
        (e.index, e.seed, e.success, e.episode_return, e.length, e.plans, e.terminated)
        for e in evaluation.episodes
    ]


# ---- the protocol ----------------------------------------------------------------------------


def test_episodes_do_not_depend_on_the_number_of_environments(greedy):
    runs = {
        n: facts(evaluate(greedy, point(terminate=True), 10, seed=4, n_envs=n))
        for n in (1, 3, 8, 20)
    }
    assert runs[1] == runs[3] == runs[8] == runs[20]
    assert [row[0] for row in runs[1]] == list(range(10))
    assert [row[1] for row in runs[1]] == [derive_env_seed(4, "eval", i) for i in range(10)]
    assert len({row[4] for row in runs[1]}) > 1  # lengths differ, so slots fell out of step


def test_repeated_evaluations_are_equal_and_other_seeds_are_not(greedy):
    first, same = (evaluate(greedy, point(), 4, seed=1, n_envs=2) for _ in range(2))
    other = evaluate(greedy, point(), 4, seed=2, n_envs=2)
    assert facts(first) == facts(same)
    assert not {e.seed for e in first.episodes} & {e.seed for e in other.episodes}


def test_an_episode_alone_is_the_episode_among_others(greedy):
    whole = facts(evaluate(greedy, point(), 6, seed=3, n_envs=4))
    assert facts(evaluate(greedy, point(), [4, 1], seed=3)) == [whole[1], whole[4]]


def test_a_learned_agent_agrees_to_rounding(tmp_path):
    dataset = MemoryDataset(demonstrations(4))
    agent = mail_agents.make(
        "mail/d-ma-ddpm",
        dataset.features,
        device="cpu",
        width=8,
        decoder={"layers": 1},
        diffusion_steps=2,
        history=2,
        horizon=3,
        execute=2,
    )
    agent.fit_statistics(dataset)
    runs = [evaluate(agent, point(), 5, seed=0, n_envs=n).episodes for n in (1, 3, 5)]
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert (one.index, one.seed, one.length, one.plans) == (
                other.index,
                other.seed,
                other.length,
                other.plans,
            )
            assert one.episode_return == pytest.approx(other.episode_return, abs=1e-3)


def test_the_deterministic_flag_reaches_the_agent(greedy):
    quiet = [
        [
            e.episode_return
            for e in evaluate(greedy, point(), 3, seed=0, deterministic=True).episodes
        ]
        for _ in range(2)
    ]
    loud = [e.episode_return for e in evaluate(greedy, point(), 3, seed=0).episodes]
    assert quiet[0] == quiet[1] != loud


class Coin(gymnasium.Env):
    """Solved at once with probability one half; a failure takes ``slow`` steps."""

    observation_space = gymnasium.spaces.Box(-8, 8, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, slow=10, flicker=False, silent=False, at_reset=False, key="success"):
        self.key = key
        self.slow, self.flicker, self.silent, self.at_reset = slow, flicker, silent, at_reset
        self.closed = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.lucky = 0, self.np_random.random() < 0.5
        return np.zeros(4, np.float32), {"success": True} if self.at_reset else {}

    def step(self, action):
        self.t += 1
        success = self.lucky and (self.t == 1 or not self.flicker)
        ended = self.t >= (2 if self.lucky else self.slow)
        info = {} if self.silent else {self.key: success}
        return np.zeros(4, np.float32), 1.0, self.lucky and ended, ended and not self.lucky, info

    def close(self):
        self.closed += 1


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 15))
def test_every_episode_counts_so_short_ones_have_no_advantage(n_envs, episodes):
    agent = Greedy(
        AgentConfig(state_norm="identity", action_norm="identity"), FEATURES, device="cpu"
    )
    found = evaluate(agent, Coin, episodes, seed=0, n_envs=n_envs).episodes
    lucky = [
        bool(np.random.default_rng(derive_env_seed(0, "eval", i)).random() < 0.5)
        for i in range(episodes)
    ]
    assert [e.success for e in found] == lucky
    assert [e.length for e in found] == [2 if ok else 10 for ok in lucky]
    assert [e.terminated for e in found] == lucky


def test_success_is_latched_and_unknown_stays_unknown(greedy):
    flicker = evaluate(greedy, lambda: Coin(flicker=True), 8, seed=0).episodes
    steady = evaluate(greedy, Coin, 8, seed=0).episodes
    assert [e.success for e in flicker] == [e.success for e in steady]
    assert any(e.success for e in flicker)
    other = evaluate(greedy, lambda: Coin(key="is_success"), 8, seed=0).episodes
    assert [e.success for e in other] == [e.success for e in steady]
    silent = evaluate(greedy, lambda: Coin(silent=True), 2, seed=0)
    assert [e.success for e in silent.episodes] == [None, None]
    assert silent.success_rate is None
    assert "return" in str(silent)
    assert all(e.success for e in evaluate(greedy, lambda: Coin(at_reset=True), 4).episodes)


def test_limits_truncate(greedy):
    ends = evaluate(greedy, ENV_ID, 2, seed=0, max_steps=3, n_envs=2)
    assert [(e.length, e.terminated) for e in ends.episodes] == [(3, False)] * 2
    assert ends.protocol["max_steps"] == 3
    assert evaluate(greedy, ENV_ID, 1).protocol["max_steps"] == 12


def test_chunks_are_counted_and_part_of_the_protocol():
    dataset = MemoryDataset(demonstrations(2))
    agent = mail_agents.make("mean-action", dataset.features, device="cpu", horizon=4, execute=3)
    agent.fit_statistics(dataset)
    evaluation = evaluate(agent, ENV_ID, 2, n_envs=2, env_kwargs={"size": 2}, task="point")
    assert [e.plans for e in evaluation.episodes] == [4, 4]  # 12 steps, three per plan
    expected = {
        "agent": "mean-action",
        "env": "toybox/Point-v0",
        "env_kwargs": {"size": 2},
        "task": "point",
        "seed": 0,
        "n_episodes": 2,
        "deterministic": False,
        "horizon": 4,
        "execute": 3,
        "history": 1,
        "weights": "raw",
    }
    assert expected.items() <= evaluation.protocol.items()


def test_the_target_return_is_given_to_every_episode(greedy, monkeypatch):
    seen = []
    sample = greedy.policy.sample

    def spy(batch, *rest):
        seen.append(batch["rtg"][:2, -1].tolist())  # further rows fill up
        return sample(batch, *rest)

    monkeypatch.setattr(greedy.policy, "sample", spy)
    monkeypatch.setattr(type(greedy), "uses_target_return", True)
    evaluate(greedy, lambda: Coin(slow=2), 4, seed=0, n_envs=2, target_return=5.0)
    assert seen == [[5, 5], [4, 4], [5, 5], [4, 4]]


def test_a_target_that_nothing_uses_or_that_is_no_number_is_refused(greedy):
    with pytest.raises(InvalidInputError, match=r"does not use target returns, got \[5.0\]"):
        evaluate(greedy, ENV_ID, 1, target_return=5.0)
    agent = SequenceAgent(SequenceConfig(), greedy.features, device="cpu")
    for target in (float("nan"), float("inf")):
        with pytest.raises(InvalidInputError, match="finite"):
            evaluate(agent, ENV_ID, 1, target_return=target)


def test_the_target_is_part_of_every_result(greedy):
    plain = evaluate(greedy, lambda: Coin(slow=2), 2)
    assert [episode.target_return for episode in plain.episodes] == [None, None]
    agent = SequenceAgent(SequenceConfig(), greedy.features, device="cpu")
    agent.fit_statistics(MemoryDataset(demonstrations(2)))
    for target, found in ((None, 0.0), (7.5, 7.5)):  # the agent's own is 0
        evaluation = evaluate(agent, ENV_ID, 2, target_return=target)
        assert {episode.target_return for episode in evaluation.episodes} == {found}
        assert evaluation.protocol["target_return"] == found


# ---- recording and callbacks -----------------------------------------------------------------


def test_recording_keeps_the_chosen_episodes_only(greedy):
    evaluation = evaluate(
        greedy, point(render_mode="rgb_array", terminate=True), 5, seed=0, n_envs=3, record=[1, 4]
    )
    assert sorted(evaluation.frames) == [1, 4]
    for index, frames in evaluation.frames.items():
        assert len(frames) == evaluation.episodes[index].length + 1
        assert frames[0].shape == (32, 32, 3)
    assert evaluation.fps == 20
    plain = evaluate(greedy, point(terminate=True), 5, seed=0)
    assert facts(plain) == facts(evaluation)


def test_recordings_of_fast_environments_skip_frames(greedy, monkeypatch):
    monkeypatch.setitem(PointEnv.metadata, "render_fps", 120)
    make = point(render_mode="rgb_array", terminate=True)
    evaluation = evaluate(greedy, make, 1, seed=0, record=[0])
    assert evaluation.fps == 40
    assert len(evaluation.frames[0]) == evaluation.episodes[0].length // 3 + 1


def test_recording_without_a_camera_is_refused(greedy):
    with pytest.raises(InvalidInputError, match="render_mode='rgb_array'"):
        evaluate(greedy, Coin, 1, record=[0])


def test_each_finished_episode_is_announced_once(greedy):
    seen = []
    evaluation = evaluate(greedy, Coin, 7, seed=0, n_envs=3, on_episode=seen.append)
    assert sorted(seen, key=lambda e: e.index) == evaluation.episodes


def test_environments_are_closed_even_when_something_fails(greedy):
    made = []

    def make():
        made.append(Coin())
        return made[-1]

    evaluate(greedy, make, 5, n_envs=3)
    assert [env.closed for env in made] == [1, 1, 1]
    greedy.policy.sample = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(greedy, make, 2, n_envs=2)
    assert all(env.closed for env in made)


def test_no_more_environments_than_episodes(greedy):
    made = []

    def make():
        made.append(1)
        return Coin()

    evaluate(greedy, make, 2, n_envs=50)
    assert len(made) == 2


# ---- refusals --------------------------------------------------------------------------------


def test_another_world_is_refused_before_anything_runs(greedy):
    with pytest.raises(
        FeatureMismatchError, match=r"'state': expected state \(4,\), found.*\(6,\)"
    ):
        evaluate(greedy, point(size=3), 1)
    camera = FeatureSpec(
        {**FEATURES.observations, "corner2": Feature("image", (8, 8, 3), "uint8")}, FEATURES.action
    )
    agent = Greedy(AgentConfig(state_norm="identity", action_norm="identity"), camera)
    with pytest.raises(FeatureMismatchError, match="'corner2' is missing"):
        evaluate(agent, point(), 1)


@pytest.mark.parametrize("bad", [0, [], [1, 1], [-1]])
def test_episodes_that_make_no_sense(greedy, bad):
    with pytest.raises(InvalidInputError, match="episode"):
        evaluate(greedy, Coin, bad)


def test_environments_that_make_no_sense(greedy):
    with pytest.raises(InvalidInputError, match="environment"):
        evaluate(greedy, Coin, 1, n_envs=0)
    for options in ({"max_steps": 3}, {"env_kwargs": {"slow": 3}}):
        with pytest.raises(InvalidInputError, match="given by id"):
            evaluate(greedy, Coin, 1, **options)
    with pytest.raises(gymnasium.error.Error):
        evaluate(greedy, "toybox:toybox/Pointt-v0", 1)


# ---- summaries -------------------------------------------------------------------------------


def evaluation_of(successes, returns=None):
    returns = returns or [float(i) for i in range(len(successes))]
    episodes = [
        EpisodeResult(i, i, "t", ok, value, 10 + i, 1, False, 0.1)
        for i, (ok, value) in enumerate(zip(successes, returns, strict=True))
    ]
    return Evaluation(episodes, {"seed": 0})


def test_summary_intervals():
    summary = evaluation_of([True] * 42 + [False] * 8).summary()
    assert summary["success_rate"] == 0.84
    assert summary["success_interval_95"] == pytest.approx([0.7149, 0.9166], abs=1e-3)  # Wilson
    assert summary["return_mean"] == 24.5
    low, high = summary["return_interval_95"]
    assert 19 < low < 24.5 < high < 30
    assert summary["length_mean"] == 34.5
    assert summary["n_episodes"] == 50
    assert str(evaluation_of([True] * 42 + [False] * 8)) == "42/50 solved, 0.71-0.92"


def test_a_world_that_reports_success_in_some_episodes_only():
    partly = evaluation_of([True, None, False, None])
    assert partly.success_rate == 0.5
    assert str(partly).startswith("1/2 solved")  # the two that say nothing are not failures


def test_a_single_episode_has_a_summary():
    summary = evaluation_of([True]).summary()
    assert summary["return_std"] == 0.0
    assert summary["return_interval_95"] == [0.0, 0.0]


def test_saving_writes_episodes_and_summary(tmp_path, greedy):
    evaluation = evaluate(greedy, Coin, 3, seed=0, task="coin")
    evaluation.save(tmp_path / "new" / "place")
    lines = (tmp_path / "new" / "place" / "episodes.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]
    assert json.loads(lines[0]).keys() >= {
        "seed",
        "task",
        "success",
        "episode_return",
        "length",
        "plans",
        "terminated",
        "wall_time",
    }
    summary = json.loads((tmp_path / "new" / "place" / "summary.json").read_text())
    assert summary == json.loads(json.dumps(evaluation.summary()))


@pytest.mark.parametrize("agent_id", ["mail/ed-ma-bc", "mail/d-tr-ddpm"])
def test_a_real_agent_plays_the_same_episodes_beside_any_number_of_others(agent_id: str) -> None:
    features = FeatureSpec.from_spaces(
        spaces.Box(-np.inf, np.inf, (3,), np.float64), spaces.Box(-1, 1, (2,), np.float32)
    )
    small = {"layers": 2} if agent_id.endswith("ddpm") else {"layers": 1}
    agent = mail_agents.make(agent_id, features, device="cpu", decoder=small, history=1)
    agent.fit_statistics(example_dataset(features, 20))
    results = [
        [(e.episode_return, e.length) for e in evaluate(agent, Drift, 7, n_envs=n).episodes]
        for n in (1, 2, 3, 7)
    ]
    assert len({length for _, length in results[0]}) > 1, "episodes end together: nothing is tested"
    assert results[0] == results[1] == results[2] == results[3]
    assert (agent.plan_rows, agent.plan_fixed) == (1, False)


def test_an_agent_that_sees_plays_the_same_episodes_beside_any_number_of_others():
    """Convolutions of four images and of eight are computed in different ways."""
    world = SeenDrift()
    features = FeatureSpec.from_spaces(world.observation_space, world.action_space)
    small = {"decoder": {"layers": 1}, "width": 16, "feature_width": 16, "history": 2, "horizon": 4}
    agent = mail_agents.make("mail/d-ma-bc", features, device="cpu", **small)
    agent.fit_statistics(example_dataset(features, 20))
    results = [
        [(e.episode_return, e.length) for e in evaluate(agent, SeenDrift, 6, n_envs=n).episodes]
        for n in (1, 6)
    ]
    assert results[0] == results[1]


class Drift(gymnasium.Env):
    """A point that actions push and that amplifies every rounding error; random length."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 3)
        self.left = int(self.np_random.integers(8, 30))
        return self.state.copy(), {}

    def step(self, action):
        self.state = np.sin(3.0 * self.state + np.append(action, action.sum()).astype(np.float64))
        self.left -= 1
        return self.state.copy(), float(self.state.sum()), self.left == 0, False, {}


class SeenDrift(Drift):
    """The same with a camera, whose image changes at every step."""

    observation_space = spaces.Dict(
        {"state": Drift.observation_space, "camera": spaces.Box(0, 255, (48, 48, 3), np.uint8)}
    )

    def reset(self, **options):
        observation, info = super().reset(**options)
        return self._seen(observation), info

    def step(self, action):
        observation, *rest = super().step(action)
        return self._seen(observation), *rest

    def _seen(self, observation):
        waves = np.sin(np.arange(48)[:, None, None] * (1 + observation))
        image = np.broadcast_to(waves * np.cos(np.arange(48))[None, :, None], (48, 48, 3))
        return {"state": observation, "camera": (127 * (1 + image)).astype(np.uint8)}
