"""Synthetic serial-section electron microscopy: touching neurites and their membranes.

Generates an image of tissue and the cell of each voxel. Independent of files, tiles and networks.
Lengths are in pixels of a slice; a section is several pixels thick.
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
"""In pixels; a smaller cell would be all membrane."""

Z_PITCH = 0.06
"""Distance between two sections in cell diameters. It is small, since neurites run along z."""

REACH = 1.2
"""Search radius around the seed of a cell, in cell diameters beyond the cell's own radius."""


@dataclass(frozen=True)
class Phantom:
    """An image of tissue and its ground truth; all arrays have shape (z, y, x).

    Attributes:
        image: uint8, dark membranes and lighter cells, as in the ISBI 2012 stack.
        instances: uint32, 0 = membrane, 1..n = cells. Cells are the 6-connected components of
            ``instances > 0``, numbered by their first voxel, so no two cells touch along an axis.
            In each slice a cell is one 4-connected profile.
    """

    image: NDArray[np.uint8]
    instances: NDArray[np.uint32]

    @property
    def classes(self) -> NDArray[np.uint8]:
        """The ground truth as ISBI 2012 labels: 0 = membrane, 255 = cell."""
        return np.where(self.instances > 0, np.uint8(255), np.uint8(0))


def make_phantom(shape: Shape, seed: int = 0, cell_diameter: float = 42.0) -> Phantom:
    """Makes tissue of `shape` (z, y, x).

    On one machine, equal arguments return equal bytes.

    Args:
        shape: voxels per axis (z, y, x), each at least 1.
        seed: random seed, at least 0.
        cell_diameter: in pixels, at least 12. A slice has about one profile per square of this
            side, from slivers to profiles several times as wide. Membranes and organelles scale
            with it.

    Raises:
        InputError: if an argument is outside its range.
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
            f"A phantom cannot have shape {tuple(shape)}: set three extents (z, y, x) of at least "
            "1 voxel, for example (8, 512, 512)."
        )
    if seed < 0:
        raise InputError(f"seed={seed} must be an integer of at least 0.")
    if not SMALLEST_DIAMETER <= diameter < np.inf:
        raise InputError(
            f"cell_diameter={diameter:g} must be a finite number of pixels, at least "
            f"{SMALLEST_DIAMETER:g}: smaller cells would be all membrane."
        )


# Smooth random fields


def _spline(length: int, period: float) -> Float:
    """Weights (length, knots) of a cubic B-spline, scaled to variance 1 for white-noise knots."""
    positions = np.arange(length) / period
    knots = np.arange(int(positions[-1]) + 4) - 1
    t = np.abs(positions[:, None] - knots[None, :])
    weights = np.where(t < 1, 4 - 6 * t**2 + 3 * t**3, np.maximum(2 - t, 0) ** 3)
    return np.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True), np.float32)


def _waves(rng: Generator, shape: Shape, periods: tuple[float, float]) -> Float:
    """A smooth random field of mean 0 and variance 1.

    `periods` are the distances between its knots, in slices and in pixels.
    """
    z = _spline(shape[0], periods[0])
    y, x = (_spline(n, periods[1]) for n in shape[1:])
    knots = rng.standard_normal((z.shape[1], y.shape[1], x.shape[1]), np.float32)
    by_slice = np.tensordot(z, knots, axes=1)
    return np.asarray(y @ by_slice @ x.T, np.float32)


# Anatomy


@dataclass(frozen=True)
class _Seed:
    """Start of a cell: its centre (z, y, x) and radius in pixels, and its metric (yy, yx, xx)."""

    centre: list[float]
    radius: float
    metric: list[float]


def _seeds(rng: Generator, shape: Shape, diameter: float) -> list[_Seed]:
    """Jittered points of a grid that extends beyond the volume, with random size and slimness."""
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
    """Owner 1..n of every voxel: the nearest seed after bending the axes.

    Distances are measured to a ball around each seed (an additively weighted Voronoi diagram), so
    large cells bulge into small ones. Each seed is compared only with the voxels in its reach, to
    bound the memory.
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
        dy, dx = y[box] - seed.centre[1], x[box] - seed.centre[2]
        yy, yx, xx = seed.metric
        distance = np.sqrt(dy * (yy * dy + yx * dx) + xx * dx * dx + (z - seed.centre[0]) ** 2)
        distance -= seed.radius
        closer = distance < nearest[box]
        np.copyto(nearest[box], distance, where=closer)
        np.copyto(owners[box], number, where=closer)
    return owners


