"""Checks the files of each tile of one stage against the ledger of the stage.

Knows the shards and records that a tile writes. Does not know how to compute a tile again.

Module `shards` detects any changed byte of a shard. The ledger has a checksum of the voxels that
were committed, so a shard of another tile or another run is detected, too.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import DamageError
from unet_ray.storage.layout import SEGMENT, array_of
from unet_ray.storage.ledger import checksums, committed, damaged, skipped
from unet_ray.storage.places import Place, files_below, is_behind_link, stat_of
from unet_ray.storage.shards import CHECKSUM_BYTES, Shards, checksum_of
from unet_ray.storage.stores import Store
from unet_ray.storage.written import Written

RECORDS = "records"  # stands for the records or the table among the names of outputs


class TileAudit:
    """The files of one stage, compared with its ledger.

    Args:
        path: the store.
        written: the files of the stage.
        empty: an empty store with the layout of `path`.

    Attributes:
        plan: the tiles of the stage.
        outputs: names of its arrays.
        done: which tiles are committed, bool, shape (tiles,).

    Raises:
        DamageError: if the ledger cannot be read.
    """

    def __init__(self, path: Place, written: Written, empty: Path) -> None:
        self.path, self.written = path, written
        self.plan, self.outputs = written.plan, written.outputs
        self.ledger = path / written.ledger
        try:
            self.done = committed(self.ledger, len(self.plan))
            self._checksums = checksums(self.ledger, len(self.plan))
        except Exception as error:  # a segment may contain anything
            raise DamageError(f"{self.ledger}: cannot be read ({error}).") from error
        self.expect(empty)

    def expect(self, empty: Path) -> None:
        """Sets the empty store to compare with."""
        self._store = Store(empty, self.outputs, level=self.written.level)
        self._arrays = {name: Shards(self._store.read(name)) for name in self.outputs}

    def shard(self, name: str, tile: int) -> Place:
        """Returns the path of a tile's shard; for ``records`` that of its records."""
        if name == RECORDS:
            return self.written.path(self.path)
        array = array_of(name, self.written.level)
        return self.path / array / self._store.key(name, self.plan[tile])

    def damage_of(self, tile: int) -> dict[str, str]:
        """Describes the damage of a tile's files, by output; empty if they are intact."""
        damage = {}
        for name in self.outputs:
            try:
                if self.is_foreign(name, tile, self.decode(name, tile)):
                    damage[name] = (
                        "contains other voxels than those that were committed: it is from another "
                        "tile or another run"
                    )
            except DamageError as error:
                damage[name] = str(error)
        try:
            checksum = self.written.checksum(self.path, tile)
            if checksum and self._differs(tile, len(self.outputs), checksum):
                damage[RECORDS] = "differ from those that were committed"
        except DamageError as error:
            damage[RECORDS] = f"cannot be used: {str(error).rstrip('.')}"
        return damage

    def is_foreign(self, name: str, tile: int, voxels: NDArray[np.uint8]) -> bool:
        """Returns whether `voxels` are not those that were committed for a tile's output.

        False if the ledger has no checksum of the tile.
        """
        return self._differs(tile, self.outputs.index(name), checksum_of(voxels))

    def _differs(self, tile: int, position: int, checksum: str) -> bool:
        start = CHECKSUM_BYTES * position
        recorded = self._checksums[tile, start : start + CHECKSUM_BYTES].tobytes()
        return any(recorded) and recorded.hex() != checksum

    def decode(self, name: str, tile: int) -> NDArray[np.uint8]:
        """Returns the stored voxels that a tile owns, (..., z, y, x).

        Raises:
            DamageError: if its shard is missing or fails a checksum.
        """
        planned, shards = self.plan[tile], self._arrays[name]
        data = read_checked(self.path, self.shard(name, tile), shards.max_bytes)
        return shards.decode(data, planned)

    def ledger_damage(self) -> Iterator[str]:
        """Yields a sentence for each damaged file of the ledger."""
        for path in damaged(self.ledger, len(self.plan)):
            yield (
                f"{path}: is damaged, so its tiles count as not done; the same `unet-ray segment` "
                "command recomputes them."
            )

    def remarks(self) -> list[str]:
        """Returns notes about the store that are not damage, one sentence each."""
        masked = int(skipped(self.ledger, len(self.plan)).sum())
        missing = len(self.plan) - int(self.done.sum()) - masked
        stage = "" if self.written.stage == SEGMENT else f" of {self.written.stage}"
        notes = [f"{missing} of {len(self.plan)} tiles{stage} are not done."] if missing else []
        if masked:
            notes.append(f"{masked} of {len(self.plan)} tiles were left out by a mask.")
        uncommitted, strays, first_stray = 0, 0, self.path
        for path, tile in self._files():
            if tile is None:
                strays, first_stray = strays + 1, first_stray if strays else path
            elif not self.done[tile]:
                uncommitted += 1
        if uncommitted:
            notes.append(
                f"{uncommitted} shards belong to tiles that are not done: a killed run may leave "
                "them, and the next run overwrites them."
            )
        if strays:
            notes.append(
                f"{strays} files among the shards are not from unet-ray, such as "
                f"{str(first_stray)!r}."
            )
        return notes

    def _files(self) -> Iterator[tuple[Place, int | None]]:
        """Yields every file in the array folders and its tile; None if it is not a shard."""
        for name in self.outputs:
            top = self.path / array_of(name, self.written.level)
            for path in files_below(top):
                if path != top / "zarr.json":
                    yield path, self._tile_of(name, path)

    def _tile_of(self, name: str, path: Place) -> int | None:
        parts = str(path).split("/")[-3:]
        if not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
            return None
        index, counts = tuple(map(int, parts)), self.plan.counts
        if len(index) != len(counts) or any(a >= n for a, n in zip(index, counts, strict=True)):
            return None
        tile = (index[0] * counts[1] + index[1]) * counts[2] + index[2]
        return tile if self.shard(name, tile) == path else None


def read_checked(store: Place, path: Place, max_bytes: int = 1 << 26) -> bytes:
    """Returns the bytes of a file of a store.

    Raises:
        DamageError: if it is missing, not a regular file, unreadable or above `max_bytes`.
    """
    try:
        if isinstance(path, Path):
            refuse_link(store, path)
            if not stat.S_ISREG(path.lstat().st_mode):
                file_type = "folder" if path.is_dir() else "special file"
                raise DamageError(f"is a {file_type}, not a file")
        if (size := stat_of(path).size) > max_bytes:
            raise DamageError(f"is damaged: it has {size} bytes, but at most {max_bytes} are valid")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DamageError("is missing") from error
    except OSError as error:
        raise DamageError(f"cannot be read ({error.strerror})") from error


def refuse_link(store: Place, path: Place) -> None:
    """Refuses a path behind a symbolic link inside a store, since links may lead anywhere.

    Raises:
        DamageError: if a part of `path` below `store` is a symbolic link.
    """
    if is_behind_link(store, path):
        raise DamageError("is behind a symbolic link")
