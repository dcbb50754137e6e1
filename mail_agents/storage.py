"""Files that are written completely or not at all, and errors that say what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mail_agents.errors import StorageError


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file completely or not at all: temporary file, flush to disk, rename.

    Raises:
        StorageError: The disk is full or the place cannot be written to; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns a failure of the operating system inside the block into an error that names ``path``.

    Raises:
        StorageError: The disk is full, a quota is reached, or access is denied.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"Cannot write {path}: {error}. Files that were complete before are unchanged. Free "
            "some space or choose another place, then run the command again (with --resume RUN to "
            "continue a training run)."
        ) from error


def sync_directory(path: Path) -> None:
    """Forces the names in a directory to disk."""
    if os.name != "posix":  # directories cannot be opened for syncing elsewhere
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
