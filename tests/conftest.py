"""Shared by every test: nothing outside the temporary directory is written or read."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
IMPORT_ROOTS = [str(REPOSITORY / folder) for folder in ("", "envs", "wrappers", "baselines")]
THIRD_PARTY = REPOSITORY / "tests" / "third_party"

# A stranger's package with a world that needs no simulator; importable, but not installed.
sys.path.append(str(THIRD_PARTY))


#: Where compiled kernels are kept: they are built once, and not in the user's cache. It is set
#: before tests are collected, as some ask then whether there are kernels; workers inherit it.
_KERNELS = "TESTS_KERNEL_CACHE"


def pytest_configure(config: pytest.Config) -> None:
    if _KERNELS not in os.environ:
        folder = tempfile.mkdtemp(prefix="kernels-")
        os.environ[_KERNELS] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop(_KERNELS, None))
    os.environ["XDG_CACHE_HOME"] = os.environ[_KERNELS]


@pytest.fixture(scope="session")
def kernel_cache() -> Path:
    """What stands for ``mail-agents`` in the user's cache."""
    folder = Path(os.environ[_KERNELS]) / "mail-agents"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def isolated_roots(
    tmp_path_factory: pytest.TempPathFactory, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """Redirects every data set, cache and run root to a temporary directory."""
    root = tmp_path_factory.mktemp("roots")
    (root / "xdg_cache_home").mkdir()
    (root / "xdg_cache_home" / "mail-agents").symlink_to(kernel_cache, target_is_directory=True)
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


_LIBERO_ASSETS = os.environ.get("MAIL_AGENTS_LIBERO_ASSETS")


@pytest.fixture(scope="session")
def libero_asset_folder() -> Path:
    """LIBERO's meshes: of the environment variable, else of a folder in or next to the checkout."""
    pytest.importorskip("libero", reason="LIBERO is not installed (docs/install.md)")
    named = [Path(_LIBERO_ASSETS)] if _LIBERO_ASSETS else []
    for folder in [
        *named,
        *(root / "shared" / "libero_assets" for root in (REPOSITORY.parent, REPOSITORY)),
    ]:
        if (folder / "stable_scanned_objects").is_dir():
            return folder.resolve()
    pytest.skip(
        "LIBERO's meshes were not found: set MAIL_AGENTS_LIBERO_ASSETS to their folder, or put "
        "them in shared/libero_assets next to the checkout"
    )


@pytest.fixture
def libero_assets(libero_asset_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes LIBERO's worlds work in this test, or skips it with the reason."""
    monkeypatch.setenv("MAIL_AGENTS_LIBERO_ASSETS", str(libero_asset_folder))
    return libero_asset_folder


@pytest.fixture(scope="session")
def point_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with eight demonstrations of the toy world (``tests/third_party/toybox``)."""
    from toybox.world import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data") / "point").path


_PRELOADED = (
    "mail_agents.agents.mail",
    "mail_agents.objectives.diffusion",
    "mail_agents.report",
    "mail_agents.suite",
    "mail_agents.training.runs",
)


@dataclass
class Job:
    """A script that runs in a process of its own."""

    pid: int
    log: Path
    server: "ScriptServer"

    def kill(self) -> None:
        """Ends it as ``kill -9`` does; harmless when it has ended already."""
        os.kill(self.pid, 9)

    def wait(self) -> int:
        """Exit status, -9 when it was killed."""
        return int(self.server.ask({"wait": self.pid}))

    @property
    def output(self) -> str:
        """What it has printed so far, to both streams."""
        return self.log.read_text() if self.log.exists() else ""


class ScriptServer:
    """Starts scripts in processes forked from one that has imported torch already."""

    def __init__(self) -> None:
        command = [sys.executable, str(REPOSITORY / "tests" / "script_server.py")]
        self._path = [*IMPORT_ROOTS, str(THIRD_PARTY)]
        self._process = subprocess.Popen(
            [*command, *_PRELOADED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(self._path)},
        )

    def ask(self, message: dict) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def start(
        self,
        directory: Path,
        name: str,
        *arguments: object,
        prelude: str = "",
        environment: dict[str, str] | None = None,
        path: Sequence[str] = (),
    ) -> Job:
        """Starts ``scripts/<name>.py``.

        Args:
            directory: Working directory.
            name: Script.
            arguments: Its command line.
            prelude: Python code to run in the process before the script.
            environment: Environment variables to add.
            path: Folders to put before the import path.
        """
        log = directory / f"{name}-{time.monotonic_ns()}.log"
        roots = os.pathsep.join([*map(str, path), *self._path])
        job = {
            "argv": [str(REPOSITORY / "scripts" / f"{name}.py"), *map(str, arguments)],
            "directory": str(directory),
            "output": str(log),
            "prelude": prelude,
            "path": [str(entry) for entry in path],
            "environment": {**os.environ, "PYTHONPATH": roots, **(environment or {})},
        }
        return Job(int(self.ask(job)), log, self)

    def run(self, directory: Path, name: str, *arguments: object, **options) -> tuple[int, str]:
        """Runs a script to its end; exit status and output."""
        job = self.start(directory, name, *arguments, **options)
        return job.wait(), job.output

    def close(self) -> None:
        """Ends the server."""
        self._process.communicate()


@pytest.fixture(scope="session")
def scripts():
    """Runs the scripts; see :class:`ScriptServer`."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    server = ScriptServer()
    yield server
    server.close()