def _bend(rng: Generator, shape: Shape, diameter: float) -> Float:
    """Displacement of the tissue along one axis in pixels, in long and short waves."""
    coarse = 0.22 * diameter * _waves(rng, shape, (7, 1.3 * diameter))
    return coarse + 0.035 * diameter * _waves(rng, shape, (4, 0.4 * diameter))


def _reach(seed: _Seed, shape: Shape, diameter: float, slack: float) -> tuple[slice, ...]:
    """Box of the voxels that may belong to `seed`; bending moves voxels by at most `slack`."""
    reach = REACH * diameter + seed.radius
    step = np.array([Z_PITCH * diameter, 1.0, 1.0])
    half = np.array([reach, reach + slack, reach + slack])
    low = np.clip((seed.centre - half) / step, 0, shape).astype(int).tolist()
    high = np.clip((seed.centre + half) / step + 1, 0, shape).astype(int).tolist()
    return tuple(slice(a, b) for a, b in zip(low, high, strict=True))


def _distance_to_border(owners: NDArray[np.int32]) -> Float:
    """Distance in pixels, within the slice, to the nearest pixel that touches another cell.

    It is infinite in a slice of a single cell.
    """
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
    """Two views of `array`: without its last and without its first position along `axis`."""
    along = np.moveaxis(array, axis, 0)
    return along[:-1], along[1:]


def _separate(
    owners: NDArray[np.int32], membrane: NDArray[np.bool_], diameter: float
) -> NDArray[np.uint32]:
    """Cells 1..n that touch along no axis, each with one profile per slice."""
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
    """Whether each profile 0..n is the largest of its cell in its slice and large enough."""
    size = np.bincount(profiles.ravel(), minlength=n + 1)
    cell = np.zeros(n + 1, np.int64)
    cells_per_slice = int(owners.max()) + 1
    for z in range(len(owners)):
        cell[profiles[z]] = owners[z] + z * cells_per_slice
    order = np.lexsort((-size[1:], cell[1:])) + 1
    first = np.ones(n, bool)
    first[1:] = cell[order][1:] != cell[order][:-1]
    keep = np.zeros(n + 1, bool)
    keep[order[first]] = True
    return keep & (size >= smallest)


# Stain: grey levels of the tissue before imaging


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
    """Cytoplasm with a random grey level and granularity for each cell; some cells are dark."""
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
    """White noise, blurred within each slice to grains of `sigma` pixels; variance 1."""
    noise = rng.standard_normal(shape, np.float32)
    return _blur(noise, sigma) * (2 * math.sqrt(math.pi) * sigma)


def _blur(stack: Float, sigma: float) -> Float:
    blurred: Float = ndimage.gaussian_filter(stack, (0, sigma, sigma), truncate=3)
    return blurred


def _small_organelles(rng: Generator, owners: NDArray[np.int32], diameter: float) -> Float:
    """Darkness of vesicles (rings) or microtubules (specks) per cell, and cisternae (threads)."""
    n = int(owners.max()) + 1
    density = (rng.gamma(0.6, 1.0, n) * 6.0 / diameter**2).astype(np.float32)
    hollow = (0.0034 * diameter**2 * rng.random(n)).astype(np.float32)
    dots = (rng.random(owners.shape, np.float32) < density[owners]).astype(np.float32)
    dark: Float = 0.0085 * diameter**2 * _blur(dots, 0.055 * diameter)
    dark -= hollow[owners] * _blur(dots, 0.035 * diameter)
    thread = np.abs(_waves(rng, owners.shape, (2, 0.4 * diameter)))
    has_threads = _waves(rng, owners.shape, (3, 1.2 * diameter)) > 1.1
    dark += 0.4 * np.maximum(1 - thread / 0.22, 0) * has_threads
    return np.clip(dark, 0, 0.5)


