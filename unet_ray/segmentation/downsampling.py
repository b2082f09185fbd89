"""Downsamples voxels to the next level of a pyramid: means, and the most frequent labels.

Handles one array in memory. Does not know levels, stores or tiles.

Where an extent is not a multiple of its factor, the last block along that axis is smaller. Only
its own voxels count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.compiled import compiled
from unet_ray.tiling.pyramid import level_shape


def mean_of(voxels: NDArray[np.uint8], factors: Sequence[int]) -> NDArray[np.uint8]:
    """Returns the mean of each block of voxels, a half rounded up.

    Args:
        voxels: (..., z, y, x) uint8.
        factors: extents of a block (z, y, x), at least 1.

    Returns:
        (..., z, y, x) uint8; each extent is the number of blocks.
    """
    volumes = np.ascontiguousarray(voxels).reshape(-1, *voxels.shape[-3:])
    shape = level_shape(voxels.shape[-3:], factors)
    means = np.empty((len(volumes), *shape), np.uint8)
    for volume, mean in zip(volumes, means, strict=True):
        _average(volume, mean, *factors)
    return means.reshape(*voxels.shape[:-3], *shape)


def most_frequent(labels: NDArray[Any], factors: Sequence[int]) -> NDArray[Any]:
    """Returns the most frequent label of each block, of several the lowest. 0 is a label too.

    Args:
        labels: (z, y, x), of any unsigned type.
        factors: extents of a block (z, y, x), at least 1.

    Returns:
        (z, y, x) in the dtype of `labels`; each extent is the number of blocks.
    """
    winners = np.empty(level_shape(labels.shape, factors), labels.dtype)
    block = np.empty(math.prod(factors), labels.dtype)
    _elect(np.ascontiguousarray(labels), winners, block, *factors)
    return winners


@compiled
def _average(
    voxels: NDArray[np.uint8], means: NDArray[np.uint8], deep: int, high: int, wide: int
) -> None:
    """Writes the mean of each block of `voxels` to `means`."""
    depth, height, width = voxels.shape
    sums = np.empty(width, np.uint32)  # of the rows of one row of blocks
    for k in range(means.shape[0]):
        for j in range(means.shape[1]):
            sums[:] = 0
            rows = 0
            for z in range(k * deep, min((k + 1) * deep, depth)):
                for y in range(j * high, min((j + 1) * high, height)):
                    rows += 1
                    for x in range(width):
                        sums[x] += voxels[z, y, x]
            for i in range(means.shape[2]):
                last = min((i + 1) * wide, width)
                count = np.uint32(rows * (last - i * wide))
                total = count // np.uint32(2)
                for x in range(i * wide, last):
                    total += sums[x]
                means[k, j, i] = total // count


@compiled
def _elect(
    labels: NDArray[Any],
    winners: NDArray[Any],
    block: NDArray[Any],
    deep: int,
    high: int,
    wide: int,
) -> None:
    """Writes the most frequent label of each block of `labels` to `winners`.

    Nearly all blocks are inside an object. So a fast loop finds the blocks of several labels, and
    labels are counted only there.
    """
    depth, height, width = labels.shape
    several = np.empty(winners.shape[2], np.bool_)
    for k in range(winners.shape[0]):
        front, back = k * deep, min((k + 1) * deep, depth)
        for j in range(winners.shape[1]):
            top, bottom = j * high, min((j + 1) * high, height)
            row = winners[k, j]
            for i in range(len(row)):
                row[i] = labels[front, top, i * wide]
                several[i] = False
            for z in range(front, back):
                for y in range(top, bottom):
                    for offset in range(min(wide, width)):
                        for i in range((width - offset - 1) // wide + 1):
                            several[i] |= labels[z, y, i * wide + offset] != row[i]
            for i in range(len(row)):
                if several[i]:
                    count = 0
                    for z in range(front, back):
                        for y in range(top, bottom):
                            for x in range(i * wide, min((i + 1) * wide, width)):
                                block[count] = labels[z, y, x]
                                count += 1
                    row[i] = _winner(block, count)


@compiled
def _winner(block: NDArray[Any], count: int) -> Any:
    """Returns the most frequent of the first `count` labels of `block`, of several the lowest."""
    winner, most = block[0], 0
    for k in range(count):
        votes = 0
        for other in block[:count]:
            votes += other == block[k]
        if votes > most or (votes == most and block[k] < winner):
            winner, most = block[k], votes
    return winner
