"""Finds LIBERO's package, tasks, initial states and meshes, and imports it without side effects.

LIBERO asks a question and writes into the home folder when it is imported for the first time, and
downloads meshes when an environment is made. Nothing of that happens here: the package is located
without being run, a user's ``config.yaml`` is read but never written, and meshes come from a folder
that exists or the error says how to get them.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mail_agents.errors import CorruptFileError, InvalidInputError, MissingDependencyError
from mail_envs.robosuite_setup import import_robosuite, no_traces, quiet

#: Environment variable that names the folder of LIBERO's meshes, textures and scenes.
ASSETS_VARIABLE = "MAIL_AGENTS_LIBERO_ASSETS"
#: The two commands that install what LIBERO's simulation needs.
INSTALL = (
    "pip install 'mail-agents[libero]'",
    "pip install --no-deps hf-libero==0.1.4",
)
#: Two ways to get the meshes; either is enough.
DOWNLOADS = (
    "git clone --depth 1 https://github.com/Lifelong-Robot-Learning/LIBERO && "
    f"export {ASSETS_VARIABLE}=$PWD/LIBERO/libero/libero/assets",
    "hf download lerobot/libero-assets --repo-type dataset --local-dir libero_assets && "
    f"export {ASSETS_VARIABLE}=$PWD/libero_assets",
)

_PARTS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)


def package_folder() -> Path:
    """The folder ``libero/libero`` of the installed package, found without importing it.

    Raises:
        MissingDependencyError: It is not installed.
    """
    spec = importlib.util.find_spec("libero")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "libero"
        if (folder / "bddl_files").is_dir() and (folder / "init_files").is_dir():
            return folder
    found = "another package of that name is" if spec else "it is not"
    raise MissingDependencyError(
        f"LIBERO's simulation is needed, and {found} installed. {_install_lines()}"
    )


def bddl_file(suite: str, task: str) -> Path:
    """The file that defines a task.

    Raises:
        MissingDependencyError: LIBERO is not installed, or is another version without this task.
    """
    return _package_file("bddl_files", suite, f"{task}.bddl")


def load_init_states(suite: str, task: str) -> np.ndarray:
    """The fixed initial states of a task.

    Returns:
        float64 ``(50, 1 + nq + nv)``: time, positions and velocities of the simulator.

    Raises:
        MissingDependencyError: LIBERO is not installed, or lacks the file.
        CorruptFileError: The file holds anything but such an array.
    """
    import torch
    from numpy.dtypes import Float64DType

    path = _package_file("init_files", suite, f"{task}.pruned_init")
    rebuild = np.empty(0).__reduce__()[0]
    allowed: list[Any] = [rebuild, (rebuild, "numpy.core.multiarray._reconstruct")]
    allowed += [np.ndarray, np.dtype, Float64DType]
    try:
        with torch.serialization.safe_globals(allowed):
            states = np.asarray(torch.load(path, weights_only=True))
    except Exception as error:  # zip, pickle and torch errors: all mean the file is not usable
        raise CorruptFileError(f"{path} does not hold initial states: {error}") from error
    if states.ndim != 2 or states.dtype != np.float64 or not np.isfinite(states).all():
        raise CorruptFileError(
            f"{path} holds {states.dtype} {states.shape}; initial states are finite float64 (N, D)."
        )
    return states


def asset_folder() -> Path:
    """The folder of meshes, textures and scenes.

    In this order: ``MAIL_AGENTS_LIBERO_ASSETS``; ``assets`` of LIBERO's own ``config.yaml``; the
    installed package's folder; the folder that LIBERO downloads to. The first two are what the user
    asked for, so they are refused rather than skipped when they are incomplete; but what LIBERO
    itself writes into a new ``config.yaml``, the package's folder, nobody asked for.

    Raises:
        InvalidInputError: The folder that was asked for lacks parts.
        MissingDependencyError: There is none; the message has the commands that get it.
    """
    return _find_assets()[0]


def broken_assets(error: Exception) -> InvalidInputError:
    """What to say when the simulator cannot read a file of the mesh folder."""
    folder, source = _find_assets()
    return InvalidInputError(
        f"A file of LIBERO's meshes is missing or cannot be read: {error}. Their folder is "
        f"{folder} (from {source}), and incomplete; get a complete one with: {DOWNLOADS[0]}"
    )


def _find_assets() -> tuple[Path, str]:
    """The folder of meshes, and who named it."""
    if given := os.environ.get(ASSETS_VARIABLE):
        return _complete(Path(given).expanduser(), ASSETS_VARIABLE), ASSETS_VARIABLE
    own = package_folder() / "assets"
    if config := user_config():
        named = Path(str(_read_config(config).get("assets") or own)).expanduser()
        if named.resolve() != own.resolve():
            source = f"'assets' in {config}"
            return _complete(named, source), source
    cache = Path.home() / ".cache" / "libero" / "assets"
    for folder, source in ((own, "LIBERO's package"), (cache, "LIBERO's downloads")):
        if not _missing_parts(folder):
            return folder, source
    first, second = DOWNLOADS
    raise MissingDependencyError(
        "LIBERO's meshes, textures and scenes are not part of its package and were not found. Get "
        f"them with '{first}', or with '{second}'. {ASSETS_VARIABLE} names the folder that holds "
        f"{', '.join(_PARTS)}."
    )


def asset_fingerprint(folder: Path) -> str:
    """Eight hexadecimal digits that change when a file is added, removed or resized.

    Two evaluations with the same digits saw the same meshes and textures, as far as names and
    sizes tell.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = "".join(f"{path.relative_to(folder)}:{path.stat().st_size}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()[:8]


def user_config() -> Path | None:
    """LIBERO's ``config.yaml``, if the user has one."""
    folder = os.environ.get("LIBERO_CONFIG_PATH") or "~/.libero"
    path = Path(folder).expanduser() / "config.yaml"
    return path if path.is_file() else None


def import_libero() -> ModuleType:
    """Imports ``libero.libero.envs`` with the meshes of :func:`asset_folder`.

    Raises:
        MissingDependencyError: A package or the meshes are missing.
        InvalidInputError: See :func:`asset_folder`.
    """
    folder, assets = package_folder(), asset_folder()
    _check_distribution(folder)
    import_robosuite("LIBERO")
    with quiet(), no_traces(), _config(folder, assets):
        try:
            root = importlib.import_module("libero.libero")
            # LIBERO's own configuration of this folder is ignored by hf-libero 0.1.4.
            root._assets_path_cache = str(assets)  # type: ignore[attr-defined]
            return importlib.import_module("libero.libero.envs")
        except Exception as error:  # a broken binary raises OSError or RuntimeError
            raise MissingDependencyError(
                f"Cannot import LIBERO: {type(error).__name__}: {error}. {_install_lines()}"
            ) from error


def _check_distribution(folder: Path) -> None:
    try:
        importlib.metadata.version("hf-libero")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"{folder} is another LIBERO than the one tested here, hf-libero 0.1.4. Remove it (pip "
            f"uninstall libero) and install that one: {INSTALL[1]}"
        ) from error


