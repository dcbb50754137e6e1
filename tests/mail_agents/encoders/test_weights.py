import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from mail_agents.encoders.resnet import ResNet18
from mail_agents.encoders.weights import load_resnet18, read_image_weights
from mail_agents.errors import CorruptFileError, InvalidInputError

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))


def norm_tensors(name, channels, g):
    return {
        f"{name}.weight": 1.0 + 0.2 * torch.randn(channels, generator=g),
        f"{name}.bias": 0.2 * torch.randn(channels, generator=g),
        f"{name}.running_mean": 0.2 * torch.randn(channels, generator=g),
        f"{name}.running_var": 0.5 + torch.rand(channels, generator=g),
        f"{name}.num_batches_tracked": torch.tensor(7),
    }


@pytest.fixture(scope="module")
def theirs():
    """A ResNet-18 with batch normalisation under torchvision's names, random."""
    g = torch.Generator().manual_seed(0)

    def conv(outputs, inputs, kernel):
        fan = inputs * kernel * kernel
        return torch.randn(outputs, inputs, kernel, kernel, generator=g) * (2.0 / fan) ** 0.5

    out = {"conv1.weight": conv(64, 3, 7), **norm_tensors("bn1", 64, g)}
    inputs = 64
    for stage, (channels, stride) in enumerate(STAGES, 1):
        for index in (0, 1):
            at = f"layer{stage}.{index}"
            out[f"{at}.conv1.weight"] = conv(channels, channels if index else inputs, 3)
            out[f"{at}.conv2.weight"] = conv(channels, channels, 3)
            out |= norm_tensors(f"{at}.bn1", channels, g) | norm_tensors(f"{at}.bn2", channels, g)
            if index == 0 and stride == 2:
                out[f"{at}.downsample.0.weight"] = conv(channels, inputs, 1)
                out |= norm_tensors(f"{at}.downsample.1", channels, g)
        inputs = channels
    return out | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


def features(w, x):
    """The feature map of torchvision's resnet18 in evaluation mode, written out."""

    def norm(y, at):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(y, *(w[f"{at}.{name}"] for name in names))

    y = F.conv2d(x, w["conv1.weight"], stride=2, padding=3)
    y = F.max_pool2d(norm(y, "bn1").relu(), 3, 2, 1)
    for stage, (_, stride) in enumerate(STAGES, 1):
        for index in (0, 1):
            at, step = f"layer{stage}.{index}", 1 if index else stride
            z = F.conv2d(y, w[f"{at}.conv1.weight"], stride=step, padding=1)
            z = F.conv2d(norm(z, f"{at}.bn1").relu(), w[f"{at}.conv2.weight"], padding=1)
            if f"{at}.downsample.0.weight" in w:
                y = norm(
                    F.conv2d(y, w[f"{at}.downsample.0.weight"], stride=step), f"{at}.downsample.1"
                )
            y = (norm(z, f"{at}.bn2") + y).relu()
    return y


def as_r3m(tensors):
    inside = {f"module.convnet.{n}": t for n, t in tensors.items() if not n.startswith("fc")}
    return {"r3m": inside | {"module.lang_rew.0.weight": torch.zeros(2, 2)}, "global_step": 5}


def write(path, tensors):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_frozen_batch_norm_gives_the_features_of_the_file(theirs, tmp_path, form):
    content = theirs if form == "safetensors" else as_r3m(theirs)
    path = write(tmp_path / f"resnet18.{form}", content)
    weights = read_image_weights(path)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    trunk = ResNet18("batch_frozen", condition=3)
    load_resnet18(trunk, weights)
    x = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out, expected = trunk(x, torch.ones(2, 3)), features(theirs, x)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


def test_group_norm_takes_scales_and_shifts_and_half_precision_is_read(theirs, tmp_path):
    half = {n: t.half() for n, t in theirs.items() if t.is_floating_point()}
    trunk = ResNet18()
    load_resnet18(trunk, read_image_weights(write(tmp_path / "a.safetensors", half)))
    own = trunk.state_dict()
    for ours, name in {
        "stem.0.weight": "conv1.weight",
        "stem.1.bias": "bn1.bias",
        "blocks.5.norm2.weight": "layer3.1.bn2.weight",
        "blocks.2.skip.1.bias": "layer2.0.downsample.1.bias",
    }.items():
        assert torch.equal(own[ours], half[name].float())
    assert own["stem.0.weight"].dtype == torch.float32
    assert all(p.requires_grad for p in trunk.parameters())


