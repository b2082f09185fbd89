"""The warping error of Jain et al. 2010 on one slice: what is left after all harmless changes.

The truth is flipped, pixel by pixel, towards the proposal wherever the flip changes no topology.
What cannot be flipped is a split, a merger, or a hole or an object too many or too few. Knows two
binary slices and a threshold; does not know stacks, files or what the score of a stack is.

The order of flips and the rules are those of Fiji's Trainable_Segmentation, `WarpingError`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.compiled import compiled

RADIUS = 20
"""A split is looked for in a window of this radius, as the challenge did; in voxels."""

# The 8 neighbours (y, x) as a ring: two that follow each other are 4-neighbours of each other.
RING = np.array([(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)])


class Mismatches(NamedTuple):
    """Pixels of a slice that no harmless flip could bring to agree with the proposal.

    Attributes:
        splits: cell pixels whose loss tears a cell apart.
        mergers: membrane pixels whose loss joins two cells.
        others: holes and objects that appear or vanish.
    """

    splits: int
    mergers: int
    others: int


def warp(
    truth: NDArray[np.bool_], proposal: NDArray[np.float64], threshold: float
) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Flips simple points of the truth until it is as like the proposal as topology allows.

    Mismatches are visited from the surest to the least sure, |proposal - threshold| in float32,
    ties by x, then y; again and again, until a round flips none.

    Args:
        truth: (y, x), True is cell.
        proposal: (y, x), 0 to 1, 1 is certainly cell.
        threshold: above it the proposal says cell.

    Returns:
        The warped truth, (y, x), and the mismatches left, (n, 2) as (y, x), in order of visit.
    """
    source = np.pad(truth, 1).astype(np.uint8)
    wrong = truth != (proposal > threshold)
    x, y = np.nonzero(wrong.T)
    doubt = np.abs(proposal[y, x] - threshold).astype(np.float32)
    order = np.argsort(-doubt, kind="stable")
    queue = np.stack([y[order] + 1, x[order] + 1], axis=1)
    left = _flip_simple(source, queue, SIMPLE, RING)
    return source[1:-1, 1:-1].astype(bool), queue[:left] - 1


def classify(
    warped: NDArray[np.bool_], mismatches: NDArray[np.intp], radius: int = RADIUS
) -> Mismatches:
    """Sorts what `warp` left over into splits, mergers and the rest.

    Args:
        warped: (y, x), True is cell.
        mismatches: (n, 2) as (y, x).
        radius: of the window in which a split is looked for; larger than the slice: all of it.
    """
    labels = ndimage.label(warped)[0].astype(np.int32)
    if radius > min(warped.shape):
        radius = max(warped.shape)
    seen = np.zeros(labels.shape, np.int32)
    splits, mergers = _count(labels, seen, mismatches, radius, RING)
    return Mismatches(splits, mergers, len(mismatches) - splits - mergers)


def _simple_points() -> NDArray[np.bool_]:
    """For each of the 256 neighbourhoods (bit k is place k of `RING`): is its middle simple?

    It is if exactly one 4-connected piece of cell touches it by a side and not all is cell
    (topological numbers 1 and 1, Bertrand and Malandain 1994); adding and removing are alike.
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
    source: NDArray[np.uint8],
    queue: NDArray[np.intp],
    simple: NDArray[np.bool_],
    ring: NDArray[np.int64],
) -> int:
    """Flips what is simple, in the queue's order; moves the rest to its front, returns how many."""
    left, before = len(queue), -1
    while left != before:
        before, left = left, 0
        for i in range(before):
            y, x = queue[i, 0], queue[i, 1]
            code = 0
            for k in range(8):
                code |= source[y + ring[k, 0], x + ring[k, 1]] << k
            if simple[code]:
                source[y, x] = 1 - source[y, x]
            else:
                queue[left, 0], queue[left, 1] = y, x
                left += 1
    return left


@compiled
def _count(
    labels: NDArray[np.int32],
    seen: NDArray[np.int32],
    mismatches: NDArray[np.intp],
    radius: int,
    ring: NDArray[np.int64],
) -> tuple[int, int]:
    """Counts (splits, mergers); `seen` is scratch of the labels' shape, all 0."""
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
                known = False
                for j in range(kinds):
                    known = known or around[j] == labels[v, u]
                if not known:
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
    """Whether cell pixels around (y, x) lose touch, within the window, once it is membrane.

    Floods from one of them, nearest pixels first, until all the others are reached.
    """
    height, width = labels.shape
    top, bottom = max(0, y - radius), min(height, y + radius + 1)
    left, right = max(0, x - radius), min(width, x + radius + 1)
    seen[y, x] = mark
    first = last = wanted = 0
    for k in range(8):
        v, u = y + ring[k, 0], x + ring[k, 1]
        if top <= v < bottom and left <= u < right and labels[v, u] != 0:
            wanted += 1
            queue[0] = v, u
            last = 1
    if last == 1:
        seen[queue[0, 0], queue[0, 1]] = mark
    while first < last:
        b, a = queue[first]
        first += 1
        wanted -= max(abs(b - y), abs(a - x)) == 1
        if wanted == 0:
            return False
        for side in range(0, 8, 2):
            d, c = b + ring[side, 0], a + ring[side, 1]
            inside = top <= d < bottom and left <= c < right
            if inside and labels[d, c] != 0 and seen[d, c] != mark:
                seen[d, c] = mark
                queue[last] = d, c
                last += 1
    return wanted > 0
