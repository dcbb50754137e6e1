"""Published settings by dataset, and the agents they make."""

import pytest

import mail_agents
from mail_agents.errors import UnknownNameError
from mail_baselines.d4rl_settings import d4rl_setting


@pytest.mark.parametrize(
    ("name", "source", "targets"),
    [
        ("hopper-medium-v2", "kzl", (3600, 1800)),
        ("hopper", "ota", (1800, 3600, 7200, 36000, 72000)),
        ("halfcheetah-medium-expert-v2", "dm", (12000,)),
        ("halfcheetah-medium-replay-v2", "dm", (12000, 8000, 6000, 4500)),
        ("walker2d-medium-v2", "corl", (5000, 2500)),
        ("antmaze-umaze-v2", "dm", (5,)),
        ("antmaze-umaze-v2", "corl", (1, 0.5)),
        ("antmaze-umaze-diverse-v2", "dm", (20,)),
        ("antmaze-large-diverse-v2", "corl", (1, 0.5, 0.25, 0.125, 0.06, 0.03)),
        ("D4RL/hammer/expert-v2", "corl", (12800, 6400)),
        ("maze2d-umaze-v1", "corl", (280, 140)),
        ("mail_envs:d4rl/maze2d-umaze", "corl", (280, 140)),
        ("kitchen-complete-v0", "dm", (5, 4, 3, 2, 1)),
        ("reacher2d-medium", "kzl", (76, 40)),
    ],
)
def test_targets(name, source, targets):
    assert d4rl_setting(name).targets[source] == targets


@pytest.mark.parametrize(
    ("name", "scale", "history", "steps"),
    [
        ("Hopper-v4", 1000, 20, 1000),
        ("antmaze-medium-play-v2", 1, 20, 1000),
        ("kitchen", 1, 20, 1000),
        ("pen-human-v1", 1000, 20, 1000),
        ("maze2d-large-v1", 1, 20, 1000),
        ("reacher2d", 10, 5, 100),
    ],
)
def test_scale_and_context(name, scale, history, steps):
    found = d4rl_setting(name)
    assert (found.return_scale, found.history, found.max_timestep) == (scale, history, steps)


@pytest.mark.parametrize(
    ("name", "width", "rate"),
    [
        ("hopper-medium-v2", 256, 1e-4),
        ("hopper-medium-expert-v2", 128, 1e-3),
        ("halfcheetah-medium-v2", 128, 1e-3),
        ("walker2d-medium-v2", 128, 1e-4),
        ("walker2d-medium-replay-v2", 128, 1e-3),
        ("ant-medium-v2", 128, 1e-3),
    ],
)
def test_decision_mamba_has_sizes_by_dataset(name, width, rate):
    config = mail_agents.spec("decision-mamba").config(
        d4rl_setting(name).overrides("decision-mamba")
    )
    assert (config.d_model, config.optim.lr) == (width, rate)
    other = mail_agents.spec("dt").config(d4rl_setting(name).overrides("dt"))
    assert (other.d_model, other.optim.lr, other.return_scale) == (128, 1e-4, 1000)


def test_corl_counts_one_window_past_the_episode():
    assert d4rl_setting("hopper").overrides("dt-corl")["max_timestep"] == 1020
    assert d4rl_setting("hopper").overrides("dt")["max_timestep"] == 1000


def test_an_unknown_domain_is_refused_by_name():
    with pytest.raises(UnknownNameError, match=r"hoper.*Did you mean 'hopper'"):
        d4rl_setting("hoper-medium-v2")
