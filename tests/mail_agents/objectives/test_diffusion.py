import copy
import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from mail_agents.errors import InvalidInputError
from mail_agents.objectives.diffusion import DDPM

# Measured on the released MaIL code: cosine schedule with 16 steps, float32.
BETAS = [
    0.011868, 0.030692, 0.049739, 0.069385, 0.090051, 0.112245, 0.136617, 0.164039,
    0.195751, 0.233596, 0.280480, 0.341278, 0.424809, 0.548444, 0.747613, 0.999,
]  # fmt: skip
ALPHA_BAR = [
    0.988132, 0.957805, 0.910164, 0.847012, 0.770738, 0.684227, 0.590750, 0.493844,
    0.397173, 0.304395, 0.219018, 0.144272, 0.082984, 0.037472, 0.009457, 9.457e-6,
]  # fmt: skip


@pytest.fixture(scope="module")
def ddpm():
    return DDPM(16)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(ddpm, net, shape, *, deterministic=False, seeds=None, low=None, high=None):
    """Samples with a network that takes steps ``(B,)``."""
    low, high = (torch.tensor([b] * shape[-1]) for b in (-2.0, 2.0)) if low is None else (low, high)
    rows = seeded(*(range(shape[0]) if seeds is None else seeds))
    noise = ddpm.draw_noise(shape, rows, deterministic=deterministic, like=low)

    def at(x, step):
        return net(x, torch.full(shape[:1], step))

    return ddpm.sample(at, noise, low=low, high=high)


def oracle(ddpm, clean):
    """A network that knows the clean chunk and answers with the noise that is in its input."""

    def net(x, t):
        abar = ddpm.alpha_bar[t].view(-1, 1, 1)
        return ((x - abar.sqrt() * clean) / (1 - abar).sqrt()).float()

    return net


def reference(**kwargs):
    return DDPMScheduler(16, beta_schedule="squaredcos_cap_v2", clip_sample=False, **kwargs)


def test_schedule_is_the_published_one(ddpm):
    torch.testing.assert_close(ddpm.betas.float(), torch.tensor(BETAS), atol=1e-6, rtol=0)
    torch.testing.assert_close(ddpm.alpha_bar.float(), torch.tensor(ALPHA_BAR), atol=1e-6, rtol=0)
    assert ddpm.alpha_bar[15].item() == pytest.approx(9.457e-6, rel=1e-3)
    assert 1 / math.sqrt(ddpm.alpha_bar[15]) == pytest.approx(325, abs=0.5)
    assert ddpm.variance[0] == 0
    assert ddpm.variance[15] == pytest.approx(0.98956, abs=1e-5)


