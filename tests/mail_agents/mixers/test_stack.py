"""Stacks: the aggregation of MaIL, causality, and every way to run a sequence in pieces."""

import math

import pytest
import torch

from mail_agents.errors import InvalidInputError
from mail_agents.mixers import MambaStack, TransformerStack


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mamba(layers=3, d_state=16, d_conv=4, width=32):
    stack = MambaStack(width, layers, d_state, d_conv).eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return stack


def run_in_pieces(stack, x, cut, state=None, aggregate=None):
    """Prefill of ``cut`` tokens, then single steps."""

    def extra(index):
        return () if aggregate is None else (aggregate[:, index],)

    first, state = stack.prefill(x[:, :cut], state, *extra(slice(0, cut)))
    parts = [first]
    for t in range(cut, x.shape[1]):
        y, state = stack.step(x[:, t], state, *extra(t))
        parts.append(y.unsqueeze(1))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("layers", [1, 4])
def test_mamba_stack_has_the_published_size_and_names(layers):
    stack = MambaStack(128, layers, d_state=8, d_conv=2)
    assert sum(p.numel() for p in stack.parameters()) == 110_080 * layers + 256
    names = {name.replace("layers.0.", "") for name, _ in stack.named_parameters()}
    assert {"norm.weight", "norm.bias", "mixer.A_log", "norm_f.weight", "norm_f.bias"} <= names


def test_output_projections_are_scaled_with_depth():
    stack = MambaStack(128, 16)
    bound = 1 / math.sqrt(256) / math.sqrt(16)
    for layer in stack.layers:
        weight = layer.mixer.out_proj.weight
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("with_aggregate", [False, True])
def test_equations_of_the_residual_stream(with_aggregate):
    stack = mamba()
    x = torch.randn(2, 9, 32)
    E = torch.randn(2, 9, 32) if with_aggregate else None
    q = x
    for layer in stack.layers:
        q = q + layer.mixer(layer.norm(q)) + (0 if E is None else E)
    torch.testing.assert_close(stack(x, E), stack.norm_f(q), rtol=1e-5, atol=1e-5)


def test_aggregate_enters_once_per_block_including_the_last():
    stack = mamba(layers=4)
    with torch.no_grad():
        for layer in stack.layers:
            layer.mixer.out_proj.weight.zero_()
    x, E = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    torch.testing.assert_close(stack(x, E), stack.norm_f(x + 4 * E), rtol=1e-6, atol=1e-6)


def test_zero_aggregate_equals_none():
    stack = mamba()
    x = torch.randn(2, 9, 32)
    assert torch.equal(stack(x, torch.zeros_like(x)), stack(x))


@pytest.mark.parametrize(("d_state", "d_conv"), [(16, 4), (8, 2)])
@pytest.mark.parametrize("length", [2, 11])
@pytest.mark.parametrize("cut", [0, 1, 7])
@pytest.mark.parametrize("with_aggregate", [False, True])
def test_mamba_prefill_and_steps_equal_the_whole(d_state, d_conv, length, cut, with_aggregate):
    stack = mamba(d_state=d_state, d_conv=d_conv)
    x = torch.randn(2, length, 32)
    E = torch.randn(2, length, 32) if with_aggregate else None
    found = run_in_pieces(stack, x, min(cut, length), aggregate=E)
    assert (found - stack(x, E)).abs().max() < 1e-5


def test_mamba_steps_from_the_initial_state_equal_the_whole():
    stack = mamba()
    x, E = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    whole, state = stack(x, E), stack.init_state(2)
    for t in range(6):
        y, state = stack.step(x[:, t], state, E[:, t])
        assert (y - whole[:, t]).abs().max() < 1e-5


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 5, 11])
def test_transformer_prefill_and_steps_equal_the_whole(cross, cut):
    stack = TransformerStack(32, 3, dropout=0.1, cross=cross).eval()
    x, memory = torch.randn(2, 11, 32), torch.randn(2, 4, 32) if cross else None
    found = run_in_pieces(stack, x, cut, stack.init_state(2, memory=memory))
    assert (found - stack(x, memory)).abs().max() < 1e-5


