"""The loader benchmark runs, counts waiting, and judges by its bar."""

import json
import os
import time

import pytest

from mail_agents.data.views import StepView
from mail_agents.errors import InvalidInputError

SMALL = {
    "agent": "mail/d-tr-bc",
    "histories": (1, 2),
    "batch_size": 4,
    "rows": 2,
    "steps": 2,
    "episodes": 2,
    "length": 6,
    "image_size": 40,
}


@pytest.fixture
def script(load_script):
    return load_script("benchmark_loader")


def test_it_measures_and_judges(script, tmp_path, capsys):
    output = tmp_path / "out" / "loader.json"
    assert script.main(script.Args(**SMALL, bar=1.0, output=output)) == 0
    figures = json.loads(output.read_text(encoding="utf-8"))
    assert [row["history"] for row in figures["rows"]] == [1, 2]
    for row in figures["rows"]:
        assert row["windows_per_second"] > 0
        for name in ("on_demand", "ahead"):
            wait, step = row[f"{name}_wait_seconds"], row[f"{name}_step_seconds"]
            assert row[f"{name}_share"] == pytest.approx(wait / (wait + step))
            # Half of each batch is trained on: a step on all of it takes twice as long.
            whole = wait / (wait + 2 * step)
            assert row[f"{name}_share_of_whole_batches"] == pytest.approx(whole)
    assert figures["worst"] == max(row["ahead_share"] for row in figures["rows"])
    assert "the store delivers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 0}, "--rows starts at 1"),
        ({"rows": 5}, "--rows 5 are more than a batch has"),
        ({"steps": 0}, "--steps starts at 1"),
    ],
)
def test_counts_that_measure_nothing_are_refused(script, changes, words):
    with pytest.raises(InvalidInputError, match=words):
        script.main(script.Args(**{**SMALL, **changes}))


def test_the_store_is_dropped_from_the_cache(script, tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b"):
        (tmp_path / name).write_bytes(b"x" * 9)
    dropped = []
    monkeypatch.setattr("os.posix_fadvise", lambda *given: dropped.append(given[1:]))
    script.drop_cache(tmp_path)
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)] * 2


def test_a_slow_store_is_seen_and_reading_ahead_hides_what_it_can(script, tmp_path, monkeypatch):
    real = StepView.__getitem__

    def slow(view, item):
        time.sleep(0.1)
        return real(view, item)

    monkeypatch.setattr(StepView, "__getitem__", slow)
    monkeypatch.setattr(script, "gradients", lambda *_: time.sleep(0.15))
    monkeypatch.setattr("mail_agents.agent.Agent.apply_gradients", lambda agent: {})
    output = tmp_path / "loader.json"
    args = script.Args(**{**SMALL, "histories": (1,), "steps": 3}, output=output)
    script.main(args)
    (row,) = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert row["on_demand_share"] > 0.25  # 0.1 s of 0.25 s
    assert row["ahead_share"] < 0.5 * row["on_demand_share"]
    assert script.main(script.Args(**SMALL, bar=0.0)) == 1
