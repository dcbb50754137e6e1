"""The benchmark script: subcommands, exit status, files, and the tables of the docs."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
import tyro

from mail_agents.benchmarks import (
    arguments,
    block,
    conv,
    dt,
    loader,
    plan,
    scan,
    ssd,
    stream,
    train,
    windows,
)
from mail_agents.benchmarks import report as reports
from mail_agents.errors import InvalidInputError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
#: Every table that the docs may show, and its columns.
HEADERS = {
    "ops scan": ("scan", *scan.COLUMNS["cpu"]),
    "ops conv": ("convolution", *conv.BACKENDS["cpu"], conv.TRANSPOSED, conv.ALONE),
    "ops ssd": ("ssd", *ssd.BACKENDS["cpu"], ssd.SLOW, ssd.MINIMAL),
    "ops memory": ("scan", *scan.COLUMNS["cpu"]),
    "ops accuracy": ("scan", *(name for name in scan.COLUMNS["cpu"] if name != scan.SLOW)),
    "block mamba": ("mamba", "native", "torch", block.MAMBAPY, block.SLOW, block.LINEAR),
    "block mamba2": ("mamba2", "auto", "torch", block.SLOW, block.SMALL_CHUNK, block.LINEAR),
    "train step": train.HEADER,
    "plan": ("plans at a time", plan.PLAIN, "native", "torch", plan.ACT, plan.TWIN),
    "stream step": stream.HEADER,
    "stream context": stream.CONTEXT_HEADER,
    "loader": loader.HEADER,
    "windows": windows.HEADER,
    "dt": dt.HEADER,
} | {f"{subject} bars": reports.BAR_HEADER for subject in ("ops", "block", "plan", "stream")}


@pytest.fixture
def script(load_script):
    return load_script("benchmark")


def test_windows_are_measured_and_judged(script, tmp_path, capsys, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "unused")
    small = arguments.Windows(
        episodes=2, steps=12, image_size=16, history=3, rounds=1, seconds=0.05,
        bar=0.0, bars=True, output=tmp_path / "out",
    )  # fmt: skip
    assert script.main(small) == 0
    assert os.environ["MINARI_DATASETS_PATH"] == "unused"
    printed = capsys.readouterr().out
    assert "Random windows" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "windows.json", "windows.md", "windows.png",
    ]  # fmt: skip
    table = reports.load_tables(tmp_path / "out")["windows"]
    assert [row[0] for row in table.rows] == [
        "minari, hdf5", "store, one by one", "store, batches of 64",
    ]  # fmt: skip
    impossible = dataclasses.replace(small, bar=1e12, output=None)
    assert script.main(impossible) == 1
    assert script.main(dataclasses.replace(impossible, bars=False)) == 0


@pytest.mark.parametrize("name", ["ops", "block", "train", "plan", "stream", "loader", "windows"])
def test_every_subject_has_its_defaults(script, name):
    parsed = tyro.cli(script.Subject, args=[name, "--rounds", "7"])
    assert type(parsed).__name__.lower() == name
    assert (parsed.rounds, parsed.threads, parsed.bars) == (7, 1, False)


def test_sizes_are_tuples(script):
    parsed = tyro.cli(script.Subject, args=["ops", "--scan", *"123456", "--ssd", *"1234"])
    assert (parsed.scan, parsed.ssd) == (((1, 2, 3), (4, 5, 6)), ((1, 2, 3, 4),))
    assert tyro.cli(script.Subject, args=["dt", "--corl", "x"]).corl == Path("x")


def test_every_subject_is_measured_by_its_module(script, monkeypatch):
    ran = []
    monkeypatch.setattr(block, "run", lambda given: ran.append(given) or "report")
    given = arguments.Block()
    assert script.measure(given) == "report"
    assert ran == [given]


def test_docs_are_refreshed_from_files(script, tmp_path, capsys):
    table = reports.Table("dt", "title", ("a", "b"), (("1", "2"),))
    reports.Report("dt", {}, "", [table]).write(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- table: dt -->\nold\n<!-- end of table -->\n", encoding="utf-8")
    given = tyro.cli(script.Subject, args=["docs", "--from", str(tmp_path), "--page", str(page)])
    assert script.main(given) == 0
    text = page.read_text(encoding="utf-8")
    assert text == f"<!-- table: dt -->\n\n{table.markdown()}\n<!-- end of table -->\n"
    assert "Replaced" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["ops", "--rounds", "0"], "--rounds starts at 1; got 0"),
        (["plan", "--threads", "0"], "--threads starts at 1; got 0"),
        (["block", "--device", "nowhere"], "Device 'nowhere' cannot be used here"),
        (["docs", "--from", ".", "--page", "nowhere.md"], r"nowhere\.md does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(script, given, words):
    with pytest.raises(InvalidInputError, match=words):
        script.main(tyro.cli(script.Subject, args=given))


def test_tables_of_the_docs_have_the_columns_that_are_measured():
    found = reports.tables_in(PAGE.read_text(encoding="utf-8"))
    assert found
    for name, text in found.items():
        rows = [
            tuple(cell.strip() for cell in line.strip("|").split("|"))
            for line in text.strip().splitlines()
        ]
        assert rows[0] == HEADERS[name], name
        assert set(rows[1]) == {"---"}, name
        assert len(rows) > 2, name
        assert {len(row) for row in rows} == {len(HEADERS[name])}, name


def test_markers_of_the_docs_are_complete():
    text = PAGE.read_text(encoding="utf-8")
    opened, closed = re.findall(r"<!-- table: ", text), re.findall(r"<!-- end of table -->", text)
    assert len(opened) == len(closed) == len(reports.tables_in(text))