def stacks():
    memory = torch.randn(2, 4, 32)
    encoder, decoder = TransformerStack(32, 3).eval(), TransformerStack(32, 3, cross=True).eval()
    E = torch.randn(2, 12, 32)
    wide, narrow = mamba(d_conv=4), mamba(d_conv=2)
    return {
        "mamba": wide,
        "mamba-conv2": narrow,
        "mamba-aggregate": lambda x: wide(x, E),
        "transformer": encoder,
        "cross": lambda x: decoder(x, memory),
    }


@pytest.mark.parametrize(
    "name", ["mamba", "mamba-conv2", "mamba-aggregate", "transformer", "cross"]
)
@pytest.mark.parametrize("token", [0, 5, 11])
def test_changing_a_token_leaves_earlier_outputs_bit_identical(name, token):
    run = stacks()[name]
    x = torch.randn(2, 12, 32)
    changed = x.clone()
    changed[:, token] += torch.randn(2, 32)
    before, after = run(x), run(changed)
    assert torch.equal(before[:, :token], after[:, :token])
    assert (before[:, token:] != after[:, token:]).any(-1).all()


def test_aggregate_at_a_position_influences_no_earlier_output():
    stack = mamba()
    x, E = torch.randn(2, 12, 32), torch.randn(2, 12, 32)
    changed = E.clone()
    changed[:, 7] += 1
    before, after = stack(x, E), stack(x, changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


def test_every_memory_step_influences_every_output():
    stack = TransformerStack(32, 2, cross=True).eval()
    x, memory = torch.randn(1, 5, 32), torch.randn(1, 4, 32)
    for i in range(4):
        changed = memory.clone()
        changed[:, i] += 1
        assert (stack(x, memory) != stack(x, changed)).any(-1).all()


@pytest.mark.parametrize("kind", ["mamba", "transformer", "cross"])
def test_leading_masked_steps_are_as_if_absent(kind):
    memory = torch.randn(1, 4, 32) if kind == "cross" else None
    if kind == "mamba":
        stack = mamba()
        args = ()
    else:
        stack = TransformerStack(32, 3, cross=kind == "cross").eval()
        args = (memory,)
    x = torch.randn(1, 8, 32)
    mask = torch.arange(8)[None] >= 3
    dirty = x.clone()
    dirty[:, :3] = torch.nan
    y = stack(dirty, *args, mask=mask)
    torch.testing.assert_close(y[:, 3:], stack(x[:, 3:], *args), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in stack.parameters())


@pytest.mark.parametrize("kind", ["mamba", "transformer", "cross"])
def test_every_parameter_gets_a_gradient(kind):
    memory = torch.randn(2, 4, 32)
    if kind == "mamba":
        stack = mamba()
        y = stack(torch.randn(2, 8, 32), torch.randn(2, 8, 32))
    else:
        stack = TransformerStack(32, 2, cross=kind == "cross")
        y = stack(torch.randn(2, 8, 32), memory if kind == "cross" else None)
    y.square().mul(torch.randn(y.shape)).sum().backward()
    for name, parameter in stack.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_transformer_sizes():
    encoder, decoder = TransformerStack(128, 4), TransformerStack(128, 6, cross=True)
    assert sum(p.numel() for p in encoder.parameters()) == 198_016 * 4 + 128
    assert sum(p.numel() for p in decoder.parameters()) == 247_552 * 6 + 128


def test_misuse_is_explained():
    x = torch.zeros(2, 6, 32)
    with pytest.raises(InvalidInputError, match="aligned position by position"):
        mamba()(x, torch.zeros(2, 5, 32))
    with pytest.raises(InvalidInputError, match="at least one layer"):
        MambaStack(32, 0)
    with pytest.raises(InvalidInputError, match="pass memory"):
        TransformerStack(32, 1, cross=True)(x)
    with pytest.raises(InvalidInputError, match="pass memory"):
        TransformerStack(32, 1, cross=True).prefill(x)
    with pytest.raises(InvalidInputError, match="cross=True"):
        TransformerStack(32, 1)(x, x)
    with pytest.raises(InvalidInputError, match="batch size 2"):
        TransformerStack(32, 1, cross=True).init_state(3, memory=x)
    short = TransformerStack(32, 1, max_len=6)
    _, state = short.prefill(x)
    with pytest.raises(InvalidInputError, match="max_len=6"):
        short.step(x[:, 0], state)
    with pytest.raises(InvalidInputError, match="max_len=6"):
        short(torch.zeros(2, 7, 32))
