"""Files that are there whole or not at all; knows bytes and folders, not what is in them."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path


def write_whole(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Writes `data` to `path` and returns when it is on disk, under that name.

    Whatever is killed, `path` holds what it held before or all of `data`: a file beside it is
    written and synced, then takes its place, and the folder is synced too.

    Args:
        path: the file; its folder is made.
        data: what it is to hold.
        scratch: folder of the file that is written first, on the same disk; by default its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = (scratch or path.parent) / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def try_lock(file: int) -> bool:
    """Locks an open file until it is closed; whether it could: another may hold it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_partial(folder: Path) -> None:
    """Removes what a kill left half-written in `folder`; nothing else may be writing there."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)