def _mitochondria(
    rng: Generator, instances: NDArray[np.uint32], distance: Float, diameter: float
) -> Iterator[tuple[tuple[slice, ...], Float]]:
    """Boxes and their darkness: bodies with a rim and cristae, where a cell is wide enough."""
    attempts = int(1 + 1.6 * instances.size * Z_PITCH / diameter**2)
    for position in rng.integers(0, instances.shape, (attempts, 3)):
        centre = tuple(int(c) for c in position)
        width, ratio, angle, phase = rng.uniform((0.18, 1.0, 0.0, 0.0), (0.6, 2.0, np.pi, 6.28))
        width = min(width * diameter, 0.95 * (float(distance[centre]) - 0.08 * diameter))
        if width < 0.12 * diameter:
            continue
        half = width * ratio
        box, (z, y, x) = _around(
            centre, (half / (2 * Z_PITCH * diameter), half, half), distance.shape
        )
        along, across = np.cos(angle) * y + np.sin(angle) * x, np.cos(angle) * x - np.sin(angle) * y
        stripes = np.sin((26 * across * half / diameter) + phase + 2 * np.sin(4 * along + phase))
        from_centre = np.sqrt(along**2 + (ratio * across) ** 2 + z**2)
        dark = 0.36 + 0.14 * stripes + 0.14 * (from_centre > 0.85)
        dark *= (instances[box] == instances[centre]) * np.clip((1 - from_centre) * 8, 0, 1)
        yield box, dark.astype(np.float32)


def _around(
    centre: tuple[int, ...], half: Sequence[float], shape: Shape
) -> tuple[tuple[slice, ...], tuple[NDArray[np.float64], ...]]:
    """Box within `half` of a voxel, and its coordinates: 0 at the centre, 1 at `half`."""
    box = tuple(
        slice(max(int(c - h), 0), min(int(c + h) + 2, n))
        for c, h, n in zip(centre, half, shape, strict=True)
    )
    ranges = [
        (np.arange(b.start, b.stop) - c) / h for b, c, h in zip(box, centre, half, strict=True)
    ]
    return box, np.meshgrid(*ranges, indexing="ij", sparse=True)


def _membrane(rng: Generator, widths: Float, diameter: float) -> Float:
    """Share of membrane (0 to 1) in each voxel, from `widths`: distance to its middle / half width.

    The membrane is faint in places. It is smeared where it slants, since a section shows its whole
    thickness. It has a few dark clouds beside it, as at synapses.
    """
    contrast = 0.78 + 0.23 * _waves(rng, widths.shape, (2.5, 0.8 * diameter))
    dark = np.exp(-((1.15 * widths) ** 2)) * np.clip(contrast, 0.28, 0.95)
    clouds = np.clip(_waves(rng, widths.shape, (2.5, 1.2 * diameter)) - 1.9, 0, 1)
    dark = np.maximum(dark, 0.5 * clouds * np.exp(-widths / 6))
    return np.asarray(ndimage.convolve1d(dark, [0.2, 0.6, 0.2], axis=0), np.float32)


# Camera


def _expose(rng: Generator, tissue: Float, diameter: float) -> NDArray[np.uint8]:
    """Image of the tissue: uneven light, blur, noise and grey levels that vary between slices."""
    shape = tissue.shape
    light = 1 + 0.06 * _waves(rng, shape, (1, 5 * diameter))
    blur, noise, contrast, brightness = rng.uniform(
        (0.6, 6, 0.88, -14), (1.1, 18, 1.15, 14), (shape[0], 4)
    ).T
    image = np.empty(shape, np.uint8)
    for z in range(shape[0]):
        signal = ndimage.gaussian_filter(tissue[z] * light[z], blur[z], truncate=3)
        shot = rng.standard_normal(signal.shape, np.float32) * np.sqrt(np.maximum(signal, 1) / 128)
        signal += noise[z] * ndimage.gaussian_filter(shot, 0.5, truncate=3) * 1.6
        grey = 128 + contrast[z] * (signal - 128) + brightness[z]
        image[z] = np.clip(np.rint(grey), 0, 255)
    return image
