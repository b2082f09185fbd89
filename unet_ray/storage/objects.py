"""Names in an object store, with the verbs of a path.

Knows obstore and its errors. Does not know disks, or what an object means.
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
        return self.content().data

    def read_text(self) -> str:
        """The object as UTF-8."""
        return self.read_bytes().decode()

    def content(self) -> Content:
        """The object with its tag and time; raises as `read_bytes`."""
        with as_os_errors(self):
            answer = obstore_module().get(client_of(self.root), self.key)
            meta = answer.meta
            modified = meta["last_modified"].timestamp()
            return Content(bytes(answer.bytes()), _tag(meta), modified)

    def put(self, data: bytes) -> None:
        """Writes the object, whole, whatever was there; durable on return.

        Raises:
            OSError: if the store refuses or does not answer.
        """
        with as_os_errors(self, writing=True):
            obstore_module().put(client_of(self.root), self.key, data, use_multipart=False)

    def put_if(self, data: bytes, tag: str | None) -> str | None:
        """Writes the object if its tag is still `tag`, or if there is none where `tag` is None.

        Returns:
            The new tag; None if another was faster.

        Raises:
            OSError: if the store refuses or does not answer; ENOTSUP if it knows no conditions.
        """
        obstore = obstore_module()
        mode = "create" if tag is None else json.loads(tag)
        lost = obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError
        with as_os_errors(self, writing=True):
            try:
                written = obstore.put(client_of(self.root), self.key, data, mode=mode)
            except (*lost, FileNotFoundError):
                return None
        return _tag(written)

    def tag(self) -> str | None:
        """The tag of the object; None if there is none."""
        try:
            with as_os_errors(self):
                return _tag(obstore_module().head(client_of(self.root), self.key))
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
        with as_os_errors(self):
            for page in obstore_module().list(client_of(self.root), f"{self.key}/"):
                yield from (ObjectPath(self.root, each["path"]) for each in page)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects right below this name whose own name fits `pattern`."""
        for path in self.below():
            if path.parent == self and fnmatch.fnmatchcase(path.name, pattern):
                yield path

    def unlink(self, missing_ok: bool = True) -> None:
        """Removes the object; there need be none."""
        with as_os_errors(self, writing=True):
            try:
                obstore_module().delete(client_of(self.root), self.key)
            except FileNotFoundError:  # a store of files
                if not missing_ok:
                    raise


@dataclass(frozen=True)
class Content:
    """Bytes as they were read, their tag, and when they were written (seconds since 1970)."""

    data: bytes
    tag: str
    modified: float


def remove_objects(paths: Sequence[ObjectPath]) -> None:
    """Removes many objects, of one bucket, at once."""
    if not paths:
        return
    try:
        with as_os_errors(paths[0].parent, writing=True):
            obstore_module().delete(client_of(paths[0].root), [path.key for path in paths])
    except FileNotFoundError:  # some stores mind that one is gone, as when an answer was lost
        for path in paths:
            path.unlink()


def obstore_module() -> Any:
    """The package obstore, which not every machine has.

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
    """The client of a bucket, one in each process."""
    obstore_module()
    from obstore.store import from_url

    try:
        return from_url(root if not root.startswith("memory") else "memory:///")
    except Exception as error:  # of obstore, which has a type for each of its many reasons
        raise InputError(f"{root}: cannot be used ({_line(error)}).") from error


@contextmanager
def as_os_errors(path: ObjectPath, writing: bool = False) -> Iterator[None]:
    """Tells what went wrong in the words of a file system.

    A store that refuses us refuses every tile, as a disk that is mounted to be read only.
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


def _tag(told: Any) -> str:
    """What tells an object's content from any other: ``gs://`` asks for the version, too."""
    return json.dumps({name: told[name] for name in ("e_tag", "version") if told.get(name)})


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
