"""Weight maps of the training loss: Ronneberger, Fischer, Brox 2015, eq. 2.

    w(x) = w_c(x) + w0 * exp(-(d1(x) + d2(x))^2 / (2 sigma^2))

Handles arrays of class numbers and of cells. Independent of files, patches and the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.compiled import compiled
from unet_ray.errors import InputError

NEGLIGIBLE = 1e-8  # smaller border terms are set to 0: adding them to w_c is lost in float32


def class_weights(targets: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
    """Computes weights w_c that give every class the same share of the loss.

    Args:
        targets: class numbers, any shape; voxels with a number of `classes` or more are ignored.
        classes: number of classes.

    Returns:
        N / (K * n_c) per class, shape ``(classes,)``. N is the number of voxels that are not
        ignored, n_c the number of voxels of the class, and K the number of classes that occur. The
        mean of w_c over the N voxels is 1. A class that does not occur gets 0.
    """
    return shares_of(np.bincount(targets.ravel(), minlength=classes)[:classes])


def shares_of(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Computes `class_weights` from the number of voxels of each class, shape ``(classes,)``."""
    occurs = counts > 0
    shares = np.zeros(len(counts))
    shares[occurs] = counts.sum() / (occurs.sum() * counts[occurs])
    return shares.astype(np.float32)


def border_reach(w0: float, sigma: float) -> float:
    """Returns the distance, in voxels of x, of the cells that change the border term of a voxel."""
    return sigma * math.sqrt(2 * math.log(w0 / NEGLIGIBLE)) if w0 > NEGLIGIBLE else 0.0


def border_term(
    instances: NDArray[np.integer[Any]],
    w0: float = 10.0,
    sigma: float = 5.0,
    spacing: Sequence[float] | None = None,
    inside: bool = True,
) -> NDArray[np.float32]:
    """Computes the border term of eq. 2, w0 * exp(-(d1 + d2)^2 / (2 sigma^2)), at every voxel.

    d1 and d2 are the Euclidean distances to the nearest and the second nearest cell. They are
    measured between voxel centres; d1 is 0 inside a cell. The result is exact, except that values
    below 1e-8 are 0. The search therefore ends at d1 + d2 = sigma * sqrt(2 ln(w0 / 1e-8)), which is
    32 voxels for the defaults.

    Args:
        instances: cell numbers, shape ``(y, x)`` or ``(z, y, x)``; 0 is background. All voxels of
            one number are one cell.
        w0: weight between two touching cells; at least 0.
        sigma: width of the term, above 0; in voxels, or in the unit of `spacing`.
        spacing: size of a voxel along each axis; 1 by default.
        inside: whether to compute the term inside cells too; otherwise it is 0 there, which
            takes half the time.

    Returns:
        Array of the shape of `instances`, from 0 to `w0`; all 0 with fewer than two cells.

    Raises:
        InputError: if `w0`, `sigma` or `spacing` is out of range.
    """
    sizes = (1.0,) * instances.ndim if spacing is None else tuple(map(float, spacing))
    if not 0 <= w0 < math.inf:
        raise InputError(f"w0={w0} must be finite and at least 0 (the paper uses 10).")
    if not 0 < sigma < math.inf:
        raise InputError(f"sigma={sigma} must be finite and above 0 (the paper uses 5).")
    if len(sizes) != instances.ndim or not all(0 < size < math.inf for size in sizes):
        raise InputError(f"spacing={spacing} must be {instances.ndim} finite numbers above 0.")
    if w0 <= NEGLIGIBLE:
        return np.zeros(instances.shape, np.float32)
    reach = border_reach(w0, sigma)
    # A 2D image becomes a volume with one slice.
    numbers = instances.reshape(-1, *instances.shape[-2:])
    nearest = _nearest_in_columns(numbers, sizes[-2])
    if instances.ndim == 3:
        nearest = _nearest_in_planes(*nearest, sizes[0], reach)
    mask = np.ones(numbers.shape, bool) if inside else numbers == 0
    term = _border_term(*nearest, mask, sizes[-1], reach, float(w0), float(sigma))
    return term.reshape(instances.shape)


