import io
import zipfile

import gymnasium
import numpy as np
import pytest
import torch

import mail_agents
from mail_agents.errors import CorruptFileError, InvalidInputError, UnknownNameError
from mail_agents.features import Feature, FeatureSpec
from mail_agents.rollout import evaluate
from mail_baselines.sb3 import SB3Agent, from_model, from_zip

stable_baselines3 = pytest.importorskip("stable_baselines3")
ALGORITHMS = ("sac", "ppo", "td3")


@pytest.fixture(scope="module")
def env():
    return gymnasium.make("Pendulum-v1")  # actions in [-2, 2]: units have to be right


@pytest.fixture(scope="module")
def features(env):
    return FeatureSpec.from_spaces(env.observation_space, env.action_space)


def make_model(algorithm, env, **policy):
    kind = getattr(stable_baselines3, algorithm.upper())
    kwargs = {"net_arch": [16, 12], **policy}
    return kind("MlpPolicy", env, device="cpu", seed=1, policy_kwargs=kwargs)


def observations(env, n):
    env.observation_space.seed(0)
    return np.stack([env.observation_space.sample() for _ in range(n)])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_acts_like_the_model(algorithm, env, features, tmp_path):
    model = make_model(algorithm, env)
    seen = observations(env, 6)
    expected, _ = model.predict(seen, deterministic=True)
    model.save(tmp_path / "model.zip")
    agents = [
        from_model(model, features),
        from_zip(tmp_path / "model.zip", algorithm, features),
    ]
    agents.append(mail_agents.load(agents[0].save(tmp_path / "agent.safetensors"), device="cpu"))
    for agent in agents:
        agent.reset()
        np.testing.assert_allclose(agent.act(seen), expected, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["sac", "ppo"])
def test_draws_from_the_models_distribution(algorithm, env, features):
    model = make_model(algorithm, env)
    seen = np.repeat(observations(env, 1), 4000, axis=0)
    drawn, _ = model.predict(seen, deterministic=False)
    agent = from_model(model, features)
    agent.reset(seed=0)
    ours = agent.act(seen, deterministic=False)
    assert abs(ours.mean() - drawn.mean()) < 4 * drawn.std() / np.sqrt(2000)
    assert ours.std() == pytest.approx(drawn.std(), rel=0.06)


def test_an_unusual_activation_is_named(env, features):
    model = make_model("sac", env, activation_fn=torch.nn.Tanh)
    assert from_model(model, features).config.activation == "tanh"
    with pytest.raises(InvalidInputError, match="GELU"):
        from_model(make_model("sac", env, activation_fn=torch.nn.GELU), features)


def test_another_algorithm_is_refused(env, features, tmp_path):
    model = stable_baselines3.A2C("MlpPolicy", env, device="cpu")
    with pytest.raises(UnknownNameError, match="a2c"):
        from_model(model, features)
    model.save(tmp_path / "model.zip")
    with pytest.raises(UnknownNameError, match=r"'a2c'.*sac.*ppo.*td3"):
        from_zip(tmp_path / "model.zip", "a2c", features)


def test_a_model_that_saw_scaled_observations_is_refused(features):
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    def trained(**kwargs):
        return make_model("ppo", VecNormalize(DummyVecEnv([make_env]), **kwargs))

    def make_env():
        return gymnasium.make("Pendulum-v1")

    with pytest.raises(InvalidInputError, match=r"VecNormalize.*norm_obs=False"):
        from_model(trained(), features)
    assert from_model(trained(norm_obs=False), features).agent_id == "sb3/ppo"


@pytest.mark.parametrize(("algorithm", "units"), [("sac", "bounds"), ("ppo", "identity")])
def test_units_of_actions_come_with_the_algorithm(algorithm, units, features):
    agent_id = f"sb3/{algorithm}"
    agent = mail_agents.make(agent_id, features, device="cpu")
    assert agent.config.action_norm == units == mail_agents.spec(agent_id).config().action_norm
    for other in {"bounds", "identity", "mean_std"} - {units}:
        with pytest.raises(InvalidInputError, match=f"action_norm='{units}', got '{other}'"):
            mail_agents.make(agent_id, features, device="cpu", action_norm=other)


def test_episodes_are_the_same_beside_any_number_of_others(env, features):
    agent = from_model(make_model("sac", env), features)
    runs = [
        [
            episode.episode_return
            for episode in evaluate(
                agent, "Pendulum-v1", 9, n_envs=n, seed=4, deterministic=False, max_steps=12
            ).episodes
        ]
        for n in (1, 3, 8)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0])) == 9


def test_weights_of_another_task_are_refused(env, features, tmp_path):
    make_model("sac", env).save(tmp_path / "model.zip")
    wide = FeatureSpec({"state": Feature("state", (5,), "float32")}, features.action)
    with pytest.raises(InvalidInputError, match=r"hidden\.0\.weight"):
        from_zip(tmp_path / "model.zip", "sac", wide)
    with pytest.raises(InvalidInputError, match="PPO"):
        from_zip(tmp_path / "model.zip", "ppo", features)


def test_images_are_refused(features):
    image = Feature("image", (64, 64, 3), "uint8")
    with pytest.raises(InvalidInputError, match="camera"):
        mail_agents.make("sb3/sac", FeatureSpec({"camera": image}, features.action))


class _Opens:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("broken", ["missing", "not a zip", "no weights", "truncated", "pickle"])
def test_files_that_are_not_models_are_refused(broken, env, features, tmp_path):
    path, trap = tmp_path / "model.zip", tmp_path / "trap"
    if broken == "not a zip":
        path.write_bytes(b"no zip")
    elif broken == "no weights":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data", "{}")
    elif broken == "truncated":
        make_model("sac", env).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif broken == "pickle":
        buffer = io.BytesIO()
        torch.save({"actor": _Opens(trap)}, buffer)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("policy.pth", buffer.getvalue())
    with pytest.raises(CorruptFileError, match=r"model\.zip is not a model"):
        from_zip(path, "sac", features)
    assert not trap.exists()


def test_loading_gives_the_class(env, features, tmp_path):
    path = from_model(make_model("td3", env), features).save(tmp_path / "agent.safetensors")
    agent = SB3Agent.load(path, device="cpu")
    assert agent.agent_id == "sb3/td3"
    assert agent.config.hidden == (16, 12)
