"""Tasks and environment arguments as the scripts' command lines name them."""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

from mail_agents.errors import InvalidInputError, MailAgentsError, unknown_name
from mail_envs import METAWORLD_TASKS, list_worlds


def resolve_tasks(patterns: Sequence[str]) -> dict[str, str]:
    """Environment ids by task name, in the order given, patterns replaced by what they match.

    Args:
        patterns: Shell-style patterns for the part after ``mail_envs:``, for example
            ``"libero_object/*"``; without a slash they are Meta-World's (``"door-*"``).

    Raises:
        UnknownNameError: A pattern matches nothing.
        InvalidInputError: Two environments have the same task name.
    """
    tasks: dict[str, str] = {}
    for pattern in patterns:
        found = list_worlds(pattern if "/" in pattern else f"metaworld/{pattern}")
        if not found:
            raise _unknown_task(pattern)
        for env_id in found:
            other = tasks.setdefault(env_id.rpartition("/")[2], env_id)
            if other != env_id:
                raise InvalidInputError(
                    f"{env_id} and {other} have the same task name, which a dataset cannot tell "
                    "apart. Collect them into different datasets."
                )
    return tasks


def _unknown_task(pattern: str) -> MailAgentsError:
    if "/" not in pattern:
        hint = "Tasks of other worlds are named with their suite, as in 'libero_object/*'."
        return unknown_name("Meta-World task", pattern, METAWORLD_TASKS, hint)
    suite = pattern.partition("/")[0]
    names = [env_id.partition(":")[2] for env_id in list_worlds()]
    suites = sorted({name.partition("/")[0] for name in names})
    if suite not in suites:
        return unknown_name("world", suite, suites)
    return unknown_name("task", pattern, [n for n in names if n.startswith(f"{suite}/")])


def parse_env_kwargs(given: Mapping[str, str], refused: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments from a command line, each value in JSON where it parses, else text.

    Args:
        given: Texts by name.
        refused: Why a name may not be among them.

    Raises:
        InvalidInputError: A name is refused.
    """
    kwargs: dict[str, Any] = {}
    for name, value in given.items():
        if name in refused:
            raise InvalidInputError(f"--env-kwargs may not hold {name!r}: {refused[name]}.")
        try:
            kwargs[name] = json.loads(value)
        except json.JSONDecodeError:
            kwargs[name] = value
    return kwargs


def check_env_kwargs(env_ids: Iterable[str], names: Iterable[str]) -> None:
    """Refuses keyword arguments that an environment does not take, before any is made.

    Raises:
        UnknownNameError: An environment does not take one.
    """
    for env_id in env_ids:
        spec = gymnasium.spec(env_id.rpartition(":")[2])
        entry = spec.entry_point
        creator = load_env_creator(entry) if isinstance(entry, str) else entry
        own = set(inspect.signature(creator).parameters) - set(spec.kwargs)  # type: ignore[arg-type]
        for name in names:
            if name not in own | set(inspect.signature(gymnasium.make).parameters):
                raise unknown_name(f"keyword argument of {env_id}", name, sorted(own))
