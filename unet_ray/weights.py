"""The weight of every voxel in the training loss: Ronneberger, Fischer, Brox 2015, eq. 2.

    w(x) = w_c(x) + w0 * exp(-(d1(x) + d2(x))^2 / (2 sigma^2))

Knows class numbers and distances between cells within one slice; does not know where labels come
from, how a patch is cut or what the loss does with the weights.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.compiled import compiled
from unet_ray.errors import InputError

NEGLIGIBLE = 1e-8  # a border term below this is set to 0: it is lost in float32 beside w_c anyway
FAR = 1 << 62  # squared distance to a cell that is not there


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
    return _border_term(_nearest_in_column(instances), reach, float(w0), float(sigma))


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


def _nearest_in_column(instances: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The two nearest cells of every voxel within its column, as `_offer` enters them.

    Shape ``(y, x, 4)``. They suffice: any other cell of the column has two nearer ones in that
    same column, as seen from every voxel of the row.
    """
    near = np.zeros((*instances.shape, 4), np.int64)
    near[:, :, 1::2] = FAR
    numbers = np.ascontiguousarray(instances, dtype=np.int64)
    down = np.arange(len(numbers))
    _sweep(numbers, down, near)
    _sweep(numbers, down[::-1].copy(), near)
    return near


@compiled
def _offer(best: NDArray[np.int64], cell: int, square: int) -> None:
    """Enters a cell at a squared distance into `best`: cell, square, next cell, its square."""
    if cell == best[0]:
        best[1] = min(best[1], square)
    elif square < best[1]:
        best[2], best[3] = best[0], best[1]
        best[0], best[1] = cell, square
    elif square < best[3]:
        best[2], best[3] = cell, square


@compiled
def _sweep(instances: NDArray[np.int64], order: NDArray[np.int64], near: NDArray[np.int64]) -> None:
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
            for k in range(2):
                if met[k, x] != 0:
                    _offer(near[y, x], met[k, x], (y - where[k, x]) ** 2)


@compiled
def _search_row(
    near: NDArray[np.int64], y: int, x: int, reach: float, best: NDArray[np.int64]
) -> None:
    """Fills `best` with the two nearest cells of a voxel, if their d1 + d2 is within `reach`."""
    width = near.shape[1]
    for k in range(4):
        best[k] = near[y, x, k]
    for away in range(1, width):
        # A column `away` from here matters only while it is nearer than d2 and while the least
        # possible d1 + d2 with a cell in it, min(d1, away) + away, is in reach.
        if away**2 >= best[3] or min(math.sqrt(best[1]), away) + away > reach:
            return
        for column in (x - away, x + away):
            if 0 <= column < width:
                for k in (0, 2):
                    _offer(best, near[y, column, k], near[y, column, k + 1] + away**2)


@compiled
def _border_term(
    near: NDArray[np.int64], reach: float, w0: float, sigma: float
) -> NDArray[np.float32]:
    """The border term from the two nearest cells per column; 0 where d1 + d2 > `reach`."""
    height, width, _ = near.shape
    term = np.zeros((height, width), np.float32)
    best = np.empty(4, np.int64)
    for y in range(height):
        for x in range(width):
            _search_row(near, y, x, reach, best)
            total = math.sqrt(best[1]) + math.sqrt(best[3])
            if best[3] < FAR and total <= reach:
                term[y, x] = w0 * math.exp(-(total**2) / (2 * sigma**2))
    return term
