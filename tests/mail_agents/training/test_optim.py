import pytest
import torch
from torch import nn

from mail_agents.config import OptimConfig
from mail_agents.errors import InvalidInputError
from mail_agents.training.optim import build_optimizer, build_scheduler, parameter_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.conv = nn.Conv1d(2, 2, 3)
        self.norm = nn.LayerNorm(2)
        self.table = nn.Embedding(4, 2)
        self.A_log = nn.Parameter(torch.zeros(2, 3))
        self.D = nn.Parameter(torch.zeros(2, 3))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def names(model, parameters):
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def test_only_matrices_and_kernels_decay():
    model = Model()
    decayed, kept = parameter_groups(model, 0.1)
    assert names(model, decayed["params"]) == {"linear.weight", "conv.weight"}
    assert names(model, kept["params"]) == {
        "linear.bias", "conv.bias", "norm.weight", "norm.bias", "table.weight", "A_log", "D",
    }  # fmt: skip
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_shared_parameters_appear_once():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    groups = parameter_groups(model, 0.0)
    assert sum(len(group["params"]) for group in groups) == 3


def test_adam_and_adamw_with_the_published_defaults():
    optimizer = build_optimizer(Model(), OptimConfig())
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["lr"] == 5e-4
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    assert type(build_optimizer(Model(), OptimConfig(name="adamw"))) is torch.optim.AdamW
    with pytest.raises(InvalidInputError, match="nothing to optimise"):
        build_optimizer(nn.Identity(), OptimConfig())


def test_released_recipes_decay_everything():
    model = Model()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1, decayed="all", eps=1e-6))
    (group,) = optimizer.param_groups
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names(model, group["params"]) == set(trained)
    assert len(group["params"]) == len(trained)
    assert (group["weight_decay"], group["eps"]) == (0.1, 1e-6)
    with pytest.raises(InvalidInputError, match="nothing to optimise"):
        build_optimizer(nn.Identity(), OptimConfig(decayed="all"))


def test_a_release_spares_biases_and_layer_norms_only():
    model = nn.ModuleDict({"all": Model(), "rms": nn.RMSNorm(2)})
    decayed, kept = parameter_groups(model, 0.1, "all_but_biases_and_layernorms")
    assert names(model, decayed["params"]) == {
        "all.linear.weight", "all.conv.weight", "all.table.weight", "all.A_log", "all.D",
        "rms.weight",
    }  # fmt: skip
    assert names(model, kept["params"]) == {
        "all.linear.bias", "all.conv.bias", "all.norm.weight", "all.norm.bias",
    }  # fmt: skip
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def rates(config, total, steps):
    optimizer = build_optimizer(nn.Linear(1, 1), config)
    scheduler = build_scheduler(optimizer, config, total)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_warm_up_then_constant():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert rates(config, None, 6) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_warm_up_then_cosine():
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="cosine")
    expected = [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0, 0]
    assert rates(config, 6, 8) == pytest.approx(expected, abs=1e-6)


def test_cosine_needs_a_length():
    with pytest.raises(InvalidInputError, match="total_steps"):
        rates(OptimConfig(schedule="cosine"), None, 1)
