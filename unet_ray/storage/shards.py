"""The bytes of a shard: which are due where, and that a checksum vouches for each of them.

Knows one file of a Zarr array; does not know stores or runs. A shard has no byte that nothing
covers: its inner chunks, each with a crc32c of its compressed bytes, fill the file up to the index
without a gap, which is checked here, and the index ends it with a crc32c of its own. So any flipped
bit is found, whatever it would have changed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from unet_ray.errors import DamageError
from unet_ray.tiling.tiles import Tile

ABSENT = 2**64 - 1  # offset and length, in the index of a shard, of a chunk that is not there
INDEX_ENTRY, CHECKSUM = 16, 4  # bytes
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
SLACK = 1024  # bytes by which a chunk that cannot be compressed may grow, beyond its double


class Shards:
    """How the shards of one array are laid out.

    Args:
        array: the array, or an empty one of the same layout, opened.
        metadata: its ``zarr.json``.

    Attributes:
        most: no shard has more bytes.
    """

    def __init__(self, array: Any, metadata: bytes) -> None:
        self._metadata = metadata
        self._chunk: tuple[int, ...] = array.chunks
        self._counts = tuple(n // c for n, c in zip(array.shards, array.chunks, strict=True))
        chunks = math.prod(self._counts)
        self._index = INDEX_ENTRY * chunks + CHECKSUM
        self._chunk_bytes = math.prod(self._chunk) * array.dtype.itemsize
        self.most = self._index + chunks * (2 * self._chunk_bytes + SLACK)

    def decode(self, data: bytes, tile: Tile, key: str) -> NDArray[np.uint8]:
        """The voxels that `tile` owns, ``(..., z, y, x)``, from the bytes of its shard.

        Args:
            data: all bytes of the shard.
            tile: whose core it is.
            key: its name in the array, such as ``c/0/1/2``.

        Raises:
            DamageError: if a byte is not as it was written.
        """
        for frame in self._frames(data, tile):
            told = declared_size(frame)
            if told != self._chunk_bytes:
                raise DamageError(
                    f"is damaged: an inner chunk says that it holds {told} bytes, not "
                    f"{self._chunk_bytes}"
                )
        whole = default_buffer_prototype().buffer.from_bytes
        memory = MemoryStore({"zarr.json": whole(self._metadata), key: whole(data)})
        box = (..., *tile.write.slices)
        try:
            return np.asarray(zarr.open_array(memory, mode="r")[box])
        except Exception as error:  # whatever codecs raise, it says that these are not their bytes
            raise DamageError(f"is damaged ({str(error).rstrip('.')})") from error

    def _frames(self, data: bytes, tile: Tile) -> Iterator[bytes]:
        """The inner chunks, after a look that they and the index are all there is.

        Chunks that lie wholly outside the volume are not stored, all others are.
        """
        end = len(data) - self._index
        if end < 0:
            raise DamageError(f"is truncated: it has {len(data)} bytes, less than its index")
        index = np.frombuffer(data[end:-CHECKSUM], "<u8").reshape(-1, 2)
        stored = np.zeros(self._counts, bool)
        extents = zip(tile.write.shape, self._chunk[-3:], strict=True)
        z, y, x = (slice(-(-n // c)) for n, c in extents)
        stored[..., z, y, x] = True
        spans = sorted(index[stored.ravel()].tolist())
        starts = itertools.accumulate((length for _, length in spans), initial=0)
        if [start for start, _ in spans] + [end] != [*starts] or (
            index[~stored.ravel()] != ABSENT
        ).any():
            raise DamageError("is truncated or damaged: its index does not fit its chunks")
        return (data[start : start + length] for start, length in spans)


def declared_size(frame: bytes) -> int | None:
    """Bytes that a Zstandard frame says it holds (RFC 8878, 3.1.1.1); None if it does not say.

    A decoder takes as much memory as this number asks for.
    """
    if frame[:4] != ZSTD_MAGIC or len(frame) < 5:
        return None
    flags = frame[4]
    single = flags >> 5 & 1
    width = (single, 2, 4, 8)[flags >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    told = int.from_bytes(frame[start : start + width], "little") + 256 * (width == 2)
    return told if width else None
