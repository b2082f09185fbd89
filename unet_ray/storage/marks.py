"""Marks: events of the tiles of a block, which a worker records for the worker after it.

Knows tile numbers, lines of a file and names of empty objects. Does not know what a tile contains
or who computes it.

Ray reassigns a block if its worker ends before Ray knows that the block is done. The marks then
show which tiles are done and which tile may be killing workers. If separate workers take the steps
of a tile, each of them has its own marks. The next run also commits tiles that are marked as done
but that the driver never committed.

A run stores its marks in a folder named by its epoch, one file for each block. In an object store
every mark is a separate object, since stores limit how often one object is rewritten.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

from unet_ray.storage.objects import ObjectPath, remove_objects
from unet_ray.storage.parsing import parse_json
from unet_ray.storage.places import Place, files_below, remove_tree

_CHECKSUM = "([0-9a-f]{2}){0,16}"  # 16 bytes, the most that a ledger stores for a tile
Event = Literal["begun", "late", "ended", "done"]


@dataclass(frozen=True)
class Mark:
    """An event of a tile.

    Attributes:
        tile: number of the tile.
        event: ``begun``: an attempt started. ``late``: it exceeded its time limit. ``done``: its
            shards are on disk. ``ended``: it failed, or another worker takes the next step.
        seconds: duration of the attempt; 0 unless the event is ``done``.
        memory: memory of the process, in bytes; 0 if unknown or unless the event is ``done``.
        checksum: of what was written, as hexadecimal digits; "" unless the event is ``done``.
    """

    tile: int
    event: Event
    seconds: float = 0.0
    memory: int = 0
    checksum: str = ""


class Marks:
    """The marks of a block; only one process at a time may add marks.

    Args:
        path: the file, in an existing folder; in an object store the prefix of the marks.
    """

    def __init__(self, path: Place) -> None:
        self._path, self._lock = path, threading.Lock()
        self._number = 0  # of the next mark, in an object store

    def before(self, tile: int) -> list[Mark]:
        """Returns the earlier workers' marks of a tile since its last ``ended`` mark.

        Raises:
            OSError: if the marks cannot be read.
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
                yield from _parse_name(path.name)
        else:
            yield from _read_file(self._path)

    def add(self, mark: Mark) -> None:
        """Adds a mark.

        Raises:
            OSError: if it cannot be written.
        """
        with self._lock:
            if isinstance(self._path, ObjectPath):
                _ = self._before  # numbers continue after the marks that exist
                fields = ",".join(map(str, astuple(mark)))
                (self._path / f"{self._number:08d},{uuid.uuid4().hex},{fields}").put(b"")
                self._number += 1
            else:
                with open(self._path, "ab") as file:
                    file.write(json.dumps(astuple(mark), allow_nan=False).encode() + b"\n")


def _parse_name(name: str) -> Iterator[Mark]:
    with suppress(ValueError):  # from an older version or another program
        _, _, tile, event, seconds, memory, checksum = name.split(",")
        yield Mark(int(tile), cast(Event, event), float(seconds), int(memory), checksum)


def _read_file(path: Path) -> Iterator[Mark]:
    if not (path.is_file() or path.is_dir()):  # reading a pipe or a device may never end
        return
    with suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError):  # truncated, for example by a full disk
                yield Mark(*parse_json(line))


def marks_done(folder: Place, since: int) -> Iterator[Mark]:
    """Yields the mark of each tile that workers of any run have done; tiles may repeat.

    Args:
        folder: folder of the marks of all runs.
        since: the first epoch to read.

    Raises:
        OSError: if the marks cannot be read.
    """
    for epoch, path in _by_epoch(folder):
        if epoch >= since:
            marks = _read_file(path) if isinstance(path, Path) else _parse_name(path.name)
            yield from (mark for mark in marks if mark.event == "done" and _is_valid(mark))


def _is_valid(mark: Mark) -> bool:
    """Returns whether the tile is a number and the checksum hexadecimal; a file has any content."""
    hexadecimal = type(mark.checksum) is str and re.fullmatch(_CHECKSUM, mark.checksum)
    return type(mark.tile) is int and bool(hexadecimal)


def remove_older(folder: Place, epoch: int) -> None:
    """Removes the marks of runs with an earlier epoch."""
    if isinstance(folder, Path):
        for run_folder in folder.glob("*"):
            if not run_folder.name.isdigit() or int(run_folder.name) < epoch:
                remove_tree(run_folder)
    else:
        older = (path for other, path in _by_epoch(folder) if other < epoch)
        remove_objects([path for path in older if isinstance(path, ObjectPath)])


def _by_epoch(folder: Place) -> Iterator[tuple[int, Place]]:
    for path in files_below(folder):
        name = str(path)[len(str(folder)) + 1 :].partition("/")[0]
        if name.isdigit():
            yield int(name), path
