"""Artifacts (one safetensors file, enough to act) and training checkpoints (bit-exact resume).

An artifact holds tensors under ``model/``, ``ema/`` and ``norm/``, optionally ``task_embeddings``,
and one metadata key with canonical JSON: format version, agent id, config, features, tasks, seed,
provenance and library versions. A run directory looks like this::

    RUN/
      checkpoints/
        step-00001000/agent.safetensors    the artifact
        step-00001000/train_state.pt       optimiser, schedule, random streams, sampler position
        last                               text file naming the newest complete checkpoint

Everything is written beside its final place, flushed to disk and renamed, so that a run killed at
any moment, or a full disk, leaves the previous checkpoint untouched. Nothing is ever unpickled.
"""

import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from mail_agents import __version__
from mail_agents.config import AgentConfig
from mail_agents.errors import CorruptFileError, InvalidInputError, MailAgentsError
from mail_agents.features import FeatureSpec
from mail_agents.ops.backends import used_backends
from mail_agents.registry import load_entry_point, make, spec

if TYPE_CHECKING:
    from mail_agents.agent import Agent

FORMAT_VERSION = 1
ARTIFACT_NAME = "agent.safetensors"
STATE_NAME = "train_state.pt"
_METADATA_KEY = "mail_agents"
_KEEP = 2


