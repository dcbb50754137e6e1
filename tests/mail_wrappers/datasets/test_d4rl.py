"""D4RL files: split where episodes end, refused when malformed, written and read back unchanged."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_agents.data import Episode, MemoryDataset, open_dataset, write_dataset
from mail_agents.data.windows import WindowSpec
from mail_agents.errors import CorruptFileError, InvalidInputError, StorageError, UnknownNameError
from mail_wrappers.datasets import d4rl_file
from mail_wrappers.datasets.d4rl import (
    D4RLActionWarning,
    D4RLTrailingWarning,
    convert_d4rl,
    episode_ends,
    read_d4rl,
    write_d4rl,
)
from mail_wrappers.datasets.d4rl_export import D4RLInfoWarning
from mail_wrappers.datasets.d4rl_file import D4RLFile
from mail_wrappers.datasets.d4rl_names import WORLDS, dataset_id, world_of, world_spec
from mail_wrappers.datasets.d4rl_reference import domains, reference

SIZES = {"hopper": (11, 3), "antmaze": (29, 8), "kitchen": (60, 9)}


def arrays(
    rows: int = 12,
    *,
    domain: str = "hopper",
    terminals: tuple[int, ...] = (4,),
    timeouts: tuple[int, ...] | None = (8, 11),
    following: bool = True,
) -> dict[str, Any]:
    """What D4RL's scripts put into a file; every row can be told from every other."""
    rng = np.random.default_rng(7)
    size, actions = SIZES[domain]
    observations = rng.normal(size=(rows, size)).astype(np.float32)
    observations[:, 0] = np.arange(rows)
    out: dict[str, Any] = {
        "observations": observations,
        "actions": rng.uniform(-1, 1, (rows, actions)).astype(np.float32),
        "rewards": np.arange(rows, dtype=np.float32),
        "terminals": np.isin(np.arange(rows), terminals),
        "infos/qpos": rng.normal(size=(rows, 6)),
        "infos/action_log_probs": rng.normal(size=rows).astype(np.float32),
    }
    if timeouts is not None:
        out["timeouts"] = np.isin(np.arange(rows), timeouts)
    if following:
        out["next_observations"] = observations + np.float32(0.5)
    return out


