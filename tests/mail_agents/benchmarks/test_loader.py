"""The loader benchmark runs, counts waiting, and judges by its bar."""

import dataclasses
import os
import time

import pytest

from mail_agents.benchmarks import loader
from mail_agents.benchmarks.arguments import Loader
from mail_agents.data.views import StepView
from mail_agents.errors import InvalidInputError

SMALL = Loader(
    agent="mail/d-tr-bc",
    histories=(1, 2),
    batch_size=4,
    rows=2,
    rounds=2,
    episodes=2,
    length=6,
    image_size=40,
    bar=1.0,
)


def test_it_measures_and_judges():
    report = loader.run(SMALL)
    found = report.figures["rows"]
    assert [row["history"] for row in found] == [1, 2]
    for row in found:
        assert row["windows_per_second"] > 0
        for name in ("on_demand", "ahead"):
            wait, step = row[f"{name}_wait_seconds"], row[f"{name}_step_seconds"]
            assert row[f"{name}_share"] == pytest.approx(wait / (wait + step))
            # Half of each batch is trained on: a step on all of it takes twice as long.
            whole = wait / (wait + 2 * step)
            assert row[f"{name}_share_of_whole_batches"] == pytest.approx(whole)
    assert report.figures["worst"] == max(row["ahead_share"] for row in found)
    assert report.met
    (table,) = report.tables
    assert [row[:2] for row in table.rows] == [
        ("1", "on demand"), ("1", "read ahead"), ("2", "on demand"), ("2", "read ahead"),
    ]  # fmt: skip
    assert any("the store delivers" in note for note in report.notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 0}, "--rows starts at 1"),
        ({"rows": 5}, "--rows 5 are more than a batch has"),
        ({"rounds": 0}, "--rounds starts at 1"),
    ],
)
def test_counts_that_measure_nothing_are_refused(changes, words):
    with pytest.raises(InvalidInputError, match=words):
        loader.run(dataclasses.replace(SMALL, **changes))


def test_the_store_is_dropped_from_the_cache(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b"):
        (tmp_path / name).write_bytes(b"x" * 9)
    dropped = []
    monkeypatch.setattr("os.posix_fadvise", lambda *given: dropped.append(given[1:]))
    loader.drop_cache(tmp_path)
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)] * 2


def test_a_slow_store_is_seen_and_reading_ahead_hides_what_it_can(monkeypatch):
    real = StepView.__getitem__

    def slow(view, item):
        time.sleep(0.1)
        return real(view, item)

    monkeypatch.setattr(StepView, "__getitem__", slow)
    monkeypatch.setattr(loader, "gradients", lambda *_: time.sleep(0.15))
    monkeypatch.setattr("mail_agents.agent.Agent.apply_gradients", lambda agent: {})
    report = loader.run(dataclasses.replace(SMALL, histories=(1,), rounds=3, bar=0.0))
    (row,) = report.figures["rows"]
    assert row["on_demand_share"] > 0.25  # 0.1 s of 0.25 s
    assert row["ahead_share"] < 0.5 * row["on_demand_share"]
    assert not report.met