def _package_file(kind: str, suite: str, name: str) -> Path:
    path = package_folder() / kind / suite / name
    if not path.is_file():
        raise MissingDependencyError(
            f"The installed LIBERO has no {kind}/{suite}/{name}. Install the tested version: "
            f"{INSTALL[1]}"
        )
    return path


def _missing_parts(folder: Path) -> list[str]:
    return [
        part
        for part in _PARTS
        if not (folder / part).is_dir() or next((folder / part).iterdir(), None) is None
    ]


def _complete(folder: Path, source: str) -> Path:
    missing = _missing_parts(folder)
    if not missing:
        return folder.resolve()
    inner = [folder / sub for sub in ("assets", "libero/libero/assets")]
    hint = next((f" Did you mean {path}?" for path in inner if not _missing_parts(path)), "")
    what = f"lacks {', '.join(missing)}" if folder.is_dir() else "is not a folder"
    raise InvalidInputError(
        f"{source} is {folder}, which {what}.{hint} It names the folder of LIBERO's meshes; get a "
        f"complete one with: {DOWNLOADS[0]}"
    )


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path}, LIBERO's configuration, is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path}, LIBERO's configuration, holds no 'key: value' lines.")
    return content


@contextlib.contextmanager
def _config(package: Path, assets: Path) -> Iterator[None]:
    """Gives LIBERO a configuration to find at its import, unless the user has one."""
    if user_config() is not None:
        yield
        return
    before = os.environ.get("LIBERO_CONFIG_PATH")
    with tempfile.TemporaryDirectory(prefix="mail-agents-libero-") as folder:
        lines = {
            "benchmark_root": package,
            "bddl_files": package / "bddl_files",
            "init_states": package / "init_files",
            "datasets": package.parent / "datasets",
            "assets": assets,
        }
        text = "".join(f"{key}: '{path}'\n" for key, path in lines.items())
        (Path(folder) / "config.yaml").write_text(text, encoding="utf-8")
        os.environ["LIBERO_CONFIG_PATH"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["LIBERO_CONFIG_PATH"]
            else:
                os.environ["LIBERO_CONFIG_PATH"] = before


def _install_lines() -> str:
    return f"Install it with two commands: {INSTALL[0]} and then {INSTALL[1]}"
