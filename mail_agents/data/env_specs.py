"""Environments in a manifest: descriptions from which a fresh process can make them again."""

import json
from typing import Any

from gymnasium.envs.registration import EnvSpec


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
