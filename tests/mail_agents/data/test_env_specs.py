"""Descriptions of environments from which a fresh process can make them again."""

import json

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from mail_agents.data import Episode
from mail_agents.data.env_specs import (
    importable_id,
    recorded_start,
    recording_kwargs,
    spec_to_dict,
)


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


def test_keyword_arguments_of_a_recording_by_task_or_for_all():
    assert recording_kwargs({"env_kwargs": {"a": 1}}, "x") == {"a": 1}
    assert recording_kwargs({"recorded_with": {"x": {"a": 2}}}, "x") == {"a": 2}
    assert recording_kwargs({"recorded_with": {"x": {"a": 2}}}, "y") == {}


class Placed(gymnasium.Env):
    def reset_options(self):
        return ("state", "fixtures")


def test_an_episode_starts_from_its_seed_or_else_from_its_first_state():
    parts = ({"o": np.zeros((2, 1))}, np.zeros((1, 1)), *np.zeros((3, 1)))
    plain, placed = gymnasium.Env(), gymnasium.Wrapper(Placed())
    meta = {"options": {"init_state": 3}, "fixtures": {"cabinet": [0.0] * 7}}
    states = {"states": np.array([[1.0, 2.0], [3.0, 4.0]])}
    seeded = Episode(*parts, seed=4, meta=meta, infos=states)
    for env in (plain, placed):
        assert recorded_start(seeded, env) == {"seed": 4, "options": {"init_state": 3}}
    for env, known in ((plain, False), (placed, True)):
        start = recorded_start(Episode(*parts, meta=meta, infos=states), env)
        assert start is not None
        assert start["options"]["state"].tolist() == [1, 2]
        assert start["options"].get("fixtures") == (meta["fixtures"] if known else None)
    assert recorded_start(Episode(*parts), plain) is None
