"""Tiles selected by a mask: those whose core touches a nonzero voxel of the mask.

A mask is a volume with the same field of view, at the same or a coarser resolution. Independent of
how unselected tiles are handled.
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
from unet_ray.volumes.omissions import report_omissions
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume

READ_BYTES = 32 << 20  # upper bound of one read of a mask, unless a single tile needs more


def open_mask(path: PathOrUrl, shape: Sequence[int], strict: bool = False) -> Volume:
    """Opens a mask of a volume of `shape` (z, y, x).

    Raises:
        InputError: if the mask has several channels or is finer than the volume along an axis. If
            `strict`, also if it leaves out a part of its file or folder.
    """
    mask = open_volume(path)
    report_omissions(mask.path, mask.omissions, strict)
    if mask.shape[0] != 1:
        raise InputError(f"{mask.path}: a mask must have one channel, not {mask.shape[0]}.")
    if any(m > n for m, n in zip(mask.shape[1:], shape, strict=True)):
        raise InputError(
            f"{mask.path}: has shape {mask.shape[1:]} (z, y, x) and is finer than the volume, "
            f"which has shape {tuple(shape)}. A mask must show the same field of view as the "
            "volume, at the same or a coarser resolution."
        )
    return mask


def tiles_under(mask: Volume, plan: TilePlan) -> NDArray[np.bool_]:
    """Selects the tiles whose core touches a nonzero voxel of the mask.

    All voxels of the mask represent equal parts of the field of view.

    Returns:
        Boolean array over the grid of tiles, of shape ``plan.counts``.

    Raises:
        RunError: if the mask cannot be read.
    """
    selected = np.zeros(plan.counts, bool)
    for group in Box.of(plan.counts).split(_tiles_per_read(mask, plan)):
        spans = [
            _spans(range(a, b), *axis)
            for a, b, *axis in zip(
                group.start, group.stop, plan.core, plan.shape, mask.shape[1:], strict=True
            )
        ]
        window = Box(tuple(int(s[0, 0]) for s in spans), tuple(int(s[-1, 1]) for s in spans))
        nonzero = mask.read(window)[0] != 0
        for axis, (span, start) in enumerate(zip(spans, window.start, strict=True)):
            nonzero = _any(nonzero, span - start, axis)
        selected[group.slices] = nonzero
    return selected


def _spans(tiles: range, core: int, extent: int, mask_extent: int) -> NDArray[np.int64]:
    """Mask voxels along one axis that each tile touches, shape (tiles, 2): start and stop."""
    start = np.arange(tiles.start, tiles.stop) * core
    stop = np.minimum(start + core, extent)
    return np.stack([start * mask_extent // extent, -(-stop * mask_extent // extent)], axis=1)


def _any(voxels: NDArray[np.bool_], spans: NDArray[np.int64], axis: int) -> NDArray[np.bool_]:
    """Whether any voxel of each span is true, along one axis."""
    # reduceat refuses an index equal to the length of the array, hence one voxel of padding.
    padded = np.concatenate([voxels, np.zeros_like(voxels.take([0], axis))], axis)
    # Every second result belongs to the gap between two spans.
    reduced: NDArray[np.bool_] = np.logical_or.reduceat(padded, spans.ravel(), axis)
    return reduced.take(range(0, 2 * len(spans), 2), axis)


def _tiles_per_read(mask: Volume, plan: TilePlan) -> tuple[int, ...]:
    """Number of tiles per axis whose mask voxels are read at once: whole rows, then planes."""
    extents = zip(plan.core, plan.shape, mask.shape[1:], strict=True)
    limit = READ_BYTES / mask.dtype.itemsize / math.prod(-(-c * m // n) + 1 for c, n, m in extents)
    group = []
    for count in reversed(plan.counts):
        group.append(int(max(1, min(count, limit))))
        limit /= count
    return tuple(reversed(group))
