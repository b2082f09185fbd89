"""How many voxels each true segment shares with each predicted one: the table behind most scores.

Knows labels as numbers; does not know which of them is background or what a score makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXACT_IN_INT64 = 3_000_000_000  # a sum of squares over so many voxels stays below 2^63


@dataclass(frozen=True, eq=False)
class Overlaps:
    """The contingency table of two labellings; pairs that share no voxel are left out.

    Attributes:
        truth: label of the truth, of each pair of labels that meet, int64 or uint64.
        prediction: label of the prediction, likewise.
        voxels: how many voxels the two share, int64, above 0.
    """

    truth: NDArray[Any]
    prediction: NDArray[Any]
    voxels: NDArray[np.int64]

    @classmethod
    def of(cls, truth: NDArray[Any], prediction: NDArray[Any]) -> Overlaps:
        """The table of two arrays of integers of one shape."""
        t, p = truth.ravel(), prediction.ravel()
        # Labels come in runs: comparing neighbours first leaves a tenth of the voxels to sort.
        breaks = np.flatnonzero((t[1:] != t[:-1]) | (p[1:] != p[:-1])) + 1
        starts = np.concatenate([np.zeros(min(1, t.size), np.int64), breaks])
        lengths = np.diff(starts, append=t.size)
        return cls(t[starts], p[starts], lengths)._gathered()

    @classmethod
    def joined(cls, tables: Iterable[Overlaps]) -> Overlaps:
        """The table of a whole from the tables of its pieces."""
        parts = list(tables)
        return cls(
            np.concatenate([part.truth for part in parts]),
            np.concatenate([part.prediction for part in parts]),
            np.concatenate([part.voxels for part in parts]),
        )._gathered()

    def _gathered(self) -> Overlaps:
        """Each pair once."""
        truths, t = np.unique(self.truth, return_inverse=True)
        predictions, p = np.unique(self.prediction, return_inverse=True)
        pairs, place = np.unique(t * len(predictions) + p, return_inverse=True)
        voxels = np.zeros(len(pairs), np.int64)
        np.add.at(voxels, place, self.voxels)
        width = max(1, len(predictions))
        return Overlaps(truths[pairs // width], predictions[pairs % width], voxels)

    def where(self, kept: NDArray[np.bool_]) -> Overlaps:
        """The table without the pairs for which `kept` is false."""
        return Overlaps(self.truth[kept], self.prediction[kept], self.voxels[kept])

    @property
    def total(self) -> int:
        """All voxels of the table."""
        return int(self.voxels.sum())

    def truth_sizes(self) -> NDArray[np.int64]:
        """Voxels of each true segment, of the pair's row, per pair of the table."""
        return _sums(self.truth, self.voxels)

    def prediction_sizes(self) -> NDArray[np.int64]:
        """Voxels of each predicted segment, of the pair's column, per pair of the table."""
        return _sums(self.prediction, self.voxels)


