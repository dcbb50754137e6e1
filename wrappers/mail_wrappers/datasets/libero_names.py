"""Suites and tasks of LIBERO (Liu et al. 2023), without importing LIBERO.

Facts of Lifelong-Robot-Learning/LIBERO: the task lists of
``libero/libero/benchmark/libero_suite_task_map.py`` in task order 0. A task's name is the stem of
its BDDL file, and of its HDF5 file without ``_demo``;
:func:`~mail_agents.data.instructions.instruction` says what it asks for.
"""

import json
from functools import cache
from pathlib import Path

from mail_agents.errors import unknown_name

#: The five suites; ``libero_10`` is also called LIBERO-Long.
SUITES: tuple[str, ...] = (
    "libero_spatial",
    "libero_object",
    "libero_goal",
    "libero_10",
    "libero_90",
)


@cache
def _tasks() -> dict[str, tuple[str, ...]]:
    text = Path(__file__).with_name("libero_tasks.json").read_text(encoding="utf-8")
    return {suite: tuple(tasks) for suite, tasks in json.loads(text).items()}


def tasks_of(suite: str) -> tuple[str, ...]:
    """Names of a suite's tasks, in the benchmark's order 0.

    Args:
        suite: One of :data:`SUITES`.

    Raises:
        UnknownNameError: There is no such suite.
    """
    if suite not in SUITES:
        raise unknown_name("LIBERO suite", suite, SUITES)
    return _tasks()[suite]


def suite_of(task: str, hint: str | None = None) -> str | None:
    """The suite that a task belongs to, or None when LIBERO has no such task.

    Args:
        task: Name such as ``pick_up_the_milk_and_place_it_in_the_basket``.
        hint: Anything that may name the suite, such as a folder; it decides if the name is in
            several suites.
    """
    found = [suite for suite in SUITES if task in _tasks()[suite]]
    named = [suite for suite in found if hint and suite in hint]
    return (named or found or [None])[0]