def separate(instances: NDArray[np.integer[Any]], dims: int = 2) -> NDArray[np.bool_]:
    """Separates touching cells by a border of background, slice by slice or in 3-D.

    A voxel of a cell becomes background if one of its 4 neighbours in the slice, or of its 6 in the
    volume, belongs to another cell. The border is two voxels wide, one from each cell, so that
    mirroring the labels mirrors the border. The paper computes it with "morphological operations"
    (sec. 3).

    Args:
        instances: cell numbers, ``(z, y, x)``; 0 is background. All voxels of one number are one
            cell.
        dims: 2 for slice by slice, 3 for the volume.

    Returns:
        Mask ``(z, y, x)``; True for voxels that remain cell.
    """
    separated: NDArray[np.bool_] = instances != 0
    for axis in range(3 - dims, 3):
        numbers = np.moveaxis(instances, axis, 0)
        touching = (numbers[1:] != numbers[:-1]) & (numbers[1:] != 0) & (numbers[:-1] != 0)
        view = np.moveaxis(separated, axis, 0)  # changes `separated` in place
        view[1:] &= ~touching
        view[:-1] &= ~touching
    return separated


def cells_of(targets: NDArray[np.uint8], classes: int, dims: int = 2) -> NDArray[np.int64]:
    """Numbers the connected components of every class but 0: 4-connected in a slice, or 6 in 3-D.

    Args:
        targets: class numbers, ``(z, y, x)``; voxels with a number of `classes` or more are
            ignored.
        classes: number of classes.
        dims: 2 for slice by slice, where each slice counts from 1; 3 for the volume.

    Returns:
        Cell numbers, ``(z, y, x)``; 0 is background.
    """
    cells = np.zeros(targets.shape, np.int64)
    parts = zip(targets, cells, strict=True) if dims == 2 else [(targets, cells)]
    for target, numbers in parts:
        total = 0
        for number in range(1, classes):
            components, count = ndimage.label(target == number)
            numbers += np.where(components, components + total, 0)
            total += count
    return cells


def weight_map(
    targets: NDArray[np.uint8],
    classes: int,
    w0: float = 10.0,
    sigma: float = 5.0,
    balance: NDArray[np.float32] | None = None,
    instances: NDArray[np.integer[Any]] | None = None,
    spacing: Sequence[float] | None = None,
) -> NDArray[np.float32]:
    """Computes the weights of eq. 2, slice by slice or in 3-D.

    The border term is added to background voxels only, as in the authors' later software. Inside
    a cell, the paper's "distance to the border of the nearest cell" is ambiguous: it may be 0 or
    the depth in the cell. A term on both sides of a border would not favour the separation.

    Args:
        targets: class numbers, shape ``(z, y, x)``. Voxels with a number of `classes` or more are
            ignored: their weight is 0 and they belong to no cell.
        classes: number of classes.
        w0: weight between two cells that almost touch.
        sigma: width of the border term in voxels.
        balance: w_c per class, shape ``(classes,)``, from `class_weights` of all training data; by
            default computed from `targets`.
        instances: cell numbers, shape ``(z, y, x)``; by default `cells_of` the targets.
        spacing: size of a voxel along z, y and x, in voxels of x, for distances in 3-D; None for
            slice by slice.

    Returns:
        Weights, float32 ``(z, y, x)``.

    Raises:
        InputError: if `w0` or `sigma` is out of range.
    """
    table = np.zeros(256, np.float32)
    table[:classes] = class_weights(targets, classes) if balance is None else balance
    weights: NDArray[np.float32] = table[targets]
    if w0 <= NEGLIGIBLE:
        border_term(np.zeros((1, 1), int), w0, sigma)  # refuses what is out of range
        return weights
    dims = 2 if spacing is None else 3
    cells = cells_of(targets, classes, dims) if instances is None else instances
    parts = [(targets, cells, weights)]
    if dims == 2:
        parts = list(zip(targets, cells, weights, strict=True))
    for target, numbers, weight in parts:
        border = border_term(numbers, w0, sigma, spacing, inside=False)
        np.add(weight, border, out=weight, where=target == 0)
    return weights


# The two nearest cells of every voxel and their squared distances, both (z, y, x, 2). Each axis can
# be searched in turn: the two cells on a line that are nearest to a position are also nearer than
# any third cell of the line to every voxel beside that position.
Near = tuple[NDArray[np.int64], NDArray[np.float64]]


def _nearest_in_columns(instances: NDArray[np.integer[Any]], size: float) -> Near:
    """Finds the two nearest cells of every voxel along y."""
    cells = np.zeros((*instances.shape, 2), np.int64)
    squares = np.full((*instances.shape, 2), np.inf)
    for z, plane in enumerate(np.ascontiguousarray(instances, dtype=np.int64)):
        rows = np.arange(len(plane))
        _sweep(plane, rows, size, cells[z], squares[z])
        _sweep(plane, rows[::-1].copy(), size, cells[z], squares[z])
    return cells, squares


