"""What became of the tiles of a block, written down by its worker for one that comes after it.

Knows tile numbers and a file of lines; does not know what a tile is about, or who runs it. Ray
hands a block out again if its worker ends before Ray knows that the block is done: the marks tell
which of its tiles are done already, and which one may be what kills the workers.
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Literal

from unet_ray.places import Place, append

Event = Literal["begun", "late", "failed", "done"]


@dataclass(frozen=True)
class Mark:
    """An event of a tile.

    Attributes:
        tile: its number.
        event: of the try.
        seconds: that it took; 0 unless it is done.
        held: bytes of the process then; 0 unless it is done, or if unknown.
    """

    tile: int
    event: Event
    seconds: float = 0.0
    held: int = 0


class Marks:
    """The marks of a block; one process adds to them at a time.

    Args:
        path: of their file, which need not be there; its folder must.
    """

    def __init__(self, path: Place) -> None:
        self._path, self._lock = path, threading.Lock()

    def before(self, tile: int) -> list[Mark]:
        """What others have marked of a tile, since it failed last.

        Raises:
            OSError: if that cannot be read.
        """
        with self._lock:
            return self._before.get(tile, [])

    @cached_property
    def _before(self) -> dict[int, list[Mark]]:
        marks: dict[int, list[Mark]] = {}
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            lines = []
        for line in lines:
            with suppress(ValueError, TypeError):  # cut off, as by a full disk
                mark = Mark(*json.loads(line))
                marks.setdefault(mark.tile, []).append(mark)
                if mark.event == "failed":
                    del marks[mark.tile]
        return marks

    def add(self, mark: Mark) -> None:
        """Adds a mark.

        Raises:
            OSError: if it cannot be written.
        """
        with self._lock:
            append(self._path, json.dumps(astuple(mark)).encode() + b"\n")
