"""The weight of every voxel in the training loss: Ronneberger, Fischer, Brox 2015, eq. 2.

    w(x) = w_c(x) + w0 * exp(-(d1(x) + d2(x))^2 / (2 sigma^2))

Knows class numbers and distances between cells within one slice; does not know where labels come
from, how a patch is cut or what the loss does with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.errors import InputError

NEGLIGIBLE = 1e-8  # a border term below this is set to 0: it is lost in float32 beside w_c anyway
FAR = 1 << 62  # squared distance to a cell that is not there

Function = TypeVar("Function", bound=Callable[..., Any])
Nearest = tuple[int, int, int, int]  # a cell, its squared distance, the next cell, its squared d.


def compiled(function: Function) -> Function:
    """Compiles `function` at its first call; it runs without the GIL.

    The machine code is kept on disk. Where no folder can be written (an install that is
    read-only, and no home) each process compiles for itself, which takes it about a second.
    """
    try:
        return cast(Function, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # numba finds no place for its cache, and says so while decorating
        return cast(Function, numba.njit(nogil=True)(function))


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
    instances: NDArray[np.integer[Any]], w0: float = 10.0, sigma: float = 5.0
) -> NDArray[np.float32]:
    """The second term of eq. 2, w0 * exp(-(d1 + d2)^2 / (2 sigma^2)), at every voxel of a slice.

    d1 and d2 are the Euclidean distances, centre to centre, to the nearest voxel of the nearest
    and of the second nearest cell; d1 is 0 inside a cell. Exact, except that a value below 1e-8
    is 0: there d1 + d2 > sigma * sqrt(2 ln(w0 / 1e-8)), 32 voxels for the defaults, and no
    search goes further.

    Args:
        instances: shape ``(y, x)``; 0 is background, a cell is all voxels of one other number.
        w0: weight where two cells touch; 0 or more.
        sigma: width of the term in voxels; more than 0.

    Returns:
        Shape ``(y, x)``, from 0 to `w0`; all 0 with fewer than two cells.

    Raises:
        InputError: if `w0` or `sigma` is out of range.
    """
    if not 0 <= w0 < math.inf:
        raise InputError(f"w0={w0} is not a weight: it must be 0 or more (the paper has 10).")
    if not 0 < sigma < math.inf:
        raise InputError(f"sigma={sigma} is not a width: it must be above 0 (the paper has 5).")
    if w0 <= NEGLIGIBLE:
        return np.zeros(instances.shape, np.float32)
    reach = sigma * math.sqrt(2 * math.log(w0 / NEGLIGIBLE))
    cells, gaps = _nearest_two_in_column(np.ascontiguousarray(instances, dtype=np.int64))
    return _border_term(cells, gaps, reach, float(w0), float(sigma))


def weight_map(
    targets: NDArray[np.uint8],
    classes: int,
    w0: float = 10.0,
    sigma: float = 5.0,
    balance: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The weights of eq. 2, slice by slice.

    Cells are the 4-connected components of every class but 0, the background. The border term
    is added on background voxels only: there the formula has one meaning (inside a cell,
    "distance to the border of the nearest cell" may be 0 or the depth), it is what the authors'
    own later software does, and on both sides of a border it would not favour the separation.

    Args:
        targets: class numbers, shape ``(z, y, x)``; a number of `classes` or more is ignored:
            it weighs 0 and is no cell.
        classes: how many classes there are.
        w0: weight between two cells that all but touch.
        sigma: width of the border term in voxels.
        balance: w_c per class, shape ``(classes,)``, as `class_weights` gives it for all
            training data; by default that of these `targets`.

    Returns:
        Shape ``(z, y, x)``.

    Raises:
        InputError: if `w0` or `sigma` is out of range.
    """
    of_number = np.zeros(256, np.float32)
    of_number[:classes] = class_weights(targets, classes) if balance is None else balance
    weights: NDArray[np.float32] = of_number[targets]
    for section, weight in zip(targets, weights, strict=True):
        border = border_term(_cells(section, classes), w0, sigma)
        np.add(weight, border, out=weight, where=section == 0)
    return weights


def _cells(section: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Numbers the 4-connected components of every class but 0 from 1, shape ``(y, x)``."""
    cells = np.zeros(section.shape, np.int64)
    found = 0
    for number in range(1, classes):
        pieces, count = ndimage.label(section == number)
        cells += np.where(pieces, pieces + found, 0)
        found += count
    return cells


@compiled
def _closer(cell: int, square: int, c1: int, s1: int, c2: int, s2: int) -> Nearest:
    """The two nearest of three cells, of which the first may be one of the others."""
    if cell == c1:
        return c1, min(square, s1), c2, s2
    if square < s1:
        return cell, square, c1, s1
    if square < s2:
        return c1, s1, cell, square
    return c1, s1, c2, s2


@compiled
def _nearest_two_in_column(
    instances: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The two nearest cells in the column of every voxel, and their squared distances.

    Both have shape ``(2, y, x)``, the nearest first. No other cell of this column can be one of
    the two nearest of any voxel in this row: both of these would be nearer.
    """
    height, width = instances.shape
    cells = np.zeros((2, height, width), np.int64)
    squares = np.full((2, height, width), FAR, np.int64)
    seen = np.zeros((2, width), np.int64)  # the last two cells that the sweep met ...
    rows = np.zeros((2, width), np.int64)  # ... and where it met them last
    for step in range(2 * height):
        row = step if step < height else 2 * height - 1 - step
        if step == height:
            seen[:] = 0
        for x in range(width):
            cell = instances[row, x]
            if cell != 0:
                if cell != seen[0, x]:
                    seen[1, x], rows[1, x] = seen[0, x], rows[0, x]
                    seen[0, x] = cell
                rows[0, x] = row
            c1, s1, c2, s2 = cells[0, row, x], squares[0, row, x], cells[1, row, x], squares[1, row, x]
            for k in range(2):
                if seen[k, x] != 0:
                    c1, s1, c2, s2 = _closer(seen[k, x], (row - rows[k, x]) ** 2, c1, s1, c2, s2)
            cells[0, row, x], squares[0, row, x], cells[1, row, x], squares[1, row, x] = c1, s1, c2, s2
    return cells, squares


@compiled
def _border_term(
    cells: NDArray[np.int64], squares: NDArray[np.int64], reach: float, w0: float, sigma: float
) -> NDArray[np.float32]:
    """The border term from the two nearest cells per column; 0 where d1 + d2 > `reach`."""
    _, height, width = cells.shape
    term = np.zeros((height, width), np.float32)
    for y in range(height):
        for x in range(width):
            c1, s1, c2, s2 = cells[0, y, x], squares[0, y, x], cells[1, y, x], squares[1, y, x]
            away = 1
            # A column `away` from here can matter only while it is nearer than d2 and while
            # the least possible d1 + d2 with a cell in it, min(d1, away) + away, is in reach.
            while away * away < s2 and min(math.sqrt(s1), away) + away <= reach:
                for column in (x - away, x + away):
                    if 0 <= column < width:
                        for k in range(2):
                            square = squares[k, y, column]
                            if square < s2:
                                c1, s1, c2, s2 = _closer(
                                    cells[k, y, column], square + away * away, c1, s1, c2, s2
                                )
                away += 1
            total = math.sqrt(s1) + math.sqrt(s2)
            if total <= reach:
                term[y, x] = w0 * math.exp(-(total**2) / (2 * sigma**2))
    return term
