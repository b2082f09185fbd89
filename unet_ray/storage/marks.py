"""What became of the tiles of a block, written down by its worker for one that comes after it.

Knows tile numbers and lines of a file, or names of empty objects; does not know what a tile is
about, or who runs it. Ray hands a block out again if its worker ends before Ray knows that the
block is done: the marks tell which of its tiles are done already, and which one may be what kills
the workers; where three take its steps, each has marks of its own. To the next run they tell what
the driver of this one never heard of.

A run keeps the marks of each block in a folder named by its epoch. In an object store every mark is
an object of its own, since stores allow few writes a second of the same one.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

from unet_ray.storage.objects import ObjectPath, remove_objects
from unet_ray.storage.places import Place, files_below, remove_tree

Event = Literal["begun", "late", "ended", "done"]


@dataclass(frozen=True)
class Mark:
    """An event of a tile.

    Attributes:
        tile: its number.
        event: of the try: ``ended`` if it failed, or went on to its next step elsewhere.
        seconds: that it took; 0 unless it is done.
        memory: bytes of the process then; 0 unless it is done, or if unknown.
    """

    tile: int
    event: Event
    seconds: float = 0.0
    memory: int = 0


class Marks:
    """The marks of a block; one process adds to them at a time.

    Args:
        path: of their file, which need not be there; its folder must. In an object store, what the
            names of the marks begin with.
    """

    def __init__(self, path: Place) -> None:
        self._path, self._lock = path, threading.Lock()
        self._number = 0  # of the next mark, in an object store

    def before(self, tile: int) -> list[Mark]:
        """What others have marked of a tile, since it last ended and was not done.

        Raises:
            OSError: if that cannot be read.
        """
        with self._lock:
            return self._before.get(tile, [])

    @cached_property
    def _before(self) -> dict[int, list[Mark]]:
        marks: dict[int, list[Mark]] = {}
        for mark in self._read():
            marks.setdefault(mark.tile, []).append(mark)
            if mark.event == "ended":
                del marks[mark.tile]
        return marks

    def _read(self) -> Iterator[Mark]:
        if isinstance(self._path, ObjectPath):
            for path in self._path.below():
                self._number += 1
                yield from _named(path.name)
        else:
            yield from _in_file(self._path)

    def add(self, mark: Mark) -> None:
        """Adds a mark.

        Raises:
            OSError: if it cannot be written.
        """
        with self._lock:
            if isinstance(self._path, ObjectPath):
                _ = self._before  # its number comes after those
                facts = f"{mark.tile},{mark.event},{mark.seconds!r},{mark.memory}"
                (self._path / f"{self._number:08d},{uuid.uuid4().hex},{facts}").put(b"")
                self._number += 1
            else:
                with open(self._path, "ab") as file:
                    file.write(json.dumps(astuple(mark)).encode() + b"\n")


def _named(name: str) -> Iterator[Mark]:
    with suppress(ValueError):  # of an older version, or somebody else's
        _, _, tile, event, seconds, memory = name.split(",")
        yield Mark(int(tile), cast(Event, event), float(seconds), int(memory))


def _in_file(path: Path) -> Iterator[Mark]:
    with suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError):  # cut off, as by a full disk
                yield Mark(*json.loads(line))


def tiles_done(folder: Place, since: int) -> Iterator[int]:
    """The tiles that workers of any run have marked as done, also more than once.

    Args:
        folder: of the marks of all runs.
        since: the first epoch that counts.

    Raises:
        OSError: if they cannot be read.
    """
    for epoch, path in _by_epoch(folder):
        if epoch >= since:
            marks = _in_file(path) if isinstance(path, Path) else _named(path.name)
            yield from (mark.tile for mark in marks if mark.event == "done")


def remove_older(folder: Place, epoch: int) -> None:
    """Removes the marks of runs before the one of this epoch."""
    if isinstance(folder, Path):
        for each in folder.glob("*"):
            if not each.name.isdigit() or int(each.name) < epoch:
                remove_tree(each)
    else:
        older = (path for other, path in _by_epoch(folder) if other < epoch)
        remove_objects([path for path in older if isinstance(path, ObjectPath)])


def _by_epoch(folder: Place) -> Iterator[tuple[int, Place]]:
    for path in files_below(folder):
        name = str(path)[len(str(folder)) + 1 :].partition("/")[0]
        if name.isdigit():
            yield int(name), path
