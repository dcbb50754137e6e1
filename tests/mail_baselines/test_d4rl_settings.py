"""Published settings by dataset, and the agents they make."""

import h5py
import numpy as np
import pytest

import mail_agents
from mail_agents import registry
from mail_agents.data.dataset import DatasetInfo, MemoryDataset
from mail_agents.errors import UnknownNameError
from mail_baselines.d4rl_settings import adapt, d4rl_setting, published_targets, setting_of


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
    config = mail_agents.spec("decision-mamba").config(d4rl_setting(name).overrides("ota"))
    assert (config.d_model, config.optim.lr) == (width, rate)
    other = mail_agents.spec("dt").config(d4rl_setting(name).overrides("kzl"))
    assert (other.d_model, other.optim.lr, other.return_scale) == (128, 1e-4, 1000)


def test_corl_counts_one_window_past_the_episode():
    assert d4rl_setting("hopper").overrides("corl")["max_timestep"] == 1020
    assert d4rl_setting("hopper").overrides("kzl")["max_timestep"] == 1000


def test_an_unknown_domain_is_refused_by_name():
    with pytest.raises(UnknownNameError, match=r"hoper.*Did you mean 'hopper'"):
        d4rl_setting("hoper-medium-v2")


# ---- data that D4RL published, and other data --------------------------------------------------


def published(name, kind="d4rl-hdf5"):
    source = {"kind": kind, "id": name}
    return DatasetInfo("data", ("t",), 1, 1, {}, source, {}, "0" * 64)


@pytest.mark.parametrize(
    ("info", "targets"),
    [
        (published("hopper-medium-v2"), (3600, 1800)),
        (published("D4RL/pen/human-v2", "minari"), ()),  # kzl has no Adroit
        (published("D4RL/antmaze/umaze-v1", "minari"), ()),
        (published("D4RL/pointmaze/umaze-v2", "minari"), None),  # no source has settings
        (published("mujoco/hopper/expert-v0", "minari"), None),  # other data of the same body
        (published("hopper", "sb3"), None),
        (published("hopper-medium"), None),  # our own, through a file of D4RL's layout
        (published("mine-v2"), None),
    ],
)
def test_only_data_that_d4rl_published_has_settings(info, targets):
    assert (setting_of(info) is None) == (targets is None)
    assert published_targets("dt", info) == (targets or ())


def test_data_without_a_source_have_no_settings(dataset):
    assert setting_of(dataset.info) is None
    assert published_targets("dt", dataset.info) == ()
    config = mail_agents.spec("dt").config()
    assert adapt(config, "dt", dataset.info) == config


@pytest.mark.parametrize(
    ("agent_id", "name", "targets"),
    [
        ("dt", "halfcheetah-medium-v2", (12000, 6000)),
        ("dt-released", "walker2d-medium-v2", (5000, 2500)),
        ("dt-corl", "pen-human-v1", (3100, 1550)),
        ("decision-mamba", "hopper-medium-v2", (1800, 3600, 7200, 36000, 72000)),
        ("decision-mamba-released", "pen-human-v1", ()),
        ("dm", "halfcheetah-medium-expert-v2", (12000,)),
        ("dm-released", "hopper-expert-v2", (3600,)),
        ("dm-paper", "kitchen-mixed-v0", (5, 4, 3, 2, 1)),
        ("bc", "hopper-medium-v2", ()),
    ],
)
def test_an_agent_aims_for_the_targets_of_its_authors(agent_id, name, targets):
    assert published_targets(agent_id, published(name)) == targets


@pytest.mark.parametrize(
    ("agent_id", "tags", "targets"),
    [
        ("dtx", ("offline-rl", "sequence"), ()),
        ("decision-mamba-mine", (), ()),
        ("mine", ("d4rl-corl",), (3600.0, 1800.0)),
    ],
)
def test_presets_of_others_have_settings_only_where_a_tag_says_whose(
    agent_id, tags, targets, monkeypatch
):
    monkeypatch.setattr(registry, "_registry", registry.Registry())
    ours, info = mail_agents.spec("dt"), published("hopper-medium-v2")
    mail_agents.register(
        agent_id,
        entry_point=ours.entry_point,
        config_entry_point=ours.config_entry_point,
        tags=tags,
    )
    config = mail_agents.spec(agent_id).config()
    assert published_targets(agent_id, info) == targets
    assert (adapt(config, agent_id, info) != config) == bool(targets)


def test_a_published_dataset_sets_a_preset_up():
    config = adapt(mail_agents.spec("dt").config(), "dt", published("reacher2d-medium-v1"))
    assert (config.history, config.return_scale, config.max_timestep) == (5, 10.0, 100)
    config = adapt(mail_agents.spec("dt-corl").config(), "dt-corl", published("hopper-medium-v2"))
    assert config == mail_agents.spec("dt-corl").config({"return_scale": 1000.0})
    mamba = mail_agents.spec("decision-mamba").config()
    config = adapt(mamba, "decision-mamba", published("hopper-medium-v2"))
    assert (config.d_model, config.optim.lr, config.optim.warmup_steps) == (256, 1e-4, 10_000)


def test_fields_that_were_changed_stay_and_the_others_are_said():
    said = []
    config = mail_agents.spec("decision-mamba").config(
        {"d_model": 64, "return_scale": 500.0, "optim.lr": 3e-4, "max_timestep": 300}
    )
    assert adapt(config, "decision-mamba", published("hopper-medium-v2"), said.append) == config
    assert said == []
    config = config.replace({"optim.lr": 1e-3})  # as in the preset
    adapted = adapt(config, "decision-mamba", published("hopper-medium-v2"), said.append)
    assert adapted == config.replace({"optim.lr": 1e-4})
    assert said == ["published settings of hopper-medium-v2: optim.lr 0.0001"]


def test_a_file_of_d4rl_is_published_and_a_file_we_wrote_is_not(tmp_path, trajectory):
    from mail_wrappers.datasets.d4rl import convert_d4rl, write_d4rl

    rng = np.random.default_rng(0)
    data = MemoryDataset([trajectory(5, rng, states=11, actions=3)], name="hopper-medium")
    write_d4rl(data, tmp_path / "ours.hdf5")
    assert setting_of(convert_d4rl(tmp_path / "ours.hdf5", tmp_path / "ours").info) is None

    with h5py.File(tmp_path / "ours.hdf5", "a") as file:
        del file["metadata"]  # nothing says any more who wrote it
    (tmp_path / "ours.hdf5").rename(tmp_path / "hopper_medium-v2.hdf5")
    info = convert_d4rl(tmp_path / "hopper_medium-v2.hdf5", tmp_path / "theirs").info
    assert setting_of(info) == d4rl_setting("hopper-medium-v2")