@pytest.mark.parametrize("t", range(16))
def test_posterior_is_that_of_diffusers(ddpm, t):
    x0, x = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    theirs = reference(prediction_type="sample").step(
        x0, t, x, generator=torch.Generator().manual_seed(5), return_dict=False
    )[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    ours = ddpm.from_start[t] * x0 + ddpm.from_noisy[t] * x + ddpm.variance[t] ** 0.5 * noise
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_stochastic_sampling_is_that_of_diffusers_with_a_clamp_per_dimension(ddpm):
    def net(x, t):
        return torch.tanh(3 * x + t.view(-1, 1, 1) / 16)

    low, high = torch.tensor([-0.5, -2.0]), torch.tensor([0.25, 3.0])
    ours = draw(ddpm, net, (2, 3, 2), seeds=(1, 2), low=low, high=high)
    scheduler, rows = reference(prediction_type="sample"), seeded(1, 2)
    x = torch.cat([torch.randn(1, 3, 2, generator=g) for g in rows])
    for t in scheduler.timesteps:
        abar = scheduler.alphas_cumprod[t]
        x0 = (x - (1 - abar).sqrt() * net(x, t.expand(2))) / abar.sqrt()
        x = scheduler.step(x0.clamp(low, high), int(t), x, generator=rows, return_dict=False)[0]
    torch.testing.assert_close(ours, x.clamp(low, high), atol=1e-4, rtol=0)


@pytest.mark.parametrize("t", [0, 7, 14])
def test_start_and_noise_round_trip(ddpm, t):
    clean, noise = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    steps = torch.full((3,), t)
    noisy = ddpm.add_noise(clean, noise, steps)
    torch.testing.assert_close(noisy, reference().add_noise(clean, noise, steps))
    torch.testing.assert_close(ddpm.predict_start(noisy, noise, t), clean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("t", range(16))
def test_noisy_data_keeps_unit_variance(ddpm, t):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(200, 50, 2, generator=generator)
    noise = torch.randn(200, 50, 2, generator=generator)
    assert ddpm.add_noise(clean, noise, torch.full((200,), t)).var().item() == pytest.approx(
        1, abs=0.03
    )


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_perfect_network_recovers_the_clean_chunk(ddpm, deterministic):
    clean = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(1)) * 3 - 1.5
    out = draw(ddpm, oracle(ddpm, clean), (3, 5, 2), deterministic=deterministic)
    torch.testing.assert_close(out, clean, atol=1e-3, rtol=0)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_wild_network_stays_inside_the_bounds(ddpm, deterministic):
    low, high = torch.tensor([-0.5, -2.0]), torch.tensor([0.25, 3.0])
    out = draw(
        ddpm, lambda x, t: 100 * torch.sin(1e3 * x + 1), (4, 5, 2),
        deterministic=deterministic, low=low, high=high,
    )  # fmt: skip
    assert torch.isfinite(out).all()
    assert (out >= low).all()
    assert (out <= high).all()
    assert ((out == low) | (out == high)).any()  # the clamp was needed


def test_every_step_is_visited_once_from_the_last_to_the_first(ddpm):
    seen = []

    def net(x, t):
        seen.append(t.tolist())
        return x

    draw(ddpm, net, (2, 1, 1))
    assert seen == [[t, t] for t in range(15, -1, -1)]


def test_stochastic_rows_follow_their_own_generators(ddpm):
    def net(x, t):
        return 0.1 * x

    a = draw(ddpm, net, (3, 4, 2), seeds=(1, 2, 3))
    b = draw(ddpm, net, (3, 4, 2), seeds=(1, 2, 3))
    assert torch.equal(a, b)
    assert not torch.equal(a[0], a[1])
    alone = draw(ddpm, net, (1, 4, 2), seeds=(2,))
    torch.testing.assert_close(alone[0], a[1])


def by_hand(ddpm, net, shape, generators, deterministic, low, high):
    """The sampler with its draws in place: a chunk per row and step, in the order of use."""

    def chunks():
        return torch.cat([torch.randn(1, *shape[1:], generator=each) for each in generators])

    x = torch.zeros(shape) if deterministic else chunks()
    for step in range(ddpm.steps - 1, -1, -1):
        x0 = ddpm.predict_start(x, net(x, torch.full(shape[:1], step)), step).clamp(low, high)
        x = ddpm.from_start[step] * x0 + ddpm.from_noisy[step] * x
        if step > 0 and not deterministic:
            x = x + ddpm.variance[step] ** 0.5 * chunks()
    return x.clamp(low, high)


# Chunks of fewer and of more than 16 numbers are drawn by different kernels.
@pytest.mark.parametrize("shape", [(3, 4, 2), (2, 5, 7), (1, 1, 1)])
@pytest.mark.parametrize("deterministic", [True, False])
def test_drawing_ahead_changes_no_sample(ddpm, shape, deterministic):
    def net(x, t):
        return torch.tanh(3 * x + t.view(-1, 1, 1) / 16)

    low = torch.linspace(-2.0, -0.5, shape[-1])
    rows = seeded(*range(shape[0]))
    expected = by_hand(ddpm, net, shape, rows, deterministic, low, -low)
    found = draw(ddpm, net, shape, deterministic=deterministic, low=low, high=-low)
    assert torch.equal(found, expected)
    # A later plan goes on where this one has left the generators.
    again = seeded(*range(shape[0]))
    ddpm.draw_noise(shape, again, deterministic=deterministic, like=low)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(rows, again, strict=True))


