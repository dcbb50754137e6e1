"""Whole layers: equal weights, equal gradients, and what linear maps cost alone."""

import pytest
import torch

from mail_agents.benchmarks import block
from mail_agents.benchmarks.arguments import Block
from mail_agents.errors import MailAgentsError
from mail_agents.mixers.mamba import Mamba

TINY = Block(rounds=1, mamba=((2, 5, 16),), mamba2=((2, 5, 32, 8),))


@pytest.fixture(scope="module")
def report():
    return block.run(TINY)


def test_a_table_per_layer(report):
    assert [table.name for table in report.tables] == ["block mamba", "block mamba2"]
    for table in report.tables:
        assert len(table.rows) == 1
        assert len(table.rows[0]) == len(table.header)
        assert table.rows[0][-1].endswith("(1x)")


@pytest.mark.parametrize(
    ("module", "kind", "names"),
    [
        ("mambapy", "mamba", {block.MAMBAPY}),
        ("transformers", "mamba", {block.SLOW}),
        ("transformers", "mamba2", {block.SLOW, block.SMALL_CHUNK}),
    ],
)
def test_other_packages_are_compared(module, kind, names, report):
    pytest.importorskip(module)
    (figures,) = report.figures[kind].values()
    assert names | {"torch", block.LINEAR} <= set(figures["seconds"])
    assert max(figures["differences"].values()) < 1e-4


def test_all_gradients_are_computed():
    pytest.importorskip("mambapy")
    found, layer = block.mamba_layers((2, 5, 16), TINY, [])
    for each in found.values():
        assert len(each()) == 2 + len(list(layer.parameters()))


def test_unequal_layers_are_refused(monkeypatch):
    real = block.mamba_layers

    def spoiled(*arguments):
        found, layer = real(*arguments)
        with torch.no_grad():
            next(each for name, each in found.items() if name != "torch").module.D.add_(1.0)
        return found, layer

    pytest.importorskip("mambapy")
    monkeypatch.setattr(block, "mamba_layers", spoiled)
    with pytest.raises(MailAgentsError, match="would be unfair"):
        block.run(TINY)


def test_linear_maps_are_those_of_the_layer():
    gradients = block.linear_maps(Mamba(16), 2, 5)()
    assert [g.shape[-1] for g in gradients[:4]] == [16, 32, 1, 32]  # in, x, dt, out
    assert [tuple(g.shape) for g in gradients[4:]] == [(64, 16), (33, 32), (32, 1), (16, 32)]


def test_bars_belong_to_the_sizes_they_were_set_for(monkeypatch, report):
    assert report.bars == []
    monkeypatch.setattr(Block, "mamba", ((2, 5, 16),))
    monkeypatch.setattr(block, "MAMBA_BARS", {5: {block.LINEAR: {"torch": 0.0}}})
    texts = [bar.text for bar in block.run(TINY).bars]
    assert texts == [
        "Mamba 2 x 5 x 16: native / linears",
        "Mamba 2 x 5 x 16: torch against linears alone",
    ]
