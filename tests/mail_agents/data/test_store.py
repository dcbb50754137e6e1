"""The store keeps every bit, opens lazily, and behaves like the dataset in memory."""

import json
import multiprocessing
import pickle
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mail_agents.data import (
    Episode,
    MemoryDataset,
    StoreWriter,
    WindowSpec,
    open_dataset,
    store,
    verify_dataset,
    write_dataset,
)
from mail_agents.data import writer as writer_module
from mail_agents.data.files import ColumnFile
from mail_agents.errors import FeatureMismatchError, InvalidInputError
from mail_agents.features import Feature, FeatureSpec

DTYPES = ["f4", "f8", ">f8", "f2", "i1", "i8", "u1", "u2", "?"]


@st.composite
def episode_lists(draw):
    """One to four episodes that share a random schema of keys, dtypes and shapes."""
    keys = draw(
        st.lists(
            st.sampled_from(["a", "A", "a/b", "con", "x:y*?", "ключ", "z" * 80]),
            unique=True,
            min_size=1,
            max_size=4,
        )
    )
    schema = {
        key: (draw(st.sampled_from([*DTYPES, "U"])), draw(hnp.array_shapes(min_dims=0, max_dims=3)))
        for key in keys
    }
    schema["action!"] = (
        draw(st.sampled_from(DTYPES)),
        draw(hnp.array_shapes(min_dims=0, max_dims=2)),
    )

    def array(kind: str, rows: int, shape: tuple[int, ...]) -> np.ndarray:
        if kind == "U":
            text = draw(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6))
            return np.full((rows, *shape), text, np.dtype(f"U{draw(st.integers(6, 9))}"))
        elements = None
        if np.dtype(kind).kind == "f":
            elements = st.sampled_from([0.0, -0.0, 1.5, -2.0, 6e-5])
        return draw(hnp.arrays(np.dtype(kind), (rows, *shape), elements=elements))

    episodes = []
    for number in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 4))
        kind, shape = schema["action!"]
        infos = {}
        if draw(st.booleans()):
            infos["i"] = np.full((length + draw(st.integers(0, 1)), 2), np.nan, np.float32)
        episodes.append(
            Episode(
                observations={
                    key: array(*schema[key][:1], length + 1, schema[key][1]) for key in keys
                },
                actions=array(kind, length, shape),
                rewards=array("f4", length, ()),
                terminations=array("?", length, ()),
                truncations=array("?", length, ()),
                task=draw(st.sampled_from([None, "t", "put ü"])),
                seed=draw(st.sampled_from([None, 0, 7, 2**63, 2**100])),
                meta={"n": number, "nested": {"ü": [1, None, "x"]}},
                infos=infos,
            )
        )
    return episodes


@settings(max_examples=40, deadline=None)
@given(episodes=episode_lists())
def test_round_trip_keeps_every_bit(tmp_path_factory, same_episode, episodes):
    path = tmp_path_factory.mktemp("store") / "s"
    dataset = write_dataset(path, episodes, name="x")
    memory = MemoryDataset(episodes, name="x")
    assert len(dataset) == len(memory) == len(episodes)
    for i, episode in enumerate(episodes):
        same_episode(dataset.episode(i), episode)
        same_episode(memory.episode(i), episode)
    assert dataset.info.sha256 == memory.info.sha256
    assert dataset.features == memory.features
    assert dataset.lengths.tolist() == [len(e) for e in episodes]
    names = [file.name for file in path.iterdir()]
    assert all(name.isascii() and name == name.lower() for name in names)
    assert all(not set(name) & set('<>:"/\\|?* ') for name in names)
    assert not list(path.parent.glob(".*")), "nothing is left beside the store"


def test_store_and_memory_give_the_same_windows_and_statistics(tmp_path, make_episode):
    episodes = [make_episode(i, 5 + i) for i in range(4)]
    dataset, memory = write_dataset(tmp_path / "s", episodes), MemoryDataset(episodes)
    assert isinstance(dataset.column("obs/cameras/front").base, np.memmap)
    assert not isinstance(dataset.column("obs/state").base, np.memmap)
    for padding in ("edge", "none"):
        ours = dataset.windows(WindowSpec(3, 2, padding), [2, 0])[:]
        theirs = memory.windows(WindowSpec(3, 2, padding), [2, 0])[:]
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key])
            assert ours[key].dtype == theirs[key].dtype
    np.testing.assert_array_equal(dataset.stats([1])["state"].mean, memory.stats([1])["state"].mean)


