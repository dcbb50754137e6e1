"""Shapes, alignment, aggregation, causality and initial weights of the four sequence models."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mail_agents.agents.mail_backbone import MailBackbone, StepEmbedding
from mail_agents.agents.mail_config import StackConfig
from mail_agents.errors import InvalidInputError

VARIANTS = ("d-ma", "ed-ma", "d-tr", "ed-tr")
WIDTH, FEATURES, ACTIONS = 16, 12, 7


def model(variant="ed-ma", diffusion=True, history=5, horizon=5, *, seed=0, **kwargs):
    """A tiny model with weights large enough for every dependence to show."""
    torch.manual_seed(seed)
    mixer = "attention" if variant.endswith("tr") else "mamba"
    layers = kwargs.pop("layers", (2, 3))
    settings = {"mixer": mixer, "d_state": 4, "heads": 2}
    out = MailBackbone(
        feature_dim=FEATURES,
        action_dim=ACTIONS,
        max_states=history,
        horizon=horizon,
        width=WIDTH,
        encoder=StackConfig(layers=layers[0] * variant.startswith("ed"), d_conv=4, **settings),
        decoder=StackConfig(layers=layers[1], d_conv=2, **settings),
        diffusion=diffusion,
        **kwargs,
    )
    return out.eval()


def enlarge(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "A_log" not in name and "dt_proj.bias" not in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return net


def inputs(net, n=None, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = net.max_states if n is None else n
    features = torch.randn(rows, n, FEATURES, generator=generator)
    if not net.diffusion:
        return [features]
    noisy = torch.randn(rows, net.horizon, ACTIONS, generator=generator)
    return [features, noisy, torch.arange(rows) + 3]


def changed_outputs(net, before, after):
    """Which output positions differ between two inputs."""
    with torch.inference_mode():
        difference = (net(*before) - net(*after)).abs().amax(dim=(0, 2))
    return (difference > 1e-7).tolist()


def moved(args, index, position):
    out = [a.clone() for a in args]
    out[index][:, position] += 1.0
    return out


@pytest.mark.parametrize("diffusion", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes(variant, diffusion):
    for history, horizon in ((1, 5), (3, 5), (5, 10), (10, 10)):
        for language in (0, 1):
            net = model(variant, diffusion, history + language, horizon, layers=(1, 1))
            with torch.inference_mode():
                assert net(*inputs(net)).shape == (2, horizon, ACTIONS)
                assert net(*inputs(net, n=1)).shape == (2, horizon, ACTIONS)


def test_inputs_are_checked():
    net = model()
    features, noisy, t = inputs(net)
    with pytest.raises(InvalidInputError, match="1 to 5 state tokens"):
        net(torch.randn(2, 6, FEATURES), noisy, t)
    with pytest.raises(InvalidInputError, match="needs noisy actions"):
        net(features)
    with pytest.raises(InvalidInputError, match="Expected 5 noisy actions"):
        net(features, noisy[:, :4], t)
    with pytest.raises(InvalidInputError, match="does not take noisy actions"):
        model(diffusion=False)(features, noisy, t)
    with pytest.raises(InvalidInputError, match=rf"features of {FEATURES} floats.*\(2, 5, 3\)"):
        net(features[..., :3], noisy, t)
    with pytest.raises(InvalidInputError, match=r"features of .* floats.*int64.*agent\.prepare"):
        net(features.long(), noisy, t)
    with pytest.raises(InvalidInputError, match=rf"noisy actions of {ACTIONS} floats"):
        net(features, noisy[..., :1], t)
    with pytest.raises(InvalidInputError, match=r"\(B, J, A\).*\(2, 5\)"):
        net(features, noisy[..., 0], t)


# ---- tokens ------------------------------------------------------------------------------------


def test_step_embedding_is_sinusoids_sine_half_first():
    embedding = StepEmbedding(128)
    seen = []
    embedding.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    embedding(torch.tensor([0, 7]))
    frequencies = [math.exp(-i * math.log(1e4) / 63) for i in range(64)]
    expected = [math.sin(7 * f) for f in frequencies] + [math.cos(7 * f) for f in frequencies]
    torch.testing.assert_close(seen[0][1], torch.tensor(expected), atol=1e-5, rtol=0)
    assert seen[0][0].tolist() == [0.0] * 64 + [1.0] * 64
    assert [type(layer) for layer in embedding.mlp] == [nn.Linear, nn.Mish, nn.Linear]
    assert embedding.mlp[0].out_features == 256


@pytest.mark.parametrize("language", [0, 1])
@pytest.mark.parametrize(("diffusion", "first"), [(True, 1), (False, 0)])
def test_both_branches_have_the_same_length_and_the_tables_their_rows(diffusion, first, language):
    history, horizon = 5 + language, 4
    net = model("ed-ma", diffusion, history, horizon)
    assert net.positions.weight.shape == (history + horizon - 1, WIDTH)
    assert net.action_variables.weight.shape == (horizon, WIDTH)
    assert net.state_variables.weight.shape == (first + history, WIDTH)
    assert diffusion or net.action_queries.weight.shape == (horizon, WIDTH)
    seen = []
    for stack in (net.encoder, net.decoder):
        stack.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    for n in (history, 2):
        seen.clear()
        net(*inputs(net, n=n))
        assert seen == [(2, first + n + horizon, WIDTH)] * 2


def test_a_decoder_that_is_not_aligned_is_refused():
    net = model()
    with pytest.raises(InvalidInputError):
        net.decoder(torch.randn(2, 8, WIDTH), aggregate=torch.randn(2, 7, WIDTH))
    with pytest.raises(InvalidInputError):
        net.decoder(torch.randn(2, 8, WIDTH), aggregate=torch.randn(2, 1, WIDTH))


@pytest.mark.parametrize("n", [5, 2])
def test_newest_state_and_first_action_share_a_position(n):
    net = enlarge(model("d-ma", history=5, horizon=4))
    features, noisy, t = inputs(net, n=n)

    def tokens():
        return net.lead_tokens(features, t)[:, 1:], net.action_tokens(noisy, 2, n)

    states, actions = tokens()
    with torch.no_grad():
        net.positions.weight[n - 1] = 0
    states2, actions2 = tokens()
    assert [bool(x) for x in (states != states2).flatten(2).any(-1)[0]] == [False] * (n - 1) + [
        True
    ]
    assert [bool(x) for x in (actions != actions2).flatten(2).any(-1)[0]] == [True] + [False] * 3


def test_sequence_order_of_the_decoder_only_model():
    net = enlarge(model("d-ma", history=2, horizon=3))
    seen = []
    net.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features, noisy, t = inputs(net)
    net(features, noisy, t)
    rows = net.positions.weight
    expected = torch.cat(
        (
            net.step_embedding(t)[:, None],
            net.state_proj(features) + rows[:2],
            net.action_proj(noisy) + rows[1:4],
        ),
        dim=1,
    )
    torch.testing.assert_close(seen[0], expected)


def test_sequence_order_of_regression():
    net = enlarge(model("ed-ma", diffusion=False, history=2, horizon=3))
    seen = []
    for stack in (net.encoder, net.decoder):
        stack.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    (features,) = inputs(net)
    net(features)
    states = net.state_proj(features[0]) + net.positions.weight[:2]
    torch.testing.assert_close(seen[0], torch.cat((states, net.action_variables.weight)))
    expected = torch.cat((net.state_variables.weight, net.action_queries.weight))
    torch.testing.assert_close(seen[1], expected)


# ---- an independent recomputation ----------------------------------------------------------------


def mixer_by_loop(w, x):
    """The Mamba mixer, one token and one state at a time; x (L, D) float64."""
    length, inner = x.shape[0], w["A_log"].shape[0]
    xz = x @ w["in_proj.weight"].T
    u, z = xz[:, :inner], xz[:, inner:]
    kernel = w["conv1d.weight"][:, 0]
    taps = kernel.shape[1]
    conv = torch.zeros_like(u)
    for step in range(length):
        conv[step] = w["conv1d.bias"]
        for tap in range(taps):
            source = step - (taps - 1) + tap
            if source >= 0:
                conv[step] = conv[step] + kernel[:, tap] * u[source]
    u = conv * torch.sigmoid(conv)
    n = w["A_log"].shape[1]
    rank = w["dt_proj.weight"].shape[1]
    projected = u @ w["x_proj.weight"].T
    dt = F.softplus(projected[:, :rank] @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    b, c = projected[:, rank : rank + n], projected[:, rank + n :]
    a = -torch.exp(w["A_log"])
    state = torch.zeros(inner, n, dtype=x.dtype)
    rows = []
    for step in range(length):
        state = torch.exp(dt[step][:, None] * a) * state
        state = state + (dt[step] * u[step])[:, None] * b[step][None, :]
        rows.append(state @ c[step] + w["D"] * u[step])
    y = torch.stack(rows) * (z * torch.sigmoid(z))
    return y @ w["out_proj.weight"].T


def norm(weights, x):
    x = x - x.mean(-1, keepdim=True)
    return (
        x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["weight"] + weights["bias"]
    )


def doubles(module):
    return {key: value.detach().double() for key, value in module.state_dict().items()}


def stack_by_loop(stack, x, aggregate=None):
    for block in stack.layers:
        x = x + mixer_by_loop(doubles(block.mixer), norm(doubles(block.norm), x))
        if aggregate is not None:
            x = x + aggregate
    return norm(doubles(stack.norm_f), x)


def recorded(net, args):
    """Runs a model; returns encoder input, decoder input and decoder output of the first row."""
    seen = {}
    hooks = [
        net.encoder.register_forward_pre_hook(lambda _, a: seen.__setitem__("z", a[0][0].double())),
        net.decoder.register_forward_pre_hook(lambda _, a: seen.__setitem__("u", a[0][0].double())),
        net.decoder.register_forward_hook(lambda _, a, out: seen.__setitem__("y", out[0])),
    ]
    with torch.no_grad():
        seen["out"] = net(*args)[0]
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("diffusion", [True, False])
@pytest.mark.parametrize("big", [False, True])
def test_encoder_output_is_added_after_every_decoder_block(diffusion, big):
    """r_l = r + M(LN r); q_l = q + M(LN q) + E with E = LN(r_Le); the output reads LN(q_Ld)."""
    net = model("ed-ma", diffusion)
    net = enlarge(net) if big else net
    seen = recorded(net, inputs(net))
    encoded = stack_by_loop(net.encoder, seen["z"])
    y = stack_by_loop(net.decoder, seen["u"], encoded)
    assert (y - seen["y"]).abs().max() < (1e-4 if big else 1e-5)
    out = y[-net.horizon :] @ net.head.weight.double().T + net.head.bias.double()
    assert (out - seen["out"]).abs().max() < (1e-3 if big else 1e-5)


def test_without_aggregate_the_decoder_is_a_plain_stack():
    net = enlarge(model())
    u = torch.randn(2, 11, WIDTH)
    with torch.no_grad():
        with_zero = net.decoder(u, aggregate=torch.zeros_like(u))
        torch.testing.assert_close(with_zero, net.decoder(u))


def test_with_silent_mixers_the_decoder_adds_the_encoder_output_once_per_block():
    net = model(layers=(2, 3))
    with torch.no_grad():
        for block in net.decoder.layers:
            block.mixer.out_proj.weight.zero_()
    u, e = torch.randn(2, 11, WIDTH), torch.randn(2, 11, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(net.decoder(u, aggregate=e), net.decoder.norm_f(u + 3 * e))


# ---- dependence ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_noisy_actions_reach_only_their_own_and_later_outputs(variant):
    net = enlarge(model(variant))
    args = inputs(net)
    for j in (0, 3, 4):
        assert changed_outputs(net, args, moved(args, 1, j)) == [False] * j + [True] * (5 - j)


@pytest.mark.parametrize("diffusion", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_states_and_diffusion_step_reach_every_output(variant, diffusion):
    net = enlarge(model(variant, diffusion))
    args = inputs(net)
    for position in (0, 4):
        assert changed_outputs(net, args, moved(args, 0, position)) == [True] * 5
    if diffusion:
        assert changed_outputs(net, args, [args[0], args[1], args[2] + 1]) == [True] * 5


def test_learnt_variables_of_the_encoder_decoder_are_used_causally():
    net = enlarge(model("ed-ma"))
    args = inputs(net)
    with torch.inference_mode():
        before = net(*args)
    for table, row, first in (
        (net.action_variables, 3, 3),
        (net.state_variables, 0, 0),
        (net.state_variables, 5, 0),
    ):
        saved = table.weight.detach().clone()
        with torch.no_grad():
            table.weight[row] += 1.0
        with torch.inference_mode():
            difference = (net(*args) - before).abs().amax(dim=(0, 2)) > 1e-7
        assert difference.tolist() == [False] * first + [True] * (5 - first)
        with torch.no_grad():
            table.weight.copy_(saved)


@pytest.mark.parametrize("diffusion", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant, diffusion):
    net = enlarge(model(variant, diffusion))
    net(*inputs(net)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    rows = net.positions.weight.grad.abs().sum(1) > 0
    # Regression has no noisy actions, so only the state rows are read.
    assert rows.tolist() == [True] * 5 + [diffusion] * 4


# ---- initial weights ---------------------------------------------------------------------------


def mambas(net):
    return [block.mixer for stack in (net.encoder, net.decoder) for block in stack.layers]


def wide(init):
    torch.manual_seed(0)
    stack = StackConfig(layers=4, d_state=8, d_conv=2)
    return MailBackbone(
        feature_dim=128, action_dim=7, max_states=5, horizon=5, width=128,
        encoder=stack, decoder=stack, diffusion=True, init=init,
    )  # fmt: skip


@pytest.mark.parametrize("init", ["mamba", "upstream"])
def test_common_initial_weights(init):
    net = wide(init)
    assert net.positions.weight.abs().max() == 0
    for module in (net.state_proj, net.step_embedding.mlp[0]):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert module.bias.abs().max() == 0
    assert net.state_variables.weight.std().item() == pytest.approx(0.02, rel=0.15)
    for mixer in mambas(net):
        expected = torch.log(torch.arange(1.0, 9.0)).expand(256, 8)
        torch.testing.assert_close(mixer.A_log.detach(), expected)
        assert (mixer.D == 1).all()


def test_mamba_initial_weights():
    for mixer in mambas(wide("mamba")):
        step = F.softplus(mixer.dt_proj.bias)
        assert step.min() >= 1e-3 * 0.999
        assert step.max() <= 0.1 * 1.001
        # Kaiming-uniform with a = sqrt(5) has std 1 / sqrt(3 fan_in); divided by sqrt(layers).
        expected = 1 / math.sqrt(3 * 256) / math.sqrt(4)
        assert mixer.out_proj.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_released_initial_weights():
    for mixer in mambas(wide("upstream")):
        assert mixer.dt_proj.bias.abs().max() == 0
        for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert F.softplus(mixer.dt_proj.bias).mean().item() == pytest.approx(0.693, abs=1e-3)
