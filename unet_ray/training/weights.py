"""The weight of every voxel in the training loss: Ronneberger, Fischer, Brox 2015, eq. 2.

    w(x) = w_c(x) + w0 * exp(-(d1(x) + d2(x))^2 / (2 sigma^2))

Knows class numbers and distances between cells; does not know where labels come
from, how a patch is cut or what the loss does with the weights.
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

NEGLIGIBLE = 1e-8  # a border term below this is set to 0: it is lost in float32 beside w_c anyway


def class_weights(targets: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
    """Weights w_c that give every class the same share of the loss.

    Args:
        targets: class numbers, any shape; a number of `classes` or more is a voxel to ignore.
        classes: how many classes there are.

    Returns:
        N / (K * n_c) per class, shape ``(classes,)``, with N the voxels that are not ignored and
        K the classes that occur, so the mean of w_c over those voxels is 1. A class that does
        not occur gets 0.
    """
    counts = np.bincount(targets.ravel(), minlength=classes)[:classes]
    occurs = counts > 0
    shares = np.zeros(classes)
    shares[occurs] = counts.sum() / (occurs.sum() * counts[occurs])
    return shares.astype(np.float32)


def border_term(
    instances: NDArray[np.integer[Any]],
    w0: float = 10.0,
    sigma: float = 5.0,
    spacing: Sequence[float] | None = None,
    inside: bool = True,
) -> NDArray[np.float32]:
    """The second term of eq. 2, w0 * exp(-(d1 + d2)^2 / (2 sigma^2)), at every voxel.

    d1 and d2 are the Euclidean distances, centre to centre, to the nearest voxel of the nearest
    and of the second nearest cell; d1 is 0 inside a cell. Exact, except that a value below 1e-8
    is 0: there d1 + d2 > sigma * sqrt(2 ln(w0 / 1e-8)), 32 voxels for the defaults, and no
    search goes further.

    Args:
        instances: shape ``(y, x)`` or ``(z, y, x)``; 0 is background, a cell is all voxels of one
            other number.
        w0: weight where two cells touch; 0 or more.
        sigma: width of the term, more than 0; in voxels, or in the unit of `spacing`.
        spacing: size of a voxel along each axis; 1 by default.
        inside: also within cells; else it is 0 there, in half the time.

    Returns:
        Shape of `instances`, from 0 to `w0`; all 0 with fewer than two cells.

    Raises:
        InputError: if `w0`, `sigma` or `spacing` is out of range.
    """
    sizes = (1.0,) * instances.ndim if spacing is None else tuple(map(float, spacing))
    if not 0 <= w0 < math.inf:
        raise InputError(f"w0={w0} is not a weight: it must be 0 or more (the paper has 10).")
    if not 0 < sigma < math.inf:
        raise InputError(f"sigma={sigma} is not a width: it must be above 0 (the paper has 5).")
    if len(sizes) != instances.ndim or not all(0 < size < math.inf for size in sizes):
        raise InputError(f"spacing={spacing} must be {instances.ndim} numbers above 0.")
    if w0 <= NEGLIGIBLE:
        return np.zeros(instances.shape, np.float32)
    reach = sigma * math.sqrt(2 * math.log(w0 / NEGLIGIBLE))
    # Axes before the last two, of which there is one at most, count as one.
    numbers = instances.reshape(-1, *instances.shape[-2:])
    near = _nearest_in_columns(numbers, sizes[-2])
    if instances.ndim == 3:
        near = _nearest_in_planes(*near, sizes[0], reach)
    wanted = np.ones(numbers.shape, bool) if inside else numbers == 0
    term = _border_term(*near, wanted, sizes[-1], reach, float(w0), float(sigma))
    return term.reshape(instances.shape)


def separate(instances: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Which voxels of cells stay cell once touching cells are pulled apart, slice by slice.

    A voxel of a cell becomes background if one of its 4 neighbours belongs to another cell: the
    border is two voxels wide, one from each side, and the same seen in a mirror (sec. 3 of the
    paper: "the separation border is computed using morphological operations").

    Args:
        instances: ``(z, y, x)``; 0 is background, a cell is all voxels of one other number.

    Returns:
        ``(z, y, x)``, True is cell.
    """
    apart: NDArray[np.bool_] = instances != 0
    for axis in (1, 2):
        before = np.moveaxis(instances, axis, 0)
        touching = (before[1:] != before[:-1]) & (before[1:] != 0) & (before[:-1] != 0)
        kept = np.moveaxis(apart, axis, 0)
        kept[1:] &= ~touching
        kept[:-1] &= ~touching
    return apart


