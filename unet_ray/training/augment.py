"""Training patches seen anew: Ronneberger, Fischer, Brox 2015, sec. 3.1.

A patch is bent, turned, flipped and shifted in its grey values; the bent patch is sampled from a
larger window of real voxels, so no corner has to be invented. Knows arrays of one slice; does not
know where the window comes from, nor what is in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from unet_ray.compiled import compiled
from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Box

Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True, eq=False, slots=True)
class Deformation:
    """Where every voxel of a patch is taken from.

    `offsets` has shape ``(2, y, x)``: the row and the column of the source, in voxels from the
    patch's centre. The centre of n voxels is the position (n - 1) / 2, so an untouched patch of
    4 has the offsets -1.5, -0.5, 0.5, 1.5. A part of `offsets` (the voxels that a valid
    convolution labels) is a deformation about the same centre.
    """

    offsets: NDArray[np.float32]

    def reach(self, centre: tuple[float, float]) -> Box:
        """The voxels, two axes, that samples about `centre` touch; read these to warp.

        The centre seen from that window is `centre` minus the box's start.
        """
        low = [math.floor(c + float(o.min())) for c, o in zip(centre, self.offsets, strict=True)]
        high = [math.ceil(c + float(o.max())) for c, o in zip(centre, self.offsets, strict=True)]
        return Box(tuple(low), tuple(n + 1 for n in high))


def draw_deformation(
    shape: tuple[int, int],
    rng: np.random.Generator,
    elastic: float = 10.0,
    rotate: bool = True,
    flip: bool = True,
) -> Deformation:
    """Draws how a patch of `shape` is bent, turned and flipped.

    Args:
        shape: voxels of the patch, ``(y, x)``.
        rng: where chance comes from; the same state gives the same deformation.
        elastic: standard deviation, in voxels, of the displacements at the grid's nodes; 0 for
            none. Much above a tenth of the patch the image folds over itself.
        rotate: turn by an angle between 0 and 360 degrees; voxels are taken to be square.
        flip: mirror each axis with probability 1/2.

    Returns:
        The deformation; with nothing to do it gives back the patch itself, bit for bit.

    Raises:
        InputError: if `elastic` is negative or no number.
    """
    if not 0 <= elastic < math.inf:
        raise InputError(f"elastic={elastic} is not a length: it must be 0 or more voxels.")
    nodes = elastic * rng.standard_normal((2, 3, 3))
    angle = rng.uniform(0, 2 * math.pi) if rotate else 0.0
    mirror = rng.choice([-1.0, 1.0], 2) if flip else np.ones(2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return deform(shape, turn * mirror, nodes)


def deform(
    shape: tuple[int, int], matrix: NDArray[np.floating[Any]], nodes: NDArray[np.floating[Any]]
) -> Deformation:
    """The deformation ``source = matrix @ position + displacement`` of a patch of `shape`.

    Args:
        shape: voxels of the patch, ``(y, x)``.
        matrix: shape ``(2, 2)``, rows before columns, about the patch's centre.
        nodes: displacements in voxels, shape ``(2, 3, 3)``, of the patch's corners, the middles
            of its edges and its centre; between them bicubic (a natural cubic spline per axis).
    """
    offsets = np.empty((2, *shape), np.float32)
    # Not @, for which BLAS would wake its threads beside the network that uses them.
    _fill_offsets(
        matrix.astype(np.float64),
        nodes.astype(np.float64),
        _spline(shape[0]),
        _spline(shape[1]),
        offsets,
    )
    return Deformation(offsets)


def warp_image(
    window: NDArray[np.float32], centre: tuple[float, float], deformation: Deformation
) -> NDArray[np.float32]:
    """Samples a patch of an image, linear between voxels.

    Args:
        window: shape ``(c, Y, X)``; it holds all that `Deformation.reach` asks for.
        centre: row and column of the patch's centre in the window.
        deformation: of the patch.

    Returns:
        The patch, shape ``(c, y, x)``.

    Raises:
        ValueError: if a sample lies outside the window.
    """
    _check_reach(window.shape[1:], centre, deformation)
    patch = np.empty((len(window), *deformation.offsets.shape[1:]), np.float32)
    inputs = np.ascontiguousarray(window), np.ascontiguousarray(deformation.offsets)
    _sample_linear(*inputs, float(centre[0]), float(centre[1]), patch)
    return patch


def warp_labels(
    window: NDArray[Value], centre: tuple[float, float], deformation: Deformation
) -> NDArray[Value]:
    """Samples a patch of labels or of their weights: each voxel is the nearest one's.

    A weight belongs to the label that it weighs (it jumps where the label does), so both are
    taken from the same voxel and neither is interpolated.

    Args:
        window: shape ``(Y, X)``, any dtype; it holds all that `Deformation.reach` asks for.
        centre: row and column of the patch's centre in the window.
        deformation: of the patch.

    Returns:
        The patch, shape ``(y, x)``, in the dtype of the window.

    Raises:
        ValueError: if a sample lies outside the window.
    """
    _check_reach(window.shape, centre, deformation)
    row, column = (
        np.floor(o + (c + 0.5)).astype(np.intp)
        for c, o in zip(centre, deformation.offsets, strict=True)
    )
    patch: NDArray[Value] = window.ravel().take(row * window.shape[1] + column)
    return patch


def change_grey(
    image: NDArray[np.float32], rng: np.random.Generator, strength: float = 0.2
) -> NDArray[np.float32]:
    """Changes contrast and brightness: ``image * gain + offset``, drawn for each channel.

    Args:
        image: shape ``(c, y, x)``, normalised to mean 0 and standard deviation 1, so that the
            gain acts about the mean grey.
        rng: where chance comes from.
        strength: the logarithm of the gain and the offset are uniform within plus and minus
            this; 0 gives the image itself.

    Returns:
        A new image of the same shape.
    """
    gain, offset = rng.uniform(-strength, strength, (2, len(image), 1, 1)).astype(np.float32)
    changed: NDArray[np.float32] = image * np.exp(gain) + offset
    return changed


@lru_cache(maxsize=8)
def _spline(length: int) -> NDArray[np.float32]:
    """Weights of 3 nodes for each of `length` voxels, shape ``(3, length)``.

    The nodes are the first voxel, the middle and the last; the natural end condition is that of
    least bending: no curvature at the patch's border, hence no swing near it.
    """
    positions = np.linspace(-1, 1, length) if length > 1 else np.zeros(1)
    spline = CubicSpline([-1, 0, 1], np.eye(3), bc_type="natural")
    return np.ascontiguousarray(spline(positions).T, dtype=np.float32)


def _check_reach(
    window: tuple[int, ...], centre: tuple[float, float], deformation: Deformation
) -> None:
    """Guards the compiled loop, which would read any memory that it is sent to."""
    reach = deformation.reach(centre)
    if reach.intersect(Box.of(window)) != reach:
        raise ValueError(f"The patch reaches to {reach}, the window has only {Box.of(window)}.")


@compiled
def _fill_offsets(
    matrix: NDArray[np.float64],
    nodes: NDArray[np.float64],
    along_y: NDArray[np.float32],
    along_x: NDArray[np.float32],
    offsets: NDArray[np.float32],
) -> None:
    """Fills `offsets` (2, y, x); the nodes' displacements are spread along y, then along x."""
    _, height, width = offsets.shape
    for axis in range(2):
        for y in range(height):
            first, middle, last = np.float32(0), np.float32(0), np.float32(0)
            for node in range(3):
                first += np.float32(nodes[axis, node, 0]) * along_y[node, y]
                middle += np.float32(nodes[axis, node, 1]) * along_y[node, y]
                last += np.float32(nodes[axis, node, 2]) * along_y[node, y]
            start = np.float32(matrix[axis, 0] * (y - (height - 1) / 2))
            for x in range(width):
                turned = start + np.float32(matrix[axis, 1] * (x - (width - 1) / 2))
                bent = first * along_x[0, x] + middle * along_x[1, x] + last * along_x[2, x]
                offsets[axis, y, x] = bent + turned


@compiled
def _sample_linear(
    window: NDArray[np.float32],
    offsets: NDArray[np.float32],
    row: float,
    column: float,
    patch: NDArray[np.float32],
) -> None:
    """Fills `patch` (c, y, x); a sample on the last row or column needs none beyond it."""
    channels, height, width = patch.shape
    last_row, last_column = window.shape[1] - 1, window.shape[2] - 1
    for k in range(channels):
        for y in range(height):
            for x in range(width):
                r, c = row + offsets[0, y, x], column + offsets[1, y, x]
                top, left = math.floor(r), math.floor(c)
                bottom, right = min(top + 1, last_row), min(left + 1, last_column)
                down, along = r - top, c - left
                upper = window[k, top, left] * (1 - along) + window[k, top, right] * along
                lower = window[k, bottom, left] * (1 - along) + window[k, bottom, right] * along
                patch[k, y, x] = upper * (1 - down) + lower * down
