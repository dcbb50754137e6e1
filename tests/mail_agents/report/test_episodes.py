import csv
import json

from mail_agents.report import Reference, RunResult
from mail_agents.report.episodes import COLUMNS, write_episodes


def put(folder, returns, **fields):
    folder.mkdir(parents=True)
    rows = [
        {"index": i, "seed": 100 + i, "task": "hop", "success": None, "episode_return": x,
         "length": 3, **fields}
        for i, x in enumerate(returns)
    ]  # fmt: skip
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_episode_is_a_line(tmp_path):
    run, other = tmp_path / "run", tmp_path / "given"
    put(run / "eval" / "step-00000020" / "hop", [1.0, 2.0], target_return=9.0)
    put(run / "eval" / "step-00000100" / "hop", [3.0], target_return=9.0)
    put(run / "eval" / "step-00000100" / "hop" / "target-4", [4.0], target_return=4.0)
    put(other / "hop", [5.0], success=True)
    scored = RunResult("dt", "DT", "hop-medium", 1, references={"hop": Reference(0.0, 10.0)})
    given = RunResult("sb3/sac", "SAC", "hop-medium", 0)
    path = write_episodes(tmp_path / "out" / "e.csv", [(scored, run), (given, other)])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    key = [(r["label"], r["seed"], r["step"], r["target"], r["episode"], r["return"]) for r in rows]
    assert key == [
        ("DT", "1", "20", "9.0", "0", "1.0"),
        ("DT", "1", "20", "9.0", "1", "2.0"),
        ("DT", "1", "100", "9.0", "0", "3.0"),
        ("DT", "1", "100", "4.0", "0", "4.0"),
        ("SAC", "0", "", "", "0", "5.0"),
    ]
    assert [r["score"] for r in rows] == ["10.0", "20.0", "30.0", "40.0", ""]
    assert [r["success"] for r in rows] == ["", "", "", "", "1"]
    assert rows[1]["env_seed"] == "101"
