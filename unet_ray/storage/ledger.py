"""Which tiles of a stage are committed, quarantined or skipped: immutable segments of bits.

Knows numbers; a tile is committed after its shards are on disk, and only by the driver. A segment
is a small file, written whole or not at all, that holds the bits of a range of tiles; of those that
are skipped it holds all, and the newest counts. What a run adds goes into new ones, named by the
epoch of the run and a sequence number, and opening a ledger puts them together in one. So nothing
is ever changed in place, as object stores want it, and a kill loses at most the tiles of the last
second, which are then made again with the same bytes. A segment that does not check out holds
nothing, nor does one that is older than the store: a run that was forced out may note what it did
to the one before.
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
# A segment is written at most so often, and put together with others before they are many.
SECONDS = 1.0
SEGMENTS = 256
FORMAT = 1
BORN = ".born"  # ending of an empty file whose name is the epoch that made the store
_NAME = re.compile(rf"[0-9]+{re.escape(BORN)}|[0-9]+-[0-9]+\.({'|'.join(STATES)})")


class Ledger:
    """The tiles of one stage, open for more.

    A tile that is committed is no longer quarantined or skipped.

    Args:
        folder: of the segments; made if it is not there.
        tiles: number of tiles of the plan.
        epoch: of the run.

    Attributes:
        born: the epoch that made the store; 0 if none is told.

    Raises:
        LostError: if the store was made anew by a later run.
    """

    def __init__(self, folder: Place, tiles: int, epoch: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.born = _born(folder)
        if self.born > epoch:
            raise _lost(folder)
        self._folder, self._epoch = folder, epoch
        records = _read(folder, tiles)
        self._bits, self._files = records.bits, records.files
        for state in STATES[1:]:
            self._bits[state] &= ~self._bits["committed"]
        self._count = int(self._bits["committed"].sum())
        own = (path for path in records.files if _epoch_of(path) == epoch)
        self._sequence = max(map(_sequence_of, own), default=0)
        self._added: dict[State, list[int]] = {state: [] for state in STATES}
        self._written, self._lock = time.monotonic(), threading.Lock()
        self._timer: threading.Timer | None = None
        for path in records.stale:
            path.unlink(missing_ok=True)
        self._compact(always=bool(records.damaged))

    def commit(self, tile: int) -> None:
        """Notes that the shards of `tile` are on disk; the note is there itself a second later."""
        self._count += not self._bits["committed"][tile]
        self._add("committed", tile)
        self._bits["quarantined"][tile] = self._bits["skipped"][tile] = False

    def quarantine(self, tile: int) -> None:
        """Notes that `tile` has failed too often, and is left until the next run."""
        self._add("quarantined", tile)

    def skip(self, tiles: Bits, wanted: Bits) -> None:
        """Notes which tiles are not asked for, and which are, whatever an earlier run was asked.

        It is on disk on return.

        Args:
            tiles: those that are not, (tiles,).
            wanted: those that are, (tiles,); of all others nothing changes.
        """
        with self._lock:
            now = (self._bits["skipped"] & ~wanted | tiles) & ~self._bits["committed"]
            if (now != self._bits["skipped"]).any():
                self._bits["skipped"] = now
                self._write("skipped", 0, now)

    def _add(self, state: State, tile: int) -> None:
        if not 0 <= tile < self._bits[state].size:
            raise IndexError(f"Tile {tile} of a ledger of {self._bits[state].size} tiles.")
        with self._lock:
            self._bits[state][tile] = True
            self._added[state].append(tile)
        if time.monotonic() - self._written >= SECONDS:
            self.flush()
        elif not self._timer:
            self._timer = threading.Timer(SECONDS, self._flush_late)
            self._timer.daemon = True
            self._timer.start()

    def _flush_late(self) -> None:
        self._timer = None
        with suppress(OSError):  # the next tile tries again, and tells
            self.flush()

    def flush(self) -> None:
        """Writes down what was noted; returns when it is on disk."""
        with self._lock:
            for state, tiles in self._added.items():
                if tiles:
                    first, last = min(tiles), max(tiles)
                    bits = np.zeros(last + 1 - first, bool)
                    bits[np.array(tiles) - first] = True
                    self._write(state, first, bits)
                    tiles.clear()
            self._written = time.monotonic()
            if len(self._files) > SEGMENTS:
                self._compact()

    def _write(self, state: State, first: int, bits: Bits) -> None:
        self._sequence += 1
        path = self._folder / f"{self._epoch:08d}-{self._sequence:08d}.{state}"
        write_whole(path, _encode(first, bits, self._bits[state].size))
        self._files.append(path)

    def _compact(self, always: bool = False) -> None:
        """Puts all segments together; a kill in between leaves both, which say the same."""
        if len(self._files) <= len(STATES) and not always:
            return
        old, self._files = self._files, []
        for state in STATES:
            self._write(state, 0, self._bits[state])
        for path in old:
            path.unlink(missing_ok=True)

    def __contains__(self, tile: int) -> bool:
        return bool(self._bits["committed"][tile])

    def __len__(self) -> int:
        return self._count

    @property
    def committed(self) -> Bits:
        """Which tiles are committed: (tiles,), not to be changed."""
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
    """Begins the ledger of a new store: whatever the folder holds counts no more.

    Args:
        folder: of the segments; made if it is not there.
        epoch: of the run that makes the store; later than any here.

    Raises:
        LostError: if it is not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if newest(folder) >= epoch:
        raise _lost(folder)
    write_whole(folder / f"{epoch:08d}{BORN}", b"")


