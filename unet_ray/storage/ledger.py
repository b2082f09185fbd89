"""The ledger of a stage: which tiles are committed, quarantined or skipped.

Knows tile numbers. Does not know what a tile contains or who computes it. Only the driver commits a
tile, after its shards are on disk.

The ledger consists of segments. A segment is a small immutable file that is written atomically and
contains the bits of one state for a range of tiles. A segment of committed tiles also contains the
checksum of each tile's voxels. Segments of committed and of quarantined tiles add up; a segment of
skipped tiles covers all tiles, and only the newest one counts. A run writes its records to new
segments, named by its epoch and a sequence number. Opening a ledger merges its segments. So no file
changes in place, which suits object stores. A kill loses at most the records of the last second;
those tiles are then recomputed with the same bytes.

A store with two outputs needs 16 bytes per tile: 1.1 GB for the 67 million tiles of a petabyte.

A segment with a wrong checksum or invalid content is ignored. So is a segment older than the store:
a run that lost its lease may still record tiles of the previous store.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import DamageError, LostError, RunError
from unet_ray.storage.parsing import parse_json
from unet_ray.storage.places import Place, files_below, stat_of, write_whole

State = Literal["committed", "quarantined", "skipped"]
STATES: tuple[State, ...] = ("committed", "quarantined", "skipped")
Bits = NDArray[np.bool_]
SECONDS = 1.0  # least time between two writes of segments
SEGMENTS = 256  # more segments than this are merged
# Bounds of the segments of committed tiles that one merge reads.
MERGED_BYTES, MERGED_TILES = 16 << 20, 1 << 21
FORMAT = 2
BORN = ".born"  # suffix of a file; its stem is the epoch of the run that created the store
# Bytes; a checksum has 8 for each output of a store.
LARGEST_HEADER, LARGEST_CHECKSUM, LARGEST_BORN = 1000, 16, 1 << 26
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
        self.born = creation_epoch(folder)
        if self.born > epoch:
            raise _lost_error(folder)
        self._folder, self._epoch = folder, epoch
        records = _read(folder, tiles)
        self._bits, self._sizes = records.bits, records.sizes
        for state in STATES[1:]:
            self._bits[state] &= ~self._bits["committed"]
        self._count = int(self._bits["committed"].sum())
        own = (path for path in (*records.sizes, *records.damaged) if _epoch_of(path) == epoch)
        self._sequence = max(map(_sequence_of, own), default=0)
        self._pending: dict[State, dict[int, bytes]] = {state: {} for state in STATES}
        self._last_flush, self._lock = time.monotonic(), threading.Lock()
        self._timer: threading.Timer | None = None
        for path in (*records.stale, *records.damaged):
            path.unlink(missing_ok=True)
        self._compact()

    def commit(self, tile: int, checksum: str = "") -> None:
        """Records that the shards of `tile` are on disk; the record follows within a second.

        Args:
            tile: its number.
            checksum: of its voxels, as hexadecimal digits, equally many for all tiles.
        """
        self._count += not self._bits["committed"][tile]
        self._add("committed", tile, bytes.fromhex(checksum))
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
                self._write("skipped", Segment(0, skipped))

    def _add(self, state: State, tile: int, checksum: bytes = b"") -> None:
        if not 0 <= tile < self._bits[state].size:
            raise IndexError(f"Tile {tile} of a ledger of {self._bits[state].size} tiles.")
        with self._lock:
            self._bits[state][tile] = True
            self._pending[state][tile] = checksum
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
            for state, records in self._pending.items():
                if records:
                    self._write(state, _segment_of(records))
                    records.clear()
            self._last_flush = time.monotonic()
            if len(self._sizes) > SEGMENTS:
                self._compact()

    def _write(self, state: State, segment: Segment) -> None:
        self._sequence += 1
        path = self._folder / f"{self._epoch:08d}-{self._sequence:08d}.{state}"
        data = _encode(segment, self._bits[state].size)
        write_whole(path, data)
        self._sizes[path] = len(data)

    def _compact(self) -> None:
        """Merges segments; after a kill, the old and new segments agree.

        Large segments of committed tiles stay, so that a merge needs little memory and time.
        """
        if len(self._sizes) <= len(STATES):
            return
        for state in STATES:
            files = [path for path in self._sizes if path.suffix == f".{state}"]
            if state != "committed":
                if len(files) != 1:
                    self._replace(files, state, Segment(0, self._bits[state]))
            else:
                merged, segment = _merged(self._smallest(files), self._bits[state].size)
                if len(merged) > 1:
                    self._replace(merged, state, segment)

    def _replace(self, files: Sequence[Place], state: State, segment: Segment) -> None:
        self._write(state, segment)
        for path in files:
            del self._sizes[path]
            path.unlink(missing_ok=True)

    def _smallest(self, files: Iterable[Place]) -> list[Place]:
        """Returns the smallest of the files, at most `MERGED_BYTES` together, in written order."""
        chosen, total = [], 0
        for path in sorted(files, key=lambda path: self._sizes[path]):
            total += self._sizes[path]
            if total > MERGED_BYTES:
                break
            chosen.append(path)
        return sorted(chosen, key=_written_order)

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


def begin(folder: Place, epoch: int, provenance: Mapping[str, Any] | None = None) -> None:
    """Starts the ledger of a new store; all records in the folder become invalid.

    Args:
        folder: folder of the segments; created if it does not exist.
        epoch: epoch of the run that creates the store.
        provenance: recorded in the ledger, so that a later change of the store's own is detected.

    Raises:
        LostError: if `epoch` is not later than every epoch in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if newest(folder) >= epoch:
        raise _lost_error(folder)
    text = json.dumps(provenance or {}, allow_nan=False)
    record = {"provenance": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_whole(folder / f"{epoch:08d}{BORN}", json.dumps(record).encode())


def recorded_provenance(folder: Place) -> dict[str, Any]:
    """Returns the provenance that `begin` recorded; empty if there is none, as in older stores.

    Raises:
        DamageError: if the record is damaged; names its file.
    """
    path = folder / f"{creation_epoch(folder):08d}{BORN}"
    try:
        if not stat_of(path).size:
            return {}
        record = parse_json(_read_bytes(path, LARGEST_BORN))
        text = record["provenance"].encode()
        if hashlib.sha256(text).hexdigest() == record["sha256"]:
            return dict(parse_json(text))
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise DamageError(f"{path}: is damaged, so the provenance of the store cannot be checked.")


def newest(folder: Place) -> int:
    """Returns the newest epoch in the folder of a ledger; 0 if it is empty."""
    return max(map(_epoch_of, _list_files(folder)), default=0)


def newest_below(folder: Place) -> int:
    """Returns the newest epoch in the ledgers of all stages below a folder; 0 if there is none."""
    ledgers = (path for path in files_below(folder) if _NAME.fullmatch(path.name))
    return max(map(_epoch_of, ledgers), default=0)


def has_begun(folder: Place) -> bool:
    """Returns whether the folder contains a ledger."""
    return bool(_list_files(folder))


def has_notes(folder: Place) -> bool:
    """Returns whether the ledger contains any record of the current store."""
    born = creation_epoch(folder)
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


def checksums(folder: Place, tiles: int) -> NDArray[np.uint8]:
    """Returns the checksum of each tile's voxels, shape (tiles, bytes); zeros if unknown."""
    rows = np.zeros((tiles, 0), np.uint8)

    def collect(segment: Segment) -> None:
        nonlocal rows
        width = segment.checksums.shape[1]
        if width > rows.shape[1]:
            rows = np.pad(rows, ((0, 0), (0, width - rows.shape[1])))
        rows[segment.tiles, :width] = segment.checksums

    _read(folder, tiles, collect)
    return rows


@dataclass(frozen=True)
class Segment:
    """The content of a segment.

    Attributes:
        first: number of its first tile.
        bits: which of the tiles from `first` on have the state, bool.
        checksums: a row of bytes for each of these tiles, uint8; without columns if unknown.
            Empty for other states.
    """

    first: int
    bits: Bits
    checksums: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0), np.uint8))

    @property
    def tiles(self) -> NDArray[np.int64]:
        """Numbers of these tiles, ascending."""
        return self.first + np.flatnonzero(self.bits)


