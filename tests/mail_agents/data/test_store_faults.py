"""Faults injected into conversions and stores: kills, full disks, damaged files."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

try:
    import resource
except ImportError:  # Windows
    resource = None

from mail_agents.data import (
    StoreWriter,
    WindowSpec,
    files,
    open_dataset,
    verify_dataset,
    write_dataset,
    writer,
)
from mail_agents.data.manifest import MANIFEST, dump_manifest
from mail_agents.errors import CorruptFileError, InvalidInputError, StorageError


@pytest.fixture
def convert(make_episode, tmp_path):
    """Converts six episodes in a process of its own; returns its exit status (-9: killed)."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")

    def run(path: Path, *kill: Any, overwrite: bool = False, limit: int | None = None) -> int:
        log = path.parent / "log"
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if limit is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                if kill:
                    die_at(*kill)
                options = {"name": "demo", "source": {"id": "six"}, "overwrite": overwrite}
                with StoreWriter(path, **options) as writer_:
                    for i in range(6):
                        if f"demo_{i}" not in writer_.completed:
                            writer_.add(make_episode(i, 4 + i))
                status = 0
            except BaseException as error:
                log.write_text(repr(error)[:500])  # the limit holds for it, too
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 1:
            message = log.read_text(encoding="utf-8")
            log.unlink()
            assert "File too large" in message, message
            assert "run the same command again" in message, message
        return status

    return run


