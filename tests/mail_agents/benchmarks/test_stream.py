"""Streaming steps: the same outputs, own weights, and a state that does not grow."""

import pytest
import torch

from mail_agents.benchmarks import stream
from mail_agents.benchmarks.arguments import Stream
from mail_agents.errors import MailAgentsError
from mail_agents.ops._native import Native

TINY = Stream(
    rounds=2, width=16, layers=2, batch_sizes=(1, 3), caches=(5,), contexts=(4, 9)
)  # fmt: skip


@pytest.fixture(scope="module")
def report():
    return stream.run(TINY)


def test_steps_and_contexts_are_tables(report):
    steps, contexts = report.tables
    assert (steps.name, steps.header) == ("stream step", stream.HEADER)
    names = {row[1] for row in steps.rows}
    assert {"eager", "linears alone", "transformer, 5 cached"} <= names
    assert {row[0] for row in steps.rows} == {"1", "3"}
    assert (contexts.name, contexts.header) == ("stream context", stream.CONTEXT_HEADER)
    assert [row[0] for row in contexts.rows] == ["4", "9"]


def test_the_state_stays_as_large_and_the_cache_grows(report):
    first, second = report.tables[1].rows
    assert first[2] == second[2]
    assert first[4] != second[4]
    (grown,) = (bar for bar in report.bars if "more steps take" in bar.text)
    assert grown.measured is None or grown.measured >= 0


def test_every_bar_of_a_batch_is_a_row(report):
    texts = [bar.text for bar in report.bars]
    assert "step, batch 1: eager against mamba_ssm" in texts
    assert "step, batch 1: native against mamba_ssm" in texts
    assert not any("batch 3" in text for text in texts)
    assert stream.BARS[1] == {"eager": 1.4, "native": 2.8}


def test_the_transformer_with_buffers_is_ours():
    stack = stream.transformer_stack(TINY)
    cached = stream.CachedTransformer(stack, 3, 6)
    tokens = torch.randn(6, 3, 16)
    state = stack.init_state(3)
    with torch.inference_mode():
        for place, token in enumerate(tokens):
            wanted, state = stack.step(token, state)
            assert torch.allclose(cached.step(token, place), wanted, atol=1e-5)


def test_every_candidate_has_its_own_weights():
    stack = stream.mamba_stack(TINY)
    (first, *_), (second, *_) = (stream.our_steppers(stack, 1, TINY, []) for _ in range(2))
    stack.norm_f.weight.data.zero_()
    token = torch.randn(1, 16)
    with torch.inference_mode():
        assert torch.equal(first(token), second(token))
        assert first(token).abs().max() > 0


def test_a_backend_that_cannot_run_is_named(monkeypatch):
    monkeypatch.setattr("mail_agents.mixers.stream.load", lambda: Native(None, "no compiler"))
    absent = []
    made = stream.our_steppers(stream.mamba_stack(TINY), 1, TINY, absent)
    assert [each.name for each in made] == ["eager"]
    assert [text[:31] for text in absent] == ["step, native: Backend 'native' "]


def test_unequal_steps_are_refused(monkeypatch):
    real = stream.our_steppers

    def spoiled(*arguments):
        made = real(*arguments)
        other = stream.Stepper("other", made[0].begin, lambda x, state: (x, state))
        return [*made, other]

    monkeypatch.setattr(stream, "our_steppers", spoiled)
    with pytest.raises(MailAgentsError, match=r"'other' differs.*unfair"):
        stream.run(TINY)
