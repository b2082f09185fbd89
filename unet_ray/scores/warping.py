"""Topological errors of one slice, for the warping error of Jain et al. 2010.

Pixels of the truth are flipped towards the prediction (the proposal) wherever the flip keeps the
topology. Each remaining mismatch is a split, a merger, or an extra or missing hole or object.
Handles one slice at one threshold. Independent of stacks, files and the score of a stack.

The rules and the order of the flips equal those of Fiji's Trainable_Segmentation, `WarpingError`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.compiled import compiled

RADIUS = 20
"""Radius in pixels of the window in which a split is detected; the challenge used 20."""

# Steps (y, x) to the 8 neighbours as a ring: consecutive ones are 4-neighbours of each other.
RING = np.array([(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)])


class Mismatches(NamedTuple):
    """Counts of mismatched pixels that cannot be flipped without changing the topology.

    Attributes:
        splits: cell pixels whose removal splits a cell.
        mergers: membrane pixels whose removal merges two cells.
        others: pixels of holes and objects that appear or vanish.
    """

    splits: int
    mergers: int
    others: int


def warp(
    truth: NDArray[np.bool_], proposal: NDArray[np.float64], threshold: float
) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Flips simple points of the truth until it matches the proposal as far as topology allows.

    Mismatches are visited in order of decreasing confidence, |proposal - threshold| in float32,
    ties by x, then y. The rounds repeat until one flips nothing.

    Args:
        truth: (y, x), True is cell.
        proposal: probability of cell, 0 to 1, (y, x).
        threshold: pixels above it are cell.

    Returns:
        The warped truth (y, x), and the remaining mismatches as (y, x) in order of visit, (n, 2).
    """
    warped = np.pad(truth, 1).astype(np.uint8)
    wrong = truth != (proposal > threshold)
    x, y = np.nonzero(wrong.T)
    confidence = np.abs(proposal[y, x] - threshold).astype(np.float32)
    order = np.argsort(-confidence, kind="stable")
    queue = np.stack([y[order] + 1, x[order] + 1], axis=1)
    remaining = _flip_simple(warped, queue, SIMPLE, RING)
    return warped[1:-1, 1:-1].astype(bool), queue[:remaining] - 1


def classify(
    warped: NDArray[np.bool_], mismatches: NDArray[np.intp], radius: int = RADIUS
) -> Mismatches:
    """Counts the splits, mergers and other errors among the mismatches that `warp` returns.

    Args:
        warped: (y, x), True is cell.
        mismatches: pixels as (y, x), (n, 2).
        radius: of the window in which a split is detected, in pixels. If it exceeds the shorter
            side of the slice, the window is the whole slice, as in Fiji.
    """
    labels = ndimage.label(warped)[0].astype(np.int32)
    if radius > min(warped.shape):
        radius = max(warped.shape)
    seen = np.zeros(labels.shape, np.int32)
    splits, mergers = _count(labels, seen, mismatches, radius, RING)
    return Mismatches(splits, mergers, len(mismatches) - splits - mergers)


def _simple_points() -> NDArray[np.bool_]:
    """Whether the central pixel is simple, for each of the 256 neighbourhoods.

    Bit k of the index is neighbour k of `RING`. The pixel is simple if exactly one 4-connected
    piece of cell shares a side with it and not all neighbours are cell (topological numbers 1
    and 1, Bertrand and Malandain 1994). The rule is the same for adding and for removing a pixel.
    """
    simple = np.zeros(256, bool)
    for code in range(255):
        cell = [bool(code >> k & 1) for k in range(8)]
        touching = set()
        for side in (0, 2, 4, 6):
            if cell[side]:
                first = side
                while cell[first - 1]:
                    first = (first - 1) % 8
                touching.add(first)
        simple[code] = len(touching) == 1
    return simple


SIMPLE = _simple_points()


@compiled
def _flip_simple(
    warped: NDArray[np.uint8],
    queue: NDArray[np.intp],
    simple: NDArray[np.bool_],
    ring: NDArray[np.int64],
) -> int:
    """Flips simple pixels in queue order; moves the others to the front, returns their number."""
    remaining, before = len(queue), -1
    while remaining != before:
        before, remaining = remaining, 0
        for i in range(before):
            y, x = queue[i, 0], queue[i, 1]
            code = 0
            for k in range(8):
                code |= warped[y + ring[k, 0], x + ring[k, 1]] << k
            if simple[code]:
                warped[y, x] = 1 - warped[y, x]
            else:
                queue[remaining, 0], queue[remaining, 1] = y, x
                remaining += 1
    return remaining


@compiled
def _count(
    labels: NDArray[np.int32],
    seen: NDArray[np.int32],
    mismatches: NDArray[np.intp],
    radius: int,
    ring: NDArray[np.int64],
) -> tuple[int, int]:
    """Returns (splits, mergers); `seen` is scratch memory of the labels' shape, all 0."""
    height, width = labels.shape
    splits = mergers = 0
    around = np.empty(8, np.int32)
    queue = np.empty((labels.size, 2), np.int64)
    for i in range(len(mismatches)):
        y, x = mismatches[i, 0], mismatches[i, 1]
        kinds = 0
        for k in range(8):
            v, u = y + ring[k, 0], x + ring[k, 1]
            if 0 <= v < height and 0 <= u < width:
                listed = False
                for j in range(kinds):
                    listed = listed or around[j] == labels[v, u]
                if not listed:
                    around[kinds] = labels[v, u]
                    kinds += 1
        if labels[y, x] == 0:
            mergers += kinds > 2
        elif kinds > 2 or (kinds == 2 and _tears(labels, seen, queue, i + 1, y, x, radius, ring)):
            splits += 1
    return splits, mergers


@compiled
def _tears(
    labels: NDArray[np.int32],
    seen: NDArray[np.int32],
    queue: NDArray[np.int64],
    mark: int,
    y: int,
    x: int,
    radius: int,
    ring: NDArray[np.int64],
) -> bool:
    """Whether turning (y, x) into membrane disconnects its cell neighbours within the window.

    Floods from one neighbour, nearest pixels first, until all others are reached.
    """
    height, width = labels.shape
    top, bottom = max(0, y - radius), min(height, y + radius + 1)
    left, right = max(0, x - radius), min(width, x + radius + 1)
    seen[y, x] = mark
    first = last = unreached = 0
    for k in range(8):
        v, u = y + ring[k, 0], x + ring[k, 1]
        if top <= v < bottom and left <= u < right and labels[v, u] != 0:
            unreached += 1
            queue[0] = v, u
            last = 1
    if last == 1:
        seen[queue[0, 0], queue[0, 1]] = mark
    while first < last:
        b, a = queue[first]
        first += 1
        unreached -= max(abs(b - y), abs(a - x)) == 1
        if unreached == 0:
            return False
        for side in range(0, 8, 2):
            d, c = b + ring[side, 0], a + ring[side, 1]
            inside = top <= d < bottom and left <= c < right
            if inside and labels[d, c] != 0 and seen[d, c] != mark:
                seen[d, c] = mark
                queue[last] = d, c
                last += 1
    return unreached > 0