def die_at(owner: Any, name: str, count: int) -> None:
    """Makes the ``count``-th call of a function kill the process, as kill -9 would."""
    original, calls = getattr(owner, name), [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            if name == "write_all":  # half of it gets out first
                args[0].write(bytes(args[1])[: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def uninterrupted(tmp_path_factory, make_episode) -> dict[str, bytes]:
    """Files of the same conversion without a fault."""
    path = tmp_path_factory.mktemp("straight") / "s"
    episodes = (make_episode(i, 4 + i) for i in range(6))
    return contents(write_dataset(path, episodes, name="demo", source={"id": "six"}).path)


KILLS = {
    "in the first array": (files, "write_all", 2),
    "in an array of a later episode": (files, "write_all", 60),
    "in the journal": (writer, "write_all", 4),
    "while text grows": (files.os, "replace", 2),
    "while headers are finished": (files.os, "fsync", 3),
    "while tables are written": (writer.np, "savez", 1),
    "before the manifest": (writer, "dump_manifest", 1),
    "before the rename": (files.os, "rename", 1),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_conversion_never_opens_and_resumes_to_the_same_bytes(
    convert, tmp_path, uninterrupted, moment
):
    path = tmp_path / "s"
    assert convert(path, *KILLS[moment]) == -signal.SIGKILL
    assert not path.exists()
    with pytest.raises(InvalidInputError, match="unfinished conversion"):
        open_dataset(path)
    with pytest.raises(InvalidInputError, match="No trajectory store"):
        open_dataset(tmp_path / ".s.partial")
    assert convert(path) == 0
    assert contents(path) == uninterrupted
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    verify_dataset(path)


def test_a_resumed_conversion_does_not_repeat_finished_episodes(convert, tmp_path):
    path = tmp_path / "s"
    assert convert(path, *KILLS["in an array of a later episode"]) == -signal.SIGKILL
    writer_ = StoreWriter(path, name="demo", source={"id": "six"})
    assert writer_.completed == {f"demo_{i}" for i in range(4)}
    writer_._close()


def test_damage_behind_the_journal_is_noticed_on_resume(convert, tmp_path, uninterrupted):
    """After a power cut the journal may be ahead of the data."""
    path = tmp_path / "s"
    assert convert(path, *KILLS["before the rename"]) == -signal.SIGKILL
    (victim,) = (tmp_path / ".s.partial" / "data").glob("*obs_state.npy")
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert convert(path) == 0
    assert contents(path) == uninterrupted


def test_a_kill_during_an_overwrite_leaves_one_whole_store(
    convert, tmp_path, make_episode, uninterrupted
):
    path = tmp_path / "s"
    before = write_dataset(path, [make_episode(9, 3)]).info
    assert convert(path, files.os, "rename", 1, overwrite=True) == -signal.SIGKILL
    assert verify_dataset(path) == before
    assert convert(path, files.os, "rename", 2, overwrite=True) == -signal.SIGKILL
    assert not path.exists(), "between the two renames"
    with pytest.raises(InvalidInputError, match="unfinished conversion"):
        open_dataset(path)
    assert verify_dataset(tmp_path / ".s.replaced") == before
    assert convert(path, overwrite=True) == 0
    assert contents(path) == uninterrupted
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_failed_swap_brings_the_old_store_back(tmp_path, make_episode, monkeypatch):
    path = tmp_path / "s"
    before = write_dataset(path, [make_episode(0, 3)]).info
    rename, calls = os.rename, []

    def flaky(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", flaky)
    with pytest.raises(StorageError, match="broken"):
        write_dataset(path, [make_episode(1, 3)], overwrite=True)
    assert verify_dataset(path) == before


@pytest.mark.parametrize("after", [1, 9, 40])
def test_a_full_disk_leaves_nothing_that_opens(tmp_path, make_episode, monkeypatch, after):
    path = tmp_path / "s"
    before = write_dataset(path, [make_episode(9, 3)]).info
    source = {"id": "x"}
    episodes = [make_episode(i, 4) for i in range(6)]
    write_all, calls = files.write_all, []

    def full(file, data):
        calls.append(1)
        if len(calls) > after:
            file.write(bytes(data)[:3])
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(file, data)

    with monkeypatch.context() as patch:
        for module in (files, writer):
            patch.setattr(module, "write_all", full)
        with pytest.raises(StorageError, match=r"No space left.* run the same command again"):
            write_dataset(path, episodes, source=source, name="n", overwrite=True)
    assert verify_dataset(path) == before
    assert not (tmp_path / ".s.partial" / "data" / MANIFEST).exists()
    again = write_dataset(path, episodes, source=source, name="n", overwrite=True)
    whole = write_dataset(tmp_path / "w", episodes, source=source, name="n")
    assert contents(again.path) == contents(whole.path)


def test_a_file_size_limit_is_reported_and_leaves_nothing_that_opens(
    convert, tmp_path, uninterrupted
):
    path = tmp_path / "s"
    assert convert(path, limit=600) == 1
    assert not path.exists()
    with pytest.raises(InvalidInputError):
        open_dataset(path)
    assert convert(path) == 0
    assert contents(path) == uninterrupted


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"Cannot write the store .*file.s.*another place"):
        StoreWriter(tmp_path / "file" / "s", name="n")


def test_another_conversion_does_not_continue_this_one(tmp_path, make_episode):
    path = tmp_path / "s"
    unfinished = StoreWriter(path, name="a", source={"id": "1"})
    unfinished.add(make_episode(0, 3))
    unfinished._close()
    with pytest.raises(InvalidInputError, match=r"something else.*'a'"):
        StoreWriter(path, name="b", source={"id": "1"})
    with pytest.raises(InvalidInputError, match="something else"):
        StoreWriter(path, name="a", source={"id": "2"})
    dataset = write_dataset(path, [make_episode(1, 3)], name="b")  # no source: starts again
    assert dataset.table.source_ids == ("demo_1",)


def test_columns_of_no_values_resume(tmp_path, make_episode):
    from dataclasses import replace

    episode = replace(make_episode(0, 3), infos={"act": np.zeros((3, 0))})
    unfinished = StoreWriter(tmp_path / "s", name="a")
    unfinished.add(episode)
    unfinished._close()
    with StoreWriter(tmp_path / "s", name="a") as again:
        assert again.completed == {"demo_0"}
    assert open_dataset(tmp_path / "s").episode(0).infos["act"].shape == (3, 0)


def test_anonymous_episodes_are_not_mixed_with_new_ones(tmp_path, make_episode):
    from dataclasses import replace

    path = tmp_path / "s"
    unfinished = StoreWriter(path, name="a")
    unfinished.add(replace(make_episode(0, 3), meta={}))
    unfinished._close()
    with pytest.raises(InvalidInputError, match="no source_id"):
        StoreWriter(path, name="a")
    with StoreWriter(path, name="a", resume=False) as fresh:
        fresh.add(make_episode(1, 3))
    assert len(open_dataset(path)) == 1


# ---- damaged stores -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, make_episode) -> Path:
    path = tmp_path_factory.mktemp("healthy") / "s"
    write_dataset(path, [make_episode(i, 5) for i in range(3)])
    return path


@pytest.fixture
def damaged(tmp_path, healthy) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "s"))


def column_file(path: Path, column: str) -> Path:
    table = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    return path / next(name for name, item in table.items() if item.get("column") == column)


def refuses(path: Path, *words: str, verify: bool = False) -> None:
    with pytest.raises(CorruptFileError) as caught:
        open_dataset(path, verify=verify)
    for word in (*words, "onvert"):
        assert word in str(caught.value)


@pytest.mark.parametrize("column", ["obs/cameras/front", "action", "info/qpos"])
def test_truncation_is_refused(damaged, column):
    file = column_file(damaged, column)
    size = file.stat().st_size
    os.truncate(file, size - 1)
    refuses(damaged, file.name, f"{size - 1} bytes", f"expected {size}", "truncated")


@pytest.mark.parametrize("size", [0, 5, 40])
def test_truncation_within_the_header_is_refused(damaged, size):
    file = column_file(damaged, "action")
    os.truncate(file, size)
    refuses(damaged, file.name, "'action'", "header")


def test_a_grown_file_is_refused(damaged):
    file = column_file(damaged, "reward")
    with file.open("ab") as stream:
        stream.write(b"x")
    refuses(damaged, file.name, "longer")


def test_wrong_dtype_and_shape_are_refused(damaged):
    file = column_file(damaged, "action")
    array = np.load(file)
    np.save(file, array.astype(np.int32))
    refuses(damaged, file.name, "'action'", "dtype is <i4", "expected <f4")
    np.save(file, array.reshape(2, -1))
    refuses(damaged, file.name, "shape is [2, 15]", "expected [15, 2]")
    np.save(file, np.asfortranarray(array))
    refuses(damaged, file.name, "Fortran")


def test_pickled_arrays_are_refused(damaged):
    file = column_file(damaged, "action")
    marker = damaged / "unpickled"

    class Trap:
        def __reduce__(self):
            return Path.touch, (marker,)

    np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    refuses(damaged, file.name, "pickled Python objects")
    assert not marker.exists()


def test_pickled_tables_are_refused(damaged):
    np.savez(damaged / "episodes.npz", length=np.array([{}], dtype=object), allow_pickle=True)
    refuses(damaged, "episodes.npz")


@pytest.mark.parametrize("column", ["obs/cameras/front", "obs/state", "termination"])
def test_a_flipped_bit_is_found_by_verification(damaged, column):
    file = column_file(damaged, column)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    open_dataset(damaged)  # quick checks do not read the data
    refuses(damaged, file.name, "sha256", verify=True)
    with pytest.raises(CorruptFileError, match="altered"):
        verify_dataset(damaged)


@pytest.mark.parametrize("name", ["episodes.npz", "episodes.jsonl", "stats.json"])
def test_a_flipped_bit_in_a_table_is_found_at_once(damaged, name):
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    refuses(damaged, name, "sha256")


def test_nan_is_found_by_verification(damaged):
    file = column_file(damaged, "obs/state")
    array = np.load(file)
    array[3, 1] = np.nan
    np.save(file, array)
    manifest = json.loads((damaged / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][file.name]["sha256"] = files_sha256(file)
    (damaged / MANIFEST).write_bytes(dump_manifest(manifest))
    refuses(damaged, "'obs/state'", "NaN", verify=True)


def files_sha256(file: Path) -> str:
    from mail_agents.data.manifest import file_sha256

    return file_sha256(file)


def test_missing_files_are_refused(damaged):
    file = column_file(damaged, "truncation")
    file.unlink()
    refuses(damaged, file.name, "missing")


def test_another_schema_version_is_refused(damaged):
    manifest = json.loads((damaged / MANIFEST).read_text(encoding="utf-8"))
    (damaged / MANIFEST).write_bytes(dump_manifest({**manifest, "schema": 2}))
    refuses(damaged, MANIFEST, "'schema' is 2", "reads 1")


def test_an_altered_manifest_is_refused(damaged):
    text = (damaged / MANIFEST).read_text(encoding="utf-8")
    (damaged / MANIFEST).write_text(text.replace('"n_steps": 15', '"n_steps": 16'))
    refuses(damaged, MANIFEST, "altered")
    (damaged / MANIFEST).write_text(text[: len(text) // 2])
    refuses(damaged, MANIFEST, "not readable JSON")
    (damaged / MANIFEST).write_text("{}")
    with pytest.raises(CorruptFileError, match="another kind of file"):
        open_dataset(damaged)


KEYS = [
    *("name", "tasks", "n_episodes", "n_steps", "features", "env_specs", "source"),
    *("reference_scores", "sha256", "files"),
    *("files/episodes.npz", "files/stats.json/sha256", "files/stats.json/bytes"),
    *("files/action/dtype", "files/action/shape", "features/observations", "features/action/dtype"),
]


@pytest.mark.parametrize("key", KEYS)
def test_a_manifest_without_a_key_is_refused(damaged, key):
    manifest = json.loads((damaged / MANIFEST).read_text(encoding="utf-8"))
    action = column_file(damaged, "action").name
    *parents, last = [
        action if key.startswith("files/") and p == "action" else p for p in key.split("/")
    ]
    owner = manifest
    for parent in parents:
        owner = owner[parent]
    del owner[last]
    (damaged / MANIFEST).write_bytes(dump_manifest(manifest))
    refuses(damaged, MANIFEST, f"key {last!r} is missing")


def test_file_names_cannot_leave_the_store(damaged):
    manifest = json.loads((damaged / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"]["../outside.npy"] = {"bytes": 1, "sha256": ""}
    (damaged / MANIFEST).write_bytes(dump_manifest(manifest))
    refuses(damaged, "leaves the store")


def test_tables_that_do_not_fit_the_arrays_are_refused(damaged, make_episode):
    other = write_dataset(damaged.parent / "o", [make_episode(i, 6) for i in range(3)]).path
    manifest = json.loads((damaged / MANIFEST).read_text(encoding="utf-8"))
    shutil.copy(other / "episodes.npz", damaged / "episodes.npz")
    foreign = json.loads((other / MANIFEST).read_text(encoding="utf-8"))["files"]["episodes.npz"]
    manifest["files"]["episodes.npz"] = foreign
    (damaged / MANIFEST).write_bytes(dump_manifest(manifest))
    refuses(damaged, "episodes.npz", "rows of")


def test_a_missing_store_says_what_to_do(tmp_path):
    with pytest.raises(InvalidInputError, match="mail-agents data convert"):
        open_dataset(tmp_path / "nothing")


def test_harmless_extra_files_are_ignored(damaged):
    (damaged / ".DS_Store").write_bytes(b"x")
    assert len(open_dataset(damaged, verify=True).windows(WindowSpec())) == 15
