"""Descriptions of environments from which a fresh process can make them again."""

import json

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec

from mail_agents.data.env_specs import importable_id, spec_to_dict


@pytest.mark.parametrize(
    ("entry_point", "expected"),
    [
        ("some_package.envs.maze:Maze", "some_package:Maze-v0"),
        ("mail_envs.metaworld:MetaWorldEnv", "mail_envs:Maze-v0"),
        ("gymnasium.envs.classic_control:CartPoleEnv", "Maze-v0"),
        ("__main__:Maze", "Maze-v0"),
        (gymnasium.Env, "Maze-v0"),
        (None, "Maze-v0"),
    ],
)
def test_ids_name_the_package_that_registers_them(entry_point, expected):
    assert importable_id(EnvSpec("Maze-v0", entry_point)) == expected


def test_an_id_that_names_a_module_is_kept():
    assert importable_id(EnvSpec("mine:Maze-v0", "other.maze:Maze")) == "mine:Maze-v0"


def test_a_description_makes_the_environment_again():
    spec = gymnasium.make("CartPole-v1", max_episode_steps=7).spec
    again = gymnasium.make(EnvSpec.from_json(json.dumps(spec_to_dict(spec))))
    assert again.spec.max_episode_steps == 7
