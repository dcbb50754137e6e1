import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from mail_agents.errors import InvalidInputError, StorageError
from mail_agents.report import (
    PublishedTable,
    Reference,
    RunResult,
    TaskResult,
    headline,
    learning_curves,
    overview_rows,
    pair_rows,
    performance_profiles,
    score_rows,
    success_bars,
    summary,
    tables,
    target_rows,
    to_markdown,
    to_rich,
    write_report,
)
from mail_agents.report.charts import _ticks
from mail_agents.report.curves import profiles
from mail_agents.report.published import match_dataset, published_rows
from mail_agents.report.settings import settings_of


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


def test_notes_of_runs_stand_beside_the_agent_once(results, tmp_path):
    noted = [
        replace(results[0], notes=["It <sees> labels.", "Short."]),
        replace(results[0], seed=1, notes=["Short."]),
        results[1],
    ]
    page = write_report(noted, tmp_path / "r.html").read_text(encoding="utf-8")
    measured = page[page.index("How this was measured") :]
    assert page.count("Short.") == 1
    assert "<dd>It &lt;sees&gt; labels.</dd><dd>Short.</dd><dt>ED-Tr BC" in measured


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


# ---- normalised scores, many settings, targets, published numbers -----------------------------

AGENTS = ("dt", "dm", "bc", "decision-mamba-released")
DATASETS = tuple(f"{w}-{k}" for w in ("hopper", "walker2d") for k in "abcd")


def scored(agents=AGENTS, datasets=DATASETS, seeds=3, **fields) -> list[RunResult]:
    """Runs whose score is 10 per agent, 1 per dataset and 0.1 per seed."""
    runs = []
    for i, agent in enumerate(agents):
        for j, dataset in enumerate(datasets):
            for seed in range(seeds):
                world = dataset.partition("-")[0]
                episodes = [
                    {"index": e, "seed": e, "success": None, "length": 9,
                     "episode_return": 100.0 * i + 10 * j + seed}
                    for e in range(2)
                ]  # fmt: skip
                result = [TaskResult(world, episodes)]
                runs.append(
                    RunResult(
                        agent, agent, dataset, seed, 1000 * (i + 1) + j, 50, 2.0,
                        curve=[(0, 1.0), (50, 0.5)],
                        evaluations={"last": result, **fields.get("more", {})},
                        references={world: Reference(0, 1000, "d4rl:" + world)},
                        target_return=fields.get("target_return"),
                        targets=dict.fromkeys(fields.get("targets", ()), result),
                    )
                )  # fmt: skip
    return runs


def test_headline_of_scores():
    text = headline(scored(datasets=("hopper-a", "walker2d-b")))
    assert text == (
        "decision-mamba-released reaches a mean normalised score of 30.6 on 2 datasets "
        "(± 0.1 over 3 seeds), the most of the 4 agents; next is bc with 20.6 ± 0.1."
    )
    assert "on 1 dataset (95 % interval 0.0 to 0.0)" in headline(
        scored(AGENTS[3:], DATASETS[:1], 1)
    )


def test_headline_says_who_is_left_out():
    runs = scored(datasets=("hopper-a", "walker2d-b"))
    text = headline(runs[:-1])
    assert text.startswith("bc reaches a mean normalised score of 20.6 on 2 datasets")
    assert text.endswith("missing: decision-mamba-released.")
    # Nobody has everything: counted settings are all that is left.
    broken = [run for run in runs if (run.agent, run.dataset) in (("dt", "hopper-a"),
                                                                 ("dm", "walker2d-b"))]  # fmt: skip
    assert headline(broken) == (
        "dt and dm each lead 1 of 2 datasets (no agent was evaluated on all of them)."
    )


def test_returns_of_different_worlds_are_not_averaged():
    runs = [replace(run, references={}) for run in scored()]
    assert headline(runs) == (
        "decision-mamba-released leads 8 of 8 datasets (raw returns of different worlds have no "
        "common mean)."
    )
    table = score_rows(runs)
    assert "average" not in [row[0] for row in table.rows]
    assert overview_rows(runs).header == ("agent", "parameters", "updates", "training")


def test_many_settings_become_rows():
    table = score_rows(scored())
    assert table.header == ("dataset", *AGENTS)
    assert [row[0] for row in table.rows] == [*DATASETS, "average", "parameters"]
    assert table.rows[1][1:3] == ("1.1 ± 0.1", "11.1 ± 0.1")
    assert table.rows[-1][1] == "1 to 1.01 k"
    assert table.best == {(i, 4) for i in range(9)}
    few = score_rows(scored(datasets=DATASETS[:2]))
    assert few.header[:5] == ("agent", "hopper-a", "hopper-b", "average", "IQM over seeds")
    assert few.rows[0][3] == "0.6 ± 0.1"


