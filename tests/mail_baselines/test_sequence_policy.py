"""Tokens, heads, losses and sizes of the sequence policies."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.errors import InvalidInputError
from mail_agents.features import Feature, FeatureSpec
from mail_baselines.bc import BCPolicy
from mail_baselines.sequence_policy import ResidualEmbedding, SequencePolicy

SEQUENCE = [i for i in mail_agents.list_agents(tags=["sequence"]) if i != "dm-paper"]
CAUSAL = [i for i in SEQUENCE if i != "dm-released"]


def features(states, actions):
    return FeatureSpec(
        {"state": Feature("state", (states,), "float32")},
        Feature("state", (actions,), "float32", low=(-1.0,) * actions, high=(1.0,) * actions),
    )


def size(agent_id, states, actions, **overrides):
    config = mail_agents.spec(agent_id).config(overrides)
    kind = BCPolicy if agent_id.startswith("bc") else SequencePolicy
    with torch.device("meta"):
        policy = kind(config, features(states, actions))
    return sum(parameter.numel() for parameter in policy.parameters())


# ---- sizes: counted by running the released modules --------------------------------------------

#: State and action sizes; parameters of kzl's transformer with all heads and its unused word
#: table, of the same without these, of CORL's, of kzl's MLP and of CORL's MLP.
D4RL_SIZES = {
    "hopper": (11, 3, 727_695, 726_019, 728_579, 61_699, 69_635),
    "halfcheetah": (17, 6, 730_008, 727_558, 730_118, 77_446, 71_942),
    "ant": (111, 8, 754_680, 740_104, 742_664, 318_344, 96_520),
    "antmaze": (29, 8, 733_606, 729_608, 732_168, 108_424, 75_528),
    "kitchen": (60, 9, 741_830, 733_833, 736_393, 187_913, 83_721),
    "pen": (45, 24, 741_830, 735_768, 738_328, 151_448, 83_736),
    "door": (39, 28, 741_316, 736_028, 738_588, 136_604, 83_228),
    "hammer": (46, 26, 742_601, 736_410, 738_970, 154_266, 84_506),
    "relocate": (39, 30, 741_830, 736_542, 739_102, 136_862, 83_742),
}


@pytest.mark.parametrize("name", D4RL_SIZES)
def test_sizes_on_d4rl(name):
    states, actions, whole, plain, corl, kzl_mlp, corl_mlp = D4RL_SIZES[name]
    heads = {"state_weight": 0.1, "return_weight": 0.1}
    assert size("dt", states, actions) == plain
    assert size("dt-released", states, actions) == plain
    assert size("dt", states, actions, **heads) + 128 == whole
    assert size("dt-corl", states, actions) == corl
    assert size("bc-kzl", states, actions) == kzl_mlp
    assert size("bc", states, actions) == corl_mlp


@pytest.mark.parametrize(
    ("states", "actions", "width", "norm", "expected"),
    [
        (11, 3, 128, "layer", 877_315),
        (17, 6, 128, "layer", 878_854),
        (11, 3, 128, "rms", 876_931),
        (17, 6, 128, "rms", 878_470),
        (11, 3, 256, "layer", 3_155_459),
        (17, 6, 256, "layer", 3_158_534),
        (11, 3, 256, "rms", 3_154_691),
        (17, 6, 256, "rms", 3_157_766),
    ],
)
def test_sizes_of_decision_mamba(states, actions, width, norm, expected):
    for agent_id in ("decision-mamba", "decision-mamba-released"):
        assert size(agent_id, states, actions, d_model=width, norm=norm) == expected


@pytest.mark.parametrize(
    ("width", "layers", "embedding", "hopper", "cheetah"),
    [
        (128, 3, "linear", 980_495, 982_808),
        (128, 3, "mlp", 1_046_543, 1_048_856),
        (256, 3, "linear", 3_484_687, 3_489_304),
        (256, 3, "mlp", 3_747_855, 3_752_472),
        (256, 6, "linear", 6_704_143, 6_708_760),
        (256, 6, "mlp", 6_967_311, 6_971_928),
        (768, 24, "linear", 224_338_959, 224_352_792),
        (768, 24, "mlp", 226_701_327, 226_715_160),
    ],
)
def test_sizes_of_the_multi_grained_decision_mamba(width, layers, embedding, hopper, cheetah):
    sizes = {"d_model": width, "layers": layers, "embedding": embedding}
    assert size("dm", 11, 3, **sizes) == hopper
    assert size("dm-released", 17, 6, **sizes) == cheetah
    if (width, layers, embedding) == (768, 24, "mlp"):
        assert size("dm-paper", 17, 6) == cheetah


def test_sizes_of_the_releases_with_tables_that_nothing_reads():
    """Hugging Face's transformer has tables of words and positions, the Mamba one of words."""
    words, positions = 1 * 128, 1024 * 128
    whole = size("dt", 11, 3, state_weight=0.1, return_weight=0.1)
    assert whole + words + positions == 858_767
    released = {"d_model": 768, "layers": 24}
    vocabulary = 50_280 * 768  # its head shares the table
    hopper = size("dm-released", 11, 3, embedding="linear", squash=True, **released)
    assert hopper + vocabulary == 262_953_999
    assert size("dm-released", 17, 6, **released) + vocabulary == 265_330_200