def broken(theirs, kind):
    """A small change of the file, and what the message must say."""
    if kind == "missing":
        return {n: t for n, t in theirs.items() if n != "layer2.1.conv2.weight"}
    if kind == "unknown":
        return theirs | {"attention.weight": torch.zeros(2)}
    if kind == "deeper":
        return theirs | {"layer3.2.conv1.weight": torch.zeros(2)}
    if kind == "shape":
        return theirs | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    if kind == "nan":
        return theirs | {"bn1.bias": torch.full((64,), torch.nan)}
    if kind == "negative":
        return theirs | {"bn1.running_var": -theirs["bn1.running_var"]}
    if kind == "integers":
        return theirs | {"bn1.bias": torch.zeros(64, dtype=torch.int64)}
    if kind == "no statistics":
        return {n: t for n, t in theirs.items() if "running" not in n}
    return {"other.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"Missing \(our names\): blocks\.3\.conv2\.weight"),
        ("unknown", r"unknown \(the file's names\): attention\.weight"),
        ("deeper", "looks like a deeper network"),
        ("shape", r"'layer1\.0\.conv1\.weight' is torch\.float32 \(64, 64, 1, 1\)"),
        ("nan", "'bn1.bias' holds NaN"),
        ("negative", "'bn1.running_var' holds negative variances"),
        ("integers", "expected floats"),
        ("no statistics", r"use image\.norm='group'"),
        ("another network", "torchvision's names"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_change_nothing(theirs, tmp_path, kind, message):
    path = write(tmp_path / "a.safetensors", broken(theirs, kind))
    trunk = ResNet18("batch_frozen")
    before = {n: t.clone() for n, t in trunk.state_dict().items()}
    with pytest.raises(CorruptFileError, match=message):
        load_resnet18(trunk, read_image_weights(path))
    assert all(torch.equal(t, before[n]) for n, t in trunk.state_dict().items())


class Surprise:
    """Unpickling it would run a function."""

    def __reduce__(self):
        return (print, ("executed",))


def test_pickles_are_refused_without_running_them(tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(2), "more": Surprise()}, tmp_path / "a.pt")
    with pytest.raises(CorruptFileError, match=r"could run code.*\n?.*save_file"):
        read_image_weights(tmp_path / "a.pt")
    assert "executed" not in capsys.readouterr().out


def test_damaged_absent_and_foreign_files(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no tensors here")
    (tmp_path / "a.pt").write_bytes(b"no tensors here")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("a.safetensors", "a.pt", "list.pt"):
        with pytest.raises(CorruptFileError, match=name) as raised:
            read_image_weights(tmp_path / name)
        assert "weights_only" not in str(raised.value)  # PyTorch advises to switch it off
    with pytest.raises(InvalidInputError, match=r"does not exist.*nothing is downloaded"):
        read_image_weights(tmp_path / "b.pt")
    with pytest.raises(InvalidInputError, match=r"ends in \.safetensors"):
        read_image_weights("resnet18.onnx")


@pytest.mark.parametrize("keys", [("model", "state_dict"), ("state_dict", "r3m"), ("model", "r3m")])
@pytest.mark.parametrize("order", [1, -1])
def test_wrappers_may_be_nested_in_any_order(theirs, tmp_path, keys, order):
    content = {"conv1.weight": theirs["conv1.weight"]}
    for key in keys[::order]:
        content = {key: content}
    weights = read_image_weights(write(tmp_path / "a.pt", content))
    assert list(weights.tensors) == ["conv1.weight"]


def test_a_prefix_must_be_unique(theirs, tmp_path):
    two = {f"{at}.conv1.weight": theirs["conv1.weight"].clone() for at in ("left", "right")}
    with pytest.raises(CorruptFileError, match=r"several, left\., right\."):
        read_image_weights(write(tmp_path / "a.safetensors", two))
