"""Acting toward a target return: what the network is shown, streams, limits, files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.errors import InvalidInputError, MissingStatisticsError, UnknownNameError
from mail_agents.rollout import evaluate

STREAMS = ["decision-mamba", "dm", "dm-figure"]


def watch(agent):
    """Records what the policy is shown; its action at the n-th call is n / 100."""
    seen = []

    def sample(batch, generators, deterministic):
        seen.append({key: value.clone() for key, value in batch.items()})
        return torch.full((len(batch["rtg"]), 1, 2), len(seen) / 100)

    agent.policy.sample = sample
    return seen


def play(agent, steps, reward=1.0, slots=1, ended=False, **reset):
    agent.reset(**reset)
    rng = np.random.default_rng(0)
    actions = []
    for _ in range(steps):
        observation = rng.standard_normal((slots, 3)).astype(np.float32)
        actions.append(agent.act(observation))
        agent.step(np.full(slots, reward), np.full(slots, ended), np.zeros(slots, bool))
    return np.stack(actions)


# ---- the rollout of a return-conditioned agent -------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "returns"),
    [
        ({}, [[10], [10, 9], [10, 9, 8], [9, 8, 7], [8, 7, 6], [7, 6, 5]]),
        ({"reward_mode": "delayed"}, [[10], [10] * 2, [10] * 3, [10] * 3, [10] * 3, [10] * 3]),
    ],
)
def test_what_the_network_sees_in_an_episode(build, overrides, returns):
    agent = build("dt", history=3, return_scale=1.0, **overrides)
    seen = watch(agent)
    play(agent, 6, target_return=10.0)
    assert [batch["rtg"][0].tolist() for batch in seen] == returns
    last = seen[5]
    assert last["timestep"][0].tolist() == [3, 4, 5]
    np.testing.assert_allclose(last["past_action"][0, :, 0], [0.04, 0.05])  # a_3 and a_4
    shown = build("dt", history=3).policy
    shown.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    shown.predict = lambda batch: seen.append(batch["action"]) or torch.zeros(1, 3, 2)
    type(agent.policy).sample(shown, last, [], True)
    np.testing.assert_allclose(seen[-1][0, :, 0], [0.04, 0.05, 0.0])  # a dummy for a_5


def test_the_scale_divides_what_the_return_token_is_made_of(build):
    agent = build("dt", history=3, return_scale=10.0)
    inputs = []
    agent.policy.embed_return.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    play(agent, 3, target_return=10.0)
    assert inputs[0].flatten().tolist() == [1.0]
    np.testing.assert_allclose(inputs[2].flatten(), [1.0, 0.9, 0.8])


def test_the_default_scale_is_the_largest_absolute_return(build, trajectory):
    rng = np.random.default_rng(0)
    bad = [trajectory(2, rng, rewards=r) for r in ([-3.0, -4.0], [1.0, 1.0])]
    data = MemoryDataset(bad, features=build("dt").features)
    agent = build("dt", data)
    assert float(agent.policy.return_scale) == 7.0
    assert agent.resolve_target(None) == 2.0
    agent = build("dt", data, return_scale=50.0)
    assert float(agent.policy.return_scale) == 50.0
    nothing = MemoryDataset([trajectory(3, rng, rewards=[0.0] * 3)], features=build("dt").features)
    assert float(build("dt", nothing).policy.return_scale) == 1.0


def test_without_a_target_the_best_training_return_is_aimed_for(build, dataset, tmp_path):
    agent = build("dt")
    best = float(np.float32(dataset.episode_returns.max()))
    agent = mail_agents.load(agent.save(tmp_path / "agent.safetensors"), device="cpu")
    seen = watch(agent)
    play(agent, 1)
    assert float(seen[0]["rtg"]) == pytest.approx(best)
    play(agent, 1, target_return=-5.0)
    assert float(seen[1]["rtg"]) == -5.0
    play(agent, 1, slots=2, target_return=[1.0, 2.0])
    assert seen[2]["rtg"].flatten().tolist() == [1.0, 2.0]


def test_an_agent_without_data_has_no_target(dataset):
    agent = mail_agents.make("dt", dataset.features, device="cpu")
    with pytest.raises(MissingStatisticsError, match="return"):
        agent.resolve_target(None)
    agent.set_statistics(dataset.stats())
    assert not agent.fitted
    with pytest.raises(MissingStatisticsError, match=r"return.*fit_statistics"):
        agent.act(np.zeros(3, np.float32))


def test_returns_of_held_out_episodes_are_not_seen(dataset):
    agent = mail_agents.make("dt", dataset.features, device="cpu")
    agent.fit_statistics(dataset, [1, 3])
    assert agent.resolve_target(None) == pytest.approx(dataset.episode_returns[[1, 3]].max())


def test_an_average_of_the_weights_knows_the_returns_too(build, dataset, tmp_path):
    agent = build("dt", ema_decay=0.9)
    agent.configure_optim()
    agent.update(dataset.windows(agent.window_spec)[np.arange(4)])
    loaded = mail_agents.load(agent.save(tmp_path / "a.safetensors"), device="cpu")
    first, second = (play(each, 3, target_return=2.0) for each in (agent, loaded))
    np.testing.assert_array_equal(first, second)


def test_time_steps_without_an_embedding_are_refused(build, dataset):
    with pytest.raises(InvalidInputError, match=r"Time step 11 .*max_timestep is 11.*--config"):
        build("dt", max_timestep=11)
    agent = build("dt", max_timestep=12)
    with pytest.raises(InvalidInputError, match="Time step 12 "):
        play(agent, 13)


def test_training_and_acting_agree(build, dataset):
    """The action planned at every step is what the trained network predicts for the window."""
    for agent_id in ("dt", "dt-corl", "decision-mamba", "dm", "dm-figure"):
        agent = build(agent_id)
        episode, spec = dataset.episode(0), agent.window_spec
        agent.reset(target_return=float(dataset.episode_returns[0]))
        batch = dataset.windows(spec)[np.arange(9)]  # windows that start at steps 0..8
        with torch.no_grad():
            agent.policy.eval()
            expected = agent.policy.predict(agent.prepare(batch))
        for t in range(12):
            action = agent.act(episode.observations["state"][t])
            agent._slots.past_action[0, -1] = episode.actions[t]  # as recorded
            agent.step(float(episode.rewards[t]), False, False)
            window, place = max(t - 3, 0), min(t, 3)
            np.testing.assert_allclose(action, expected[window, place], atol=2e-5)


# ---- several tasks -----------------------------------------------------------------------------


@pytest.fixture
def two_scales(build, trajectory):
    """Returns of 3, 5 and 4 in "toy", 0.02 and 0.05 in "tiny"; a last episode has no task."""
    rng = np.random.default_rng(0)
    returns = {"toy": (3.0, 5.0, 4.0), "tiny": (0.02, 0.05), None: (9.0,)}
    episodes = [
        replace(trajectory(4, rng, rewards=[0, 0, 0, value]), task=task)
        for task, values in returns.items()
        for value in values
    ]
    return MemoryDataset(episodes, features=build("dt").features)


def test_each_task_has_its_own_target_and_all_share_a_scale(build, two_scales, tmp_path):
    agent = build("dt", two_scales)
    loaded = mail_agents.load(agent.save(tmp_path / "agent.safetensors"), device="cpu")
    for each in (agent, loaded):
        seen = watch(each)
        each.reset([0, 1], task=["tiny", "toy"])
        each.act(np.zeros((2, 3), np.float32))
        np.testing.assert_allclose(seen[0]["rtg"].flatten(), [0.05, 5.0])
        assert float(each.policy.return_scale) == 9.0
        assert each.resolve_target(1.5, "tiny") == each.resolve_target(1.5) == 1.5


def test_of_several_tasks_one_must_be_named(build, two_scales, noise_env):
    agent = build("dt", two_scales)
    play(agent, 1, target_return=2.0)  # nothing to ask for
    for task in (None, "tinny"):
        with pytest.raises(UnknownNameError, match=r"task .*toy.*reset\(task=.*target return"):
            play(agent, 1, task=task)
        with pytest.raises(UnknownNameError, match="several tasks"):
            evaluate(agent, noise_env, 1, task=task)
    found = evaluate(agent, noise_env, 1, task="tiny")
    assert found.protocol["target_return"] == found.episodes[0].target_return == 0.05


def test_only_the_training_part_counts_in_each_task(build, two_scales):
    agent = mail_agents.make("dt", two_scales.features, device="cpu")
    agent.fit_statistics(two_scales, [0, 2, 3])
    assert agent.provenance["best_returns"] == {"toy": 4.0, "tiny": 0.02}
    agent.fit_statistics(two_scales, [0, 2])
    with pytest.raises(UnknownNameError, match="'tiny'"):
        agent.resolve_target(None, "tiny")


def test_a_single_task_need_not_be_named_and_changes_no_file(build, dataset):
    named = MemoryDataset(
        [replace(dataset.episode(i), task="only") for i in range(len(dataset))],
        features=dataset.features,
    )
    for agent in (build("dt"), build("dt", named)):
        assert set(agent.provenance) == {"dataset"}
        best = pytest.approx(dataset.episode_returns.max())
        assert agent.resolve_target(None) == agent.resolve_target(None, "elsewhere") == best


# ---- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_id", STREAMS)
@pytest.mark.parametrize("tokens", [True, False])
def test_a_stream_is_a_window_without_end(build, agent_id, tokens):
    extra = {} if tokens else {"action_tokens": False, "state_weight": 0.0, "return_weight": 0.0}
    stream = build(agent_id, acting="stream", history=2, **extra)
    window = build(agent_id, history=12, **extra)
    window.policy.load_state_dict(stream.policy.state_dict())
    first, second = (play(each, 12, 0.1, slots=2, target_return=2.0) for each in (stream, window))
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert np.abs(np.diff(first, axis=0)).max() > 1e-4


@pytest.mark.parametrize("agent_id", STREAMS)
def test_streams_of_slots_out_of_phase_do_not_mix(build, agent_id):
    agent = build(agent_id, acting="stream")
    rng = np.random.default_rng(1)
    frames = rng.standard_normal((8, 3, 3)).astype(np.float32)

    def alone(slot, start):
        agent.reset([0], seed=[0], target_return=[1.0])
        out = []
        for t in range(start, 8):
            out.append(agent.act(frames[t, slot][None], slots=[0])[0])
            agent.step(0.1, False, False, slots=[0])
        return np.stack(out)

    agent.reset()
    agent.reset(range(3), seed=[0] * 3, target_return=[1.0] * 3)
    together = []
    for t in range(8):
        if t == 3:
            agent.reset([1], seed=[0], target_return=[1.0])
        together.append(agent.act(frames[t]))
        agent.step(np.full(3, 0.1), np.zeros(3, bool), np.zeros(3, bool))
    together = np.stack(together)
    agent.reset()
    for slot, start in ((0, 0), (1, 3), (2, 0)):
        np.testing.assert_allclose(alone(slot, start), together[start:, slot], atol=1e-6)


def test_a_stream_starts_anew_with_each_episode(build):
    agent = build("dm", acting="stream")
    first, rng = play(agent, 5, target_return=1.0), np.random.default_rng(0)
    np.testing.assert_array_equal(first, play(agent, 5, target_return=1.0))
    agent.reset([0], target_return=[1.0])  # the slot stays, and with it what was carried
    again = []
    for _ in range(5):
        again.append(agent.act(rng.standard_normal((1, 3)).astype(np.float32)))
        agent.step(1.0, False, False)
    np.testing.assert_array_equal(first, np.stack(again))


@settings(max_examples=15, deadline=None)
@given(history=st.integers(2, 6), steps=st.integers(1, 9))
def test_a_window_and_a_stream_agree_until_the_window_is_full(build_once, history, steps):
    stream, window = build_once(history)
    first = play(stream, steps, 0.1, target_return=1.0)
    second = play(window, steps, 0.1, target_return=1.0)
    full = min(steps, history)
    np.testing.assert_allclose(first[:full], second[:full], atol=1e-5)


@pytest.fixture(scope="module")
def build_once(dataset):
    made = {}

    def build(history):
        if history not in made:
            sizes = {"d_model": 8, "layers": 1, "max_timestep": 12, "history": history}
            pair = []
            for acting in ("stream", "window"):
                agent = mail_agents.make(
                    "dm", dataset.features, device="cpu", seed=0, acting=acting, **sizes
                )
                agent.fit_statistics(dataset)
                pair.append(agent)
            made[history] = pair
        return made[history]

    return build


def test_an_agent_that_sees_its_labels_says_so_in_every_report(build):
    (caveat,) = build("dm-released").caveats()
    assert "training curve is not comparable" in caveat
    for agent_id in ("dm", "dm-figure", "dt-released", "bc"):
        assert build(agent_id).caveats() == []


# ---- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent_id", "overrides"),
    [
        ("dt", {}),
        ("dt-released", {}),
        ("decision-mamba", {}),
        ("dm", {}),
        ("dm", {"acting": "stream"}),
        ("dm-figure", {}),
        ("dm-released", {}),
        ("bc", {}),
        ("bc-kzl", {"history": 4}),
    ],
)
def test_episodes_are_the_same_beside_any_number_of_others(build, noise_env, agent_id, overrides):
    agent = build(agent_id, **overrides)
    target = {"target_return": 3.0} if agent.uses_target_return else {}
    runs = []
    for n_envs in (1, 3, 8):
        found = evaluate(agent, noise_env, 9, n_envs=n_envs, seed=4, **target)
        runs.append([(e.episode_return, e.length) for e in found.episodes])
    assert runs[0] == runs[1] == runs[2]
    assert len({length for _, length in runs[0]}) > 3  # they do end at different times


def test_returns_are_raw_and_termination_ends_the_episode(build, noise_env):
    agent = build("dt", return_scale=1000.0)
    watch(agent)
    found = evaluate(agent, noise_env, 2, seed=0, n_envs=1, target_return=5.0)
    for episode in found.episodes:
        assert episode.terminated
        assert 5 <= episode.length <= 30
    first, second = found.episodes
    calls = np.arange(1, first.length + second.length + 1) / 100  # the action of each call, twice
    assert first.episode_return == pytest.approx(2 * calls[: first.length].sum(), rel=1e-5)
    assert second.episode_return == pytest.approx(2 * calls[first.length :].sum(), rel=1e-5)
    assert found.protocol["target_return"] == 5.0


@pytest.mark.parametrize(("padding", "seen"), [("left_legacy", 7.0), ("right", 1.0)])
def test_released_agents_remember_what_they_planned(build, padding, seen, monkeypatch):
    """kzl's loop (and its successors') appends the output as it is; the world gets it clipped."""
    agent = build("decision-mamba", padding=padding)
    batches = []

    def plan(batch, generators, deterministic):
        batches.append(batch)
        return torch.full((len(generators), 1, 2), 7.0)

    monkeypatch.setattr(agent.policy, "sample", plan)
    agent.reset()
    for _ in range(2):
        np.testing.assert_array_equal(agent.act(np.zeros((1, 3), np.float32)), 1.0)
        agent.step(np.zeros(1), np.zeros(1, bool), np.zeros(1, bool))
    assert batches[-1]["past_action"][0, -1].tolist() == [seen, seen]
