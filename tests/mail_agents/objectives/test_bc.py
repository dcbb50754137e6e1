import pytest
import torch

from mail_agents.errors import InvalidInputError
from mail_agents.objectives import check_generators, masked_mse
from mail_agents.objectives.bc import BC


def test_loss_is_the_mean_over_valid_elements():
    prediction, target = torch.zeros(2, 3, 2), torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = (0 + 1 + 4 + 9 + 36 + 49) / 6
    assert masked_mse(prediction, target, mask).item() == pytest.approx(expected)
    assert masked_mse(prediction, target, None).item() == pytest.approx(
        sum(i * i for i in range(12)) / 12
    )
    assert masked_mse(prediction, target, torch.zeros_like(mask)).item() == 0


def test_padded_targets_do_not_matter_even_when_not_finite():
    prediction = torch.zeros(1, 2, 1, requires_grad=True)
    target = torch.tensor([[[1.0], [float("inf")]]])
    loss = BC().training_loss(lambda *_: prediction, target, torch.tensor([[True, False]]))
    loss.backward()
    assert loss.item() == 1.0
    assert prediction.grad.flatten().tolist() == [-2.0, 0.0]


def test_sample_is_the_prediction_and_is_not_clamped():
    chunk, bound = torch.full((2, 3, 1), 9.0), torch.ones(1)
    for deterministic in (True, False):
        rows = [torch.Generator()] * 2
        noise = BC().draw_noise(chunk.shape, rows, deterministic=deterministic, like=chunk)
        assert noise is None
        assert torch.equal(BC().sample(lambda *_: chunk, noise, low=-bound, high=bound), chunk)


def test_one_generator_per_row():
    with pytest.raises(InvalidInputError, match="got 1 for 2 rows"):
        check_generators([torch.Generator()], 2)
