"""scripts/measure_experts.py: honest numbers, and a reason where there is no expert."""

import json
from pathlib import Path

import pytest

pytest.importorskip("metaworld", reason="metaworld is not installed (extra 'sim')")


def test_measures_and_writes(scripts, tmp_path: Path) -> None:
    pytest.importorskip("robosuite", reason="robosuite is not installed (extra 'robosuite')")
    settings = ["--tasks", "reach-v3", "robosuite/Door", "--attempts", "3", "--output", "experts"]
    status, printed = scripts.run(tmp_path, "measure_experts", *settings)
    assert status == 0, printed
    assert "metaworld/reach-v3  3 of 3  100% (44% to 100%)" in printed
    report = json.loads((tmp_path / "experts.json").read_text())
    reach, door = report["tasks"]
    assert (reach["solved"], reach["attempts"]) == (3, 3)
    assert reach["steps"] > 10
    assert door["attempts"] == 0
    assert "no scripted expert for robosuite/Door" in door["reason"]
    assert report["settings"]["attempts"] == 3
    table = (tmp_path / "experts.md").read_text()
    assert "| robosuite/Door | - | no expert | - |" in table

    status, printed = scripts.run(tmp_path, "measure_experts", *settings)
    assert status == 1
    assert "experts.md exists" in printed


def test_failures_count(scripts, tmp_path: Path) -> None:
    # So much noise that the hand never arrives.
    settings = ["--tasks", "pick-place-v3", "--attempts", "2", "--noise-std", "50"]
    status, printed = scripts.run(tmp_path, "measure_experts", *settings)
    assert status == 0, printed
    assert "0 of 2  0% (0% to 66%)  -" in printed


def test_mistakes_are_explained(scripts, tmp_path: Path) -> None:
    for arguments, message in (
        (["--tasks", "reach-v2"], "Did you mean 'reach-v3'"),
        (["--tasks", "reach-v3", "--attempts", "0"], "at least 1 attempt"),
        (["--tasks", "reach-v3", "--env-kwargs", "cameras", "[]"], "without images"),
        (["--tasks", "reach-v3", "--env-kwargs", "goal_state", "true"], "'goal_state'"),
    ):
        status, printed = scripts.run(tmp_path, "measure_experts", *arguments)
        assert status == 1
        assert message in printed
