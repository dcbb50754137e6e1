import pytest
import torch

from mail_agents.encoders.state import StateEncoder
from mail_agents.features import Feature


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_any_shape_is_flattened(shape):
    encoder = StateEncoder(Feature("state", shape, "float64"), 6)
    x = torch.randn(4, 5, *shape)
    assert encoder(x).shape == (4, 5, 6)
    torch.testing.assert_close(encoder(x)[1:2, 2:3], encoder(x[1:2, 2:3]))


def test_every_input_matters():
    encoder = StateEncoder(Feature("state", (3,), "float32"), 6)
    x = torch.randn(1, 1, 3, requires_grad=True)
    encoder(x).square().sum().backward()
    assert (x.grad.abs() > 0).all()
