"""Augmentation of training patches: Ronneberger, Fischer, Brox 2015, sec. 3.1.

A patch is deformed, rotated and flipped, and its grey values and sharpness change. It is sampled
from a larger window of real voxels, so its corners need no padding. Handles arrays of one slice;
independent of how the window is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import CubicSpline

from unet_ray.compiled import compiled
from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Box

LARGEST_BLUR = 1.5  # voxels
LARGEST_NOISE = 0.3  # standard deviations of the grey values
Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True, eq=False, slots=True)
class Deformation:
    """Source position of every voxel of a patch.

    A crop of `offsets` is a deformation about the same centre. It serves to sample the labels of
    the smaller output of valid convolutions.

    Attributes:
        offsets: row and column of the source, in voxels from the patch's centre, ``(2, y, x)``.
            The centre of n voxels is at (n - 1) / 2, so the offsets of an unchanged patch of 4 are
            -1.5, -0.5, 0.5 and 1.5.
    """

    offsets: NDArray[np.float32]

    def reach(self, centre: Sequence[float]) -> Box:
        """Returns the box (y, x) of voxels needed to sample the patch about `centre`.

        Relative to a window with these voxels, the centre is `centre` minus the start of the box.
        """
        low = [math.floor(c + float(o.min())) for c, o in zip(centre, self.offsets, strict=True)]
        high = [math.ceil(c + float(o.max())) for c, o in zip(centre, self.offsets, strict=True)]
        return Box(tuple(low), tuple(n + 1 for n in high))


def draw_deformation(
    shape: Sequence[int],
    rng: np.random.Generator,
    elastic: float = 10.0,
    angle: float = math.pi,
    flips: tuple[bool, bool] = (True, True),
) -> Deformation:
    """Draws a random elastic deformation, rotation and flip of a patch.

    Args:
        shape: size of the patch in voxels, ``(y, x)``.
        rng: random generator; the same state gives the same deformation.
        elastic: standard deviation, in voxels, of the displacements at the nodes of the grid; 0 for
            none. Far above a tenth of the patch size, the image folds over itself.
        angle: largest rotation in either direction, in radians; assumes square voxels.
        flips: whether to mirror y and x, each with probability 1/2.

    Returns:
        The deformation. With `elastic` 0, `angle` 0 and no `flips`, it reproduces the patch bit for
        bit.

    Raises:
        InputError: if `elastic` is negative or not finite.
    """
    if not 0 <= elastic < math.inf:
        raise InputError(f"elastic={elastic} must be finite and at least 0 voxels.")
    nodes = elastic * rng.standard_normal((2, 3, 3))
    angle = draw_angle(rng, angle)
    mirror = np.where(flips, rng.choice([-1.0, 1.0], 2), 1.0)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return deform(shape, rotation * mirror, nodes)


def draw_angle(rng: np.random.Generator, largest: float) -> float:
    """Draws a rotation of at most `largest` in either direction, in radians.

    If any angle is allowed, equal seeds give the rotations of versions without a limit.
    """
    circle = 2 * math.pi
    return math.remainder(rng.uniform(0, circle), circle) * largest / math.pi


def deform(
    shape: Sequence[int], matrix: NDArray[np.floating[Any]], nodes: NDArray[np.floating[Any]]
) -> Deformation:
    """Computes the deformation ``source = matrix @ position + displacement`` of a patch.

    Args:
        shape: size of the patch in voxels, ``(y, x)``.
        matrix: linear map about the patch's centre, shape ``(2, 2)``, rows before columns.
        nodes: displacements in voxels on a grid of 3 x 3 nodes, shape ``(2, 3, 3)``. The nodes are
            the corners, the middles of the edges and the centre of the patch. Displacements between
            them are bicubic, from a natural cubic spline per axis.
    """
    offsets = np.empty((2, *shape), np.float32)
    # A compiled loop, not @: the threads of BLAS would compete with those of the network.
    _fill_offsets(
        matrix.astype(np.float64),
        nodes.astype(np.float64),
        spline(shape[0]),
        spline(shape[1]),
        offsets,
    )
    return Deformation(offsets)


def warp_image(
    window: NDArray[np.float32], centre: Sequence[float], deformation: Deformation
) -> NDArray[np.float32]:
    """Samples a patch of an image with linear interpolation.

    Args:
        window: voxels of at least the box `Deformation.reach`, shape ``(c, Y, X)``.
        centre: row and column of the patch's centre in the window.
        deformation: deformation of the patch.

    Returns:
        The patch, shape ``(c, y, x)``.

    Raises:
        ValueError: if a sample is outside the window.
    """
    check_reach(window.shape[1:], deformation.reach(centre))
    patch = np.empty((len(window), *deformation.offsets.shape[1:]), np.float32)
    inputs = np.ascontiguousarray(window), np.ascontiguousarray(deformation.offsets)
    _sample_linear(*inputs, float(centre[0]), float(centre[1]), patch)
    return patch


def warp_labels(
    window: NDArray[Value], centre: Sequence[float], deformation: Deformation
) -> NDArray[Value]:
    """Samples a patch of labels or weights from the nearest voxels.

    Weights are not interpolated either: they change abruptly at the borders of labels, and label
    and weight must come from the same voxel.

    Args:
        window: voxels of at least the box `Deformation.reach`, shape ``(Y, X)``, any dtype.
        centre: row and column of the patch's centre in the window.
        deformation: deformation of the patch.

    Returns:
        The patch, shape ``(y, x)``, in the dtype of the window.

    Raises:
        ValueError: if a sample is outside the window.
    """
    check_reach(window.shape, deformation.reach(centre))
    row, column = (
        np.floor(o + (c + 0.5)).astype(np.intp)
        for c, o in zip(centre, deformation.offsets, strict=True)
    )
    patch: NDArray[Value] = window.ravel().take(row * window.shape[1] + column)
    return patch


def change_grey(
    image: NDArray[np.float32], rng: np.random.Generator, strength: float = 0.2
) -> NDArray[np.float32]:
    """Randomly changes contrast and brightness of each channel: ``image * gain + offset``.

    Args:
        image: shape ``(c, ..., y, x)``, normalised to mean 0 and standard deviation 1, so that the
            gain leaves the mean unchanged.
        rng: random generator.
        strength: offset and logarithm of the gain are uniform in [-strength, strength]; 0 leaves
            the values unchanged.

    Returns:
        A new image of the same shape.
    """
    gain, offset = rng.uniform(-strength, strength, (2, len(image))).astype(np.float32)
    gain, offset = (each.reshape(-1, *(1,) * (image.ndim - 1)) for each in (gain, offset))
    changed: NDArray[np.float32] = image * np.exp(gain) + offset
    return changed


def degrade(
    image: NDArray[np.float32], rng: np.random.Generator, strength: float = 1.0
) -> NDArray[np.float32]:
    """Randomly blurs a patch and adds noise, each with probability 1/2.

    Slices of one stack can differ in sharpness and noise, and slices never seen differ more. Not in
    the paper.

    Args:
        image: shape ``(c, ..., y, x)``, normalised to standard deviation 1. The blur is along y and
            x.
        rng: random generator.
        strength: the blur has a standard deviation of up to 1.5 voxels, and the noise of up to 0.3,
            each times this number; 0 leaves the values unchanged.

    Returns:
        An image of the same shape; new, if it differs.
    """
    # Always drawn, so that later numbers do not depend on the strength.
    blurred, noisy = rng.random(2) < 0.5
    blur, noise = strength * rng.uniform(0, (LARGEST_BLUR, LARGEST_NOISE))
    if blurred and blur:
        image = ndimage.gaussian_filter(image, (blur, blur), axes=(-2, -1))
    if noisy and noise:
        image = image + np.float32(noise) * rng.standard_normal(image.shape, np.float32)
    return image


@lru_cache(maxsize=8)
def spline(length: int) -> NDArray[np.float32]:
    """Returns the weights of 3 nodes for each of `length` voxels, shape ``(3, length)``.

    The nodes are the first voxel, the middle and the last voxel. The natural end condition sets the
    curvature to 0 at the patch's border, which avoids overshoot near it.
    """
    positions = np.linspace(-1, 1, length) if length > 1 else np.zeros(1)
    spline = CubicSpline([-1, 0, 1], np.eye(3), bc_type="natural")
    return np.ascontiguousarray(spline(positions).T, dtype=np.float32)


def check_reach(window: Sequence[int], reach: Box) -> None:
    """Checks a window of that shape, because compiled loops do not check array bounds.

    Raises:
        ValueError: if the samples of a patch reach outside.
    """
    if reach.intersect(Box.of(window)) != reach:
        raise ValueError(f"The patch reaches {reach}, outside the window {Box.of(window)}.")


@compiled
def _fill_offsets(
    matrix: NDArray[np.float64],
    nodes: NDArray[np.float64],
    along_y: NDArray[np.float32],
    along_x: NDArray[np.float32],
    offsets: NDArray[np.float32],
) -> None:
    """Fills `offsets` (2, y, x); interpolates the nodes' displacements along y, then along x."""
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
                linear = start + np.float32(matrix[axis, 1] * (x - (width - 1) / 2))
                elastic = first * along_x[0, x] + middle * along_x[1, x] + last * along_x[2, x]
                offsets[axis, y, x] = elastic + linear


@compiled
def _sample_linear(
    window: NDArray[np.float32],
    offsets: NDArray[np.float32],
    row: float,
    column: float,
    patch: NDArray[np.float32],
) -> None:
    """Fills `patch` (c, y, x); samples on the last row or column do not read beyond it."""
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
