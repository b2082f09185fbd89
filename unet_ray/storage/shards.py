"""Checks and decodes the bytes of a shard, so that any flipped bit is detected.

Knows one file of a Zarr array. Does not know stores or runs.

Checksums cover every byte of a shard. It consists of inner chunks, each with a crc32c of its
compressed bytes, and of an index with its own crc32c. This module also checks that no gap is left
between the chunks or before the index.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import zlib
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np
import pyarrow
from numpy.typing import NDArray

from unet_ray.errors import DamageError
from unet_ray.tiling.boxes import Ints
from unet_ray.tiling.tiles import Tile

ABSENT = 2**64 - 1  # offset and length of a missing chunk in the index of a shard
INDEX_ENTRY, CHECKSUM = 16, 4  # bytes
_ZSTD = pyarrow.Codec("zstd")
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
CHECKSUM_BYTES = 8  # of the voxels of a tile in one output
SLACK = 1024  # bytes added to twice the size of a chunk, as a bound of its compressed size


class Shards:
    """The layout of the shards of one array.

    Args:
        array: the opened array, or an empty one with the same layout.

    Attributes:
        max_bytes: upper bound of the bytes of a shard.
    """

    def __init__(self, array: Any) -> None:
        self._chunk: tuple[int, ...] = array.chunks
        self._counts = tuple(n // c for n, c in zip(array.shards, array.chunks, strict=True))
        chunks = math.prod(self._counts)
        self._leading: Ints = array.shards[:-3]
        self._dtype = array.dtype.newbyteorder("<")
        self._index = INDEX_ENTRY * chunks + CHECKSUM
        self._chunk_bytes = math.prod(self._chunk) * array.dtype.itemsize
        self.max_bytes = self._index + chunks * (2 * self._chunk_bytes + SLACK)

    def decode(self, data: bytes, tile: Tile) -> NDArray[Any]:
        """Returns the voxels that `tile` owns, ``(..., z, y, x)``, from its shard.

        Args:
            data: all bytes of the shard.
            tile: the tile of the shard.

        Raises:
            DamageError: if a byte has changed since it was written.
        """
        voxels = np.empty((*self._leading, *tile.write.shape), self._dtype)
        for position, frame in self._frames(data, tile):
            places = zip(position, self._chunk, voxels.shape, strict=True)
            inside = tuple(slice(n * c, min(n * c + c, extent)) for n, c, extent in places)
            part = voxels[inside]
            part[:] = self._chunk_of(frame)[tuple(slice(n) for n in part.shape)]
        return voxels

    def _chunk_of(self, frame: bytes) -> NDArray[Any]:
        """Decodes an inner chunk after checking its checksum and its declared size."""
        compressed, checksum = frame[:-CHECKSUM], frame[-CHECKSUM:]
        declared = declared_size(compressed)
        if declared != self._chunk_bytes:
            raise DamageError(
                f"is damaged: an inner chunk declares {declared} bytes, not {self._chunk_bytes}"
            )
        if google_crc32c.value(compressed) != int.from_bytes(checksum, "little"):
            raise DamageError("is damaged: an inner chunk has a wrong checksum")
        try:
            # Never more than the given size, even if several frames follow each other.
            values = _ZSTD.decompress(compressed, decompressed_size=self._chunk_bytes)
        except OSError as error:
            raise DamageError(f"is damaged ({str(error).rstrip('.')})") from error
        return np.frombuffer(values, self._dtype).reshape(self._chunk)

    def _frames(self, data: bytes, tile: Tile) -> Iterator[tuple[Ints, bytes]]:
        """Yields the position of each inner chunk in the shard, and its bytes.

        Checks that they and the index fill the shard. All chunks are stored except those entirely
        outside the volume.
        """
        end = len(data) - self._index
        if end < 0:
            raise DamageError(f"is truncated: it has {len(data)} bytes, fewer than its index")
        if google_crc32c.value(data[end:-CHECKSUM]) != int.from_bytes(data[-CHECKSUM:], "little"):
            raise DamageError("is damaged: its index has a wrong checksum")
        index = np.frombuffer(data[end:-CHECKSUM], "<u8").reshape(-1, 2)
        stored = np.zeros(self._counts, bool)
        extents = zip(tile.write.shape, self._chunk[-3:], strict=True)
        z, y, x = (slice(-(-n // c)) for n, c in extents)
        stored[..., z, y, x] = True
        spans = index[stored.ravel()].tolist()
        ordered = sorted(spans)
        starts = itertools.accumulate((length for _, length in ordered), initial=0)
        if [start for start, _ in ordered] + [end] != [*starts] or (
            index[~stored.ravel()] != ABSENT
        ).any():
            raise DamageError("is truncated or damaged: its index does not match its chunks")
        for position, (start, length) in zip(np.argwhere(stored).tolist(), spans, strict=True):
            yield tuple(position), data[start : start + length]


def checksum_of(voxels: NDArray[Any]) -> str:
    """Returns a checksum of a tile's voxels in one output, as 16 hexadecimal digits.

    It does not depend on the compression of the shard, which differs between versions of zstd.
    Ids of objects have 8 bytes a voxel, so they get the CRC-32 of each half, 5 times faster.
    """
    data = np.ascontiguousarray(voxels).data.cast("B")
    if voxels.dtype == np.uint64:
        half = len(data) // 2
        return f"{zlib.crc32(data[:half]):08x}{zlib.crc32(data[half:]):08x}"
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).hexdigest()


def declared_size(frame: bytes) -> int | None:
    """Returns the uncompressed bytes that a Zstandard frame declares (RFC 8878, 3.1.1.1).

    Decoders allocate this amount of memory, so check it before decoding. Returns None if the
    frame does not declare its size.
    """
    if frame[:4] != ZSTD_MAGIC or len(frame) < 5:
        return None
    flags = frame[4]
    single = flags >> 5 & 1
    width = (single, 2, 4, 8)[flags >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    size = int.from_bytes(frame[start : start + width], "little") + 256 * (width == 2)
    return size if width else None
