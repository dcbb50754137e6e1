"""Shared by every test: nothing outside the temporary directory is written or read."""

import os
import sys
from pathlib import Path

import pytest

# Two workers on two cores: more threads per worker only make them wait for each other. Set before
# torch or numpy are imported by the first test module.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def isolated_roots(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Redirects every data set, cache and run root to a temporary directory."""
    root = tmp_path_factory.mktemp("roots")
    for variable in (
        "MINARI_DATASETS_PATH",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "LIBERO_CONFIG_PATH",
        "HF_HOME",
        "TORCH_HOME",
        "MPLCONFIGDIR",
    ):
        monkeypatch.setenv(variable, str(root / variable.lower()))
    for variable in [name for name in os.environ if name.startswith("MAIL_AGENTS_")]:
        monkeypatch.delenv(variable)
    return root


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Keeps sums in one order, so that "equal to the last bit" means what it says."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY
