"""MaIL with cameras and language: augmentation, FiLM, weights from a file, text models."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mail_agents
from mail_agents import check_agent
from mail_agents.agents.mail import MailPolicy
from mail_agents.agents.mail_config import MailConfig
from mail_agents.data.example import example_dataset
from mail_agents.encoders.resnet import ResNet18
from mail_agents.errors import InvalidInputError, MissingStatisticsError
from mail_agents.features import Feature, FeatureSpec

ACTION = Feature("state", (2,), "float32", low=(-1.0, -1.0), high=(1.0, 1.0))
CAMERA = Feature("image", (36, 36, 3), "uint8")
ONE = FeatureSpec({"view": CAMERA}, ACTION)
TWO = FeatureSpec({"view": CAMERA, "wrist": CAMERA}, ACTION)
SMALL = {
    "width": 16,
    "feature_width": 8,
    "history": 2,
    "horizon": 2,
    "diffusion_steps": 3,
    "encoder": {"layers": 1, "d_state": 4},
    "decoder": {"layers": 1, "d_state": 4},
}


def policy(features=ONE, **overrides):
    torch.manual_seed(0)
    out = MailPolicy(MailConfig().replace(SMALL | {"objective": "bc"} | overrides), features)
    out.set_action_bounds(-torch.ones(2), torch.ones(2))
    return out


def batch(rows=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (rows, 2, 36, 36, 3)
    return {
        "obs/view": torch.randint(0, 256, shape, generator=g, dtype=torch.uint8),
        "obs/wrist": torch.randint(0, 256, shape, generator=g, dtype=torch.uint8),
        "mask": torch.ones(rows, 2, dtype=torch.bool),
        "action": torch.rand(rows, 2, 2, generator=g),
        "action_mask": torch.ones(rows, 2, dtype=torch.bool),
        "task_emb": torch.randn(rows, 512, generator=g),
    }


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def loss(p, seed=0):
    return p.loss(batch(), generator(seed))[0]


AUGMENTED = {"image": {"crop": 33, "jitter": 0.2}}


def test_augmentation_is_drawn_from_the_generator_in_training_only():
    p = policy(**AUGMENTED).train()
    before = torch.get_rng_state()
    assert torch.equal(loss(p, 1), loss(p, 1))
    assert not torch.equal(loss(p, 1), loss(p, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(loss(p.eval(), 1), loss(p, 2))
    p.train()
    p.loss(batch(), generator(1))
    with pytest.raises(InvalidInputError, match="never from the global stream"):
        p.loss(batch())


def test_without_augmentation_nothing_is_drawn_for_images():
    p, g = policy().train(), generator(5)
    p.loss(batch(), g)
    assert torch.equal(g.get_state(), generator(5).get_state())


def test_acting_is_never_augmented():
    p, rows = policy(**AUGMENTED).train(), [generator(1), generator(2)]
    with torch.inference_mode():
        assert torch.equal(p.sample(batch(), rows, True), p.eval().sample(batch(), rows, True))


def test_film_replaces_the_token_and_starts_without_effect():
    film = policy(language="hash", language_as="film").eval()
    token = policy(language="hash").eval()
    assert film.language is None
    assert film.encode(batch()).shape == (2, 2, 8)
    assert token.encode(batch()).shape == (2, 3, 8)
    other = batch() | {"task_emb": batch()["task_emb"].flip(0)}
    assert torch.equal(film.encode(batch()), film.encode(other))
    with torch.no_grad():
        for trunk in film.observation_encoder.trunks():
            for block in trunk.blocks:
                block.film.project.weight.normal_(std=0.1)
    assert not torch.allclose(film.encode(batch()), film.encode(other))


def test_film_needs_images_and_language():
    states = FeatureSpec({"s": Feature("state", (3,), "float32")}, ACTION)
    with pytest.raises(InvalidInputError, match="no images among the observations"):
        policy(states, language="hash", language_as="film")
    with pytest.raises(InvalidInputError, match="name what embeds the instructions"):
        MailConfig(language_as="film")
    with pytest.raises(InvalidInputError, match="name what embeds the instructions"):
        MailConfig(language="")
    with pytest.raises(InvalidInputError, match="language_dim"):
        MailConfig(language_dim=0)


def test_defaults_are_one_network_per_camera_without_condition():
    with torch.device("meta"):
        plain = MailPolicy(MailConfig(), TWO)
        film = MailPolicy(MailConfig(language="hash", language_as="film"), TWO)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    channels = 2 * (64 + 128 + 256 + 512)
    assert count(film) - count(plain) == 2 * 2 * channels * (512 + 1)
    assert not any(".film." in name for name in plain.state_dict())


@pytest.mark.slow
def test_an_agent_with_everything_keeps_the_rules():
    overrides = SMALL | {
        "history": 1,
        "image": {"crop": 33, "jitter": 0.1},
        "language": "hash",
        "language_as": "film",
        "language_dim": 16,
    }
    report = check_agent("mail/ed-ma-bc", ONE, overrides=overrides)
    assert report.ok, f"\n{report}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of torchvision's kind, made by renaming our own network."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        ours = ResNet18("batch_frozen").state_dict()
    names = {"stem.0": "conv1", "stem.1": "bn1"}
    for block in range(8):
        at = f"layer{block // 2 + 1}.{block % 2}"
        parts = {"norm1": "bn1", "norm2": "bn2", "skip.0": "downsample.0", "skip.1": "downsample.1"}
        for part in ("conv1", "conv2", *parts):
            names[f"blocks.{block}.{part}"] = f"{at}.{parts.get(part, part)}"
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(
        {f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": t for n, t in ours.items()}, path
    )
    return path, ours


def agent_with(path, **overrides):
    config = SMALL | {"image": {"weights": str(path), "norm": "batch_frozen"}} | overrides
    return mail_agents.make("mail/ed-ma-ddpm", TWO, device="cpu", **config)


def same_trunks(agent, expected):
    return [
        all(torch.equal(t, expected[n]) for n, t in trunk.state_dict().items())
        for p in agent.policies()
        for trunk in p.observation_encoder.trunks()
    ]


def test_weights_are_read_when_statistics_are_fitted_and_artifacts_do_without(weights, tmp_path):
    source, expected = weights
    path = shutil.copy(source, tmp_path / "user.safetensors")
    agent, dataset = agent_with(path), example_dataset(TWO, 12)
    assert agent.missing_statistics() == ["action", "image.weights"]
    assert not any(same_trunks(agent, expected))
    agent.fit_statistics(dataset)
    assert same_trunks(agent, expected) == [True] * 4  # two cameras, and the average of both
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert agent.provenance["image_weights"] == {"file": "user.safetensors", "sha256": digest}

    agent.configure_optim()
    agent.update(dataset.windows(agent.window_spec)[np.arange(2)])
    trained = {n: t.clone() for n, t in agent.policy.state_dict().items()}
    saved = agent.save(tmp_path / "agent.safetensors")
    (tmp_path / "user.safetensors").unlink()
    loaded = mail_agents.load(saved, device="cpu")
    assert loaded.config == agent.config
    assert loaded.provenance["image_weights"]["sha256"] == digest
    loaded.fit_statistics(dataset)  # other data: what was learnt stays
    weights_now = loaded.policy.state_dict()
    assert all(torch.equal(weights_now[n], t) for n, t in trained.items() if "encoder" in n)
    conv = "observation_encoder.encoders.0.trunk.stem.0.weight"
    assert not torch.equal(trained[conv], expected["stem.0.weight"])


def test_a_file_that_is_not_there_is_named_before_training(tmp_path):
    agent = agent_with(tmp_path / "absent.pt")
    with pytest.raises(InvalidInputError, match=r"absent\.pt' does not exist"):
        agent.fit_statistics(example_dataset(TWO, 12))
    with pytest.raises(MissingStatisticsError, match=r"image\.weights"):
        agent.act({"view": np.zeros(CAMERA.shape, np.uint8)})


def test_a_text_model_is_needed_once(make_text_model, tmp_path):
    folder = make_text_model("clip")
    features = FeatureSpec({"s": Feature("state", (3,), "float32")}, ACTION)
    config = SMALL | {"language": str(folder), "language_dim": 12}
    agent = mail_agents.make("mail/d-ma-bc", features, device="cpu", **config)
    assert "task_embeddings" in agent.missing_statistics()
    dataset = example_dataset(features, 12)
    agent.fit_statistics(dataset)
    assert agent.task_embeddings.shape == (len(agent.tasks), 12)
    assert agent.provenance["language"] == {
        "model": str(folder),
        "instructions": {task: task for task in agent.tasks},
    }
    saved = agent.save(tmp_path / "agent.safetensors")
    shutil.rmtree(folder)

    loaded = mail_agents.load(saved, device="cpu")
    observation = {"s": np.ones(3, np.float32)}
    actions = []
    for each in (agent, loaded):
        each.reset(task=agent.tasks[0], seed=0)
        actions.append(each.act(observation))
    np.testing.assert_array_equal(*actions)
    before, stats = loaded.task_embeddings, dataset.stats()
    loaded.set_statistics(stats, tasks=loaded.tasks[::-1])  # known tasks need no model
    np.testing.assert_array_equal(loaded.task_embeddings, before[::-1])
    with pytest.raises(InvalidInputError, match="Cannot load the text model"):
        loaded.set_statistics(stats, tasks=("open the door",))
    assert loaded.tasks == agent.tasks[::-1]


def test_the_length_of_a_text_models_embeddings_is_told(make_text_model):
    features = FeatureSpec({"s": Feature("state", (3,), "float32")}, ACTION)
    config = SMALL | {"language": str(make_text_model("clip"))}
    agent = mail_agents.make("mail/d-ma-bc", features, device="cpu", **config)
    with pytest.raises(InvalidInputError, match="language_dim=12"):
        agent.fit_statistics(example_dataset(features, 12))
