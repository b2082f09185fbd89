"""Synthetic serial-section electron microscopy: touching neurites and their membranes.

Knows how tissue looks and which voxel belongs to which cell; knows no files, no tiles, no
network. Lengths are pixels of a slice; sections are thick, so a slice counts as several pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.errors import InputError

Shape = tuple[int, int, int]
Float = NDArray[np.float32]

SMALLEST_DIAMETER = 12.0
"""Below this, in pixels, a cell would hold nothing but its membrane."""

Z_PITCH = 0.06
"""How far one section moves through the tissue, in cell diameters: neurites run along z."""

REACH = 1.2
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
    """Makes tissue of `shape` (z, y, x); the same arguments give the same bytes on a machine.

    Args:
        shape: voxels per axis, each at least 1.
        seed: any integer >= 0; another seed is other tissue.
        cell_diameter: in pixels; a slice shows about one profile per square of this side, from
            slivers to profiles several times as wide. Membranes and organelles scale with it.

    Raises:
        InputError: if an extent is below 1, `seed` below 0 or `cell_diameter` below 12 pixels.
    """
    _check(shape, seed, cell_diameter)
    anatomy, thickness, stain, camera = np.random.default_rng(seed).spawn(4)
    owners = _grow_cells(anatomy, shape, cell_diameter)
    distance = _distance_to_border(owners)
    width = _waves(thickness, shape, (4, 1.5 * cell_diameter))
    width = cell_diameter * np.maximum(0.05 + 0.01 * width, 0.03)
    instances = _separate(owners, distance < width, cell_diameter)
    tissue = _stain(stain, owners, instances, distance, width, cell_diameter)
    return Phantom(_expose(camera, tissue, cell_diameter), instances)


def _check(shape: Shape, seed: int, diameter: float) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(
            f"A phantom of shape {tuple(shape)} is not possible: give three extents (z, y, x) "
            "of at least 1 voxel, for example (8, 512, 512)."
        )
    if seed < 0:
        raise InputError(f"seed={seed} is not possible: give an integer of at least 0.")
    if not SMALLEST_DIAMETER <= diameter < np.inf:
        raise InputError(
            f"cell_diameter={diameter:g} does not give cells with a membrane: "
            f"give a number of pixels, at least {SMALLEST_DIAMETER:g}."
        )


# Smooth random fields


def _spline(length: int, period: float) -> Float:
    """Weights (length, knots) of a cubic B-spline, scaled so that white knots give variance 1."""
    where = np.arange(length) / period
    knots = np.arange(int(where[-1]) + 4) - 1
    t = np.abs(where[:, None] - knots[None, :])
    weights = np.where(t < 1, 4 - 6 * t**2 + 3 * t**3, np.maximum(2 - t, 0) ** 3)
    return np.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True), np.float32)


def _waves(rng: Generator, shape: Shape, periods: tuple[float, float]) -> Float:
    """A smooth random field, mean 0, variance 1; its knots are so many slices and pixels apart."""
    z = _spline(shape[0], periods[0])
    y, x = (_spline(n, periods[1]) for n in shape[1:])
    knots = rng.standard_normal((z.shape[1], y.shape[1], x.shape[1]), np.float32)
    by_slice = np.tensordot(z, knots, axes=1)
    return np.asarray(y @ by_slice @ x.T, np.float32)


# Anatomy


@dataclass(frozen=True)
class _Seed:
    """Where a cell grows from (z, y, x in pixels), how big, and its metric (yy, yx, xx)."""

    at: list[float]
    radius: float
    metric: list[float]


def _seeds(rng: Generator, shape: Shape, diameter: float) -> list[_Seed]:
    """Jittered points of a grid that reaches beyond the volume; sizes and slimness vary."""
    extent = np.array([shape[0] * Z_PITCH, shape[1] / diameter, shape[2] / diameter])
    axes = [np.arange(-1.0, n + 1.5) for n in extent]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    points = (grid + rng.uniform(-0.45, 0.45, grid.shape)) * diameter
    n = len(points)
    radii = rng.choice([0.0, 0.25, 1.1], n, p=[0.6, 0.32, 0.08]) + rng.uniform(0.0, 0.2, n)
    slim, angle = rng.uniform(1.0, 1.7, n), rng.uniform(0.0, np.pi, n)
    cos, sin = np.cos(angle), np.sin(angle)
    yx = 2 * cos * sin * (slim - 1 / slim)
    metrics = np.stack([slim * cos**2 + sin**2 / slim, yx, slim * sin**2 + cos**2 / slim], axis=1)
    columns = points.tolist(), (radii * diameter).tolist(), metrics.tolist()
    return [_Seed(*row) for row in zip(*columns, strict=True)]


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
        dy, dx = y[box] - seed.at[1], x[box] - seed.at[2]
        yy, yx, xx = seed.metric
        far = np.sqrt(dy * (yy * dy + yx * dx) + xx * dx * dx + (z - seed.at[0]) ** 2)
        far -= seed.radius
        closer = far < nearest[box]
        np.copyto(nearest[box], far, where=closer)
        np.copyto(owners[box], number, where=closer)
    return owners


def _bend(rng: Generator, shape: Shape, diameter: float) -> Float:
    """How many pixels the tissue is moved along one axis, in long and in short waves."""
    coarse = 0.22 * diameter * _waves(rng, shape, (7, 1.3 * diameter))
    return coarse + 0.035 * diameter * _waves(rng, shape, (4, 0.4 * diameter))


def _reach(seed: _Seed, shape: Shape, diameter: float, slack: float) -> tuple[slice, ...]:
    """The box of the voxels that may belong to `seed`, which bending moves up to `slack`."""
    far = REACH * diameter + seed.radius
    step = np.array([Z_PITCH * diameter, 1.0, 1.0])
    around = np.array([far, far + slack, far + slack])
    low = np.clip((seed.at - around) / step, 0, shape).astype(int).tolist()
    high = np.clip((seed.at + around) / step + 1, 0, shape).astype(int).tolist()
    return tuple(slice(a, b) for a, b in zip(low, high, strict=True))


def _distance_to_border(owners: NDArray[np.int32]) -> Float:
    """Pixels, within the slice, to the nearest pixel that touches another cell; inf if none."""
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


def _neighbours(array: NDArray[Any], axis: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two views: all but the last along `axis`, and all but the first."""
    along = np.moveaxis(array, axis, 0)
    return along[:-1], along[1:]


