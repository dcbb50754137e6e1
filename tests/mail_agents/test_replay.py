"""Replaying recorded episodes: what is reproduced passes, what is not is named."""

import json
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from toybox.world import ENV_ID, demonstrations, make_dataset

from mail_agents import cli
from mail_agents.data import Episode, MemoryDataset, open_dataset, write_dataset
from mail_agents.errors import FeatureMismatchError, InvalidInputError
from mail_agents.replay import IMAGE_TOLERANCE, NUMBER_TOLERANCE, replay_dataset

SPECS = {"point": {"id": ENV_ID, "kwargs": {}}}


def changed(episode: Episode, **parts) -> Episode:
    return Episode(**{**vars(episode), **parts})


def dataset(*episodes: Episode, specs=SPECS, source=None) -> MemoryDataset:
    return MemoryDataset(episodes, "point", specs, source)


@pytest.fixture(scope="module")
def demos():
    return list(demonstrations(3))


def test_seeded_recordings_are_reproduced(point_dataset):
    found = list(replay_dataset(open_dataset(point_dataset), 2))
    assert [replayed.index for replayed in found] == [0, 1]
    for replayed in found:
        assert replayed.ok
        assert replayed.seeded
        assert replayed.success == (True, True)
        assert replayed.steps == replayed.recorded
        assert replayed.numbers is not None
        assert replayed.numbers.value == 0
        assert replayed.images is None
        assert replayed.state is None
        assert f"point, episode {replayed.index}: success" in str(replayed)


def test_every_task_is_replayed(demos):
    other = [changed(episode, task="other") for episode in demos[:2]]
    both = dataset(*demos, *other, specs={**SPECS, "other": SPECS["point"]})
    assert [r.index for r in replay_dataset(both, 2)] == [0, 1, 3, 4]


def test_another_observation_is_found_at_its_step(demos):
    state = demos[0].observations["state"].copy()
    state[2, 1] += 0.5
    (replayed,) = replay_dataset(dataset(changed(demos[0], observations={"state": state})), 1)
    assert not replayed.ok
    assert replayed.reproduced
    assert replayed.numbers is not None
    assert (replayed.numbers.key, replayed.numbers.step) == ("state", 2)
    assert replayed.numbers.value == pytest.approx(0.5)
    assert str(replayed).endswith("DIFFERS")


def test_rounding_is_no_difference(demos):
    state = demos[0].observations["state"] + np.float32(NUMBER_TOLERANCE / 3)
    (replayed,) = replay_dataset(dataset(changed(demos[0], observations={"state": state})), 1)
    assert replayed.ok


def test_other_actions_do_not_reproduce_success(demos):
    (replayed,) = replay_dataset(dataset(changed(demos[0], actions=-demos[0].actions)), 1)
    assert not replayed.reproduced
    assert "recorded success, replayed failure" in str(replayed)


def test_a_recording_without_outcome_is_not_judged_by_it(demos):
    (replayed,) = replay_dataset(dataset(changed(demos[0], meta={})), 1)
    assert replayed.ok
    assert replayed.success == (None, True)


def test_the_keyword_arguments_of_the_recording_win(demos):
    late = {"point": {"id": ENV_ID, "kwargs": {"size": 3}}}
    for source in ({"env_kwargs": {"size": 2}}, {"recorded_with": {"point": {"size": 2}}}):
        (replayed,) = replay_dataset(dataset(demos[0], specs=late, source=source), 1)
        assert replayed.ok
    with pytest.raises(FeatureMismatchError, match="store and the environment of task 'point'"):
        list(replay_dataset(dataset(demos[0], specs=late), 1))


