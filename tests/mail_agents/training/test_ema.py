import copy

import pytest
import torch
from torch import nn

from mail_agents.errors import InvalidInputError
from mail_agents.training.ema import EMA, effective_decay


def test_warm_up_of_the_decay():
    assert effective_decay(0.995, 1) == 2 / 11
    assert effective_decay(0.995, 2) == 3 / 12
    assert effective_decay(0.995, 1789) < 0.995
    assert effective_decay(0.995, 1790) == 0.995
    assert effective_decay(0.995, 10**6) == 0.995


def test_updates_average_from_the_first_one_on():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = EMA(model, 0.995)
    nn.init.constant_(model.weight, 12.0)
    ema.update(model)
    assert ema.module.weight.item() == pytest.approx(1 * 2 / 11 + 12 * 9 / 11)
    before = ema.module.weight.item()
    nn.init.constant_(model.weight, 0.0)
    ema.update(model)
    assert ema.module.weight.item() == pytest.approx(before * 3 / 12)


def test_average_of_a_constant_is_the_constant():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.995)
    for _ in range(20):
        ema.update(model)
    torch.testing.assert_close(ema.module.weight, model.weight)


def test_the_original_is_untouched_and_the_copy_needs_no_gradient():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    before = copy.deepcopy(model.state_dict())
    nn.init.zeros_(ema.module.weight)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_buffers_are_copied():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, 0.9)
    model.running_mean.fill_(7.0)
    ema.update(model)
    assert torch.equal(ema.module.running_mean, model.running_mean)


def test_state_survives_a_round_trip():
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.99)
    for _ in range(3):
        nn.init.normal_(model.weight)
        ema.update(model)
    other = EMA(nn.Linear(2, 2), 0.99)
    other.load_state_dict(ema.state_dict())
    for average in (ema, other):
        average.update(model)
    assert torch.equal(ema.module.weight, other.module.weight)
    assert int(other.n_averaged) == 5


def test_bad_decay_is_refused():
    with pytest.raises(InvalidInputError, match=r"\[0, 1\)"):
        EMA(nn.Linear(1, 1), 1.0)


def test_the_average_is_there_to_act():
    ema = EMA(nn.Linear(1, 1), 0.9)
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
