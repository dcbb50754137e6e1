"""Training checkpoints: an artifact and the state of training, for bit-exact resume.

A run directory looks like this::

    RUN/
      checkpoints/
        step-00001000/agent.safetensors    the artifact, see :mod:`mail_agents.artifact`
        step-00001000/train_state.pt       optimiser, schedule, random streams, sampler position
        last                               text file naming the newest complete checkpoint

Everything is written beside its final place, flushed to disk and renamed, so that a run killed at
any moment, or a full disk, leaves the previous checkpoint untouched. Nothing is ever unpickled.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mail_agents.artifact import (
    ARTIFACT_NAME,
    FORMAT_VERSION,
    artifact_bytes,
    artifact_metadata,
    checksum,
    load_agent,
    read_info,
    save_agent,
)
from mail_agents.errors import CorruptFileError, InvalidInputError, StorageError
from mail_agents.storage import storing, sync_directory, write_atomic

if TYPE_CHECKING:
    from mail_agents.agent import Agent

__all__ = [
    "ARTIFACT_NAME",
    "FORMAT_VERSION",
    "STATE_NAME",
    "artifact_bytes",
    "artifact_metadata",
    "has_checkpoint",
    "last_checkpoint",
    "load_agent",
    "load_checkpoint",
    "read_info",
    "restore_training_state",
    "save_agent",
    "save_checkpoint",
    "training_state",
    "write_atomic",
]

STATE_NAME = "train_state.pt"
#: Checkpoints kept: the newest, and one to fall back to.
_KEEP = 2


def training_state(agent: "Agent") -> dict[str, Any]:
    """Everything beside the artifact that the next update depends on; tensors and primitives."""
    return {
        "format_version": FORMAT_VERSION,
        "updates": agent.updates,
        "device": agent.device.type,
        "optimizer": agent.optimizer.state_dict(),
        "scheduler": agent.scheduler.state_dict(),
        "ema": None if agent.ema is None else agent.ema.state_dict(),
        "generator": agent.generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": [torch.cuda.get_rng_state(agent.device)] if _on_cuda(agent) else [],
        "extra": agent.extra_training_state(),
    }


def restore_training_state(agent: "Agent", state: Mapping[str, Any]) -> None:
    """Puts :func:`training_state` back into an agent that was just loaded from its artifact.

    Raises:
        InvalidInputError: The state comes from another kind of device, whose random streams cannot
            be continued here.
    """
    if state["device"] != agent.device.type:
        raise InvalidInputError(
            f"This run was trained on {state['device']!r} and cannot be continued on "
            f"{agent.device.type!r}: random streams differ. Use --device {state['device']}, or "
            "start a new run."
        )
    agent.optimizer.load_state_dict(state["optimizer"])
    agent.scheduler.load_state_dict(state["scheduler"])
    if agent.ema is not None:
        agent.ema.load_state_dict(state["ema"])
    agent.generator.set_state(state["generator"])
    agent.updates = int(state["updates"])
    agent.load_extra_training_state(state.get("extra", {}))  # older checkpoints have none
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"] and _on_cuda(agent):
        torch.cuda.set_rng_state(state["cuda_rng"][0], agent.device)


def _on_cuda(agent: "Agent") -> bool:
    # Other devices are left alone: asking for their random state would start CUDA on each.
    return agent.device.type == "cuda"


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

    Raises:
        StorageError: The disk is full or cannot be written to; earlier checkpoints are intact.
        InvalidInputError: A weight is NaN or infinite.
    """
    root = Path(run) / "checkpoints"
    final = root / f"step-{step:08d}"
    with storing(final):
        root.mkdir(parents=True, exist_ok=True)
        _write_checkpoint(root, final, step, agent, loop)
    complete = sorted(path for path in root.glob("step-*") if path.is_dir())
    for old in complete[:-_KEEP]:
        if old != final:
            shutil.rmtree(old)
    return final


def _write_checkpoint(
    root: Path, final: Path, step: int, agent: "Agent", loop: Mapping[str, Any]
) -> None:
    for leftover in root.glob(".*.tmp"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    temporary = root / f".{final.name}.tmp"
    temporary.mkdir()
    try:
        save_agent(agent, temporary / ARTIFACT_NAME)
        _write_state(temporary / STATE_NAME, step, agent, loop)
        sync_directory(temporary)
        if final.exists():
            # The same step again after a resume from an older checkpoint: replace file by file, so
            # that the directory which ``last`` may already name is never absent.
            for name in (ARTIFACT_NAME, STATE_NAME):
                os.replace(temporary / name, final / name)
        else:
            os.rename(temporary, final)
        sync_directory(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_atomic(root / "last", f"{final.name}\n".encode())


def _write_state(path: Path, step: int, agent: "Agent", loop: Mapping[str, Any]) -> None:
    state = {"step": step, "agent": training_state(agent), "loop": dict(loop)}
    with open(path, "wb") as file:
        try:
            torch.save({**state, "sha256": checksum(state)}, file)
        except RuntimeError as error:  # torch's archive writer hides the OSError of a full disk
            raise StorageError(f"{path}: {error}") from error
        file.flush()
        os.fsync(file.fileno())


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
    found = root / pointer.read_text("utf-8").strip()
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
        if state.pop("sha256") != checksum(state):
            raise ValueError("its content does not match its key 'sha256'")
        updates = state["agent"]["updates"]
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CorruptFileError(
            f"{path / STATE_NAME} is truncated, altered or holds more than tensors and numbers: "
            f"{reason}. Resume from the previous checkpoint: write its name "
            f"into {path.parent / 'last'}."
        ) from error
    if updates != agent.updates:
        raise CorruptFileError(
            f"{path}: {ARTIFACT_NAME} has {agent.updates} updates, {STATE_NAME} {updates}. "
            f"Resume from the previous checkpoint: write its name into {path.parent / 'last'}."
        )
    return agent, state
