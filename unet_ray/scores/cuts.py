"""One predicted slice at one threshold, compared with its truth.

Handles the counts of one slice that the ISBI 2012 scores need; results shared by several scores
are computed once. Independent of how the counts of many slices become a score.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.scores.overlaps import Overlaps
from unet_ray.scores.thinning import thin
from unet_ray.scores.warping import Mismatches, classify, warp


class Slice:
    """A slice of a prediction (proposal) and of its truth.

    Args:
        proposal: probability of cell, 0 to 1, (y, x).
        truth: (y, x), True is cell.
    """

    def __init__(self, proposal: NDArray[np.float64], truth: NDArray[np.bool_]) -> None:
        self.proposal, self.truth = proposal, truth

    @cached_property
    def segments(self) -> NDArray[np.int32]:
        """4-connected cells of the truth, numbered from 1; 0 is membrane."""
        return _segments(self.truth)


class Cut:
    """A slice at one threshold; pixels above it are cell."""

    def __init__(self, plane: Slice, threshold: float) -> None:
        self._plane, self._threshold = plane, threshold
        self._cells = plane.proposal > threshold

    @property
    def size(self) -> int:
        """Number of pixels in the slice."""
        return self._cells.size

    def pixels(self) -> tuple[int, int, int]:
        """True positive, false positive and false negative cell pixels: (tp, fp, fn)."""
        truth = self._plane.truth
        tp = int(np.count_nonzero(self._cells & truth))
        return tp, int(self._cells.sum()) - tp, int(truth.sum()) - tp

    @cached_property
    def overlaps(self) -> Overlaps:
        """Overlaps of true cells and 4-connected predicted cells; 0 is membrane in both."""
        return Overlaps.of(self._plane.segments, _segments(self._cells))

    @cached_property
    def thinned(self) -> Overlaps:
        """Overlaps of true cells and predicted segments, after thinning the membranes."""
        return Overlaps.of(self._plane.segments, thin(self._cells))

    @cached_property
    def mismatches(self) -> Mismatches:
        """Topological errors of the prediction."""
        plane = self._plane
        return classify(*warp(plane.truth, plane.proposal, self._threshold))


def _segments(cells: NDArray[np.bool_]) -> NDArray[np.int32]:
    return ndimage.label(cells)[0].astype(np.int32)
