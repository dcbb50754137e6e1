"""Folders in the user's cache for what is made once and then executed, safe from other users."""

import os
import stat
import sys
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_directory(name: str) -> Path:
    """Returns a folder of the user's cache, created when missing.

    Raises:
        OSError: It cannot be created.
        PermissionError: Other users could put files there, which would then be executed.
    """
    folder = user_cache() / "mail-agents" / name
    # One by one: parents made on the way would get the mode that the umask leaves.
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
    if os.name == "nt":
        return folder
    folder = folder.resolve()
    if not only_ours(folder.stat()):
        raise PermissionError(f"{folder} belongs to another user, or others can write to it")
    for parent in folder.parents:
        found = parent.stat()
        if found.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{parent}, which holds {folder}, belongs to another user")
        # Many systems give every user a group of its own, and folders that it can write to. In
        # sticky folders such as /tmp, only owners rename and remove.
        others = stat.S_IWOTH if found.st_gid == os.getegid() else _OTHERS_WRITE
        if found.st_mode & others and not found.st_mode & stat.S_ISVTX:
            raise PermissionError(
                f"others can write to {parent}, which holds {folder} (chmod go-w {parent})"
            )
    return folder


def only_ours(found: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, and nobody else can write to it."""
    return found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE


def user_cache() -> Path:
    """Returns where programs of this user keep what they can make again."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():  # what is not is invalid, says the XDG base directory specification
        return named
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path.home() / ".cache"
