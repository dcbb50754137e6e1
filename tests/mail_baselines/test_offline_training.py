"""Offline-RL agents learn what they should, and training them is reproducible."""

import json

import numpy as np
import pytest
import torch

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.data.episode import Episode
from mail_agents.data.windows import BatchSampler
from mail_agents.features import Feature, FeatureSpec

LINE = FeatureSpec(
    {"state": Feature("state", (1,), "float32")},
    Feature("state", (1,), "float32", low=(-1.0,), high=(1.0,)),
)


@pytest.fixture(scope="module")
def two_modes():
    """Ten episodes that return 10 with actions of +0.5, and ten that return 1 with -0.5."""
    rng = np.random.default_rng(0)
    episodes = []
    for number in range(20):
        action, total = ((0.5, 10.0), (-0.5, 1.0))[number % 2]
        last = np.arange(5) == 4
        episodes.append(
            Episode(
                observations={"state": rng.standard_normal((6, 1)).astype(np.float32)},
                actions=np.full((5, 1), action, np.float32),
                rewards=np.full(5, total / 5),
                terminations=np.zeros(5, bool),
                truncations=last,
            )
        )
    return MemoryDataset(episodes, features=LINE)


def trained(agent_id, data, **overrides):
    small = {"optim": {"lr": 3e-3, "warmup_steps": 0}}
    if not agent_id.startswith("bc"):
        small |= {"d_model": 16, "layers": 1, "history": 3, "max_timestep": 5}
    config = mail_agents.spec(agent_id).config(small).replace(overrides)
    agent = mail_agents.make(agent_id, data.features, config=config, device="cpu", seed=0)
    agent.fit_statistics(data)
    agent.configure_optim()
    torch.manual_seed(0)
    windows = data.windows(agent.window_spec, agent.training_episodes(data))
    sampler = BatchSampler(len(windows), 16, seed=0)
    for _ in range(300):
        agent.update(windows[next(sampler)])
    return agent


def mean_action(agent, target):
    rng = np.random.default_rng(1)
    agent.reset(target_return=None if target is None else [target] * 8)
    actions = []
    for _ in range(5):
        actions.append(agent.act(rng.standard_normal((8, 1)).astype(np.float32)))
        agent.step(np.full(8, (target or 0) / 5), np.zeros(8, bool), np.zeros(8, bool))
    return float(np.mean(actions))


@pytest.mark.parametrize(
    ("agent_id", "overrides"),
    [
        ("dt", {}),
        ("decision-mamba", {}),
        ("dm", {"self_evolution": {"steps_per_stage": 50, "stages": 6}}),
    ],
)
def test_a_sequence_agent_does_what_its_target_return_asks_for(two_modes, agent_id, overrides):
    agent = trained(agent_id, two_modes, **overrides)
    assert mean_action(agent, 10.0) > 0.3
    assert mean_action(agent, 1.0) < -0.3


def test_behaviour_cloning_averages_and_its_best_half_does_not(two_modes):
    assert abs(mean_action(trained("bc", two_modes), None)) < 0.2
    best = trained("bc", two_modes, top_fraction=0.5)
    assert mean_action(best, None) == pytest.approx(0.5, abs=0.05)


# ---- through the script ------------------------------------------------------------------------

SMALL = ("--config.d-model", 8, "--config.layers", 1, "--config.history", 3)
EVOLVING = (
    *("--config.self-evolution.enabled", "--config.self-evolution.steps-per-stage", 3),
    *("--config.self-evolution.stages", 4),
)
LOOP = (
    *("--config.optim.batch-size", 8, "--config.optim.warmup-steps", 2, "--device", "cpu"),
    *("--save-every", 4, "--log-every", 1),
)


@pytest.fixture
def run(scripts, tmp_path):
    def start(name, *arguments):
        code, output = scripts.run(tmp_path, name, *arguments)
        assert code == 0, output
        return output

    return start


@pytest.mark.parametrize(
    ("agent_id", "flags"),
    [
        ("dt", (*SMALL, *EVOLVING, "--config.max-timestep", 12)),
        ("dm", (*SMALL, *EVOLVING, "--config.max-timestep", 12)),
        ("bc-10", ("--config.width", 8, *EVOLVING, "--config.top-fraction", 0.5)),
    ],
)
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(
    run, tmp_path, point_dataset, agent_id, flags
):
    base = ("--agent", agent_id, *flags, *LOOP, "--dataset", point_dataset, "--eval-episodes", 0)
    run("train", *base, "--steps", 11, "--output", tmp_path / "whole")
    # Stopped in the middle of a stage, whose teacher is in the checkpoint only.
    run("train", *base, "--steps", 4, "--output", tmp_path / "part")
    run("train", "--resume", tmp_path / "part", "--steps", 11)
    files = [(tmp_path / name / "agent.safetensors").read_bytes() for name in ("whole", "part")]
    assert files[0] == files[1]
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "part")
    ]
    assert rows[0] == rows[1]
    assert [row["alpha"] for row in rows[0]][2:5] == pytest.approx([0, 0.425, 0.425])


def test_a_saved_agent_scores_as_it_did_after_training(run, tmp_path, point_dataset):
    flags = (*SMALL, "--config.max-timestep", 12, *LOOP)
    run(
        *("train", "--agent", "dt", *flags, "--dataset", point_dataset, "--steps", 6),
        *("--eval-episodes", 4, "--eval-envs", 3, "--output", tmp_path / "run"),
    )
    arguments = ("--agent", tmp_path / "run", "--episodes", 4, "--n-envs", 1, "--device", "cpu")
    run("evaluate", *arguments, "--output", tmp_path / "again")
    found = []
    for folder in (tmp_path / "run" / "eval" / "step-00000006", tmp_path / "again"):
        lines = (folder / "point" / "episodes.jsonl").read_text().splitlines()
        found.append([json.loads(line)["episode_return"] for line in lines])
    assert found[0] == found[1]
    assert len(set(found[0])) == 4
