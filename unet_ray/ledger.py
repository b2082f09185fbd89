"""Which tiles of a stage are committed: a file of fixed-size records that is only appended to.

Knows numbers; a number is committed after its shard is on disk, and only by the driver. A record
that a kill cut short does not check out and counts as not written.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError

_NUMBER = struct.Struct("<Q")
_RECORD = struct.Struct("<QI")


class Ledger:
    """The committed tiles of one stage, open for more.

    Args:
        path: the ledger's file; made if it is not there.
        tiles: number of tiles of the plan.

    Raises:
        InputError: if another process has it open.
    """

    def __init__(self, path: Path, tiles: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._done = np.zeros(tiles, bool)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Held until the file is closed, also by a kill.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise InputError(
                f"{path.parent.parent}: another run is writing here; wait for it or end it."
            ) from error
        data = os.read(self._file, os.fstat(self._file).st_size)
        whole = _replay(data, self._done)
        # What a kill left half-written goes, so that records stay at multiples of their size.
        os.ftruncate(self._file, whole)
        os.lseek(self._file, whole, os.SEEK_SET)

    def commit(self, tile: int) -> None:
        """Records that the shards of `tile` are on disk; returns when the record is, too."""
        if not 0 <= tile < self._done.size:
            raise IndexError(f"Tile {tile} of a ledger of {self._done.size} tiles.")
        record = _RECORD.pack(tile, _check(tile))
        while record:  # a full disk may take a part of it, and says so at the next try only
            record = record[os.write(self._file, record) :]
        os.fsync(self._file)
        self._done[tile] = True

    def __contains__(self, tile: int) -> bool:
        return bool(self._done[tile])

    def __len__(self) -> int:
        return int(self._done.sum())

    def missing(self, tiles: Iterable[int]) -> Iterator[int]:
        """Those of `tiles` that are not committed, in their order."""
        return (tile for tile in tiles if not self._done[tile])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)


def committed(path: Path, tiles: int) -> NDArray[np.bool_]:
    """Which of so many tiles a ledger holds, also while another process has it open: (tiles,)."""
    done = np.zeros(tiles, bool)
    if path.exists():
        _replay(path.read_bytes(), done)
    return done


def _replay(data: bytes, done: NDArray[np.bool_]) -> int:
    """Marks in `done` what a ledger's bytes hold; returns the length of their sound part."""
    for at in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
        number, check = _RECORD.unpack_from(data, at)
        if check != _check(number) or number >= done.size:
            return at
        done[number] = True
    return len(data) // _RECORD.size * _RECORD.size


def _check(number: int) -> int:
    return zlib.crc32(_NUMBER.pack(number))