def _segment_of(records: Mapping[int, bytes]) -> Segment:
    numbers = np.array(sorted(records))
    width = max(map(len, records.values()))
    rows = b"".join(records[tile].ljust(width, b"\0") for tile in numbers.tolist())
    return _segment(numbers, np.frombuffer(rows, np.uint8).reshape(len(numbers), width))


def _segment(numbers: NDArray[np.int64], checksums: NDArray[np.uint8]) -> Segment:
    """Returns the segment of some tiles, whose numbers ascend."""
    first = int(numbers[0])
    bits = np.zeros(int(numbers[-1]) + 1 - first, bool)
    bits[numbers - first] = True
    return Segment(first, bits, checksums)


def _merged(files: Iterable[Place], tiles: int) -> tuple[list[Place], Segment]:
    """Returns the first of the files, with about `MERGED_TILES` tiles, and their content.

    Later checksums of a tile replace earlier ones.
    """
    merged: list[Place] = []
    numbers, rows, width, count = [], [], 0, 0
    for path in files:
        with suppress(FileNotFoundError):  # another run has merged it
            segment = _decode(_read_bytes(path, _largest(tiles)), tiles)
            # A segment without checksums may have many tiles in few bytes. It stays, and so does
            # one that is damaged now: the next run reports it.
            if segment is None or segment.tiles.size > MERGED_TILES:
                continue
            numbers.append(segment.tiles)
            rows.append(segment.checksums)
            width, count = max(width, rows[-1].shape[1]), count + len(rows[-1])
        merged.append(path)
        if count > MERGED_TILES:
            break
    if not count:
        return merged, Segment(0, np.zeros(0, bool))
    padded = [np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in rows]
    # Reversed, so that the first occurrence of a tile is its latest record.
    unique, index = np.unique(np.concatenate(numbers)[::-1], return_index=True)
    return merged, _segment(unique, np.concatenate(padded)[::-1][index])