class Drawn(gymnasium.Env):
    """Starts from a state that it is given, and shows it as a grey image."""

    metadata: ClassVar = {"render_modes": [], "record_infos": ("state",)}

    def __init__(self, error=0.0):
        self.error = error
        self.observation_space = spaces.Dict({"camera": spaces.Box(0, 255, (4, 4, 3), np.uint8)})
        self.action_space = spaces.Box(-1, 1, (1,), np.float64)

    def observe(self):
        grey = np.full((4, 4, 3), self.state[0] * 10 + self.error)
        return {"camera": grey.astype(np.uint8)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options is None:
            self.state = np.zeros(1)
        else:
            self.state = np.array(options["state"])
        return self.observe(), {"state": self.state, "success": False}

    def step(self, action):
        self.state = self.state + action
        done = bool(self.state[0] >= 5)
        return self.observe(), 0.0, done, False, {"state": self.state, "success": done}


gymnasium.register("replay/Drawn-v0", Drawn)


def drawn(alignment=None, start=2.0, seed=None) -> Episode:
    env = Drawn()
    observation, info = env.reset(options={"state": [start]})
    frames, states = [observation["camera"]], [info["state"]]
    for _ in range(3):
        observation, *_, info = env.step(np.ones(1))
        frames.append(observation["camera"])
        states.append(info["state"])
    if alignment == "after_action":
        frames = [*frames[1:], frames[-1]]
    last = np.arange(3) == 2
    return Episode(
        {"camera": np.stack(frames)},
        np.ones((3, 1)),
        np.zeros(3),
        last,
        ~last & last,
        task="grey",
        seed=seed,
        meta={"success": True, **({"alignment": alignment} if alignment else {})},
        infos={"states": np.stack(states)[: 3 if alignment else 4]},
    )


def grey(episode: Episode, **kwargs) -> MemoryDataset:
    return MemoryDataset([episode], "grey", {"grey": {"id": "replay/Drawn-v0", "kwargs": kwargs}})


@pytest.mark.parametrize("alignment", [None, "after_action"])
def test_without_a_seed_episodes_start_from_their_first_state(alignment):
    (replayed,) = replay_dataset(grey(drawn(alignment)), 1)
    assert not replayed.seeded
    assert replayed.success == (True, True)
    assert replayed.images is not None
    assert replayed.state is not None
    assert (replayed.images.value, replayed.state.value) == (0, 0)
    assert "from its first simulator state" in str(replayed)


def test_from_a_state_only_the_outcome_is_judged_and_images_by_their_mean():
    (replayed,) = replay_dataset(grey(drawn(), error=9.0), 1)
    assert replayed.images is not None
    assert replayed.images.value == 9
    assert replayed.ok
    assert not replayed.observed_alike
    for error, ok in ((IMAGE_TOLERANCE, True), (IMAGE_TOLERANCE + 1, False)):
        (replayed,) = replay_dataset(grey(drawn(start=0.0, seed=1), error=error), 1)
        assert replayed.observed_alike == ok


def test_a_start_from_a_state_takes_the_arguments_of_evaluation():
    data = MemoryDataset(
        [drawn()], "grey", {"grey": {"id": "replay/Drawn-v0"}}, {"env_kwargs": {"error": 50.0}}
    )
    (replayed,) = replay_dataset(data, 1)
    assert replayed.observed_alike


def test_what_cannot_be_replayed_is_explained(demos):
    for bad, message in (
        (dataset(changed(demos[0], seed=None)), "neither a seed nor simulator states"),
        (dataset(demos[0], specs={}), "does not name an environment for task 'point'"),
        (dataset(demos[0], specs={"point": {"id": "nowhere/X-v0"}}), "cannot be made here"),
        (dataset(changed(demos[0], task=None)), "have no task"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            list(replay_dataset(bad, 1))
    with pytest.raises(InvalidInputError, match="at least 1"):
        list(replay_dataset(dataset(demos[0]), 0))


def test_verify_replays_and_its_exit_status_tells(tmp_path, capsys, demos):
    path = make_dataset(tmp_path / "good", 3).path
    assert cli.main(["data", "verify", str(path), "--replay", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("success;") == 2
    assert "every replayed episode is repeated within tolerance" in printed
    wrong = [changed(demos[0], actions=-demos[0].actions), demos[1]]
    write_dataset(tmp_path / "bad", wrong, env_specs=json.loads(json.dumps(SPECS)))
    assert cli.main(["data", "verify", str(tmp_path / "bad")]) == 0
    assert cli.main(["data", "verify", str(tmp_path / "bad"), "--replay", "2"]) == 1
    assert "1 of 2 replayed episodes differ" in capsys.readouterr().out


def test_verify_tells_an_episode_that_only_ended_as_recorded(tmp_path, capsys):
    specs = {"grey": {"id": "replay/Drawn-v0", "kwargs": {"error": 9.0}}}
    write_dataset(tmp_path / "drifts", [drawn(), drawn(start=1.0)], env_specs=specs)
    assert cli.main(["data", "verify", str(tmp_path / "drifts"), "--replay", "1"]) == 0
    printed = capsys.readouterr().out
    assert "every replayed episode ended as recorded; 0 of 1 are repeated" in printed
    assert "drifted" in printed


def test_observations_that_the_environment_lacks_are_named_and_the_rest_is_compared():
    episode = drawn(start=0.0, seed=1)
    depth = np.zeros((4, 4, 4, 1), np.float32)
    more = changed(episode, observations={**episode.observations, "depth": depth})
    (replayed,) = replay_dataset(grey(more), 1)
    assert replayed.unseen == ("depth",)
    assert "the environment lacks them: depth" in str(replayed)
    assert replayed.images is not None
    only = changed(episode, observations={"depth": depth})
    with pytest.raises(FeatureMismatchError, match="'depth' is missing"):
        list(replay_dataset(grey(only), 1))


def test_a_meta_world_recording_is_reproduced(tmp_path):
    pytest.importorskip("metaworld")
    from mail_wrappers import RecordEpisodes

    env = RecordEpisodes(gymnasium.make("mail_envs:metaworld/reach-v3"), task="reach-v3")
    env.reset(seed=3)
    for _ in range(20):
        env.step(env.action_space.sample())
    env.close()
    specs = env.env_specs
    (replayed,) = replay_dataset(MemoryDataset(env.episodes, "mw", specs), 1)
    assert replayed.ok
    assert replayed.numbers is not None
    assert replayed.numbers.value == 0
