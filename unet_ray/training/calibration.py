"""The threshold of the class map, chosen on slices with labels.

Knows predicted probabilities and the truth of the same voxels. Does not know networks, or when a
model is calibrated.

The weights of the loss shift probabilities: they let a rare class and the borders between objects
count more than their share of the voxels. So the likelier class is often the wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.scores.totals import instance_scores
from unet_ray.training.data import HeldOut
from unet_ray.training.truths import IGNORED

# Candidates for objects, as multiples of 1 / 255.
OBJECT_CUTS = tuple(range(25, 255, 25))


def best_threshold(
    predictions: Sequence[NDArray[np.uint8]], held_out: Sequence[HeldOut]
) -> float | None:
    """Returns the probability above which a voxel should be of class 1.

    It is the threshold with the fewest wrong voxels. For labels of objects it is the one with the
    best SEG, since a bridge of a few voxels merges two objects.

    Args:
        predictions: of each volume, 255 p of the classes above 0, (classes - 1, z, y, x).
        held_out: truth of the same voxels.

    Returns:
        A value between two stored probabilities, from 0 to 1; None for more than two classes.
    """
    if any(len(prediction) > 1 for prediction in predictions):
        return None
    stored = [prediction[0] for prediction in predictions]
    if held_out[0].cells is None:
        return between(_fewest_errors(stored, [each.targets for each in held_out]))
    return between(_best_cut(stored, held_out))


def between(level: int) -> float:
    """Returns a threshold that separates the stored probabilities up to `level` from the others."""
    return (level + 0.5) / 255


def _fewest_errors(stored: Sequence[NDArray[np.uint8]], truths: Sequence[NDArray[np.uint8]]) -> int:
    """Returns the highest stored probability of class 0 with the fewest wrong voxels.

    It is the one below 1/2 if only one class occurs.
    """
    counts = np.zeros((2, 256), np.int64)  # voxels of each class with each stored probability
    for probabilities, truth in zip(stored, truths, strict=True):
        for number in range(2):
            counts[number] += np.bincount(probabilities[truth == number], minlength=256)
    if not counts.sum(1).all():  # a class that does not occur says nothing about the other
        return 127
    above = counts[1].sum() - counts[1].cumsum()
    right = (counts[0].cumsum() + above)[:-1]
    best = np.flatnonzero(right == right.max())
    return int(best[len(best) // 2])


def _best_cut(stored: Sequence[NDArray[np.uint8]], held_out: Sequence[HeldOut]) -> int:
    """Returns the candidate with the best SEG, of several the one next to 1/2."""
    scores = {cut: _seg_at(stored, held_out, cut) for cut in OBJECT_CUTS}
    return max(OBJECT_CUTS, key=lambda cut: (scores[cut], -abs(cut - 127)))


def _seg_at(stored: Sequence[NDArray[np.uint8]], held_out: Sequence[HeldOut], cut: int) -> float:
    """Returns SEG of the objects of voxels with a stored probability above `cut`."""
    proposals = [
        numbered((array > cut) & (each.targets != IGNORED))
        for array, each in zip(stored, held_out, strict=True)
    ]
    cells = stacked([each.cells for each in held_out if each.cells is not None])
    return instance_scores(stacked(proposals), cells, True, ("seg",))["seg"].value


def numbered(foreground: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Numbers the 4-connected components of the foreground in each slice, (z, y, x)."""
    return np.stack([ndimage.label(plane)[0] for plane in foreground]).astype(np.int64)


def stacked(stacks: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Concatenates stacks along z, padding smaller slices with 0 at the end of y and x."""
    height, width = (max(s.shape[axis] for s in stacks) for axis in (1, 2))
    return np.concatenate(
        [np.pad(s, ((0, 0), (0, height - s.shape[1]), (0, width - s.shape[2]))) for s in stacks]
    )
