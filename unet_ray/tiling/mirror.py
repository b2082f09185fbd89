"""Reads of any box of an array, mirrored beyond its faces as ``numpy.pad(mode="reflect")`` does.

Knows how a position outside maps to one inside; does not know what it reads from: `read` is
called once, for one box that lies wholly inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.tiling.boxes import Box


def reflect(positions: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Positions inside ``0 .. length - 1`` whose values a mirror shows at `positions`.

    The face voxel is the mirror and is not repeated; with one voxel everything shows it.
    """
    if length == 1:
        return np.zeros_like(positions)
    period = 2 * (length - 1)
    folded = positions % period
    return np.minimum(folded, period - folded)


def read_mirrored(
    read: Callable[[Box], NDArray[Any]], shape: Sequence[int], box: Box
) -> NDArray[Any]:
    """Reads `box` of a volume of `shape`; whatever lies outside is mirrored at the faces.

    Args:
        read: gives the voxels of a box inside the volume; axes before the box's (channels)
            are kept as they are.
        shape: extent of the volume along the axes of the box.
        box: what is wanted; may start and stop anywhere, also far outside.

    Returns:
        The voxels, shape ``(..., *box.shape)``, in the dtype that `read` gives.
    """
    axes = list(zip(box.start, box.stop, shape, strict=True))
    wanted = [reflect(np.arange(a, b), n) for a, b, n in axes]
    inside = Box(tuple(int(w.min()) for w in wanted), tuple(int(w.max()) + 1 for w in wanted))
    voxels = read(inside)
    first = voxels.ndim - len(shape)
    for axis, (where, low, (a, b, _)) in enumerate(zip(wanted, inside.start, axes, strict=True)):
        if low != a or where.size != voxels.shape[first + axis] or where[-1] != b - 1:
            voxels = np.take(voxels, where - low, axis=first + axis)
    return voxels