def test_columns_above_the_threshold_stay_on_disk(tmp_path, make_episode, monkeypatch):
    write_dataset(tmp_path / "s", [make_episode(0, 50)])
    monkeypatch.setattr(store, "RAM_BYTES", 0)
    dataset = open_dataset(tmp_path / "s")
    assert isinstance(dataset.column("obs/state").base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        dataset.column("obs/state")[0] = 1
    assert dataset.windows(WindowSpec(2, 2))[3]["obs/state"].shape == (2, 3)


def test_info_is_kept(tmp_path, make_episode):
    facts = {
        "env_specs": {"task 0": {"id": "Env-v0", "kwargs": {"a": [1, 2]}}},
        "source": {"kind": "test", "id": "x", "sha256": "00"},
        "reference_scores": {"task 0": {"min": -1.5, "max": 3.0}},
    }
    episodes = [make_episode(i, 3) for i in range(3)]
    info = write_dataset(tmp_path / "s", episodes, name="demo", **facts).info
    assert info == MemoryDataset(episodes, name="demo", **facts).info
    assert (info.name, info.tasks, info.n_episodes, info.n_steps) == (
        "demo",
        ("task 0", "task 1"),
        3,
        9,
    )
    assert verify_dataset(tmp_path / "s") == info
    assert open_dataset(tmp_path / "s").task_ids.tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    "pair",
    [
        {"min": 5.0, "max": 5.0},
        {"min": 9.0, "max": 1.0},
        {"min": float("nan"), "max": 1.0},
        {"min": 0.0, "max": float("inf")},
        {"min": 0.0},
        {"min": "low", "max": "high"},
        (0.0, 1.0),
    ],
)
def test_reference_scores_that_are_no_scale_are_refused(tmp_path, make_episode, pair):
    scores = {"task 1": {"min": 0.0, "max": 1.0}, "task 0": pair}

    def episodes():
        raise AssertionError("nothing is read")
        yield

    for write in (partial(write_dataset, tmp_path / "s"), MemoryDataset):
        with pytest.raises(InvalidInputError, match=r"task 'task 0'.*maximum is above the minimum"):
            write(episodes(), reference_scores=scores)
    assert list(tmp_path.iterdir()) == []
    # Those that become known at the end are checked there, and the episodes are not lost.
    writer = StoreWriter(tmp_path / "s", name="late")
    writer.add(make_episode(0, 3))
    writer.reference_scores["task 0"] = pair
    with pytest.raises(InvalidInputError, match="task 'task 0'"), writer:
        pass
    assert not (tmp_path / "s").exists()
    with StoreWriter(tmp_path / "s", name="late") as writer:
        assert writer.completed == {"demo_0"}
        writer.reference_scores = {"task 0": {"min": np.float32(0.5), "max": 2, "source": "me"}}
    assert open_dataset(tmp_path / "s").info.reference_scores == {
        "task 0": {"min": 0.5, "max": 2.0, "source": "me"}
    }


def test_content_hash_sees_content_and_nothing_else(tmp_path, make_episode):
    one = write_dataset(tmp_path / "a", [make_episode(0, 3)], source={"id": "1"}).info.sha256
    assert one == MemoryDataset([make_episode(0, 3)], name="other").info.sha256
    changed = make_episode(0, 3)
    changed.observations["state"][2, 0] += 1e-12
    assert MemoryDataset([changed]).info.sha256 != one
    assert MemoryDataset([make_episode(0, 4)]).info.sha256 != one


