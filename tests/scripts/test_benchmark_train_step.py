"""The training-step benchmark times equal models and refuses unequal ones."""

import json

import pytest
import torch

from mail_agents.errors import MailAgentsError

pytest.importorskip("transformers")

SMALL = {"batch_size": 2, "history": 1, "horizon": 2, "rounds": 1}


@pytest.fixture
def script(load_script):
    return load_script("benchmark_train_step")


def test_it_times_three_models(script, tmp_path, capsys):
    output = tmp_path / "figures.json"
    figures = script.main(script.Args(**SMALL, output=str(output)))
    assert figures["max_output_difference"] < 1e-5
    assert len(figures["seconds"]) == 3
    assert all(len(times) == 1 for times in figures["seconds"].values())
    assert json.loads(output.read_text(encoding="utf-8"))["args"]["batch_size"] == 2
    assert "times ours" in capsys.readouterr().out


def test_every_mixer_is_replaced(script):
    args = script.Args(**SMALL)
    ours = script.build("mail/ed-ma-ddpm", args)
    slow = script.with_slow_mixers(ours)
    assert sum(isinstance(m, script.Slow) for m in slow.modules()) == 18
    assert not any(isinstance(m, script.Mamba) for m in slow.modules())
    assert any(isinstance(m, script.Mamba) for m in ours.modules())


def test_unequal_models_are_refused(script, monkeypatch):
    def spoiled(model):
        copy = script.copy.deepcopy(model)
        with torch.no_grad():
            copy.head.bias.add_(1.0)
        return copy

    monkeypatch.setattr(script, "with_slow_mixers", spoiled)
    with pytest.raises(MailAgentsError, match="would be unfair"):
        script.main(script.Args(**SMALL))
