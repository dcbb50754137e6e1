"""Streams of tokens with states in place."""

import gc
import tracemalloc

import pytest
import torch
from torch import Tensor

from mail_agents.errors import InvalidInputError, MissingDependencyError
from mail_agents.mixers import MambaStack, MambaStream
from mail_agents.ops import use_backend
from mail_agents.ops._native import load
from mail_agents.ops.backends import recording_backends

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(bool(load().failure), reason=load().failure or "-")
)
BACKENDS = [NATIVE, "torch", "reference"]


def _stack(**sizes: int | str) -> MambaStack:
    torch.manual_seed(0)
    return MambaStack(**{"d_model": 24, "layers": 3, "d_state": 5, "d_conv": 3} | sizes)  # type: ignore[arg-type]


def _tokens(steps: int, batch: int, like: MambaStack) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = like.norm_f.weight
    return torch.randn(steps, batch, weight.numel(), generator=generator).to(weight)


def _whole(stack: MambaStack, x: Tensor, aggregate: Tensor | None = None) -> Tensor:
    with torch.no_grad(), use_backend("reference"):
        rest = None if aggregate is None else aggregate.transpose(0, 1)
        return stack(x.transpose(0, 1), rest).transpose(0, 1)


def _all(stream: MambaStream, x: Tensor, aggregate: Tensor | None = None) -> Tensor:
    rest = [None] * len(x) if aggregate is None else aggregate
    return torch.stack([stream.step(*pair) for pair in zip(x, rest, strict=True)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("aggregated", [False, True])
@pytest.mark.parametrize("d_conv", [1, 4])
def test_a_stream_gives_what_the_whole_sequence_gives(backend, batch, aggregated, d_conv):
    stack = _stack(d_conv=d_conv)
    x = _tokens(7, batch, stack)
    aggregate = _tokens(7, batch, stack).flip(0) if aggregated else None
    with use_backend(backend):
        stream = stack.stream(batch)
    assert stream.backend == ("modules" if backend == "reference" else backend)
    torch.testing.assert_close(
        _all(stream, x, aggregate), _whole(stack, x, aggregate), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_of_the_blocks_count(backend, bias):
    from mail_agents.mixers import Mamba

    stack = _stack()
    for layer in stack.layers:
        layer.mixer = Mamba(24, 5, 3, bias=bias, conv_bias=not bias)  # type: ignore[assignment]
        for name, parameter in layer.mixer.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    x = _tokens(5, 2, stack)
    with use_backend(backend):
        stream = stack.stream(2)
    torch.testing.assert_close(_all(stream, x), _whole(stack, x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_start_anew_one_by_one(backend):
    stack = _stack()
    x, later = _tokens(9, 3, stack).split([4, 5])
    with use_backend(backend):
        stream = stack.stream(3)
    _all(stream, x)
    stream.reset(torch.tensor([True, False, True]))
    found = _all(stream, later)
    torch.testing.assert_close(found[:, ::2], _whole(stack, later)[:, ::2], rtol=0, atol=2e-6)
    whole = _whole(stack, torch.cat((x, later)))[4:]
    torch.testing.assert_close(found[:, 1], whole[:, 1], rtol=0, atol=2e-6)
    stream.reset()
    torch.testing.assert_close(_all(stream, x), _whole(stack, x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_changed_in_place_are_seen(backend):
    stack = _stack()
    x = _tokens(4, 2, stack)
    with use_backend(backend):
        stream = stack.stream(2)
    _all(stream, x)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.mul_(1.3)
    stream.reset()
    torch.testing.assert_close(_all(stream, x), _whole(stack, x), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("backend", [NATIVE, "torch"])
def test_a_stream_keeps_the_weights_it_was_made_with(backend):
    stack = _stack()
    x = _tokens(4, 2, stack)
    expected = _whole(stack, x)
    with use_backend(backend):
        stream = stack.stream(2)
    stack.double()
    gc.collect()
    torch.testing.assert_close(_all(stream, x), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("mixer", "dtype"),
    [("mamba2", torch.float32), ("mamba", torch.float64), ("mamba2", torch.float64)],
)
def test_other_stacks_are_called_as_they_stand(mixer, dtype):
    stack = _stack(mixer=mixer, headdim=8).to(dtype)
    x = _tokens(5, 2, stack)
    stream = stack.stream(2)
    assert stream.backend == "modules"
    torch.testing.assert_close(_all(stream, x), _whole(stack, x), rtol=0, atol=2e-6)
    stream.reset(torch.tensor([True, True]))
    torch.testing.assert_close(_all(stream, x), _whole(stack, x), rtol=0, atol=2e-6)


def test_hooks_are_called():
    stack, seen = _stack(), []
    stack.layers[0].mixer.in_proj.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    stream = stack.stream(2)
    assert stream.backend == "modules"
    _all(stream, _tokens(3, 2, stack))
    assert len(seen) == 3


def test_what_runs_is_recorded():
    ran: dict[str, set[str]] = {}
    with recording_backends(ran), use_backend("torch"):
        _stack().stream(1)
    assert ran == {"mamba_stream": {"torch"}}


def test_native_by_name_needs_the_kernels(monkeypatch):
    from mail_agents.mixers import stream
    from mail_agents.ops._native import Native

    def broken() -> Native:
        return Native(None, "no compiler was found")

    monkeypatch.setattr(stream, "load", broken)
    with use_backend("native"), pytest.raises((MissingDependencyError, InvalidInputError)):
        _stack().stream(1)
    assert _stack().stream(1).backend == "torch"


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_do_not_fit_are_refused(backend):
    stack = _stack()
    with use_backend(backend):
        stream = stack.stream(2)
    good = torch.zeros(2, 24)
    for bad in (torch.zeros(3, 24), torch.zeros(2, 25), torch.zeros(2, 1, 24), good.double()):
        with pytest.raises(InvalidInputError, match="expected"):
            stream.step(bad)
        with pytest.raises(InvalidInputError, match="aggregate"):
            stream.step(good, bad)
    for rows in (torch.zeros(3, dtype=torch.bool), torch.zeros(2)):
        with pytest.raises(InvalidInputError, match="bool per row"):
            stream.reset(rows)


def test_streams_need_causal_mixers_and_rows():
    with pytest.raises(InvalidInputError, match="Hydra"):
        _stack(mixer="hydra", headdim=8).stream(1)
    with pytest.raises(InvalidInputError, match="at least one row"):
        _stack().stream(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_stay_as_they_are(backend):
    stack = _stack()
    x = _tokens(2, 3, stack)
    before = x.clone()
    with use_backend(backend):
        _all(stack.stream(3), x, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", [NATIVE, "torch"])
def test_memory_does_not_grow(backend):
    stack = _stack()
    x = _tokens(1, 2, stack)[0]
    with use_backend(backend):
        stream = stack.stream(2)
    for _ in range(20):
        stream.step(x)
    tracemalloc.start()
    try:
        for _ in range(10):
            stream.step(x)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(500):
            stream.step(x)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 2000
