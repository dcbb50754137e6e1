import numpy as np
import pytest
import torch
from torch import nn

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
