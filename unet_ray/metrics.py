"""Scores of a segmentation against the truth; knows arrays, not files.

Every score is computed from the confusion of classes, in exact integers before the last division.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def confusion(
    prediction: NDArray[np.integer[Any]], truth: NDArray[np.integer[Any]], classes: int
) -> NDArray[np.int64]:
    """Counts of voxels by true class (rows) and predicted class (columns): (classes, classes).

    Args:
        prediction: class numbers, any shape.
        truth: class numbers, the same shape.
        classes: how many there are.

    Raises:
        ValueError: if the shapes differ or a number is not below `classes`.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"Shapes differ: {prediction.shape} and {truth.shape}.")
    if max(prediction.max(initial=0), truth.max(initial=0)) >= classes:
        raise ValueError(f"A class number is not below {classes}.")
    pairs = truth.ravel().astype(np.int64) * classes + prediction.ravel()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def accuracy(counts: NDArray[np.int64]) -> float:
    """Part of the voxels whose class is right. A frequent class can hide a rare one.

    Formula: trace(counts) / sum(counts), with `counts` from `confusion`.
    """
    return float(np.trace(counts) / counts.sum())


def iou(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union of each class (Jaccard index). It does not see where errors lie.

    Formula: TP / (TP + FP + FN), with `counts` from `confusion`; NaN for a class that neither
    side has.
    """
    right = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - right
    return _quotient(right, union)


def dice(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Dice coefficient (F1) of each class: twice the intersection over the sum of both sizes.

    Formula: 2 TP / (2 TP + FP + FN), with `counts` from `confusion`; NaN for a class that neither
    side has.
    """
    both = counts.sum(0) + counts.sum(1)
    return _quotient(2 * np.diag(counts), both)


def _quotient(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    result = np.full(len(whole), np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result
