"""Minari to store to Minari, and store to Minari to store: nothing may change."""

import json
import os

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from mail_agents.data import Episode, MemoryDataset, StoreWriter, open_dataset, write_dataset
from mail_agents.errors import InvalidInputError, StorageError, UnknownNameError
from mail_agents.features import Feature, FeatureSpec
from mail_wrappers.datasets import minari as adapter
from mail_wrappers.datasets import minari_export
from mail_wrappers.datasets.minari import (
    MinariReferenceWarning,
    convert_minari,
    read_minari,
    write_minari,
)

minari = pytest.importorskip("minari")
from minari.data_collector import EpisodeBuffer  # noqa: E402

NESTED = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (40, 33, 3), np.uint8),  # Minari would use JPEG
        "robot": spaces.Dict(
            {"q": spaces.Box(-1, 1, (3,), np.float32), "gear": spaces.Discrete(4)}
        ),
        "pair": spaces.Tuple([spaces.Box(-9, 9, (2,), np.float64), spaces.MultiBinary(3)]),
        "say": spaces.Text(16),
    }
)


def buffer(rng: np.random.Generator, length: int, number: int, action_space) -> EpisodeBuffer:
    rows = length + 1
    if isinstance(action_space, spaces.Discrete):
        actions = rng.integers(0, 5, length)
    else:
        actions = rng.normal(size=(length, 2)).astype(np.float32)
    return EpisodeBuffer(
        id=number,
        seed=None if number == 1 else 100 + number,
        options={"level": number, "start": np.array([0.5, 1.0])} if number == 2 else None,
        observations={
            "camera": rng.integers(0, 256, (rows, 40, 33, 3), dtype=np.uint8),
            "robot": {
                "q": rng.normal(size=(rows, 3)).astype(np.float32),
                "gear": rng.integers(0, 4, rows),
            },
            "pair": (rng.normal(size=(rows, 2)), rng.integers(0, 2, (rows, 3)).astype(np.int8)),
            "say": [f"word {number} é"] * rows,
        },
        actions=actions,
        rewards=rng.normal(size=length),
        terminations=np.arange(length) == length - 1,
        truncations=np.zeros(length, bool),
        infos={
            "success": np.arange(rows) == 2 if number else np.zeros(rows, bool),
            "sim": {"qpos": rng.normal(size=(rows, 4)), "note": ["a", "bc"] * (rows // 2)},
        },
    )


def make_minari(dataset_id: str, action_space, **extra):
    rng = np.random.default_rng(0)
    dataset = minari.create_dataset_from_buffers(
        dataset_id,
        [buffer(rng, 3 + 2 * i, i, action_space) for i in range(3)],
        observation_space=NESTED,
        action_space=action_space,
        author={"Ada", "Grace"},
        author_email="ada@example.org",
        algorithm_name="scripted",
        code_permalink="https://example.org/code",
        description="three episodes",
        requirements=["gymnasium>=1.0"],
        data_format="hdf5",
        jpeg_encoding=False,
        **extra,
    )
    spec = gymnasium.spec("CartPole-v1").to_json()
    dataset.storage.update_metadata(
        {"env_spec": spec, "eval_env_spec": spec, "ref_min_score": -1.5, "ref_max_score": 20.0}
    )
    dataset.storage.update_episode_metadata(
        [{"grade": i, "rewards": np.arange(3.0)} for i in range(3)], range(3)
    )
    return minari.load_dataset(dataset_id)


def same_tree(left, right, path="") -> None:
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert set(left) == set(right), path
        for key in left:
            same_tree(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, tuple):
        assert len(left) == len(right), path
        for i, pair in enumerate(zip(left, right, strict=True)):
            same_tree(*pair, f"{path}/{i}")
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype, path
        np.testing.assert_array_equal(left, right, err_msg=path)
    else:
        assert left == right, path


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.parametrize("action_space", [spaces.Discrete(5), spaces.Box(-1, 1, (2,), np.float32)])
def test_minari_to_store_to_minari_is_the_identity(tmp_path, action_space):
    original = make_minari("test/original-v0", action_space)
    store = convert_minari("test/original-v0", tmp_path / "store")
    again = write_minari(store, "test/copy-v3")
    assert not list(again.storage.data_path.parent.parent.glob(".*"))
    for left, right in zip(original, again, strict=True):
        for name in ("observations", "actions", "rewards", "terminations", "truncations", "infos"):
            same_tree(getattr(left, name), getattr(right, name), name)
    for left, right in zip(
        original.storage.get_episode_metadata(range(3)),
        again.storage.get_episode_metadata(range(3)),
        strict=True,
    ):
        same_tree({**left, "id": int(left["id"])}, {**right, "id": int(right["id"])})
    assert again.observation_space == original.observation_space
    assert again.action_space == original.action_space
    assert again.env_spec == original.env_spec
    assert again.spec.total_steps == original.spec.total_steps
    ours, theirs = dict(again.storage.metadata), dict(original.storage.metadata)
    changed = ("dataset_id", "dataset_size", minari_export.EXTRAS)
    assert {k: v for k, v in ours.items() if k not in changed} == {
        k: v for k, v in theirs.items() if k not in changed
    }
    assert ours["dataset_id"] == "test/copy-v3"
    assert ours["author"] == {"Ada", "Grace"}
    assert minari.get_normalized_score(again, np.array(20.0)) == 1.0
    assert "test/copy-v3" in minari.list_local_datasets()


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_what_a_converted_store_knows(tmp_path):
    source = make_minari("test/known-v0", spaces.Discrete(5))
    store = convert_minari(source, tmp_path / "store")
    episodes = list(read_minari(source))
    assert set(store.features.observations) == {
        *("camera", "robot/q", "robot/gear", "pair/0", "pair/1", "say")
    }
    assert store.features.observations["camera"].kind == "image"
    assert store.features.observations["robot/gear"].n == 4
    assert store.features.action.n == 5
    assert [e.seed for e in episodes] == [100, None, 102]
    assert [e.success for e in episodes] == [False, True, True]
    assert [e.task for e in episodes] == ["CartPole-v1"] * 3
    assert episodes[2].meta["options"] == {"level": 2, "start": pytest.approx([0.5, 1.0])}
    assert episodes[1].infos["sim/note"].tolist()[:2] == ["a", "bc"]
    assert store.info.env_specs["CartPole-v1"]["id"] == "CartPole-v1"
    assert store.info.reference_scores == {
        "CartPole-v1": {"min": -1.5, "max": 20.0, "source": "minari:test/known-v0"}
    }
    assert store.info.source["id"] == "test/known-v0"
    assert len(store.info.source["sha256"]) == 64
    assert store.table.source_ids == ("0", "1", "2")
    # by folder as well, and with a subset
    assert len(list(read_minari(source.storage.data_path))) == 3
    assert len(list(read_minari(source.storage.data_path.parent))) == 3
    some = source.filter_episodes(lambda e: e.id != 1)
    subset = convert_minari(some, tmp_path / "subset")
    assert subset.table.source_ids == ("0", "2")
    assert subset.info.source["episodes"] == [0, 2]


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_published_references_that_are_no_scale_are_left_out(tmp_path):
    source = make_minari("test/flat-v0", spaces.Discrete(5))
    source.storage.update_metadata({"ref_min_score": 20.0, "ref_max_score": 20.0})
    with pytest.warns(MinariReferenceWarning, match="Left out: .*'CartPole-v1'.*20.0") as caught:
        store = convert_minari(source, tmp_path / "store")
    assert caught[0].filename == __file__
    assert store.info.reference_scores == {}
    assert store.info.source["metadata"]["ref_max_score"] == 20.0


def two_tasks() -> list[Episode]:
    rng = np.random.default_rng(3)
    return [
        Episode(
            observations={
                "state": rng.normal(size=(4, 3)),
                "cam/front": rng.integers(0, 256, (4, 36, 36, 3), dtype=np.uint8),
                "deep/er/flag": rng.random((4, 2)) > 0.5,
                "count": rng.integers(-5, 5, (4, 2)),
                "say": np.array([f"müde {i}"] * 4),
            },
            actions=rng.normal(size=(3, 2)),
            rewards=rng.normal(size=3).astype(np.float32),
            terminations=np.zeros(3, bool),
            truncations=np.array([False, False, True]),
            task=["open the drawer", "close it", None][i],
            seed=[5, 2**80, None][i],
            meta={"success": True, "expert": {"noise": 0.1}, "source_id": f"demo_{i}"},
            infos={"a/b": rng.normal(size=(4, 1)), "c": np.arange(3)},
        )
        for i in range(3)
    ]


def test_store_to_minari_to_store_keeps_everything(tmp_path, same_episode):
    features = MemoryDataset(two_tasks()).features
    action = Feature("state", (2,), "float64", low=(-2.0, -1.0), high=(2.0, 1.0))
    spec = json.loads(gymnasium.spec("CartPole-v1").to_json())
    store = write_dataset(
        tmp_path / "a",
        two_tasks(),
        features=FeatureSpec(features.observations, action),
        env_specs={"open the drawer": spec, "close it": {**spec, "id": "Other-v0"}},
        reference_scores={"close it": {"min": 0.0, "max": 2.0}},
    )
    exported = write_minari(store, "mine/tasks-v1", metadata={"author": "Ada", "description": "x"})
    assert exported.storage.metadata["author"] == {"Ada"}
    assert exported.action_space == spaces.Box(
        np.array([-2.0, -1.0]), np.array([2.0, 1.0]), dtype=np.float64
    )
    assert exported[0].observations["cam"]["front"].shape == (4, 36, 36, 3)
    again = convert_minari("mine/tasks-v1", tmp_path / "b")
    for i, episode in enumerate(two_tasks()):
        same_episode(again.episode(i), episode)
    assert again.features == store.features
    assert again.info.sha256 == store.info.sha256
    assert again.info.env_specs == store.info.env_specs
    assert again.info.reference_scores == store.info.reference_scores


def test_a_memory_dataset_with_one_bare_state_becomes_a_box():
    rng = np.random.default_rng(0)
    episode = Episode(
        {"state": rng.normal(size=(3, 2))}, np.array([1, 0]), np.zeros(2), *np.zeros((2, 2), bool)
    )
    declared = FeatureSpec(
        {"state": Feature("state", (2,), "float64")}, Feature("scalar", (), "int64", n=2)
    )
    exported = write_minari(MemoryDataset([episode], features=declared), "bare-v0")
    assert isinstance(exported.observation_space, spaces.Box)
    assert exported.action_space == spaces.Discrete(2)
    np.testing.assert_array_equal(exported[0].observations, episode.observations["state"])


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_missions_are_tasks():
    space = spaces.Dict({"state": spaces.Box(-1, 1, (1,)), "mission": spaces.Text(20)})
    buffers = [
        EpisodeBuffer(
            observations={"state": np.zeros((3, 1), np.float32), "mission": [mission] * 3},
            actions=np.zeros(2, np.int64),
            rewards=[0.0, 1.0],
            terminations=[False, True],
            truncations=[False, False],
        )
        for mission in ("go left", "go right")
    ]
    dataset = minari.create_dataset_from_buffers(
        "mission-v0", buffers, observation_space=space, action_space=spaces.Discrete(3)
    )
    assert [e.task for e in read_minari(dataset)] == ["go left", "go right"]


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_an_interrupted_conversion_is_continued(tmp_path, monkeypatch):
    make_minari("test/long-v0", spaces.Discrete(5))
    whole = convert_minari("test/long-v0", tmp_path / "whole")
    add, read = StoreWriter.add, []

    def failing(self, episode, source_id=None):
        if len(self.completed) == 2:
            raise KeyboardInterrupt
        add(self, episode, source_id)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", failing)
        with pytest.raises(KeyboardInterrupt):
            convert_minari("test/long-v0", tmp_path / "s")
    episode = adapter._episode
    monkeypatch.setattr(adapter, "_episode", lambda *a: (read.append(1), episode(*a))[1])
    again = convert_minari("test/long-v0", tmp_path / "s")
    assert len(read) == 1
    assert again.info == whole.info


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_an_interrupted_export_is_not_listed(monkeypatch):
    store = MemoryDataset(two_tasks())

    def broken(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(minari_export, "_write_episode", broken)
        with pytest.raises(StorageError, match=r"disk full.*MINARI_DATASETS_PATH"):
            write_minari(store, "mine/partial-v0")
    assert minari.list_local_datasets() == {}
    assert len(write_minari(store, "mine/partial-v0")) == 3


def test_errors_name_the_way_out(tmp_path):
    write_minari(MemoryDataset(two_tasks()), "mine/tasks-v0")
    with pytest.raises(UnknownNameError) as caught:
        next(read_minari("mine/task-v0"))
    message = str(caught.value)
    assert "Did you mean 'mine/tasks-v0'" in message
    assert "minari download mine/task-v0" in message
    assert os.environ["MINARI_DATASETS_PATH"] in message
    with pytest.raises(InvalidInputError, match="minari delete mine/tasks-v0"):
        write_minari(MemoryDataset(two_tasks()), "mine/tasks-v0")
    with pytest.raises(InvalidInputError, match="Malformed"):
        write_minari(MemoryDataset(two_tasks()), "no version")
    with pytest.raises(InvalidInputError, match="total_steps"):
        write_minari(MemoryDataset(two_tasks()), "mine/x-v0", metadata={"total_steps": 1})
    convert_minari("mine/tasks-v0", tmp_path / "s")
    with pytest.raises(InvalidInputError, match="overwrite"):
        convert_minari("mine/tasks-v0", tmp_path / "s")
    assert len(convert_minari("mine/tasks-v0", tmp_path / "s", overwrite=True)) == 3
    assert len(open_dataset(tmp_path / "s")) == 3


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_nested_actions_are_refused():
    space = spaces.Dict({"a": spaces.Discrete(2)})
    dataset = minari.create_dataset_from_buffers(
        "nested-v0",
        [
            EpisodeBuffer(
                observations=np.zeros((2, 1), np.float32),
                actions={"a": np.zeros(1, np.int64)},
                rewards=[0.0],
                terminations=[True],
                truncations=[False],
            )
        ],
        observation_space=spaces.Box(-1, 1, (1,)),
        action_space=space,
    )
    with pytest.raises(InvalidInputError, match="Dict actions"):
        next(read_minari(dataset))


def test_minari_is_imported_only_when_used(repository):
    import subprocess
    import sys

    code = (
        "import sys, mail_wrappers, mail_wrappers.datasets.minari, mail_agents.data; "
        "assert not {'minari', 'torch', 'h5py'} & set(sys.modules), sorted(sys.modules)"
    )
    paths = os.pathsep.join(str(repository / p) for p in (".", "wrappers"))
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths}
    )


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.filterwarnings("ignore::UserWarning:gymnasium")
def test_mazes_of_d4rl_keep_their_scores_and_the_environment_of_evaluation(tmp_path):
    pytest.importorskip("gymnasium_robotics")
    goal = [[1, 1, 1, 1, 1], [1, "g", 0, 0, 1], [1, 1, 1, 0, 1], [1, "r", 0, 0, 1], [1] * 5]
    env = gymnasium.make("PointMaze_UMaze-v3", max_episode_steps=9)
    keys = ("observation", "achieved_goal", "desired_goal")
    buffers = []
    for number in range(2):
        seen, rewards = [env.reset(seed=number)[0]], []
        actions = [env.action_space.sample() for _ in range(9)]
        for action in actions:
            observation, reward, *_ = env.step(action)
            seen.append(observation)
            rewards.append(reward)
        buffers.append(
            EpisodeBuffer(
                id=number,
                observations={key: np.array([item[key] for item in seen]) for key in keys},
                actions=np.array(actions),
                rewards=np.array(rewards),
                terminations=np.zeros(9, bool),
                truncations=np.arange(9) == 8,
            )
        )
    evaluation = gymnasium.make("PointMaze_UMaze-v3", maze_map=goal, max_episode_steps=300)
    dataset = minari.create_dataset_from_buffers(
        "D4RL/pointmaze/umaze-v2",
        buffers,
        env=env,
        eval_env=evaluation,
        ref_min_score=24.0,
        ref_max_score=162.0,
        algorithm_name="random",
        code_permalink="https://example.org",
        author="Ada",
        author_email="ada@example.org",
        description="two episodes",
    )
    store = convert_minari(dataset, tmp_path / "store")
    task = "PointMaze_UMaze-v3"
    assert set(store.features.observations) == set(keys)
    assert store.lengths.tolist() == [9, 9]
    spec = store.info.env_specs[task]
    assert (spec["id"], spec["max_episode_steps"]) == (f"gymnasium_robotics:{task}", 300)
    assert spec["kwargs"]["maze_map"] == goal
    made = gymnasium.make(spec["id"], max_episode_steps=300, **spec["kwargs"])
    store.features.check(FeatureSpec.from_spaces(made.observation_space, made.action_space))
    source = "minari:D4RL/pointmaze/umaze-v2"
    assert store.info.reference_scores == {task: {"min": 24.0, "max": 162.0, "source": source}}
    again = write_minari(store, "test/umaze-v0")
    assert again.storage.metadata["ref_max_score"] == 162.0
    assert again.storage.metadata["eval_env_spec"] == dataset.storage.metadata["eval_env_spec"]