def sizes(labels: NDArray[Any], voxels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Voxels of each label, in ascending order of the labels."""
    _, place = np.unique(labels, return_inverse=True)
    found = np.zeros(place.max(initial=-1) + 1, np.int64)
    np.add.at(found, place, voxels)
    return found


def _sums(labels: NDArray[Any], voxels: NDArray[np.int64]) -> NDArray[np.int64]:
    _, place = np.unique(labels, return_inverse=True)
    return sizes(labels, voxels)[place]


def sum_of_squares(voxels: NDArray[np.int64]) -> int:
    """The sum of n * n, exact for any number of voxels."""
    if voxels.sum() < EXACT_IN_INT64:
        return int(np.dot(voxels, voxels))
    return sum(n * n for n in voxels.tolist())


def pair_counts(table: Overlaps) -> tuple[int, int, int]:
    """Pairs of different voxels: (together in both, together in truth, together in prediction).

    Without replacement, n(n - 1) / 2 of n voxels; every label counts as a segment.
    """
    parts = (table.voxels, sizes(table.truth, table.voxels), sizes(table.prediction, table.voxels))
    both, truth, prediction = ((sum_of_squares(n) - table.total) // 2 for n in parts)
    return both, truth, prediction


def foreground_pair_counts(table: Overlaps) -> tuple[int, int, int] | None:
    """As `pair_counts`, with replacement (n * n), over the voxels whose truth is not 0.

    A voxel with prediction 0 there is a segment of its own. None if the truth has no foreground.
    """
    table = table.where(table.truth != 0)
    if not table.total:
        return None
    inside = table.where(table.prediction != 0)
    alone = table.total - inside.total
    return (
        sum_of_squares(inside.voxels) + alone,
        sum_of_squares(sizes(table.truth, table.voxels)),
        sum_of_squares(sizes(inside.prediction, inside.voxels)) + alone,
    )


def foreground_information(table: Overlaps) -> tuple[float, float, float] | None:
    """Entropies in nats over the voxels whose truth is not 0: (truth, prediction, both).

    A voxel with prediction 0 there is a segment of its own. None if the truth has no foreground.
    """
    table = table.where(table.truth != 0)
    if not table.total:
        return None
    n = table.total
    inside = table.where(table.prediction != 0)
    alone = (n - inside.total) / n * math.log(n)
    return (
        _entropy(sizes(table.truth, table.voxels), n),
        _entropy(sizes(inside.prediction, inside.voxels), n) + alone,
        _entropy(inside.voxels, n) + alone,
    )


def conditional_entropies(table: Overlaps) -> tuple[float, float]:
    """In bits: (prediction given truth, truth given prediction); every label is a segment."""
    n = table.total
    together = _entropy(table.voxels, n)
    split = together - _entropy(sizes(table.truth, table.voxels), n)
    merge = together - _entropy(sizes(table.prediction, table.voxels), n)
    return max(0.0, split) / math.log(2), max(0.0, merge) / math.log(2)


def _entropy(voxels: NDArray[np.int64], total: int) -> float:
    shares = voxels / max(1, total)
    return float(-(shares * np.log(shares)).sum())


@dataclass(frozen=True, eq=False)
class Matches:
    """Pairs of a true and a predicted object that meet, and what they share.

    Attributes:
        truth, prediction: labels, none of them 0.
        shared: voxels in both.
        union: voxels in either.
        size: voxels of the true object.
        truths, predictions: how many objects there are on each side.
    """

    truth: NDArray[Any]
    prediction: NDArray[Any]
    shared: NDArray[np.int64]
    union: NDArray[np.int64]
    size: NDArray[np.int64]
    truths: int
    predictions: int

    @classmethod
    def of(cls, table: Overlaps) -> Matches:
        """The objects of a table; label 0 is background on both sides."""
        size, other = table.truth_sizes(), table.prediction_sizes()
        met = (table.truth != 0) & (table.prediction != 0)
        shared = table.voxels[met]
        return cls(
            table.truth[met],
            table.prediction[met],
            shared,
            size[met] + other[met] - shared,
            size[met],
            len(np.unique(table.truth[table.truth != 0])),
            len(np.unique(table.prediction[table.prediction != 0])),
        )

    def covered(self) -> NDArray[np.float64]:
        """Intersection over union of each pair that shares more than half of the true object."""
        most = 2 * self.shared > self.size
        return self.shared[most] / self.union[most]

    def found(self, percent: int) -> int:
        """True objects that a predicted one covers with IoU >= percent / 100, one to one.

        From 50 on an object has one partner, or exactly 50 with both halves of it: so the first
        partner that is free will do.
        """
        good = 100 * self.shared >= percent * self.union
        pairs = zip(self.truth[good].tolist(), self.prediction[good].tolist(), strict=True)
        taken: tuple[set[int], set[int]] = set(), set()
        count = 0
        for truth, prediction in pairs:
            if truth not in taken[0] and prediction not in taken[1]:
                taken[0].add(truth)
                taken[1].add(prediction)
                count += 1
        return count