def _nearest_in_planes(
    cells: NDArray[np.int64], squares: NDArray[np.float64], size: float, reach: float
) -> Near:
    """Extends the search to z: finds the two nearest cells along y and z from those along y."""
    nearest = np.zeros_like(cells), np.full_like(squares, np.inf)
    _spread(cells, squares, size, reach, *nearest)
    return nearest


@compiled
def _offer(
    first: int, near: float, second: int, far: float, cell: int, square: float
) -> tuple[int, float, int, float]:
    """Updates the two nearest cells and their squared distances with another cell."""
    if cell == first:
        return first, min(near, square), second, far
    if square < near:
        return cell, square, first, near
    if square < far:
        return first, near, cell, square
    return first, near, second, far


@compiled
def _sweep(
    instances: NDArray[np.int64],
    order: NDArray[np.int64],
    size: float,
    cells: NDArray[np.int64],
    squares: NDArray[np.float64],
) -> None:
    """Updates every voxel with the last two cells before it in its column, in this `order`."""
    width = instances.shape[1]
    last = np.zeros((2, width), np.int64)  # the last two cells of each column
    last_y = np.zeros((2, width), np.int64)  # the rows in which they were last seen
    for y in order:
        for x in range(width):
            cell = instances[y, x]
            if cell != 0:
                if cell != last[0, x]:
                    last[1, x], last_y[1, x] = last[0, x], last_y[0, x]
                    last[0, x] = cell
                last_y[0, x] = y
            best = cells[y, x, 0], squares[y, x, 0], cells[y, x, 1], squares[y, x, 1]
            for k in range(2):
                if last[k, x] != 0:
                    distance = (y - last_y[k, x]) * size
                    square = distance * distance
                    best = _offer(best[0], best[1], best[2], best[3], last[k, x], square)
            cells[y, x, 0], squares[y, x, 0], cells[y, x, 1], squares[y, x, 1] = best


@compiled
def _search(
    cells: NDArray[np.int64],
    squares: NDArray[np.float64],
    at: int,
    size: float,
    reach: float,
    last: bool,
) -> tuple[int, float, int, float]:
    """Finds the two nearest cells of position `at` on a line, and their squared distances.

    The search moves away from `at` and stops at a distance s where cells no longer matter. A cell
    at s or beyond changes nothing if s >= d2. Otherwise it leaves d2 at least s and d1 at least
    min(d1, s), so it does not matter if their sum exceeds `reach`. Before the `last` axis, d1 may
    still decrease, so only d2 is compared with `reach`.
    """
    first, near, second, far = cells[at, 0], squares[at, 0], cells[at, 1], squares[at, 1]
    distance = 0.0
    for steps in range(1, len(cells)):
        distance += size
        square = distance * distance
        remaining = reach - distance
        if square >= far or remaining < 0 or (last and min(near, square) > remaining * remaining):
            break
        for position in (at - steps, at + steps):
            if 0 <= position < len(cells):
                for k in range(2):
                    total = squares[position, k] + square
                    if total < far:
                        first, near, second, far = _offer(
                            first, near, second, far, cells[position, k], total
                        )
    return first, near, second, far


@compiled
def _spread(
    cells: NDArray[np.int64],
    squares: NDArray[np.float64],
    size: float,
    reach: float,
    nearest_cells: NDArray[np.int64],
    nearest_squares: NDArray[np.float64],
) -> None:
    """Fills the two nearest cells of every voxel along y and z, from those along y."""
    depth, height, width, _ = cells.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                best = _search(cells[:, y, x], squares[:, y, x], z, size, reach, False)
                nearest_cells[z, y, x, 0], nearest_squares[z, y, x, 0] = best[0], best[1]
                nearest_cells[z, y, x, 1], nearest_squares[z, y, x, 1] = best[2], best[3]


@compiled
def _border_term(
    cells: NDArray[np.int64],
    squares: NDArray[np.float64],
    mask: NDArray[np.bool_],
    size: float,
    reach: float,
    w0: float,
    sigma: float,
) -> NDArray[np.float32]:
    """Computes the border term in `mask` from the nearest cells along all axes but x.

    It is 0 where d1 + d2 > `reach`.
    """
    depth, height, width, _ = cells.shape
    term = np.zeros((depth, height, width), np.float32)
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                if not mask[z, y, x]:
                    continue
                _, near, _, far = _search(cells[z, y], squares[z, y], x, size, reach, True)
                total = math.sqrt(near) + math.sqrt(far)
                if total <= reach:
                    term[z, y, x] = w0 * math.exp(-(total**2) / (2 * sigma**2))
    return term
