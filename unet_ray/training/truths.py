"""From label values to classes and cells, for any window of the labels.

Handles values, voxels without annotation and cells that touch. Independent of files, held-out
slices and weight maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Box
from unet_ray.training.weights import cells_of, separate
from unet_ray.training.windows import Windowed, consecutive

# Labels with more distinct values than this are taken for object numbers, not classes.
MOST_CLASSES = 32
MOST_VALUES = 1 << 20  # after more values the search for others ends
RING = 5  # voxels around a cell that are background where 0 means not annotated
SMALL = (np.uint8, np.uint16)  # types of labels for which a table of all values is small
IGNORED = 255  # target of a voxel without annotation, until its weight is 0


@dataclass(frozen=True, eq=False)
class Truth:
    """The labels of a window.

    Attributes:
        targets: class numbers, uint8 ``(z, y, x)``; `IGNORED` without annotation.
        cells: cell numbers, ``(z, y, x)``, if the labels are instances.
    """

    targets: NDArray[np.uint8]
    cells: NDArray[np.int64] | None

    def __getitem__(self, index: Any) -> Truth:
        return Truth(self.targets[index], None if self.cells is None else self.cells[index])

    def without(self, planes: NDArray[np.bool_]) -> Truth:
        """Returns a copy in which these planes have no annotation and no cell."""
        targets = self.targets.copy()
        targets[planes] = IGNORED
        cells = None if self.cells is None else np.where(planes[:, None, None], 0, self.cells)
        return Truth(targets, cells)


@dataclass(frozen=True)
class Rule:
    """How label values become classes and cells.

    Attributes:
        values: label value of each class, ascending; not used if the labels number cells.
        instances: whether the labels number cells.
        ignored: label of voxels without annotation.
        dims: 2 if cells are separated slice by slice, 3 if in the volume.
    """

    values: tuple[int, ...]
    instances: bool
    ignored: int | None
    dims: int

    @property
    def halo(self) -> tuple[int, int, int]:
        """Voxels around a window (z, y, x) that its classes depend on."""
        if not self.instances:
            return 0, 0, 0
        return self.dims - 2, RING + 1, RING + 1

    def annotated(self, labels: NDArray[Any], partial: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Returns which voxels (z, y, x) are annotated.

        Args:
            labels: label values, ``(z, y, x)``.
            partial: the slices that lack most cells.
        """
        mask: NDArray[np.bool_] = labels != self.ignored
        if self.ignored is None:
            mask = np.ones(labels.shape, bool)
        if self.instances:
            if self.ignored == 0:
                mask = _with_ring(mask)
            if partial.any():
                mask[partial] &= _with_ring(labels[partial] != 0)
        return mask

    def truth(self, path: str, labels: NDArray[Any], partial: NDArray[np.bool_]) -> Truth:
        """Returns classes and cells of a window (z, y, x); those of its halo depend on more."""
        mask, cells = self.annotated(labels, partial), None
        if self.instances:
            cells = np.where(mask, signed(path, labels), 0).astype(np.int64, copy=False)
            if (cells < 0).any():
                raise InputError(
                    f"{path}: contains {cells.min()}; cell numbers must be at least 0."
                )
            cells = np.where(separate(cells, self.dims), cells, 0)
            targets = (cells != 0).astype(np.uint8)
        else:
            targets = _classes(signed(path, labels), self.values)
        targets[~mask] = IGNORED
        return Truth(targets, cells)


class Source:
    """The labels of one volume as classes and cells, by windows.

    Args:
        path: of the labels.
        labels: label values, (1, z, y, x). If they are in memory, so are classes and cells.
        partial: the slices that lack most cells.
        rule: how values become classes and cells.
    """

    def __init__(self, path: str, labels: Windowed, partial: NDArray[np.bool_], rule: Rule) -> None:
        self._path, self._labels, self._partial, self.rule = path, labels, partial, rule
        self.shape = labels.shape[1:]

    def of(self, planes: NDArray[np.intp], box: Box) -> Truth:
        """Returns the truth of a window.

        Args:
            planes: numbers of slices of the labels, ascending.
            box: the window, (z, y, x); its z counts these planes.
        """
        parts = [self._run(run, box) for run in consecutive(planes[box.slices[0]])]
        if len(parts) == 1:
            return parts[0]
        cells = [part.cells for part in parts if part.cells is not None]
        targets = np.concatenate([part.targets for part in parts])
        return Truth(targets, np.concatenate(cells) if cells else None)

    def _run(self, run: range, box: Box) -> Truth:
        window = Box((run.start, *box.start[1:]), (run.stop, *box.stop[1:]))
        if isinstance(self._labels, np.ndarray):
            return self._whole[window.slices]
        grown = window.grow(self.rule.halo, self.rule.halo).intersect(Box.of(self.shape))
        labels = self._labels[(slice(None), *grown.slices)][0]
        truth = self.rule.truth(self._path, labels, self._partial[grown.slices[0]])
        return truth[window.relative_to(grown.start).slices]

    def refuse_no_cell(self, boxes: Sequence[Box]) -> None:
        """Refuses labels without a cell.

        Args:
            boxes: windows (z, y, x) to look at one by one.

        Raises:
            InputError: naming the file.
        """
        planes = np.arange(self.shape[0])
        if any((self.of(planes, box).targets == 1).any() for box in boxes):
            return
        nothing = [value for value in (0, self.rule.ignored) if value is not None]
        numbered = any(
            not np.isin(self._labels[(slice(None), *box.slices)], nothing).all() for box in boxes
        )
        raise InputError(
            f"{self._path}: contains no cell"
            + (" after touching cells are separated" if numbered else "")
            + "; --labels-are instances needs at least one."
        )

    @cached_property
    def _whole(self) -> Truth:
        return self.rule.truth(self._path, self._labels[:][0], self._partial)


