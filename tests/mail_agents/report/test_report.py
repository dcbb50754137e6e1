import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from mail_agents.errors import InvalidInputError, StorageError
from mail_agents.report import (
    RunResult,
    TaskResult,
    headline,
    learning_curves,
    pair_rows,
    score_rows,
    success_bars,
    summary,
    tables,
    to_markdown,
    to_rich,
    write_report,
)
from mail_agents.report.charts import _ticks


def returns_only(value: float) -> RunResult:
    episodes = [
        {"index": i, "seed": i, "success": None, "episode_return": value + i, "length": 5}
        for i in range(4)
    ]
    return RunResult(
        "a", f"A{value}", "d", 0, 10, evaluations={"last": [TaskResult("hop", episodes)]}
    )


def test_headline_is_computed(results):
    text = headline(results)
    assert text.startswith(
        "ED-Ma BC solves 35 of 40 unseen episodes on 2 tasks (88 %, 95 % interval 74 to 95 %), "
        "the most of the 4 agents."
    )
    assert "ED-Ma BC is 25 points ahead of its Transformer twin ED-Tr BC" in text
    assert "cannot tell from chance" not in text


def test_headline_names_ties_and_admits_chance(results):
    twin = replace(results[1], evaluations=results[0].evaluations)
    text = headline([results[0], twin])
    assert text.startswith("ED-Ma BC and ED-Tr BC each solve 35 of 40")
    assert "level with its Transformer twin" in text
    assert "cannot tell from chance" in text
    assert "the most of" not in text


def test_headline_of_returns():
    text = headline([returns_only(1), returns_only(5)])
    assert text.startswith("A5 reaches a mean return of 6.5 on 1 task")


def test_twins():
    assert summary.twin_of("mail/ed-ma-bc") == "mail/ed-tr-bc"
    assert summary.twin_of("lab/mail/d-ma-ddpm-released") == "lab/mail/d-tr-ddpm-released"
    assert summary.twin_of("mail/ed-tr-bc") is None
    assert summary.twin_of("random") is None


def test_pairs_are_the_twin_and_the_leader_against_the_rest(results):
    found = [(p.first, p.second, p.twin) for p in summary.pairs(results)]
    assert found == [("ED-Ma BC", "ED-Tr BC", True), ("ED-Ma BC", "D-Ma BC", False)]
    assert all(p.adjusted_p >= p.result.p_value for p in summary.pairs(results))
    assert summary.pairs(results[3:]) == []
    assert summary.pairs([returns_only(1), returns_only(2)]) == []


def test_colours_are_stable_and_grey_without_learning(results):
    tints = summary.colours(results)
    assert tints["random"] == summary.GREY
    assert len(set(tints.values())) == 4
    assert summary.colours(results[:2])["ED-Ma BC"] == tints["ED-Ma BC"]
    assert set(tints) == set(summary.colours(results, dark=True))
    assert tints != summary.colours(results, dark=True)


def test_score_table(results):
    table = score_rows(results)
    assert table.header == (
        "agent", "reach", "pick", "all tasks", "parameters", "updates", "training",
    )  # fmt: skip
    assert table.rows[0] == (
        "ED-Ma BC", "100 % [84, 100]", "75 % [53, 89]", "88 % [74, 95]", "1 M", "300", "1 min 01 s",
    )  # fmt: skip
    assert table.rows[3][-3:] == ("none", "none", "none")
    assert table.best == {(0, 1), (0, 2), (0, 3)}
    markdown = to_markdown(table)
    assert "| **100 % [84, 100]** |" in markdown
    assert len(markdown.splitlines()) == 6


def test_three_seeds_get_an_interquartile_mean(results):
    runs = [replace(results[0], seed=seed) for seed in range(3)] + results[1:2]
    table = score_rows(runs)
    column = table.header.index("IQM over seeds")
    assert table.rows[0][column] == "88 % [88, 88]"
    assert table.rows[1][column] == "too few seeds"


def test_a_task_that_was_not_run_is_said_so(results):
    partial = replace(results[1], evaluations={"last": results[1].tasks()[:1]})
    table = score_rows([results[0], partial])
    assert table.rows[1][2] == "not run"