def test_overview_puts_last_best_and_size_together():
    runs = scored()
    best = [TaskResult("hopper", runs[-1].tasks()[0].episodes)]
    runs = [
        replace(run, evaluations={**run.evaluations, "best": best})
        if run.agent == "dt" and run.dataset == "hopper-a" else run
        for run in runs
    ]  # fmt: skip
    table = overview_rows(runs[:-1])
    assert table.header == (
        "agent", "parameters", "last checkpoint", "best checkpoint", "IQM over seeds", "updates",
        "training",
    )  # fmt: skip
    assert table.rows[0][:4] == ("dt", "1 to 1.01 k", "3.6 ± 0.1", "incomplete")
    assert table.rows[0][4].startswith("3.6 [")
    assert table.rows[1][3] == "none"
    assert table.rows[3][2:5] == ("incomplete", "none", "incomplete")
    assert (2, 2) in table.best


def test_ready_made_agents_have_a_size_but_no_training():
    run = replace(scored(AGENTS[:1], DATASETS[:1], 1)[0], train_steps=0, train_seconds=0.0)
    assert tables.cost_cells([run]) == ["1 k", "ready-made", "ready-made"]
    assert tables.cost_cells([run, replace(run, parameters=2_500_000)])[0] == "1 k to 2.5 M"


def aiming(run: RunResult, *targets: float | None) -> RunResult:
    """The run with the target returns that its episodes aimed for, by task."""
    tasks = [
        TaskResult(task.task, [{**episode, "target_return": target} for episode in task.episodes])
        for task, target in zip(run.tasks(), targets, strict=True)
    ]
    return replace(run, evaluations={"last": tasks}, target_return=targets[0])


def described(results: list[RunResult], path) -> dict[str, str]:
    """What the page says of each agent under "How this was measured"."""
    page = write_report(results, path / "report.html").read_text(encoding="utf-8")
    measured = page[page.index("How this was measured") :]
    found = re.findall(r"<dt>([^<]*)</dt>((?:<dd>[^<]*</dd>)+)", measured)
    return {name: "\n".join(re.findall("<dd>([^<]*)</dd>", lines)) for name, lines in found}


def test_the_page_names_the_target_of_every_score(results, tmp_path):
    first, second, *_ = results
    runs = [
        aiming(first, 9.5, 9.5),
        aiming(replace(first, seed=1), 9.5, 9.5),
        aiming(second, 3600.0, 5000.0),
        results[2],
    ]
    found = described(runs, tmp_path)
    assert found["ED-Ma BC"].endswith(", execute 5\ntarget return 9.5")
    assert found["ED-Tr BC"].endswith("\ntarget returns 3600 (reach); 5000 (pick)")
    assert "target" not in found["D-Ma BC"]


def test_scores_name_the_world_they_were_made_in(results, tmp_path):
    """D4RL's references belong to MuJoCo 2; a score of another physics says which."""
    reference = {"reach": Reference(0, 10, "d4rl:hopper")}
    first, second, *_ = results
    runs = [
        replace(first, references=reference, worlds={"reach": "d4rl/hopper (Hopper-v4)"}),
        replace(second, references=reference, worlds={"reach": "d4rl/hopper (Hopper-v5)"}),
    ]
    reach, _ = settings_of(runs)
    both = "d4rl/hopper (Hopper-v4) and d4rl/hopper (Hopper-v5)"
    assert reach.scale == f"0 to 10 (d4rl:hopper), on {both}"
    measured = described(runs, tmp_path)
    assert measured["references of reach"] == reach.scale
    assert summary.score_lines(runs[0])[0].endswith(
        "of 0 to 10 (d4rl:hopper), on d4rl/hopper (Hopper-v4)"
    )
    assert settings_of(results)[0].scale == ""


def test_the_page_says_of_ready_made_agents_that_they_are(results, tmp_path):
    ready = replace(results[0], train_steps=0, train_seconds=0.0, curve=[])
    assert described([ready], tmp_path)["ED-Ma BC"] == (
        "mail/ed-ma-bc, 1 M parameters, ready-made, history 1, horizon 5, execute 5"
    )


def test_targets_have_a_table_of_their_own():
    runs = scored(AGENTS[:2], DATASETS[:1], 2, target_return=3600.0, targets=("1800",))
    runs += scored(AGENTS[2:3], DATASETS[:1], 2)
    table = target_rows(runs)
    assert [row[:2] for row in table.rows] == [("hopper-a", "dt"), ("hopper-a", "dm")]
    assert table.rows[1][2] == "3600: 10.1 ± 0.1, 1800: 10.1 ± 0.1"
    assert table.rows[1][3:] == ("3600", "10.1 ± 0.1")
    assert target_rows(scored(AGENTS[:1])).rows == ()


