"""Contingency tables of true and predicted labels, from which most scores are computed.

Handles voxel counts, pair counts, entropies and the matching of objects. Independent of files and
of the scores themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXACT_IN_INT64 = 3_000_000_000  # below this many voxels a sum of squares stays below 2^63


@dataclass(frozen=True, eq=False)
class Overlaps:
    """The contingency table of two labellings: one row per pair of labels that share voxels.

    Attributes:
        truth: the true label of each row, an integer type.
        prediction: the predicted label of each row, likewise.
        voxels: number of shared voxels of each row, int64, above 0.
    """

    truth: NDArray[Any]
    prediction: NDArray[Any]
    voxels: NDArray[np.int64]

    @classmethod
    def of(cls, truth: NDArray[Any], prediction: NDArray[Any]) -> Overlaps:
        """Counts the label pairs of two integer arrays of equal shape."""
        t, p = truth.ravel(), prediction.ravel()
        # Labels form runs of voxels: counting runs first leaves about a tenth of them to sort.
        breaks = np.flatnonzero((t[1:] != t[:-1]) | (p[1:] != p[:-1])) + 1
        starts = np.concatenate([np.zeros(min(1, t.size), np.int64), breaks])
        lengths = np.diff(starts, append=t.size)
        return cls(t[starts], p[starts], lengths)._gathered()

    @classmethod
    def joined(cls, tables: Iterable[Overlaps]) -> Overlaps:
        """Sums the tables of the pieces of an image."""
        parts = list(tables)
        return cls(
            np.concatenate([part.truth for part in parts]),
            np.concatenate([part.prediction for part in parts]),
            np.concatenate([part.voxels for part in parts]),
        )._gathered()

    def _gathered(self) -> Overlaps:
        """Merges rows of the same pair of labels."""
        truths, t = np.unique(self.truth, return_inverse=True)
        predictions, p = np.unique(self.prediction, return_inverse=True)
        pairs, row = np.unique(t * len(predictions) + p, return_inverse=True)
        voxels = np.zeros(len(pairs), np.int64)
        np.add.at(voxels, row, self.voxels)
        width = max(1, len(predictions))
        return Overlaps(truths[pairs // width], predictions[pairs % width], voxels)

    def where(self, rows: NDArray[np.bool_]) -> Overlaps:
        """The rows for which `rows` is true."""
        return Overlaps(self.truth[rows], self.prediction[rows], self.voxels[rows])

    @property
    def total(self) -> int:
        """Number of voxels in the table."""
        return int(self.voxels.sum())

    def truth_sizes(self) -> NDArray[np.int64]:
        """Size in voxels of the true segment of each row."""
        return _sums(self.truth, self.voxels)

    def prediction_sizes(self) -> NDArray[np.int64]:
        """Size in voxels of the predicted segment of each row."""
        return _sums(self.prediction, self.voxels)


def sizes(labels: NDArray[Any], voxels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Total voxels of each distinct label, in ascending order of the labels."""
    _, index = np.unique(labels, return_inverse=True)
    totals = np.zeros(index.max(initial=-1) + 1, np.int64)
    np.add.at(totals, index, voxels)
    return totals


def _sums(labels: NDArray[Any], voxels: NDArray[np.int64]) -> NDArray[np.int64]:
    _, index = np.unique(labels, return_inverse=True)
    return sizes(labels, voxels)[index]


def sum_of_squares(voxels: NDArray[np.int64]) -> int:
    """The sum of n * n over all counts n, exact even beyond 2^63."""
    if voxels.sum() < EXACT_IN_INT64:
        return int(np.dot(voxels, voxels))
    return sum(n * n for n in voxels.tolist())


