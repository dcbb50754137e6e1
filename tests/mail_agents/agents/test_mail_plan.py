"""Plans computed ahead: equal to asking the network anew at every step, in bounded memory."""

import itertools
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mail_agents
from mail_agents.agents import mail_plan
from mail_agents.agents.mail import MailPolicy
from mail_agents.agents.mail_config import MailConfig
from mail_agents.agents.mail_plan import Denoiser
from mail_agents.cuda_graphs import Graphs
from mail_agents.features import Feature, FeatureSpec
from mail_agents.ops.backends import use_backend

ACTION = Feature("state", (2,), "float32", low=(-1.0, -1.0), high=(1.0, 1.0))
STATE = Feature("state", (3,), "float32")
CAMERA = Feature("image", (36, 36, 3), "uint8")
#: The smallest sizes at which every part is still there.
SMALL = {
    "width": 16,
    "feature_width": 8,
    "history": 3,
    "horizon": 4,
    "diffusion_steps": 5,
    "encoder.d_state": 4,
    "decoder.d_state": 4,
    "encoder.heads": 2,
    "decoder.heads": 2,
    "decoder.layers": 2,
}
DIFFUSION = [
    f"mail/{variant}-ddpm{kind}"
    for variant, kind in itertools.product(("d-ma", "ed-ma", "d-tr", "ed-tr"), ("", "-released"))
] + ["mail/ed-ma-ddpm-so"]
MIXERS = ["mamba", "mamba2", "bimamba", "hydra", "attention"]


def policy(config, observations=None):
    torch.manual_seed(0)
    out = MailPolicy(config, FeatureSpec(observations or {"state": STATE}, ACTION)).eval()
    with torch.no_grad():  # weights large enough for every dependence to show
        for name, parameter in out.named_parameters():
            if "A_log" not in name and "dt_" not in name and "trunk" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    out.set_action_bounds(torch.tensor([-1.0, -0.5]), torch.tensor([1.0, 2.0]))
    return out


def batch(rows=2, history=3):
    g = torch.Generator().manual_seed(1)
    return {
        "obs/state": torch.randn(rows, history, 3, generator=g),
        "mask": torch.ones(rows, history, dtype=torch.bool),
        "task_emb": torch.randn(rows, 512, generator=g),
    }


def generators(rows):
    return [torch.Generator().manual_seed(10 + row) for row in range(rows)]


def sample(p, b, deterministic=False):
    with torch.inference_mode():
        return p.sample(b, generators(len(b["mask"])), deterministic)


def plain(p, b, deterministic=False):
    """The published sampler: the whole network at every step, noise drawn where it is used."""
    ddpm, rows = p.objective, len(b["mask"])
    sources, shape = generators(rows), (rows, *p.chunk)
    low, high = p.action_low, p.action_high

    def chunks():
        draw = partial(torch.randn, 1, *shape[1:], dtype=low.dtype)
        return torch.cat([draw(generator=each) for each in sources])

    with torch.inference_mode():
        features = p.encode(b)
        x = low.new_zeros(shape) if deterministic else chunks()
        for step in range(ddpm.steps - 1, -1, -1):
            noise = p.backbone(features, x, torch.full((rows,), step))
            x0 = ddpm.predict_start(x, noise, step).clamp(low, high)
            x = ddpm.from_start[step] * x0 + ddpm.from_noisy[step] * x
            if step and not deterministic:
                x = x + ddpm.variance[step] ** 0.5 * chunks()
    return x.clamp(low, high)


