"""The data benchmark runs, compares equal frames, and judges by its bar."""

import json

import pytest

pytest.importorskip("minari")


@pytest.fixture
def script(load_script):
    return load_script("benchmark_data")


def test_it_measures_and_judges(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", "unused")
    output = tmp_path / "out" / "result.json"
    small = {"episodes": 2, "steps": 12, "image_size": 16, "history": 3, "rounds": 1}
    status = script.main(script.Args(**small, seconds=0.05, bar=0.0, output=output))
    assert status == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["ratio"] > 0
    assert set(result["medians"]) == {
        "minari, hdf5",
        "store, one by one",
        "store, batches of 64",
    }
    assert "Random windows" in capsys.readouterr().out
    assert script.main(script.Args(**small, seconds=0.05, bar=1e12)) == 1
