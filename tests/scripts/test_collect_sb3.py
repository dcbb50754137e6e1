"""scripts/collect_sb3.py: D4RL's five datasets from one training run."""

import json

import numpy as np
import pytest

import mail_agents
from mail_agents.data.store import open_dataset

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed (extra 'sb3')")

SETTINGS = (
    *("--env", "toybox:toybox/Point-v0", "--hidden", "16", "--train-steps", "400"),
    *("--eval-every", "100", "--eval-episodes", "8", "--reference-episodes", "12"),
    *("--transitions", "200", "--medium", "0.1"),
)


@pytest.fixture(scope="module")
def collection(scripts, tmp_path_factory):
    root = tmp_path_factory.mktemp("sb3")
    code, output = scripts.run(root, "collect_sb3", *SETTINGS, "--output", "sets")
    assert code == 0, output
    return root, output


def opened(root, kind):
    return open_dataset(root / "sets" / f"point-{kind}", verify=True)


def test_writes_the_five_datasets(collection):
    root, output = collection
    random, medium, expert = (opened(root, kind) for kind in ("random", "medium", "expert"))
    for dataset in (random, medium, expert):
        assert dataset.info.n_steps >= 200
        assert dataset.info.n_steps - dataset.lengths[-1] < 200
        assert dataset.features.action.low is not None
        assert dataset.info.name in output
    assert random.episode_returns.mean() < expert.episode_returns.mean()

    mixed = opened(root, "medium-expert")
    assert mixed.info.n_steps == medium.info.n_steps + expert.info.n_steps
    np.testing.assert_array_equal(mixed.episode(0).actions, medium.episode(0).actions)
    np.testing.assert_array_equal(
        mixed.episode(-1 % len(mixed)).actions, expert.episode(len(expert) - 1).actions
    )


def test_medium_replay_is_the_training_before_medium(collection):
    root, _ = collection
    replay = opened(root, "medium-replay")
    step = replay.info.source["actor"]["step"]
    assert 0 < step - replay.info.n_steps < 2 * replay.lengths.max()
    training = open_dataset(root / "sets" / "point-training" / "episodes")
    assert training.info.n_steps == 400
    for index in (0, len(replay) - 1):
        np.testing.assert_array_equal(
            replay.episode(index).actions, training.episode(index).actions
        )


def test_actors_are_chosen_by_their_returns(collection):
    root, _ = collection
    actors = json.loads((root / "sets/point-training/training.json").read_text())["actors"]
    assert [actor["step"] for actor in actors] == [0, 100, 200, 300, 400]
    best = max(actors, key=lambda actor: actor["return_mean"])
    assert opened(root, "expert").info.source["actor"] == best
    medium = opened(root, "medium").info.source["actor"]
    span = best["return_mean"] - actors[0]["return_mean"]
    assert medium["return_mean"] >= actors[0]["return_mean"] + 0.1 * span
    earlier = [actor for actor in actors if actor["step"] < medium["step"]]
    assert all(a["return_mean"] < actors[0]["return_mean"] + 0.1 * span for a in earlier)


def test_reference_scores_are_measured_and_shared(collection):
    root, _ = collection
    found = [opened(root, kind).info.reference_scores for kind in ("random", "medium", "expert")]
    assert found[0] == found[1] == found[2]
    (reference,) = found[0].values()
    assert reference["min"] < reference["max"]
    # Measured on episodes of their own, so near the dataset's mean and not equal to it.
    returns = opened(root, "expert").episode_returns
    assert abs(reference["max"] - returns.mean()) < 5 * returns.std() / np.sqrt(12)


def test_an_actor_is_an_artifact(collection):
    root, _ = collection
    file = opened(root, "expert").info.source["actor"]["file"]
    folder = root / "sets" / "point-training"
    assert (folder / "expert.safetensors").read_bytes() == (folder / "actors" / file).read_bytes()
    agent = mail_agents.load(folder / "expert.safetensors", device="cpu")
    assert agent.agent_id == "sb3/sac"
    assert np.abs(agent.act(np.zeros(4, np.float32))).max() <= 1


def test_a_second_run_keeps_everything_and_other_settings_are_refused(collection, scripts):
    root, _ = collection
    before = opened(root, "expert").info.sha256
    code, output = scripts.run(root, "collect_sb3", *SETTINGS, "--output", "sets")
    assert code == 0, output
    assert output.count("kept") == 6
    assert opened(root, "expert").info.sha256 == before
    for flag, words in (
        ("--train-steps", "other settings"),
        ("--transitions", "other settings"),
        ("--reference-episodes", "measured otherwise"),
    ):
        code, output = scripts.run(root, "collect_sb3", *SETTINGS, "--output", "sets", flag, "900")
        assert code == 1
        assert words in output


def test_the_same_seed_records_the_same_data(collection, scripts, tmp_path):
    root, _ = collection
    code, output = scripts.run(tmp_path, "collect_sb3", *SETTINGS, "--output", "sets")
    assert code == 0, output
    for kind in ("random", "medium-replay", "expert"):
        assert opened(tmp_path, kind).info.sha256 == opened(root, kind).info.sha256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--env", "CartPole-v1"), "bounded continuous actions"),
        (("--transitions", "0"), "every count starts at 1"),
        (("--medium", "1.5"), "--medium lies between 0 and 1"),
        (("--hidden", "0"), "every count starts at 1"),
        (("--env", "Hoper-v5"), "Did you mean: `Hopper`"),
    ],
)
def test_bad_settings_are_refused_before_training(arguments, message, scripts, tmp_path):
    code, output = scripts.run(tmp_path, "collect_sb3", *arguments, "--output", "sets")
    assert code == 1
    assert message in output
    assert not (tmp_path / "sets").exists()
