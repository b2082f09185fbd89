"""Mean and standard deviation of a volume's intensities, measured once before tiling.

Prepares intensities for the network. The statistics describe the whole volume, never one tile:
otherwise adjacent tiles would differ at their border.
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
BLOCK, BLOCK_BYTES = 1 << 20, 32  # voxels summed at a time; working memory per voxel in bytes
MEDIAN_VOXELS = 1000  # at most this many voxels per channel estimate the median of a piece
PROBED_CHUNKS = 16  # unreadable chunks, spread over the volume, after which it is refused


@dataclass(frozen=True)
class Intensity:
    """Mean and standard deviation of each channel, in the units of the volume.

    Attributes:
        mean: mean of each channel.
        sd: standard deviation of each channel; 1 for a constant channel, which normalises to 0.
        unread: boxes that were left out because they could not be read.
    """

    mean: tuple[float, ...]
    sd: tuple[float, ...]
    unread: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object for provenance and model headers."""
        fields = {k: list(v) for k, v in asdict(self).items() if k != "unread" or v}
        return {"method": "mean-std", **fields}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Intensity:
        """Restores the result of `to_json`."""
        return cls(tuple(fields["mean"]), tuple(fields["sd"]), tuple(fields.get("unread", ())))

    def normalise(self, voxels: NDArray[Any]) -> NDArray[np.float32]:
        """Returns ``(voxels - mean) / sd`` in float32, for an array ``(c, ...)``."""
        shape = (-1,) + (1,) * (voxels.ndim - 1)
        if not fits_float32(voxels.dtype):
            # float32 may round the values themselves, but not their distances from the mean.
            centred: NDArray[np.float64] = voxels - np.asarray(self.mean).reshape(shape)
            centred /= np.asarray(self.sd).reshape(shape)
            return centred.astype(np.float32)
        result = voxels.astype(np.float32)
        mean, factor = self.in_float32()
        result -= mean.reshape(shape)
        result *= factor.reshape(shape)
        return result

    def in_float32(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What `normalise` subtracts and then multiplies by, for each channel ``(c,)``."""
        return np.asarray(self.mean, np.float32), (1 / np.asarray(self.sd)).astype(np.float32)


def fits_float32(dtype: np.dtype[Any]) -> bool:
    """Returns whether `Intensity.normalise` computes voxels of a dtype in float32 alone."""
    return dtype.itemsize <= 2 or dtype == np.float32


@np.errstate(over="ignore", invalid="ignore")  # refused below
def measure(volume: Volume) -> Intensity:
    """Measures `volume`: exactly up to 2 GiB, above that from a deterministic sample of pieces.

    Pieces have fixed positions, and their statistics are combined in a fixed order. The result
    therefore does not depend on the process, or on reads that succeed only when repeated.
    Non-finite values are ignored. Unreadable chunks are left out; a tile that needs one of them
    reports it.

    Raises:
        InputError: if no chunk of the volume can be read.
    """
    pieces = _pieces(volume)
    summaries: dict[Box, NDArray[np.float64]] = {}
    for piece in pieces:
        with suppress(RunError):  # retried below, when a short fault of the disk may be over
            summaries[piece] = _summary(volume.read(piece))
    if not summaries:
        _refuse_unreadable(volume, pieces)
    unread: dict[Box, str] = {}
    for piece in pieces:
        if piece not in summaries:
            summaries[piece] = _summary_with_retries(volume, piece, unread)
    total = functools.reduce(_combined, (summaries[piece] for piece in pieces))
    if not np.isfinite(total).all():
        raise InputError(
            f"{volume.path} has values so large that their variance exceeds the range of floats; "
            "scale them down."
        )
    if unread and not total[0].any():
        raise InputError(next(iter(unread.values())))
    return _intensity(total, tuple(map(str, unread)))


def measured_bytes(volume: Volume) -> int:
    """Upper bound of the bytes that `measure` needs.

    They are one piece, the overhead of reading it, and one block in floats.
    """
    piece = max(_pieces(volume), key=lambda box: box.size)
    # `_summary` copies a piece of several channels if their voxels are not contiguous.
    copies = min(volume.shape[0], 2)
    piece_bytes = math.prod(piece.shape) * volume.shape[0] * volume.dtype.itemsize
    return volume.read_overhead(piece.shape) + copies * piece_bytes + BLOCK_BYTES * BLOCK


def summarise(voxels: NDArray[Any]) -> Intensity:
    """Measures an array ``(c, ...)``, ignoring non-finite values."""
    return _intensity(_summary(voxels))


def _intensity(total: NDArray[np.float64], unread: tuple[str, ...] = ()) -> Intensity:
    count, mean, squares = total
    sd = np.sqrt(squares / np.maximum(count, 1))
    sd[sd <= 1e-12 * np.abs(mean)] = 1.0
    return Intensity(tuple(mean.tolist()), tuple(sd.tolist()), unread)


def _refuse_unreadable(volume: Volume, pieces: Sequence[Box]) -> None:
    """Refuses a volume if all chunks of a random sample are unreadable."""
    first_error = ""
    for piece in _sample(pieces, PROBED_CHUNKS):
        for chunk in _sample([*piece.split(volume.chunk)], -(-PROBED_CHUNKS // len(pieces))):
            try:
                volume.read_with_retries(chunk)
                return
            except RunError as error:
                first_error = first_error or str(error)
    raise InputError(first_error)


def _sample(boxes: Sequence[Box], limit: int) -> Sequence[Box]:
    """Returns at most `limit` random boxes, the same ones on every call."""
    return random.Random(0).sample(boxes, min(limit, len(boxes)))


def _summary_with_retries(
    volume: Volume, piece: Box, unread: dict[Box, str]
) -> NDArray[np.float64]:
    """Summary of a piece, or of its readable chunks; adds the other chunks to `unread`."""
    try:
        return _summary(volume.read_with_retries(piece))
    except RunError:
        total: NDArray[np.float64] = np.zeros((3, volume.shape[0]))
        for chunk in piece.split(volume.chunk):  # pieces are aligned to chunks
            try:
                total = _combined(total, _summary(volume.read_with_retries(chunk)))
            except RunError as error:
                unread[chunk] = str(error)
        return total


def _summary(voxels: NDArray[Any]) -> NDArray[np.float64]:
    """Count, mean and sum of squared deviations of the finite `voxels` (c, ...), shape (3, c)."""
    voxels = voxels.reshape(voxels.shape[0], -1)
    # Sums of distances from a value near the mean stay exact where the mean is far from zero.
    sample = voxels[:, :: voxels.shape[1] // MEDIAN_VOXELS + 1].astype(np.float64)
    sample[~np.isfinite(sample)] = np.nan
    has_finite = np.isfinite(sample).any(1)
    shift = np.zeros(len(voxels))
    shift[has_finite] = np.round(np.nanmedian(sample[has_finite], axis=1))
    count, first, second = _moments(voxels, shift)
    mean = first / np.maximum(count, 1)
    return np.stack([count, mean + shift, np.maximum(second - count * mean**2, 0.0)])


def _combined(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Combines the summaries of two sets of voxels (Chan, Golub, LeVeque 1979)."""
    count = one[0] + other[0]
    share = other[0] / np.maximum(count, 1)
    difference = other[1] - one[1]
    # The mean of an empty set is arbitrary.
    mean = np.where(one[0] == 0, other[1], one[1] + share * difference)
    return np.stack([count, mean, one[2] + other[2] + difference**2 * one[0] * share])


def _moments(voxels: NDArray[Any], shift: NDArray[np.float64]) -> NDArray[np.float64]:
    """Count, sum and sum of squares of ``voxels - shift``, shape (3, c).

    Non-finite `voxels` (c, n) are ignored.
    """
    block = max(1, BLOCK // len(voxels))
    if voxels.shape[1] > block:
        # Blocks bound the memory: each sum needs a float64 copy of its voxels.
        parts = (voxels[:, a : a + block] for a in range(0, voxels.shape[1], block))
        total: NDArray[np.float64] = np.sum([_moments(part, shift) for part in parts], axis=0)
        return total
    if voxels.dtype == np.uint8:
        levels = np.arange(256) - shift[:, None]
        counts = np.stack([np.bincount(v, minlength=256) for v in voxels])
        return np.stack([counts.sum(1), (counts * levels).sum(1), (counts * levels**2).sum(1)])
    deviations = voxels.astype(np.float64) - shift[:, None]
    finite = np.isfinite(deviations)
    deviations[~finite] = 0.0
    return np.stack([finite.sum(1), deviations.sum(1), np.square(deviations).sum(1)])


def _pieces(volume: Volume) -> list[Box]:
    """Returns the boxes to measure: all pieces, or one out of each group of `group` pieces."""
    # Pieces consist of whole chunks, so no chunk is decoded twice.
    z, y, x = (round_up(p, c) for p, c in zip(PIECE, volume.chunk, strict=True))
    chunk_depth = volume.chunk[0]
    plane_bytes = y * x * volume.shape[0] * volume.dtype.itemsize
    size = max(chunk_depth, min(z, PIECE_BYTES // plane_bytes) // chunk_depth * chunk_depth), y, x
    total_bytes = math.prod(volume.shape) * volume.dtype.itemsize
    group = -(-total_bytes // EXACT_BYTES)
    counts = [-(-n // s) for n, s in zip(volume.shape[1:], size, strict=True)]
    firsts = range(0, math.prod(counts), group)
    return [_piece(volume, size, counts, _pick(first, group, firsts.stop)) for first in firsts]


def _pick(first: int, group: int, end: int) -> int:
    """Picks one of the `group` numbers from `first` on by a hash; always 0 from the first group."""
    digest = hashlib.sha256(first.to_bytes(8, "little")).digest()
    return first and first + int.from_bytes(digest[:8], "little") % min(group, end - first)


def _piece(volume: Volume, size: Sequence[int], counts: Sequence[int], number: int) -> Box:
    """Box of piece `number`, counted in C order over the grid of `counts` pieces."""
    rest, x = divmod(number, counts[2])
    z, y = divmod(rest, counts[1])
    start = tuple(a * s for a, s in zip((z, y, x), size, strict=True))
    extents = zip(start, size, volume.shape[1:], strict=True)
    return Box(start, tuple(min(a + s, n) for a, s, n in extents))
