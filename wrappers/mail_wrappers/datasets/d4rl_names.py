"""What D4RL calls its files, and the world that each of its datasets is evaluated in.

Facts of Farama-Foundation/D4RL: ``d4rl/infos.py`` (file names) and the ``register`` calls of its
packages (step limits). The worlds themselves are in ``mail_envs.d4rl``.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gymnasium.envs.registration import EnvSpec

from mail_agents.errors import unknown_name
from mail_wrappers.datasets.d4rl_reference import domain_of


@dataclass(frozen=True)
class D4RLWorld:
    """One evaluation environment.

    Attributes:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action, each in [-1, 1].
        max_episode_steps: Steps after which an episode is truncated.
        entry_point: ``module:callable`` that makes it.
        kwargs: What the callable is given.
    """

    observation_size: int
    action_size: int
    max_episode_steps: int
    entry_point: str
    kwargs: dict[str, Any] = field(default_factory=dict)


def _worlds() -> dict[str, D4RLWorld]:
    out = {}
    for body, sizes in {"hopper": (11, 3), "halfcheetah": (17, 6), "walker2d": (17, 6)}.items():
        out[body] = D4RLWorld(*sizes, 1000, "mail_envs.d4rl:LocomotionEnv", {"body": body})
    out["ant"] = D4RLWorld(111, 8, 1000, "mail_envs.d4rl:LocomotionEnv", {"body": "ant"})
    for maze, steps in {"umaze": 300, "medium": 600, "large": 800}.items():
        for suffix, reward in (("", "sparse"), ("-dense", "dense")):
            kwargs = {"maze": maze, "reward_type": reward}
            point = "mail_envs.pointmaze:Maze2dEnv"
            out[f"maze2d-{maze}{suffix}"] = D4RLWorld(4, 2, steps, point, kwargs)
    for maze, steps in {"umaze": 700, "medium": 1000, "large": 1000}.items():
        point = "mail_envs.antmaze:AntMazeEnv"
        out[f"antmaze-{maze}"] = D4RLWorld(29, 8, steps, point, {"maze": maze})
    for kind in ("complete", "partial", "mixed"):
        point = "mail_envs.d4rl:KitchenEnv"
        out[f"kitchen-{kind}"] = D4RLWorld(60, 9, 280, point, {"kind": kind})
    hands = {"pen": (45, 24, 100), "hammer": (46, 26, 200), "door": (39, 28, 200)}
    for task, facts in {**hands, "relocate": (39, 30, 200)}.items():
        out[task] = D4RLWorld(*facts, "mail_envs.d4rl:AdroitEnv", {"task": task})
    return out


#: Worlds by name; Gymnasium knows them as ``mail_envs:d4rl/<name>``.
WORLDS: dict[str, D4RLWorld] = _worlds()

_ANT_MAZES = {"u-maze": "umaze", "big-maze": "medium", "hardest-maze": "large"}
_HANDS = "pen|hammer|door|relocate"
_VERSION = re.compile(r"-v\d+$")


def dataset_id(file: str | Path) -> str:
    """The D4RL dataset that a file of a published name holds.

    Args:
        file: Path of an HDF5 file, such as ``hopper_medium-v2.hdf5``, ``hopper-medium-v2.hdf5``,
            ``maze2d-umaze-sparse-v1.hdf5`` or ``pen-v0_demos_clipped.hdf5``.

    Returns:
        An id such as ``hopper-medium-v2``.

    Raises:
        UnknownNameError: D4RL has no such dataset.
    """
    stem = Path(file).name.removesuffix(".hdf5").removesuffix(".h5")
    name = _awkward(stem) or _plain(stem)
    domain_of(name)
    return name


def _plain(stem: str) -> str:
    name = stem.replace("_", "-")
    if name.startswith("maze2d-"):
        name = name.replace("-sparse", "")
    elif not _VERSION.search(name):
        name = re.sub("^walker-", "walker2d-", re.sub("-mixed$", "-medium-replay", name))
    return name if _VERSION.search(name) else f"{name}-v0"  # only version 0 is not in the name


def _awkward(stem: str) -> str | None:
    if match := re.fullmatch(
        r"Ant_maze_(u-maze|big-maze|hardest-maze)_noisy_multistart_(True|False)_multigoal_"
        r"(True|False)_sparse(_fixed)?",
        stem,
    ):
        maze, several = _ANT_MAZES[match[1]], match[3] == "True"
        kind = {True: "-diverse", False: "" if maze == "umaze" else "-play"}[several]
        return f"antmaze-{maze}{kind}-v{2 if match[4] else 0}"
    if match := re.fullmatch(
        r"(mini_)?kitchen_microwave_kettle_(light_slider|bottomburner_light)-v0", stem
    ):
        if match[2] == "bottomburner_light":
            return "kitchen-mixed-v0"
        return "kitchen-complete-v0" if match[1] else "kitchen-partial-v0"
    if match := re.fullmatch(rf"({_HANDS})-v0_(demos|expert)_clipped", stem):
        return f"{match[1]}-{'human' if match[2] == 'demos' else 'expert'}-v0"
    if match := re.fullmatch(rf"({_HANDS})-demos-v0-bc-combined", stem):
        return f"{match[1]}-cloned-v0"
    return None


def world_of(name: str) -> str:
    """The world, a key of :data:`WORLDS`, that a dataset is evaluated in.

    Args:
        name: Dataset id such as ``antmaze-medium-play-v2``.

    Raises:
        UnknownNameError: D4RL has no such dataset, or the name is a domain of several worlds.
    """
    domain = domain_of(name)
    if domain in WORLDS:
        return domain
    # Mazes of "play" and "diverse" data are evaluated alike; kitchens by what must be done.
    world = "-".join(_VERSION.sub("", name).split("-")[:2])
    if world not in WORLDS:  # the bare domain
        raise unknown_name("D4RL world", name, [w for w in WORLDS if w.startswith(domain)])
    return world


def world_spec(world: str) -> dict[str, Any]:
    """Gymnasium spec of a world, for ``env_specs`` of a dataset."""
    facts = WORLDS[world]
    spec = EnvSpec(
        id=f"mail_envs:d4rl/{world}",
        entry_point=facts.entry_point,
        max_episode_steps=facts.max_episode_steps,
        kwargs=dict(facts.kwargs),
    )
    return json.loads(spec.to_json())