def test_noise_is_needed_and_comes_one_generator_per_row(ddpm):
    with pytest.raises(InvalidInputError, match="draw_noise"):
        ddpm.sample(lambda x, t: x, None, low=-torch.ones(1), high=torch.ones(1))
    for deterministic in (True, False):
        with pytest.raises(InvalidInputError, match="got 1 for 2 rows"):
            ddpm.draw_noise((2, 3, 1), seeded(0), deterministic=deterministic, like=torch.ones(1))


def test_noise_has_the_dtype_it_is_asked_for(ddpm):
    noise = ddpm.draw_noise((1, 2, 2), seeded(0), deterministic=False, like=torch.ones(1).double())
    assert noise.dtype == torch.float64
    assert noise.shape == (16, 1, 2, 2)


def test_deterministic_sampling_uses_no_generator_and_no_place(ddpm):
    generators = seeded(1, 2)
    before = [g.get_state() for g in generators]
    noise = ddpm.draw_noise((2, 4, 2), generators, deterministic=True, like=torch.ones(2))
    assert all(torch.equal(a, g.get_state()) for a, g in zip(before, generators, strict=True))
    assert not noise.any()
    out = draw(ddpm, lambda x, t: 0.1 * x, (2, 4, 2), deterministic=True, seeds=(1, 2))
    assert torch.equal(out[0], out[1])
    assert torch.equal(out, draw(ddpm, lambda x, t: 0.1 * x, (2, 4, 2), deterministic=True))


def test_deterministic_sampling_settles_in_one_mode(ddpm):
    """With the exact noise prediction for points at +1 and -1, slightly more of them at +1."""

    def net(x, t):
        abar = ddpm.alpha_bar[t].view(-1, 1, 1).float()
        expected_clean = torch.tanh(abar.sqrt() * x / (1 - abar) + 0.05)
        return (x - abar.sqrt() * expected_clean) / (1 - abar).sqrt()

    fixed = draw(ddpm, net, (1, 50, 2), deterministic=True)
    torch.testing.assert_close(fixed, torch.ones_like(fixed), atol=0.05, rtol=0)
    drawn = draw(ddpm, net, (1, 50, 2))
    torch.testing.assert_close(drawn.abs(), torch.ones_like(drawn), atol=0.05, rtol=0)
    assert 30 < (drawn > 0).sum() < 70


def test_training_loss_is_the_noise_error(ddpm):
    target = torch.randn(64, 5, 2)
    asked = []

    def perfect(x, t):
        asked.append(t)
        return oracle(ddpm, target)(x, t)

    loss = ddpm.training_loss(perfect, target, None, ddpm.draw(target, *seeded(0)))
    assert loss.item() < 1e-6
    assert set(asked[0].tolist()) <= set(range(16))
    assert len(set(asked[0].tolist())) > 8
    draws = ddpm.draw(target, torch.Generator())
    zero = ddpm.training_loss(lambda x, t: torch.zeros_like(x), target, None, draws)
    assert zero.item() == pytest.approx(1.0, abs=0.15)


def test_training_noise_follows_the_generator(ddpm):
    target = torch.randn(4, 3, 2)

    def loss(seed):
        draws = ddpm.draw(target, *seeded(seed))
        return ddpm.training_loss(lambda x, t: x, target, None, draws).item()

    assert loss(0) == loss(0) != loss(1)


def test_padded_targets_carry_no_loss(ddpm):
    mask = torch.tensor([[True, False]])
    outs = []
    for value in (0.0, 1e6):
        target = torch.tensor([[[0.5], [value]]])
        draws = ddpm.draw(target, *seeded(0))
        outs.append(ddpm.training_loss(lambda x, t: torch.zeros_like(x), target, mask, draws))
    assert outs[0] == outs[1]


def test_it_can_be_copied(ddpm):
    other = copy.deepcopy(ddpm)
    args = (lambda x, t: 0.1 * x, (1, 2, 1))
    assert torch.equal(draw(ddpm, *args), draw(other, *args))


def test_other_lengths_and_bad_ones():
    out = draw(DDPM(4), lambda x, t: 0.1 * x, (1, 2, 1), deterministic=True)
    assert torch.isfinite(out).all()
    with pytest.raises(InvalidInputError, match="at least 1"):
        DDPM(0)
