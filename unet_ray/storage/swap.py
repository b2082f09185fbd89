"""One small file that is replaced only by who has read its last content.

Knows locks of files and conditional puts. Does not know what the file says.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from unet_ray.errors import InputError
from unet_ray.machine import try_lock, unlock
from unet_ray.storage.objects import Content, ObjectPath
from unet_ray.storage.places import Place, unusable, write_whole

LOCK_SECONDS = 10.0  # the lock is held for one small write
LEASE, LOCK = "lease.json", ".lease.lock"
BYTES = 2**16  # more than any lease


class Swap(Protocol):
    """A small file that is replaced only by who has seen its last content: compare and swap."""

    def read(self) -> Content | None:
        """The content; None if there is no file."""

    def replace(self, data: bytes, tag: str | None) -> bool:
        """Writes `data` if the tag is still `tag` (None: no file); tells whether it did."""


def swap_in(folder: Place) -> Swap:
    """The lease file of a folder."""
    if isinstance(folder, ObjectPath):
        return _SwapObject(folder / LEASE)
    return _SwapFile(folder / LEASE, folder / LOCK)


class _SwapObject:
    """On an object store: by conditional puts."""

    def __init__(self, path: ObjectPath) -> None:
        self._path = path

    def read(self) -> Content | None:
        try:
            return self._path.content()
        except FileNotFoundError:
            return None

    def replace(self, data: bytes, tag: str | None) -> bool:
        return self._path.put_if(data, tag) is not None


def refuse_unconditional(folder: ObjectPath) -> None:
    """Refuses a store that lets everybody write whatever the condition.

    Raises:
        InputError: if it does so, knows no conditions, or cannot be used at all.
    """
    probe = folder / f"probe-{uuid.uuid4().hex}"
    try:
        deaf = _is_deaf(probe)
    except OSError as error:
        raise InputError(unusable(folder.parent, error)) from error
    if deaf:
        raise InputError(
            f"{folder.parent}: this object store does not honour conditional puts (If-None-Match "
            "and If-Match), so two runs could not be kept apart; use one that does, or a disk."
        )


def _is_deaf(probe: ObjectPath) -> bool:
    """Whether an object store writes whatever the condition."""
    try:
        tag = _put(probe, b"1", None)
        if not tag or probe.put_if(b"2", None):
            return True
        newer = _put(probe, b"3", probe.tag())
        return not newer or newer == tag or bool(probe.put_if(b"4", tag))
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return True
    finally:
        probe.unlink()


def _put(probe: ObjectPath, data: bytes, tag: str | None) -> str | None:
    """Puts what nobody else does; a put whose answer was lost looks as if somebody had."""
    newer = probe.put_if(data, tag)
    if newer is None:
        with suppress(FileNotFoundError):
            content = probe.content()
            return content.tag if content.data == data else None
    return newer


class _SwapFile:
    """On a disk: by a lock, and a hash for a tag."""

    def __init__(self, path: Path, lock: Path) -> None:
        self._path, self._lock = path, lock

    def read(self) -> Content | None:
        try:
            with open(self._path, "rb") as file:
                data, modified = file.read(BYTES), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None
        return Content(data, hashlib.sha256(data).hexdigest(), modified)

    def replace(self, data: bytes, tag: str | None) -> bool:
        with locked(self._lock):
            content = self.read()
            if (content.tag if content else None) != tag:
                return False
            write_whole(self._path, data)
            return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file; not for ever: who has it may have been stopped."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only what can be written
    end = time.monotonic() + LOCK_SECONDS
    try:
        while not try_lock(file):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{path} has been locked for {LOCK_SECONDS:.0f} s; if a run there was stopped, "
                    "continue or end it, if its machine was lost, remove that file"
                )
            time.sleep(0.01)
        try:
            yield
        finally:
            unlock(file)
    finally:
        os.close(file)
