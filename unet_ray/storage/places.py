"""Where files lie: on a disk, or in an object store; with the same few verbs for both.

Knows names and bytes, not what they mean; only that zarr reads both. A place on a disk is a
`pathlib.Path`; one in an object store is an `ObjectPath`, which answers to as many of the same
names as are needed here. A file is there whole or not at all in both: on a disk it is written
beside, synced and renamed; an object store puts an object whole, and what it has acknowledged is
durable.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_ray.errors import InputError, nearest
from unet_ray.machine import sync_folder
from unet_ray.storage.objects import (
    ObjectPath,
    as_os_errors,
    client_of,
    obstore_module,
    remove_objects,
)

SCHEMES = ("s3", "gs", "az", "memory")  # memory: of this process alone, for tests
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)/*(.*?)/*", re.DOTALL)
PAUSES = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between conditional puts


Place = Path | ObjectPath
Guard = Callable[[], AbstractContextManager[None]]  # held during a change; raises if it may not be
PathOrUrl = str | os.PathLike[str] | ObjectPath  # as users name a place


def place_of(name: PathOrUrl) -> Place:
    """The place of a path or URL; a path becomes absolute.

    Raises:
        InputError: if it is a URL of a scheme that is not known, or of a whole bucket.
    """
    if isinstance(name, ObjectPath):
        return name
    found = _URL.fullmatch(os.fspath(name))
    if not found:
        return Path(os.path.abspath(name))
    scheme, bucket, key = found[1].lower(), found[2], found[3]
    if scheme not in SCHEMES:
        raise InputError(
            f"{name}: {scheme}:// is not an object store that is known{nearest(scheme, SCHEMES)}; "
            "use s3://, gs:// or az://, or a path."
        )
    if not key or not (bucket or scheme == "memory"):
        raise InputError(f"{name}: is no name in a bucket; write {scheme}://BUCKET/NAME.")
    if {".", ".."} & {*key.split("/")} or "\\" in key or not key.isprintable():
        raise InputError(
            f"{str(name)!r}: a name in a bucket has no part '.' or '..', no backslash and no "
            "control character; choose another."
        )
    return ObjectPath(f"{scheme}://{bucket}", re.sub("/+", "/", key))


def write_whole(
    path: Place,
    data: bytes,
    scratch: Place | None = None,
    guard: Guard | None = None,
) -> None:
    """Writes `data` to `path` and returns when it is durable, under that name.

    Whatever is killed, `path` holds what it held before or all of `data`: on a disk a file beside
    it is written and synced, then takes its place, and the folder is synced too.

    Args:
        path: the file; its folder is made.
        data: what it is to hold.
        scratch: folder of the file that is written first, on the same disk; by default its own.
        guard: held while the file takes its place; raises if nothing may be written any more. An
            object is then put only over what was there before, so that a put which arrives late
            finds what others have written since, and is refused.
    """
    if isinstance(path, ObjectPath):
        _put_whole(path, data, guard)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = scratch if isinstance(scratch, Path) else path.parent
    partial = folder / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with guard() if guard else nullcontext():
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def _put_whole(path: ObjectPath, data: bytes, guard: Guard | None) -> None:
    if not guard:
        path.put(data)
        return
    tag = None  # most often there is nothing yet, and nobody need look
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        with guard():
            if path.put_if(data, tag):
                return
        tag = path.tag()
    raise OSError(errno.EIO, "others write this object again and again", str(path))


def files_below(folder: Place) -> Iterator[Place]:
    """Every file below a folder, and every link, which is not followed; none if there is no folder.

    Raises:
        OSError: if a folder cannot be read.
    """
    if isinstance(folder, ObjectPath):
        yield from folder.below()
    elif folder.is_dir():
        for inside, folders, names in os.walk(folder, onerror=_raise):
            links = (name for name in folders if os.path.islink(os.path.join(inside, name)))
            yield from (Path(inside, name) for name in (*links, *names))


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # it was removed in the meantime
        raise error


@dataclass(frozen=True)
class Stat:
    """Bytes of a file, and nanoseconds since 1970 when it was last changed."""

    size: int
    modified_ns: int


def stat_of(path: Place) -> Stat:
    """Size and time of a file.

    Raises:
        OSError: if it is not there or cannot be asked.
    """
    if isinstance(path, Path):
        stat = path.stat()
        return Stat(stat.st_size, stat.st_mtime_ns)
    with as_os_errors(path):
        meta = obstore_module().head(client_of(path.root), path.key)
    return Stat(int(meta["size"]), int(meta["last_modified"].timestamp() * 1000) * 10**6)


def remove_partial(folder: Place) -> None:
    """Removes what a kill left half-written in `folder`; nothing else may be writing there."""
    if isinstance(folder, Path):  # an object is never half-written
        for path in folder.glob(".*.partial"):
            path.unlink(missing_ok=True)


def remove_tree(folder: Place) -> None:
    """Removes a folder with all that is in it, or a file; it need not be there.

    Others may be removing it, too.
    """
    if isinstance(folder, ObjectPath):
        remove_below(folder)
    elif folder.is_dir() and not folder.is_symlink():
        remove_below(folder)
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def remove_below(folder: Place) -> None:
    """Removes all files below a folder, which stays."""
    if isinstance(folder, ObjectPath):
        remove_objects([*folder.below()])
    else:
        for path in files_below(folder):
            path.unlink(missing_ok=True)


def open_array(place: Place) -> Any:
    """The Zarr array at `place`, to be read."""
    import zarr
    from zarr.storage import ObjectStore

    if isinstance(place, Path):
        return zarr.open_array(place, mode="r")
    store = ObjectStore(client_of(place.root), read_only=True)
    return zarr.open_array(store, path=place.key, mode="r")


def unusable(path: Place, error: OSError) -> str:
    """What to tell of a place that cannot be used, in one sentence."""
    if isinstance(path, Path):
        return f"{path}: cannot be used ({error.strerror})."
    return (
        f"{path}: the object store cannot be used ({error.strerror}); see that its credentials and "
        "address are in the environment, such as AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL."
    )
