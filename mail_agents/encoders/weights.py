"""Weights of a ResNet-18 from the user's own file.

Understood are the names of torchvision's ``resnet18`` (``conv1``, ``bn1``, ``layer1.0.conv1`` and
so on), alone or behind a prefix: released R3M files (Nair et al., arXiv:2203.12601) hold them as
``module.convnet.*`` under a key ``r3m``, beside a language network that is left out.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from torch import Tensor

from mail_agents.encoders.resnet import ResNet18
from mail_agents.errors import CorruptFileError, InvalidInputError

#: Keys under which training scripts put the weights in a larger file.
_WRAPPERS = ("r3m", "state_dict", "model")
_STEM = {"conv1": "stem.0", "bn1": "stem.1"}
_PARTS = {
    "conv1": "conv1",
    "bn1": "norm1",
    "conv2": "conv2",
    "bn2": "norm2",
    "downsample.0": "skip.0",
    "downsample.1": "skip.1",
}
_BLOCK = re.compile(r"layer([1-4])\.([01])\.(.+)")
#: Parts of the files that the network does without: the classifier, and a counter.
_IGNORED = re.compile(r"fc\..*|.*\.num_batches_tracked")
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class ImageWeights:
    """The tensors of a file, by torchvision's names without prefix.

    Attributes:
        path: The file.
        sha256: Checksum of its bytes, in hex.
        tensors: Tensors by name.
    """

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]


def read_image_weights(path: str | Path) -> ImageWeights:
    """Reads a file of weights without unpickling anything.

    Args:
        path: ``.safetensors``, or ``.pt``/``.pth`` that holds tensors and plain values only.

    Raises:
        InvalidInputError: The file does not exist or has another ending.
        CorruptFileError: It is damaged, would have to be unpickled, or holds no ResNet.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise InvalidInputError(
            f"image.weights={str(path)!r}: expected a file that ends in .safetensors, .pt or .pth."
        )
    if not path.is_file():
        raise InvalidInputError(
            f"image.weights={str(path)!r} does not exist (looked for {path.resolve()}). Give the "
            "path of the file; nothing is downloaded."
        )
    content = path.read_bytes()
    tensors = _strip_prefix(path, _unwrap(path, _read(path, content)))
    return ImageWeights(path, hashlib.sha256(content).hexdigest(), tensors)


def load_resnet18(trunk: ResNet18, weights: ImageWeights) -> None:
    """Copies weights into a network; FiLM layers stay as they are.

    With group normalisation the scale and shift of every batch normalisation are taken over and
    its statistics, which group normalisation has no use for, are not.

    Raises:
        CorruptFileError: Tensors are missing, unknown, of another shape or not finite; the network
            is unchanged.
    """
    own = {n: p for n, p in trunk.state_dict(keep_vars=True).items() if ".film." not in n}
    given = {_our_name(name): (name, t) for name, t in weights.tensors.items()}
    needless = [n for n in given if n.endswith(_STATISTICS) and n not in own]
    chosen = {n: pair for n, pair in given.items() if n not in needless}
    missing, unknown = sorted(own.keys() - chosen.keys()), chosen.keys() - own.keys()
    if missing or unknown:
        raise _not_resnet18(weights.path, missing, sorted(given[n][0] for n in unknown))
    for name, (theirs, tensor) in chosen.items():
        _check_tensor(weights.path, theirs, tensor, own[name])
    with torch.no_grad():
        for name, (_, tensor) in chosen.items():
            own[name].copy_(tensor)


def _read(path: Path, content: bytes) -> Any:
    if path.suffix == ".safetensors":
        try:
            return from_bytes(content)
        except Exception as error:
            raise CorruptFileError(
                f"{path} ({len(content)} bytes) is not a complete safetensors file: {error}. Copy "
                "or download it again."
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # PyTorch's own words are left out: they advise to read it with weights_only=False.
        raise CorruptFileError(
            f"{path} is damaged, or holds more than tensors, and could run code when opened; it "
            f"was refused ({type(error).__name__}). On a machine where you trust it, keep the "
            "weights alone: safetensors.torch.save_file(state_dict, 'weights.safetensors')."
        ) from error


def _unwrap(path: Path, content: Any) -> dict[str, Tensor]:
    for _ in _WRAPPERS:  # in any order
        inside = content if isinstance(content, Mapping) else {}
        found = (inside[key] for key in _WRAPPERS if isinstance(inside.get(key), Mapping))
        content = next(found, content)
    named = content if isinstance(content, Mapping) else {}
    tensors = {str(name): value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CorruptFileError(
            f"{path} holds no named tensors (found {_listed(map(str, named)) or type(content)}). "
            "Expected the state_dict of a ResNet-18."
        )
    return tensors


def _strip_prefix(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first = "conv1.weight"
    prefixes = [n.removesuffix(first) for n in tensors if n.endswith(first) and "layer" not in n]
    prefixes = sorted(p for p in prefixes if not p or p.endswith("."))
    if len(prefixes) != 1:
        found = f"several, {_listed(prefixes)}" if prefixes else f"among {_listed(tensors)}"
        raise CorruptFileError(
            f"{path}: expected one ResNet-18 with torchvision's names ('conv1.weight', "
            f"'layer1.0.conv1.weight', ...), alone or behind one prefix; found {found}."
        )
    (prefix,) = prefixes
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return {name: tensor for name, tensor in inside.items() if not _IGNORED.fullmatch(name)}


def _our_name(name: str) -> str:
    """Translates torchvision's name; a name without counterpart comes back as it is."""
    module, _, leaf = name.rpartition(".")
    if module in _STEM:
        return f"{_STEM[module]}.{leaf}"
    block = _BLOCK.fullmatch(module)
    if block is None or block[3] not in _PARTS:
        return name
    return f"blocks.{2 * (int(block[1]) - 1) + int(block[2])}.{_PARTS[block[3]]}.{leaf}"


def _check_tensor(path: Path, name: str, tensor: Tensor, own: Tensor) -> None:
    if tensor.shape != own.shape or not tensor.is_floating_point():
        raise CorruptFileError(
            f"{path}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected floats "
            f"{tuple(own.shape)} of a ResNet-18."
        )
    if not torch.isfinite(tensor).all():
        raise CorruptFileError(f"{path}: tensor {name!r} holds NaN or infinity. Use another file.")
    if name.endswith("running_var") and (tensor < 0).any():
        raise CorruptFileError(
            f"{path}: tensor {name!r} holds negative variances. Use another file."
        )


def _not_resnet18(path: Path, missing: list[str], unknown: list[str]) -> CorruptFileError:
    hint = ""
    if any(".conv3." in name or _deeper(name) for name in unknown):
        hint = " It looks like a deeper network (ResNet-34, -50, ...)."
    elif missing and all(name.endswith(_STATISTICS) for name in missing):
        hint = " It has no batch statistics: use image.norm='group'."
    return CorruptFileError(
        f"{path} does not hold a ResNet-18.{hint} Missing (our names): {_listed(missing) or 'none'}"
        f"; unknown (the file's names): {_listed(unknown) or 'none'}."
    )


def _deeper(name: str) -> bool:
    block = re.match(r"layer\d\.(\d+)\.", name)
    return block is not None and int(block[1]) > 1


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f", ... ({len(listed)})" if len(listed) > 4 else "")
