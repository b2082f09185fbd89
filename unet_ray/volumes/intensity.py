"""The grey values of a volume: mean and standard deviation, measured once before tiling.

Knows how to prepare intensities for the network; the values belong to the whole volume and are
never taken per tile, or tiles would differ where they meet.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError, RunError
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import round_up
from unet_ray.volumes.volume import Volume

EXACT_BYTES = 2 << 30
PIECE = (16, 512, 512)
PIECE_BYTES = 32 << 20
BLOCK, BLOCK_BYTES = 1 << 20, 32  # voxels whose sums are taken at a time, bytes that each takes
FEW = 1000  # voxels whose median is near enough to the mean
HOPELESS = 16  # chunks from all over a volume that cannot be read


@dataclass(frozen=True)
class Intensity:
    """Mean and standard deviation of each channel, in the volume's own units.

    Attributes:
        mean: one number per channel.
        sd: one number per channel; 1 for a constant channel, so that it becomes 0.
        unread: boxes that could not be read and were left out.
    """

    mean: tuple[float, ...]
    sd: tuple[float, ...]
    unread: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the store's provenance and model headers."""
        told = {k: list(v) for k, v in asdict(self).items() if k != "unread" or v}
        return {"method": "mean-std", **told}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Intensity:
        """The reverse of `to_json`."""
        return cls(tuple(told["mean"]), tuple(told["sd"]), tuple(told.get("unread", ())))

    def normalise(self, voxels: NDArray[Any]) -> NDArray[np.float32]:
        """``(voxels - mean) / sd`` in float32, for an array ``(c, ...)``."""
        shape = (-1,) + (1,) * (voxels.ndim - 1)
        if voxels.dtype.itemsize > 2 and voxels.dtype != np.float32:
            # float32 cannot hold these values, but their distances from the mean.
            about: NDArray[np.float64] = voxels - np.asarray(self.mean).reshape(shape)
            about /= np.asarray(self.sd).reshape(shape)
            return about.astype(np.float32)
        result = voxels.astype(np.float32)
        result -= np.asarray(self.mean, np.float32).reshape(shape)
        result *= (1 / np.asarray(self.sd)).astype(np.float32).reshape(shape)
        return result


def measure(volume: Volume) -> Intensity:
    """Measures `volume`: exactly up to 2 GiB, beyond that over a deterministic sample of pieces.

    Pieces are cut at fixed places, measured each by itself and put together in a fixed order, so
    the result does not depend on who measures, or on reads that fail at first. Values that are not
    finite are passed over, and chunks that cannot be read are left out; the tile that reads them
    names them.

    Raises:
        InputError: if nothing of the volume can be read.
    """
    pieces = _pieces(volume)
    found: dict[Box, NDArray[np.float64]] = {}
    for piece in pieces:
        with suppress(RunError):  # later, when a bad moment of its disk may be over
            found[piece] = _summary(volume.read(piece))
    if not found:
        _refuse_unreadable(volume, pieces)
    unread: dict[Box, str] = {}
    for piece in pieces:
        if piece not in found:
            found[piece] = _patiently(volume, piece, unread)
    total = functools.reduce(_together, (found[piece] for piece in pieces))
    if unread and not total[0].any():
        raise InputError(next(iter(unread.values())))
    return _intensity(total, tuple(map(str, unread)))


def measured_bytes(volume: Volume) -> int:
    """Bytes at most that `measure` holds: a piece, what reading it holds, and a block in floats."""
    piece = max(_pieces(volume), key=lambda box: box.size)
    # Channels that are not stored one after the other are put so, in a copy.
    copies = min(volume.shape[0], 2)
    voxels = math.prod(piece.shape) * volume.shape[0] * volume.dtype.itemsize
    return volume.read_overhead(piece.shape) + copies * voxels + BLOCK_BYTES * BLOCK


def summarise(voxels: NDArray[Any]) -> Intensity:
    """The same of an array ``(c, ...)``."""
    return _intensity(_summary(voxels))


def _intensity(total: NDArray[np.float64], unread: tuple[str, ...] = ()) -> Intensity:
    count, mean, squares = total
    sd = np.sqrt(squares / np.maximum(count, 1))
    sd[sd <= 1e-12 * np.abs(mean)] = 1.0
    return Intensity(tuple(mean.tolist()), tuple(sd.tolist()), unread)


