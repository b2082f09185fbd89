"""The grey values of a volume: mean and standard deviation, measured once before tiling.

Knows how to prepare intensities for the network; the values belong to the whole volume and are
never taken per tile, or tiles would differ where they meet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.boxes import Box
from unet_ray.errors import InputError, RunError
from unet_ray.tiles import round_up
from unet_ray.volumes import Volume

EXACT_BYTES = 2 << 30
PIECE = (16, 512, 512)
PIECE_BYTES = 32 << 20
BLOCK = 1 << 20


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

    Pieces are cut at fixed places and summed in a fixed order, so the result does not depend on
    who measures. Values that are not finite are passed over, and chunks that cannot be read are
    left out; the tile that reads them names them.

    Raises:
        InputError: if nothing of the volume can be read.
    """
    moments = np.zeros((3, volume.shape[0]))
    shift: NDArray[np.float64] = np.zeros(volume.shape[0])
    unread: dict[Box, str] = {}
    for number, voxels in enumerate(_readable(volume, unread)):
        if number == 0:
            # Sums about a value near the mean lose no digits where the mean is far from zero.
            count, first, _ = _moments(voxels, shift)
            shift = np.round(first / np.maximum(count, 1))
        moments += _moments(voxels, shift)
    if unread and not moments[0].any():
        raise InputError(next(iter(unread.values())))
    count, first, second = moments / np.maximum(moments[0], 1)
    mean, sd = first + shift, np.sqrt(np.maximum(second - first**2, 0.0))
    sd[sd <= 1e-12 * np.abs(mean)] = 1.0
    return Intensity(tuple(mean.tolist()), tuple(sd.tolist()), tuple(map(str, unread)))


def _readable(volume: Volume, unread: dict[Box, str]) -> Iterator[NDArray[Any]]:
    """The voxels (c, n) of each piece, or of its chunks that can be read; notes the others."""
    for piece in _pieces(volume):
        try:
            yield volume.read_patiently(piece).reshape(volume.shape[0], -1)
        except RunError:
            # Pieces begin where chunks do.
            for chunk in piece.split(volume.chunk):
                try:
                    yield volume.read_patiently(chunk).reshape(volume.shape[0], -1)
                except RunError as error:
                    unread[chunk] = str(error)


def _moments(voxels: NDArray[Any], shift: NDArray[np.float64]) -> NDArray[np.float64]:
    """Number, sum and sum of squares of the finite `voxels` (c, n) about `shift`: (3, c)."""
    if voxels.shape[1] > BLOCK:
        # In blocks, since sums need copies of eight bytes a voxel.
        parts = (voxels[:, a : a + BLOCK] for a in range(0, voxels.shape[1], BLOCK))
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


def _pieces(volume: Volume) -> Iterator[Box]:
    """The boxes that are measured: all, or every k-th by a hash of its number."""
    # Whole storage chunks, so that none is decoded twice where chunks are larger than a piece.
    z, y, x = (round_up(p, c) for p, c in zip(PIECE, volume.chunk, strict=True))
    plane = y * x * volume.shape[0] * volume.dtype.itemsize
    size = max(volume.chunk[0], min(z, PIECE_BYTES // plane)), y, x
    total = int(np.prod(volume.shape)) * volume.dtype.itemsize
    every = -(-total // EXACT_BYTES)
    for number, box in enumerate(Box.of(volume.shape[1:]).split(size)):
        mark = hashlib.sha256(number.to_bytes(8, "little")).digest()
        if every == 1 or number == 0 or int.from_bytes(mark[:8], "little") % every == 0:
            yield box
