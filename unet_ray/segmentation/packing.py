"""Packs arrays into one compressed block of bytes with a checksum, and unpacks them.

Knows lengths and dtypes of arrays. Does not know what they contain, or files.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unet_ray.errors import DamageError, RunError

LARGEST = 1 << 30  # bytes of the arrays of a block, together
_KIND, _CHECKSUM = 8, 4  # bytes


def pack(kind: bytes, arrays: Sequence[NDArray[Any]]) -> bytes:
    """Returns a block: kind, CRC-32 of all that follows, lengths in bytes, arrays (Zstandard).

    Args:
        kind: 8 bytes that name the sort of block and its version.
        arrays: of any shape; only their values are stored.

    Raises:
        RunError: if the arrays exceed 1 GiB.
    """
    parts = [np.ascontiguousarray(array).tobytes() for array in arrays]
    if (size := sum(map(len, parts))) > LARGEST:
        raise RunError(
            f"The objects of one tile need {size} bytes, and at most {LARGEST} are possible; use "
            "smaller tiles (--tile)."
        )
    lengths = struct.pack(f"<{len(parts)}Q", *map(len, parts))
    compressed: bytes = _codec().compress(b"".join(parts), asbytes=True)
    content = lengths + compressed
    return kind + struct.pack("<I", zlib.crc32(content)) + content


def unpack(kind: bytes, dtypes: Sequence[str], data: bytes) -> list[NDArray[Any]]:
    """Reverses `pack`; the arrays are 1-D and read-only.

    Args:
        kind: the expected kind.
        dtypes: dtype of each array, such as ``<i8``.
        data: the block, from any source.

    Raises:
        DamageError: if `data` is not a block of this kind, or was changed. No more than 1 GiB is
            decompressed.
    """
    start = _KIND + _CHECKSUM + 8 * len(dtypes)
    if len(data) < start or data[:_KIND] != kind:
        raise DamageError("it does not start as it should")
    content = data[_KIND + _CHECKSUM :]
    if struct.unpack_from("<I", data, _KIND)[0] != zlib.crc32(content):
        raise DamageError("its checksum is wrong")
    lengths = struct.unpack_from(f"<{len(dtypes)}Q", content)
    sizes = [np.dtype(dtype).itemsize for dtype in dtypes]
    whole = all(length % size == 0 for length, size in zip(lengths, sizes, strict=True))
    if not whole or sum(lengths) > LARGEST:
        raise DamageError("its arrays have impossible lengths")
    try:
        values = _codec().decompress(data[start:], decompressed_size=sum(lengths), asbytes=True)
    except OSError as error:
        raise DamageError("it cannot be decompressed") from error
    arrays, offset = [], 0
    for dtype, length, size in zip(dtypes, lengths, sizes, strict=True):
        arrays.append(np.frombuffer(values, dtype, length // size, offset))
        offset += length
    return arrays


def pack_pair(kind: bytes, head: bytes, tail: bytes) -> bytes:
    """Returns two blocks in one, so that the first can be read without the second.

    Args:
        kind: 8 bytes that name the sort of pair and its version.
        head: a block of `pack`.
        tail: likewise.
    """
    return kind + struct.pack("<Q", len(head)) + head + tail


def unpack_pair(kind: bytes, data: bytes) -> tuple[bytes, bytes]:
    """Reverses `pack_pair`. A wrong length shows when `unpack` checks the first block.

    Raises:
        DamageError: if `data` is not of this kind.
    """
    start = _KIND + 8
    if len(data) < start or data[:_KIND] != kind:
        raise DamageError("it does not start as it should")
    end = start + struct.unpack_from("<Q", data, _KIND)[0]
    return data[start:end], data[end:]


def _codec() -> pa.Codec:
    return pa.Codec("zstd", compression_level=1)