PUBLISHED = PublishedTable(
    "A paper", "Somebody (2020), table 1", "best", "v2", 4, "standard deviation", "A warning.",
    {"DT": {"hopper-a-v2": (67.6, 1.0)}, "TD": {"hopper-a-v2": (50.0, None), "ant-a-v2": (1, 2)}},
)  # fmt: skip


def test_published_numbers_match_by_name():
    settings = settings_of(scored())
    rows = published_rows(PUBLISHED, settings)
    assert rows is not None
    assert rows.header == ("dataset", "DT", "TD")
    assert rows.rows == (("hopper-a-v2", "67.6 ± 1.0", "50.0"),)
    assert published_rows(PUBLISHED, settings_of(scored(datasets=("walker2d-a",)))) is None
    assert match_dataset("hopper-a-v2", ["hopper-a-v2"]) == "hopper-a-v2"
    assert match_dataset("hopper-a-v0", ["hopper-a-v2"]) is None
    assert match_dataset("hopper", ["hopper-a-v2"]) is None


def test_profiles_need_scores_and_runs(tmp_path):
    _, found = profiles(scored(AGENTS[:2], DATASETS[:2]))
    assert set(found) == {"dt", "dm"}
    share, low, high = found["dm"]
    assert share[0] == 1
    assert (low <= share).all()
    assert not (low == high).all()
    _, found = profiles(scored(AGENTS[:2], DATASETS, 1))
    assert all((low == high).all() for _, low, high in found.values())
    assert profiles(scored(AGENTS[:1], DATASETS[:1], 3))[1] == {}
    assert profiles([replace(run, references={}) for run in scored()])[1] == {}
    path = tmp_path / "p.png"
    assert png_size(performance_profiles(scored(), path, title="Profiles"))[0] > 500
    assert performance_profiles([returns_only(1)], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_page_of_scores(tmp_path):
    runs = scored(target_return=3600.0, targets=("1800",))
    more = {"best": runs[0].tasks()}
    runs = [replace(run, evaluations={**run.evaluations, **more}) if run.dataset == "hopper-a"
            else run for run in runs]  # fmt: skip
    own = [
        replace(run, references={"walker2d": Reference(0, 1000, "measured")})
        if run.dataset == "walker2d-a" else run
        for run in runs
    ]  # fmt: skip
    html = write_report(own, tmp_path / "r.html", published=[PUBLISHED]).read_text("utf-8")
    page = Page(html)
    assert page.open == []
    text = "".join(page.text)
    for wanted in (
        "Normalised score on unseen starts", "Bars of all 8 datasets", "Performance profiles",
        "Target returns", "Published numbers", "Somebody (2020), table 1", "A warning.",
        "best checkpoint, chosen by the evaluation itself", "references of hopper-a",
        "0 to 1000 (d4rl:hopper)", "walker2d-a", "Show 8 charts", "± 0.1", "the last ones",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "in spite of their names: walker2d-a." in text
    # Published numbers are in no table of ours.
    assert text.index("67.6") > text.index("Published numbers")
    assert text.count("67.6") == 1
    without = write_report(runs, tmp_path / "s.html").read_text("utf-8")
    assert "Published numbers" not in without


def test_the_main_tables_do_not_repeat_themselves(results):
    assert tables.main_tables(results) == [score_rows(results)]
    runs = scored()
    assert tables.main_tables(runs) == [overview_rows(runs), score_rows(runs)]
    best = [replace(r, evaluations={**r.evaluations, "best": r.tasks()}) for r in runs[:3]]
    assert tables.main_tables(best) == [overview_rows(best)]


def test_one_setting_has_one_table(tmp_path):
    runs = scored(AGENTS[:2], DATASETS[:1])
    html = write_report(runs, tmp_path / "a.html").read_text("utf-8")
    assert html.count("<table") == 1
    runs = [replace(r, evaluations={**r.evaluations, "best": r.tasks()}) for r in runs]
    html = write_report(runs, tmp_path / "b.html").read_text("utf-8")
    assert html.count("<table") == 1
    assert "best checkpoint" in html


def test_figures_of_several_datasets(tmp_path):
    runs = scored(AGENTS[:2], DATASETS[:3], 2)
    assert png_size(success_bars(runs[:-1], tmp_path / "bars.png"))[0] > 1500  # four panels wide
    width, height = png_size(learning_curves(runs, tmp_path / "curves.png"))
    assert width > 4 * height
