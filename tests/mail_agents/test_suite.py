"""Evaluating on the worlds a dataset came from, and reading it back."""

import json
from functools import partial

import gymnasium
import numpy as np
import pytest
from toybox.sequence import SequenceAgent, SequenceConfig
from toybox.world import ENV_ID, PointEnv, demonstrations

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.errors import InvalidInputError
from mail_agents.features import FeatureSpec
from mail_agents.suite import (
    World,
    completed_evaluations,
    completed_targets,
    evaluate_worlds,
    evaluation_directory,
    played_world,
    played_worlds,
    recorded_videos,
    worlds_of,
    write_video,
)

FEATURES = FeatureSpec.from_spaces(PointEnv().observation_space, PointEnv().action_space)


@pytest.fixture
def agent():
    return mail_agents.make("random", FEATURES, device="cpu")


def test_worlds_come_from_stored_specs_without_their_entry_points():
    spec = {
        "id": ENV_ID,
        "kwargs": {"terminate": True},
        "max_episode_steps": 5,
        "entry_point": "os:system",
        "additional_wrappers": [{"name": "x", "entry_point": "os:system", "kwargs": {}}],
    }
    (world,) = worlds_of({"reach": spec})
    assert world == World("reach", ENV_ID, {"terminate": True}, 5)
    env = world.maker(render_mode="rgb_array")()
    assert isinstance(env.unwrapped, PointEnv)
    assert env.unwrapped.terminate
    assert env.render_mode == "rgb_array"
    assert env.spec is not None
    assert env.spec.max_episode_steps == 5
    # No limit stored: the world's own.
    plain = World.from_spec("reach", {"id": ENV_ID}).maker()()
    assert plain.spec is not None
    assert plain.spec.max_episode_steps == 12


def test_missing_worlds_say_what_to_do():
    with pytest.raises(InvalidInputError, match=r"--env ID.*--eval-episodes 0"):
        worlds_of({})
    with pytest.raises(InvalidInputError, match=r"task 'reach' has no id"):
        worlds_of({"reach": {"kwargs": {}}})
    with pytest.raises(InvalidInputError, match=r"'Absent-v0' of task 'reach'.*--eval-episodes 0"):
        worlds_of({"reach": {"id": "Absent-v0"}})
    with pytest.raises(InvalidInputError, match=r"'no_such_module:Absent-v0'.*no_such_module"):
        worlds_of({"reach": {"id": "no_such_module:Absent-v0"}})


def test_every_task_is_evaluated_saved_and_read_back(agent, tmp_path):
    worlds = [
        World("near/by", ENV_ID, {"terminate": True}),
        World("far", ENV_ID, {}, max_steps=4),
    ]
    said = []
    directory = evaluation_directory(tmp_path, 20)
    found = evaluate_worlds(
        agent, worlds, 3, seed=1, n_envs=2, directory=directory, videos=1, say=said.append
    )
    assert list(found) == ["near/by", "far"]
    assert [line.partition(":")[0] for line in said] == ["near/by", "far"]
    assert {e.length for e in found["far"].episodes} == {4}
    # The same initial states for every task and agent.
    assert [e.seed for e in found["far"].episodes] == [e.seed for e in found["near/by"].episodes]

    names = ["near/by", "far"]
    read = completed_evaluations(tmp_path, names)
    assert list(read) == [20]
    assert [task.task for task in read[20]] == names
    assert [task.n for task in read[20]] == [3, 3]
    videos = recorded_videos(directory)
    assert {video.task for video in videos} == {"near-by", "far"}
    assert all(video.success is False or video.success is True for video in videos)

    # What was played is kept with it.
    assert played_worlds(directory, [*names, "none"]) == dict.fromkeys(names, "toybox/Point-v0")
    assert played_world({"env": "hop-v1", "simulator": "Bouncy 3"}) == "hop-v1 (Bouncy 3)"

    # An evaluation that was cut short is not a result.
    evaluate_worlds(
        agent, worlds[:1], 3, seed=1, directory=evaluation_directory(tmp_path, 30), say=said.append
    )
    assert list(completed_evaluations(tmp_path, names)) == [20]
    assert completed_evaluations(tmp_path / "nowhere", names) == {}


@pytest.fixture
def seeker():
    """An agent that aims for a return."""
    agent = SequenceAgent(SequenceConfig(), FEATURES, device="cpu")
    agent.fit_statistics(MemoryDataset(demonstrations(2)))
    return agent