def check(p, b):
    """Compares each predicted noise, and whole plans, also where rounding hides nothing.

    A plan's first step multiplies noise by 325, rounding errors included.
    """
    for single, tolerance in ((1e-5, 1e-4), (1e-10, 1e-9)):
        with torch.inference_mode():
            features, x = p.encode(b), p.action_low.new_ones(len(b["mask"]), *p.chunk)
            net = Denoiser(p.backbone, features)
            for step in (4, 3, 0, 2):
                found = p.backbone(features, x, torch.full((len(x),), step))
                torch.testing.assert_close(net(x, step), found, atol=single, rtol=0)
        for deterministic in (True, False):
            expected = plain(p, b, deterministic)
            assert expected.std() > 1e-2
            found = sample(p, b, deterministic)
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        p.double()
        b = {k: v.double() if v.is_floating_point() else v for k, v in b.items()}
    p.float()


@pytest.mark.parametrize("agent_id", DIFFUSION)
def test_every_variant(agent_id):
    layers = {"encoder.layers": 1} if "/ed" in agent_id else {}
    p = policy(mail_agents.spec(agent_id).config(SMALL | layers))
    assert (p.backbone.encoder is None) == ("/d-" in agent_id)
    check(p, batch())
    check(p, batch(rows=1))
    if p.padding == "none":
        check(p, batch(history=1))


def mixers_config(encoder, decoder, **overrides):
    small = {"encoder.layers": 1, "encoder.headdim": 8, "decoder.headdim": 8}
    names = {"encoder.mixer": encoder or "mamba", "decoder.mixer": decoder}
    without = {} if encoder else {"encoder.layers": 0}
    return MailConfig().replace(SMALL | small | names | without | overrides)


@pytest.mark.parametrize("decoder", MIXERS)
@pytest.mark.parametrize("encoder", [None, *MIXERS])
def test_every_pair_of_mixers(encoder, decoder):
    p = policy(mixers_config(encoder, decoder, padding="none"))
    check(p, batch())
    check(p, batch(rows=1, history=2))


@pytest.mark.parametrize("decoder", ["mamba", "attention"])
@pytest.mark.parametrize("encoder", [None, "mamba"])
def test_decoders_that_see_everything_anew(monkeypatch, encoder, decoder):
    monkeypatch.setattr(mail_plan, "_tokens_cost", lambda _: False)  # as on a GPU
    p = policy(mixers_config(encoder, decoder))
    if p.backbone.aligned or encoder is None:
        p.backbone.decoder.prefill = None  # not called
    check(p, batch())


@pytest.mark.parametrize("decoder", ["mamba", "bimamba", "attention"])
def test_language_and_images(decoder):
    check(policy(mixers_config("mamba", decoder, language="hash")), batch())
    if decoder == "mamba":
        film = mixers_config("mamba", decoder, language="hash", language_as="film")
        views = torch.randint(0, 256, (2, 3, 36, 36, 3), dtype=torch.uint8)
        observations = {"state": STATE, "view": CAMERA}
        check(policy(film, observations), batch() | {"obs/view": views})


def test_padded_steps_at_the_start_of_an_episode():
    p, b = policy(mixers_config("mamba", "mamba")), batch()
    b["mask"][0, :2] = False
    check(p, b)