@dataclass(frozen=True)
class _Records:
    """The content of a ledger.

    Attributes:
        bits: the tiles of each state, merged from all segments.
        sizes: the size in bytes of each sound segment.
        damaged: the other segments.
        stale: files older than the store.
    """

    bits: dict[State, Bits]
    sizes: dict[Place, int]
    damaged: list[Place]
    stale: list[Place]


def _read(
    folder: Place, tiles: int, collect: Callable[[Segment], None] = lambda segment: None
) -> _Records:
    vanished: set[Place] = set()
    while True:
        paths = _list_files(folder)
        born = max((_epoch_of(path) for path in paths if path.suffix == BORN), default=0)
        files = [path for path in paths if _epoch_of(path) >= born and path.suffix != BORN]
        stale = [path for path in paths if _epoch_of(path) < born]
        records = _Records({state: np.zeros(tiles, bool) for state in STATES}, {}, [], stale)
        path = _add_segments(records, sorted(files, key=_written_order), tiles, collect)
        if path is None:
            return records
        if path in vanished and path in _list_files(folder):  # such as a broken link
            raise RunError(f"{path}: exists but cannot be read; remove it.")
        vanished.add(path)  # a run has merged it with others in the meantime


def _add_segments(
    records: _Records, files: Iterable[Place], tiles: int, collect: Callable[[Segment], None]
) -> Place | None:
    """Reads all segments; returns the first that no longer exists, or None."""
    for path in files:
        try:
            data = _read_bytes(path, _largest(tiles))
        except FileNotFoundError:
            return path
        segment = _decode(data, tiles)
        if segment is None:
            records.damaged.append(path)
            continue
        records.sizes[path] = len(data)
        state = next(state for state in STATES if path.suffix == f".{state}")
        if state == "skipped":  # covers all tiles and replaces the older segments
            records.bits[state][:] = False
        records.bits[state][segment.first : segment.first + segment.bits.size] |= segment.bits
        collect(segment)
    return None


