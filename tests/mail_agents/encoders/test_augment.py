import colorsys

import numpy as np
import pytest
import torch

from mail_agents.encoders.augment import (
    center_crop,
    color_jitter,
    crop,
    draw_crop,
    draw_jitter,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_crop(x, size, generator):
    return crop(x, size, draw_crop(x, size, generator))


def random_jitter(x, strength, generator):
    return color_jitter(x, draw_jitter(x, strength, generator))


def numbered(batch, frames, height, width):
    """Every pixel holds its window, row and column."""
    index = torch.meshgrid(*map(torch.arange, (batch, height, width)), indexing="ij")
    return torch.stack(index, dim=-1)[:, None].expand(-1, frames, -1, -1, -1)


def test_center_crop_takes_the_middle():
    out = center_crop(numbered(2, 1, 7, 10), 4)
    assert out.shape == (2, 1, 4, 4, 3)
    assert out[0, 0, 0, 0, 1:].tolist() == [1, 3]


def test_random_crop_cuts_one_square_per_window_out_of_all_its_frames():
    out = random_crop(numbered(64, 3, 9, 6), 4, generator())
    assert out.shape == (64, 3, 4, 4, 3)
    assert torch.equal(out[..., 0], torch.arange(64).view(-1, 1, 1, 1).expand(64, 3, 4, 4))
    corner = out[:, :, :1, :1, 1:]
    assert torch.equal(corner, corner[:, :1].expand_as(corner))
    steps = out[..., 1:] - corner
    assert torch.equal(steps[..., 0], torch.arange(4).view(4, 1).expand(64, 3, 4, 4))
    assert torch.equal(steps[..., 1], torch.arange(4).expand(64, 3, 4, 4))
    tops, lefts = corner[:, 0, 0, 0].unbind(dim=-1)
    assert set(tops.tolist()) == set(range(6))
    assert set(lefts.tolist()) == set(range(3))


def test_a_crop_of_full_size_changes_nothing():
    x = numbered(3, 2, 5, 5)
    assert torch.equal(random_crop(x, 5, generator()), x)
    assert torch.equal(center_crop(x, 5), x)


@pytest.mark.parametrize("augment", [random_crop, random_jitter])
def test_the_generator_alone_decides(augment):
    x = torch.rand(5, 2, 8, 8, 3, generator=generator(1))
    strength = 5 if augment is random_crop else 0.4
    before = torch.get_rng_state()
    first, again = (augment(x, strength, generator(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, augment(x, strength, generator(4)))


def test_jitter_is_one_transformation_per_window_and_stays_in_range():
    frame = torch.rand(1, 1, 6, 6, 3, generator=generator(1))
    out = random_jitter(frame.expand(8, 3, -1, -1, -1), 0.5, generator(2))
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert out.min() >= 0.0
    assert out.max() <= 1.0
    means = out.mean(dim=(1, 2, 3, 4))
    assert len(set(means.tolist())) == 8


def test_jitter_factors_are_those_of_a_photograph():
    # Brightness multiplies, contrast keeps the mean grey, saturation keeps the hue.
    x = 0.25 + 0.25 * torch.rand(40, 1, 4, 4, 3, generator=generator(1))
    strength = 0.2
    out = random_jitter(x, strength, generator(2))
    draws = torch.rand(3, 40, generator=generator(2))
    brightness = 1.0 + strength * (2.0 * draws[0] - 1.0)
    luma = x.new_tensor([0.299, 0.587, 0.114])
    grey, grey_out = ((y @ luma).mean(dim=(1, 2, 3)) for y in (x, out))
    torch.testing.assert_close(grey_out, brightness * grey, atol=2e-3, rtol=0)
    strongest = torch.tensor([[0.5, 0.3, 0.3]]).view(1, 1, 1, 1, 3).expand(9, 1, 2, 2, 3)
    hues = [
        colorsys.rgb_to_hsv(*np.asarray(p))[0]
        for p in random_jitter(strongest, 0.3, generator(5)).flatten(0, 3).tolist()
    ]
    assert max(min(h, 1 - h) for h in hues) < 1e-3


def test_no_jitter_changes_nothing():
    x = torch.rand(2, 1, 4, 4, 3, generator=generator(1))
    torch.testing.assert_close(random_jitter(x, 0.0, generator()), x)
