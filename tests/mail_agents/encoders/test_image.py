import numpy as np
import pytest
import torch
from torch import nn

from mail_agents.encoders.config import ImageConfig
from mail_agents.encoders.image import ResNetEncoder, SpatialSoftmax
from mail_agents.encoders.observation import ObservationEncoder
from mail_agents.errors import InvalidInputError
from mail_agents.features import Feature


def camera(height=33, width=33):
    return Feature("image", (height, width, 3), "uint8")


def images(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_count_is_the_published_one():
    with torch.device("meta"):
        assert count(ResNetEncoder(camera(128, 128), 128)) == 11_201_248
        two = ObservationEncoder({"b": camera(128, 128), "a": camera(128, 128)}, 128)
    assert count(two) == 22_402_496
    assert two.out_dim == 256


def test_group_norm_replaces_batch_norm():
    with torch.device("meta"):
        encoder = ResNetEncoder(camera(), 128)
    norms = [m for m in encoder.modules() if isinstance(m, nn.GroupNorm)]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    assert len(norms) == 20
    assert {m.num_channels: m.num_groups for m in norms} == {64: 4, 128: 8, 256: 16, 512: 32}


def test_feature_map_and_output_shape_at_128_pixels():
    encoder = ResNetEncoder(camera(128, 128), 128)
    with torch.inference_mode():
        assert encoder.trunk(torch.zeros(1, 3, 128, 128)).shape == (1, 512, 4, 4)
        assert encoder(images(1, 2, 128, 128)).shape == (1, 2, 128)


@pytest.mark.parametrize("size", [(33, 33), (40, 100), (64, 47)])
def test_any_size_above_32_pixels_and_not_square(size):
    with torch.inference_mode():
        out = ResNetEncoder(camera(*size), 8)(images(2, 1, *size))
    assert out.shape == (2, 1, 8)
    assert torch.isfinite(out).all()


def test_frames_are_encoded_independently_of_their_place():
    encoder = ResNetEncoder(camera(), 8).eval()
    x = images(2, 3, 33, 33)
    with torch.inference_mode():
        whole, alone = encoder(x), encoder(x[1:, 2:])
    torch.testing.assert_close(whole[1, 2], alone[0, 0])


def test_scaling_is_imagenet_on_zero_to_one():
    encoder = ResNetEncoder(camera(), 8)
    seen = []
    encoder.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        encoder(torch.full((1, 1, 33, 33, 3), 255, dtype=torch.uint8))
    expected = [
        (1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ]
    torch.testing.assert_close(seen[0][0, :, 5, 7], torch.tensor(expected))


def test_spatial_softmax_finds_the_peak_as_x_then_y():
    pool = SpatialSoftmax(1, keypoints=1)
    nn.init.constant_(pool.score.weight, 100.0)
    x = torch.zeros(1, 1, 5, 9)
    x[0, 0, 4, 2] = 1.0  # bottom row; column 2 of 0..8 is x = -0.5
    torch.testing.assert_close(pool(x), torch.tensor([[[-0.5, 1.0]]]))


def test_keypoints_keep_single_precision_under_autocast():
    torch.manual_seed(0)
    pool, x = SpatialSoftmax(4, keypoints=3), torch.randn(2, 4, 30, 40)
    plain = pool(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = pool(x)
        scores = pool.score(x).float().flatten(2)
    assert scores.dtype == mixed.dtype == torch.float32
    ys, xs = torch.linspace(-1, 1, 30).double(), torch.linspace(-1, 1, 40).double()
    weights = scores.double().softmax(-1).unflatten(-1, (30, 40))
    exact = torch.stack(((weights.sum(2) * xs).sum(-1), (weights.sum(3) * ys).sum(-1)), -1)
    # Only the scores are rounded to half precision, not the weights and not the coordinates.
    assert (mixed - exact).abs().max() < 1e-6
    assert (mixed - plain).abs().max() < 2e-3


def test_the_smallest_camera_still_learns():
    encoder = ResNetEncoder(camera(), 8)
    encoder(images(2, 1, 33, 33)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_float_images_and_other_sizes_are_refused():
    encoder = ResNetEncoder(camera(), 8)
    with pytest.raises(InvalidInputError, match="uint8"):
        encoder(torch.zeros(1, 1, 33, 33, 3))
    with pytest.raises(InvalidInputError, match=r"\(1, 1, 33, 48, 3\)"):
        encoder(images(1, 1, 33, 48))
    with pytest.raises(InvalidInputError, match="at least 33x33"):
        ResNetEncoder(camera(32, 64), 8)
    with pytest.raises(InvalidInputError, match="RGB"):
        ResNetEncoder(Feature("image", (64, 64, 1), "uint8"), 8)


def test_cameras_start_identical_and_are_concatenated_alphabetically():
    encoder = ObservationEncoder({"z": camera(), "a": camera()}, 4).eval()
    first, second = encoder.encoders
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p is not q
    with torch.inference_mode():
        dark, light = images(1, 1, 33, 33, seed=1), images(1, 1, 33, 33, seed=2)
        out = encoder({"z": dark, "a": light})
        torch.testing.assert_close(out[..., :4], first(light))
        torch.testing.assert_close(out[..., 4:], first(dark))


def test_unsupported_kinds_are_named():
    with pytest.raises(InvalidInputError, match="'cloud' is of kind 'pointcloud'"):
        ObservationEncoder({"cloud": Feature("pointcloud", (16, 3), "float32")}, 4)


def test_acting_cuts_the_middle_and_training_a_random_place():
    encoder = ResNetEncoder(camera(48, 64), 8, ImageConfig(crop=40)).eval()
    x = images(2, 1, 48, 64)
    seen = []
    encoder.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        centre = encoder(x)
        assert seen[0].shape == (2, 3, 40, 40)
        whole = ResNetEncoder(camera(40, 40), 8).eval()
        whole.load_state_dict(encoder.state_dict())
        torch.testing.assert_close(centre, whole(x[:, :, 4:44, 12:52]))
        drawn = [
            encoder(x, None, encoder.draw(x, torch.Generator().manual_seed(s))) for s in (0, 0, 1)
        ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_jitter_changes_training_images_only():
    encoder = ResNetEncoder(camera(), 8, ImageConfig(jitter=0.3)).eval()
    plain = ResNetEncoder(camera(), 8).eval()
    plain.load_state_dict(encoder.state_dict())
    x = images(2, 1, 33, 33)
    with torch.inference_mode():
        assert torch.equal(encoder(x), plain(x))
        drawn = encoder.draw(x, torch.Generator().manual_seed(0))
        assert not torch.equal(encoder(x, None, drawn), plain(x))


def test_condition_of_a_window_reaches_all_its_frames():
    encoder = ResNetEncoder(camera(), 8, condition=3).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".film." in name:
                parameter.normal_(std=0.5)
    x, condition = images(2, 2, 33, 33), torch.randn(2, 3)
    with torch.inference_mode():
        out = encoder(x, condition)
        for window in range(2):
            for frame in range(2):
                alone = encoder(x[window, frame][None, None], condition[window][None])
                torch.testing.assert_close(out[window, frame], alone[0, 0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(out, encoder(x, condition.flip(0)))


def test_shared_cameras_are_one_network_and_others_their_own():
    features = {
        "a": camera(),
        "b": camera(),
        "c": camera(40, 40),
        "s": Feature("state", (3,), "f4"),
    }
    with torch.device("meta"):
        apart = ObservationEncoder(features, 4)
        shared = ObservationEncoder(features, 4, ImageConfig(shared=True))
    assert [len(e.trunks()) for e in (apart, shared)] == [3, 2]
    assert count(apart) - count(shared) == count(shared.encoders[0])
    assert shared.encoder_of == [0, 0, 1, 2]
    assert shared.out_dim == 16


def test_a_shared_network_sees_every_camera():
    encoder = ObservationEncoder({"a": camera(), "b": camera()}, 4, ImageConfig(shared=True)).eval()
    a, b = images(1, 1, 33, 33, seed=1), images(1, 1, 33, 33, seed=2)
    with torch.inference_mode():
        out, swapped = encoder({"a": a, "b": b}), encoder({"a": b, "b": a})
    torch.testing.assert_close(out[..., :4], swapped[..., 4:])
    assert not torch.allclose(out[..., :4], out[..., 4:])


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(InvalidInputError, match=r"image\.crop=50 is larger than the camera, 48x64"):
        ResNetEncoder(camera(48, 64), 8, ImageConfig(crop=50))
    with pytest.raises(InvalidInputError, match="at least 33"):
        ImageConfig(crop=32)
    with pytest.raises(InvalidInputError, match="jitter"):
        ImageConfig(jitter=1.0)
    with pytest.raises(InvalidInputError, match=r"needs image\.weights"):
        ImageConfig(norm="batch_frozen")
    states = {"s": Feature("state", (3,), "float32")}
    for settings in ({"image": ImageConfig(crop=40)}, {"condition": 3}):
        with pytest.raises(InvalidInputError, match="no images among the observations"):
            ObservationEncoder(states, 4, **settings)