def _read_bytes(path: Place, largest: int) -> bytes:
    """Returns the content of a file of the ledger; empty if it is larger than a valid one.

    Raises:
        FileNotFoundError: if it is no file, such as a link to a device, which may have no end.
    """
    if isinstance(path, Path):  # an object always has an end, and each check costs a request
        if not path.is_file():
            raise FileNotFoundError(path)
        if stat_of(path).size > largest:
            return b""
    return path.read_bytes()


def _largest(tiles: int) -> int:
    """Returns an upper bound of the bytes of a segment."""
    return 2 * LARGEST_HEADER + tiles * (1 + LARGEST_CHECKSUM)


def _list_files(folder: Place) -> list[Place]:
    """Returns the segments and the files that record when the store was created."""
    return [path for path in folder.glob("[0-9]*") if _NAME.fullmatch(path.name)]


def _epoch_of(path: Place) -> int:
    return int(path.stem.partition("-")[0])


def _sequence_of(path: Place) -> int:
    return int(path.stem.partition("-")[2])


def _written_order(path: Place) -> tuple[int, int]:
    return _epoch_of(path), _sequence_of(path)


def _lost_error(folder: Place) -> LostError:
    return LostError(f"{folder}: another run has taken over, so this run stops.")


def creation_epoch(folder: Place) -> int:
    """Returns the epoch of the run that created the store; 0 if none is recorded."""
    return max((_epoch_of(path) for path in _list_files(folder) if path.suffix == BORN), default=0)


def _encode(segment: Segment, tiles: int) -> bytes:
    """Returns a header line of JSON, the packed bits, the checksums, and a checksum of them all."""
    packed = zlib.compress(np.packbits(segment.bits).tobytes(), 1)
    header = {
        "format": FORMAT,
        "tiles": tiles,
        "first": segment.first,
        "bits": segment.bits.size,
        "packed": len(packed),
        "checksum": segment.checksums.shape[1],
    }
    data = json.dumps(header).encode() + b"\n" + packed + segment.checksums.tobytes()
    return data + zlib.crc32(data).to_bytes(4, "little")


def _decode(data: bytes, tiles: int) -> Segment | None:
    """Returns the content of a segment; None if it is damaged, invalid or of another plan."""
    if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        return None
    end = data.find(b"\n", 0, LARGEST_HEADER)
    try:
        header = parse_json(data[:end])
        content = memoryview(data)[end + 1 : -4]
        if header["format"] == 1:  # without checksums
            header |= {"format": FORMAT, "packed": len(content), "checksum": 0}
        first, bits, packed, width = (
            header[name] for name in ("first", "bits", "packed", "checksum")
        )
        valid = (
            (header["format"], header["tiles"]) == (FORMAT, tiles)
            and all(type(n) is int and n >= 0 for n in (first, bits, packed, width))
            and first + bits <= tiles
            and width <= LARGEST_CHECKSUM
        )
        if not valid:
            return None
        size = -(-bits // 8)
        if packed > len(content):
            return None
        inflated = zlib.decompressobj().decompress(content[:packed], size + 1)  # bounded
        unpacked = np.unpackbits(np.frombuffer(inflated, np.uint8), count=bits).astype(bool)
        rows = np.frombuffer(content[packed:], np.uint8)
        checksums = rows.reshape(np.count_nonzero(unpacked), width)
    except (ValueError, LookupError, TypeError, zlib.error):
        return None
    return Segment(first, unpacked, checksums) if len(inflated) == size else None
