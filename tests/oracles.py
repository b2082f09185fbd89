"""Slow reference versions of the scores, written from their definitions, not from our code.

Knows small arrays and Python loops. Does not know how the package computes anything.
"""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
from scipy import ndimage

# Matches


def ious(truth, prediction):
    """Intersection over union of each true and each predicted object, 0 excluded."""
    rows = [truth == t for t in np.unique(truth[truth != 0])]
    columns = [prediction == p for p in np.unique(prediction[prediction != 0])]
    values = [[(a & b).sum() / (a | b).sum() for b in columns] for a in rows]
    return np.array(values).reshape(len(rows), len(columns))


LINE, MASK, INQUEUE = 0, "mask", "in queue"


ORDER = ((-1, 0), (0, -1), (1, 0), (0, 1))  # neighbours as steps along (x, y)


def slow_thin(cells):
    """Floods a slice of two levels as Vincent and Soille (1991) do, rule by rule."""
    height, width = cells.shape
    numbers = ndimage.label(cells)[0]
    label = {(x, y): int(numbers[y, x]) or None for y in range(height) for x in range(width)}
    waiting = deque()
    for x in range(width):
        for y in range(height):
            if label[x, y] is None:
                label[x, y] = MASK
                around = [label.get((x + i, y + j)) for i, j in ORDER]
                if any(isinstance(n, int) for n in around):
                    label[x, y] = INQUEUE
                    waiting.append((x, y))
    flag = False
    while waiting:
        x, y = p = waiting.popleft()
        for i, j in ORDER:
            q = x + i, y + j
            neighbour = label.get(q)
            if neighbour == MASK:
                label[q] = INQUEUE
                waiting.append(q)
            elif neighbour == LINE and isinstance(neighbour, int):
                if label[p] == INQUEUE:
                    label[p], flag = LINE, True
            elif isinstance(neighbour, int):
                if label[p] == INQUEUE or (label[p] == LINE and flag):
                    label[p] = neighbour
                elif label[p] != LINE and label[p] != neighbour:
                    label[p], flag = LINE, False
    if MASK in label.values():  # without any cell, the slice is one basin
        return np.ones(cells.shape, int)
    return np.array([[label[x, y] for x in range(width)] for y in range(height)])


FOUR = ((-1, 0), (0, -1), (0, 1), (1, 0))


EIGHT = tuple(step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0))


def pieces(places, steps):
    """Returns the connected components of a set of positions, each as a set."""
    places, components = set(places), []
    while places:
        piece, edge = set(), {min(places)}
        while edge:
            piece |= edge
            edge = {(a + i, b + j) for a, b in edge for i, j in steps} & places - piece
        places -= piece
        components.append(piece)
    return components


def is_simple(cell):
    """Returns whether a pixel is simple: flipping it neither splits nor merges components.

    Its topological numbers T4 and T8 (Bertrand and Malandain) are both 1. So its 8 neighbours
    contain one cell component beside the pixel, and one membrane component.
    """
    around = {step for step in EIGHT if cell[step]}
    beside = [piece for piece in pieces(around, FOUR) if piece & set(FOUR)]
    return len(beside) == 1 and len(pieces(set(EIGHT) - around, EIGHT)) == 1


def slow_warp(truth, proposal, threshold):
    """Uses sets instead of arrays, and recomputes the list of mismatches in every round."""
    height, width = truth.shape
    cells = {(y, x) for y, x in np.argwhere(truth).tolist()}
    target = {(y, x) for y, x in np.argwhere(proposal > threshold).tolist()}
    places = [(y, x) for x in range(width) for y in range(height)]
    before = None
    while True:
        mismatches = [p for p in places if (p in cells) != (p in target)]
        mismatches.sort(key=lambda p: -np.float32(abs(float(proposal[p]) - threshold)))
        if not mismatches or len(mismatches) == before:
            return cells, mismatches
        before = len(mismatches)
        for y, x in mismatches:
            if is_simple({(i, j): (y + i, x + j) in cells for i, j in EIGHT}):
                cells ^= {(y, x)}


def slow_classify(cells, mismatches, shape, radius):
    """Counts splits, mergers and other mismatches, from the labels around each mismatch."""
    height, width = shape
    label = {p: n for n, piece in enumerate(pieces(cells, FOUR), start=1) for p in piece}
    image = set(itertools.product(range(height), range(width)))
    whole = radius > height or radius > width
    kinds = {"split": 0, "merger": 0, "other": 0}
    for y, x in mismatches:
        around = {(y + i, x + j) for i, j in EIGHT} & image
        labels = {label.get(p, 0) for p in around}
        kind = "other"
        if len(labels) > 2:
            kind = "split" if (y, x) in cells else "merger"
        elif len(labels) == 2 and (y, x) in cells:
            window = {p for p in cells if whole or max(abs(p[0] - y), abs(p[1] - x)) <= radius}
            left = pieces(window - {(y, x)}, FOUR)
            # one label for each neighbouring piece, and one for the membrane
            if sum(bool(piece & around) for piece in left) + 1 > 2:
                kind = "split"
        kinds[kind] += 1
    return tuple(kinds.values())


# Hand-made cases; c is cell, . is membrane


def image(*rows):
    return np.array([[letter == "c" for letter in row] for row in rows])
