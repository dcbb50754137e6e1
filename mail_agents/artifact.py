"""Artifacts: one safetensors file that is enough to act.

It holds tensors under ``model/``, ``ema/`` and ``norm/``, optionally ``task_embeddings``, and one
metadata key with canonical JSON: format version, agent id, config, features, tasks, seed,
provenance, backends, library versions, and a checksum of all of it and of the tensors. Provenance
is what it was trained on, and ``target_returns``, the returns it was scored under, where a script
gave some. Opening one never unpickles anything.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from mail_agents import __version__
from mail_agents.config import AgentConfig
from mail_agents.errors import (
    CorruptFileError,
    InvalidInputError,
    MailAgentsError,
    UnknownNameError,
)
from mail_agents.features import FeatureSpec
from mail_agents.registry import load_entry_point, make, spec
from mail_agents.storage import write_atomic

if TYPE_CHECKING:
    from mail_agents.agent import Agent

#: Newest format that is read, and the one that is written.
FORMAT_VERSION = 1
ARTIFACT_NAME = "agent.safetensors"
_METADATA_KEY = "mail_agents"
_METADATA_KINDS = {
    "agent": str,
    "config": dict,
    "features": dict,
    "tasks": list,
    "seed": int,
    "updates": int,
    "provenance": dict,
    "backends": dict,
    "sha256": str,
}


def checksum(value: Any) -> str:
    """Returns the SHA-256 of nested mappings and sequences of tensors and primitives, in hex."""
    digest = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, Tensor):
            flat = item.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{item.dtype}{tuple(item.shape)};".encode())
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(item, Mapping):
            digest.update(f"{len(item)} keys;".encode())
            for key in sorted(item, key=repr):
                feed(key)
                feed(item[key])
        elif isinstance(item, (list, tuple)):
            digest.update(f"{len(item)} items;".encode())
            for entry in item:
                feed(entry)
        else:
            digest.update(f"{item!r};".encode())

    feed(value)
    return digest.hexdigest()


def _tensors(agent: "Agent") -> dict[str, Tensor]:
    groups = {"model": agent.policy, "norm": agent.normalizers}
    if agent.ema is not None:
        groups["ema"] = agent.ema.module
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous().clone()
        for group, module in groups.items()
        for name, tensor in module.state_dict().items()
    }
    if agent.task_embeddings is not None:
        tensors["task_embeddings"] = torch.from_numpy(agent.task_embeddings).clone()
    return tensors


def artifact_metadata(agent: "Agent") -> dict[str, Any]:
    """What an artifact says about itself, JSON-ready."""
    return {
        "format_version": FORMAT_VERSION,
        "agent": agent.agent_id,
        "config": agent.config.to_dict(),
        "features": agent.features.to_dict(),
        "tasks": list(agent.tasks),
        "seed": agent.seed,
        "updates": agent.updates,
        "provenance": agent.provenance,
        "backends": {op: sorted(names) for op, names in agent.backends.items()},
        "versions": {
            "mail_agents": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def save_agent(agent: "Agent", path: str | Path) -> Path:
    """Writes an agent's artifact atomically.

    Args:
        agent: A fitted agent.
        path: File to write, by convention ``agent.safetensors``.

    Returns:
        The path.

    Raises:
        MissingStatisticsError: The agent was never fitted, so the artifact could not act.
        InvalidInputError: A weight is NaN or infinite, so the artifact could not be loaded.
        StorageError: The file could not be written; an older one in its place stays.
    """
    agent.require_fitted()
    path = Path(path)
    broken = _not_finite(_tensors(agent))
    if broken:
        raise InvalidInputError(
            f"{path} was not written: {broken!r} holds NaN or infinity. The training run diverged; "
            "lower optim.lr or set optim.grad_clip."
        )
    write_atomic(path, artifact_bytes(agent))
    return path


def artifact_bytes(agent: "Agent") -> bytes:
    """Serialises an agent; equal agents give equal bytes."""
    tensors, info = _tensors(agent), artifact_metadata(agent)
    # Through JSON, so that the checksum is of what a reader will see (tuples become lists).
    info = json.loads(json.dumps(info))
    info["sha256"] = checksum([info, tensors])
    # A single metadata key keeps the bytes reproducible: the order of several keys is not.
    text = json.dumps(info, sort_keys=True, separators=(",", ":"))
    return to_bytes(tensors, metadata={_METADATA_KEY: text})


def read_info(path: str | Path) -> dict[str, Any]:
    """Reads an artifact's metadata without loading its tensors.

    Returns:
        The metadata, plus ``parameters`` (count of the policy's weights) and ``bytes``.

    Raises:
        CorruptFileError: Not an artifact, truncated, altered or of a newer format.
    """
    path = _artifact_path(path)
    with _open(path) as file:
        info = _metadata(path, file.metadata())
        sizes = [file.get_slice(key).get_shape() for key in file.keys() if key[:6] == "model/"]  # noqa: SIM118
    count = sum(int(torch.Size(size).numel()) for size in sizes)
    return info | {"parameters": count, "bytes": path.stat().st_size}


def _artifact_path(path: str | Path) -> Path:
    path = Path(path)
    return path / ARTIFACT_NAME if path.is_dir() else path


def _open(path: Path) -> Any:
    if not path.exists():
        raise CorruptFileError(
            f"{path} does not exist. Expected an artifact ({ARTIFACT_NAME}) or a directory that "
            "holds one: a finished run, or one of its checkpoints (RUN/checkpoints/step-...)."
        )
    with open(path, "rb") as file:
        head = file.read(9)
    # A safetensors file starts with the length of its JSON header, then the header itself.
    if head[8:] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):
        raise CorruptFileError(
            f"{path} is a pickle (or a torch archive), which could run code when opened; it was "
            "refused. Expected a safetensors artifact written by agent.save(path)."
        )
    try:
        return safetensors.safe_open(path, framework="pt")
    except Exception as error:
        raise CorruptFileError(
            f"{path} is not a complete safetensors file ({path.stat().st_size} bytes): {error}. "
            "It is truncated or of another kind; use the previous checkpoint or save again."
        ) from error


def _metadata(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if not metadata or _METADATA_KEY not in metadata:
        raise CorruptFileError(
            f"{path} is a safetensors file but not an agent artifact: metadata key "
            f"{_METADATA_KEY!r} is missing. Write artifacts with agent.save(path)."
        )
    try:
        info = json.loads(metadata[_METADATA_KEY])
        version = int(info["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path}: unreadable artifact metadata: {error!r}.") from error
    if version > FORMAT_VERSION:
        raise CorruptFileError(
            f"{path} has format version {version}, this installation reads up to {FORMAT_VERSION}. "
            "Upgrade with: pip install --upgrade mail-agents"
        )
    for key, kind in _METADATA_KINDS.items():
        if not isinstance(info.get(key), kind):
            raise CorruptFileError(
                f"{path}: metadata key {key!r} is {info.get(key)!r}, expected a {kind.__name__}. "
                "The file was altered; use another checkpoint or save again."
            )
    return info


def load_agent(
    path: str | Path,
    *,
    device: str = "auto",
    weights: Literal["ema", "raw"] = "ema",
    seed: int | None = None,
) -> "Agent":
    """Loads an artifact; the agent can act at once.

    Args:
        path: File written by :func:`save_agent`, or a checkpoint directory.
        device: ``"auto"`` or a torch device name.
        weights: ``"ema"`` acts with the averaged weights where the agent has them; ``"raw"`` with
            the trained ones.
        seed: Root seed of the acting noise; None takes the one it was trained with.

    Raises:
        CorruptFileError: The file is truncated, altered, of another kind, or its tensors do not
            fit its config (the message names the key).
        UnknownNameError: The agent id is not registered here (a plugin is not installed).
    """
    if weights not in ("ema", "raw"):
        raise InvalidInputError(f"weights must be 'ema' or 'raw', got {weights!r}.")
    path = _artifact_path(path)
    with _open(path) as file:
        info = _metadata(path, file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    broken = _not_finite(tensors)
    if broken:
        raise CorruptFileError(
            f"{path}: tensor {broken!r} holds NaN or infinity. The training run diverged or the "
            "file was altered; use an earlier checkpoint."
        )
    digest = checksum([{k: v for k, v in info.items() if k != "sha256"}, tensors])
    agent = _rebuild(path, info, device, info["seed"] if seed is None else seed)
    _load_group(path, agent.policy, tensors, "model/")
    _load_group(path, agent.normalizers, tensors, "norm/")
    if agent.ema is not None:
        _load_group(path, agent.ema.module, tensors, "ema/")
    embeddings = tensors.pop("task_embeddings", None)
    agent.task_embeddings = None if embeddings is None else embeddings.numpy()
    if tensors:
        raise CorruptFileError(f"{path} holds tensors this agent does not have: {sorted(tensors)}.")
    # Last, so that an altered file is refused for its most telling defect.
    if digest != info["sha256"]:
        raise CorruptFileError(
            f"{path}: key 'sha256' is {info['sha256'][:12]}..., but the content has "
            f"{digest[:12]}...: a weight or a setting was altered after the file was written. Copy "
            "the file again, or use another checkpoint."
        )
    agent.policy.eval()  # until it is trained again
    agent.tasks = tuple(info["tasks"])
    agent.updates = int(info["updates"])
    agent.provenance = dict(info["provenance"])
    agent.backends = {op: set(names) for op, names in info["backends"].items()}
    agent.require_fitted()
    agent.on_statistics()
    if weights == "raw":
        agent.ema = None
        # What is saved from here on has no average, and its config must say so.
        agent.config = agent.config.replace({"ema_decay": None})
    return agent


def _rebuild(path: Path, info: Mapping[str, Any], device: str, seed: int) -> "Agent":
    if ":" in info["agent"]:  # in an id, what stands before a colon is imported
        raise CorruptFileError(
            f"{path}: key 'agent' is {info['agent']!r}; an artifact holds a plain id, without a "
            "module to import. The file was altered."
        )
    try:
        found = spec(info["agent"])
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{path} holds an agent that is not registered here. {error} Install the package that "
            "provides it."
        ) from error
    config_class = cast(type[AgentConfig], load_entry_point(found.config_entry_point))
    try:
        config = config_class.from_dict(info["config"])
        features = FeatureSpec.from_dict(info["features"])
    except (MailAgentsError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path}: config or features cannot be read: {error}") from error
    return make(found, features, config=config, device=device, seed=seed)


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the first key whose tensor holds NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return key
    return None


def _load_group(path: Path, module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    """Moves the tensors of one group into a module, strictly."""
    group = {key: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
    expected = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    missing, extra = sorted(expected.keys() - group.keys()), sorted(group.keys() - expected.keys())
    if missing or extra:
        raise CorruptFileError(f"{path}: missing tensors {missing[:5]}, unexpected {extra[:5]}.")
    for key, tensor in group.items():
        if tensor.shape != expected[key].shape or tensor.dtype != expected[key].dtype:
            raise CorruptFileError(
                f"{path}: tensor {key!r} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{expected[key].dtype} {tuple(expected[key].shape)} from the stored config."
            )
    module.load_state_dict({key.removeprefix(prefix): value for key, value in group.items()})
