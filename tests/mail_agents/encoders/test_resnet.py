import pytest
import torch
from torch import nn

from mail_agents.encoders.resnet import FiLM, FrozenBatchNorm, ResidualBlock, ResNet18
from mail_agents.errors import InvalidInputError


def test_film_is_the_identity_at_first_and_then_scales_and_shifts_channels():
    film = FiLM(3, 2)
    x, condition = torch.randn(4, 2, 5, 6), torch.randn(4, 3)
    assert torch.equal(film(x, condition), x)
    with torch.no_grad():
        film.project.bias.copy_(torch.tensor([0.5, 0.0, 0.0, -2.0]))
    out = film(x, condition)
    torch.testing.assert_close(out[:, 0], 1.5 * x[:, 0])
    torch.testing.assert_close(out[:, 1], x[:, 1] - 2.0)


def test_film_comes_after_the_second_norm_and_before_the_skip():
    block = ResidualBlock(16, 16, 1, condition=3)
    x, condition = torch.randn(2, 16, 5, 5), torch.randn(2, 3)
    with torch.no_grad():
        block.film.project.bias[:16] = -1.0  # erases the branch
    torch.testing.assert_close(block(x, condition), x.relu())


def test_a_new_network_with_film_is_the_one_without():
    torch.manual_seed(0)
    plain = ResNet18()
    torch.manual_seed(0)
    film = ResNet18(condition=7)
    extra = film.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert len(extra) == 2 * 8
    assert all(".film.project." in name for name in extra)
    with torch.inference_mode():
        x = torch.randn(2, 3, 40, 40)
        assert torch.equal(film(x, torch.randn(2, 7)), plain(x))


def test_a_condition_that_is_missing_or_not_wanted_is_refused():
    x = torch.zeros(1, 3, 33, 33)
    with torch.device("meta"):
        plain, film = ResNet18(), ResNet18(condition=7)
    with pytest.raises(InvalidInputError, match="length 7 for every image; got None"):
        film(x)
    with pytest.raises(InvalidInputError, match="length None for every image; got 7"):
        plain(x, torch.zeros(1, 7))


def test_frozen_batch_norm_is_batch_norm_in_evaluation_and_has_nothing_to_train():
    norm, frozen = nn.BatchNorm2d(6), FrozenBatchNorm(6)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(6) + 0.5)
    frozen.load_state_dict({k: v for k, v in norm.state_dict().items() if "num" not in k})
    x = torch.randn(3, 6, 4, 4)
    torch.testing.assert_close(frozen.train()(x), norm.eval()(x))
    assert list(frozen.parameters()) == []