class TwoLimits(gymnasium.Env):
    """Hopper's sizes, other bounds."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,), np.float64)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (3,), np.float32)


@pytest.fixture(autouse=True, scope="module")
def two_limits() -> Iterator[None]:
    point = f"{__name__}:TwoLimits"
    gymnasium.register("TwoLimits-v0", entry_point=point, max_episode_steps=5)
    gymnasium.register("Nameless-v0", entry_point=TwoLimits)
    yield
    del gymnasium.registry["TwoLimits-v0"], gymnasium.registry["Nameless-v0"]


def save(path: Path, data: dict[str, Any], gzip: bool = True) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in data.items():
            file.create_dataset(name, data=values, compression="gzip" if gzip else None)
        file["metadata/algorithm"] = np.bytes_("SAC")
        file["metadata/iteration"] = np.array([990], np.int32)[0]
        file["metadata/policy/fc0/weight"] = np.zeros((4, 4))
    return path


@pytest.fixture
def hopper(tmp_path: Path) -> Path:
    return save(tmp_path / "hopper_medium-v2.hdf5", arrays())


def marks(episodes: list[Episode]) -> list[list[int]]:
    """Row numbers of each episode, by the number that each observation holds."""
    return [e.observations["state"][:-1, 0].astype(int).tolist() for e in episodes]


# --- where episodes end -----------------------------------------------------------------------


def test_mixed_ends_and_trailing_rows(tmp_path: Path) -> None:
    path = save(tmp_path / "hopper_medium-v2.hdf5", arrays(14))
    with pytest.warns(D4RLTrailingWarning, match="2 of 14 rows"):
        episodes = list(read_d4rl(path))
    assert marks(episodes) == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    assert [e.terminations[-1] for e in episodes] == [True, False, False]
    assert [e.truncations[-1] for e in episodes] == [False, True, True]
    assert [e.meta["source_id"] for e in episodes] == [
        f"hopper-medium-v2/{i:06d}" for i in range(3)
    ]
    assert [e.task for e in episodes] == ["hopper-medium-v2"] * 3


def test_trailing_rows_can_be_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "hopper_medium-v2.hdf5", arrays(14))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, last = read_d4rl(path, keep_trailing=True)
    assert marks([last]) == [[12, 13]]
    assert last.truncations.tolist() == [False, True]
    assert not last.terminations.any()
    assert last.meta["trailing"] is True


def test_all_timeouts_mix_nothing() -> None:
    timeouts = np.arange(5000) % 1000 == 999
    assert episode_ends(np.zeros(5000, bool), timeouts, None).tolist() == [
        1000,
        2000,
        3000,
        4000,
        5000,
    ]


def test_without_timeouts_the_limit_cuts_and_counts_from_zero() -> None:
    terminals = np.isin(np.arange(23), (4, 14, 15))
    assert episode_ends(terminals, None, 4).tolist() == [4, 5, 9, 13, 15, 16, 20]
    assert episode_ends(np.zeros(8, bool), None, 4).tolist() == [4, 8]
    assert episode_ends(np.arange(8) == 7, None, 4).tolist() == [4, 8]
    with pytest.raises(InvalidInputError, match="max_episode_steps"):
        episode_ends(terminals, None, None)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 9))
def test_ends_equal_a_loop_over_rows(terminals: list[bool], limit: int) -> None:
    ends, count = [], 0
    for row, terminal in enumerate(terminals):
        count += 1
        if terminal or count == limit:
            ends.append(row + 1)
            count = 0
    assert episode_ends(np.array(terminals), None, limit).tolist() == ends


def test_the_environment_gives_the_limit(tmp_path: Path) -> None:
    data = arrays(1003, timeouts=None)
    path = save(tmp_path / "hopper_medium-v0.hdf5", data)
    with pytest.warns(D4RLTrailingWarning, match="998 of 1003"):
        assert [len(e) for e in read_d4rl(path)] == [5]
    with pytest.warns(D4RLTrailingWarning):
        assert [len(e) for e in read_d4rl(path, max_episode_steps=400)] == [5, 400, 400]
    lengths = [len(e) for e in read_d4rl(path, max_episode_steps=499)]
    assert lengths == [5, 499, 499]


# --- contents ---------------------------------------------------------------------------------


def test_final_observation_is_the_stored_one(hopper: Path) -> None:
    for episode in read_d4rl(hopper):
        states = episode.observations["state"]
        assert np.array_equal(states[-1], states[-2] + np.float32(0.5))
        assert "final_observation" not in episode.meta


def test_final_observation_is_repeated_and_never_the_next_episodes(tmp_path: Path) -> None:
    path = save(tmp_path / "hopper_medium-v2.hdf5", arrays(following=False))
    for episode in read_d4rl(path):
        states = episode.observations["state"]
        assert np.array_equal(states[-1], states[-2])
        assert episode.meta["final_observation"] == "repeated"


@pytest.mark.parametrize("gzip", [True, False])
@pytest.mark.parametrize("column", [True, False])
def test_layouts(tmp_path: Path, gzip: bool, column: bool) -> None:
    data = arrays()
    expected = data["rewards"].copy()
    if column:
        for name in ("rewards", "terminals", "timeouts"):
            data[name] = data[name][:, None]
        data["terminals"] = data["terminals"].astype(np.float32)  # the kitchen files
    path = save(tmp_path / "hopper_medium-v2.hdf5", data, gzip)
    episodes = list(read_d4rl(path))
    assert marks(episodes) == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    assert np.array_equal(np.concatenate([e.rewards for e in episodes]), expected)
    assert episodes[0].terminations.dtype == bool
    assert np.array_equal(episodes[1].infos["qpos"], data["infos/qpos"][5:9])
    assert set(episodes[0].infos) == {"qpos", "action_log_probs"}
    assert np.array_equal(episodes[2].actions, data["actions"][9:])


def test_float64_stays(tmp_path: Path) -> None:
    data = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in arrays().items()}
    dataset = convert_d4rl(
        save(tmp_path / "hopper_medium_replay-v2.hdf5", data), tmp_path / "store"
    )
    assert dataset.features.observations["state"].dtype == "float64"
    assert dataset.features.action.dtype == "float64"


def test_reading_in_small_blocks_changes_nothing(
    hopper: Path, monkeypatch: pytest.MonkeyPatch, same_episode: Callable[..., None]
) -> None:
    whole = list(read_d4rl(hopper))
    monkeypatch.setattr(d4rl_file, "_BLOCK_BYTES", 100)
    for left, right in zip(whole, read_d4rl(hopper), strict=True):
        same_episode(left, right)


# --- conversion -------------------------------------------------------------------------------


def test_conversion_knows_scores_bounds_and_environment(hopper: Path, tmp_path: Path) -> None:
    dataset = convert_d4rl(hopper, tmp_path / "store")
    name = "hopper-medium-v2"
    assert dataset.info.name == name
    assert dataset.info.tasks == (name,)
    assert dataset.info.reference_scores == {
        name: {"min": -20.272305, "max": 3234.3, "source": "d4rl:hopper"}
    }
    spec = dataset.info.env_specs[name]
    assert (spec["id"], spec["max_episode_steps"]) == ("mail_envs:d4rl/hopper", 1000)
    assert dataset.features.action.low == (-1.0,) * 3
    assert dataset.features.action.high == (1.0,) * 3
    source = dataset.info.source
    assert source["metadata"] == {"algorithm": "SAC", "iteration": 990}
    assert (source["rows"], source["dropped_rows"], source["kind"]) == (12, 0, "d4rl-hdf5")
    assert dataset.lengths.tolist() == [5, 4, 3]
    assert dataset.episode_returns.tolist() == [10.0, 26.0, 30.0]


def test_conversion_continues_after_a_kill(
    hopper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mail_agents.data.writer import StoreWriter

    whole = convert_d4rl(hopper, tmp_path / "whole").info.sha256
    add, added = StoreWriter.add, []

    def dying(self: StoreWriter, episode: Episode, source_id: str | None = None) -> None:
        added.append(source_id)
        if len(added) == 3:
            raise KeyboardInterrupt
        add(self, episode, source_id)

    monkeypatch.setattr(StoreWriter, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        convert_d4rl(hopper, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert convert_d4rl(hopper, tmp_path / "store").info.sha256 == whole
    assert len(added) == 4  # the two that were in are not added again


def test_a_large_file_trains_without_being_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mail_agents.data import store

    rows = 50_000
    path = save(
        tmp_path / "hopper_medium-v2.hdf5",
        arrays(rows, terminals=(), timeouts=tuple(range(499, rows, 500))),
        gzip=False,
    )
    seen = []
    load = d4rl_file._Column._load

    def counted(self: Any, start: int, stop: int) -> np.ndarray:
        block = load(self, start, stop)
        seen.append(block.nbytes)
        return block

    monkeypatch.setattr(d4rl_file, "_BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(d4rl_file._Column, "_load", counted)
    monkeypatch.setattr(store, "RAM_BYTES", 0)
    dataset = convert_d4rl(path, tmp_path / "store")
    assert max(seen) <= 1 << 16  # never the file, whose observations are 2.2 MB
    assert isinstance(dataset.column("obs/state").base, np.memmap)
    windows = dataset.windows(WindowSpec(history=20))
    assert len(windows) == rows
    assert windows[np.arange(64)]["obs/state"].shape == (64, 20, 11)


# --- refusals ---------------------------------------------------------------------------------


def replaced(name: str, values: Any) -> dict[str, Any]:
    return {**arrays(), name: values}


def spoiled(name: str, value: float) -> dict[str, Any]:
    data = arrays()
    data[name][7, ...] = value
    return data


MALFORMED = {
    "no actions": (
        {k: v for k, v in arrays().items() if k != "actions"},
        r"actions missing \(present: infos, metadata, next_observations, observations",
    ),
    "no rewards and terminals": (
        {k: v for k, v in arrays().items() if k not in ("rewards", "terminals")},
        "rewards, terminals missing",
    ),
    "nan reward": (spoiled("rewards", np.nan), "rewards is not finite .* row 7"),
    "infinite action": (spoiled("actions", np.inf), "actions is not finite .* row 7"),
    "nan observation": (spoiled("observations", np.nan), "observations is not finite .* row 7"),
    "nan next observation": (
        spoiled("next_observations", -np.inf),
        "next_observations is not finite .* row 7",
    ),
    "integer actions": (
        replaced("actions", np.zeros((12, 3), np.int64)),
        "actions holds int64, expected floating-point",
    ),
    "text rewards": (replaced("rewards", np.array([b"a"] * 12)), r"rewards holds \|S1"),
    "short rewards": (replaced("rewards", np.zeros(11)), "differ in their rows: .*rewards 11"),
    "short infos": (replaced("infos/qpos", np.zeros((9, 6))), "infos/qpos 9"),
    "flat actions": (replaced("actions", np.zeros(12)), r"actions has shape \(12,\)"),
    "wide rewards": (replaced("rewards", np.zeros((12, 2))), r"rewards has shape \(12, 2\)"),
    "other next observations": (
        replaced("next_observations", np.zeros((12, 10))),
        r"next_observations has shape \(12, 10\)",
    ),
    "terminals of 2": (replaced("terminals", np.full(12, 2.0)), "terminals holds 2.0 at row 0"),
    "nan timeouts": (replaced("timeouts", np.full(12, np.nan)), "timeouts holds nan at row 0"),
    "no rows": ({k: v[:0] for k, v in arrays().items()}, "no transitions"),
    "no end": (arrays(terminals=(), timeouts=()), "no whole episode"),
    "other sizes": (
        {**arrays(domain="antmaze")},
        r"observations has rows of shape \(29,\), but hopper-medium-v2 has \(11,\)",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    data, message = MALFORMED[case]
    path = save(tmp_path / "hopper_medium-v2.hdf5", data, gzip=case != "no rows")
    with pytest.raises(CorruptFileError, match=message) as caught:
        convert_d4rl(path, tmp_path / "store")
    assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if case != "other sizes":
        with pytest.raises(CorruptFileError, match=message):
            next(read_d4rl(path))


def test_truncated_and_foreign_files(hopper: Path, tmp_path: Path) -> None:
    whole = hopper.read_bytes()
    hopper.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match=r"not a complete HDF5 file \(.*truncated"):
        convert_d4rl(hopper, tmp_path / "store")
    hopper.write_bytes(b"<html>404</html>")
    with pytest.raises(CorruptFileError, match="not a complete HDF5 file"):
        convert_d4rl(hopper, tmp_path / "store")
    with pytest.raises(InvalidInputError, match="does not exist"):
        convert_d4rl(tmp_path / "walker2d_medium-v2.hdf5", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_damaged_block_is_named(hopper: Path, tmp_path: Path) -> None:
    with h5py.File(hopper) as file:
        where = file["actions"].id.get_chunk_info(0)
    data = bytearray(hopper.read_bytes())
    data[where.byte_offset : where.byte_offset + where.size] = b"\xff" * where.size
    hopper.write_bytes(data)
    with pytest.raises(CorruptFileError, match="actions cannot be read near row 0"):
        convert_d4rl(hopper, tmp_path / "store")


def test_groups_are_explained(tmp_path: Path) -> None:
    data = {**arrays(), "observations/achieved_goal": np.zeros((12, 2))}
    del data["observations"]
    path = save(tmp_path / "antmaze-umaze-v2.hdf5", data)
    with pytest.raises(CorruptFileError, match=r"a group \(achieved_goal\).*'minari:'"):
        next(read_d4rl(path))


def test_actions_outside_the_range_warn_and_are_kept(tmp_path: Path) -> None:
    data = arrays()
    data["actions"][3, 1] = 1.0 + 1e-6  # rounding
    path = save(tmp_path / "hopper_medium-v2.hdf5", data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(read_d4rl(path))
    data["actions"][5:7, 1] = -1.5
    path = save(tmp_path / "hopper_medium-v2.hdf5", data)
    with pytest.warns(D4RLActionWarning, match=r"2 of 12 actions leave .*up to 1\.5.*row 5"):
        episodes = list(read_d4rl(path))
    assert episodes[1].actions[0, 1] == -1.5


def test_unknown_names_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = save(tmp_path / "hoper_medium-v2.hdf5", arrays())
    with pytest.raises(
        UnknownNameError, match=r"Did you mean 'hopper-medium-v2'.*rename the file.*--env"
    ):
        convert_d4rl(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    with pytest.raises(UnknownNameError, match="carla"):
        dataset_id("carla_lane_follow_flat-v0.hdf5")
    dataset = convert_d4rl(path, tmp_path / "store", name="hopper-medium-v2")
    assert dataset.info.tasks == ("hopper-medium-v2",)
    (first, *_) = read_d4rl(path)  # data of one's own can be read, without a task
    assert (first.task, first.meta["source_id"]) == (None, "hoper_medium-v2/000000")


# --- data of one's own ------------------------------------------------------------------------


def test_an_environment_gives_bounds_task_and_limit(tmp_path: Path) -> None:
    path = save(tmp_path / "mine.hdf5", arrays())
    with warnings.catch_warnings():
        warnings.simplefilter("error", D4RLActionWarning)
        dataset = convert_d4rl(path, tmp_path / "store", env="TwoLimits-v0")
    info = dataset.info
    assert (info.name, info.tasks, info.reference_scores) == ("mine", ("TwoLimits-v0",), {})
    spec = info.env_specs["TwoLimits-v0"]
    assert (spec["id"].partition(":")[2], spec["max_episode_steps"]) == ("TwoLimits-v0", 5)
    assert dataset.features.action.low == (-2.0, -2.0, -2.0)
    assert dataset.features.observations["state"].dtype == "float32"  # the data decides
    assert dataset.lengths.tolist() == [5, 4, 3]
    assert [e.task for e in read_d4rl(path, env="TwoLimits-v0")] == ["TwoLimits-v0"] * 3
    # Even under a name of D4RL's, whose references and bounds do not apply.
    named = shutil.copy(path, tmp_path / "hopper_medium-v2.hdf5")
    assert convert_d4rl(named, tmp_path / "named", env="TwoLimits-v0").info.reference_scores == {}

    save(path, {**arrays(10, terminals=(1,), timeouts=None), "actions": np.full((10, 3), -1.5)})
    with pytest.warns(D4RLTrailingWarning, match="3 of 10"):
        assert [len(e) for e in read_d4rl(path, env="TwoLimits-v0")] == [2, 5]
    save(path, {**arrays(), "actions": np.full((12, 3), -2.5)})
    with pytest.warns(D4RLActionWarning, match=r"12 of 12 actions leave \[-2, 2\] \(up to 2\.5"):
        list(read_d4rl(path, env="TwoLimits-v0"))


@pytest.mark.parametrize(
    ("env", "error", "message"),
    [
        ("Hoper-v5", InvalidInputError, "'Hoper-v5' cannot be made.*Did you mean"),
        ("no_such_module:Env-v0", InvalidInputError, "no_such_module"),
        ("Nameless-v0", InvalidInputError, "entry_point='package.module:Class'"),
        ("CartPole-v1", InvalidInputError, "takes actions of int64"),
        ("Pendulum-v1", CorruptFileError, r"shape \(11,\), but Pendulum-v1 has \(3,\)"),
    ],
)
def test_other_environments_are_refused(
    tmp_path: Path, env: str, error: type[Exception], message: str
) -> None:
    path = save(tmp_path / "mine.hdf5", arrays())
    with pytest.raises(error, match=message):
        convert_d4rl(path, tmp_path / "store", env=env)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_name_is_a_task_and_needs_no_limit_unless_the_file_does(tmp_path: Path) -> None:
    path = save(tmp_path / "file.hdf5", arrays())
    first, *_ = read_d4rl(path, name="mine")
    assert (first.task, first.meta["source_id"]) == ("mine", "mine/000000")
    with pytest.raises(InvalidInputError, match=r"either name='mine'.* or env='Hopper-v5'"):
        next(read_d4rl(path, name="mine", env="Hopper-v5"))
    with pytest.raises(UnknownNameError, match=r"'mine'.*--env"):
        convert_d4rl(path, tmp_path / "store", name="mine")
    with pytest.raises(UnknownNameError, match=r"Unknown D4RL world 'antmaze'.*antmaze-umaze"):
        convert_d4rl(path, tmp_path / "store", name="antmaze")
    save(path, arrays(timeouts=None))
    with pytest.raises(InvalidInputError, match=r"no 'timeouts'.*env.*max_episode_steps"):
        next(read_d4rl(path, name="mine"))
    with pytest.warns(D4RLTrailingWarning):
        assert [len(e) for e in read_d4rl(path, name="mine", max_episode_steps=5)] == [5, 5]


@pytest.mark.parametrize("limit", [0, -3])
@pytest.mark.parametrize("timeouts", [None, (8, 11)])
def test_impossible_limits(tmp_path: Path, limit: int, timeouts: tuple[int, ...] | None) -> None:
    path = save(tmp_path / "hopper_medium-v2.hdf5", arrays(timeouts=timeouts))
    with pytest.raises(InvalidInputError, match=f"max_episode_steps is {limit}"):
        convert_d4rl(path, tmp_path / "store", max_episode_steps=limit)
    assert not (tmp_path / "store").exists()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is a folder"):
        convert_d4rl(tmp_path, tmp_path / "store")


# --- links --------------------------------------------------------------------------------------


def test_links_lead_to_data(hopper: Path, same_episode: Callable[..., None]) -> None:
    whole = list(read_d4rl(hopper))
    with h5py.File(hopper, "a") as file:
        for name in ("observations", "actions", "infos"):
            file.move(name, f"metadata/{name}")
        file["observations"] = h5py.SoftLink("/metadata/observations")
        file["actions"] = file["metadata/actions"]  # a second name of the same array
        file["infos"] = h5py.SoftLink("/metadata/infos")
    for left, right in zip(read_d4rl(hopper), whole, strict=True):
        same_episode(left, right)


def test_links_into_another_file(hopper: Path, same_episode: Callable[..., None]) -> None:
    whole = list(read_d4rl(hopper))
    with h5py.File(hopper, "a") as file:
        with h5py.File(hopper.with_name("other.hdf5"), "w") as other:
            file.copy("rewards", other)
        del file["rewards"]
        file["rewards"] = h5py.ExternalLink("other.hdf5", "/rewards")
    for left, right in zip(read_d4rl(hopper), whole, strict=True):
        same_episode(left, right)
    hopper.with_name("other.hdf5").unlink()
    with pytest.raises(CorruptFileError, match="rewards is a link to something missing"):
        next(read_d4rl(hopper))


def test_links_that_lead_nowhere_are_named(hopper: Path) -> None:
    with h5py.File(hopper, "a") as file:
        file["infos/self"] = h5py.SoftLink("/infos")
    with pytest.raises(CorruptFileError, match="infos/self links back"):
        next(read_d4rl(hopper))
    with h5py.File(hopper, "a") as file:
        del file["infos/self"], file["observations"]
        file["observations"] = h5py.SoftLink("/nowhere")
    with pytest.raises(CorruptFileError, match="observations is a link to something missing"):
        next(read_d4rl(hopper))


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name", "world"),
    [
        ("hopper_medium-v2.hdf5", "hopper-medium-v2", "hopper"),
        ("hopper-medium-v2.hdf5", "hopper-medium-v2", "hopper"),
        ("halfcheetah_medium_replay-v2.hdf5", "halfcheetah-medium-replay-v2", "halfcheetah"),
        ("walker2d_medium_expert-v1.hdf5", "walker2d-medium-expert-v1", "walker2d"),
        ("walker_mixed.hdf5", "walker2d-medium-replay-v0", "walker2d"),
        ("ant_expert.hdf5", "ant-expert-v0", "ant"),
        ("maze2d-umaze-sparse-v1.hdf5", "maze2d-umaze-v1", "maze2d-umaze"),
        ("maze2d-large-dense-v1.hdf5", "maze2d-large-dense-v1", "maze2d-large-dense"),
        (
            "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
            "antmaze-umaze-v2",
            "antmaze-umaze",
        ),
        (
            "Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse.hdf5",
            "antmaze-umaze-diverse-v0",
            "antmaze-umaze",
        ),
        (
            "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
            "antmaze-medium-play-v2",
            "antmaze-medium",
        ),
        (
            "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
            "antmaze-large-diverse-v2",
            "antmaze-large",
        ),
        (
            "mini_kitchen_microwave_kettle_light_slider-v0.hdf5",
            "kitchen-complete-v0",
            "kitchen-complete",
        ),
        (
            "kitchen_microwave_kettle_light_slider-v0.hdf5",
            "kitchen-partial-v0",
            "kitchen-partial",
        ),
        (
            "kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
            "kitchen-mixed-v0",
            "kitchen-mixed",
        ),
        ("pen-v0_demos_clipped.hdf5", "pen-human-v0", "pen"),
        ("door-demos-v0-bc-combined.hdf5", "door-cloned-v0", "door"),
        ("hammer-v0_expert_clipped.hdf5", "hammer-expert-v0", "hammer"),
        ("relocate-cloned-v1.hdf5", "relocate-cloned-v1", "relocate"),
    ],
)
def test_published_file_names(file: str, name: str, world: str) -> None:
    assert dataset_id(f"somewhere/{file}") == name
    assert world_of(name) == world
    assert reference(name)["max"] > reference(name)["min"]
    assert world_spec(world)["id"] == f"mail_envs:d4rl/{world}"


@pytest.mark.parametrize(
    "file",
    [
        "maze2d-umaze-sparse.hdf5",  # version 0: other limits, other references
        "hopper-medium-v5.hdf5",
        "minigrid4rooms.hdf5",
        "Ant_maze_umaze_noisy_multistart_False_multigoal_False_sparse.hdf5",
    ],
)
def test_names_without_scores_are_unknown(file: str) -> None:
    with pytest.raises(UnknownNameError):
        dataset_id(file)


def test_every_domain_has_a_world() -> None:
    kinds = {"antmaze": "antmaze-umaze-v2", "kitchen": "kitchen-mixed-v0"}
    for domain in domains():
        assert world_of(kinds.get(domain, domain)) in WORLDS


# --- the way back -----------------------------------------------------------------------------


def own_dataset(tmp_path: Path, key: str = "robot") -> Any:
    rng = np.random.default_rng(3)

    def episode(number: int, length: int) -> Episode:
        last = np.arange(length) == length - 1
        over = number % 2 == 0
        return Episode(
            observations={key: rng.normal(size=(length + 1, 5))},
            actions=rng.uniform(-1, 1, (length, 2)).astype(np.float32),
            rewards=rng.normal(size=length),
            terminations=last & over,
            truncations=last & (not over),
            task=("reach", "push", None)[number % 3],
            seed=None if number == 1 else 2**62 + number,
            meta={"source_id": f"mine/{number}", "success": over, "note": "é"},
            infos={"sim/q": rng.normal(size=(length, 2)), "contact": last},
        )

    return write_dataset(
        tmp_path / "own",
        [episode(i, n) for i, n in enumerate((3, 1, 6, 2))],
        env_specs={"reach": {"id": "CartPole-v1"}},
        reference_scores={"reach": {"min": 0.5, "max": 9.0, "source": "measured"}},
        source={"kind": "mine"},
    )


def test_store_to_d4rl_to_store(tmp_path: Path, same_episode: Callable[..., None]) -> None:
    own = own_dataset(tmp_path)
    path = write_d4rl(own, tmp_path / "deep" / "anything.hdf5")
    back = convert_d4rl(path, tmp_path / "back")
    for number in range(len(own)):
        same_episode(own.episode(number), back.episode(number))
    assert back.info.sha256 == own.info.sha256  # features, tasks, meta, seeds, arrays
    for part in ("name", "tasks", "env_specs", "reference_scores"):
        assert getattr(back.info, part) == getattr(own.info, part)
    assert back.features == own.features
    for left, right in zip(read_d4rl(path), (own.episode(i) for i in range(4)), strict=True):
        same_episode(left, right)
    for option in ({"name": "hopper-medium-v2"}, {"env": "Hopper-v5"}):
        with pytest.raises(
            InvalidInputError, match=f"its own tasks.*leave {next(iter(option))} out"
        ):
            convert_d4rl(path, tmp_path / "other", **option)
        with pytest.raises(InvalidInputError, match="its own tasks"):
            next(read_d4rl(path, **option))
    assert not (tmp_path / "other").exists()


def test_d4rl_to_store_to_d4rl(hopper: Path, tmp_path: Path) -> None:
    path = write_d4rl(convert_d4rl(hopper, tmp_path / "store"), tmp_path / "again.hdf5")
    with h5py.File(hopper) as left, h5py.File(path) as right:
        for name in ("observations", "actions", "rewards", "terminals", "timeouts", "infos/qpos"):
            assert left[name].dtype == right[name].dtype
            assert np.array_equal(left[name], right[name]), name
        ends = np.array([4, 8, 11])
        assert np.array_equal(left["next_observations"][ends], right["next_observations"][ends])


def test_what_is_written_looks_like_d4rl(tmp_path: Path) -> None:
    path = write_d4rl(own_dataset(tmp_path), tmp_path / "file.hdf5")
    with h5py.File(path) as file:
        rows = {name: file[name].shape for name in ("observations", "actions", "rewards")}
        assert rows == {"observations": (12, 5), "actions": (12, 2), "rewards": (12,)}
        assert np.flatnonzero(file["terminals"]).tolist() == [2, 9]
        assert np.flatnonzero(file["timeouts"]).tolist() == [3, 11]
        inside = np.setdiff1d(np.arange(11), [2, 3, 9])
        following = file["next_observations"][()]
        assert np.array_equal(following[inside], file["observations"][()][inside + 1])
        # D4RL reads every data set as an array, or as a scalar when that fails.
        assert isinstance(file[d4rl_file.EXTRAS][()], bytes)


def test_what_d4rl_cannot_hold_is_refused_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dataset(change: dict[str, Any]) -> MemoryDataset:
        last = np.arange(3) == 2
        parts: dict[str, Any] = {
            "observations": {"state": np.zeros((4, 2))},
            "actions": np.zeros((3, 1)),
            "rewards": np.zeros(3),
            "terminations": last,
            "truncations": np.zeros(3, bool),
            **change,
        }
        return MemoryDataset([Episode(**parts)])

    path = tmp_path / "file.hdf5"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"observations": {"a": np.zeros((4, 2)), "b": np.zeros((4, 2))}}, r"\['a', 'b'\]"),
        ({"actions": np.zeros(3, np.int64)}, "int64"),
        ({"terminations": np.zeros(3, bool)}, "Episode 0 has no end"),
        ({"terminations": np.ones(3, bool)}, "ends before its last step"),
    ]
    for change, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            write_d4rl(dataset(change), path)
    assert list(tmp_path.iterdir()) == []
    infos = {"final": np.zeros((4, 1)), "text": np.array(["a", "b", "c"]), "fine": np.zeros(3)}
    with pytest.warns(D4RLInfoWarning, match=r"\['final', 'text'\]"):
        write_d4rl(dataset({"infos": infos}), path)
    (episode,) = read_d4rl(path)
    assert set(episode.infos) == {"fine"}
    with pytest.raises(InvalidInputError, match="exists already"):
        write_d4rl(dataset({}), path)
    (tmp_path / "folder").touch()
    with pytest.raises(StorageError, match="nothing was put there"):
        write_d4rl(dataset({}), tmp_path / "folder" / "file.hdf5")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(StorageError, match="0 MB are free"):
        write_d4rl(dataset({}), tmp_path / "full.hdf5")
    assert not list(tmp_path.glob("*full*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda extras: extras.pop("features"), "metadata is damaged: KeyError"),
        (lambda extras: extras["episodes"].pop(), "4 episodes, its metadata 3"),
        (lambda extras: extras["episodes"][0].pop("meta"), "metadata is damaged"),
    ],
)
def test_damaged_extras(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    path = write_d4rl(own_dataset(tmp_path), tmp_path / "file.hdf5")
    with h5py.File(path, "a") as file:
        extras = json.loads(file[d4rl_file.EXTRAS][()])
        change(extras)
        del file[d4rl_file.EXTRAS]
        file[d4rl_file.EXTRAS] = json.dumps(extras)
    with pytest.raises(CorruptFileError, match=message):
        convert_d4rl(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_unreadable_extras(tmp_path: Path) -> None:
    path = save(tmp_path / "hopper_medium-v2.hdf5", arrays())
    with h5py.File(path, "a") as file:
        file[d4rl_file.EXTRAS] = "not json"
    with pytest.raises(CorruptFileError, match=r"metadata/mail_agents is not readable"):
        D4RLFile(path)


def test_store_to_minari_to_store_keeps_scores(
    hopper: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    same_episode: Callable[..., None],
) -> None:
    pytest.importorskip("minari")
    from mail_wrappers.datasets.minari import convert_minari, write_minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    store = convert_d4rl(hopper, tmp_path / "store")
    written = write_minari(store, "D4RL-local/hopper/medium-v2")
    metadata = written.storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)
    assert written.env_spec.id == "mail_envs:d4rl/hopper"
    back = convert_minari("D4RL-local/hopper/medium-v2", tmp_path / "back")
    assert back.info.sha256 == store.info.sha256
    assert back.info.reference_scores == store.info.reference_scores
    assert back.info.env_specs == store.info.env_specs
    for number in range(len(store)):
        same_episode(store.episode(number), back.episode(number))


def test_the_command(
    hopper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from importlib.metadata import EntryPoint

    from mail_agents import cli, data_cli

    points = [
        EntryPoint(name, f"mail_wrappers.datasets.d4rl:{function}", data_cli.CONVERTERS)
        for name, function in (("d4rl", "convert_d4rl"), ("to-d4rl", "write_d4rl"))
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    store, again = str(tmp_path / "store"), str(tmp_path / "again.hdf5")
    assert cli.main(["data", "convert", f"d4rl:{hopper}", store]) == 0
    assert cli.main(["data", "convert", store, f"d4rl:{again}"]) == 0
    assert capsys.readouterr().out == f"wrote {store}\nwrote d4rl:{again}\n"
    assert len(open_dataset(store)) == 3
    assert cli.main(["data", "convert", f"d4rl:{tmp_path}/hoper.hdf5", store]) == 1
    assert "does not exist" in capsys.readouterr().err
