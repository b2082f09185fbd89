"""Records: one private file for each tile of a stage, such as the labels on its faces.

Knows bytes and their checksums. Does not know what they mean, or which tiles are done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import DamageError
from unet_ray.storage.layout import OBJECTS, PRIVATE
from unet_ray.storage.parsing import ContentError, read_file
from unet_ray.storage.places import Guard, Place, stats_of, write_whole
from unet_ray.storage.shards import checksum_of
from unet_ray.storage.stores import LISTED_TILES

Content = TypeVar("Content")
# Names of folders: labels of tiles and their final ids, of objects and of the background; rows.
LABELS = {False: "labels", True: "hole-labels"}
IDS = {False: "ids", True: "hole-ids"}
ROWS = "rows"
LARGEST_RECORD = 1 << 31  # bytes; larger ones are damaged


class Records:
    """The files of one stage.

    Args:
        out: the output store.
        name: name of their folder.
        guard: entered while a file is replaced; raises if this run may no longer write.
    """

    def __init__(self, out: Place, name: str, guard: Guard | None = None) -> None:
        self._out, self._guard = out, guard
        self.folder = out / OBJECTS / name

    def path(self, tile: int) -> Place:
        """Returns the path of a tile's file."""
        return self.folder / str(tile)

    def write(self, tile: int, data: bytes) -> str:
        """Writes the file of a tile atomically; returns its checksum, see `checksum_of`.

        Raises:
            OSError: if it cannot be written.
        """
        write_whole(self.path(tile), data, self._out / PRIVATE, self._guard)
        return checksum_of(np.frombuffer(data, np.uint8))

    def read(self, tile: int, largest: int) -> bytes:
        """Returns the content of a tile's file.

        Args:
            tile: its number.
            largest: upper bound of the bytes of a valid file.

        Raises:
            DamageError: if it is missing, special or too large; names the file.
        """
        path = self.path(tile)
        try:
            return read_file(path, largest)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamageError(f"{path}: is missing.") from error
        except ContentError as error:
            raise DamageError(f"{path}: is damaged ({error}).") from error

    def parsed(self, tile: int, parse: Callable[[bytes], Content]) -> Content:
        """Returns the content of a tile's file.

        Args:
            tile: its number.
            parse: decodes the bytes; raises DamageError if they are damaged.

        Raises:
            DamageError: if the file is missing or damaged; names it and the remedy.
        """
        remedy = "repair the store with `unet-ray verify --repair`."
        try:
            data = self.read(tile, LARGEST_RECORD)
        except DamageError as error:
            raise DamageError(f"{str(error).rstrip('.')}; {remedy}") from error
        try:
            return parse(data)
        except DamageError as error:
            raise DamageError(f"{self.path(tile)}: is damaged ({error}); {remedy}") from error

    def present(self, tiles: int) -> NDArray[np.bool_]:
        """Returns which tiles have a file that is not empty, bool, shape (tiles,).

        All are assumed to exist for more than `LISTED_TILES` tiles, as in `Store.present`.
        """
        if tiles > LISTED_TILES:
            return np.ones(tiles, bool)
        names = [str(self.path(tile)) for tile in range(tiles)]
        stats = stats_of(self.folder, names).values()
        return np.array([stat is not None and stat.size > 0 for stat in stats])