def _separate(
    owners: NDArray[np.int32], membrane: NDArray[np.bool_], diameter: float
) -> NDArray[np.uint32]:
    """Cells 1..n apart from each other along all axes, each with one profile per slice."""
    cells = np.where(membrane, 0, owners)
    below, above = _neighbours(cells, 0)
    above[(below != above) & (below > 0)] = 0
    in_plane = np.array([[[0] * 3] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0] * 3] * 3])
    profiles, n = ndimage.label(cells, structure=in_plane)
    smallest = 0.02 * min(diameter**2, cells[0].size)
    keep = _largest_profiles(profiles, n, owners, smallest)
    instances, _ = ndimage.label(keep[profiles])
    return instances.astype(np.uint32)


def _largest_profiles(
    profiles: NDArray[np.signedinteger], n: int, owners: NDArray[np.int32], smallest: float
) -> NDArray[np.bool_]:
    """For each profile 0..n: is it the largest of its cell in its slice, and large enough."""
    size = np.bincount(profiles.ravel(), minlength=n + 1)
    cell = np.zeros(n + 1, np.int64)
    first_number = int(owners.max()) + 1
    for z in range(len(owners)):
        cell[profiles[z]] = owners[z] + z * first_number
    order = np.lexsort((-size[1:], cell[1:])) + 1
    first = np.ones(n, bool)
    first[1:] = cell[order][1:] != cell[order][:-1]
    keep = np.zeros(n + 1, bool)
    keep[order[first]] = True
    return keep & (size >= smallest)


# Stain: grey levels of the tissue before the microscope


def _stain(
    rng: Generator,
    owners: NDArray[np.int32],
    instances: NDArray[np.uint32],
    distance: Float,
    width: Float,
    diameter: float,
) -> Float:
    """Grey levels of the tissue, about 45 (membrane) to 170 (cytoplasm)."""
    tissue = _cytoplasm(rng, owners, diameter)
    inside = np.clip((distance - 0.07 * diameter) / (0.03 * diameter), 0, 1)
    tissue *= 1 - inside * _small_organelles(rng, owners, diameter)
    for box, dark in _mitochondria(rng, instances, distance, diameter):
        tissue[box] *= 1 - inside[box] * dark
    membrane = _membrane(rng, distance / width, diameter)
    grazed = (instances == 0) & (distance >= width)
    membrane[grazed] = np.maximum(membrane[grazed], 0.65)
    tissue += membrane * (45 - tissue)
    return tissue


def _cytoplasm(rng: Generator, owners: NDArray[np.int32], diameter: float) -> Float:
    """A grey level and a granularity of its own for each cell; some cells are dark."""
    n = int(owners.max()) + 1
    level = rng.normal(158, 12, n) - rng.choice([0, 42], n, p=[0.87, 0.13])
    granularity = rng.uniform(11, 19, n) + 0.15 * (158 - level)
    grain = _grain(rng, owners.shape, 0.03 * diameter)
    grain += 0.7 * _grain(rng, owners.shape, 0.07 * diameter)
    tissue: Float = level.astype(np.float32)[owners]
    tissue += granularity.astype(np.float32)[owners] * grain
    tissue += 7 * _waves(rng, owners.shape, (3, 0.7 * diameter))
    return tissue


def _grain(rng: Generator, shape: Shape, sigma: float) -> Float:
    """White noise blurred within the slices to grains of `sigma` pixels; variance 1."""
    noise = rng.standard_normal(shape, np.float32)
    return _blur(noise, sigma) * (2 * math.sqrt(math.pi) * sigma)


def _blur(stack: Float, sigma: float) -> Float:
    blurred: Float = ndimage.gaussian_filter(stack, (0, sigma, sigma), truncate=3)
    return blurred


