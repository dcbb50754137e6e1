"""Evaluating on the worlds a dataset came from, and reading it back."""

import gymnasium
import numpy as np
import pytest
from toybox.world import ENV_ID, PointEnv

import mail_agents
from mail_agents.errors import InvalidInputError
from mail_agents.features import FeatureSpec
from mail_agents.suite import (
    World,
    completed_evaluations,
    evaluate_worlds,
    evaluation_directory,
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

    # An evaluation that was cut short is not a result.
    evaluate_worlds(
        agent, worlds[:1], 3, seed=1, directory=evaluation_directory(tmp_path, 30), say=said.append
    )
    assert list(completed_evaluations(tmp_path, names)) == [20]
    assert completed_evaluations(tmp_path / "nowhere", names) == {}


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
