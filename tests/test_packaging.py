"""The wheel and the source distribution: what they hold and what they declare."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_ROOTS = {"mail_agents", "mail_envs", "mail_wrappers", "mail_baselines"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Builds both distributions from a copy, without the network."""
    source = tmp_path_factory.mktemp("source")
    output = tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mail_agents", "envs", "wrappers", "baselines"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    code = (
        "import sys; from setuptools import build_meta as b; output = sys.argv[1]; "
        "b.build_wheel(output); b.build_sdist(output)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(output)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_exactly_four_import_roots(wheel):
    roots = {name.split("/")[0] for name in wheel.namelist()}
    assert {r for r in roots if not r.endswith(".dist-info")} == IMPORT_ROOTS
    for root in IMPORT_ROOTS:
        assert f"{root}/__init__.py" in wheel.namelist()
        assert f"{root}/py.typed" in wheel.namelist()


def test_wheel_holds_every_module_and_data_file(wheel):
    packed = set(wheel.namelist())
    folders = {"mail_agents": ROOT} | {
        f"mail_{name}": ROOT / name for name in ("envs", "wrappers", "baselines")
    }
    for package, base in folders.items():
        for path in (base / package).rglob("*"):
            if path.suffix in (".py", ".json", ".css", ".cpp", ".h"):
                assert path.relative_to(base).as_posix() in packed


def test_metadata(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Name"] == "mail-agents"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    (license_name,) = [n for n in wheel.namelist() if n.endswith("/LICENSE")]
    assert "mail-agents contributors" in wheel.read(license_name).decode()


def test_version_is_the_modules(wheel):
    import mail_agents

    assert mail_agents.__version__ == PROJECT["version"]


def test_entry_points(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt")]
    points = configparser.ConfigParser(delimiters=("=",))
    points.read_string(wheel.read(name).decode())
    assert points["console_scripts"]["mail-agents"] == "mail_agents.cli:main"
    assert points["mail_agents.agents"]["mail"] == "mail_agents.agents.builtin:register_agents"
    assert points["mail_agents.agents"]["baselines"] == "mail_baselines:register_agents"


@pytest.mark.parametrize(
    "target",
    [
        target
        for group in ({"scripts": PROJECT["scripts"]}, PROJECT["entry-points"])
        for points in group.values()
        for target in points.values()
    ],
)
def test_every_entry_point_exists(target):
    module, _, name = target.partition(":")
    code = f"import {module}; assert callable({module}.{name})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                str(ROOT / folder) for folder in (".", "envs", "wrappers", "baselines")
            ),
        },
    )
    assert done.returncode == 0, done.stderr


def test_sdist_builds_the_same_packages(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = archive.getnames()
    top = names[0].split("/")[0]
    for wanted in ("pyproject.toml", "LICENSE", "mail_agents/registry.py", "mail_agents/py.typed"):
        assert f"{top}/{wanted}" in names


def requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for group in lists for text in group]


def test_the_tested_pins_satisfy_the_declared_ranges():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for requirement in requirements():
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement
    named = {requirement.name for requirement in requirements()}
    core = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert core <= set(pins), "every core dependency has a tested version"
    assert named - set(pins) <= {"mail-agents", "causal-conv1d", "mamba-ssm"}


def test_core_needs_no_simulator_and_no_torchvision():
    core = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert core.isdisjoint(
        {"mujoco", "torchvision", "minari", "mamba-ssm", "transformers", "wandb"}
    )


def test_all_leaves_out_what_needs_a_compiler_or_a_gpu():
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(everything).extras == {
        *("sim", "robosuite", "libero", "minari", "sb3"),
    }
    # It declares a package that CMake builds; what the simulation needs is listed instead.
    named = {requirement.name for requirement in requirements()}
    assert "hf-libero" not in named
    for extra in ("sim", "robosuite", "libero"):
        bounds = [
            Requirement(text).specifier
            for text in PROJECT["optional-dependencies"][extra]
            if Requirement(text).name == "mujoco"
        ]
        assert len(bounds) == 1
        assert bounds[0].contains("3.3.0")
        assert not bounds[0].contains("3.10.0")
