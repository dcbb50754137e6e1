"""Outputs of the released code, pinned.

The numbers were computed with github.com/ALRhub/MaIL at ``a8012a0`` (``mamba_simple.py`` and the
reference scan of mamba-ssm 1.2.0.post1, ``VisualCore`` of robomimic 0.3.0) in float64 on a CPU.
Weights and inputs come from the formula ``wave`` below; the same weights were put into the released
modules by name, with query, key and value projections stacked. Renaming a parameter changes the
order in which ``fill`` visits them, and with it every number here.
"""

import math

import pytest
import torch

from mail_agents.agents.mail_backbone import MailBackbone
from mail_agents.agents.mail_config import StackConfig
from mail_agents.encoders.image import ResNetEncoder
from mail_agents.features import Feature

FEATURES, ACTIONS, WIDTH, HISTORY, HORIZON = 6, 3, 8, 3, 2

# variant, diffusion, number of states: output of the second row, flattened
RELEASED = {
    ("d-ma", True, 3): (-3.159173, -0.997595, 1.598917, -2.557331, 0.500871, 2.530617),
    ("d-ma", False, 3): (-1.227531, 1.425995, 2.686337, -1.105536, -1.633726, -0.567001),
    ("ed-ma", True, 3): (-2.766957, -1.311031, 0.936414, -1.587764, -2.964297, -1.934745),
    ("ed-ma", True, 1): (-2.611989, -2.932007, -0.877474, -2.709821, -0.872476, 1.328098),
    ("ed-ma", False, 3): (0.964420, 0.637119, -0.228174, -2.718925, -2.566993, 0.176058),
    ("ed-ma", False, 1): (-2.688367, -2.452882, 0.262281, -1.197172, -2.667508, -1.448563),
    ("d-tr", True, 3): (-0.211544, -0.974648, -0.694961, -0.037165, -1.025088, -0.920961),
    ("d-tr", False, 3): (0.750790, -0.284349, -1.526191, 0.852980, -0.157772, -1.498842),
    ("ed-tr", True, 3): (-0.722792, -0.508836, 0.834839, -0.723248, -0.588692, 0.753570),
    ("ed-tr", False, 3): (-0.759629, -1.126221, 0.032561, -0.586913, -1.123456, -0.137326),
}
# two frames, four features each
RELEASED_VISION = [0.864763, 0.905970, -1.323300, 0.091123, 0.666420, 0.411180, -0.725920, 0.104140]


def wave(shape, phase):
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(1.7 * index + phase).reshape(shape)


def fill(net, scale):
    """Parameter i, in alphabetical order, becomes ``scale(shape) * wave(shape, i)``.

    One is added to scales of norms and to the skip D of Mamba.
    """
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(net.named_parameters())):
            offset = float(p.ndim == 1 and name.endswith(("weight", ".D")))
            p.copy_(scale(p.shape) * wave(p.shape, i) + offset)
    return net


@pytest.mark.parametrize("case", RELEASED, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_sequence_models_equal_the_released_ones(case):
    variant, diffusion, n = case
    mixer = "attention" if variant.endswith("tr") else "mamba"
    settings = {"mixer": mixer, "d_state": 4, "heads": 2}
    net = MailBackbone(
        feature_dim=FEATURES,
        action_dim=ACTIONS,
        max_states=HISTORY,
        horizon=HORIZON,
        width=WIDTH,
        encoder=StackConfig(layers=2 * variant.startswith("ed"), d_conv=4, **settings),
        decoder=StackConfig(layers=3, d_conv=2, **settings),
        diffusion=diffusion,
    )
    fill(net.double().eval(), lambda shape: 0.5)
    args = [wave((2, HISTORY, FEATURES), 0.3)[:, :n]]
    if diffusion:
        args += [wave((2, HORIZON, ACTIONS), 0.6), torch.tensor([2, 13])]
    with torch.inference_mode():
        assert net(*args)[1].flatten().tolist() == pytest.approx(RELEASED[case], abs=1e-5)


def test_image_features_equal_the_released_ones():
    encoder = ResNetEncoder(Feature("image", (96, 64, 3), "uint8"), 4).double().eval()
    fill(encoder, lambda shape: 0.5 if len(shape) == 1 else (2.0 / math.prod(shape[1:])) ** 0.5)
    image = torch.arange(2 * 96 * 64 * 3).mul(37).remainder(251).to(torch.uint8)
    with torch.inference_mode():
        features = encoder(image.view(1, 2, 96, 64, 3)).flatten()
    assert features.tolist() == pytest.approx(RELEASED_VISION, abs=1e-5)
