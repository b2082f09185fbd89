"""Which tiles a mask asks for: those of which it shows a voxel that is not zero.

Knows a mask as a volume of the same field of view, at any coarser resolution; does not know what is
done with the tiles that are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError
from unet_ray.storage.places import PathOrUrl
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume

READ_BYTES = 32 << 20  # of a mask that are read at once, or one tile's part


def open_mask(path: PathOrUrl, shape: Sequence[int]) -> Volume:
    """Opens a mask of a volume of `shape` (z, y, x).

    Raises:
        InputError: if it has several channels, or is finer than the volume along an axis.
    """
    mask = open_volume(path)
    if mask.shape[0] != 1:
        raise InputError(f"{mask.path}: a mask has one channel, not {mask.shape[0]}.")
    if any(m > n for m, n in zip(mask.shape[1:], shape, strict=True)):
        raise InputError(
            f"{mask.path}: has {mask.shape[1:]} voxels, more than the volume, {tuple(shape)} "
            "(z, y, x); a mask shows the same field of view as the volume, as fine or coarser."
        )
    return mask


def tiles_under(mask: Volume, plan: TilePlan) -> NDArray[np.bool_]:
    """Which tiles the mask asks for, in the shape of the grid: ``plan.counts``.

    A voxel of the mask stands for an equal part of the field of view; a tile whose core it touches
    is asked for.

    Raises:
        RunError: if the mask cannot be read.
    """
    found = np.zeros(plan.counts, bool)
    for group in Box.of(plan.counts).split(_group(mask, plan)):
        spans = [
            _spans(range(a, b), *axis)
            for a, b, *axis in zip(
                group.start, group.stop, plan.core, plan.shape, mask.shape[1:], strict=True
            )
        ]
        seen = Box(tuple(int(s[0, 0]) for s in spans), tuple(int(s[-1, 1]) for s in spans))
        part = mask.read(seen)[0] != 0
        for axis, (span, start) in enumerate(zip(spans, seen.start, strict=True)):
            part = _any(part, span - start, axis)
        found[group.slices] = part
    return found


def _spans(places: range, core: int, extent: int, masked: int) -> NDArray[np.int64]:
    """The mask's voxels along one axis that each tile touches: (tiles, start and stop)."""
    start = np.arange(places.start, places.stop) * core
    stop = np.minimum(start + core, extent)
    return np.stack([start * masked // extent, -(-stop * masked // extent)], axis=1)


def _any(voxels: NDArray[np.bool_], spans: NDArray[np.int64], axis: int) -> NDArray[np.bool_]:
    """Whether any voxel of each span is true, along one axis."""
    # reduceat takes no end that is the end of the array.
    padded = np.concatenate([voxels, np.zeros_like(voxels.take([0], axis))], axis)
    found: NDArray[np.bool_] = np.logical_or.reduceat(padded, spans.ravel(), axis)
    return found.take(range(0, 2 * len(spans), 2), axis)


def _group(mask: Volume, plan: TilePlan) -> tuple[int, ...]:
    """How many tiles' parts of the mask are read at once, per axis: whole rows, then planes."""
    extents = zip(plan.core, plan.shape, mask.shape[1:], strict=True)
    left = READ_BYTES / mask.dtype.itemsize / math.prod(-(-c * m // n) + 1 for c, n, m in extents)
    group = []
    for count in reversed(plan.counts):
        group.append(int(max(1, min(count, left))))
        left /= count
    return tuple(reversed(group))
