"""Names of the worlds: found without a simulator, made by gymnasium, made again from a manifest."""

import json
import subprocess
import sys

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec

import mail_envs
from mail_agents.errors import InvalidInputError, UnknownNameError
from mail_envs.catalogue import METAWORLD_CAMERAS, METAWORLD_HORIZON, env_spec_dict


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": ":".join(sys.path), **env}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )


def test_importing_the_package_imports_no_simulator() -> None:
    heavy = "('metaworld', 'mujoco', 'torch', 'scipy')"
    code = f"import sys, mail_envs; print([m for m in {heavy} if m in sys.modules])"
    assert _python(code).stdout.strip() == "[]"


def test_catalogue_equals_upstream() -> None:
    from metaworld import SawyerXYZEnv
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert list(mail_envs.METAWORLD_TASKS) == sorted(ALL_V3_ENVIRONMENTS)
    assert len(mail_envs.METAWORLD_TASKS) == 50
    assert SawyerXYZEnv.max_path_length == METAWORLD_HORIZON
    model = gymnasium.make("mail_envs:metaworld/reach-v3").unwrapped._sim.model
    assert [model.camera(i).name for i in range(model.ncam)] == list(METAWORLD_CAMERAS)


def test_list_worlds() -> None:
    assert len(mail_envs.list_worlds("metaworld/*")) == 50
    assert len(mail_envs.list_worlds("d4rl/*")) == 20
    assert len(mail_envs.list_worlds("robosuite/*")) == 14
    assert len(mail_envs.list_worlds("libero_*")) == 130
    assert len(mail_envs.list_worlds()) == 214
    assert mail_envs.list_worlds("metaworld/door-*") == [
        f"mail_envs:metaworld/door-{what}-v3" for what in ("close", "lock", "open", "unlock")
    ]
    assert mail_envs.list_worlds("nothing*") == []


def test_unknown_names_suggest() -> None:
    from mail_envs.metaworld import MetaWorldEnv

    with pytest.raises(gymnasium.error.NameNotFound, match="drawer-open"):
        gymnasium.make("mail_envs:metaworld/drawer-opn-v3")
    with pytest.raises(UnknownNameError, match="Did you mean 'reach-v3'"):
        MetaWorldEnv("reach-v2")
    with pytest.raises(UnknownNameError, match="Did you mean 'corner2'"):
        MetaWorldEnv("reach-v3", cameras=("corner_2",))
    with pytest.raises(InvalidInputError, match=r"cameras=\('corner2',\)"):
        MetaWorldEnv("reach-v3", cameras="corner2")
    with pytest.raises(InvalidInputError, match="twice"):
        MetaWorldEnv("reach-v3", cameras=("corner", "corner"))
    with pytest.raises(InvalidInputError, match="Image size 0"):
        MetaWorldEnv("reach-v3", image_size=0)
    with pytest.raises(InvalidInputError, match="fast, stock"):
        MetaWorldEnv("reach-v3", render_quality="slow")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="rgb_array"):
        MetaWorldEnv("reach-v3", render_mode="human")


def test_spec_makes_the_same_environment_in_a_fresh_process() -> None:
    env = gymnasium.make("mail_envs:metaworld/push-v3", max_episode_steps=7, image_size=32)
    spec = json.dumps(env_spec_dict(env))
    assert json.loads(spec)["id"] == "mail_envs:metaworld/push-v3"
    code = (
        "import sys, gymnasium\n"
        f"spec = gymnasium.envs.registration.EnvSpec.from_json({spec!r})\n"
        "env = gymnasium.make(spec)\n"
        "print(env.spec.max_episode_steps, env.reset(seed=3)[0]['state'].tobytes().hex())\n"
        "gymnasium.make(spec.id)"
    )
    limit, state = _python(code).stdout.split()
    assert limit == "7"
    assert state == env.reset(seed=3)[0]["state"].tobytes().hex()


def test_spec_round_trips_through_json() -> None:
    env = gymnasium.make("mail_envs:metaworld/reach-v3", cameras=("corner2",), image_size=16)
    assert env.spec is not None
    again = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.observation_space == env.observation_space
    again_from_manifest = gymnasium.make(EnvSpec.from_json(json.dumps(env_spec_dict(again))))
    assert again_from_manifest.spec is not None
    # Describing an environment that was made from a description changes nothing.
    assert env_spec_dict(again_from_manifest)["id"] == "mail_envs:metaworld/reach-v3"


def test_spec_of_an_environment_without_one() -> None:
    from mail_envs.metaworld import MetaWorldEnv

    with pytest.raises(InvalidInputError, match=r"gymnasium\.make"):
        env_spec_dict(MetaWorldEnv("reach-v3"))


def test_foreign_environments_keep_their_id() -> None:
    assert env_spec_dict(gymnasium.make("CartPole-v1"))["id"] == "CartPole-v1"
