"""LIBERO's names: equal to the installed benchmark's, and useful without it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mail_agents.errors import UnknownNameError
from mail_wrappers.datasets.libero_names import SUITES, suite_of, tasks_of

ALL = [task for suite in SUITES for task in tasks_of(suite)]


def test_sizes_and_order():
    assert [len(tasks_of(suite)) for suite in SUITES] == [10, 10, 10, 10, 90]
    assert len(set(ALL)) == 130
    assert tasks_of("libero_object")[7] == "pick_up_the_milk_and_place_it_in_the_basket"
    assert tasks_of("libero_goal")[9] == "put_the_wine_bottle_on_the_rack"


def test_suite_of():
    assert suite_of("turn_on_the_stove") == "libero_goal"
    assert suite_of("turn_on_the_stove", hint="/data/libero_goal/x") == "libero_goal"
    assert suite_of("turn_on_the_oven") is None
    with pytest.raises(UnknownNameError, match="Did you mean 'libero_object'"):
        tasks_of("libero_objects")


def test_equals_the_installed_benchmark():
    spec = importlib.util.find_spec("libero")
    if spec is None:
        pytest.skip("LIBERO is not installed (docs/install.md)")
    (root,) = spec.submodule_search_locations
    code = (Path(root) / "libero" / "benchmark" / "libero_suite_task_map.py").read_text()
    scope: dict = {}
    exec(code, scope)
    theirs = scope["libero_task_map"]
    assert {suite: list(tasks_of(suite)) for suite in SUITES} == {s: theirs[s] for s in SUITES}


def test_imports_nothing_heavy():
    code = (
        "import sys, mail_wrappers.datasets.libero_names as n; n.tasks_of('libero_10');"
        "print([m for m in ('torch', 'libero', 'robosuite', 'mujoco') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
