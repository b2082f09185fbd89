"""Reads any box of an array, mirrored at the faces like ``numpy.pad(mode="reflect")``.

Knows how a position outside a volume maps to one inside. Does not know where the voxels come
from: it calls `read` once, for one box inside the volume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.tiling.boxes import Box


def reflect(positions: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Maps `positions` on an unbounded axis to the mirrored ones in ``0 .. length - 1``.

    The mirror is the face voxel itself, which is not repeated. If `length` is 1, every position
    maps to 0.
    """
    if length == 1:
        return np.zeros_like(positions)
    period = 2 * (length - 1)
    folded = positions % period
    return np.minimum(folded, period - folded)


def read_mirrored(
    read: Callable[[Box], NDArray[Any]], shape: Sequence[int], box: Box
) -> NDArray[Any]:
    """Reads `box` of a volume of `shape`; voxels outside are mirrored at the faces.

    Args:
        read: returns the voxels of a box inside the volume. Leading axes, such as channels,
            are passed through.
        shape: extent of the volume along the axes of the box.
        box: the box to read; it may extend any distance beyond the volume.

    Returns:
        The voxels, shape ``(..., *box.shape)``, in the dtype that `read` returns.
    """
    axes = list(zip(box.start, box.stop, shape, strict=True))
    sources = [reflect(np.arange(a, b), n) for a, b, n in axes]
    inside = Box(tuple(int(s.min()) for s in sources), tuple(int(s.max()) + 1 for s in sources))
    voxels = read(inside)
    first = voxels.ndim - len(shape)
    for axis, (source, low, (a, b, _)) in enumerate(zip(sources, inside.start, axes, strict=True)):
        if low != a or source.size != voxels.shape[first + axis] or source[-1] != b - 1:
            voxels = np.take(voxels, source - low, axis=first + axis)
    return voxels
