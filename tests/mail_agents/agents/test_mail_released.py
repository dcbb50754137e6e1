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
    ("d-ma", True, 3): (-0.397318, 0.341139, 0.915100, -1.353073, 1.580560, 0.521987),
    ("d-ma", False, 3): (0.300064, -1.344265, -0.530365, -0.515132, 1.402614, 0.504937),
    ("ed-ma", True, 3): (-2.827160, -0.185760, -0.196736, 1.548905, 1.645448, 0.618465),
    ("ed-ma", True, 1): (-1.654971, -1.910593, 0.548667, 1.144634, 1.729870, 0.819364),
    ("ed-ma", False, 3): (-0.390331, -1.532683, -0.649159, -1.005482, -1.370013, 0.228403),
    ("ed-ma", False, 1): (-0.346724, -2.222210, -0.625506, -0.577855, -1.104611, 0.212865),
    ("d-tr", True, 3): (-0.145275, -0.111304, -0.738334, 0.690915, -0.756560, -0.158646),
    ("d-tr", False, 3): (-0.462858, 0.985460, -1.080744, -1.158064, 1.540224, -0.606939),
    ("ed-tr", True, 3): (0.266648, -2.297104, -0.237975, 0.141170, -2.185040, -0.731097),
    ("ed-tr", False, 3): (-0.314810, 0.470968, -0.926985, -0.288743, 0.297143, -0.755243),
}
# two frames, four features each
RELEASED_VISION = [0.536255, 0.540696, 0.152608, -0.802360, 0.866591, 0.395832, 0.152458, -0.884286]


def wave(shape, phase):
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(index**1.5 + phase).reshape(shape)


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
    index = torch.arange(2 * 96 * 64 * 3)
    image = ((7 * index * index + 13 * index) % 251).to(torch.uint8)
    with torch.inference_mode():
        features = encoder(image.view(1, 2, 96, 64, 3)).flatten()
    assert features.tolist() == pytest.approx(RELEASED_VISION, abs=1e-5)