# ---- tokens ------------------------------------------------------------------------------------


def prepared(agent, rows):
    return agent.prepare(agent.view[np.asarray(rows)])


@pytest.fixture
def make(build, dataset):
    def function(agent_id, **overrides):
        agent = build(agent_id, **overrides)
        agent.view = dataset.windows(agent.window_spec)
        agent.policy.eval()
        return agent

    return function


class Transparent(nn.Module):
    def forward(self, x, mask=None):
        return x


@pytest.mark.parametrize("when", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("tokens", [True, False])
def test_tokens_are_return_state_action_of_each_step(make, when, tokens):
    agent = make("dt", time_embedding=when, action_tokens=tokens, return_scale=5.0)
    batch, policy = prepared(agent, [2, 5]), agent.policy
    policy.trunk = Transparent()
    hidden, n = policy.encode(batch), 3 if tokens else 2
    assert hidden.shape == (2, 4, n, 16)
    flat = policy.tokens(batch)
    time = policy.embed_timestep(batch["timestep"])
    parts = [
        policy.embed_return(batch["rtg"].unsqueeze(-1) / 5.0),
        policy.embed_state(batch["obs/state"]),
    ]
    parts += [policy.embed_action(batch["action"])] if tokens else []
    for j, part in enumerate(parts):
        norm = policy.embed_norm
        expected = norm(part + time) if when == "pre_norm" else norm(part) + time
        for t in range(4):
            torch.testing.assert_close(flat[:, n * t + j], expected[:, t])
            torch.testing.assert_close(hidden[:, t, j], expected[:, t])
    # The action of step t is read at token n t + 1, that of its state.
    read = torch.stack([policy.action_head(flat[:, n * t + 1]) for t in range(4)], 1)
    torch.testing.assert_close(policy.predict(batch), read)


def test_mlp_embeddings_keep_a_linear_path():
    layer = ResidualEmbedding(2, 4)
    x = torch.randn(3, 2)
    inner = layer.inner(x)
    torch.testing.assert_close(layer(x), layer.outer(F.gelu(inner)) + inner)


def test_heads():
    config = mail_agents.spec("dt").config({"d_model": 8})
    plain = SequencePolicy(config, features(3, 2))
    assert [type(m) for m in plain.action_head] == [nn.Linear, nn.Tanh]
    assert (plain.state_head, plain.return_head) == (None, None)
    free = config.replace({"embedding": "mlp", "squash": False, "state_weight": 0.1})
    policy = SequencePolicy(free, features(3, 2))
    assert [type(m) for m in policy.action_head] == [nn.Linear, nn.GELU, nn.Linear]
    assert policy.state_head is not None
    assert policy.return_head is None


def test_initial_weights_of_corl_and_of_torch():
    wide = SequencePolicy(mail_agents.spec("dt-corl").config(), features(11, 3))
    assert float(wide.embed_timestep.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(wide.embed_state.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not wide.embed_state.bias.any()
    kept = SequencePolicy(mail_agents.spec("dt").config(), features(11, 3))
    assert float(kept.embed_timestep.weight.detach().std()) == pytest.approx(1.0, rel=0.05)
    assert kept.embed_state.bias.any()
    for policy in (wide, kept):
        assert float(policy.trunk.layers[0].mlp[0].weight.detach().std()) == pytest.approx(
            0.02, rel=0.05
        )


# ---- causality ---------------------------------------------------------------------------------


def self_influence(agent, batch, tolerance=1e-6):
    """Steps whose own action changes the prediction of it, and those that later steps change."""
    policy = agent.policy
    with torch.no_grad():
        before = policy.predict(batch)
        own, later = [], []
        for t in range(batch["action"].shape[1]):
            changed = {**batch, "action": batch["action"].clone()}
            changed["action"][:, t] += 1.0
            moved = (policy.predict(changed) - before).abs().amax(dim=(0, 2))
            own += [t] if moved[t] > tolerance else []
            for key in ("obs/state", "rtg"):
                ahead = {**batch, key: batch[key].clone()}
                ahead[key][:, t] += 1.0
                moved = (policy.predict(ahead) - before).abs().amax(dim=(0, 2))
                later += [t] if t and moved[:t].max() > tolerance else []
        return own, later


@pytest.mark.parametrize("agent_id", CAUSAL)
def test_no_action_is_predicted_from_itself_or_from_later_steps(make, agent_id):
    agent = make(agent_id)
    own, later = self_influence(agent, prepared(agent, [0, 1, 2]))
    assert own == []
    assert later == []


@pytest.mark.parametrize(("layers", "leaks"), [(1, {*range(7), 10, 11, 12}), (2, {*range(19)})])
def test_the_released_multi_grained_trunk_copies_its_labels(build, trajectory, layers, leaks):
    data = MemoryDataset([trajectory(20, np.random.default_rng(0))], features=features(3, 2))
    agent = build("dm-released", data, history=20, layers=layers)
    agent.policy.double().eval()  # influence fades with distance, below the resolution of float32
    batch = agent.prepare(data.windows(agent.window_spec)[[0]])
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    assert set(self_influence(agent, batch, 1e-14)[0]) == leaks


# ---- padding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_id", ["dt", "dt-corl", "decision-mamba", "dm", "dm-figure"])
def test_padding_behind_changes_nothing(make, dataset, agent_id):
    agent = make(agent_id)
    rows = np.flatnonzero(~agent.view[np.arange(len(agent.view))]["mask"].all(axis=1))
    rows = np.concatenate([rows, [0, 1]])
    batch = agent.prepare(agent.view[rows])
    assert not batch["mask"].all()
    together = agent.policy.predict(batch)
    errors, counts = [], []
    for i in range(len(rows)):
        length = int(batch["mask"][i].sum())
        alone = {k: v[i : i + 1, :length] for k, v in batch.items() if v.ndim > 1}
        torch.testing.assert_close(
            together[i : i + 1, :length], agent.policy.predict(alone), atol=1e-5, rtol=0
        )
        loss, metrics = agent.policy.loss(alone)
        errors.append(float(metrics["action_loss"]) * length)
        counts.append(length)
    loss, metrics = agent.policy.loss(batch)
    mean = sum(errors) / sum(counts)
    assert float(metrics["action_loss"]) == pytest.approx(mean, rel=1e-4)
    if agent_id == "dt-corl":
        assert loss.item() == pytest.approx(sum(errors) / 4 / len(rows), rel=1e-4)

    inputs = {k: v.clone() for k, v in batch.items()}
    for key in ("obs/state", "rtg", "action"):
        inputs[key].requires_grad_(True)
    loss, _ = agent.policy.loss(inputs)
    loss.backward()
    for key in ("obs/state", "rtg", "action"):
        gradient = inputs[key].grad
        assert not gradient[~batch["mask"]].any()
        assert gradient[batch["mask"]].abs().sum() > 0


def test_released_padding_in_training_and_in_acting(make, dataset):
    agent = make("dt-released")
    whole = agent.view[np.arange(len(agent.view))]
    row = int(np.flatnonzero(whole["mask"].sum(axis=1) == 1)[0])
    batch = agent.prepare({k: v[row : row + 1] for k, v in whole.items()})
    stats = dataset.stats()["state"]
    zero = torch.from_numpy((0 - stats.mean) / stats.std).float()
    assert batch["mask"][0].tolist() == [False, False, False, True]
    torch.testing.assert_close(batch["obs/state"][0, :3], zero.expand(3, 3))
    assert (batch["action"][0, :3] == -10).all()
    assert not batch["rtg"][0, :3].any()
    assert not batch["timestep"][0, :3].any()

    shown = {}
    agent.policy.predict = lambda b: shown.update(b) or torch.zeros(1, 4, 2)
    agent.reset(target_return=7.0)
    agent.act(np.ones((1, 3), np.float32))
    assert shown["mask"][0].tolist() == [False, False, False, True]
    assert not shown["obs/state"][0, :3].any()
    assert not shown["action"].any()
    assert shown["rtg"][0].tolist() == [0, 0, 0, 7]


def test_attention_hides_released_padding_and_mamba_reads_it(make):
    for agent_id, hidden in (("dt-released", True), ("decision-mamba-released", False)):
        agent = make(agent_id)
        batch = agent.prepare(agent.view[np.arange(len(agent.view))])
        other = {**batch, "obs/state": batch["obs/state"].clone()}
        other["obs/state"][~batch["mask"]] += 1.0
        last = agent.policy.sample(batch, [], True) - agent.policy.sample(other, [], True)
        assert (float(last.detach().abs().max()) < 1e-6) == hidden


# ---- losses ------------------------------------------------------------------------------------


def test_auxiliary_losses_predict_the_next_step_at_action_tokens(make):
    agent = make("dm", self_evolution={"enabled": False}, return_scale=4.0)
    rows = np.arange(len(agent.view))
    batch, policy = agent.prepare(agent.view[rows]), agent.policy
    assert not batch["mask"].all()
    loss, metrics = policy.loss(batch)
    hidden = policy.encode(batch)
    both = batch["mask"][:, 1:] & batch["mask"][:, :-1]
    valid = batch["mask"]
    action = (policy.predict(batch) - batch["action"]).square()[valid].mean()
    states = F.smooth_l1_loss(
        policy.state_head(hidden[:, :-1, 2])[both], batch["obs/state"][:, 1:][both]
    )
    returns = F.smooth_l1_loss(
        policy.return_head(hidden[:, :-1, 2])[both].squeeze(-1), batch["rtg"][:, 1:][both] / 4.0
    )
    torch.testing.assert_close(metrics["state_loss"], states.detach())
    torch.testing.assert_close(metrics["return_loss"], returns.detach())
    torch.testing.assert_close(loss, 0.9 * action + 0.05 * states + 0.05 * returns)


def test_the_released_loss_also_predicts_the_first_step_from_padding(make):
    agent = make("dm-released")
    batch = agent.prepare(agent.view[np.arange(len(agent.view))])
    hidden, after = agent.policy.encode(batch), batch["mask"][:, 1:]
    states = F.smooth_l1_loss(
        agent.policy.state_head(hidden[:, :-1, 2])[after], batch["obs/state"][:, 1:][after]
    )
    _, metrics = agent.policy.loss(batch)
    torch.testing.assert_close(metrics["state_loss"], states.detach())
    assert "alpha" not in metrics


# ---- configurations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent_id", "overrides", "words"),
    [
        ("dt", {"horizon": 2}, "horizon"),
        ("dt", {"acting": "stream"}, "decision-mamba"),
        ("dm", {"acting": "stream", "history": 1}, "history"),
        ("dm-released", {"acting": "stream"}, "causal"),
        ("decision-mamba-released", {"acting": "stream"}, "padding='right'"),
        ("dm", {"variant": "released"}, "left_legacy"),
        ("dt", {"action_norm": "mean_std"}, "squash"),
        ("dt", {"state_weight": 0.6, "return_weight": 0.4}, "sum to less"),
        ("dt", {"state_weight": 0.1, "action_tokens": False}, "action tokens"),
        ("dt", {"return_scale": 0.0}, "return_scale"),
        ("dt", {"heads": 3}, "heads"),
        ("dt", {"dropout": 1.0}, "dropout"),
        ("dm", {"layers": 0}, "layers"),
        ("bc", {"top_fraction": 0.0}, "top_fraction"),
        ("dt", {"self_evolution": {"alpha_cap": 1.5}}, "alpha_cap"),
        ("dt", {"self_evolution": {"stages": 0}}, "stages"),
        ("dt", {"padding": "edge"}, "'right', 'left_legacy'"),
        ("bc", {"padding": "right"}, "'edge', 'left_legacy'"),
    ],
)
def test_impossible_settings_are_refused(agent_id, overrides, words):
    with pytest.raises(InvalidInputError, match=words):
        mail_agents.make(agent_id, features(3, 2), device="cpu", **overrides)


def test_presets_follow_the_published_recipes():
    def recipe(agent_id):
        config = mail_agents.spec(agent_id).config()
        o = config.optim
        return (o.name, o.lr, o.weight_decay, o.warmup_steps, o.batch_size, o.grad_clip)

    shared = ("adamw", 1e-4, 1e-4, 10_000, 64, 0.25)
    assert recipe("dt") == recipe("dt-released") == recipe("dt-corl") == shared
    ota = ("adamw", 1e-3, 1e-4, 10_000, 64, 0.25)
    assert recipe("decision-mamba") == recipe("decision-mamba-released") == ota
    assert recipe("dm") == ("adamw", 1e-4, 1e-4, 2500, 64, 0.25)
    assert recipe("dm-paper") == ("adamw", 1e-4, 1e-5, 2500, 64, 0.25)
    assert recipe("bc") == recipe("bc-10") == ("adam", 3e-4, 0.0, 0, 256, None)
    assert recipe("bc-kzl") == ("adamw", 1e-4, 1e-4, 10_000, 64, None)
    for agent_id in SEQUENCE:
        config = mail_agents.spec(agent_id).config()
        released = agent_id.endswith("-released")
        assert config.padding == ("left_legacy" if released else "right")
        decayed = "all" if released or agent_id == "dt-corl" else "matrices"
        if agent_id == "dm-released":
            decayed = "all_but_biases_and_layernorms"
        assert config.optim.decayed == decayed
        assert config.self_evolution.enabled == (agent_id in ("dm", "dm-figure"))
        assert config.history == 20


def test_what_decays_in_the_released_multi_grained_network(make):
    agent = make("dm-released")
    agent.configure_optim()
    decayed, kept = agent.optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (1e-5, 0.0)
    spared = {id(parameter) for parameter in kept["params"]}
    found = {name for name, parameter in agent.policy.named_parameters() if id(parameter) in spared}
    layer_norms = {"embed_norm.weight", *(f"trunk.layers.{i}.ln_norm.weight" for i in range(2))}
    biases = {name for name, _ in agent.policy.named_parameters() if name.endswith("bias")}
    assert found == layer_norms | biases
    every = {name for name, _ in agent.policy.named_parameters()}
    assert {"trunk.norm_f.weight", "trunk.layers.0.norm.weight", "embed_timestep.weight"} < (
        every - found
    )
    assert any(name.endswith("A_log") for name in every - found)


def test_images_are_refused_by_name():
    spec = features(3, 2)
    camera = FeatureSpec(
        {**spec.observations, "camera": Feature("image", (8, 8, 3), "uint8")}, spec.action
    )
    for agent_id in ("dt", "bc"):
        with pytest.raises(InvalidInputError, match=r"camera.*--observations state"):
            mail_agents.make(agent_id, camera, device="cpu")


def test_listing_and_configuring_import_no_torch():
    code = (
        "import sys, mail_agents; ids = mail_agents.list_agents(tags=['offline-rl']);"
        "[mail_agents.spec(i).config() for i in ids]; print(*ids);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) == {
        *("dt", "dt-corl", "dt-released", "decision-mamba", "decision-mamba-released"),
        *("dm", "dm-figure", "dm-paper", "dm-released", "bc", "bc-10", "bc-kzl"),
    }
