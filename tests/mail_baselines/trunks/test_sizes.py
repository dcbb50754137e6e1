"""Exact parameter counts of the published networks, and where their dropouts are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mail_agents.mixers import Mamba
from mail_baselines.trunks import GPTTrunk, MambaTrunk, MultiGrainedTrunk


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(autouse=True)
def without_memory():
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(("width", "size"), [(128, 116_480), (256, 437_760), (768, 3_770_880)])
def test_mixers(width, size):
    assert count(Mamba(width)) == size


def test_transformer():
    # Upstream counts 595,200 with a table of words (1, 128) that nothing reads.
    assert count(GPTTrunk(128, 3)) == 595_200 - 128
    assert count(GPTTrunk(128, 3, heads=4, activation="gelu")) == 595_200 - 128


def test_mamba():
    trunk = MambaTrunk(128, 3)
    assert count(trunk.layers[0]) == 248_704
    assert count(trunk) == 3 * 248_704 + 2 * 128
    assert count(MambaTrunk(128, 3, norm="rms")) == count(trunk) - 3 * 128


@pytest.mark.parametrize(
    ("width", "layers", "block"), [(128, 3, 282_624), (256, 6, 1_073_152), (768, 24, 9_314_304)]
)
def test_multi_grained(width, layers, block):
    trunk = MultiGrainedTrunk(width, layers)
    assert count(trunk.layers[0]) == block
    assert count(trunk) == layers * block + width


def test_the_figure_shares_gate_and_output_projection():
    # Norm, three inputs, output; convolutions over 4 and 3 taps; two scans.
    scan = 256 * (8 + 32) + 8 * 256 + 256 + 256 * 16 + 256
    taps = 256 * (4 + 1) + 256 * (3 + 1)
    block = MultiGrainedTrunk(128, 1, "figure").layers[0]
    assert count(block) == 128 + 3 * 128 * 256 + 256 * 128 + taps + 2 * scan


def test_without_action_tokens_groups_are_smaller():
    pair, triple = (MultiGrainedTrunk(128, 1, tokens_per_step=m) for m in (2, 3))
    assert count(triple) - count(pair) == 128 * 128


@pytest.mark.parametrize(
    ("trunk", "places"),
    [
        (
            GPTTrunk(8, 2),
            [
                "dropout",
                *(f"layers.{i}.{n}" for i in (0, 1) for n in ("attention.proj_dropout", "mlp.3")),
            ],
        ),
        (MambaTrunk(8, 2), ["dropout", "layers.0.mlp.3", "layers.1.mlp.3"]),
        (MultiGrainedTrunk(8, 2), []),
        (MultiGrainedTrunk(8, 2, "figure"), []),
    ],
)
def test_places_of_dropout(trunk, places):
    found = {n: m.p for n, m in trunk.named_modules() if isinstance(m, nn.Dropout)}
    assert found == dict.fromkeys(places, 0.1)


def test_attention_weights_are_dropped_in_training_only(monkeypatch):
    seen = []

    def attend(query, *_, dropout_p, **__):
        seen.append(dropout_p)
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    trunk, x = GPTTrunk(8, 2, dropout=0.3), torch.zeros(1, 4, 8)
    trunk(x)
    trunk.eval()(x)
    assert seen == [0.3, 0.3, 0.0, 0.0]