def newest(folder: Place) -> int:
    """The newest epoch that made a store here, or noted something; 0 if none did."""
    return max(map(_epoch_of, _listed(folder)), default=0)


def has_begun(folder: Place) -> bool:
    """Whether there is a ledger at all."""
    return bool(_listed(folder))


def has_notes(folder: Place) -> bool:
    """Whether something was noted of the store, whatever it is."""
    born = _born(folder)
    return any(path.suffix != BORN and _epoch_of(path) >= born for path in _listed(folder))


def committed(folder: Place, tiles: int) -> Bits:
    """Which of so many tiles a ledger holds, also while a run adds to it: (tiles,).

    Raises:
        RunError: if a segment cannot be read, though it is there.
    """
    return _read(folder, tiles).bits["committed"]


def quarantined(folder: Place, tiles: int) -> Bits:
    """Which of so many tiles have failed too often, and are not committed since: (tiles,)."""
    bits = _read(folder, tiles).bits
    return bits["quarantined"] & ~bits["committed"]


def skipped(folder: Place, tiles: int) -> Bits:
    """Which of so many tiles no mask asked for, and are not committed since: (tiles,)."""
    bits = _read(folder, tiles).bits
    return bits["skipped"] & ~bits["committed"]


def damaged(folder: Place, tiles: int) -> list[Place]:
    """The segments that do not check out, and so hold nothing; the next run removes them."""
    return _read(folder, tiles).damaged


@dataclass(frozen=True)
class _Records:
    """What a ledger holds.

    Attributes:
        bits: of all its segments together.
        files: its segments.
        damaged: those of them that do not check out.
        stale: what is older than the store.
    """

    bits: dict[State, Bits]
    files: list[Place]
    damaged: list[Place]
    stale: list[Place]


def _read(folder: Place, tiles: int) -> _Records:
    missing: set[Place] = set()
    while True:
        every = _listed(folder)
        born = max((_epoch_of(path) for path in every if path.suffix == BORN), default=0)
        files = [path for path in every if _epoch_of(path) >= born and path.suffix != BORN]
        stale = [path for path in every if _epoch_of(path) < born]
        records = _Records({state: np.zeros(tiles, bool) for state in STATES}, files, [], stale)
        path = _add_all(records, tiles)
        if path is None:
            return records
        if path in missing and path in _listed(folder):  # as a link that leads nowhere
            raise RunError(f"{path}: cannot be read, though it is there; remove it.")
        missing.add(path)  # put together with others in the meantime


def _add_all(records: _Records, tiles: int) -> Place | None:
    """Reads all segments; gives the first that is not there any more, if one is not."""
    for path in sorted(records.files, key=lambda path: (_epoch_of(path), _sequence_of(path))):
        try:
            found = _decode(path.read_bytes(), tiles)
        except FileNotFoundError:
            return path
        if found:
            first, some = found
            state = next(state for state in STATES if path.suffix == f".{state}")
            if state == "skipped":  # always all tiles, as the newest run was asked for them
                records.bits[state][:] = False
            records.bits[state][first : first + some.size] |= some
        else:
            records.damaged.append(path)
    return None


def _listed(folder: Place) -> list[Place]:
    """The segments, and what tells when the store was made."""
    return [path for path in folder.glob("[0-9]*") if _NAME.fullmatch(path.name)]


def _epoch_of(path: Place) -> int:
    return int(path.stem.partition("-")[0])


def _sequence_of(path: Place) -> int:
    return int(path.stem.partition("-")[2])


def _lost(folder: Place) -> LostError:
    return LostError(f"{folder}: another run has taken over from this one, so it stops.")


def _born(folder: Place) -> int:
    """The epoch that made the store; 0 if none is told."""
    return max((_epoch_of(path) for path in _listed(folder) if path.suffix == BORN), default=0)


def _encode(first: int, bits: Bits, tiles: int) -> bytes:
    """A segment: a line of JSON, the bits, and a checksum of both."""
    about = {"format": FORMAT, "tiles": tiles, "first": first, "bits": bits.size}
    data = json.dumps(about).encode() + b"\n" + zlib.compress(np.packbits(bits).tobytes(), 1)
    return data + zlib.crc32(data).to_bytes(4, "little")


def _decode(data: bytes, tiles: int) -> tuple[int, Bits] | None:
    """The first tile and the bits of a segment; None if it is damaged or of another plan."""
    head, _, packed = data[:-4].partition(b"\n")
    if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        return None
    about = json.loads(head)
    if about["format"] != FORMAT or about["tiles"] != tiles:
        return None
    records = np.frombuffer(zlib.decompress(packed), np.uint8)
    return about["first"], np.unpackbits(records, count=about["bits"]).astype(bool)
