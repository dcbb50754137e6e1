"""Parameter counts, measured on the released code with two cameras and 7 actions."""

import pytest
import torch

from mail_agents.agents.mail import MailBackbone, MailPolicy
from mail_agents.features import Feature, FeatureSpec
from mail_agents.registry import spec

CAMERAS = FeatureSpec(
    observations={
        "agentview_rgb": Feature("image", (128, 128, 3), "uint8"),
        "eye_in_hand_rgb": Feature("image", (128, 128, 3), "uint8"),
    },
    action=Feature("state", (7,), "float32"),
)
VISION = 22_402_496
LANGUAGE = 131_328

D_MA_GOAL = {"decoder.d_state": 8}
ED_MA_GOAL = {
    "encoder": {"layers": 10, "d_state": 16, "d_conv": 4},
    "decoder": {"layers": 10, "d_state": 16, "d_conv": 2},
}

# id, overrides, J, language, backbone at H=1, backbone at H=5, whole policy at H=5
TABLE = [
    ("d-tr-ddpm", {}, 5, False, 1_685_639, 1_686_151, 24_088_647),
    ("ed-tr-ddpm", {}, 5, False, 2_379_015, 2_379_527, 24_782_023),
    ("d-ma-ddpm", {}, 5, False, 1_969_415, 1_969_927, 24_372_423),
    ("ed-ma-ddpm-so", {}, 5, False, 1_967_495, 1_968_519, 24_371_015),
    ("ed-ma-ddpm", {}, 5, False, 2_084_231, 2_085_255, 24_487_751),
    ("d-tr-bc", {}, 5, False, 1_619_335, 1_619_847, 24_022_343),
    ("ed-tr-bc", {}, 5, False, 2_312_711, 2_313_223, 24_715_719),
    ("d-ma-bc", {}, 5, False, 1_903_111, 1_903_623, 24_306_119),
    ("ed-ma-bc", {}, 5, False, 2_017_799, 2_018_823, 24_421_319),
    ("d-tr-ddpm", {}, 10, False, 1_686_279, 1_686_791, 24_089_287),
    ("ed-tr-ddpm", {}, 10, False, 2_379_655, 2_380_167, 24_782_663),
    ("d-ma-ddpm", {}, 10, False, 1_970_055, 1_970_567, 24_373_063),
    ("ed-ma-ddpm-so", {}, 10, False, 1_968_775, 1_969_799, 24_372_295),
    ("ed-ma-bc", {}, 10, False, 2_019_719, 2_020_743, 24_423_239),
    ("d-tr-ddpm", {}, 5, True, 1_685_767, 1_686_279, 24_220_103),
    ("ed-tr-ddpm", {}, 5, True, 2_379_143, 2_379_655, 24_913_479),
    ("d-ma-ddpm", D_MA_GOAL, 5, True, 1_871_239, 1_871_751, 24_405_575),
    ("ed-ma-ddpm", ED_MA_GOAL, 5, True, 2_432_647, 2_433_671, 24_967_495),
    ("d-ma-ddpm", {}, 5, True, 1_969_543, 1_970_055, 24_503_879),
    ("ed-ma-ddpm", {}, 5, True, 2_084_487, 2_085_511, 24_619_335),
    ("d-tr-bc", {}, 5, True, 1_619_463, 1_619_975, 24_153_799),
    ("ed-tr-bc", {}, 5, True, 2_312_839, 2_313_351, 24_847_175),
    ("d-ma-bc", {}, 5, True, 1_903_239, 1_903_751, 24_437_575),
    ("ed-ma-bc", {}, 5, True, 2_018_055, 2_019_079, 24_552_903),
]


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-J{row[2]}-{row[3] and 'lang'}")
def test_published_counts(row):
    name, overrides, horizon, language, h1, h5, whole = row
    config = spec(f"mail/{name}").config({**overrides, "horizon": horizon})
    for history, expected in ((1, h1), (5, h5)):
        with torch.device("meta"):
            backbone = MailBackbone(
                feature_dim=256,
                action_dim=7,
                max_states=history + language,
                horizon=horizon,
                width=config.width,
                encoder=config.encoder,
                decoder=config.decoder,
                diffusion=config.objective == "ddpm",
                init=config.init,
            )
        assert count(backbone) == expected
    assert h5 + VISION + LANGUAGE * language == whole


@pytest.mark.parametrize(
    ("name", "language", "whole"),
    [
        ("ed-ma-ddpm", "none", 24_487_751),
        ("ed-ma-ddpm", "hash", 24_619_335),
        ("d-tr-bc", "none", 24_022_343),
    ],
)
def test_whole_policy_count(name, language, whole):
    config = spec(f"mail/{name}").config({"language": language, "history": 5})
    with torch.device("meta"):
        assert count(MailPolicy(config, CAMERAS)) == whole
