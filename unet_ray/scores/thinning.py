"""Thins the membranes of a slice to lines one pixel wide, by flooding.

Handles one binary slice. Independent of stacks and scores.

Cells grow into the membrane, 4-connected; a line remains where two cells meet. The flooding order
decides the position of the line, so it must match Fiji's `WatershedTransform2D` exactly: the
first-in first-out algorithm of Vincent and Soille 1991 on two grey levels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.compiled import compiled

LINE, WAITING, QUEUED = 0, -1, -2
# Steps (y, x) to the 4 neighbours, in the order of the flood.
SIDES = np.array([(0, -1), (-1, 0), (0, 1), (1, 0)])


def thin(cells: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Grows the cells of a slice until only lines of membrane remain.

    Args:
        cells: (y, x), True is cell.

    Returns:
        Segment numbers from 1, (y, x), and 0 on the lines between segments. A slice without any
        cell is one segment.
    """
    labels = ndimage.label(cells)[0].astype(np.int32)
    if not labels.any():
        return np.ones_like(labels)
    labels[labels == 0] = WAITING
    _flood(labels, SIDES)
    return labels


@compiled
def _flood(labels: NDArray[np.int32], sides: NDArray[np.int64]) -> None:
    """Floods the pixels marked `WAITING` from the cells, in place."""
    height, width = labels.shape
    queue = np.empty((labels.size, 2), np.int64)
    last = 0
    for x in range(width):
        for y in range(height):
            if labels[y, x] == WAITING:
                for k in range(4):
                    v, u = y + sides[k, 0], x + sides[k, 1]
                    if 0 <= v < height and 0 <= u < width and labels[v, u] >= LINE:
                        labels[y, x] = QUEUED
                        queue[last] = y, x
                        last += 1
                        break
    first, beside_line = 0, False
    while first < last:
        y, x = queue[first]
        first += 1
        for k in range(4):
            v, u = y + sides[k, 0], x + sides[k, 1]
            if not (0 <= v < height and 0 <= u < width):
                continue
            if labels[v, u] > 0:
                if labels[y, x] == QUEUED or (labels[y, x] == LINE and beside_line):
                    labels[y, x] = labels[v, u]
                elif labels[y, x] > 0 and labels[y, x] != labels[v, u]:
                    labels[y, x] = LINE
                    beside_line = False
            elif labels[v, u] == LINE:
                if labels[y, x] == QUEUED:
                    labels[y, x] = LINE
                    beside_line = True
            elif labels[v, u] == WAITING:
                labels[v, u] = QUEUED
                queue[last] = v, u
                last += 1
