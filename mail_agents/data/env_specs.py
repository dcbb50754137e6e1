"""Environments in a manifest: descriptions from which a fresh process can make them again."""

import json
from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from mail_agents.data.episode import Episode
from mail_agents.data.sim_states import narrow_states


def importable_id(spec: EnvSpec) -> str:
    """The id by which ``gymnasium.make`` finds an environment in a fresh process.

    Gymnasium knows an environment only after the package that registers it was imported, which
    ``"package:id"`` does first. The package is taken from the entry point; ids of Gymnasium's own
    environments, of scripts and of entry points that are not text are returned unchanged.

    Args:
        spec: Spec of a made environment.

    Returns:
        An id such as ``"mail_envs:metaworld/reach-v3"``.
    """
    if not isinstance(spec.entry_point, str) or ":" in spec.id:
        return spec.id
    package = spec.entry_point.partition(":")[0].partition(".")[0]
    return spec.id if package in ("", "gymnasium", "__main__") else f"{package}:{spec.id}"


def spec_to_dict(spec: EnvSpec) -> dict[str, Any]:
    """JSON form of a spec whose id is :func:`importable_id`, for ``env_specs`` of a dataset."""
    return {**json.loads(spec.to_json()), "id": importable_id(spec)}


def recording_kwargs(source: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """Keyword arguments that episodes were recorded with, where they differ from ``env_specs``.

    A collection notes them as ``env_kwargs``, a converted file as ``recorded_with`` by task: a
    policy is evaluated without the steps that demonstrations go on for, and from other starts.

    Args:
        source: ``source`` of a dataset's info.
        task: Task of the episodes.
    """
    kwargs = source.get("recorded_with", {}).get(task) or source.get("env_kwargs") or {}
    return dict(kwargs)


def recorded_start(episode: Episode, env: gymnasium.Env) -> dict[str, Any] | None:
    """Arguments of ``reset`` that start an episode again where it was started.

    Args:
        episode: The recorded episode.
        env: Where it shall start. Its method ``reset_options()``, if it has one, names the options
            that it takes.

    Returns:
        Its seed and options. Without a seed, the first of the recorded simulator states, where
        fixtures stood if the recording and the environment know of them, and seed 0 for what these
        leave open. None when it has neither seed nor states.
    """
    if episode.seed is not None:
        return {"seed": episode.seed, "options": episode.meta.get("options")}
    if "states" not in episode.infos:
        return None
    options: dict[str, Any] = {"state": narrow_states(episode.infos["states"])[0].copy()}
    if "fixtures" in episode.meta and "fixtures" in _reset_options(env):
        options["fixtures"] = episode.meta["fixtures"]
    return {"seed": 0, "options": options}


def _reset_options(env: gymnasium.Env) -> tuple[str, ...]:
    try:
        return tuple(env.get_wrapper_attr("reset_options")())
    except AttributeError:
        return ()
