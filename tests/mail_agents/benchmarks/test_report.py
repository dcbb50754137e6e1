"""Results as text and files, bars, and tables of a page that are replaced."""

import json

import pytest
from rich.console import Console

from mail_agents.benchmarks.charts import Chart
from mail_agents.benchmarks.report import (
    MISSING,
    Bar,
    Report,
    Table,
    duration,
    load_tables,
    ratio,
    refresh,
    tables_in,
    times_row,
)
from mail_agents.errors import InvalidInputError, UnknownNameError

PNG = b"\x89PNG\r\n"


@pytest.fixture
def report():
    table = Table("ops scan", "Scans", ("scan", "torch"), (("2 x 3", "1 ms (1x)"),))
    bars = [Bar("a / b", 2.0, 1.5), Bar("b / a", 0.5, 0.6, at_most=True)]
    charts = [
        Chart("Bars", "ms", {"2 x 3": {"torch": 1.0, "other": 3.0}}, ours=("torch",)),
        Chart("Lines", "ms", {}, lines={"torch": [(10.0, 1.0), (100.0, 2.0)]}, x="tokens"),
    ]
    return Report(
        "ops", {"rounds": 5}, "torch, 1 thread", [table], bars, ["mambapy: not installed: pip"],
        ["a note"], charts, {"scan": {"2 x 3": [1.0]}},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bar", "met", "row"),
    [
        (Bar("x", 6.0, 6.0), True, ("x", "6", "≥ 6", "met")),
        (Bar("x", 5.994, 6.0), False, ("x", "5.99", "≥ 6", "**missed**")),
        (Bar("x", 1.1, 1.1, True), True, ("x", "1.1", "≤ 1.1", "met")),
        (Bar("x", 1.2, 1.1, True), False, ("x", "1.2", "≤ 1.1", "**missed**")),
        (Bar("x", None, 6.0), False, ("x", MISSING, "≥ 6", "not measured")),
        (Bar("x", None, 6.0, True), False, ("x", MISSING, "≤ 6", "not measured")),
    ],
)
def test_bars(bar, met, row):
    assert (bar.met, bar.row()) == (met, row)


def test_a_missed_bar_fails_the_report(report):
    assert report.met
    report.bars.append(Bar("c", None, 1.0))
    assert not report.met


def test_everything_is_written(report, tmp_path):
    paths = report.write(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["ops.md", "ops.json", "ops.png", "ops-2.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths[2:])
    text = paths[0].read_text(encoding="utf-8")
    assert "## Scans\n\n| scan | torch |\n| --- | --- |\n| 2 x 3 | 1 ms (1x) |\n" in text
    assert "| a / b | 2 | ≥ 1.5 | met |" in text
    assert "- a note\n- Not run: mambapy: not installed: pip\n" in text
    data = json.loads(paths[1].read_text(encoding="utf-8"))
    assert data["figures"] == {"scan": {"2 x 3": [1.0]}}
    assert [bar["met"] for bar in data["bars"]] == [True, True]


def test_everything_is_shown(report, capsys):
    report.show(Console(width=120))
    shown = capsys.readouterr().out
    for words in ("Scans", "2 x 3", "a / b", "a note", "Not run: mambapy", "torch, 1 thread"):
        assert words in shown


def test_rows_have_a_cell_per_column():
    columns = ("a", "b", "c")
    assert times_row("x", {"a": 0.5, "c": 1.5}, columns, "a") == (
        "x", "500 ms (1x)", MISSING, "1.5 s (3x)",
    )  # fmt: skip
    assert times_row("x", {"c": 2e-6}, columns, "a") == ("x", MISSING, MISSING, "2 µs")


def test_durations_and_ratios():
    assert [duration(x) for x in (1.0, 0.0123, 9.87e-5)] == ["1 s", "12.3 ms", "98.7 µs"]
    assert ratio({"a": 3.0, "b": 1.5}, "a", "b") == 2.0
    assert ratio({"a": 3.0}, "a", "b") is None
    assert ratio({"b": 3.0}, "a", "b") is None


PAGE = """Text.

<!-- table: ops scan -->

| old | old |
| --- | --- |

<!-- end of table -->

Between.

<!-- table: plan -->
<!-- end of table -->
"""


def test_marked_tables_of_a_page_are_replaced(report, tmp_path):
    report.write(tmp_path)
    page, replaced, kept = refresh(PAGE, load_tables(tmp_path))
    assert (replaced, kept) == (["ops scan"], ["plan"])
    assert "old" not in page
    assert page.startswith("Text.\n")
    assert "\n\nBetween.\n\n" in page
    assert tables_in(page)["ops scan"] == f"\n{report.tables[0].markdown()}\n"
    assert refresh(page, load_tables(tmp_path))[0] == page


def test_pages_and_folders_without_tables_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="no marked table"):
        refresh("Text.", {})
    with pytest.raises(InvalidInputError, match=r"has no results.*--output"):
        load_tables(tmp_path)
