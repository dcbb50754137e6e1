"""Evaluation in LIBERO: the published initial states, and the same episodes in any processes."""

import hashlib
from pathlib import Path

import pytest

import mail_agents
from mail_agents.data.example import example_dataset
from mail_agents.environments import env_maker
from mail_agents.features import FeatureSpec
from mail_agents.rollout import evaluate

ENV_ID = "mail_envs:libero_object/pick_up_the_milk_and_place_it_in_the_basket"
KWARGS = {"cameras": ["agentview"], "image_size": 48, "protocol": "mail"}
STEPS = 5


@pytest.fixture
def agent(gl, libero_assets, tmp_path):
    """One that was saved and loaded, as those that are evaluated."""
    env = env_maker(ENV_ID, KWARGS)()
    features = FeatureSpec.from_spaces(env.observation_space, env.action_space)
    env.close()
    small = {"decoder": {"layers": 1}, "width": 16, "feature_width": 16}
    agent = mail_agents.make(
        *("mail/d-ma-ddpm", features),
        **small,
        device="cpu",
        history=2,
        horizon=2,
        execute=2,
        diffusion_steps=2,
    )
    agent.fit_statistics(example_dataset(features, 20))
    path: Path = agent.save(tmp_path / "agent.safetensors")
    return mail_agents.load(path, device="cpu")


@pytest.mark.slow
def test_episodes_do_not_depend_on_processes(agent, monkeypatch):
    seen: list[str] = []
    act = agent.act

    def spy(observation, **options):
        actions = act(observation, **options)
        for row, action in enumerate(actions):
            digest = hashlib.sha256(action.tobytes())
            for key in sorted(observation):
                digest.update(observation[key][row].tobytes())
            seen.append(digest.hexdigest())
        return actions

    monkeypatch.setattr(agent, "act", spy)
    episodes, played = [], []
    for workers in (1, 4):
        found = evaluate(
            agent, ENV_ID, 5, seed=2, workers=workers, env_kwargs=KWARGS, max_steps=STEPS
        )
        episodes.append([(e.seed, e.init_state, e.success, e.length) for e in found.episodes])
        played.append(sorted(seen))
        seen.clear()
        assert found.protocol["init_states"] == 50
        assert "LIBERO" in found.protocol["simulator"]
    # Every observation and every action, to the last bit.
    assert played[0] == played[1]
    assert len(set(played[0])) == 5 * STEPS
    assert episodes[0] == episodes[1]
    assert [state for _, state, _, _ in episodes[0]] == list(range(5))
