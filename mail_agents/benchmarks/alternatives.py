"""What we are compared with, when it is installed: mambapy, transformers, the official package.

``pip install 'mail-agents[benchmark]'`` brings the first two. The official package is built without
its CUDA kernels by :data:`OFFICIAL_COMMAND`; its pure-torch functions are what a CPU can run.
"""

import functools
import importlib
import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch

EXTRA_COMMAND = "pip install 'mail-agents[benchmark]'"
#: Without its kernels, and thus without nvcc. Not for a GPU machine, where pip would reuse the
#: result: see docs/install.md for a build with kernels.
OFFICIAL_COMMAND = (
    "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-deps "
    "--no-build-isolation --no-cache-dir mamba-ssm==2.3.2.post1 einops triton"
)
_KERNELS = "selective_scan_cuda"


class Found(NamedTuple):
    """An alternative's modules, or why they are not there and how to get them."""

    modules: dict[str, ModuleType]
    absent: str

    def __getattr__(self, name: str) -> Any:
        try:
            return self.modules[name]
        except KeyError:
            raise AttributeError(name) from None


def _failure(name: str, error: Exception, command: str) -> Found:
    known = isinstance(error, ModuleNotFoundError)
    why = "not installed" if known else f"cannot be imported ({type(error).__name__}: {error})"
    return Found({}, f"{name}: {why}: {command}")


@functools.cache
def mambapy() -> Found:
    """Modules ``pscan`` and ``mamba`` of mambapy."""
    try:
        modules = {name: importlib.import_module(f"mambapy.{name}") for name in ("pscan", "mamba")}
    except Exception as error:
        return _failure("mambapy", error, EXTRA_COMMAND)
    return Found(modules, "")


@functools.cache
def transformers() -> Found:
    """``package``, ``mamba`` and ``mamba2`` of transformers, whose functions are pure torch.

    Where a mamba_ssm with kernels is installed, transformers uses that and has no slow path.
    """
    try:
        package = importlib.import_module("transformers")
        mamba = importlib.import_module("transformers.models.mamba.modeling_mamba")
        mamba2 = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    except Exception as error:
        return _failure("transformers", error, EXTRA_COMMAND)
    if not hasattr(mamba, "mamba_selective_scan"):
        return Found({}, f"transformers: {package.__version__} is too old: {EXTRA_COMMAND}")
    if "mamba_ssm" in sys.modules:
        return Found({}, "transformers: takes the kernels of mamba_ssm here, not its slow path")
    package.logging.set_verbosity_error()
    return Found({"package": package, "mamba": mamba, "mamba2": mamba2}, "")


@functools.cache
def official() -> Found:
    """``scan``, ``mamba`` and ``ssd`` of mamba_ssm: with its kernels, or without on a CPU.

    Without kernels the package does not import: an empty module stands in for them meanwhile, and
    afterwards ``sys.modules`` is what it was, so that nobody takes the package for a working one.
    """
    transformers()  # decides between kernels and torch when it is imported: before the stand-in
    names = {
        "scan": "mamba_ssm.ops.selective_scan_interface",
        "mamba": "mamba_ssm.modules.mamba_simple",
        "ssd": "mamba_ssm.modules.ssd_minimal",
    }
    before = set(sys.modules)
    stubbed = _needs_stub()
    if stubbed:
        sys.modules[_KERNELS] = ModuleType(_KERNELS)
    try:
        modules = {short: importlib.import_module(name) for short, name in names.items()}
    except Exception as error:
        return _failure("mamba_ssm", error, OFFICIAL_COMMAND)
    finally:
        if stubbed:
            del sys.modules[_KERNELS]
            for name in set(sys.modules) - before:
                if name.split(".")[0] == "mamba_ssm":
                    del sys.modules[name]
    if stubbed or not torch.cuda.is_available():
        # Triton imports on a CPU and cannot run there; without it the modules use torch.
        modules["mamba"].selective_state_update = None  # type: ignore[attr-defined]
    return Found(modules, "")


def _needs_stub() -> bool:
    try:
        importlib.import_module(_KERNELS)
    except Exception:
        return True
    return False


def absences(*found: Found) -> list[str]:
    """One line per alternative that is not there."""
    return [each.absent for each in found if each.absent]
