"""Objects in an object store, with an interface like `pathlib.Path`.

Knows obstore and its errors. Does not know disks or the meaning of an object.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from unet_ray.errors import InputError

# Messages of object stores without free space; they share no error code.
_FULL = re.compile(r"\b507\b|quota|StorageFull|InsufficientStorage", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A name in an object store: an object, or the prefix of other names.

    It contains no credentials and can be pickled. Each process reads its credentials from its
    environment, such as ``AWS_ACCESS_KEY_ID`` or ``AWS_ENDPOINT_URL``.

    Attributes:
        root: scheme and bucket, such as ``s3://bucket``.
        key: name in the bucket, without leading or trailing slashes.
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
        """The name without its suffix."""
        return PurePath(self.name).stem

    @property
    def suffix(self) -> str:
        """The suffix of the name, including the dot."""
        return PurePath(self.name).suffix

    @property
    def parent(self) -> ObjectPath:
        """The object path without the last part of its key."""
        return ObjectPath(self.root, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        """Returns this path with its last part replaced by `name`."""
        return self.parent / name

    def absolute(self) -> ObjectPath:
        """Returns itself."""
        return self

    def resolve(self) -> ObjectPath:
        """Returns itself, since object stores have no links."""
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing, since object stores have no folders."""

    def read_bytes(self) -> bytes:
        """Returns all bytes of the object.

        Raises:
            FileNotFoundError: if the object does not exist.
            OSError: if the store refuses or does not respond.
        """
        return self.content().data

    def read_text(self) -> str:
        """Returns the object, decoded as UTF-8."""
        return self.read_bytes().decode()

    def content(self) -> Content:
        """Returns the object with its tag and modification time; raises as `read_bytes`."""
        with as_os_errors(self):
            response = obstore_module().get(client_of(self.root), self.key)
            meta = response.meta
            modified = meta["last_modified"].timestamp()
            return Content(bytes(response.bytes()), _tag(meta), modified)

    def put(self, data: bytes) -> None:
        """Writes the object atomically, replacing any other; it is durable on return.

        Raises:
            OSError: if the store refuses or does not respond.
        """
        with as_os_errors(self, writing=True):
            obstore_module().put(client_of(self.root), self.key, data, use_multipart=False)

    def put_if(self, data: bytes, tag: str | None) -> str | None:
        """Writes the object if its tag is still `tag`, or if `tag` is None and it does not exist.

        Returns:
            The new tag; None if the object has another tag, which means that another process
            wrote it first.

        Raises:
            OSError: if the store refuses or does not respond. The code is ENOTSUP if the store
                does not support conditional puts.
        """
        obstore = obstore_module()
        mode = "create" if tag is None else json.loads(tag)
        conflicts = obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError
        with as_os_errors(self, writing=True):
            try:
                meta = obstore.put(client_of(self.root), self.key, data, mode=mode)
            except (*conflicts, FileNotFoundError):
                return None
        return _tag(meta)

    def tag(self) -> str | None:
        """Returns the tag of the object; None if it does not exist."""
        try:
            with as_os_errors(self):
                return _tag(obstore_module().head(client_of(self.root), self.key))
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        """Returns whether an object has this name or is below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Returns whether an object has this name."""
        return self.tag() is not None

    def is_dir(self) -> bool:
        """Returns whether any object is below this name."""
        return next(self.below(), None) is not None

    def below(self) -> Iterator[ObjectPath]:
        """Yields all objects below this name, in ascending order."""
        with as_os_errors(self):
            for page in obstore_module().list(client_of(self.root), f"{self.key}/"):
                yield from (ObjectPath(self.root, meta["path"]) for meta in page)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yields the objects directly below this name whose last part matches `pattern`."""
        for path in self.below():
            if path.parent == self and fnmatch.fnmatchcase(path.name, pattern):
                yield path

    def unlink(self, missing_ok: bool = True) -> None:
        """Removes the object, which need not exist."""
        with as_os_errors(self, writing=True):
            try:
                obstore_module().delete(client_of(self.root), self.key)
            except FileNotFoundError:  # raised by stores on a file system
                if not missing_ok:
                    raise


@dataclass(frozen=True)
class Content:
    """The content of a file or object.

    Attributes:
        data: all bytes.
        tag: changes whenever the content changes.
        modified: modification time, in seconds since 1970.
    """

    data: bytes
    tag: str
    modified: float


def remove_objects(paths: Sequence[ObjectPath]) -> None:
    """Removes objects of one bucket in bulk."""
    if not paths:
        return
    try:
        with as_os_errors(paths[0].parent, writing=True):
            obstore_module().delete(client_of(paths[0].root), [path.key for path in paths])
    except FileNotFoundError:  # raised by some stores if an object no longer exists
        for path in paths:
            path.unlink()


def obstore_module() -> Any:
    """Imports obstore, an optional package.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import obstore
    except ImportError as error:
        raise InputError(
            "Object stores need a package that is not installed: pip install obstore."
        ) from error
    return obstore


@functools.cache
def client_of(root: str) -> Any:
    """Returns the client of a bucket, cached in each process.

    Raises:
        InputError: if obstore rejects `root` or its configuration.
    """
    obstore_module()
    from obstore.store import from_url

    try:
        return from_url(root if not root.startswith("memory") else "memory:///")
    except Exception as error:  # obstore raises many types
        raise InputError(f"{root}: cannot be used ({_line(error)}).") from error


@contextmanager
def as_os_errors(path: ObjectPath, writing: bool = False) -> Iterator[None]:
    """Converts errors of obstore to an OSError with the matching errno.

    A denied write becomes EROFS, since it affects every tile like a read-only disk.
    """
    exceptions = obstore_module().exceptions
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


def _tag(meta: Any) -> str:
    """Returns the fields that identify the content of an object; ``gs://`` needs the version."""
    tags = {name: meta[name] for name in ("e_tag", "version") if meta.get(name)}
    return json.dumps(tags, allow_nan=False)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
