"""Recording: nothing is lost at the edges of an episode."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from mail_agents.data import MemoryDataset, StoreWriter, open_dataset
from mail_agents.data.sim_states import narrow_states
from mail_agents.errors import InvalidInputError
from mail_wrappers import RecordEpisodes


class Counter(gymnasium.Env):
    """Counts steps in a buffer it reuses; succeeds once, at ``success_at``; ends at ``ends_at``."""

    def __init__(self, ends_at=4, success_at=2, truncates=False, reports=True, action_space=None):
        self.observation_space = spaces.Dict(
            {
                "count": spaces.Box(0, 99, (1,), np.int64),
                "deep": spaces.Dict({"x": spaces.Discrete(9)}),
            }
        )
        self.action_space = action_space or spaces.Box(-1, 1, (2,), np.float32)
        self.ends_at, self.success_at = ends_at, success_at
        self.truncates, self.reports = truncates, reports
        self.buffer = np.zeros(1, np.int64)

    def observe(self):
        return {"count": self.buffer, "deep": {"x": int(self.buffer[0])}}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.buffer[:] = 0
        return self.observe(), {}

    def step(self, action):
        self.buffer += 1
        now = int(self.buffer[0])
        done = now == self.ends_at
        info = {"success": now == self.success_at} if self.reports else {}
        over = (False, done) if self.truncates else (done, False)
        action += 100  # a rude environment
        return self.observe(), 0.5 * now, *over, info


def run(env, steps=4, **reset):
    env.reset(**reset)
    for i in range(steps):
        env.step(np.full(2, i, np.float32))


def test_an_episode_has_its_final_observation_seed_and_success():
    env = RecordEpisodes(Counter(), task="count")
    run(env, seed=11, options={"level": 2})
    (episode,) = env.episodes
    assert episode.observations["count"].tolist() == [[0], [1], [2], [3], [4]]
    assert episode.observations["deep/x"].tolist() == [0, 1, 2, 3, 4]
    assert episode.actions.tolist() == [[i, i] for i in range(4)]
    assert episode.actions.dtype == np.float32
    assert episode.rewards.tolist() == [0.5, 1.0, 1.5, 2.0]
    assert episode.terminations.tolist() == [False, False, False, True]
    assert not episode.truncations.any()
    assert (episode.seed, episode.task) == (11, "count")
    assert episode.success is True, "success at step 2 is latched"
    assert episode.meta["options"] == {"level": 2}


def test_truncation_by_the_environment_and_by_the_user():
    env = RecordEpisodes(Counter(truncates=True))
    run(env)
    run(env, steps=2)
    run(env, steps=0)
    run(env, steps=3)
    env.close()
    assert [len(e) for e in env.episodes] == [4, 2, 3]
    for episode in env.episodes:
        assert not episode.terminations.any()
        assert episode.truncations.tolist() == [False] * (len(episode) - 1) + [True]
    assert [e.success for e in env.episodes] == [True, True, True]
    assert [e.seed for e in env.episodes] == [None] * 3


def test_only_successful_episodes_reach_the_sink():
    env = RecordEpisodes(Counter(success_at=3), only_successful=True)
    for steps in (2, 4, 3):
        run(env, steps)
    env.close()
    assert [len(e) for e in env.episodes] == [4, 3]
    silent = RecordEpisodes(Counter(reports=False), only_successful=True)
    with pytest.raises(InvalidInputError, match="never reported"):
        run(silent)
    unfiltered = RecordEpisodes(Counter(reports=False))
    run(unfiltered)
    assert unfiltered.episodes[0].success is None


def test_sinks_are_functions_or_stores(tmp_path):
    received = []
    env = RecordEpisodes(Counter(), received.append, task="t")
    run(env)
    assert [len(e) for e in received] == [4]
    assert env.episodes == []
    with StoreWriter(tmp_path / "s", name="c", features=env.features) as writer:
        run(RecordEpisodes(Counter(), writer, task="t"))
    dataset = open_dataset(tmp_path / "s")
    assert dataset.features.action.low == (-1.0, -1.0)
    assert dataset.features.observations["deep/x"].n == 9
    assert dataset.info.tasks == ("t",)


def test_registered_environments_name_their_task_and_spec():
    env = RecordEpisodes(gymnasium.make("CartPole-v1"))
    env.reset(seed=1)
    for _ in range(200):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            break
    (episode,) = env.episodes
    assert episode.task == "CartPole-v1"
    assert episode.actions.dtype == np.int64
    assert episode.success is None
    assert env.env_specs["CartPole-v1"]["id"] == "CartPole-v1"
    dataset = MemoryDataset(env.episodes, env_specs=env.env_specs, features=env.features)
    assert dataset.features.action.n == 2
    env.features.check(dataset.features)


def test_recorded_environments_can_be_made_again_in_a_fresh_process():
    env = RecordEpisodes(gymnasium.make("toybox:toybox/Point-v0"))
    assert env.env_specs["toybox/Point-v0"]["id"] == "toybox:toybox/Point-v0"


def test_what_cannot_be_recorded_is_refused():
    nested = Counter(action_space=spaces.Tuple([spaces.Discrete(2)]))
    with pytest.raises(InvalidInputError, match="Tuple space"):
        RecordEpisodes(nested)
    vector = gymnasium.vector.SyncVectorEnv([Counter])
    with pytest.raises(InvalidInputError, match="SyncVectorEnv"):
        RecordEpisodes(vector)


@pytest.mark.filterwarnings("ignore:.*WARN")
def test_it_is_a_valid_gymnasium_wrapper():
    from gymnasium.utils.env_checker import check_env

    check_env(RecordEpisodes(gymnasium.make("CartPole-v1").unwrapped), skip_render_check=True)


class Stateful(Counter):
    """Names its simulator state, which it keeps in a buffer that it reuses."""

    def __init__(self, forget=False):
        super().__init__()
        self.metadata = {**self.metadata, "record_infos": ("state",)}
        self.forget = forget
        self.state = np.zeros(3)

    def reset(self, *, seed=None, options=None):
        self.state[:] = 0
        return super().reset(seed=seed)[0], {"state": self.state}

    def step(self, action):
        *rest, info = super().step(action)
        self.state += 1
        return *rest, info if self.forget else {**info, "state": self.state}


def test_arrays_of_info_that_the_environment_names_are_kept():
    env = RecordEpisodes(gymnasium.wrappers.TimeLimit(Stateful(), 100), task="count")
    for _ in range(2):
        run(env)
    for episode in env.episodes:
        assert list(episode.infos) == ["states"]
        assert narrow_states(episode.infos["states"]).tolist() == [[i] * 3 for i in range(5)]


def test_an_array_that_is_named_but_missing_is_an_error():
    env = RecordEpisodes(Stateful(forget=True))
    with pytest.raises(InvalidInputError, match=r"names 'state' .* but its info has only success"):
        run(env)


def test_a_state_that_is_no_vector_of_real_numbers_is_refused():
    env = Stateful()
    env.state = np.zeros(3, int)
    with pytest.raises(InvalidInputError, match=r"info\['state'\] of .*Stateful.*found int64"):
        run(RecordEpisodes(env))