def test_rich_table_shows_brackets(results):
    console = Console(width=200, file=io.StringIO())
    console.print(to_rich(score_rows(results), "Success"))
    console.print(to_rich(pair_rows(results)))
    text = console.file.getvalue()
    assert "75 % [53, 89]" in text
    assert "ED-Ma BC vs ED-Tr BC (twin)" in text


def test_human_units():
    assert [tables.human(n) for n in (7, 1_500, 2_345_678, 3 * 10**9)] == [
        "7", "1.5 k", "2.35 M", "3 G",
    ]  # fmt: skip
    assert [tables.duration(s) for s in (41.6, 185, 7_620)] == ["42 s", "3 min 05 s", "2 h 07 min"]
    assert [summary.format_p(p) for p in (0.0001, 0.0123, 0.5)] == [
        "p < 0.001", "p = 0.012", "p = 0.50",
    ]  # fmt: skip
    assert [summary.format_points(x) for x in (0.071, -0.04, -0.001)] == ["+7", "-4", "0"]


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_figures(results, tmp_path):
    two_seeds = [*results, replace(results[0], seed=1)]
    width, height = png_size(
        success_bars(two_seeds, tmp_path / "out" / "bars.png", title="Success")
    )
    assert width > height > 100
    assert png_size(learning_curves(two_seeds, tmp_path / "curves.png", title="Loss"))[0] > 300
    assert png_size(learning_curves(results[3:], tmp_path / "none.png"))[0] > 300
    partial = replace(results[1], evaluations={"last": results[1].tasks()[:1]})
    success_bars([results[0], partial], tmp_path / "partial.png")
    success_bars([returns_only(-5), returns_only(2)], tmp_path / "returns.png")


class Page(HTMLParser):
    VOID = ("meta", "br", "line")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_self_contained_and_well_formed(results, tmp_path):
    best = replace(results[0], evaluations={**results[0].evaluations, "best": results[0].tasks()})
    path = write_report(
        [best, *results[1:]],
        tmp_path / "out" / "report.html",
        title="A <b>title</b>",
        protocol={"machine": "2 cores & a half"},
        commands=["make demo"],
        notes=["Smaller than the paper's."],
    )
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    text = "".join(page.text)
    for wanted in (
        "A <b>title</b>", "ED-Ma BC solves 35 of 40", "2 cores & a half", "make demo",
        "Smaller than the paper's.", "1 video(s) are missing", "Checkpoint: best", "horizon 5",
        "does not learn", "20 environment seeds, 1000 to 1019", "35/40",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "script" not in page.seen
    links = [v for k, v in page.attributes if k in ("src", "href", "srcset", "poster", "data")]
    assert len(links) == 1
    assert links[0].startswith("data:video/mp4;base64,bm90IHJlYWxseSBh")
    assert not re.search(r"https?://|@import|url\(", html)


def test_page_is_the_same_twice(results, tmp_path):
    first = write_report(results, tmp_path / "a.html").read_text(encoding="utf-8")
    assert first == write_report(results, tmp_path / "b.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_leaves_the_old_one(results, tmp_path, monkeypatch):
    page = write_report(results, tmp_path / "out" / "r.html")
    before = page.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"r\.html.*No space left"):
        write_report(results[:1], page)
    assert page.read_bytes() == before
    assert [p.name for p in page.parent.iterdir()] == ["r.html"]


def test_page_of_returns(tmp_path):
    text = write_report([returns_only(-3), returns_only(2)], tmp_path / "r.html").read_text(
        encoding="utf-8"
    )
    assert "Return on unseen starts" in text
    assert "Head to head" not in text


def test_page_needs_an_evaluation(tmp_path):
    with pytest.raises(InvalidInputError, match="no evaluation 'last'"):
        write_report([RunResult("a", "A", "d", 0)], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0.04, 1.1, True), (3, 4, True), (-2, 9, False), (5, 5, False)]
)
def test_axis_ticks_lie_inside(low, high, log):
    ticks = _ticks(low, high, log)
    assert all(low <= t <= high for t in ticks)
    assert ticks
