"""LIBERO is found, imported and given its meshes without questions, downloads or writing."""

import importlib.metadata
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mail_agents.errors import CorruptFileError, InvalidInputError, MissingDependencyError
from mail_envs import libero_setup, robosuite_setup
from mail_envs.libero_protocols import PROTOCOLS, protocol_named

PARTS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)


def make_assets(folder: Path) -> Path:
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        (folder / part / "something").touch()
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package with nothing but folders, and no home folder."""
    folder = tmp_path / "site" / "libero" / "libero"
    (folder / "bddl_files").mkdir(parents=True)
    (folder / "init_files").mkdir()
    monkeypatch.setattr(libero_setup, "package_folder", lambda: folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


def write_config(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(text)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(folder))


def test_without_meshes_the_error_has_the_commands(package):
    with pytest.raises(MissingDependencyError) as caught:
        libero_setup.asset_folder()
    message = str(caught.value)
    assert "git clone" in message
    assert "hf download lerobot/libero-assets --repo-type dataset" in message
    assert "MAIL_AGENTS_LIBERO_ASSETS" in message
    assert "\n" not in message  # `doctor` shows one line


def test_order_of_mesh_folders(package, tmp_path, monkeypatch):
    cache = make_assets(tmp_path / "home" / ".cache" / "libero" / "assets")
    assert libero_setup.asset_folder() == cache
    own = make_assets(package / "assets")
    assert libero_setup.asset_folder() == own
    named = make_assets(tmp_path / "named")
    write_config(tmp_path / "config", f"assets: {named}\n", monkeypatch)
    assert libero_setup.asset_folder() == named
    given = make_assets(tmp_path / "given")
    monkeypatch.setenv("MAIL_AGENTS_LIBERO_ASSETS", str(given))
    assert libero_setup.asset_folder() == given


def test_default_config_of_libero_names_no_meshes(package, tmp_path, monkeypatch):
    write_config(tmp_path / "config", f"assets: {package}/./assets\n", monkeypatch)
    cache = make_assets(tmp_path / "home" / ".cache" / "libero" / "assets")
    assert libero_setup.asset_folder() == cache


def test_incomplete_meshes_are_refused_by_what_is_missing(package, tmp_path, monkeypatch):
    folder = make_assets(tmp_path / "given")
    (folder / "textures" / "something").unlink()
    monkeypatch.setenv("MAIL_AGENTS_LIBERO_ASSETS", str(folder))
    with pytest.raises(InvalidInputError, match="lacks textures"):
        libero_setup.asset_folder()
    (folder / "textures").rmdir()
    monkeypatch.setenv("MAIL_AGENTS_LIBERO_ASSETS", str(folder))
    with pytest.raises(InvalidInputError, match="lacks textures"):
        libero_setup.asset_folder()
    monkeypatch.setenv("MAIL_AGENTS_LIBERO_ASSETS", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidInputError, match="is not a folder"):
        libero_setup.asset_folder()
    clone = make_assets(tmp_path / "clone" / "libero" / "libero" / "assets")
    monkeypatch.setenv("MAIL_AGENTS_LIBERO_ASSETS", str(tmp_path / "clone"))
    with pytest.raises(InvalidInputError, match=f"Did you mean {clone}"):
        libero_setup.asset_folder()
    monkeypatch.delenv("MAIL_AGENTS_LIBERO_ASSETS")
    write_config(tmp_path / "config", f"assets: {folder}\n", monkeypatch)
    with pytest.raises(InvalidInputError, match=r"'assets' in .*config\.yaml"):
        libero_setup.asset_folder()
    write_config(tmp_path / "config", f"assets: {tmp_path}/nowhere\n", monkeypatch)
    with pytest.raises(InvalidInputError, match=r"'assets' in .*config\.yaml is .*not a folder"):
        libero_setup.asset_folder()


@pytest.mark.parametrize("text", ["- a list\n", "a: [\n"])
def test_unreadable_config(package, tmp_path, monkeypatch, text):
    write_config(tmp_path / "config", text, monkeypatch)
    with pytest.raises(CorruptFileError, match=r"config\.yaml"):
        libero_setup.asset_folder()


def test_libero_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(libero_setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        libero_setup.package_folder()
    for line in ("pip install 'mail-agents[libero]'", "pip install --no-deps hf-libero==0.1.4"):
        assert line in str(caught.value)


def test_another_distribution_of_libero(package, tmp_path, monkeypatch):
    monkeypatch.setenv("MAIL_AGENTS_LIBERO_ASSETS", str(make_assets(tmp_path / "given")))

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(libero_setup.importlib.metadata, "version", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps hf-libero==0\.1\.4"):
        libero_setup.import_libero()


def test_fingerprint_sees_a_changed_file(tmp_path):
    folder = make_assets(tmp_path / "assets")
    (folder / "textures" / "a.png").write_bytes(b"1")
    before = libero_setup.asset_fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert libero_setup.asset_fingerprint(tmp_path / "copy") == before
    (folder / "textures" / "a.png").write_bytes(b"12")
    assert libero_setup.asset_fingerprint(folder) != before


def test_global_generators_are_seeded_and_restored():
    np.random.seed(5)
    random.seed(5)
    expected = np.random.rand(), random.random()
    np.random.seed(5)
    random.seed(5)
    with robosuite_setup.global_random(3):
        inside = np.random.rand()
    assert (np.random.rand(), random.random()) == expected
    with robosuite_setup.global_random(3):
        assert np.random.rand() == inside
    with robosuite_setup.global_random(2**40 + 3):
        assert np.random.rand() != inside
    assert inside == np.random.RandomState(3).rand()  # what LIBERO's env.seed(3) gives


def test_the_log_file_in_tmp_is_not_opened(tmp_path):
    with robosuite_setup._no_log_file():
        handler = logging.FileHandler("/tmp/robosuite.log")
        other = logging.FileHandler(tmp_path / "other.log")
    other.close()
    assert isinstance(handler, logging.NullHandler)
    assert (tmp_path / "other.log").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"not a zip",
        {"a": 1},
        np.zeros(3),
        np.full((2, 3), np.nan),
        np.zeros((2, 3), np.float32),
    ],
)
def test_damaged_initial_states(package, content):
    path = package / "init_files" / "libero_goal" / "turn_on_the_stove.pruned_init"
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CorruptFileError, match="turn_on_the_stove"):
        libero_setup.load_init_states("libero_goal", "turn_on_the_stove")


def test_initial_states_cannot_run_code(package, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = package / "init_files" / "libero_goal" / "turn_on_the_stove.pruned_init"
    path.parent.mkdir()
    torch.save([Evil()], path)
    with pytest.raises(CorruptFileError):
        libero_setup.load_init_states("libero_goal", "turn_on_the_stove")
    assert not (tmp_path / "pwned").exists()


def test_a_task_that_the_package_lacks(package):
    with pytest.raises(MissingDependencyError, match=r"no bddl_files/libero_goal/x\.bddl"):
        libero_setup.bddl_file("libero_goal", "x")


def test_import_is_silent_and_leaves_no_trace(libero_assets, tmp_path):
    """In a process of its own: nothing printed, asked, written or changed in the environment."""
    code = """
