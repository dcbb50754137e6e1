"""The files of a store and how they are checked: names, manifest, ``.npy`` headers."""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mail_agents.data.columns import canonical_json
from mail_agents.errors import CorruptFileError, InvalidInputError

FORMAT = "mail-agents trajectory store"
SCHEMA = 1
MANIFEST = "manifest.json"
TABLES = "episodes.npz"
LINES = "episodes.jsonl"
STATS = "stats.json"
RECONVERT = "Copy the store again or reconvert its source with 'mail-agents data convert'."


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_versions() -> dict[str, str]:
    """Versions recorded in the manifest; they are not part of the content hash."""
    out = {"python": platform.python_version()}
    for name in ("mail-agents", "numpy", "gymnasium"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def _digest(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def dump_manifest(manifest: dict[str, Any]) -> bytes:
    """Serialises a manifest together with its own checksum."""
    manifest = json.loads(canonical_json(manifest))
    manifest["manifest_sha256"] = _digest(manifest)
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def partial_path(path: Path) -> Path:
    """Folder beside the target that an unfinished conversion lives in."""
    return path.with_name(f".{path.name}.partial")


def replaced_path(path: Path) -> Path:
    """Where the previous store waits while an overwrite swaps the new one in."""
    return path.with_name(f".{path.name}.replaced")


def load_manifest(path: Path) -> dict[str, Any]:
    """Reads and checks the manifest of the store at ``path``.

    Raises:
        InvalidInputError: There is no store.
        CorruptFileError: The manifest is unreadable, altered, or of another schema version.
    """
    file = path / MANIFEST
    if not file.is_file():
        hint = f"Make one with 'mail-agents data convert <source> {path}'."
        if partial_path(path).is_dir():
            hint = (
                f"{partial_path(path)} holds an unfinished conversion: run it again to finish it."
            )
        elif replaced_path(path).is_dir():
            hint = (
                f"An interrupted overwrite left the store at {replaced_path(path)}: rename it back."
            )
        raise InvalidInputError(f"No trajectory store at {path}: {MANIFEST} is missing. {hint}")
    try:
        manifest = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{file} is not readable JSON ({error}). {RECONVERT}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptFileError(
            f"{file}: key 'format' is not {FORMAT!r}; this is another kind of file."
        )
    if manifest.get("schema") != SCHEMA:
        raise CorruptFileError(
            f"{file}: key 'schema' is {manifest.get('schema')!r}, this version reads {SCHEMA}. "
            "Install the version that wrote it, or reconvert the source with "
            "'mail-agents data convert'."
        )
    if manifest.get("manifest_sha256") != _digest(manifest):
        raise CorruptFileError(
            f"{file}: key 'manifest_sha256' does not match the content; the manifest was altered. "
            f"{RECONVERT}"
        )
    return manifest


def check_file(path: Path, name: str, expected: dict[str, Any]) -> None:
    """Quick checks of one file: presence, size, and for arrays the header.

    Raises:
        CorruptFileError: Naming the file, what differs, what was expected and what to do.
    """
    file = path / name
    if Path(name).name != name:
        raise CorruptFileError(
            f"{path / MANIFEST}: file name {name!r} leaves the store. {RECONVERT}"
        )
    if not file.is_file():
        raise CorruptFileError(f"{file} is missing; the manifest lists it. {RECONVERT}")
    if "column" in expected:
        check_header(file, expected)
    size = file.stat().st_size
    if size != expected["bytes"]:
        state = "truncated" if size < expected["bytes"] else "longer than written"
        raise CorruptFileError(
            f"{file} has {size} bytes, expected {expected['bytes']}: it is {state}. {RECONVERT}"
        )


def check_header(file: Path, expected: dict[str, Any]) -> None:
    """Compares dtype, shape and order of an ``.npy`` file with the manifest; never unpickles."""
    label = f"{file} (column {expected['column']!r})"
    try:
        with file.open("rb") as stream:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("not a version 1.0 .npy file")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, SyntaxError, EOFError) as error:
        raise CorruptFileError(
            f"{label} has no readable .npy header ({error}). {RECONVERT}"
        ) from error
    if dtype.hasobject:
        raise CorruptFileError(
            f"{label} holds pickled Python objects, which are never loaded. {RECONVERT}"
        )
    found = {"dtype": dtype.str, "shape": list(shape)}
    for key, value in found.items():
        if value != expected[key]:
            raise CorruptFileError(
                f"{label}: {key} is {value}, expected {expected[key]}. {RECONVERT}"
            )
    if fortran:
        raise CorruptFileError(f"{label} is in Fortran order, expected C order. {RECONVERT}")


def check_sha256(path: Path, name: str, expected: dict[str, Any]) -> None:
    """Compares the checksum of one file with the manifest."""
    found = file_sha256(path / name)
    if found != expected["sha256"]:
        raise CorruptFileError(
            f"{path / name} was altered: sha256 is {found[:16]}..., expected "
            f"{expected['sha256'][:16]}.... {RECONVERT}"
        )
