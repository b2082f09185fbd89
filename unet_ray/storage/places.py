"""Places: files on a disk and objects in an object store, with the same operations for both.

Knows names, bytes and how zarr opens an array. Does not know the meaning of a file.

A place on a disk is a `pathlib.Path`. A place in an object store is an `ObjectPath`, which has the
methods of a `Path` that unet-ray needs. Writes are atomic in both. On a disk, a temporary file is
written, synced and renamed. An object store replaces objects atomically, and an acknowledged put is
durable.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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

SCHEMES = ("s3", "gs", "az", "memory")  # memory: inside this process, for tests
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)/*(.*?)/*", re.DOTALL)
LISTED = 1000  # the states of more objects than this come from a listing of their folder
REQUESTS = 16  # at a time
PAUSES = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between conditional puts
PARTIAL = ".partial"  # suffix of temporary files
# Errors of a disk, or of the server of a shared one, that may not happen again, and the seconds
# before each further try. Clients of object stores retry by themselves.
_PASSING, RETRY_PAUSES = {errno.EIO, errno.ESTALE}, (0.5, 2.0)


Place = Path | ObjectPath
Guard = Callable[[], AbstractContextManager[None]]  # entered for a change; raises if not allowed
PathOrUrl = str | os.PathLike[str] | ObjectPath  # a place as the user names it


def place_of(name: PathOrUrl) -> Place:
    """Returns the place of a path or URL; a relative path becomes absolute.

    Raises:
        InputError: if the scheme of a URL is not supported, or its name is missing or invalid.
    """
    if isinstance(name, ObjectPath):
        return name
    url = _URL.fullmatch(os.fspath(name))
    if not url:
        return Path(os.path.abspath(name))
    scheme, bucket, key = url[1].lower(), url[2], url[3]
    if scheme not in SCHEMES:
        raise InputError(
            f"{name}: {scheme}:// is not a supported object store{nearest(scheme, SCHEMES)}; "
            "use s3://, gs:// or az://, or a path."
        )
    if not key or not (bucket or scheme == "memory"):
        raise InputError(f"{name}: is not a name in a bucket; write {scheme}://BUCKET/NAME.")
    if {".", ".."} & {*key.split("/")} or "\\" in key or not key.isprintable():
        raise InputError(
            f"{str(name)!r}: contains a part '.' or '..', a backslash or a control character; "
            "choose a name without them."
        )
    return ObjectPath(f"{scheme}://{bucket}", re.sub("/+", "/", key))


def write_whole(
    path: Place,
    data: bytes,
    scratch: Place | None = None,
    guard: Guard | None = None,
) -> None:
    """Writes `data` to `path` atomically and returns when it is durable.

    After a kill, `path` contains its old content or all of `data`. On a disk, a temporary file is
    written and synced, then renamed to `path`, and the folder is synced too.

    Args:
        path: the file; its folder is created.
        data: the new content.
        scratch: folder of the temporary file, on the same disk; by default the folder of `path`.
        guard: entered while the file is replaced; raises if this run may no longer write. With a
            guard, an object is put on the condition that it has not changed, so the store refuses
            a delayed put after another run has written.

    Raises:
        OSError: if the file cannot be written, after the retries of `retried`; names the file.
    """
    if isinstance(path, ObjectPath):
        _put_whole(path, data, guard)
    else:
        folder = scratch if isinstance(scratch, Path) else path.parent
        retried(path, lambda: _write_file(path, data, folder, guard))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name of a temporary file, which replaces `path` when the block ends.

    It is for files that are too large for `write_whole`. After an error the temporary file is
    removed, and `path` keeps its content.

    Raises:
        OSError: if the file cannot be written; names `path`.
    """
    partial = path.parent / f".{uuid.uuid4().hex}{PARTIAL}"
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        _name_file(error, path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def _name_file(error: OSError, path: Path) -> None:
    """Names `path` in an error, since a failed write names no file or the temporary one."""
    if error.errno and str(error.filename or PARTIAL).endswith(PARTIAL):
        error.filename = str(path)


def retried(path: Path, write: Callable[[], None]) -> None:
    """Calls a function that writes a file, up to three times if the disk reports a passing error.

    Args:
        path: the file, for the error.
        write: writes it; a second call must repair what a failed one has left.

    Raises:
        OSError: of the last call; names the file.
    """
    for pause in (*RETRY_PAUSES, None):
        try:
            write()
            return
        except OSError as error:
            if pause is None or error.errno not in _PASSING:
                _name_file(error, path)
                raise
            time.sleep(pause)


def _write_file(path: Path, data: bytes, folder: Path, guard: Guard | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the name of the file, which may have the 255 bytes that file systems allow.
    partial = folder / f".{uuid.uuid4().hex}{PARTIAL}"
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
    tag = None  # most objects are new, so try that first without reading the tag
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        with guard():
            if path.put_if(data, tag):
                return
        tag = path.tag()
    raise OSError(errno.EIO, "other processes keep writing this object", str(path))


def files_below(folder: Place) -> Iterator[Place]:
    """Yields every file and link below a folder, without following links.

    It yields nothing if the folder does not exist.

    Raises:
        OSError: if a folder cannot be read.
    """
    if isinstance(folder, ObjectPath):
        yield from folder.below()
    elif folder.is_dir():
        for parent, folders, names in os.walk(folder, onerror=_raise_unless_removed):
            links = (name for name in folders if os.path.islink(os.path.join(parent, name)))
            yield from (Path(parent, name) for name in (*links, *names))


def _raise_unless_removed(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def is_behind_link(root: Place, path: Place) -> bool:
    """Returns whether `path`, or a folder between it and `root`, is a symbolic link."""
    if isinstance(path, ObjectPath) or isinstance(root, ObjectPath):
        return False
    return Path(os.path.realpath(path)) != Path(os.path.realpath(root), path.relative_to(root))


@dataclass(frozen=True)
class Stat:
    """Size of a file in bytes, and its modification time in nanoseconds since 1970."""

    size: int
    modified_ns: int


def stat_of(path: Place) -> Stat:
    """Returns the size and modification time of a file.

    Raises:
        OSError: if the file does not exist or cannot be accessed.
    """
    if isinstance(path, Path):
        stat = path.stat()
        return Stat(stat.st_size, stat.st_mtime_ns)
    with as_os_errors(path):
        return _stat_of_object(obstore_module().head(client_of(path.root), path.key))


def _stat_of_object(meta: Any) -> Stat:
    return Stat(int(meta["size"]), int(meta["last_modified"].timestamp() * 1000) * 10**6)


def stats_of(folder: Place, names: Sequence[str]) -> dict[str, Stat | None]:
    """Returns size and time of files below a folder, by name; None for files that do not exist.

    Args:
        folder: the folder.
        names: paths or URLs of the files.

    Raises:
        OSError: if a file cannot be accessed.
    """
    if isinstance(folder, Path):
        return {name: state_of(name) for name in names}
    if len(names) > LISTED:  # one request lists 1,000 objects
        with as_os_errors(folder):
            pages = obstore_module().list(client_of(folder.root), f"{folder.key}/")
            listed = {
                str(ObjectPath(folder.root, meta["path"])): _stat_of_object(meta)
                for page in pages
                for meta in page
            }
        return {name: listed.get(name) for name in names}
    with ThreadPoolExecutor(REQUESTS) as pool:
        return dict(zip(names, pool.map(state_of, names), strict=True))


def state_of(name: str) -> Stat | None:
    """Returns size and time of the file or object of a name; None if it does not exist.

    Raises:
        OSError: if it cannot be accessed.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        if "://" in name:
            return stat_of(place_of(name))
        stat = os.stat(name)
        return Stat(stat.st_size, stat.st_mtime_ns)
    return None


def remove_partial(folder: Place) -> None:
    """Removes temporary files of killed processes; no other process may be writing in `folder`."""
    if isinstance(folder, Path):  # object stores have no temporary files
        for path in folder.glob(f".*{PARTIAL}"):
            path.unlink(missing_ok=True)


def remove_tree(folder: Place) -> None:
    """Removes a folder with its content, or a file; it need not exist.

    Other processes may remove it at the same time.
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
    """Removes all files below a folder, but not the folder."""
    if isinstance(folder, ObjectPath):
        remove_objects([*folder.below()])
    else:
        for path in files_below(folder):
            path.unlink(missing_ok=True)


def open_array(place: Place) -> Any:
    """Opens the Zarr array at `place` for reading."""
    import zarr
    from zarr.storage import ObjectStore

    if isinstance(place, Path):
        return zarr.open_array(place, mode="r")
    store = ObjectStore(client_of(place.root), read_only=True)
    return zarr.open_array(store, path=place.key, mode="r")


def unusable(path: Place, error: OSError) -> str:
    """Returns the message for a place that cannot be used."""
    if isinstance(path, Path):
        return f"{path}: cannot be used ({error.strerror})."
    return (
        f"{path}: the object store cannot be used ({error.strerror}); set its credentials and "
        "address in the environment, such as AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL."
    )
