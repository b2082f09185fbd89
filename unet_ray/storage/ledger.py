"""The ledger of a stage: which tiles are committed, quarantined or skipped.

Knows tile numbers. Does not know what a tile contains or who computes it. Only the driver commits a
tile, after its shards are on disk.

The ledger consists of segments. A segment is a small immutable file that is written atomically and
contains the bits of one state for a range of tiles. Segments of committed and of quarantined tiles
add up; a segment of skipped tiles covers all tiles, and only the newest one counts. A run writes
its records to new segments, named by its epoch and a sequence number. Opening a ledger merges its
segments. So no file changes in place, which suits object stores. A kill loses at most the records
of the last second; those tiles are then recomputed with the same bytes.

A segment with a wrong checksum is ignored. So is a segment older than the store: a run that lost
its lease may still record tiles of the previous store.
"""

from __future__ import annotations

import json
import re
import threading
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import LostError, RunError
from unet_ray.storage.places import Place, write_whole

State = Literal["committed", "quarantined", "skipped"]
STATES: tuple[State, ...] = ("committed", "quarantined", "skipped")
Bits = NDArray[np.bool_]
SECONDS = 1.0  # least time between two writes of segments
SEGMENTS = 256  # more segments than this are merged
FORMAT = 1
BORN = ".born"  # suffix of an empty file; its stem is the epoch of the run that created the store
_NAME = re.compile(rf"[0-9]+{re.escape(BORN)}|[0-9]+-[0-9]+\.({'|'.join(STATES)})")


