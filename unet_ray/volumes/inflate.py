"""Decompresses strips and tiles of TIFF files, each to its expected size at most.

The decoders that tifffile uses without the package imagecodecs have no such bound: a file of
megabytes could fill the memory. Independent of the layout of a file.
"""

from __future__ import annotations

import importlib
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import Any

import tifffile

Inflate = Callable[[bytes, int], bytes]
"""Decompresses bytes to at most a number of bytes."""

_DEFLATE, _LZMA, _PACKBITS, _ZSTD = (8, 32946, 50013), 34925, 32773, (34926, 50000)


def inflater_of(compression: int) -> Inflate | None:
    """Returns the bounded decoder of a TIFF compression.

    Returns None if tifffile's own decoder is bounded, or if there is nothing to decompress.
    """
    decoder = tifffile.TIFF.DECOMPRESSORS[compression]
    if compression == 1 or not decoder.__module__.endswith("_imagecodecs"):
        return None
    if compression == _PACKBITS:
        return _unpack_bits
    makers: dict[int, Callable[[], Any]] = dict.fromkeys(_DEFLATE, zlib.decompressobj)
    makers[_LZMA] = lzma.LZMADecompressor
    if sys.version_info >= (3, 14):
        zstd = importlib.import_module("compression.zstd")
        makers |= dict.fromkeys(_ZSTD, zstd.ZstdDecompressor)
    make = makers[compression]
    return lambda data, limit: _inflate(make(), data, limit)


def _inflate(decompressor: Any, data: bytes, limit: int) -> bytes:
    # One byte more than valid shows that there is more.
    inflated: bytes = decompressor.decompress(data, limit + 1)
    if len(inflated) > limit:
        raise _too_long(limit)
    if not decompressor.eof:
        raise ValueError("the compressed data are incomplete")
    return inflated


def _unpack_bits(data: bytes, limit: int) -> bytes:
    """Decompresses PackBits (TIFF 6.0, section 9)."""
    unpacked, i = bytearray(), 0
    while i < len(data):
        count = data[i]
        if count < 128:
            unpacked += data[i + 1 : i + 2 + count]
            i += 2 + count
        else:
            if count > 128:
                unpacked += data[i + 1 : i + 2] * (257 - count)
                i += 1
            i += 1
        if len(unpacked) > limit:
            raise _too_long(limit)
    return bytes(unpacked)


def _too_long(limit: int) -> ValueError:
    return ValueError(f"the compressed data have more than the {limit} bytes of a strip or tile")