import os, sys
before = dict(os.environ)
from mail_envs.libero_setup import import_libero
import numpy as np
state = np.random.get_state()[1].tobytes()
before["MUJOCO_GL"] = os.environ["MUJOCO_GL"]
import_libero()
changed = dict(set(os.environ.items()) ^ set(before.items()))
assert not [name for name in changed if "QT_" not in name and name != "LD_LIBRARY_PATH"]  # OpenCV
assert np.random.get_state()[1].tobytes() == state
assert "torch" not in sys.modules
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if "LIBERO" not in name}
    environment |= {
        "PYTHONPATH": ":".join(sys.path),
        "MAIL_AGENTS_LIBERO_ASSETS": str(libero_assets),
        "HOME": str(home),
        "TMPDIR": str(tmp_path),
    }
    for name in ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        del environment[name]
    environment.setdefault("MUJOCO_GL", "egl")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "robosuite" not in done.stderr
    assert not list(home.iterdir())
    assert not list(tmp_path.glob("mail-agents-*"))


def test_protocols():
    """LIBERO's eval/default.yaml and metric.py, MaIL's benchmark_sim_new.py, run_libero_eval.py."""
    facts = {
        name: (p.episodes, p.settle_steps, p.settle_gripper, p.image_size, p.orientation)
        for name, p in PROTOCOLS.items()
    }
    assert facts == {
        "mail": (20, 5, -1.0, 128, "raw"),
        "libero": (20, 5, 0.0, 128, "raw"),
        "openvla": (50, 10, -1.0, 256, "rot180"),
    }
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    assert [PROTOCOLS["mail"].max_steps(suite) for suite in suites] == [600] * 5
    assert [PROTOCOLS["openvla"].max_steps(suite) for suite in suites] == [220, 280, 300, 520, 400]
    assert protocol_named("mail").env_kwargs == {
        "protocol": "mail",
        "orientation": "raw",
        "image_size": 128,
        "initial": "stored",
    }
    with pytest.raises(KeyError, match="Did you mean 'openvla'"):
        protocol_named("open-vla")
    with pytest.raises(KeyError, match="Unknown LIBERO suite"):
        PROTOCOLS["mail"].max_steps("libero_100")
