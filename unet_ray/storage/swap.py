"""Compare-and-swap of one small file, on a disk or in an object store.

Knows file locks and conditional puts. Does not know the meaning of the file.
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

LOCK_SECONDS = 10.0  # timeout of the lock, which protects one small write
LEASE, LOCK = "lease.json", ".lease.lock"
BYTES = 2**16  # upper bound of a lease


class Swap(Protocol):
    """A small file that a process can replace only if it has read the current content."""

    def read(self) -> Content | None:
        """Returns the content; None if the file does not exist."""

    def replace(self, data: bytes, tag: str | None) -> bool:
        """Writes `data` if the file still has `tag`, or does not exist and `tag` is None.

        Returns:
            Whether `data` was written.
        """


def swap_in(folder: Place) -> Swap:
    """Returns the lease file of a folder."""
    if isinstance(folder, ObjectPath):
        return _SwapObject(folder / LEASE)
    return _SwapFile(folder / LEASE, folder / LOCK)


class _SwapObject:
    """A file in an object store, replaced by conditional puts."""

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
    """Refuses an object store without conditional puts, by a test with a temporary object.

    Raises:
        InputError: if the store ignores or rejects conditions, or cannot be used at all.
    """
    probe = folder / f"probe-{uuid.uuid4().hex}"
    try:
        ignored = _ignores_conditions(probe)
    except OSError as error:
        raise InputError(unusable(folder.parent, error)) from error
    if ignored:
        raise InputError(
            f"{folder.parent}: this object store does not honour conditional puts (If-None-Match "
            "and If-Match), so two runs could overwrite each other; use one that does, or a disk."
        )


def _ignores_conditions(probe: ObjectPath) -> bool:
    """Returns whether an object store ignores or rejects the conditions of puts."""
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
    """Puts an object that no other process writes, and returns its tag.

    If the response of a successful put is lost, the client retries it and the store reports a
    conflict. So the content is compared before a put counts as refused.
    """
    newer = probe.put_if(data, tag)
    if newer is None:
        with suppress(FileNotFoundError):
            content = probe.content()
            return content.tag if content.data == data else None
    return newer


class _SwapFile:
    """A file on a disk, replaced under a lock; its tag is a hash of its content."""

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
    """Locks a file inside the context; creates it if it does not exist.

    Raises:
        TimeoutError: if another process does not release the lock, for example while suspended.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only files opened for writing
    end = time.monotonic() + LOCK_SECONDS
    try:
        while not try_lock(file):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{path} has been locked for {LOCK_SECONDS:.0f} s; continue or end the run "
                    "that was suspended; if its machine is lost, remove that file"
                )
            time.sleep(0.01)
        try:
            yield
        finally:
            unlock(file)
    finally:
        os.close(file)
