"""Files of a store under construction: growing arrays, durability, the swap and the lock."""

import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mail_agents.data.columns import Column, npy_header, raw_bytes
from mail_agents.data.manifest import MANIFEST, replaced_path
from mail_agents.errors import InvalidInputError
from mail_agents.storage import sync_directory

_COPY_ROWS = 1 << 14


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Writes everything or raises; unbuffered, so that nothing is left to fail on close."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def read_up_to(file: BinaryIO, size: int) -> bytes:
    """Reads ``size`` bytes, fewer only at the end of the file (one read may give less)."""
    parts = []
    while size > 0 and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class ColumnFile:
    """One growing ``.npy`` file.

    Args:
        path: The file; it is continued when it exists.
        column: dtype and shape of a row.
        rows: Rows that are valid already; anything after them is overwritten.
    """

    def __init__(self, path: Path, column: Column, rows: int = 0) -> None:
        self.path, self.column, self.rows = path, column, rows
        self._header = len(npy_header(column.dtype, (0, *column.shape)))
        fresh = not path.exists()
        self._file: BinaryIO = open(path, "x+b" if fresh else "r+b", buffering=0)  # noqa: SIM115
        try:
            if fresh:
                write_all(self._file, npy_header(column.dtype, (0, *column.shape)))
        except OSError:
            self.close()
            raise

    def write(self, array: np.ndarray, at: int) -> None:
        """Writes rows from row ``at`` on, without making them valid."""
        if array.dtype != self.column.dtype:  # narrower text
            array = array.astype(self.column.dtype)
        self._file.seek(self._header + at * self.column.row_bytes)
        write_all(self._file, raw_bytes(array))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads rows ``start..stop-1``."""
        self._file.seek(self._header + start * self.column.row_bytes)
        data = read_up_to(self._file, (stop - start) * self.column.row_bytes)
        size = self.column.row_bytes
        whole = len(data) // size if size else stop - start
        array = np.frombuffer(data[: whole * size], self.column.dtype)
        return array.reshape(whole, *self.column.shape)

    def widen(self, dtype: np.dtype) -> None:
        """Rewrites a text column for longer text."""
        wide = Column(dtype, self.column.shape)
        other = self.path.with_suffix(".wide")
        other.unlink(missing_ok=True)
        target = ColumnFile(other, wide)
        try:
            for start in range(0, self.rows, _COPY_ROWS):
                target.write(self.read(start, min(start + _COPY_ROWS, self.rows)), at=start)
        finally:
            target.close()
        self.close()
        os.replace(other, self.path)
        self.column = wide
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115

    def finish(self) -> None:
        """Writes the header, cuts what is not valid and forces the file to disk."""
        self._file.seek(0)
        write_all(self._file, npy_header(self.column.dtype, (self.rows, *self.column.shape)))
        self._file.truncate(self._header + self.rows * self.column.row_bytes)
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def stored_dtype(path: Path, fallback: np.dtype) -> np.dtype:
    """The dtype that an ``.npy`` file states, or ``fallback`` when its header is damaged."""
    with path.open("rb") as stream:
        try:
            np.lib.format.read_magic(stream)
            return np.lib.format.read_array_header_1_0(stream)[2]
        except ValueError:
            return fallback


def sync_file(path: Path) -> None:
    """Forces a file to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def swap_in(new: Path, path: Path, *, overwrite: bool) -> None:
    """Moves the finished folder into place; the store it replaces comes back on failure."""
    old = replaced_path(path)
    present = (path / MANIFEST).is_file()
    if present:
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    elif path.is_dir():
        path.rmdir()
    try:
        os.rename(new, path)
    except OSError:
        if present:
            os.rename(old, path)
        raise
    sync_directory(path.parent)
    if overwrite:  # also what an interrupted overwrite left
        shutil.rmtree(old, ignore_errors=True)


def take_lock(path: Path) -> BinaryIO:
    """Takes an exclusive lock that the operating system drops when the process ends."""
    file = open(path, "a+b")  # noqa: SIM115
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InvalidInputError(
            f"Another process is writing this store ({path.parent} is locked). Wait for it to end."
        ) from error
    return file
