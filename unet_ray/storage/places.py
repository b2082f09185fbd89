"""Where files lie: on a disk, or in an object store; with the same few verbs for both.

Knows names and bytes, not what they mean; only that zarr reads both. A place on a disk is a
`pathlib.Path`; one in an object store is an `ObjectPath`, which answers to as many of the same
names as are needed here. A file is there whole or not at all in both: on a disk it is written
beside, synced and renamed; an object store puts an object whole, and what it has acknowledged is
durable.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import functools
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from unet_ray.errors import InputError, nearest

SCHEMES = ("s3", "gs", "az", "memory")  # memory: of this process alone, for tests
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)/*(.*?)/*", re.DOTALL)
PAUSES = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between conditional puts
# How object stores say that they hold no more; they have no code for it in common.
_FULL = re.compile(r"\b507\b|quota|StorageFull|InsufficientStorage", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A name in an object store: an object, or what other names begin with.

    It pickles as its URL; credentials come from the environment of the process that uses it, as
    ``AWS_ACCESS_KEY_ID`` or ``AWS_ENDPOINT_URL``.

    Attributes:
        root: scheme and bucket, such as ``s3://bucket``.
        key: what follows, without slashes at its ends.
    """

    root: str
    key: str

    def __truediv__(self, name: str | PurePath) -> ObjectPath:
        return ObjectPath(self.root, f"{self.key}/{PurePath(name).as_posix()}".strip("/"))

    def __str__(self) -> str:
        return f"{self.root}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return PurePath(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePath(self.name).suffix

    @property
    def parent(self) -> ObjectPath:
        """The name without its last part."""
        return ObjectPath(self.root, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        """A name beside this one."""
        return self.parent / name

    def absolute(self) -> ObjectPath:
        """Itself."""
        return self

    def resolve(self) -> ObjectPath:
        """Itself: there are no links."""
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: names need no folders."""

    def read_bytes(self) -> bytes:
        """All bytes of the object.

        Raises:
            FileNotFoundError: if there is none.
            OSError: if the store does not answer.
        """
        return self.held().data

    def read_text(self) -> str:
        """The object as UTF-8."""
        return self.read_bytes().decode()

    def held(self) -> Held:
        """The object with its tag and time; raises as `read_bytes`."""
        with _told_as_os_errors(self):
            answer = _obstore().get(_store(self.root), self.key)
            meta = answer.meta
            modified = meta["last_modified"].timestamp()
            return Held(bytes(answer.bytes()), _tag(meta), modified)

    def put(self, data: bytes) -> None:
        """Writes the object, whole, whatever was there; durable on return.

        Raises:
            OSError: if the store refuses or does not answer.
        """
        with _told_as_os_errors(self, writing=True):
            _obstore().put(_store(self.root), self.key, data, use_multipart=False)

    def put_if(self, data: bytes, tag: str | None) -> str | None:
        """Writes the object if its tag is still `tag`, or if there is none where `tag` is None.

        Returns:
            The new tag; None if another was faster.

        Raises:
            OSError: if the store refuses or does not answer; ENOTSUP if it knows no conditions.
        """
        obstore = _obstore()
        mode = "create" if tag is None else json.loads(tag)
        lost = obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError
        with _told_as_os_errors(self, writing=True):
            try:
                told = obstore.put(_store(self.root), self.key, data, mode=mode)
            except (*lost, FileNotFoundError):
                return None
        return _tag(told)

    def tag(self) -> str | None:
        """The tag of the object; None if there is none."""
        try:
            with _told_as_os_errors(self):
                return _tag(_obstore().head(_store(self.root), self.key))
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        """Whether there is an object of this name, or below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self.tag() is not None

    def is_dir(self) -> bool:
        """Whether there is an object below this name."""
        return next(self.below(), None) is not None

    def below(self) -> Iterator[ObjectPath]:
        """All objects below this name, in ascending order."""
        with _told_as_os_errors(self):
            for page in _obstore().list(_store(self.root), f"{self.key}/"):
                yield from (ObjectPath(self.root, each["path"]) for each in page)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects right below this name whose own name fits `pattern`."""
        for path in self.below():
            if path.parent == self and fnmatch.fnmatchcase(path.name, pattern):
                yield path

    def unlink(self, missing_ok: bool = True) -> None:
        """Removes the object; there need be none."""
        with _told_as_os_errors(self, writing=True):
            try:
                _obstore().delete(_store(self.root), self.key)
            except FileNotFoundError:  # a store of files
                if not missing_ok:
                    raise


@dataclass(frozen=True)
class Held:
    """Bytes as they were read, their tag, and when they were written (seconds since 1970)."""

    data: bytes
    tag: str
    modified: float


Place = Path | ObjectPath
Guard = Callable[[], AbstractContextManager[None]]  # held during a change; raises if it may not be
Where = str | os.PathLike[str] | ObjectPath  # as users name a place


def place_of(name: Where) -> Place:
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
    opened = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


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


def try_lock(file: int) -> bool:
    """Locks an open file until it is closed; whether it could: another may hold it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
    with _told_as_os_errors(path):
        meta = _obstore().head(_store(path.root), path.key)
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


def remove_objects(paths: Sequence[ObjectPath]) -> None:
    """Removes many objects, of one bucket, at once."""
    if not paths:
        return
    try:
        with _told_as_os_errors(paths[0].parent, writing=True):
            _obstore().delete(_store(paths[0].root), [path.key for path in paths])
    except FileNotFoundError:  # some stores mind that one is gone, as when an answer was lost
        for path in paths:
            path.unlink()


def open_array(place: Place) -> Any:
    """The Zarr array at `place`, to be read."""
    import zarr
    from zarr.storage import ObjectStore

    if isinstance(place, Path):
        return zarr.open_array(place, mode="r")
    store = ObjectStore(_store(place.root), read_only=True)
    return zarr.open_array(store, path=place.key, mode="r")


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as error:
        raise InputError(
            "Object stores need a package that is not installed: pip install obstore."
        ) from error
    return obstore


@functools.cache
def _store(root: str) -> Any:
    """The client of a bucket, one in each process."""
    _obstore()
    from obstore.store import from_url

    try:
        return from_url(root if not root.startswith("memory") else "memory:///")
    except Exception as error:  # of obstore, which has a type for each of its many reasons
        raise InputError(f"{root}: cannot be used ({_line(error)}).") from error


@contextmanager
def _told_as_os_errors(path: ObjectPath, writing: bool = False) -> Iterator[None]:
    """Tells what went wrong in the words of a file system.

    A store that refuses us refuses every tile, as a disk that is mounted to be read only.
    """
    exceptions = _obstore().exceptions
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        number = errno.EROFS if writing else errno.EACCES
        raise OSError(number, f"access denied ({_line(error)})", str(path)) from error
    except exceptions.NotSupportedError as error:
        raise OSError(errno.ENOTSUP, _line(error), str(path)) from error
    except exceptions.BaseError as error:
        number = errno.ENOSPC if writing and _FULL.search(str(error)) else errno.EIO
        raise OSError(number, _line(error), str(path)) from error


def _tag(told: Any) -> str:
    """What tells an object's content from any other: ``gs://`` asks for the version, too."""
    return json.dumps({name: told[name] for name in ("e_tag", "version") if told.get(name)})


def unusable(path: Place, error: OSError) -> str:
    """What to tell of a place that cannot be used, in one sentence."""
    if isinstance(path, Path):
        return f"{path}: cannot be used ({error.strerror})."
    return (
        f"{path}: the object store cannot be used ({error.strerror}); see that its credentials and "
        "address are in the environment, such as AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL."
    )


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