def _small_organelles(rng: Generator, owners: NDArray[np.int32], diameter: float) -> Float:
    """Darkness of vesicles (rings) or microtubules (specks), by cell, and cisternae (threads)."""
    n = int(owners.max()) + 1
    density = (rng.gamma(0.6, 1.0, n) * 6.0 / diameter**2).astype(np.float32)
    hollow = (0.0034 * diameter**2 * rng.random(n)).astype(np.float32)
    dots = (rng.random(owners.shape, np.float32) < density[owners]).astype(np.float32)
    dark: Float = 0.0085 * diameter**2 * _blur(dots, 0.055 * diameter)
    dark -= hollow[owners] * _blur(dots, 0.035 * diameter)
    thread = np.abs(_waves(rng, owners.shape, (2, 0.4 * diameter)))
    where = _waves(rng, owners.shape, (3, 1.2 * diameter)) > 1.1
    dark += 0.4 * np.maximum(1 - thread / 0.22, 0) * where
    return np.clip(dark, 0, 0.5)


def _mitochondria(
    rng: Generator, instances: NDArray[np.uint32], distance: Float, diameter: float
) -> Iterator[tuple[tuple[slice, ...], Float]]:
    """Boxes and the darkness in them: bodies with a rim and cristae, where a cell has room."""
    tries = int(1 + 1.6 * instances.size * Z_PITCH / diameter**2)
    for centre in rng.integers(0, instances.shape, (tries, 3)):
        at = tuple(int(c) for c in centre)
        width, ratio, angle, phase = rng.uniform((0.18, 1.0, 0.0, 0.0), (0.6, 2.0, np.pi, 6.28))
        width = min(width * diameter, 0.95 * (float(distance[at]) - 0.08 * diameter))
        if width < 0.12 * diameter:
            continue
        half = width * ratio
        box, (z, y, x) = _around(at, (half / (2 * Z_PITCH * diameter), half, half), distance.shape)
        along, across = np.cos(angle) * y + np.sin(angle) * x, np.cos(angle) * x - np.sin(angle) * y
        stripes = np.sin((26 * across * half / diameter) + phase + 2 * np.sin(4 * along + phase))
        from_centre = np.sqrt(along**2 + (ratio * across) ** 2 + z**2)
        dark = 0.36 + 0.14 * stripes + 0.14 * (from_centre > 0.85)
        dark *= (instances[box] == instances[at]) * np.clip((1 - from_centre) * 8, 0, 1)
        yield box, dark.astype(np.float32)


def _around(
    at: tuple[int, ...], half: Sequence[float], shape: Shape
) -> tuple[tuple[slice, ...], tuple[NDArray[np.float64], ...]]:
    """The box within `half` of a voxel, and its coordinates: 0 there, 1 at `half`."""
    box = tuple(
        slice(max(int(c - h), 0), min(int(c + h) + 2, n))
        for c, h, n in zip(at, half, shape, strict=True)
    )
    ranges = [(np.arange(b.start, b.stop) - c) / h for b, c, h in zip(box, at, half, strict=True)]
    return box, np.meshgrid(*ranges, indexing="ij", sparse=True)


def _membrane(rng: Generator, widths: Float, diameter: float) -> Float:
    """Share of membrane 0..1 in each voxel, by the distance to its middle in half widths.

    In places faint; smeared where it slants, since a section shows all of its thickness; with
    a few dark clouds beside it, as at synapses.
    """
    contrast = 0.78 + 0.23 * _waves(rng, widths.shape, (2.5, 0.8 * diameter))
    dark = np.exp(-((1.15 * widths) ** 2)) * np.clip(contrast, 0.28, 0.95)
    clouds = np.clip(_waves(rng, widths.shape, (2.5, 1.2 * diameter)) - 1.9, 0, 1)
    dark = np.maximum(dark, 0.5 * clouds * np.exp(-widths / 6))
    return np.asarray(ndimage.convolve1d(dark, [0.2, 0.6, 0.2], axis=0), np.float32)


# Camera


def _expose(rng: Generator, tissue: Float, diameter: float) -> NDArray[np.uint8]:
    """Lens, light, noise and grey levels, each with a jitter per slice."""
    shape = tissue.shape
    light = 1 + 0.06 * _waves(rng, shape, (1, 5 * diameter))
    sharpness, noise, contrast, brightness = rng.uniform(
        (0.6, 6, 0.88, -14), (1.1, 18, 1.15, 14), (shape[0], 4)
    ).T
    image = np.empty(shape, np.uint8)
    for z in range(shape[0]):
        seen = ndimage.gaussian_filter(tissue[z] * light[z], sharpness[z], truncate=3)
        shot = rng.standard_normal(seen.shape, np.float32) * np.sqrt(np.maximum(seen, 1) / 128)
        seen += noise[z] * ndimage.gaussian_filter(shot, 0.5, truncate=3) * 1.6
        grey = 128 + contrast[z] * (seen - 128) + brightness[z]
        image[z] = np.clip(np.rint(grey), 0, 255)
    return image
