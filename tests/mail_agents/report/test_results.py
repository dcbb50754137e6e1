import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from mail_agents.errors import CorruptFileError, InvalidInputError
from mail_agents.report import (
    Reference,
    RunResult,
    TaskResult,
    group_by_task,
    load_results,
    save_results,
)
from mail_agents.report.results import agents_of, task_names


def test_json_round_trip(results, tmp_path):
    path = save_results(tmp_path / "deep" / "results.json", results)
    assert load_results(path) == results
    assert not list(path.parent.glob("*.tmp"))


def test_numpy_values_are_written_as_numbers(tmp_path):
    config = {"lr": np.float32(0.5), "sizes": np.arange(3), "path": tmp_path}
    save_results(tmp_path / "r.json", [RunResult("a", "A", "d", 0, config=config)])
    loaded = load_results(tmp_path / "r.json")[0].config
    assert loaded == {"lr": 0.5, "sizes": [0, 1, 2], "path": str(tmp_path)}


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="cannot be written"):
        save_results(tmp_path / "r.json", [RunResult("a", "A", "d", 0, config={"x": {1, 2}})])
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Cannot read"),
        ("[]", "not a results file"),
        ('{"format": "mail-agents-results", "version": 99}', "version 99"),
        ('{"format": "mail-agents-results", "version": 1}', "valid results"),
        ('{"format": "mail-agents-results", "version": 1, "results": [{"agent": 3}]}', "valid"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(CorruptFileError, match=message) as error:
        load_results(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("version", "missing"),
    [(1, ("references", "target_return", "targets", "notes")), (2, ("notes",))],
)
def test_older_versions_are_read(results, tmp_path, version, missing):
    path = save_results(tmp_path / "results.json", results)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["version"] == 3
    document["version"] = version
    for run in document["results"]:
        for name in missing:
            del run[name]
    path.write_text(json.dumps(document))
    assert load_results(path) == results


def test_references_and_targets_survive(results, tmp_path):
    reference = Reference(-1.5, 2.0, "measured")
    run = replace(
        results[0],
        references={"reach": reference},
        target_return=3600.0,
        targets={"1800": results[0].tasks()},
    )
    assert load_results(save_results(tmp_path / "r.json", [run])) == [run]


def test_missing_file_and_unknown_field(results, tmp_path):
    with pytest.raises(CorruptFileError, match="Cannot read"):
        load_results(tmp_path / "none.json")
    path = save_results(tmp_path / "results.json", results)
    document = json.loads(path.read_text(encoding="utf-8"))
    document["results"][0]["colour"] = "red"
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptFileError, match="colour"):
        load_results(path)


def test_episodes_are_grouped_by_task():
    @dataclass
    class Episode:
        index: int
        seed: int
        task: str | None
        success: bool
        episode_return: float
        length: int

    done = [Episode(0, 5, "b", True, 1.0, 3), Episode(0, 5, "a", False, 0.0, 9)]
    groups = group_by_task([*done, {**vars(done[0]), "index": 1}])
    assert [(g.task, g.n, g.successes, g.score) for g in groups] == [("b", 2, 2, 1), ("a", 1, 0, 0)]


def test_incomplete_episodes_are_refused():
    with pytest.raises(InvalidInputError, match="lacks success"):
        TaskResult("t", [{"index": 0, "seed": 0, "episode_return": 0.0, "length": 1}])
    with pytest.raises(InvalidInputError, match="no evaluation episodes"):
        TaskResult("t", [])


def test_scores_without_success_are_returns():
    episode = {"index": 0, "seed": 0, "success": None, "episode_return": 4.0, "length": 1}
    task = TaskResult("t", [episode])
    assert not task.has_success
    assert task.score == 4


def test_grouping_by_label(results):
    assert list(agents_of(results)) == ["ED-Ma BC", "ED-Tr BC", "D-Ma BC", "random"]
    assert task_names(results) == ["reach", "pick"]
    with pytest.raises(InvalidInputError, match="no results"):
        agents_of([])
    clash = RunResult("other", "ED-Ma BC", "d", 0)
    with pytest.raises(InvalidInputError, match="used for"):
        agents_of([results[0], clash])
    with pytest.raises(InvalidInputError, match="has no evaluation 'best'; it has: last"):
        results[0].tasks("best")


def test_a_run_is_not_counted_twice(results):
    """Two datasets of one name would pass for two seeds of one, with a spread over them."""
    with pytest.raises(InvalidInputError, match="'ED-Ma BC' has two runs on 'demo' with seed 0"):
        agents_of([*results, results[0]])
    assert len(agents_of([*results, replace(results[0], seed=1)])["ED-Ma BC"]) == 2
    assert len(agents_of([*results, replace(results[0], dataset="other")])["ED-Ma BC"]) == 2
