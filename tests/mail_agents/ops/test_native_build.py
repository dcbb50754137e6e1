"""The compiled kernels are built once, safely, or refused with a reason; the rest goes on."""

import logging
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mail_agents.errors import MissingDependencyError
from mail_agents.ops import _native, _user_cache, backends, selective_scan
from mail_agents.ops.backends import Probe, backend_report, recording_backends

SOURCE = """
extern "C" int value(void) { return 7; }
extern "C" const char *selftest_small(void) { return value() == 7 ? nullptr : "value"; }
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test starts without a library, and leaves none behind."""
    _native.load.cache_clear()
    monkeypatch.setattr(backends, "_logged", set())
    yield
    _native.load.cache_clear()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A source that compiles in no time, and a cache of its own; returns both folders."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "small.cpp").write_text(SOURCE)
    monkeypatch.setattr(_native, "_SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return sources, tmp_path / "cache" / "mail-agents" / "native"


@pytest.fixture
def compiler():
    """Skips where there is none; every other test here runs without."""
    try:
        return _native._compiler()
    except _native._Unavailable as error:
        pytest.skip(f"needs a C++ compiler: {error}")


@pytest.fixture
def no_numba(monkeypatch):
    """The next backend that 'auto' finds is torch, wherever the tests run."""
    monkeypatch.setattr(backends, "probe", lambda extension: Probe(None, "ImportError: absent"))


def pretend(tmp_path, monkeypatch, script):
    """Makes a shell script the compiler."""
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def again():
    _native.load.cache_clear()
    return _native.load()


def scan(backend="auto"):
    x, s = torch.zeros(1, 2, 8), torch.zeros(1, 2, 3)
    return selective_scan(x, x, -torch.ones(8, 3), s, s, backend=backend)


def test_a_library_is_built_once_and_found_again(compiler, small, monkeypatch, tmp_path):
    found = _native.load()
    assert (found.failure, found.library.value()) == ("", 7)
    assert [path.name for path in small[1].iterdir()] == [found.path.name]
    assert stat.S_IMODE(small[1].stat().st_mode) == 0o700

    def forbidden(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(_native, "_build", forbidden)
    assert again().path == found.path


def test_no_compiler(small, no_numba, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", "/nonexistent")
    with recording_backends(ran := {}), caplog.at_level(logging.INFO):
        assert scan().shape == (1, 2, 8)
        scan()
    assert ran["selective_scan"] == {"torch"}
    lines = [line for line in caplog.messages if "CXX names '/nonexistent'" in line]
    assert len(lines) == 1
    with pytest.raises(MissingDependencyError) as caught:
        scan("native")
    for part in ("CXX names '/nonexistent', which is not here", "unset CXX", "mail-agents doctor"):
        assert part in str(caught.value)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = again()
    assert found.library is None
    assert found.failure == "there is no C++ compiler"
    assert found.fix == _native._GET_COMPILER[sys.platform]


def test_a_compiler_that_fails(small, no_numba, tmp_path, monkeypatch, caplog):
    pretend(tmp_path, monkeypatch, 'echo "note: hm" >&2; echo "x.cpp:1: error: boom" >&2; exit 1')
    with recording_backends(ran := {}):
        scan()
    assert ran["selective_scan"] == {"torch"}
    found = _native.load()
    assert found.failure.endswith("compiler failed: x.cpp:1: error: boom")
    assert found.fix.startswith("export CXX=")
    assert list(small[1].iterdir()) == []
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "MAIL_AGENTS_BACKEND=torch" in warning.getMessage()


def test_a_source_that_does_not_compile(compiler, small):
    (small[0] / "wrong.cpp").write_text("int f( {")
    assert "wrong.cpp:1" in _native.load().failure
    assert list(small[1].iterdir()) == []


def test_a_compiler_that_hangs_is_ended_with_its_children(small, tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    pretend(tmp_path, monkeypatch, f"sleep 100 & echo $$ $! > {pids}; wait")
    monkeypatch.setattr(_native, "_TIMEOUT_S", 0.5)
    started = time.monotonic()
    assert "had not finished after" in _native.load().failure
    assert time.monotonic() - started < 30
    for pid in pids.read_text().split():
        deadline = time.monotonic() + 10
        while _alive(int(pid)):
            assert time.monotonic() < deadline, f"process {pid} is left"
            time.sleep(0.05)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # a container's first process may not collect the dead
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_something_that_cannot_be_executed_as_compiler(small, tmp_path, monkeypatch):
    path = pretend(tmp_path, monkeypatch, "")
    path.write_text("no shebang, no program")
    assert _native.load().library is None
    assert "cannot run" in _native.load().failure


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_damaged_library_is_never_opened_and_built_again(compiler, small, content):
    path = _native.load().path
    whole = path.read_bytes()
    path.unlink()  # a new file: the old one is mapped into this process
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    found = again()
    assert (found.failure, found.library.value()) == ("", 7)
    assert found.path.read_bytes() == whole


def test_a_library_for_another_system_is_built_again(compiler, small):
    good = _native.load().path
    text = small[1] / "other"
    text.write_bytes(b"not for this machine")
    text.chmod(0o600)
    bad = small[1] / f"{good.stem.rpartition('-')[0]}-{_native._digest(text)}.so"
    text.rename(bad)
    good.unlink()
    assert again().failure == ""
    assert not bad.exists()


def test_what_the_library_depends_on_is_in_its_name(compiler, small, monkeypatch):
    paths = [_native.load().path]
    (small[0] / "part.h").write_text("// new")
    paths.append(again().path)
    (small[0] / "small.cpp").write_text(SOURCE.replace("7", "8"))
    found = again()
    assert found.library.value() == 8
    paths.append(found.path)
    for name, value in (("_ABI", 2), ("_FLAGS", ("-O1", "-fPIC"))):
        monkeypatch.setattr(_native, name, value)
        paths.append(again().path)
    monkeypatch.setattr(_native, "_cpu_features", lambda: "fewer")
    paths.append(again().path)
    assert len(set(paths)) == len(paths)


def test_a_cache_that_cannot_be_written(compiler, small, tmp_path, monkeypatch):
    kept = _native.load().path

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(_native.tempfile, "TemporaryDirectory", read_only)
    assert again().path == kept  # what is there is used
    kept.unlink()
    found = again()
    assert "cannot write the compiled kernels" in found.failure
    assert "Read-only file system" in found.failure
    assert "XDG_CACHE_HOME" in found.fix
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = again()
    assert "no folder for the compiled kernels" in found.failure
    assert "XDG_CACHE_HOME" in found.fix


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions as on Unix")
def test_nothing_is_loaded_from_where_others_can_write(compiler, small, monkeypatch):
    _native.load()
    small[1].chmod(0o777)
    assert "others can write to it" in again().failure
    small[1].chmod(0o700)
    own = os.stat(small[1].parent).st_gid
    for mode, group in ((0o777, own), (0o775, own + 1), (0o720, own + 1)):
        small[1].parent.chmod(mode)
        monkeypatch.setattr(_native.os, "getegid", lambda group=group: group)
        assert f"others can write to {small[1].parent}" in again().failure
        assert f"chmod go-w {small[1].parent}" in _native.load().failure
    monkeypatch.setattr(_native.os, "getegid", lambda: own)
    small[1].parent.chmod(0o775)  # a group of the user's own
    assert again().failure == ""
    small[1].parent.chmod(0o1777)  # as /tmp: only owners rename
    assert again().failure == ""
    monkeypatch.setattr(_native.os, "geteuid", lambda: 12345)
    assert "belongs to another user" in again().failure


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions as on Unix")
def test_folders_above_belong_to_the_user_or_to_root(compiler, small, monkeypatch):
    _native.load()
    above, real = small[1].parent.resolve(), Path.stat

    def elsewhere(path, **options):
        found = real(path, **options)
        if path != above:
            return found
        return os.stat_result((*found[:4], 12345, *found[5:10]))

    monkeypatch.setattr(Path, "stat", elsewhere)
    failure = again().failure
    assert f"{above}, which holds" in failure
    assert "belongs to another user" in failure


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions as on Unix")
def test_folders_and_libraries_are_made_for_one_user_whatever_the_umask(compiler, small):
    before = os.umask(0o002)
    try:
        found = _native.load()
    finally:
        os.umask(before)
    assert found.failure == ""
    for path in (found.path, small[1], small[1].parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["mode", "owner", "link"])
def test_a_library_that_another_user_may_have_written_is_built_again(
    compiler, small, tmp_path, monkeypatch, kind
):
    path = _native.load().path
    whole = path.read_bytes()
    if kind == "mode":
        path.chmod(0o777)
    elif kind == "link":
        path.rename(tmp_path / "moved.so")
        path.symlink_to(tmp_path / "moved.so")
    else:
        real = Path.lstat
        first = iter([True])

        def foreign(self):
            found = real(self)
            if self != path or not next(first, False):
                return found
            return os.stat_result((*found[:4], 12345, *found[5:10]))

        monkeypatch.setattr(Path, "lstat", foreign)
    built = []
    build = _native._build
    monkeypatch.setattr(_native, "_build", lambda *a: built.append(1) or build(*a))
    assert again().failure == ""
    assert built == [1]
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert path.read_bytes() == whole


def test_without_a_compiler_a_library_of_the_same_sources_is_used(compiler, small, monkeypatch):
    path = _native.load().path
    monkeypatch.setattr(_native.shutil, "which", lambda name: None)
    found = again()
    assert (found.failure, found.path, found.library.value()) == ("", path, 7)
    monkeypatch.setenv("CXX", "/nonexistent")  # a name is a choice
    assert "CXX names '/nonexistent'" in again().failure
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(_native, "_cpu_features", lambda: "fewer")
    assert again().failure == "there is no C++ compiler"
    monkeypatch.undo()


def test_a_compiler_of_another_version_builds_its_own(compiler, small, monkeypatch):
    path = _native.load().path
    monkeypatch.setattr(_native, "_compiler", lambda: [*compiler, "-DOTHER"])
    assert again().path != path
    assert path.exists()


def test_a_compiler_that_is_no_command_line(small, monkeypatch):
    monkeypatch.setenv("CXX", 'g++ "')
    found = _native.load()
    assert found.failure == "CXX is no command line (No closing quotation)"
    assert found.fix == "unset CXX"


def test_wrong_numbers_are_not_trusted(compiler, small):
    (small[0] / "small.cpp").write_text(SOURCE.replace("== 7", "== 8"))
    found = _native.load()
    assert found.library is None
    assert "small.cpp as compiled here gives wrong numbers (value)" in found.failure


def test_two_processes_may_build_at_once(compiler, small):
    code = (
        "import pathlib, sys; from mail_agents.ops import _native;"
        "_native._SOURCES = pathlib.Path(sys.argv[1]); print('ready', flush=True); input();"
        "found = _native.load(); print(found.failure, found.library.value())"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(small[0])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in both] == [" 7\n", " 7\n"]
    assert all(path.suffix == ".so" for path in small[1].iterdir())
    assert _native.load().library.value() == 7


def test_folders_of_killed_builds_are_removed(compiler, small):
    left, recent = small[1] / "build-dead", small[1] / "build-busy"
    left.mkdir(parents=True)
    recent.mkdir()
    small[1].chmod(0o700)
    os.utime(left, (0, 0))
    assert _native.load().failure == ""
    assert not left.exists()
    assert recent.exists()


def test_importing_and_other_backends_compile_nothing(tmp_path):
    mark = tmp_path / "called"
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\ntouch {mark}\nexit 1\n")
    script.chmod(0o755)
    code = (
        "import os, sys, torch, mail_agents.mixers; from mail_agents.ops import selective_scan;"
        "x, s = torch.zeros(1, 2, 8), torch.zeros(1, 2, 3);"
        "run = lambda: selective_scan(x, x, -torch.ones(8, 3), s, s); run();"
        "assert 'numba' not in sys.modules; mark = sys.argv[1]; assert not os.path.exists(mark);"
        "sys.modules['numba'] = None; del os.environ['MAIL_AGENTS_BACKEND'];"
        "run(); assert os.path.exists(mark)"
    )
    environment = {**os.environ, "CXX": str(script), "MAIL_AGENTS_BACKEND": "torch"}
    subprocess.run([sys.executable, "-c", code, str(mark)], env=environment, check=True)


def test_reasons_to_refuse_tensors_come_before_compiling(monkeypatch):
    def forbidden():
        raise AssertionError("compiled")

    monkeypatch.setattr(_native, "_find_or_build", forbidden)
    x = torch.zeros(2)
    assert "on the CPU" in _native.refuse_native(x, None, torch.zeros(2, device="meta"))
    assert "float64" in _native.refuse_native(x, x.double())
    seen = []
    torch.func.vmap(lambda row: seen.append(_native.refuse_native(row)) or row)(x)
    assert "torch.func" in seen[0]


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(_native.sys, "platform", "win32")
    assert "Linux and macOS" in _native.load().failure


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _user_cache.user_cache() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(_native.sys, "platform", "linux")
    for invalid in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", invalid)
        assert _user_cache.user_cache() == tmp_path / ".cache"
    monkeypatch.setattr(_native.sys, "platform", "darwin")
    assert _user_cache.user_cache() == tmp_path / "Library" / "Caches"


def test_the_kernels_of_this_package_work_here(compiler):
    found = _native.load()
    assert found.failure == ""
    assert {row["reason"] for row in backend_report() if row["name"] == "native"} <= {""}


def test_the_report_says_why_and_what_auto_takes(no_numba, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    rows = {(row["op"], row["name"]): row for row in backend_report()}
    for (_, name), row in rows.items():
        if name == "native":
            assert row["available"] is False
            assert (row["fix"], row["auto"]) == ("unset CXX", [])
        if name == "torch":
            assert "cpu" in row["auto"]
