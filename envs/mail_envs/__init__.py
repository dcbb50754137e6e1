"""Worlds: simulators behind one Gymnasium interface, scripted experts, demonstration collection.

Importing this package registers every world with Gymnasium by name only; no simulator is imported
until one is made::

    import gymnasium

    env = gymnasium.make("mail_envs:metaworld/reach-v3", cameras=("corner2",))

The import also chooses MuJoCo's OpenGL backend (environment variable ``MUJOCO_GL``) when nobody
has, because MuJoCo reads it once, at its own first import.
"""

import fnmatch

import gymnasium

from mail_envs.catalogue import (
    LIBERO_HORIZON,
    METAWORLD_HORIZON,
    METAWORLD_TASKS,
    ROBOSUITE_HORIZON,
    ROBOSUITE_TASKS,
)
from mail_envs.rendering import select_gl_backend
from mail_wrappers.datasets.d4rl_names import WORLDS as D4RL_WORLDS
from mail_wrappers.datasets.libero_names import SUITES, tasks_of

__all__ = ["METAWORLD_TASKS", "list_worlds"]


def list_worlds(pattern: str = "*") -> list[str]:
    """Ids of the worlds of this package, ready for ``gymnasium.make``.

    Args:
        pattern: Shell-style pattern for the part after ``mail_envs:``, for example
            ``"metaworld/door-*"``.

    Returns:
        Sorted ids such as ``"mail_envs:metaworld/reach-v3"``; empty when nothing matches.
    """
    names = [f"metaworld/{task}" for task in METAWORLD_TASKS]
    names += [f"d4rl/{world}" for world in D4RL_WORLDS]
    names += [f"{suite}/{task}" for suite in SUITES for task in tasks_of(suite)]
    names += [f"robosuite/{task}" for task in ROBOSUITE_TASKS]
    return [f"mail_envs:{name}" for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


def _register_worlds() -> None:
    for task in METAWORLD_TASKS:
        gymnasium.register(
            id=f"metaworld/{task}",
            entry_point="mail_envs.metaworld:MetaWorldEnv",
            max_episode_steps=METAWORLD_HORIZON,
            kwargs={"task": task},
        )
    for name, world in D4RL_WORLDS.items():
        gymnasium.register(
            id=f"d4rl/{name}",
            entry_point=world.entry_point,
            max_episode_steps=world.max_episode_steps,
            kwargs=dict(world.kwargs),
        )
    for suite in SUITES:
        for task in tasks_of(suite):
            gymnasium.register(
                id=f"{suite}/{task}",
                entry_point="mail_envs.libero:LiberoEnv",
                max_episode_steps=LIBERO_HORIZON,
                kwargs={"task": task, "suite": suite},
            )
    for task in ROBOSUITE_TASKS:
        gymnasium.register(
            id=f"robosuite/{task}",
            entry_point="mail_envs.robosuite:RobosuiteEnv",
            max_episode_steps=ROBOSUITE_HORIZON,
            kwargs={"task": task},
        )


select_gl_backend()
_register_worlds()