def pair_counts(table: Overlaps) -> tuple[int, int, int]:
    """Pairs of different voxels in the same segment of (both, the truth, the prediction).

    A segment of n voxels has n(n - 1) / 2 pairs. Every label counts as a segment, including 0.
    """
    parts = (table.voxels, sizes(table.truth, table.voxels), sizes(table.prediction, table.voxels))
    both, truth, prediction = ((sum_of_squares(n) - table.total) // 2 for n in parts)
    return both, truth, prediction


def foreground_pair_counts(table: Overlaps) -> tuple[int, int, int] | None:
    """As `pair_counts`, but n * n pairs, over the voxels whose truth is not 0.

    Each of these voxels with prediction 0 is its own segment. None if the truth is 0 everywhere.
    """
    table = table.where(table.truth != 0)
    if not table.total:
        return None
    inside = table.where(table.prediction != 0)
    singles = table.total - inside.total
    return (
        sum_of_squares(inside.voxels) + singles,
        sum_of_squares(sizes(table.truth, table.voxels)),
        sum_of_squares(sizes(inside.prediction, inside.voxels)) + singles,
    )


def foreground_information(table: Overlaps) -> tuple[float, float, float] | None:
    """Entropies in nats over the voxels whose truth is not 0: (truth, prediction, joint).

    Each of these voxels with prediction 0 is its own segment. None if the truth is 0 everywhere.
    """
    table = table.where(table.truth != 0)
    if not table.total:
        return None
    n = table.total
    inside = table.where(table.prediction != 0)
    singles = (n - inside.total) / n * math.log(n)
    return (
        _entropy(sizes(table.truth, table.voxels), n),
        _entropy(sizes(inside.prediction, inside.voxels), n) + singles,
        _entropy(inside.voxels, n) + singles,
    )


def conditional_entropies(table: Overlaps) -> tuple[float, float]:
    """H(prediction | truth) and H(truth | prediction) in bits; label 0 is a segment too."""
    n = table.total
    joint = _entropy(table.voxels, n)
    split = joint - _entropy(sizes(table.truth, table.voxels), n)
    merge = joint - _entropy(sizes(table.prediction, table.voxels), n)
    return max(0.0, split) / math.log(2), max(0.0, merge) / math.log(2)


def _entropy(voxels: NDArray[np.int64], total: int) -> float:
    shares = voxels / max(1, total)
    return float(-(shares * np.log(shares)).sum())


@dataclass(frozen=True, eq=False)
class Matches:
    """Overlapping pairs of a true and a predicted object.

    Attributes:
        truth, prediction: labels of each pair, never 0.
        shared: voxels in both objects of each pair.
        union: voxels in either object of each pair.
        size: voxels of the true object of each pair.
        truths, predictions: number of objects in the truth and in the prediction.
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
        """The objects of a table; label 0 is background in truth and prediction."""
        size, predicted_size = table.truth_sizes(), table.prediction_sizes()
        overlap = (table.truth != 0) & (table.prediction != 0)
        shared = table.voxels[overlap]
        return cls(
            table.truth[overlap],
            table.prediction[overlap],
            shared,
            size[overlap] + predicted_size[overlap] - shared,
            size[overlap],
            len(np.unique(table.truth[table.truth != 0])),
            len(np.unique(table.prediction[table.prediction != 0])),
        )

    def covered(self) -> NDArray[np.float64]:
        """Intersection over union of each pair that shares more than half of the true object."""
        most = 2 * self.shared > self.size
        return self.shared[most] / self.union[most]

    def matched(self, percent: int) -> int:
        """Number of true objects matched one to one with IoU >= percent / 100.

        `percent` is at least 50. An object then has at most one partner, or two halves at
        exactly 50. The first free partner is therefore as good as any.
        """
        close = 100 * self.shared >= percent * self.union
        pairs = zip(self.truth[close].tolist(), self.prediction[close].tolist(), strict=True)
        used: tuple[set[int], set[int]] = set(), set()
        count = 0
        for truth, prediction in pairs:
            if truth not in used[0] and prediction not in used[1]:
                used[0].add(truth)
                used[1].add(prediction)
                count += 1
        return count
