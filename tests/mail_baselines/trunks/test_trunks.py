"""What every trunk promises: causality, masks, streaming, exact sizes."""

import pytest
import torch
from torch import nn

from mail_agents.errors import InvalidInputError, UnknownNameError
from mail_baselines.trunks import (
    GPTTrunk,
    MambaTrunk,
    MultiGrainedTrunk,
    StreamingTrunk,
    Trunk,
    assert_causal,
    map_state,
)

WIDTH = 16

CAUSAL = {
    "gpt": lambda: GPTTrunk(WIDTH, heads=2, dropout=0.1),
    "gpt-gelu": lambda: GPTTrunk(WIDTH, activation="gelu"),
    "mamba": lambda: MambaTrunk(WIDTH),
    "mamba-rms": lambda: MambaTrunk(WIDTH, norm="rms", released_init=True),
    "grained": lambda: MultiGrainedTrunk(WIDTH),
    "grained-2": lambda: MultiGrainedTrunk(WIDTH, tokens_per_step=2),
    "figure": lambda: MultiGrainedTrunk(WIDTH, variant="figure"),
    "figure-2": lambda: MultiGrainedTrunk(WIDTH, variant="figure", tokens_per_step=2),
}
STREAMING = [name for name in CAUSAL if not name.startswith("gpt")]


def randomised(trunk: nn.Module) -> nn.Module:
    """In eval mode and float64, with no parameter left at a special value such as zero or one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trunk.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.add_(noise * (0.3 if p.ndim == 1 else p.shape[1] ** -0.5))
    return trunk.double().eval()


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(CAUSAL[name]())


def tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=generator)


def stream(trunk, x: torch.Tensor) -> torch.Tensor:
    state, out = trunk.init_state(len(x), dtype=x.dtype), []
    for token in x.unbind(1):
        y, state = trunk.step(token, state)
        out.append(y)
    return torch.stack(out, 1)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_output_depends_on_a_later_token(name):
    trunk = make(name)
    assert isinstance(trunk, Trunk)
    for length in (1, 2, 3, 7, 60):
        assert_causal(trunk, length, WIDTH, tolerance=1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_output_depends_on_every_earlier_token(name):
    # Otherwise the test of causality proves little.
    trunk, x = make(name), tokens(1, 24)
    for j in (0, 1, 2, 11):
        other = x.clone()
        other[:, j] *= -1
        with torch.no_grad():
            change = (trunk(x) - trunk(other)).abs().amax(-1)[0]
        assert (change[j:] > 1e-9).all()


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("length", [*range(1, 13), 31, 59, 60])
def test_step_by_step_is_the_whole_sequence(name, length):
    trunk, x = make(name), tokens(2, length)
    assert isinstance(trunk, StreamingTrunk)
    with torch.no_grad():
        torch.testing.assert_close(stream(trunk, x), trunk(x), rtol=0, atol=1e-10)


def test_transformer_does_not_stream():
    assert not isinstance(make("gpt"), StreamingTrunk)


@pytest.mark.parametrize("name", STREAMING)
def test_rows_of_a_state_can_be_at_different_places(name):
    trunk, x = make(name), tokens(3, 12)
    state = trunk.init_state(3, dtype=x.dtype)
    with torch.no_grad():
        for t in range(4):  # the second row starts anew after four tokens
            _, state = trunk.step(x[:, t], state)
        row, fresh = torch.tensor([1]), trunk.init_state(1, dtype=x.dtype)
        before = map_state(torch.Tensor.clone, state)
        state = map_state(lambda old, new: old.index_copy(0, row, new), state, fresh)
        out = []
        for t in range(4, 12):
            y, state = trunk.step(x[:, t], state)
            out.append(y)
        whole, anew = trunk(x)[:, 4:], trunk(x[1:2, 4:])[0]
        again = trunk.step(x[:, 4], before)[0]
    got = torch.stack(out, 1)
    torch.testing.assert_close(got[[0, 2]], whole[[0, 2]], rtol=0, atol=1e-10)
    torch.testing.assert_close(got[1], anew, rtol=0, atol=1e-10)
    torch.testing.assert_close(again, whole[:, 0], rtol=0, atol=1e-10)  # states are not modified


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("pads", [1, 5])
def test_masked_steps_in_front_have_no_influence(name, pads):
    trunk = make(name)
    front = pads * getattr(trunk, "tokens_per_step", 3)
    x = tokens(2, front + 12).requires_grad_()
    mask = torch.ones(2, front + 12, dtype=torch.bool)
    mask[0, :front] = False
    y = trunk(x, mask)
    with torch.no_grad():
        alone = trunk(x[:1, front:])[0]
    torch.testing.assert_close(y[0, front:], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(y[1], trunk(x[1:])[0], rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(y[mask].sin().sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[0, :front] == 0).all()
    assert (gradient[0, front:] != 0).any(-1).all()


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_behind_needs_no_mask(name):
    trunk, x = make(name), tokens(2, 18)
    with torch.no_grad():
        torch.testing.assert_close(trunk(x)[:, :9], trunk(x[:, :9]), rtol=0, atol=1e-10)
        mask = torch.arange(18).expand(2, 18) < 9
        torch.testing.assert_close(trunk(x, mask)[:, :9], trunk(x[:, :9]), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("make_trunk", "error", "says"),
    [
        (lambda: GPTTrunk(8, layers=0), InvalidInputError, "layers=0"),
        (lambda: GPTTrunk(8, heads=3), InvalidInputError, "3 heads"),
        (lambda: GPTTrunk(8, activation="gelo"), UnknownNameError, "'gelu'"),
        (lambda: MambaTrunk(8, layers=0), InvalidInputError, "layers=0"),
        (lambda: MambaTrunk(8, norm="layr"), UnknownNameError, "'layer'"),
        (lambda: MultiGrainedTrunk(8, variant="causl"), UnknownNameError, "'causal'"),
        (lambda: MultiGrainedTrunk(8, tokens_per_step=1), InvalidInputError, "state token"),
        (lambda: GPTTrunk(8, max_tokens=2)(torch.zeros(1, 3, 8)), InvalidInputError, "max_tokens"),
    ],
)
def test_refusals(make_trunk, error, says):
    with pytest.raises(error, match=says):
        make_trunk()
