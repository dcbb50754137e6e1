"""Groups, arrays and attributes of one demonstration file, with errors that name file and key."""

import contextlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from mail_agents.errors import CorruptFileError, InvalidInputError, StorageError

#: Attribute of ``data`` in which this project keeps what the layout has no place for.
EXTRAS = "mail_agents"
#: Attributes of ``data`` that count, and are counted again when a file is written.
COUNTS = ("num_demos", "total")

#: Kinds of attributes that can be kept; others are references into the file.
_ATTRIBUTE_TYPES = (str, bytes, int, float, bool, np.generic, np.ndarray)
_LFS = b"version https://git-lfs"
_FIXTURE = "_main"
_IMAGE_ENDINGS = ("_rgb", "_image")


def demo_files(source: str | Path) -> list[Path]:
    """The files that a file or folder stands for, in name order.

    Raises:
        InvalidInputError: There are none.
    """
    path = Path(source)
    if not path.exists():
        raise InvalidInputError(f"{path} does not exist. Give an HDF5 file or a folder of them.")
    if not path.is_dir():
        return [path]
    files = _hdf5_in(path)
    if not files:
        inner = sorted(child.name for child in path.iterdir() if child.is_dir() and _hdf5_in(child))
        hint = f" Convert one of its folders: {', '.join(inner)}." if inner else ""
        raise InvalidInputError(f"{path} holds no .hdf5 files.{hint}")
    return files