def test_declared_features_add_bounds_and_kinds(tmp_path):
    episode = Episode(
        observations={"points": np.zeros((4, 8, 3)), "image": np.zeros((4, 2, 2, 3), np.uint8)},
        actions=np.array([0, 2, 1]),
        rewards=np.zeros(3),
        terminations=np.zeros(3, bool),
        truncations=np.zeros(3, bool),
    )
    declared = FeatureSpec(
        {
            "points": Feature("pointcloud", (8, 3), "float32"),
            "image": Feature("image", (2, 2, 3), "uint8"),
        },
        Feature("scalar", (), "int64", n=3),
    )
    dataset = write_dataset(tmp_path / "s", [episode], features=declared)
    assert dataset.features.action == declared.action
    assert dataset.features.observations["points"].kind == "pointcloud"
    assert dataset.features.observations["points"].dtype == "float64", "the data decides the dtype"
    assert dataset.stats()["points"].mean.shape == (3,)
    wrong = FeatureSpec(declared.observations, Feature("state", (2,), "float32"))
    with pytest.raises(FeatureMismatchError, match=r"action is declared with shape \(2,\)"):
        write_dataset(tmp_path / "w", [episode], features=wrong)
    with pytest.raises(FeatureMismatchError, match="Declared observations"):
        MemoryDataset([episode], features=FeatureSpec({"x": declared.action}, declared.action))


def _replace(episode: Episode, **changes) -> Episode:
    fields = {
        k: getattr(episode, k)
        for k in ("observations", "actions", "rewards", "terminations", "truncations")
    }
    return Episode(**{**fields, **changes})


@pytest.mark.parametrize("where", ["store", "memory"])
def test_episodes_that_disagree_are_refused(tmp_path, make_episode, where):
    good = make_episode(0, 3)
    observations = dict(good.observations)
    bad = {
        "shape": _replace(good, actions=np.zeros((3, 4), np.float32)),
        "dtype": _replace(good, rewards=good.rewards.astype(np.float32)),
        "extra key": _replace(good, observations={**observations, "more": np.zeros(4)}),
        "missing key": _replace(good, observations={"state": observations["state"]}),
    }
    build = partial(write_dataset, tmp_path / "s") if where == "store" else MemoryDataset
    for episode in bad.values():
        with pytest.raises(FeatureMismatchError, match=r"Episode 1.*agree"):
            build([good, episode])
        assert not (tmp_path / "s").exists()


def test_what_cannot_be_stored_is_refused(tmp_path, make_episode):
    good = make_episode(0, 3)
    with pytest.raises(InvalidInputError, match="meta is not JSON-ready"):
        MemoryDataset([_replace(good, meta={"x": object()})])
    with pytest.raises(InvalidInputError, match="meta is not JSON-ready"):
        MemoryDataset([_replace(good, meta={"x": float("nan")})])
    dates = np.zeros(4, "datetime64[s]")
    with pytest.raises(InvalidInputError, match="dtype datetime64"):
        MemoryDataset([_replace(good, infos={"when": dates})])
    for build in (MemoryDataset, lambda episodes: write_dataset(tmp_path / "s", episodes)):
        with pytest.raises(InvalidInputError, match=r"at least one episode|No episode was added"):
            build([])
    assert not list(tmp_path.iterdir())


def test_overwriting_is_refused_by_default(tmp_path, make_episode):
    path = tmp_path / "s"
    write_dataset(path, [make_episode(0, 3)])
    before = verify_dataset(path)
    with pytest.raises(InvalidInputError, match="overwrite=True"):
        write_dataset(path, [make_episode(1, 3)])
    assert verify_dataset(path) == before
    write_dataset(path, [make_episode(1, 3)], overwrite=True)
    assert verify_dataset(path).sha256 != before.sha256
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_overwriting_keeps_the_old_store_until_the_new_one_is_complete(tmp_path, make_episode):
    path = tmp_path / "s"
    before = write_dataset(path, [make_episode(0, 3)]).info

    def failing():
        yield make_episode(1, 3)
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_dataset(path, failing(), overwrite=True)
    assert verify_dataset(path) == before


def test_overwriting_spares_what_is_not_a_store(tmp_path, make_episode):
    path = tmp_path / "photos"
    path.mkdir()
    write_dataset(path, [make_episode(0, 3)])  # an empty folder is fine
    other = tmp_path / "home"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(InvalidInputError, match="not a trajectory store"):
        write_dataset(other, [make_episode(0, 3)], overwrite=True)
    assert (other / "thesis.tex").read_text(encoding="utf-8") == "x"