def _refuse_unreadable(volume: Volume, pieces: Sequence[Box]) -> None:
    """Refuses a volume none of whose chunks can be read, of a few from all over it."""
    told = ""
    for piece in _some(pieces, HOPELESS):
        for chunk in _some([*piece.split(volume.chunk)], -(-HOPELESS // len(pieces))):
            try:
                volume.read_patiently(chunk)
                return
            except RunError as error:
                told = told or str(error)
    raise InputError(told)


def _some(boxes: Sequence[Box], most: int) -> Sequence[Box]:
    """At most so many of them, always the same."""
    return random.Random(0).sample(boxes, min(most, len(boxes)))


def _patiently(volume: Volume, piece: Box, unread: dict[Box, str]) -> NDArray[np.float64]:
    """The summary of a piece, or of its chunks that can be read; notes the others."""
    try:
        return _summary(volume.read_patiently(piece))
    except RunError:
        total: NDArray[np.float64] = np.zeros((3, volume.shape[0]))
        for chunk in piece.split(volume.chunk):  # pieces begin where chunks do
            try:
                total = _together(total, _summary(volume.read_patiently(chunk)))
            except RunError as error:
                unread[chunk] = str(error)
        return total


def _summary(voxels: NDArray[Any]) -> NDArray[np.float64]:
    """Number, mean and squared distances from it of the finite `voxels` (c, ...): (3, c)."""
    voxels = voxels.reshape(voxels.shape[0], -1)
    # Sums about a value near the mean lose no digits where the mean is far from zero.
    few = voxels[:, :: voxels.shape[1] // FEW + 1].astype(np.float64)
    few[~np.isfinite(few)] = np.nan
    known = np.isfinite(few).any(1)
    shift = np.zeros(len(voxels))
    shift[known] = np.round(np.nanmedian(few[known], axis=1))
    count, first, second = _moments(voxels, shift)
    mean = first / np.maximum(count, 1)
    return np.stack([count, mean + shift, np.maximum(second - count * mean**2, 0.0)])


def _together(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """The summary of the voxels of two (Chan, Golub, LeVeque 1979)."""
    count = one[0] + other[0]
    share = other[0] / np.maximum(count, 1)
    apart = other[1] - one[1]
    # The mean of no voxels means nothing.
    mean = np.where(one[0] == 0, other[1], one[1] + share * apart)
    return np.stack([count, mean, one[2] + other[2] + apart**2 * one[0] * share])


def _moments(voxels: NDArray[Any], shift: NDArray[np.float64]) -> NDArray[np.float64]:
    """Number, sum and sum of squares of the finite `voxels` (c, n) about `shift`: (3, c)."""
    block = max(1, BLOCK // len(voxels))
    if voxels.shape[1] > block:
        # In blocks, since sums need copies of eight bytes a voxel.
        parts = (voxels[:, a : a + block] for a in range(0, voxels.shape[1], block))
        total: NDArray[np.float64] = np.sum([_moments(part, shift) for part in parts], axis=0)
        return total
    if voxels.dtype == np.uint8:
        levels = np.arange(256) - shift[:, None]
        counts = np.stack([np.bincount(v, minlength=256) for v in voxels])
        return np.stack([counts.sum(1), (counts * levels).sum(1), (counts * levels**2).sum(1)])
    about = voxels.astype(np.float64) - shift[:, None]
    finite = np.isfinite(about)
    about[~finite] = 0.0
    return np.stack([finite.sum(1), about.sum(1), np.square(about).sum(1)])


def _pieces(volume: Volume) -> list[Box]:
    """The boxes that are measured: all, or one of every so many by a hash of its number."""
    # Whole storage chunks, so that none is decoded twice where chunks are larger than a piece.
    z, y, x = (round_up(p, c) for p, c in zip(PIECE, volume.chunk, strict=True))
    thick = volume.chunk[0]
    plane = y * x * volume.shape[0] * volume.dtype.itemsize
    size = max(thick, min(z, PIECE_BYTES // plane) // thick * thick), y, x
    total = math.prod(volume.shape) * volume.dtype.itemsize
    every = -(-total // EXACT_BYTES)
    counts = [-(-n // s) for n, s in zip(volume.shape[1:], size, strict=True)]
    chosen = range(0, math.prod(counts), every)
    return [_piece(volume, size, counts, _one_of(first, every, chosen.stop)) for first in chosen]


def _one_of(first: int, every: int, end: int) -> int:
    """One of so many numbers from `first` on, by a hash, the first of all among them."""
    mark = hashlib.sha256(first.to_bytes(8, "little")).digest()
    return first and first + int.from_bytes(mark[:8], "little") % min(every, end - first)


def _piece(volume: Volume, size: Sequence[int], counts: Sequence[int], number: int) -> Box:
    rest, x = divmod(number, counts[2])
    z, y = divmod(rest, counts[1])
    start = tuple(a * s for a, s in zip((z, y, x), size, strict=True))
    extents = zip(start, size, volume.shape[1:], strict=True)
    return Box(start, tuple(min(a + s, n) for a, s, n in extents))