@pytest.mark.parametrize("variant", ["d-ma", "ed-ma", "d-tr", "ed-tr"])
@pytest.mark.parametrize("objective", ["bc", "ddpm"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_no_rows_give_no_chunks(variant, objective, deterministic):
    p = policy(mail_agents.spec(f"mail/{variant}-{objective}").config(SMALL))
    assert sample(p, batch(rows=0), deterministic).shape == (0, 4, 2)


class Operations(TorchDispatchMode):
    """Counts what computes or copies."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        return out


@pytest.mark.parametrize("variant", ["d-ma", "ed-ma", "d-tr"])
def test_plans_consist_of_fewer_operations_where_tokens_are_seen_again(variant, monkeypatch):
    """At the published sizes; that is why a GPU, which has to launch each, gets those."""
    p, counts = policy(mail_agents.spec(f"mail/{variant}-ddpm").config({})), []
    for saves_tokens in (True, False):
        monkeypatch.setattr(mail_plan, "_tokens_cost", lambda _, saves=saves_tokens: saves)
        with use_backend("torch"), Operations() as seen:
            sample(p, batch(rows=1, history=5))
        counts.append(seen.count)
    assert counts[1] < counts[0]


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["mamba", "bimamba", "attention"])
@pytest.mark.parametrize(("rows", "ahead", "expected"), [(2, 6, [6, 4]), (3, 3, [3] * 5)])
def test_rows_ahead_are_bounded(monkeypatch, decoder, rows, ahead, expected):
    """Five steps: in blocks of as many as there is room for, or one by one."""
    p, b = policy(mixers_config("mamba", decoder)), batch(rows)
    reference = plain(p, b)
    monkeypatch.setattr(mail_plan, "ROWS_AHEAD", ahead)
    seen = []
    p.backbone.encoder.register_forward_hook(lambda _, x, y: seen.append(len(y)))
    torch.testing.assert_close(sample(p, b), reference, atol=1e-5, rtol=0)
    assert seen == expected


def test_only_one_block_is_kept():
    p = policy(mixers_config("mamba", "mamba"))
    with torch.inference_mode():
        features = p.encode(batch(rows=100))
        net = Denoiser(p.backbone, features)
        chunk = torch.zeros(100, 4, 2)
        for step in (4, 3, 2):
            net(chunk, step)
    assert list(net._ahead) == [1, 2]


@pytest.mark.parametrize("agent_id", [f"mail/{v}-ddpm" for v in ("d-ma", "ed-ma", "d-tr", "ed-tr")])
def test_plans_do_not_depend_on_other_rows(agent_id, monkeypatch):
    """Bit for bit at the published widths, however steps and rows are gathered in batches."""
    small = {"decoder.layers": 1, "diffusion_steps": 4, "history": 5}
    small |= {"encoder.layers": 1} if "/ed" in agent_id else {}
    p = policy(mail_agents.spec(agent_id).config(small))
    p.chunk = (5, 2)
    b = batch(24, history=5)
    monkeypatch.setattr(mail_plan, "ROWS_AHEAD", 48)
    expected = sample(p, {k: v[:4] for k, v in b.items()})
    for rows in (8, 12, 24):
        assert torch.equal(sample(p, {k: v[:rows] for k, v in b.items()})[:4], expected)


# ---- recordings ----------------------------------------------------------------------------------


class Tape:
    """Stands for a recorder of CUDA graphs: runs the function when a graph would be replayed."""

    def __init__(self):
        self.recordings = 0

    def __call__(self, function):
        self.recordings += 1
        output = function()
        return lambda: output.copy_(function()), output


@pytest.mark.parametrize("objective", ["ddpm", "bc"])
def test_recorded_plans_are_those_of_eager_code(objective):
    p = policy(mixers_config("mamba", "mamba", objective=objective, language="hash"))
    tape = Tape()
    cases = [(batch(rows), flag) for rows in (1, 3, 1) for flag in (True, False)]
    expected = [sample(p, *case) for case in cases]
    p._graphs = Graphs(tape)
    for case, chunk in zip(cases, expected, strict=True):
        assert torch.equal(sample(p, *case), chunk)
    assert tape.recordings == 2  # one for each number of rows
    p.train()
    sample(p, batch(5))
    assert tape.recordings == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("agent_id", [f"mail/{v}-ddpm" for v in ("d-ma", "ed-ma", "d-tr", "ed-tr")])
def test_cuda_graphs_of_plans(agent_id):
    p = policy(mail_agents.spec(agent_id).config({"diffusion_steps": 4})).cuda()
    batches = [{k: v.cuda() for k, v in batch(rows, history=5).items()} for rows in (1, 3, 1)]
    expected = [sample(p, b) for b in batches]
    p.compile()
    for b, chunk in zip(batches, expected, strict=True):
        torch.testing.assert_close(sample(p, b), chunk, atol=1e-4, rtol=0)
    assert len(p._graphs) == 2