def test_two_writers_do_not_mix(tmp_path, make_episode):
    with StoreWriter(tmp_path / "s", name="x") as writer:
        writer.add(make_episode(0, 3))
        with pytest.raises(InvalidInputError, match="locked"):
            StoreWriter(tmp_path / "s", name="x")
    assert len(open_dataset(tmp_path / "s")) == 1


def test_an_episode_is_added_once(tmp_path, make_episode):
    with StoreWriter(tmp_path / "s", name="x") as writer:
        writer.add(make_episode(0, 3), source_id="a")
        writer.add(make_episode(1, 3))
        assert writer.completed == {"a", "demo_1"}
        assert len(writer) == 2
        assert writer.tasks == ("task 0", "task 1")
        with pytest.raises(InvalidInputError, match="'a' is in the store already"):
            writer.add(make_episode(0, 3), source_id="a")


def test_an_episode_that_could_not_be_added_leaves_no_trace(tmp_path, make_episode, monkeypatch):
    def fail(*_, **__):
        raise OSError("no")

    with StoreWriter(tmp_path / "s", name="x") as writer:
        writer.add(_replace(make_episode(0, 3), meta={"source_id": "a"}))
        with monkeypatch.context() as patch:
            patch.setattr(ColumnFile, "write", fail)
            with pytest.raises(OSError, match="no"):
                writer.add(_replace(make_episode(0, 3), infos={"late": np.zeros(3)}))
        writer.add(_replace(make_episode(1, 4), meta={"source_id": "b"}))
        with monkeypatch.context() as patch:  # all arrays are out, the journal line is not
            patch.setattr(writer_module, "write_all", fail)
            with pytest.raises(OSError, match="no"):
                writer.add(make_episode(0, 50))
    again = write_dataset(
        tmp_path / "t",
        [
            _replace(make_episode(0, 3), meta={"source_id": "a"}),
            _replace(make_episode(1, 4), meta={"source_id": "b"}),
        ],
    )
    assert verify_dataset(tmp_path / "s").sha256 == again.info.sha256


def test_features_of_no_values_are_kept(tmp_path, make_episode, same_episode):
    good = make_episode(0, 3)
    observations = {"state": good.observations["state"], "none": np.zeros((4, 0), np.float32)}
    episode = _replace(good, observations=observations, infos={"act": np.zeros((3, 2, 0))})
    dataset = write_dataset(tmp_path / "s", [episode, episode])
    same_episode(dataset.episode(1), episode)
    assert dataset.stats()["none"].mean.shape == (0,)
    assert dataset.windows(WindowSpec(2, 2))[:]["obs/none"].shape == (6, 2, 0)


def test_manifest_is_readable_json(tmp_path, make_episode):
    write_dataset(tmp_path / "s", [make_episode(0, 3)])
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["schema"] == 1
    assert {"python", "numpy", "gymnasium", "mail-agents"} <= set(manifest["versions"])
    for name, item in manifest["files"].items():
        assert (tmp_path / "s" / name).stat().st_size == item["bytes"]
        assert len(item["sha256"]) == 64


def _window_sum(dataset, queue):
    queue.put(int(dataset.windows(WindowSpec(3, 1))[:]["obs/cameras/front"].sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_the_same_data(tmp_path, make_episode, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{method} does not exist on this system")
    dataset = write_dataset(tmp_path / "s", [make_episode(i, 6) for i in range(3)])
    assert len(pickle.dumps(dataset)) < 500, "a path travels, not the data"
    copy = pickle.loads(pickle.dumps(dataset))
    expected = int(dataset.windows(WindowSpec(3, 1))[:]["obs/cameras/front"].sum())
    assert int(copy.windows(WindowSpec(3, 1))[:]["obs/cameras/front"].sum()) == expected
    if method == "spawn":
        return  # covered by the pickle round trip, without the seconds of a fresh interpreter
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_window_sum, args=(dataset, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [expected] * 2
    for worker in workers:
        worker.join()


def test_missing_episodes_are_index_errors(make_episode):
    dataset = MemoryDataset([make_episode(0, 3), make_episode(1, 4)])
    assert len(dataset.episode(-1)) == 4
    for index in (2, -3):
        with pytest.raises(IndexError, match="there are 2"):
            dataset.episode(index)
