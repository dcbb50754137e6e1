"""Settings per LIBERO suite, by the parameter counts measured on the released code."""

import dataclasses

import pytest
import torch

from mail_agents.agents.mail import MailPolicy
from mail_agents.errors import InvalidInputError, UnknownNameError
from mail_agents.features import Feature, FeatureSpec
from mail_agents.registry import spec
from mail_agents.training.mail_suites import SUITES, TEXT_MODEL, suite_settings

CAMERAS = FeatureSpec(
    observations={
        "agentview_rgb": Feature("image", (128, 128, 3), "uint8"),
        "eye_in_hand_rgb": Feature("image", (128, 128, 3), "uint8"),
    },
    action=Feature("state", (7,), "float32"),
)
LONG, GOAL, NINETY = "libero_10", "libero_goal", "libero_90"
SHORT = ("libero_spatial", "libero_object")

# Variant, suites, parameters of the whole policy (two cameras, 7 actions) with 5 observed steps,
# and how many fewer of them the sequence model has with a single one.
TABLE = [
    ("d-tr-ddpm", SHORT, 24_088_647, 512),
    ("ed-tr-ddpm", SHORT, 24_782_023, 512),
    ("d-ma-ddpm", SHORT, 24_372_423, 512),
    ("ed-ma-ddpm", SHORT, 24_371_015, 1024),
    ("d-tr-bc", SHORT, 24_022_343, 512),
    ("ed-tr-bc", SHORT, 24_715_719, 512),
    ("d-ma-bc", SHORT, 24_306_119, 512),
    ("ed-ma-bc", SHORT, 24_421_319, 1024),
    ("d-tr-ddpm", (LONG,), 24_089_287, 512),
    ("ed-tr-ddpm", (LONG,), 24_782_663, 512),
    ("d-ma-ddpm", (LONG,), 24_373_063, 512),
    ("ed-ma-ddpm", (LONG,), 24_372_295, 1024),
    ("ed-ma-bc", (LONG,), 24_423_239, 1024),
    ("d-tr-ddpm", (GOAL,), 24_220_103, 512),
    ("ed-tr-ddpm", (GOAL,), 24_913_479, 512),
    ("d-ma-ddpm", (GOAL,), 24_405_575, 512),
    ("ed-ma-ddpm", (GOAL,), 24_967_495, 1024),
    ("d-ma-ddpm", (NINETY,), 24_503_879, 512),
    ("ed-ma-ddpm", (NINETY,), 24_619_335, 1024),
    ("d-tr-bc", (GOAL, NINETY), 24_153_799, 512),
    ("ed-tr-bc", (GOAL, NINETY), 24_847_175, 512),
    ("d-ma-bc", (GOAL, NINETY), 24_437_575, 512),
    ("ed-ma-bc", (GOAL, NINETY), 24_552_903, 1024),
]


def configured(agent, suite, **overrides):
    return spec(agent).config({**suite_settings(agent, suite), **overrides})


def count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in MailPolicy(config, CAMERAS).parameters())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-{row[1][0]}")
def test_published_counts(row):
    variant, suites, whole, fewer = row
    for suite in suites:
        config = configured(f"mail/{variant}", suite)
        assert config.history == 5
        assert count(config) == whole
    single = configured(f"mail/{variant}", suites[0], history=1)
    assert count(single) == whole - fewer


@pytest.mark.parametrize("suite", SUITES)
def test_what_a_suite_decides(suite):
    config = configured("mail/ed-ma-ddpm", suite)
    assert config.horizon == (10 if suite == LONG else 5)
    assert config.language == (TEXT_MODEL if suite in (GOAL, NINETY) else "none")
    assert config.language_as == "token"
    assert config.optim.batch_size == (128 if suite == NINETY else 256)
    assert (config.optim.lr, config.optim.name) == (5e-4, "adam")
    assert (config.ema_decay, config.diffusion_steps) == (0.995, 16)


def test_the_suites_are_those_of_the_worlds():
    names = pytest.importorskip("mail_wrappers.datasets.libero_names")
    assert sorted(SUITES) == sorted(names.SUITES)


def test_the_released_quirks_stay():
    released = configured("mail/d-ma-bc-released", GOAL)
    assert (released.init, released.padding) == ("upstream", "none")
    ours = configured("mail/d-ma-bc", GOAL)
    assert dataclasses.replace(released, init=ours.init, padding=ours.padding) == ours


def test_only_published_variants_have_settings():
    for agent in ("mail/ed-ma-ddpm-so", "mean-action", "mail/mine"):
        with pytest.raises(InvalidInputError, match=r"none of them\. Use mail/"):
            suite_settings(agent, GOAL)
    with pytest.raises(UnknownNameError, match="Did you mean 'libero_goal'"):
        suite_settings("mail/d-ma-bc", "libero_gaol")
