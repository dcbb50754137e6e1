"""Training steps: equal models are timed and unequal ones refused."""

import copy

import pytest
import torch

from mail_agents.benchmarks import train
from mail_agents.benchmarks.arguments import Train
from mail_agents.errors import MailAgentsError
from mail_agents.mixers.mamba import Mamba

TINY = Train(batch_size=2, history=1, horizon=2, rounds=1)


def test_ours_and_others_are_timed():
    pytest.importorskip("transformers")
    report = train.run(TINY)
    (table,) = report.tables
    names = [row[0] for row in table.rows]
    assert "`mail/ed-ma-ddpm, transformers' slow Mamba`" in names
    assert "`mail/ed-ma-ddpm, torch`" in names
    assert names[-1] == "`mail/ed-tr-ddpm`"
    assert table.rows[0][-1] == "1.00"
    assert report.figures["max_output_difference"] < 1e-5


def test_every_mixer_is_replaced():
    pytest.importorskip("transformers")
    ours = train.build("mail/ed-ma-ddpm", TINY)
    slow = train.with_mixers(ours, train.Slow)
    assert sum(isinstance(m, train.Slow) for m in slow.modules()) == 18
    assert not any(isinstance(m, Mamba) for m in slow.modules())
    assert any(isinstance(m, Mamba) for m in ours.modules())


def test_unequal_models_are_refused(monkeypatch):
    pytest.importorskip("transformers")

    def spoiled(model, kind):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.head.bias.add_(1.0)
        return model

    monkeypatch.setattr(train, "with_mixers", spoiled)
    with pytest.raises(MailAgentsError, match="would be unfair"):
        train.run(TINY)


def test_a_step_learns():
    model = train.build("mail/ed-tr-bc", TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train.make_step(model, (torch.randn(2, 1, 256),), torch.randn(2, 2, 7), TINY)()
    assert any(not value.equal(before[name]) for name, value in model.state_dict().items())
