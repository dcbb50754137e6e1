"""scripts/collect_maze.py: data, references and the world to evaluate in, from one command."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gymnasium
import numpy as np
import pytest

from mail_agents.data.references import from_dataset
from mail_agents.data.store import open_dataset, verify_dataset
from mail_agents.errors import InvalidInputError
from mail_agents.features import FeatureSpec
from mail_agents.report.scores import normalised_score

pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics is not installed ('sim')")


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("collect_maze")


def test_collects_measures_and_refuses_to_overwrite(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "maze2d-umaze"
    args = script.Args(str(path), transitions=700, reference_episodes=3)
    sha256 = script.main(args).info.sha256
    printed = capsys.readouterr().out
    assert "700 steps" in printed
    assert "reference returns" in printed
    assert str(path) in printed

    dataset = open_dataset(path)
    verify_dataset(path)
    assert dataset.info.n_steps == 700
    assert dataset.info.tasks == ("maze2d-umaze",)
    assert dataset.info.source["kind"] == "maze-planner"
    spec = dataset.info.env_specs["maze2d-umaze"]
    assert (spec["id"], spec["max_episode_steps"]) == ("mail_envs:d4rl/maze2d-umaze", 300)
    world = gymnasium.make(spec["id"], max_episode_steps=300, **spec["kwargs"])
    dataset.features.check(FeatureSpec.from_spaces(world.observation_space, world.action_space))
    assert dataset.features.action.low == (-1.0, -1.0)

    (reference,) = from_dataset(dataset.info.reference_scores).values()
    assert reference.source == "measured: random actions and planner, 3 episodes, seed 0"
    scores = normalised_score([reference.minimum, reference.maximum], reference)
    np.testing.assert_allclose(scores, [0.0, 100.0], atol=1e-9)

    with pytest.raises(InvalidInputError, match="exists already"):
        script.main(args)
    again = script.main(script.Args(str(tmp_path / "b"), transitions=700, reference_episodes=1))
    assert again.info.sha256 == sha256


def test_other_mazes_and_dense_rewards(script: ModuleType, tmp_path: Path) -> None:
    args = script.Args(
        str(tmp_path / "m"), maze="medium", transitions=60, dense=True, reference_episodes=1
    )
    dataset = script.main(args)
    assert dataset.info.tasks == ("maze2d-medium-dense",)
    assert dataset.info.env_specs["maze2d-medium-dense"]["max_episode_steps"] == 600
    rewards = dataset.column("reward")
    assert ((rewards > 0) & (rewards < 1)).all()


def test_nothing_is_written_for_impossible_numbers(script: ModuleType, tmp_path: Path) -> None:
    for wrong in ({"transitions": 0}, {"reference_episodes": 0}):
        with pytest.raises(InvalidInputError, match="at least 1"):
            script.main(script.Args(str(tmp_path / "x"), **{"reference_episodes": 1, **wrong}))
    assert list(tmp_path.iterdir()) == []


def test_a_planner_that_is_no_better_than_chance_is_refused_before_collecting(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"min": 3.0, "max": 3.0}
    monkeypatch.setattr(script, "reference_returns", lambda *args, **kwargs: measured)
    with pytest.raises(InvalidInputError, match="Raise --reference-episodes"):
        script.main(script.Args(str(tmp_path / "x")))
    assert list(tmp_path.iterdir()) == []