class Ledger:
    """The ledger of one stage, opened for writing.

    A committed tile is no longer quarantined or skipped.

    Args:
        folder: folder of the segments; created if it does not exist.
        tiles: number of tiles of the plan.
        epoch: epoch of the run.

    Attributes:
        born: epoch of the run that created the store; 0 if none is recorded.

    Raises:
        LostError: if a later run has recreated the store.
    """

    def __init__(self, folder: Place, tiles: int, epoch: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.born = _creation_epoch(folder)
        if self.born > epoch:
            raise _lost_error(folder)
        self._folder, self._epoch = folder, epoch
        records = _read(folder, tiles)
        self._bits, self._files = records.bits, records.files
        for state in STATES[1:]:
            self._bits[state] &= ~self._bits["committed"]
        self._count = int(self._bits["committed"].sum())
        own = (path for path in records.files if _epoch_of(path) == epoch)
        self._sequence = max(map(_sequence_of, own), default=0)
        self._pending: dict[State, list[int]] = {state: [] for state in STATES}
        self._last_flush, self._lock = time.monotonic(), threading.Lock()
        self._timer: threading.Timer | None = None
        for path in records.stale:
            path.unlink(missing_ok=True)
        self._compact(always=bool(records.damaged))

    def commit(self, tile: int) -> None:
        """Records that the shards of `tile` are on disk; the record follows within a second."""
        self._count += not self._bits["committed"][tile]
        self._add("committed", tile)
        self._bits["quarantined"][tile] = self._bits["skipped"][tile] = False

    def quarantine(self, tile: int) -> None:
        """Records that `tile` has failed too often; only the next run tries it again."""
        self._add("quarantined", tile)

    def skip(self, tiles: Bits, requested: Bits) -> None:
        """Records which tiles a mask skips, replacing the records of earlier runs.

        The record is on disk on return. Tiles that are in neither argument keep their state.

        Args:
            tiles: the skipped tiles, bool, shape (tiles,).
            requested: the requested tiles, bool, shape (tiles,).
        """
        with self._lock:
            skipped = (self._bits["skipped"] & ~requested | tiles) & ~self._bits["committed"]
            if (skipped != self._bits["skipped"]).any():
                self._bits["skipped"] = skipped
                self._write("skipped", 0, skipped)

    def _add(self, state: State, tile: int) -> None:
        if not 0 <= tile < self._bits[state].size:
            raise IndexError(f"Tile {tile} of a ledger of {self._bits[state].size} tiles.")
        with self._lock:
            self._bits[state][tile] = True
            self._pending[state].append(tile)
        if time.monotonic() - self._last_flush >= SECONDS:
            self.flush()
        elif not self._timer:
            self._timer = threading.Timer(SECONDS, self._flush_by_timer)
            self._timer.daemon = True
            self._timer.start()

    def _flush_by_timer(self) -> None:
        self._timer = None
        with suppress(OSError):  # the next tile retries the write and raises the error
            self.flush()

    def flush(self) -> None:
        """Writes the pending records; returns when they are on disk."""
        with self._lock:
            for state, tiles in self._pending.items():
                if tiles:
                    first, last = min(tiles), max(tiles)
                    bits = np.zeros(last + 1 - first, bool)
                    bits[np.array(tiles) - first] = True
                    self._write(state, first, bits)
                    tiles.clear()
            self._last_flush = time.monotonic()
            if len(self._files) > SEGMENTS:
                self._compact()

    def _write(self, state: State, first: int, bits: Bits) -> None:
        self._sequence += 1
        path = self._folder / f"{self._epoch:08d}-{self._sequence:08d}.{state}"
        write_whole(path, _encode(first, bits, self._bits[state].size))
        self._files.append(path)

    def _compact(self, always: bool = False) -> None:
        """Merges all segments; after a kill, the old and new segments agree."""
        if len(self._files) <= len(STATES) and not always:
            return
        merged, self._files = self._files, []
        for state in STATES:
            self._write(state, 0, self._bits[state])
        for path in merged:
            path.unlink(missing_ok=True)

    def __contains__(self, tile: int) -> bool:
        return bool(self._bits["committed"][tile])

    def __len__(self) -> int:
        return self._count

    @property
    def committed(self) -> Bits:
        """Which tiles are committed, bool, shape (tiles,); callers must not modify it."""
        return self._bits["committed"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer:
            self._timer.cancel()
        self.flush()
        if error is None:
            self._compact()


def begin(folder: Place, epoch: int) -> None:
    """Starts the ledger of a new store; all records in the folder become invalid.

    Args:
        folder: folder of the segments; created if it does not exist.
        epoch: epoch of the run that creates the store.

    Raises:
        LostError: if `epoch` is not later than every epoch in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if newest(folder) >= epoch:
        raise _lost_error(folder)
    write_whole(folder / f"{epoch:08d}{BORN}", b"")


def newest(folder: Place) -> int:
    """Returns the newest epoch in the folder of a ledger; 0 if it is empty."""
    return max(map(_epoch_of, _list_files(folder)), default=0)


def has_begun(folder: Place) -> bool:
    """Returns whether the folder contains a ledger."""
    return bool(_list_files(folder))


def has_notes(folder: Place) -> bool:
    """Returns whether the ledger contains any record of the current store."""
    born = _creation_epoch(folder)
    return any(path.suffix != BORN and _epoch_of(path) >= born for path in _list_files(folder))


def committed(folder: Place, tiles: int) -> Bits:
    """Returns which tiles are committed, bool, shape (tiles,); a run may be adding to the ledger.

    Raises:
        RunError: if a segment exists but cannot be read.
    """
    return _read(folder, tiles).bits["committed"]


def quarantined(folder: Place, tiles: int) -> Bits:
    """Returns which tiles failed too often and are not committed, bool, shape (tiles,)."""
    bits = _read(folder, tiles).bits
    return bits["quarantined"] & ~bits["committed"]


def skipped(folder: Place, tiles: int) -> Bits:
    """Returns which tiles a mask skips and are not committed, bool, shape (tiles,)."""
    bits = _read(folder, tiles).bits
    return bits["skipped"] & ~bits["committed"]


def damaged(folder: Place, tiles: int) -> list[Place]:
    """Returns the damaged segments, which are ignored; the next run removes them."""
    return _read(folder, tiles).damaged


@dataclass(frozen=True)
class _Records:
    """The content of a ledger.

    Attributes:
        bits: the tiles of each state, merged from all segments.
        files: the segments.
        damaged: the damaged ones among them.
        stale: files older than the store.
    """

    bits: dict[State, Bits]
    files: list[Place]
    damaged: list[Place]
    stale: list[Place]


def _read(folder: Place, tiles: int) -> _Records:
    vanished: set[Place] = set()
    while True:
        paths = _list_files(folder)
        born = max((_epoch_of(path) for path in paths if path.suffix == BORN), default=0)
        files = [path for path in paths if _epoch_of(path) >= born and path.suffix != BORN]
        stale = [path for path in paths if _epoch_of(path) < born]
        records = _Records({state: np.zeros(tiles, bool) for state in STATES}, files, [], stale)
        path = _add_segments(records, tiles)
        if path is None:
            return records
        if path in vanished and path in _list_files(folder):  # such as a broken link
            raise RunError(f"{path}: exists but cannot be read; remove it.")
        vanished.add(path)  # a run has merged it with others in the meantime


def _add_segments(records: _Records, tiles: int) -> Place | None:
    """Reads all segments; returns the first that no longer exists, or None."""
    for path in sorted(records.files, key=lambda path: (_epoch_of(path), _sequence_of(path))):
        try:
            segment = _decode(path.read_bytes(), tiles)
        except FileNotFoundError:
            return path
        if segment:
            first, bits = segment
            state = next(state for state in STATES if path.suffix == f".{state}")
            if state == "skipped":  # covers all tiles and replaces the older segments
                records.bits[state][:] = False
            records.bits[state][first : first + bits.size] |= bits
        else:
            records.damaged.append(path)
    return None


def _list_files(folder: Place) -> list[Place]:
    """Returns the segments and the files that record when the store was created."""
    return [path for path in folder.glob("[0-9]*") if _NAME.fullmatch(path.name)]


def _epoch_of(path: Place) -> int:
    return int(path.stem.partition("-")[0])


def _sequence_of(path: Place) -> int:
    return int(path.stem.partition("-")[2])


def _lost_error(folder: Place) -> LostError:
    return LostError(f"{folder}: another run has taken over, so this run stops.")


def _creation_epoch(folder: Place) -> int:
    """Returns the epoch of the run that created the store; 0 if none is recorded."""
    return max((_epoch_of(path) for path in _list_files(folder) if path.suffix == BORN), default=0)


def _encode(first: int, bits: Bits, tiles: int) -> bytes:
    """Returns a segment: a header line of JSON, the packed bits, and a checksum of both."""
    header = {"format": FORMAT, "tiles": tiles, "first": first, "bits": bits.size}
    data = json.dumps(header).encode() + b"\n" + zlib.compress(np.packbits(bits).tobytes(), 1)
    return data + zlib.crc32(data).to_bytes(4, "little")


def _decode(data: bytes, tiles: int) -> tuple[int, Bits] | None:
    """Returns the first tile and the bits of a segment; None if damaged or of another plan."""
    header_line, _, compressed = data[:-4].partition(b"\n")
    if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        return None
    header = json.loads(header_line)
    if header["format"] != FORMAT or header["tiles"] != tiles:
        return None
    packed = np.frombuffer(zlib.decompress(compressed), np.uint8)
    return header["first"], np.unpackbits(packed, count=header["bits"]).astype(bool)