# ---- atomic files -----------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file completely or not at all: temporary file, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    if os.name != "posix":  # directories cannot be opened for syncing elsewhere
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- artifacts --------------------------------------------------------------------------------


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
        "provenance": {k: v for k, v in agent.provenance.items() if k != "backends"},
        "backends": _backends(agent),
        "versions": {
            "mail_agents": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _backends(agent: "Agent") -> dict[str, list[str]]:
    """Kernel backends that ran now or, for a loaded agent, before."""
    before, now = agent.provenance.get("backends", {}), used_backends()
    return {op: sorted({*before.get(op, ()), *now.get(op, ())}) for op in {**before, **now}}


def save_agent(agent: "Agent", path: str | Path) -> Path:
    """Writes an agent's artifact atomically.

    Args:
        agent: A fitted agent.
        path: File to write, by convention ``agent.safetensors``.

    Returns:
        The path.

    Raises:
        MissingStatisticsError: The agent was never fitted, so the artifact could not act.
    """
    agent._require_fitted()
    path = Path(path)
    write_atomic(path, artifact_bytes(agent))
    return path


def artifact_bytes(agent: "Agent") -> bytes:
    """Serialises an agent; equal agents give equal bytes."""
    # A single metadata key keeps the bytes reproducible: the order of several keys is not.
    text = json.dumps(artifact_metadata(agent), sort_keys=True, separators=(",", ":"))
    return to_bytes(_tensors(agent), metadata={_METADATA_KEY: text})


def read_info(path: str | Path) -> dict[str, Any]:
    """Reads an artifact's metadata without loading its tensors.

    Returns:
        The metadata, plus ``parameters`` (count of the policy's weights) and ``bytes``.

    Raises:
        CorruptFileError: Not an artifact, truncated, altered or of a newer format.
    """
    path = Path(path)
    with _open(path) as file:
        info = _metadata(path, file.metadata())
        sizes = [file.get_slice(key).get_shape() for key in file.keys() if key[:6] == "model/"]  # noqa: SIM118
    count = sum(int(torch.Size(size).numel()) for size in sizes)
    return info | {"parameters": count, "bytes": path.stat().st_size}


def _open(path: Path) -> Any:
    if path.is_dir():
        path = path / ARTIFACT_NAME
    if not path.exists():
        raise CorruptFileError(f"{path} does not exist. Expected an artifact ({ARTIFACT_NAME}).")
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
    path = Path(path)
    with _open(path) as file:
        info = _metadata(path, file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    _check_finite(path, tensors)
    agent = _rebuild(path, info, device, info["seed"] if seed is None else seed)
    _load_group(path, agent.policy, tensors, "model/")
    _load_group(path, agent.normalizers, tensors, "norm/")
    if agent.ema is not None:
        _load_group(path, agent.ema.module, tensors, "ema/")
    embeddings = tensors.pop("task_embeddings", None)
    agent.task_embeddings = None if embeddings is None else embeddings.numpy()
    if tensors:
        raise CorruptFileError(f"{path} holds tensors this agent does not have: {sorted(tensors)}.")
    agent.tasks = tuple(info["tasks"])
    agent.updates = int(info["updates"])
    agent.provenance = dict(info["provenance"]) | {"backends": info["backends"]}
    agent._require_fitted()
    agent.on_statistics()
    if weights == "raw":
        agent.ema = None
    elif weights != "ema":
        raise InvalidInputError(f"weights must be 'ema' or 'raw', got {weights!r}.")
    return agent


def _rebuild(path: Path, info: Mapping[str, Any], device: str, seed: int) -> "Agent":
    found = spec(str(info["agent"]))
    config_class = cast(type[AgentConfig], load_entry_point(found.config_entry_point))
    try:
        config = config_class.from_dict(info["config"])
        features = FeatureSpec.from_dict(info["features"])
    except (MailAgentsError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path}: config or features cannot be read: {error}") from error
    return make(found, features, config=config, device=device, seed=seed)


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CorruptFileError(
                f"{path}: tensor {key!r} holds NaN or infinity. The training run diverged or the "
                "file was altered; use an earlier checkpoint."
            )


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


# ---- training checkpoints ---------------------------------------------------------------------


def training_state(agent: "Agent") -> dict[str, Any]:
    """Everything beside the artifact that the next update depends on; tensors and primitives."""
    if agent.optimizer is None or agent.scheduler is None:
        raise InvalidInputError("Call agent.configure_optim() before saving a training checkpoint.")
    return {
        "format_version": FORMAT_VERSION,
        "updates": agent.updates,
        "optimizer": agent.optimizer.state_dict(),
        "scheduler": agent.scheduler.state_dict(),
        "ema": None if agent.ema is None else agent.ema.state_dict(),
        "generator": agent.generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_training_state(agent: "Agent", state: Mapping[str, Any]) -> None:
    """Puts :func:`training_state` back into an agent that was just loaded from its artifact."""
    if agent.optimizer is None or agent.scheduler is None:
        raise InvalidInputError("Call agent.configure_optim() before restoring a checkpoint.")
    agent.optimizer.load_state_dict(state["optimizer"])
    agent.scheduler.load_state_dict(state["scheduler"])
    if agent.ema is not None:
        agent.ema.load_state_dict(state["ema"])
    agent.generator.set_state(state["generator"])
    agent.updates = int(state["updates"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def save_checkpoint(run: str | Path, step: int, agent: "Agent", loop: Mapping[str, Any]) -> Path:
    """Writes a complete training checkpoint and points ``last`` at it.

    The newest two checkpoints are kept. Killed at any moment, ``last`` names a complete one.

    Args:
        run: Run directory.
        step: Updates done so far.
        agent: The agent in training.
        loop: The script's own state (sampler position, ...): tensors and primitives only.

    Returns:
        The checkpoint directory.
    """
    root = Path(run) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_agent(agent, temporary / ARTIFACT_NAME)
        with open(temporary / STATE_NAME, "wb") as file:
            torch.save({"step": step, "agent": training_state(agent), "loop": dict(loop)}, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(temporary)
        if final.exists():
            # The same step again after a resume from an older checkpoint: replace file by file, so
            # that the directory which ``last`` may already name is never absent.
            for name in (ARTIFACT_NAME, STATE_NAME):
                os.replace(temporary / name, final / name)
        else:
            os.rename(temporary, final)
        _sync_directory(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_atomic(root / "last", f"{final.name}\n".encode())
    complete = sorted(path for path in root.glob("step-*") if path.is_dir())
    for old in complete[:-_KEEP]:
        shutil.rmtree(old)
    return final


def has_checkpoint(run: str | Path) -> bool:
    """Whether a run ever completed a checkpoint."""
    return (Path(run) / "checkpoints" / "last").exists()


def last_checkpoint(run: str | Path) -> Path:
    """Returns the directory of the newest complete checkpoint.

    Raises:
        CorruptFileError: There is none.
    """
    root = Path(run) / "checkpoints"
    pointer = root / "last"
    if not has_checkpoint(run):
        raise CorruptFileError(f"{run} holds no complete checkpoint ({pointer} is missing).")
    found = root / pointer.read_text().strip()
    if not (found / STATE_NAME).exists():
        present = sorted(path.name for path in root.glob("step-*"))
        raise CorruptFileError(
            f"{pointer} names {found.name!r}, which is not complete. Present: {present}. To resume "
            f"from another one, write its name into {pointer}."
        )
    return found


def load_checkpoint(path: str | Path, *, device: str = "auto") -> tuple["Agent", dict[str, Any]]:
    """Loads a checkpoint directory for resuming.

    Returns:
        The agent (its optimiser not yet configured) and the stored state: call
        ``agent.configure_optim(total_steps)``, then
        ``restore_training_state(agent, state["agent"])``.

    Raises:
        CorruptFileError: A file is truncated, altered or of another kind.
    """
    path = Path(path)
    agent = load_agent(path / ARTIFACT_NAME, device=device)
    try:
        state = torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
        complete = {"step", "agent", "loop"} <= state.keys()
    except Exception as error:
        raise CorruptFileError(
            f"{path / STATE_NAME} is truncated, altered or holds more than tensors and numbers: "
            f"{str(error).splitlines()[0]}. Resume from the previous checkpoint: write its name "
            f"into {path.parent / 'last'}."
        ) from error
    if not complete or state["agent"]["updates"] != agent.updates:
        raise CorruptFileError(f"{path}: {ARTIFACT_NAME} and {STATE_NAME} are of different steps.")
    return agent, state
