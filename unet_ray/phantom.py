"""Synthetic serial-section electron microscopy: touching neurites and their membranes.

Knows how tissue looks and which voxel belongs to which cell; knows no files, no tiles, no
network. Lengths are pixels of a slice; sections are thick, so a slice counts as several pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.errors import InputError

Shape = tuple[int, int, int]
Float = NDArray[np.float32]

SMALLEST_DIAMETER = 12.0
"""Below this, in pixels, a cell would hold nothing but its membrane."""

Z_PITCH = 0.08
"""How far one section moves through the tissue, in cell diameters: neurites run along z."""

REACH = 1.5
"""How far from its seed a cell is looked for, in cell diameters beyond its own radius."""


@dataclass(frozen=True)
class Phantom:
    """A picture of tissue and its truth; all arrays have shape (z, y, x).

    Attributes:
        image: uint8, dark membranes on lighter cells, as in the ISBI 2012 stack.
        instances: uint32, 0 = membrane, 1..n = cells. They are the 6-connected parts of
            ``instances > 0`` in the order of their first voxel, so cells touch along no axis;
            in one slice each cell is one 4-connected profile.
    """

    image: NDArray[np.uint8]
    instances: NDArray[np.uint32]

    @property
    def classes(self) -> NDArray[np.uint8]:
        """The truth as ISBI 2012 labels: 0 = membrane, 255 = cell."""
        return np.where(self.instances > 0, np.uint8(255), np.uint8(0))


def make_phantom(shape: Shape, seed: int = 0, cell_diameter: float = 42.0) -> Phantom:
    """Makes tissue of `shape` (z, y, x); the same arguments give the same bytes.

    Args:
        shape: voxels per axis, each at least 1.
        seed: any integer >= 0; another seed is other tissue.
        cell_diameter: in pixels; a slice shows about one profile per square of this side, from
            slivers to profiles several times as wide. Membranes and organelles scale with it.

    Raises:
        InputError: if an extent is below 1 or `cell_diameter` below 12 pixels.
    """
    _check(shape, cell_diameter)
    anatomy, anatomy_2, stain, camera = np.random.default_rng(seed).spawn(4)
    owners = _grow_cells(anatomy, shape, cell_diameter)
    distance = _distance_to_border(owners)
    width = cell_diameter * (0.052 + 0.011 * _waves(anatomy_2, shape, (4, 1.5 * cell_diameter)))
    instances = _separate(owners, distance < np.maximum(width, 1), cell_diameter)
    tissue = _stain(stain, owners, instances, distance, cell_diameter)
    return Phantom(_expose(camera, tissue, cell_diameter), instances)


def _check(shape: Shape, cell_diameter: float) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(
            f"A phantom of shape {tuple(shape)} is not possible: give three extents (z, y, x) "
            "of at least 1 voxel, for example (8, 512, 512)."
        )
    if not cell_diameter >= SMALLEST_DIAMETER:
        raise InputError(
            f"cell_diameter={cell_diameter:g} is too small for cells with a membrane: "
            f"the smallest is {SMALLEST_DIAMETER:g} pixels."
        )


# Fields


def _spline(length: int, period: float) -> Float:
    """Weights (length, knots) of a cubic B-spline, scaled so that white knots give variance 1."""
    where = np.arange(length) / period
    knots = np.arange(int(where[-1]) + 4) - 1
    t = np.abs(where[:, None] - knots[None, :])
    weights = np.where(t < 1, 4 - 6 * t**2 + 3 * t**3, np.maximum(2 - t, 0) ** 3)
    return np.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True), np.float32)


def _waves(rng: Generator, shape: Shape, periods: tuple[float, float]) -> Float:
    """A smooth random field, mean 0, variance 1, of so many slices and pixels per wave."""
    z, y, x = (
        _spline(n, p) for n, p in zip(shape, (periods[0], periods[1], periods[1]), strict=True)
    )
    knots = rng.standard_normal((z.shape[1], y.shape[1], x.shape[1]), np.float32)
    by_slice = np.tensordot(z, knots, axes=1)
    return np.asarray(y @ by_slice @ x.T, np.float32)


# Anatomy


@dataclass(frozen=True)
class _Seed:
    """Where a cell grows from (z in pixels), how big, and its in-plane metric."""

    at: tuple[float, float, float]
    radius: float
    metric: tuple[float, float, float]


def _seeds(rng: Generator, shape: Shape, diameter: float) -> Iterator[_Seed]:
    """Jittered points of a grid that reaches beyond the volume; sizes and slimness vary."""
    pitch = 0.95 * diameter
    extent = (shape[0] * Z_PITCH * diameter, float(shape[1]), float(shape[2]))
    axes = [np.arange(-1.5, n / pitch + 1.5) for n in extent]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    points = (grid + rng.uniform(-0.45, 0.45, grid.shape)) * pitch
    radii = diameter * rng.choice([0.0, 0.2, 0.75], len(points), p=[0.55, 0.35, 0.1])
    radii += diameter * rng.uniform(0.0, 0.2, len(points))
    slim = rng.uniform(1.0, 1.7, len(points))
    angle = rng.uniform(0.0, np.pi, len(points))
    for point, radius, s, a in zip(points, radii, slim, angle, strict=True):
        cos, sin = np.cos(a), np.sin(a)
        metric = (
            s * cos**2 + sin**2 / s,
            2 * cos * sin * (s - 1 / s),
            s * sin**2 + cos**2 / s,
        )
        yield _Seed(tuple(point), float(radius), metric)


def _grow_cells(rng: Generator, shape: Shape, diameter: float) -> NDArray[np.int32]:
    """Owner 1..n of every voxel: the seed nearest to it after bending the axes.

    The distance is that to a ball around the seed (an additively weighted Voronoi diagram), so
    large cells bulge into small ones; seed by seed within its reach, never all at once.
    """
    bend = [_bend(rng, shape, diameter) for _ in range(2)]
    y = np.arange(shape[1], dtype=np.float32)[:, None] + bend[0]
    x = np.arange(shape[2], dtype=np.float32) + bend[1]
    slack = max(float(np.abs(b).max()) for b in bend)
    nearest = np.full(shape, np.inf, np.float32)
    owners = np.zeros(shape, np.int32)
    for number, seed in enumerate(_seeds(rng, shape, diameter), start=1):
        box = _reach(seed, shape, diameter, slack)
        z = np.arange(shape[0], dtype=np.float32)[box[0], None, None] * Z_PITCH * diameter
        dy, dx = y[box] - np.float32(seed.at[1]), x[box] - np.float32(seed.at[2])
        yy, yx, xx = (np.float32(m) for m in seed.metric)
        far = np.sqrt(dy * (yy * dy + yx * dx) + xx * dx * dx + (z - seed.at[0]) ** 2)
        far -= np.float32(seed.radius)
        closer = far < nearest[box]
        np.copyto(nearest[box], far, where=closer)
        np.copyto(owners[box], number, where=closer)
    return owners


def _bend(rng: Generator, shape: Shape, diameter: float) -> Float:
    coarse = 0.22 * diameter * _waves(rng, shape, (7, 1.3 * diameter))
    return coarse + 0.035 * diameter * _waves(rng, shape, (4, 0.4 * diameter))


def _reach(seed: _Seed, shape: Shape, diameter: float, slack: float) -> tuple[slice, ...]:
    far = REACH * diameter + seed.radius
    steps = (Z_PITCH * diameter, 1.0, 1.0)
    box = []
    for at, n, step, more in zip(seed.at, shape, steps, (0.0, slack, slack), strict=True):
        low, high = (at - far - more) / step, (at + far + more) / step
        box.append(slice(min(max(int(low), 0), n), min(max(int(high) + 1, 0), n)))
    return tuple(box)


def _distance_to_border(owners: NDArray[np.int32]) -> Float:
    """Pixels, within a slice, to the nearest pixel that touches another cell's; inf if none."""
    border = np.zeros(owners.shape, bool)
    for axis in (1, 2):
        a, b = _neighbours(owners, axis)
        low, high = _neighbours(border, axis)
        differ = a != b
        low |= differ
        high |= differ
    distance = np.full(owners.shape, np.inf, np.float32)
    for z in np.flatnonzero(border.any(axis=(1, 2))):
        distance[z] = ndimage.distance_transform_edt(~border[z])
    return distance
