"""Attention against an explicit softmax, its own cache, and its masks."""

import math

import pytest
import torch

from mail_agents.errors import InvalidInputError
from mail_agents.mixers import CausalSelfAttention, FusedCrossAttention, Mixer, TransformerBlock


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def heads(x, count):
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def softmax_attention(q, k, v, allowed):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


def self_part(layer, x):
    q, k, v = (heads(part, layer.heads) for part in layer.qkv(x).split(layer.d_model, -1))
    allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return softmax_attention(q, k, v, allowed)


def output(layer, y):
    return layer.proj(y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1))


def test_self_attention_equals_an_explicit_softmax():
    layer = CausalSelfAttention(16, heads=4)
    x = torch.randn(3, 7, 16)
    torch.testing.assert_close(layer(x), output(layer, self_part(layer, x)), rtol=1e-5, atol=1e-6)


def test_fused_attention_is_a_sum_before_one_projection():
    layer = FusedCrossAttention(16, heads=4)
    x, memory = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    q = heads(layer.cross_q(x), 4)
    k, v = (heads(part, 4) for part in layer.cross_kv(memory).split(16, -1))
    everything = torch.ones(7, 5, dtype=torch.bool)
    wanted = output(layer, self_part(layer, x) + softmax_attention(q, k, v, everything))
    torch.testing.assert_close(layer(x, memory), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_cache_equals_the_whole(cut):
    layer = CausalSelfAttention(16)
    x = torch.randn(2, 9, 16)
    whole = layer(x)
    first, state = layer.prefill(x[:, :cut])
    middle, state = layer.prefill(x[:, cut : cut + 3], state)
    parts = [first, middle]
    for t in range(cut + middle.shape[1], 9):
        y, state = layer.step(x[:, t], state)
        parts.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)


def test_steps_from_the_initial_state_equal_the_whole():
    layer = CausalSelfAttention(16)
    x = torch.randn(2, 6, 16)
    whole, state = layer(x), layer.init_state(2)
    for t in range(6):
        y, state = layer.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-5, atol=1e-6)


def test_leading_masked_steps_are_as_if_absent_also_in_the_cache():
    layer = CausalSelfAttention(16)
    x = torch.randn(2, 9, 16)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    dirty = x.clone()
    dirty[0, :4] = torch.nan
    dirty.requires_grad_()
    y = layer(dirty, mask)
    torch.testing.assert_close(y[:1, 4:], layer(x[:1, 4:]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y[1:], layer(x)[1:], rtol=1e-5, atol=1e-6)
    assert (y[0, :4] == 0).all()
    y.sum().backward()
    assert (dirty.grad[0, :4] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    _, state = layer.prefill(dirty[:, :6].detach(), mask=mask[:, :6])
    rest, state = layer.prefill(x[:, 6:8], state)
    last, _ = layer.step(x[:, 8], state)
    torch.testing.assert_close(torch.cat((rest, last[:, None]), 1), y[:, 6:], rtol=1e-5, atol=1e-6)


def test_masked_memory_is_ignored():
    layer = FusedCrossAttention(16)
    x, memory = torch.randn(3, 4, 16), torch.randn(3, 5, 16)
    visible = torch.ones(3, 5, dtype=torch.bool)
    visible[0, :2] = False
    visible[2] = False
    dirty = memory.masked_fill(~visible.unsqueeze(-1), torch.nan)
    y = layer(x, dirty, memory_mask=visible)
    torch.testing.assert_close(y[:1], layer(x[:1], memory[:1, 2:]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y[1:2], layer(x[1:2], memory[1:2]), rtol=1e-5, atol=1e-6)
    alone = output(layer, self_part(layer, x[2:]))
    torch.testing.assert_close(y[2:], alone, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only():
    layer = CausalSelfAttention(16, dropout=0.5)
    x = torch.randn(2, 6, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(("cross", "count"), [(False, 198_016), (True, 247_552)])
def test_published_parameter_counts(cross, count):
    block = TransformerBlock(128, heads=4, cross=cross)
    assert sum(p.numel() for p in block.parameters()) == count
    assert block.norm.bias is None
    assert block.norm.eps == 1e-5


def test_empty_sequence():
    assert CausalSelfAttention(16)(torch.zeros(2, 0, 16)).shape == (2, 0, 16)


def test_it_is_a_mixer_and_rejects_nonsense():
    assert isinstance(CausalSelfAttention(16), Mixer)
    with pytest.raises(InvalidInputError, match="3 heads do not divide a width of 16"):
        CausalSelfAttention(16, heads=3)
