"""Deformation of patches of a volume: Çiçek et al. 2016, sec. 2.2.

A patch is displaced smoothly, rotated in its planes and flipped, as in `augment`, and sampled from
a larger window of real voxels. Handles arrays of a volume; independent of how a window is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from unet_ray.compiled import compiled
from unet_ray.tiling.boxes import Box, Ints
from unet_ray.training.augment import check_reach, draw_angle, spline

Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True, eq=False, slots=True)
class Warp:
    """Source position of every voxel of a patch of a volume.

    Attributes:
        offsets: float32 ``(3, z, y, x)``, the source along z, y and x in voxels from the patch's
            centre. A crop of them is a warp about the same centre.
    """

    offsets: NDArray[np.float32]

    def reach(self, centre: Sequence[float]) -> Box:
        """Returns the box of voxels needed to sample the patch about `centre`."""
        axes = list(zip(centre, self.offsets, strict=True))
        low = tuple(math.floor(c + float(o.min())) for c, o in axes)
        return Box(low, tuple(math.ceil(c + float(o.max())) + 1 for c, o in axes))


def draw_warp(
    shape: Ints,
    rng: np.random.Generator,
    elastic: float,
    spacing: Sequence[float],
    angle: float = math.pi,
    flips: tuple[bool, bool] = (True, True),
) -> Warp:
    """Draws a random deformation, rotation and flip of a patch.

    Args:
        shape: size of the patch in voxels, ``(z, y, x)``.
        rng: random generator.
        elastic: standard deviation of the displacements at the nodes of the grid, in voxels of x.
        spacing: size of a voxel along z, y and x, in units of x. Displacements have the same
            physical size along all axes, and the rotation is about z. If all sizes are equal and
            both `flips` are allowed, the patch is rotated about any axis by multiples of 90
            degrees, too.
        angle: largest rotation about z in either direction, in radians.
        flips: whether to mirror y and x, each with probability 1/2; z is always mirrored so.
    """
    sizes = np.asarray(spacing, float)
    nodes = elastic * rng.standard_normal((3, 3, 3, 3)) / sizes[:, None, None, None]
    angle = draw_angle(rng, angle)
    cosine, sine = math.cos(angle), math.sin(angle)
    rotation = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    # A rotation in physical space: voxels of y and x may differ in size.
    mirror = np.where((True, *flips), rng.choice([-1.0, 1.0], 3), 1.0)
    matrix = rotation * sizes[None] / sizes[:, None] * mirror
    if all(flips) and np.allclose(sizes, sizes[0]) and len({*shape}) == 1:
        matrix = matrix[rng.permutation(3)]
    return warp(shape, matrix, nodes)


def warp(shape: Ints, matrix: NDArray[np.floating[Any]], nodes: NDArray[np.floating[Any]]) -> Warp:
    """Computes ``source = matrix @ position + displacement`` for every voxel of a patch.

    Args:
        shape: size of the patch in voxels, ``(z, y, x)``.
        matrix: linear map about the patch's centre, shape ``(3, 3)``.
        nodes: displacements in voxels on a grid of 3 x 3 x 3 nodes, shape ``(3, 3, 3, 3)``; between
            them a natural cubic spline per axis.
    """
    offsets = np.empty((3, *shape), np.float32)
    z, y, x = map(spline, shape)
    _fill_offsets(matrix.astype(np.float64), nodes.astype(np.float32), z, y, x, offsets)
    return Warp(offsets)


def warp_image(
    window: NDArray[np.float32], centre: Sequence[float], warp: Warp
) -> NDArray[np.float32]:
    """Samples a patch of an image with linear interpolation.

    Args:
        window: voxels of at least the box `Warp.reach`, shape ``(c, z, y, x)``.
        centre: position of the patch's centre in the window.
        warp: warp of the patch.

    Returns:
        The patch, shape ``(c, z, y, x)``.

    Raises:
        ValueError: if a sample is outside the window.
    """
    check_reach(window.shape[1:], warp.reach(centre))
    patch = np.empty((len(window), *warp.offsets.shape[1:]), np.float32)
    inputs = np.ascontiguousarray(window), np.ascontiguousarray(warp.offsets)
    _sample_linear(*inputs, np.asarray(centre, float), patch)
    return patch


def warp_labels(window: NDArray[Value], centre: Sequence[float], warp: Warp) -> NDArray[Value]:
    """Samples a patch of labels or weights from the nearest voxels; see `warp_image`."""
    check_reach(window.shape, warp.reach(centre))
    places = [
        np.floor(o + (c + 0.5)).astype(np.intp) for c, o in zip(centre, warp.offsets, strict=True)
    ]
    patch: NDArray[Value] = window[tuple(places)]
    return patch


@compiled
def _fill_offsets(
    matrix: NDArray[np.float64],
    nodes: NDArray[np.float32],
    along_z: NDArray[np.float32],
    along_y: NDArray[np.float32],
    along_x: NDArray[np.float32],
    offsets: NDArray[np.float32],
) -> None:
    """Fills `offsets` (3, z, y, x); interpolates the displacements along z, y, then x."""
    _, depth, height, width = offsets.shape
    plane, row = np.empty((3, 3), np.float32), np.empty(3, np.float32)
    for axis in range(3):
        for z in range(depth):
            for i in range(3):
                for j in range(3):
                    plane[i, j] = np.float32(0)
                    for node in range(3):
                        plane[i, j] += nodes[axis, node, i, j] * along_z[node, z]
            for y in range(height):
                for j in range(3):
                    row[j] = np.float32(0)
                    for node in range(3):
                        row[j] += plane[node, j] * along_y[node, y]
                start = matrix[axis, 0] * (z - (depth - 1) / 2)
                start += matrix[axis, 1] * (y - (height - 1) / 2)
                for x in range(width):
                    linear = np.float32(start + matrix[axis, 2] * (x - (width - 1) / 2))
                    elastic = row[0] * along_x[0, x] + row[1] * along_x[1, x]
                    offsets[axis, z, y, x] = elastic + row[2] * along_x[2, x] + linear


@compiled
def _sample_linear(
    window: NDArray[np.float32],
    offsets: NDArray[np.float32],
    centre: NDArray[np.float64],
    patch: NDArray[np.float32],
) -> None:
    """Fills `patch` (c, z, y, x); samples on a last plane, row or column do not read beyond it."""
    channels, depth, height, width = patch.shape
    for k in range(channels):
        for z in range(depth):
            for y in range(height):
                for x in range(width):
                    p = centre[0] + offsets[0, z, y, x]
                    r = centre[1] + offsets[1, z, y, x]
                    c = centre[2] + offsets[2, z, y, x]
                    front, top, left = math.floor(p), math.floor(r), math.floor(c)
                    back = min(front + 1, window.shape[1] - 1)
                    bottom = min(top + 1, window.shape[2] - 1)
                    right = min(left + 1, window.shape[3] - 1)
                    deep, down, along = p - front, r - top, c - left
                    total = 0.0
                    for at, share in ((front, 1 - deep), (back, deep)):
                        upper = window[k, at, top, left] * (1 - along)
                        upper += window[k, at, top, right] * along
                        lower = window[k, at, bottom, left] * (1 - along)
                        lower += window[k, at, bottom, right] * along
                        total += share * (upper * (1 - down) + lower * down)
                    patch[k, z, y, x] = total