def rule_of(
    labels: Sequence[tuple[str, Windowed]],
    boxes: Callable[[Sequence[int]], Sequence[Box]],
    instances: bool,
    ignored: int | None,
    dims: int,
) -> Rule:
    """Finds the label value of each class in all labels.

    Args:
        labels: path of each file, and its values (1, z, y, x).
        boxes: divides a shape (z, y, x) into the windows to read.
        instances: whether the labels number cells.
        ignored: label of voxels without annotation.
        dims: of the network.

    Raises:
        InputError: if no voxel has the label `ignored`, or there are too few or too many classes.
    """
    distinct: set[int] = set()
    seen = ignored is None
    for path, array in labels:
        for box in boxes(array.shape[1:]):
            if seen and (instances or len(distinct) > MOST_VALUES):
                break
            window = array[(slice(None), *box.slices)][0]
            seen = seen or bool((window == ignored).any())
            if not instances:
                distinct |= _distinct(signed(path, window))
    if not seen:
        raise InputError(f"{labels[0][0]}: no voxel has the label {ignored} set by --ignore-label.")
    if instances:
        return Rule((0, 1), True, ignored, dims)
    values = sorted(distinct - {ignored})
    if len(values) < 2:
        raise InputError(
            f"{labels[0][0]}: all labels are {', '.join(map(str, values)) or 'ignored'}, which is "
            "at most one class; training needs at least two."
        )
    if len(values) > MOST_CLASSES:
        more = " or more" if len(values) > MOST_VALUES else ""
        raise InputError(
            f"{labels[0][0]}: has {len(values)} label values{more}, but at most {MOST_CLASSES} "
            "classes are allowed; for labels that number the cells, set --labels-are instances."
        )
    return Rule(tuple(values), False, ignored, dims)


def signed(path: str, labels: NDArray[Any]) -> NDArray[Any]:
    """Returns labels as int64, or unchanged if their type has few values.

    Raises:
        InputError: if a label does not fit.
    """
    if labels.dtype in SMALL:
        return labels
    if labels.dtype == np.uint64 and labels.max() > np.iinfo(np.int64).max:
        raise InputError(f"{path}: contains the label {labels.max()}; labels must be below 2**63.")
    return labels.astype(np.int64)


def _distinct(labels: NDArray[Any]) -> set[int]:
    if labels.dtype in SMALL:  # much faster than sorting
        return set(np.flatnonzero(np.bincount(labels.ravel())).tolist())
    return set(np.unique(labels).tolist())


def _classes(labels: NDArray[Any], values: Sequence[int]) -> NDArray[np.uint8]:
    """Returns the class of each label; any class for a label that is none of the values."""
    if labels.dtype in SMALL:
        every = np.arange(np.iinfo(labels.dtype).max + 1)
        table = np.searchsorted(values, every).astype(np.uint8)
        classes: NDArray[np.uint8] = table[labels]
        return classes
    return np.searchsorted(values, labels).astype(np.uint8)


class Components:
    """Connected components of classes above 0 in a volume, 6-connected, labelled by boxes.

    Args:
        targets: returns the class numbers of a box (z, y, x).
        boxes: windows that partition the volume, last axis fastest.
        numbers: array (z, y, x) for the numbers of the components of each box.
        classes: number of classes.
    """

    def __init__(
        self,
        targets: Callable[[Box], NDArray[np.uint8]],
        boxes: Sequence[Box],
        numbers: Windowed,
        classes: int,
    ) -> None:
        self._numbers, kinds, pairs = numbers, [np.zeros(1, np.uint8)], []
        count = 0
        for box in boxes:
            window = targets(box)
            cells = cells_of(window, classes, dims=3)
            kind = np.zeros(int(cells.max(initial=0)) + 1, np.uint8)
            kind[cells] = window
            kinds.append(kind[1:])
            numbers[box.slices] = np.where(cells, cells + count, 0)
            count += len(kind) - 1
            pairs += [self._across(box, axis) for axis in range(3) if box.start[axis]]
        kind, joined = (
            np.concatenate(kinds),
            np.concatenate([np.zeros((2, 0), np.int64), *pairs], 1),
        )
        joined = joined[:, kind[joined[0]] == kind[joined[1]]]
        edges = np.ones(joined.shape[1], bool), (joined[0], joined[1])
        graph = coo_array(edges, shape=(count + 1, count + 1))
        self._table = 1 + connected_components(graph, directed=False)[1].astype(np.int64)
        self._table[0] = 0

    def _across(self, box: Box, axis: int) -> NDArray[np.int64]:
        """Returns the pairs of numbers on both sides of the lower face of a box, (2, pairs)."""
        start, stop = list(box.start), list(box.stop)
        start[axis], stop[axis] = start[axis] - 1, start[axis] + 1
        both = np.moveaxis(
            np.asarray(self._numbers[Box(tuple(start), tuple(stop)).slices]), axis, 0
        )
        touching = both[:, (both != 0).all(0)]
        pairs: NDArray[np.int64] = np.unique(touching, axis=1)
        return pairs

    def of(self, box: Box) -> NDArray[np.int64]:
        """Returns the numbers of the components of a window; 0 is background."""
        numbers: NDArray[np.int64] = self._table[self._numbers[box.slices]]
        return numbers


def _with_ring(cells: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Adds the voxels of each slice near a cell; other voxels of such a frame are unknown."""
    disk = np.hypot(*np.ogrid[-RING : RING + 1, -RING : RING + 1]) <= RING
    grown = [ndimage.binary_dilation(plane, disk) for plane in cells]
    return np.stack(grown)
