"""What the state space mixers have in common: published numbers, masks, sizes, dtypes, directions.

The published numbers are outputs of the released modules (``mamba_ssm``'s Mamba and Mamba2, Vision
Mamba's ``bimamba_type="v2"``, Hydra) with reference recurrences in place of their CUDA kernels.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F

from mail_agents.errors import InvalidInputError
from mail_agents.mixers import BiMamba, Hydra, Mamba, Mamba2, MambaStack, Mixer
from mail_agents.mixers.heads import GatedRMSNorm
from mail_agents.training.optim import parameter_groups

MIXERS = {
    "mamba": lambda d, **kw: Mamba(d, **kw),
    "mamba2": lambda d, headdim=32, **kw: Mamba2(d, headdim=min(headdim, d), **kw),
    "bimamba": lambda d, **kw: BiMamba(d, **kw),
    "hydra": lambda d, headdim=64, **kw: Hydra(d, headdim=min(headdim, d), **kw),
}
CAUSAL = {"mamba": True, "mamba2": True, "bimamba": False, "hydra": False}
every_mixer = pytest.mark.parametrize("name", MIXERS)

# Sum, sum of squares and first three outputs at length 4; sum and sum of squares at length 1.
PUBLISHED = {
    "mamba": (-3.414534e-1, 4.569575e-1, [9.17916e-4, -5.61813e-2, 6.33671e-3]),
    "mamba2": (-8.448214, 280.3449, [5.29110e-2, -8.08310e-1, 5.14651e-2]),
    "bimamba": (-7.420189e-1, 2.016859, [-3.85370e-2, -6.68756e-2, 4.71726e-2]),
    "hydra": (-3.001303e-1, 5.672163e-1, [-2.07779e-2, -4.91139e-2, 2.71199e-2]),
}
PUBLISHED_SINGLE = {
    "mamba": (-1.074198e-1, 1.480378e-1),
    "mamba2": (-1.314788, 25.08452),
    "bimamba": (-1.034288e-1, 1.531390e-1),
    "hydra": (-1.402299e-1, 2.581824e-1),
}
COUNTS = {
    "mamba": (116_480, 437_760, 1_694_720),
    "mamba2": (134_936, 467_248, 1_727_840),
    "bimamba": (134_656, 482_304, 1_816_576),
    "hydra": (137_484, 473_624, 1_748_016),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def filled(mixer):
    """Sine waves for weights, by alphabetical order of the names; ones added to gains and skips."""
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(mixer.named_parameters())):
            wave = 0.2 * torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + 0.3 * k)
            gain = (p.ndim == 1 and name.endswith("weight")) or name in ("D", "D_b")
            p.copy_((wave + float(gain)).view(p.shape))
    return mixer.eval()


def small(name, **options):
    """A mixer without the special values of the initialisation."""
    sizes = {"d_state": 8, **({"headdim": 8} if name in ("mamba2", "hydra") else {})}
    mixer = MIXERS[name](16, **(sizes | options))
    with torch.no_grad():
        for key, parameter in mixer.named_parameters():
            if key in ("D", "D_b", "A_log", "A_b_log"):
                parameter.copy_(torch.randn(parameter.shape))
    return mixer.eval()


@every_mixer
def test_outputs_are_the_published_ones(name):
    mixer = filled(MIXERS[name](64))
    for length, wanted in ((4, PUBLISHED[name]), (1, PUBLISHED_SINGLE[name])):
        x = torch.cos(0.11 * torch.arange(2 * length * 64, dtype=torch.float64)).float()
        y = mixer(x.view(2, length, 64)).detach().double().flatten()
        assert y.sum().item() == pytest.approx(wanted[0], rel=1e-5, abs=1e-6)
        assert y.square().sum().item() == pytest.approx(wanted[1], rel=1e-5)
        if length == 4:
            assert y[:3].tolist() == pytest.approx(wanted[2], rel=1e-4, abs=1e-6)


@every_mixer
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in MIXERS[name](d).parameters()) for d in (128, 256, 512)]
    assert tuple(counts) == COUNTS[name]


@every_mixer
@pytest.mark.parametrize("length", [1, 5, 12])
def test_outputs_depend_on_earlier_steps_and_on_later_ones_unless_causal(name, length):
    mixer = small(name)
    assert mixer.causal is CAUSAL[name]
    x, at = torch.randn(2, length, 16), length // 2
    changed = x.clone()
    changed[:, at] += 1
    moved = (mixer(x) != mixer(changed)).any(-1).all(0)
    assert moved[at:].all()
    assert moved[:at].all().item() is not CAUSAL[name] or at == 0


@every_mixer
def test_protocols(name):
    mixer = small(name)
    assert isinstance(mixer, Mixer)
    assert all(hasattr(mixer, m) is CAUSAL[name] for m in ("init_state", "prefill", "step"))
    assert list(inspect.signature(mixer.forward).parameters) == ["x", "mask"]
    if not CAUSAL[name]:
        for each in (mixer, MambaStack(16, 1, mixer=name, headdim=8)):
            assert not each.causal
            with pytest.raises(InvalidInputError, match="has no step: every output depends on la"):
                each.step(torch.zeros(1, 16), None)
        with pytest.raises(AttributeError, match="no attribute 'stap'"):
            mixer.stap  # noqa: B018


@every_mixer
@pytest.mark.parametrize("bias", [False, True])
def test_leading_masked_steps_are_as_if_absent(name, bias):
    mixer = small(name, bias=bias)
    x = torch.randn(2, 10, 16)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :4] = False
    dirty = x.clone()
    dirty[0, :4] = torch.nan
    dirty.requires_grad_()
    y = mixer(dirty, mask)
    torch.testing.assert_close(y[:1, 4:], mixer(x[:1, 4:]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[1], mixer(x)[1], rtol=1e-5, atol=1e-5)
    assert (y[0, :4] == 0).all()
    y.square().sum().backward()
    assert (dirty.grad[0, :4] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


@every_mixer
def test_trailing_masked_steps_are_as_if_absent(name):
    mixer = small(name)
    x = torch.randn(1, 10, 16)
    mask = torch.arange(10)[None] < 7
    y = mixer(x, mask)
    torch.testing.assert_close(y[:, :7], mixer(x[:, :7]), rtol=1e-5, atol=1e-5)


@every_mixer
def test_masked_steps_anywhere_influence_nothing(name):
    mixer = small(name)
    x = torch.randn(2, 12, 16)
    mask = torch.rand(2, 12) < 0.6
    other = torch.where(mask.unsqueeze(-1), x, torch.randn(2, 12, 16) * 100)
    assert torch.equal(mixer(x, mask), mixer(other, mask))
    assert torch.equal(mixer(x, torch.ones(2, 12, dtype=torch.bool)), mixer(x))


@pytest.mark.parametrize("name", ["mamba2", "hydra"])
def test_masked_steps_influence_nothing_with_a_smallest_step_size(name):
    mixer = small(name, dt_limit=(0.05, 0.2))
    x = torch.randn(2, 9, 16)
    mask = (torch.arange(9) >= 4).expand(2, 9)
    torch.testing.assert_close(mixer(x, mask)[:, 4:], mixer(x[:, 4:]), rtol=1e-5, atol=1e-5)


@every_mixer
@pytest.mark.parametrize("length", [1, 3, 11])
def test_backends_agree(name, length):
    fast, slow = small(name), small(name, backend="reference")
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, length, 16)
    torch.testing.assert_close(fast(x), slow(x), rtol=1e-4, atol=1e-5)


@every_mixer
def test_backend_is_passed_on(name):
    with pytest.raises(ImportError, match=r"selective_scan_cuda|causal_conv1d"):
        small(name, backend="cuda")(torch.zeros(1, 2, 16))


@every_mixer
def test_empty_sequence_and_empty_batch(name):
    mixer = small(name)
    assert mixer(torch.zeros(2, 0, 16)).shape == (2, 0, 16)
    assert mixer(torch.zeros(0, 5, 16)).shape == (0, 5, 16)


@every_mixer
def test_half_precision_and_autocast_stay_close(name):
    mixer = small(name)
    x = torch.randn(2, 12, 16)
    wanted = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
        y.float().sum().backward()
    tolerance = 0.05 * wanted.abs().max() + 0.02
    assert (y.float() - wanted).abs().max() < tolerance
    half = mixer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).abs().max() < 2 * tolerance


@every_mixer
@pytest.mark.parametrize("length", [1, 6])
def test_every_parameter_has_a_gradient(name, length):
    """Also where it is zero: distributed training waits for all of them."""
    mixer = small(name)
    mixer(torch.randn(2, length, 16)).square().sum().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None, key
        assert length == 1 or parameter.grad.abs().sum() > 0, key


@every_mixer
def test_state_space_parameters_do_not_decay(name):
    mixer = small(name)
    keys = {id(p): key for key, p in mixer.named_parameters()}
    free = {keys[id(p)] for p in parameter_groups(mixer, 0.1)[1]["params"]}
    special = {"A_log", "D", "A_b_log", "D_b", "dt_bias", "norm.weight"} & set(keys.values())
    assert free == special | {key for key in keys.values() if key.endswith("bias")}
    marked = {keys[id(p)] for p in mixer.parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == special - {"norm.weight"}


@every_mixer
def test_sizes_that_do_not_fit_are_refused(name):
    with pytest.raises(InvalidInputError, match="d_conv=0"):
        MIXERS[name](16, d_conv=0)
    if name in ("mamba2", "hydra"):
        kind = {"mamba2": Mamba2, "hydra": Hydra}[name]
        with pytest.raises(InvalidInputError, match=r"headdim=64 does not .* is headdim=48"):
            kind(48)
        with pytest.raises(InvalidInputError, match=r"ngroups=3 does not .* is ngroups=2"):
            kind(16, headdim=8, ngroups=3)
        with pytest.raises(InvalidInputError, match="dt_limit"):
            kind(16, headdim=8, dt_limit=(1.0, 0.5))


@every_mixer
@pytest.mark.parametrize("d_conv", [1, 2, 3, 4])
def test_every_width_of_the_convolution_keeps_the_length(name, d_conv):
    assert small(name, d_conv=d_conv)(torch.randn(2, 5, 16)).shape == (2, 5, 16)


@pytest.mark.parametrize("length", [1, 9])
def test_the_mixing_of_mamba_is_a_semiseparable_matrix(length):
    """M_ij = sum over n of C_in B_jn exp(sum of Delta_k A_n over k = j+1 .. i) Delta_j."""
    mixer = small("mamba").double()
    x = torch.randn(1, length, 16, dtype=torch.float64)
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    conv = F.conv1d(F.pad(u.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=32)
    u = F.silu(conv)[0].T
    low, B, C = mixer.x_proj(u).split([1, 8, 8], dim=-1)
    dt, A = F.softplus(mixer.dt_proj(low)), -mixer.A_log.exp()
    if length == 1:
        y = (dt * (B @ C.T) + mixer.D) * u
    else:
        total = dt.cumsum(0)[:, :, None] * A  # (L, D, N)
        passed = torch.exp(total[:, None] - total[None])
        M = torch.einsum("in,jn,ijdn,jd->dij", C, B, passed, dt).tril()
        y = torch.einsum("dij,jd->id", M, u) + mixer.D * u
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(y * F.silu(z[0])))
    gradient = torch.autograd.grad(mixer(x).square().sum(), mixer.A_log)[0]
    assert (gradient == 0).all().item() is (length == 1)


# ---- the gated norm ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_gated_norm(groups, norm_before_gate):
    norm = GatedRMSNorm(16, groups, norm_before_gate).double()
    with torch.no_grad():
        norm.weight.normal_()
    x, z = torch.randn(2, 3, 16).double(), torch.randn(2, 3, 16).double()
    gate = z * torch.sigmoid(z)
    y = x if norm_before_gate else x * gate
    parts = y.view(2, 3, groups, -1)
    parts = parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    y = parts.view(2, 3, 16) * norm.weight * (gate if norm_before_gate else 1.0)
    torch.testing.assert_close(norm(x, z), y)
    half = norm.float()(x.to(torch.bfloat16), z.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16


# ---- stacks --------------------------------------------------------------------------------------


def stack(name, layers=2):
    made = MambaStack(16, layers, d_state=8, mixer=name, headdim=8).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@every_mixer
def test_stacks_of_every_mixer(name):
    made = stack(name)
    assert made.causal is CAUSAL[name]
    assert {type(block.mixer).__name__.lower() for block in made.layers} == {name}
    x, E = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    q = x
    for layer in made.layers:
        q = q + layer.mixer(layer.norm(q)) + E
    torch.testing.assert_close(made(x, E), made.norm_f(q), rtol=1e-5, atol=1e-5)
    mask = torch.arange(9)[None].expand(2, 9) >= 3
    dirty = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    torch.testing.assert_close(
        made(dirty, E, mask)[:, 3:], made(x[:, 3:], E[:, 3:]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", [name for name, causal in CAUSAL.items() if causal])
@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_stacks_of_causal_mixers_run_in_pieces(name, cut):
    made = stack(name)
    x, E = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    first, state = made.prefill(x[:, :cut], made.init_state(2), E[:, :cut])
    parts = [first]
    for t in range(cut, 9):
        y, state = made.step(x[:, t], state, E[:, t])
        parts.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), made(x, E), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, causal in CAUSAL.items() if not causal])
def test_stacks_of_other_mixers_refuse_to_run_in_pieces(name):
    made = stack(name)
    for ask in (
        lambda: made.init_state(2),
        lambda: made.prefill(torch.zeros(2, 3, 16)),
        lambda: made.step(torch.zeros(2, 16), ()),
    ):
        with pytest.raises(InvalidInputError, match=r"stream with a causal mixer: 'mamba', 'mamba"):
            ask()


def test_a_mixer_that_does_not_exist_is_named():
    with pytest.raises(KeyError, match="Did you mean 'mamba2'"):
        MambaStack(16, 1, mixer="manba2")


@every_mixer
def test_output_projections_of_stacks_are_scaled_with_depth(name):
    for block in MambaStack(64, 4, mixer=name, headdim=32).layers:
        assert block.mixer.out_proj.weight.abs().max() <= 128**-0.5 / 2


@every_mixer
@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(2, 4, dtype=torch.bool), "torch.bool (2, 4)"),
        (torch.ones(1, 5, dtype=torch.bool), "torch.bool (1, 5)"),
        (torch.ones(2, 5), "torch.float32 (2, 5)"),
    ],
)
def test_masks_that_do_not_fit_are_refused_with_what_fits(name, mask, got):
    with pytest.raises(InvalidInputError) as caught:
        small(name)(torch.zeros(2, 5, 16), mask)
    assert "a bool per step, (2, 5) for tokens (2, 5, 16); got " + got in str(caught.value)
