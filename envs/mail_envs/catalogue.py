"""Names of the worlds, readable without importing any simulator."""

from typing import Any

import gymnasium

from mail_agents.data.env_specs import spec_to_dict
from mail_agents.errors import InvalidInputError
from mail_wrappers.worlds import LIBERO_HORIZON, ROBOSUITE_HORIZON, ROBOSUITE_TASKS

__all__ = [
    "LIBERO_HORIZON",
    "METAWORLD_CAMERAS",
    "METAWORLD_HORIZON",
    "METAWORLD_TASKS",
    "ROBOSUITE_HORIZON",
    "ROBOSUITE_TASKS",
    "env_spec_dict",
]

#: Steps after which an episode is truncated unless ``gymnasium.make(max_episode_steps=)`` says
#: otherwise: Meta-World's own ``SawyerXYZEnv.max_path_length``.
METAWORLD_HORIZON = 500

#: The 50 tasks of Meta-World (Yu et al. 2019; benchmark MT50), version 3.
METAWORLD_TASKS: tuple[str, ...] = (
    "assembly-v3",
    "basketball-v3",
    "bin-picking-v3",
    "box-close-v3",
    "button-press-topdown-v3",
    "button-press-topdown-wall-v3",
    "button-press-v3",
    "button-press-wall-v3",
    "coffee-button-v3",
    "coffee-pull-v3",
    "coffee-push-v3",
    "dial-turn-v3",
    "disassemble-v3",
    "door-close-v3",
    "door-lock-v3",
    "door-open-v3",
    "door-unlock-v3",
    "drawer-close-v3",
    "drawer-open-v3",
    "faucet-close-v3",
    "faucet-open-v3",
    "hammer-v3",
    "hand-insert-v3",
    "handle-press-side-v3",
    "handle-press-v3",
    "handle-pull-side-v3",
    "handle-pull-v3",
    "lever-pull-v3",
    "peg-insert-side-v3",
    "peg-unplug-side-v3",
    "pick-out-of-hole-v3",
    "pick-place-v3",
    "pick-place-wall-v3",
    "plate-slide-back-side-v3",
    "plate-slide-back-v3",
    "plate-slide-side-v3",
    "plate-slide-v3",
    "push-back-v3",
    "push-v3",
    "push-wall-v3",
    "reach-v3",
    "reach-wall-v3",
    "shelf-place-v3",
    "soccer-v3",
    "stick-pull-v3",
    "stick-push-v3",
    "sweep-into-v3",
    "sweep-v3",
    "window-close-v3",
    "window-open-v3",
)

#: Cameras that every Meta-World scene has.
METAWORLD_CAMERAS: tuple[str, ...] = (
    "topview",
    "corner",
    "corner2",
    "corner3",
    "corner4",
    "behindGripper",
    "gripperPOV",
)


def env_spec_dict(env: gymnasium.Env) -> dict[str, Any]:
    """Describes how to make an environment again, for a dataset's manifest.

    Args:
        env: Environment made by ``gymnasium.make``.

    Returns:
        The JSON form of its ``EnvSpec``, with an id such as ``mail_envs:metaworld/reach-v3``, see
        :func:`~mail_agents.data.env_specs.importable_id`.

    Raises:
        InvalidInputError: The environment was constructed without ``gymnasium.make``.
    """
    if env.spec is None:
        raise InvalidInputError(
            f"{type(env.unwrapped).__name__} has no spec. Make it with gymnasium.make(id) so that "
            "others can make it again."
        )
    return spec_to_dict(env.spec)