def _hdf5_in(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.hdf5"), *folder.glob("*.h5")])


def open_file(path: Path) -> h5py.File:
    """Opens a file for reading.

    Raises:
        CorruptFileError: It is no complete HDF5 file; what it is instead is said where known.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = f"({error}). It was cut short while downloading, or is of another kind."
        try:
            with path.open("rb") as stream:
                start = stream.read(64).lstrip()
        except OSError:
            start = b""
        if start.startswith(_LFS):
            reason = (
                "but a Git LFS pointer to one. Run 'git lfs pull' in its repository, or download "
                "the file itself."
            )
        elif start.startswith(b"<"):
            reason = "but a web page, saved in its place. Download the file again."
        raise CorruptFileError(f"{path} is not a complete HDF5 file {reason}") from error


def child(path: Path, group: h5py.Group, name: str) -> h5py.Group:
    """A group inside a group.

    Raises:
        CorruptFileError: It is missing or an array.
    """
    found = group.get(name)
    if not isinstance(found, h5py.Group):
        raise CorruptFileError(_missing(path, group, name, "group"))
    return found


def _missing(path: Path, group: h5py.Group, name: str, kind: str) -> str:
    present = ", ".join(sorted(group)) or "nothing"
    full = f"{str(group.name).rstrip('/')}/{name}"
    return (
        f"{path}: {kind} {full} is missing (present: {present}). Expected robomimic's layout: "
        "data/demo_<i>/actions and data/demo_<i>/obs/<key>."
    )


def dataset(path: Path, group: h5py.Group, name: str) -> h5py.Dataset:
    """An array of numbers with one row per step, not read yet.

    Raises:
        CorruptFileError: It is missing, or of another kind.
    """
    found = group.get(name)
    if not isinstance(found, h5py.Dataset):
        raise CorruptFileError(_missing(path, group, name, "array"))
    if found.dtype.kind not in "biuf":
        raise CorruptFileError(f"{path}: {found.name} holds {found.dtype}, expected numbers.")
    if not found.shape:
        raise CorruptFileError(f"{path}: {found.name} is a single value, expected one per step.")
    return found


def array(path: Path, group: h5py.Group, name: str, length: int | None = None) -> np.ndarray:
    """Reads an array.

    Args:
        path: The file, for messages.
        group: Where it is.
        name: Its name.
        length: Rows it must have; None for any number.

    Raises:
        CorruptFileError: See :func:`dataset`; or it cannot be read, or has other rows.
    """
    found = dataset(path, group, name)
    if length is not None and len(found) != length:
        raise CorruptFileError(
            f"{path}: {found.name} has {len(found)} rows, actions have {length}."
        )
    try:
        return found[()]
    except OSError as error:
        raise CorruptFileError(f"{path}: {found.name} cannot be read: {error}.") from error


def optional(
    path: Path, group: h5py.Group, name: str, length: int, default: np.ndarray
) -> np.ndarray:
    """Like :func:`array`; ``default`` when there is none."""
    return array(path, group, name, length) if name in group else default


def observations(path: Path, group: h5py.Group, name: str, length: int) -> dict[str, np.ndarray]:
    """Reads every array of ``obs`` or ``next_obs``, see :func:`array`."""
    keys = observation_keys(path, group, name)
    found = child(path, group, name)
    return {key: array(path, found, key, length) for key in keys}


def observation_keys(path: Path, group: h5py.Group, name: str = "obs") -> Sequence[str]:
    """Sorted keys of ``obs`` or ``next_obs``.

    Raises:
        CorruptFileError: The group is missing or empty, or what is named as an image is none.
    """
    found = child(path, group, name)
    if not len(found):
        raise CorruptFileError(f"{path}: {found.name} is empty.")
    keys = sorted(map(str, found))
    for key in keys:
        if key.endswith(_IMAGE_ENDINGS):
            _check_image(path, dataset(path, found, key))
    return keys


def _check_image(path: Path, images: h5py.Dataset) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise CorruptFileError(
            f"{path}: {images.name} is {images.dtype} {images.shape}, expected images uint8 "
            "(steps, height, width, 3). Write them so, or give the array a name that does not end "
            f"in {' or '.join(_IMAGE_ENDINGS)}."
        )


def attributes(group: h5py.Group) -> dict[str, Any]:
    """The attributes, JSON-ready, arrays as lists; counts and our own left out."""
    return {
        name: _plain(value)
        for name, value in group.attrs.items()
        if name not in (*COUNTS, EXTRAS) and isinstance(value, _ATTRIBUTE_TYPES)
    }


def _plain(value: Any) -> Any:
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def check_count(path: Path, group: h5py.Group, name: str, found: int, what: str) -> None:
    """Refuses a group whose attribute, where it has one, states another count than was found.

    Raises:
        CorruptFileError: It does, or the attribute is no whole number.
    """
    stated = group.attrs.get(name, found)
    try:
        wrong = int(stated) != found or stated != int(stated)
    except (TypeError, ValueError, OverflowError):
        wrong = True
    if wrong:
        raise CorruptFileError(
            f"{path}: attribute {name} of {group.name} is {stated}, but there are {found} {what}. "
            "The file was written incompletely, get it again; or correct the attribute."
        )


def json_attribute(path: Path, group: h5py.Group, name: str) -> dict[str, Any]:
    """An attribute that holds a JSON object; {} when there is none.

    Raises:
        CorruptFileError: It holds something else.
    """
    if name not in group.attrs:
        return {}
    try:
        value = json.loads(cast(str, group.attrs[name]))
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}")
    except (TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{path}: attribute {name!r} of {group.name} is not a JSON object ({error})."
        ) from error
    return value


def fixtures(path: Path, demo: h5py.Group) -> dict[str, list[float]]:
    """Where the fixtures of LIBERO stood in a demonstration: states leave that out.

    Returns:
        Position (3, m) and quaternion (4, w first) by name, such as ``wooden_cabinet_1``: of the
        bodies of ``model_file`` that stand in the world without a joint and are named like
        LIBERO's objects. {} without a model.

    Raises:
        CorruptFileError: ``model_file`` is no model.
    """
    if "model_file" not in demo.attrs:
        return {}
    try:
        bodies = ET.fromstring(cast(str, demo.attrs["model_file"])).findall("worldbody/body")
        return {
            body.get("name", "").removesuffix(_FIXTURE): [
                *map(float, body.get("pos", "0 0 0").split()),
                *map(float, body.get("quat", "1 0 0 0").split()),
            ]
            for body in bodies
            if body.get("name", "").endswith(_FIXTURE)
            and body.find("joint") is None
            and body.find("freejoint") is None
        }
    except (ET.ParseError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{path}: attribute model_file of {demo.name} is not a MuJoCo model ({error})."
        ) from error


@contextlib.contextmanager
def storing(output: Path) -> Iterator[None]:
    """Explains errors of the file system; nothing but writing may be inside.

    Raises:
        StorageError: The disk is full or the place cannot be written to.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # HDF5 raises either when the disk is full
        raise StorageError(
            f"Cannot write {output}, nothing was put there: {error}. Free space or choose another "
            "place, then run the command again."
        ) from error


@contextlib.contextmanager
def created(path: Path, output: Path) -> Iterator[h5py.File]:
    """A new file, a part of ``output``; see :func:`storing`."""
    with storing(output):
        file = h5py.File(path, "w")
    try:
        yield file
    finally:
        with storing(output):
            file.close()
