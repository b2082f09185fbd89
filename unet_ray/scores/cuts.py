"""One slice of a proposal, cut at one threshold and compared with its truth.

Knows what the scores of the ISBI 2012 challenge count in a slice; does not know how counts of
many slices become a score. What two scores need is computed once.
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
    """A slice of a proposal and its truth.

    Args:
        proposal: (y, x), probability of cell.
        truth: (y, x), True is cell.
    """

    def __init__(self, proposal: NDArray[np.float64], truth: NDArray[np.bool_]) -> None:
        self.proposal, self.truth = proposal, truth

    @cached_property
    def segments(self) -> NDArray[np.int32]:
        """The 4-connected cells of the truth, numbered from 1."""
        return _segments(self.truth)


class Cut:
    """A slice whose proposal is cut: above the threshold is cell."""

    def __init__(self, plane: Slice, threshold: float) -> None:
        self._plane, self._threshold = plane, threshold
        self._cells = plane.proposal > threshold

    @property
    def size(self) -> int:
        """Pixels of the slice."""
        return self._cells.size

    def pixels(self) -> tuple[int, int, int]:
        """Cell pixels found, wrongly found and missed: (tp, fp, fn)."""
        truth = self._plane.truth
        right = int(np.count_nonzero(self._cells & truth))
        return right, int(self._cells.sum()) - right, int(truth.sum()) - right

    @cached_property
    def overlaps(self) -> Overlaps:
        """True cells against 4-connected cells of the proposal; 0 is membrane on both sides."""
        return Overlaps.of(self._plane.segments, _segments(self._cells))

    @cached_property
    def thinned(self) -> Overlaps:
        """True cells against the segments of the proposal with its membranes thinned."""
        return Overlaps.of(self._plane.segments, thin(self._cells))

    @cached_property
    def mismatches(self) -> Mismatches:
        """Topological errors of the proposal."""
        plane = self._plane
        return classify(*warp(plane.truth, plane.proposal, self._threshold))


def _segments(cells: NDArray[np.bool_]) -> NDArray[np.int32]:
    return ndimage.label(cells)[0].astype(np.int32)