def cells_of(targets: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """The cells of a class map: the 4-connected components of every class but 0, per slice.

    Args:
        targets: class numbers, ``(z, y, x)``; a number of `classes` or more is no cell.
        classes: how many classes there are.

    Returns:
        ``(z, y, x)``: 0, and numbers from 1 in every slice.
    """
    cells = np.zeros(targets.shape, np.int64)
    for section, into in zip(targets, cells, strict=True):
        found = 0
        for number in range(1, classes):
            pieces, count = ndimage.label(section == number)
            into += np.where(pieces, pieces + found, 0)
            found += count
    return cells


def weight_map(
    targets: NDArray[np.uint8],
    classes: int,
    w0: float = 10.0,
    sigma: float = 5.0,
    balance: NDArray[np.float32] | None = None,
    instances: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.float32]:
    """The weights of eq. 2, slice by slice.

    The border term is added on background voxels only: there the formula has one meaning (inside
    a cell, "distance to the border of the nearest cell" may be 0 or the depth), it is what the
    authors' own later software does, and on both sides of a border it would not favour the
    separation.

    Args:
        targets: class numbers, shape ``(z, y, x)``; a number of `classes` or more is ignored:
            it weighs 0 and is no cell.
        classes: how many classes there are.
        w0: weight between two cells that all but touch.
        sigma: width of the border term in voxels.
        balance: w_c per class, shape ``(classes,)``, as `class_weights` gives it for all
            training data; by default that of these `targets`.
        instances: the cells, shape ``(z, y, x)``; by default `cells_of` the targets.

    Returns:
        Shape ``(z, y, x)``.

    Raises:
        InputError: if `w0` or `sigma` is out of range.
    """
    of_number = np.zeros(256, np.float32)
    of_number[:classes] = class_weights(targets, classes) if balance is None else balance
    weights: NDArray[np.float32] = of_number[targets]
    cells = cells_of(targets, classes) if instances is None else instances
    for section, numbers, weight in zip(targets, cells, weights, strict=True):
        border = border_term(numbers, w0, sigma, inside=False)
        np.add(weight, border, out=weight, where=section == 0)
    return weights


# Along an axis, the two nearest cells of every voxel suffice for what follows: any other cell of
# the line has two nearer ones on it, as seen from every voxel beside it.
Near = tuple[NDArray[np.int64], NDArray[np.float64]]


def _nearest_in_columns(instances: NDArray[np.integer[Any]], size: float) -> Near:
    """The two nearest cells of every voxel along y and their squared distances, (z, y, x, 2)."""
    cells = np.zeros((*instances.shape, 2), np.int64)
    squares = np.full((*instances.shape, 2), np.inf)
    for z, plane in enumerate(np.ascontiguousarray(instances, dtype=np.int64)):
        down = np.arange(len(plane))
        _sweep(plane, down, size, cells[z], squares[z])
        _sweep(plane, down[::-1].copy(), size, cells[z], squares[z])
    return cells, squares


def _nearest_in_planes(
    cells: NDArray[np.int64], squares: NDArray[np.float64], size: float, reach: float
) -> Near:
    """The two nearest cells along z and y, from those along y."""
    near = np.zeros_like(cells), np.full_like(squares, np.inf)
    _spread(cells, squares, size, reach, *near)
    return near


@compiled
def _offer(
    first: int, near: float, second: int, far: float, cell: int, square: float
) -> tuple[int, float, int, float]:
    """The two nearest cells and their squared distances, after one more is offered."""
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
    """Offers to every voxel the last two cells that a walk along its column has met."""
    width = instances.shape[1]
    met = np.zeros((2, width), np.int64)
    where = np.zeros((2, width), np.int64)
    for y in order:
        for x in range(width):
            cell = instances[y, x]
            if cell != 0:
                if cell != met[0, x]:
                    met[1, x], where[1, x] = met[0, x], where[0, x]
                    met[0, x] = cell
                where[0, x] = y
            best = cells[y, x, 0], squares[y, x, 0], cells[y, x, 1], squares[y, x, 1]
            for k in range(2):
                if met[k, x] != 0:
                    way = (y - where[k, x]) * size
                    best = _offer(best[0], best[1], best[2], best[3], met[k, x], way * way)
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
    """The two nearest cells of place `at` of a line and their squared distances, in reach.

    A place further off than d2 cannot matter, nor one from which d1 + d2 is out of reach: d2 is
    then at least the way to it, and on the last axis d1 the least of that and what is known.
    """
    first, near, second, far = cells[at, 0], squares[at, 0], cells[at, 1], squares[at, 1]
    way = 0.0
    for steps in range(1, len(cells)):
        way += size
        square = way * way
        room = reach - way
        if square >= far or room < 0 or (last and min(near, square) > room * room):
            break
        for place in (at - steps, at + steps):
            if 0 <= place < len(cells):
                for k in range(2):
                    there = squares[place, k] + square
                    if there < far:
                        first, near, second, far = _offer(
                            first, near, second, far, cells[place, k], there
                        )
    return first, near, second, far


@compiled
def _spread(
    cells: NDArray[np.int64],
    squares: NDArray[np.float64],
    size: float,
    reach: float,
    found: NDArray[np.int64],
    away: NDArray[np.float64],
) -> None:
    """The two nearest cells along z as well, of every voxel."""
    depth, height, width, _ = cells.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                best = _search(cells[:, y, x], squares[:, y, x], z, size, reach, False)
                found[z, y, x, 0], away[z, y, x, 0] = best[0], best[1]
                found[z, y, x, 1], away[z, y, x, 1] = best[2], best[3]


@compiled
def _border_term(
    cells: NDArray[np.int64],
    squares: NDArray[np.float64],
    wanted: NDArray[np.bool_],
    size: float,
    reach: float,
    w0: float,
    sigma: float,
) -> NDArray[np.float32]:
    """The border term from the two nearest cells beside x; 0 where d1 + d2 > `reach`."""
    depth, height, width, _ = cells.shape
    term = np.zeros((depth, height, width), np.float32)
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                if not wanted[z, y, x]:
                    continue
                _, near, _, far = _search(cells[z, y], squares[z, y], x, size, reach, True)
                total = math.sqrt(near) + math.sqrt(far)
                if total <= reach:
                    term[z, y, x] = w0 * math.exp(-(total**2) / (2 * sigma**2))
    return term
