"""Kernels alone: every candidate computes the same, and each bar is a row."""

import pytest
import torch

from mail_agents.benchmarks import conv, ops, scan, ssd
from mail_agents.benchmarks.arguments import Ops
from mail_agents.benchmarks.gradients import Differentiated
from mail_agents.errors import MailAgentsError

TINY = Ops(
    rounds=1,
    scan=((2, 5, 8),),
    conv=((2, 5, 8),),
    ssd=((2, 6, 64, 4),),
    accuracy=((2, 5, 8),),
    memory=((2, 5, 8),),
)
SIZE = (2, 5, 8)


@pytest.fixture(scope="module")
def report():
    return ops.run(TINY)


def test_a_table_per_question(report):
    shapes = {table.name: (len(table.header), len(table.rows)) for table in report.tables}
    assert shapes == {
        "ops scan": (8, 1),
        "ops conv": (5, 1),
        "ops ssd": (6, 1),
        "ops memory": (8, 1),
        "ops accuracy": (7, 2),
    }
    for table in report.tables:
        assert all(len(row) == len(table.header) for row in table.rows)


def test_times_and_differences_are_kept(report):
    figures = report.figures["scan"]["2 x 5 x 8"]
    assert {"torch", "reference"} <= set(figures["seconds"])
    assert all(each.best > 0 for each in figures["seconds"].values())
    assert max(figures["differences"].values()) < 1e-4
    errors = report.figures["accuracy"]["2 x 5 x 8"]["torch"]
    assert set(errors) == {"result", *scan.scan_inputs((1, 1, 1), 0)}
    assert all(mean <= 1e-5 and largest < 1e-5 for mean, largest in errors.values())
    assert errors["result"][0] > 0


def test_what_cannot_run_is_named_once(report):
    assert len(set(report.absent)) == len(report.absent)
    ran = report.figures["scan"]["2 x 5 x 8"]["seconds"]
    for name in set(scan.BACKENDS["cpu"]) - set(ran):
        assert any(line.startswith(f"selective_scan, {name}: ") for line in report.absent)


@pytest.mark.parametrize("module", ["mambapy", "transformers"])
def test_other_packages_are_compared(module, report):
    pytest.importorskip(module)
    assert module in report.figures["scan"]["2 x 5 x 8"]["seconds"]


def test_other_packages_are_named_when_they_are_absent(monkeypatch):
    missing = scan.alternatives.Found({}, "x: not installed: pip")
    for name in ("mambapy", "transformers", "official"):
        monkeypatch.setattr(scan.alternatives, name, lambda: missing)
    report = ops.run(TINY)
    assert "x: not installed: pip" in report.absent
    assert set(report.figures["scan"]["2 x 5 x 8"]["seconds"]) <= set(scan.BACKENDS["cpu"])


@pytest.mark.parametrize(
    ("time", "made"),
    [
        (scan.time_scans, "scan_candidates"),
        (conv.time_convolutions, "conv_candidates"),
        (ssd.time_duality, "ssd_candidates"),
    ],
)
def test_wrong_candidates_are_refused(time, made, monkeypatch):
    module = {"scan": scan, "conv": conv, "ssd": ssd}[made.split("_")[0]]
    real = getattr(module, made)

    def spoiled(*arguments):
        found = real(*arguments)
        right = found["torch"].function
        found["torch"].function = lambda **given: right(**given) * 1.01
        return found

    monkeypatch.setattr(module, made, spoiled)
    with pytest.raises(MailAgentsError, match=r"'torch' differs.*unfair"):
        time(TINY, ops.Report("ops", {}, ""))


def test_channel_first_functions_are_given_their_layout():
    inputs = {"x": torch.randn(2, 5, 3), "w": torch.randn(3)}
    seen = []

    def function(x, w):
        seen.append((x.shape, x.is_contiguous()))
        return x * w[:, None]

    last = Differentiated("a", lambda x, w: x * w, inputs, torch.ones(2, 5, 3)).outputs()
    first = Differentiated("b", function, inputs, torch.ones(2, 5, 3), True).outputs()
    assert seen == [((2, 3, 5), True)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(last, first, strict=True))
    assert torch.allclose(first[2], inputs["x"].sum((0, 1)), atol=1e-5)


def test_slow_alternatives_are_timed_at_long_sequences_only_on_request():
    names = lambda full: set(scan.scan_candidates((1, 61, 8), Ops(full=full), []))  # noqa: E731
    pytest.importorskip("transformers")
    assert scan.SLOW not in names(full=False)
    assert scan.SLOW in names(full=True)


@pytest.mark.parametrize(
    ("size", "bar"),
    [
        ((64, 10, 512), {"torch": 6, "native": 18}),
        ((64, 15, 1024), {"torch": 6, "native": 18}),
        ((64, 60, 512), {"torch": 8, "native": 25}),
        ((8, 1024, 256), {"torch": 8, "native": 25}),
        ((32, 10, 256), {"torch": 3, "native": 9}),
        ((2, 5, 8), {}),
    ],
)
def test_bars_by_size(size, bar):
    found = {
        ours: limit for (other, ours), limit in scan.bars_of(size).items() if other == "mambapy"
    }
    assert found == bar


def test_bars_of_slow_paths():
    assert scan.bars_of((64, 60, 512))["transformers", "native"] == 130
    assert scan.bars_of((64, 60, 512))["transformers", "torch"] == 40
    assert conv.BARS[6] == {"torch": 6.0, "native": 6.0}
    assert ssd.BARS[10]["reference"] == ssd.BARS[60]["reference"] == 25.0
    assert scan.bars_of((64, 10, 512))["reference", "native"] == 6


def test_a_bar_becomes_a_row(monkeypatch):
    monkeypatch.setattr(scan, "bars_of", lambda size: {("reference", "torch"): 1e9})
    report = ops.Report("ops", {}, "")
    scan.time_scans(TINY, report)
    (bar,) = report.bars
    assert bar.text == "scan 2 x 5 x 8: torch against reference"
    assert bar.measured is not None
    assert not bar.met


def test_the_largest_chunk_divides_the_sequence():
    assert [ssd._chunk(length) for length in (1, 10, 60, 64, 150, 1024)] == [1, 10, 60, 64, 50, 64]