def test_every_target_is_evaluated_and_the_first_is_the_headline(seeker, tmp_path):
    worlds = [World("near/by", ENV_ID, {"terminate": True}), World("far", ENV_ID, {})]
    said = []
    directory = evaluation_directory(tmp_path, 20)
    targets = (-1.0, 3600.0, 0.25)
    found = evaluate_worlds(
        seeker, worlds, 2, seed=1, directory=directory, target_returns=targets, say=said.append
    )
    assert [evaluation.protocol["target_return"] for evaluation in found.values()] == [-1, -1]
    assert [line.partition(": ")[0] for line in said[:3]] == [
        "near/by, target -1",
        "near/by, target 3600",
        "near/by, target 0.25",
    ]
    for name in ("near-by", "far"):
        folders = sorted(path.name for path in (directory / name).iterdir() if path.is_dir())
        assert folders == ["target-0.25", "target-3600"]
    tasks = ["near/by", "far"]
    (headline,) = completed_evaluations(tmp_path, tasks).values()
    assert [task.task for task in headline] == tasks
    assert {episode["target_return"] for task in headline for episode in task.episodes} == {-1.0}
    others = completed_targets(directory, tasks)
    assert list(others) == ["0.25", "3600"]
    for name, results in others.items():
        assert [task.task for task in results] == tasks
        records = [episode for task in results for episode in task.episodes]
        assert {episode["target_return"] for episode in records} == {float(name)}
    # Of a killed run, only what every task has.
    (directory / "far" / "target-3600" / "episodes.jsonl").unlink()
    assert list(completed_targets(directory, tasks)) == ["0.25"]
    assert completed_targets(tmp_path / "none", tasks) == {}


def test_without_targets_the_agent_aims_for_its_own(seeker, tmp_path):
    said = []
    (found,) = evaluate_worlds(
        seeker, [World("far", ENV_ID, {})], 2, seed=1, directory=tmp_path, say=said.append
    ).values()
    assert found.protocol["target_return"] == 0.0
    assert said[0].startswith("far, target 0: ")
    assert not [path for path in (tmp_path / "far").iterdir() if path.is_dir()]


def test_a_new_evaluation_takes_the_place_of_an_earlier_one(seeker, tmp_path):
    worlds = [World("near", ENV_ID, {"terminate": True}), World("far", ENV_ID, {})]
    play = partial(evaluate_worlds, seeker, seed=1, directory=tmp_path, say=lambda _: None)
    play(worlds, 2, target_returns=(-1.0, 5.0), videos=1)
    (tmp_path / "far" / "notes.txt").write_text("mine")
    assert recorded_videos(tmp_path)
    play(worlds[:1], 2, target_returns=(-1.0, 7.0))
    assert list(completed_targets(tmp_path, ["near"])) == ["7"]
    assert {video.task for video in recorded_videos(tmp_path)} == {"far"}
    # Killed after the first of two tasks, it leaves none of the other's old results.
    broken = [worlds[0], World("far", "toybox/Nowhere-v0", {})]
    with pytest.raises(gymnasium.error.Error):
        play(broken, 2)
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["notes.txt"]
    assert completed_targets(tmp_path, ["near"]) == {}


def test_targets_that_cannot_be_meant(agent, seeker):
    worlds = [World("far", ENV_ID, {})]
    with pytest.raises(InvalidInputError, match=r"'random' does not use target returns"):
        evaluate_worlds(agent, worlds, 1, seed=0, target_returns=[1.0])
    for words, wrong in (
        ("must differ", ([1.0, 1.0], [1.0, 1.0000001])),
        ("must be finite", ([float("nan")], [1.0, float("inf")])),
    ):
        for targets in wrong:
            with pytest.raises(InvalidInputError, match=words):
                evaluate_worlds(seeker, worlds, 1, seed=0, target_returns=targets)


def test_the_saved_protocol_says_how_the_world_was_made(agent, tmp_path):
    world = World("far", ENV_ID, {"size": 2, "terminate": True}, max_steps=3)
    evaluate_worlds(agent, [world], 1, seed=0, directory=tmp_path, videos=1)
    protocol = json.loads((tmp_path / "far" / "summary.json").read_text())["protocol"]
    assert protocol["env"] == ENV_ID.partition(":")[2]
    assert protocol["env_kwargs"] == {"size": 2, "terminate": True}
    assert protocol["max_steps"] == 3


def test_nothing_is_written_without_a_directory(agent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate_worlds(agent, [World("a", ENV_ID, {})], 1, seed=0)
    assert not list(tmp_path.iterdir())


def test_videos_can_be_read_again(tmp_path):
    import imageio.v2 as imageio

    frames = [np.full((33, 31, 3), 20 * i, np.uint8) for i in range(8)]  # odd sizes included
    path = write_video(tmp_path / "new" / "a.mp4", frames, fps=10)
    with imageio.get_reader(path) as reader:
        assert reader.get_meta_data()["fps"] == 10
        read = [np.asarray(frame) for frame in reader]
    assert len(read) == 8
    assert read[0].mean() < 10 < 120 < read[-1].mean()


def test_worlds_that_do_not_exist(agent):
    with pytest.raises(gymnasium.error.Error):
        evaluate_worlds(agent, [World("a", "toybox/Nowhere-v0", {})], 1, seed=0)
