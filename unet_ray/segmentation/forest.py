"""The labels that touch other tiles, as a forest in which each tree is one object.

Knows the records of tiles and where tiles touch. Does not know ids, voxels or files.

Tiles arrive in ascending order, and each is compared with its 13 neighbours before it, which share
a face, an edge or a corner. All contacts are between the first plane of a tile along one axis and
the last plane of its neighbour along the same axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.compiled import compiled
from unet_ray.errors import DamageError
from unet_ray.segmentation.components import Connection, Faces, TileRecord, TileSummary
from unet_ray.tiling.boxes import Ints
from unet_ray.tiling.tiles import TilePlan

ReadRecord = Callable[[int], TileRecord | None]
ReadSummary = Callable[[int], TileSummary | None]
Admit = Callable[[int, int, int, int], None]
"""Takes a tile, its number of labels, and the touching labels of all tiles up to it with their
bytes."""

# Bytes of the faces of earlier tiles that stay in memory. Other faces are read again.
WINDOW_BYTES = 64 << 20
# Bytes of a label that touches another tile: parent, size, first voxel and border are 25, and the
# arrays grow by a quarter.
TOUCHING_BYTES = 32


@dataclass(frozen=True)
class Contact:
    """Where a tile touches one of the 13 neighbours before it.

    Attributes:
        offset: of the neighbour in the grid of tiles, per axis: -1, 0 or 1.
        axis: the first axis along which they differ; the neighbour is before the tile.
        steps: from a voxel on the plane of the tile to its neighbours on the plane of the other
            tile, int64, shape (steps, 2), along the two axes of the plane.
    """

    offset: Ints
    axis: int
    steps: NDArray[np.int64]

    def part(self, plane: NDArray[np.int32], own: bool) -> NDArray[np.int32]:
        """Cuts the plane of a tile, or of its neighbour, to the voxels next to the other."""
        along = (self.offset[axis] for axis in range(3) if axis != self.axis)
        ends = {-1: slice(0, 1), 0: slice(None), 1: slice(-1, None)}
        return np.ascontiguousarray(plane[tuple(ends[n if own else -n] for n in along)])


def contacts(connection: Connection) -> list[Contact]:
    """Returns the contacts of a tile with the neighbours before it."""
    steps = np.argwhere(connection.structure) - 1
    before = []
    for offset in itertools.product((-1, 0, 1), repeat=3):
        differs = np.flatnonzero(offset)
        across = steps[(steps[:, differs] == np.array(offset)[differs]).all(1)]
        if offset < (0, 0, 0) and len(across):
            axis = int(differs[0])
            # Along an axis of `offset` both planes are cut to one voxel.
            inside = np.delete(across * (np.array(offset) == 0), axis, 1)
            before.append(Contact(offset, axis, inside))
    return before


class Forest:
    """The union of the labels that touch other tiles. A label points to one of a lower number.

    Labels are numbered by tile, then by label. Those of one tile are ``starts[tile]`` up to
    ``starts[tile + 1]``. After `grow`, each label points to the root of its tree, and the values
    of a root are those of the whole object.

    Args:
        plan: the tiles.
        record: returns the record of a tile; None if a mask skipped it.
        summary: returns the summary of a tile, likewise.
        connection: with which the tiles were labelled.

    Attributes:
        starts: number of the first label of each tile, and of all labels, int64.
        parents: int64, shape (labels,), like the following.
        sizes: voxels, int64.
        first: linear index of the first voxel in the volume, int64.
        border: whether the object touches the border of the volume.
    """

    def __init__(
        self,
        plan: TilePlan,
        record: ReadRecord,
        summary: ReadSummary,
        connection: Connection,
    ) -> None:
        self._plan, self._record, self._summary = plan, record, summary
        self._connection = connection
        self.starts = np.zeros(len(plan) + 1, np.int64)
        self.parents, self.sizes, self.first = (np.empty(0, np.int64) for _ in range(3))
        self.border = np.empty(0, np.bool_)
        self._planes: dict[int, Faces | None] = {}  # last planes of earlier tiles
        self._bytes = 0  # of these planes
        self._count = 0  # of labels until now

    def read(self, index: int) -> TileSummary | None:
        """Returns the summary of a tile; None if a mask skipped it.

        Raises:
            DamageError: if it belongs to another tile or another plan.
        """
        tile = self._summary(index)
        if tile and (tile.write != self._plan[index].write or tile.shape != self._plan.shape):
            raise _foreign(index)
        return tile

    def _faces(self, index: int) -> TileRecord | None:
        """Returns the record of a tile; None if a mask skipped it.

        Raises:
            DamageError: if it belongs to another tile, another plan or another connection.
        """
        if (tile := self._record(index)) is None:
            return None
        write, shape = self._plan[index].write, self._plan.shape
        axes = (0, 1, 2) if self._connection.connect == "volume" else (1, 2)
        if (
            tile.write != write
            or tile.shape != shape
            or any(not tile.low[axis].size for axis in axes if write.start[axis])
            or any(not tile.high[axis].size for axis in axes if write.stop[axis] < shape[axis])
        ):
            raise _foreign(index)
        return tile

    def labels_of(self, index: int) -> slice:
        """Returns the range of the touching labels of a tile."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def roots_of(self, index: int) -> NDArray[np.int64]:
        """Returns the roots of the touching labels of a tile; valid after `grow`."""
        return self.parents[self.labels_of(index)]

    def held(self) -> int:
        """Returns the bytes of the labels, in memory."""
        return TOUCHING_BYTES * self._count

    def grow(self, admit: Admit, closed: bool = False) -> None:
        """Reads all records and unites their touching labels.

        Args:
            admit: called when the labels of a tile are added; it may raise.
            closed: whether labels beside a skipped tile touch the border.
        """
        kinds, counts = contacts(self._connection), self._plan.counts
        for index, position in enumerate(itertools.product(*map(range, counts))):
            low = self._add(index, admit)
            for contact in kinds:
                other = tuple(a + b for a, b in zip(position, contact.offset, strict=True))
                if all(0 <= n < count for n, count in zip(other, counts, strict=True)):
                    number = (other[0] * counts[1] + other[1]) * counts[2] + other[2]
                    self._meet(contact, index, low, number, closed)
        self._planes.clear()
        self._resize(int(self.starts[-1]))
        gather(self.parents, self.sizes, self.first, self.border)

    def _add(self, index: int, admit: Admit) -> Faces | None:
        """Adds the labels of a tile; returns its first planes, None if it was skipped."""
        start = stop = int(self.starts[index])
        low = None
        if tile := self._faces(index):
            stop += len(tile.touching)
            if stop > len(self.parents):
                self._resize(max(stop, len(self.parents) * 5 // 4))
            self._take(tile, start, stop)
            low = self._low_planes(tile)
        self.starts[index + 1] = self._count = stop
        if tile:
            admit(index, tile.count, stop, self.held())
        self._keep(index, tile)
        return low

    def _take(self, tile: TileRecord, start: int, stop: int) -> None:
        """Copies the values of the touching labels of a tile."""
        labels = tile.touching - 1
        self.parents[start:stop] = np.arange(start, stop)
        self.sizes[start:stop] = tile.sizes[labels]
        self.first[start:stop] = tile.first[labels]
        self.border[start:stop] = tile.border[labels]

    def _low_planes(self, tile: TileRecord) -> Faces:
        return tile.low

    def _high_planes(self, tile: TileRecord) -> Faces:
        return tile.high

    def _meet(
        self, contact: Contact, index: int, low: Faces | None, other: int, closed: bool
    ) -> None:
        """Unites the labels of two tiles that touch."""
        high, axis = self._high(other), contact.axis
        first, second = int(self.starts[index]), int(self.starts[other])
        if low and high:
            self._join(contact, index, low, other, high)
        elif closed and low:
            labels = contact.part(low[axis], True)
            self.border[first - 1 + labels[labels > 0]] = True
        elif closed and high:
            labels = contact.part(high[axis], False)
            self.border[second - 1 + labels[labels > 0]] = True

    def _join(self, contact: Contact, index: int, low: Faces, other: int, high: Faces) -> None:
        first, second, axis = int(self.starts[index]), int(self.starts[other]), contact.axis
        planes = contact.part(low[axis], True), contact.part(high[axis], False)
        _join(self.parents, first, planes[0], second, planes[1], contact.steps)

    def _high(self, index: int) -> Faces | None:
        """Returns the last planes of an earlier tile, from memory or from its record."""
        if index not in self._planes:
            self._keep(index, self._faces(index))
        return self._planes[index]

    def _keep(self, index: int, tile: TileRecord | None) -> None:
        """Keeps the last planes of a tile, and forgets the oldest beyond the window."""
        self._planes[index] = high = self._high_planes(tile) if tile else None
        self._bytes += _bytes(high)
        while self._bytes > WINDOW_BYTES and len(self._planes) > 1:
            self._bytes -= _bytes(self._planes.pop(next(iter(self._planes))))

    def _resize(self, labels: int) -> None:
        for array in (self.parents, self.sizes, self.first, self.border):
            # In place: large arrays are then not copied. No view of them exists here.
            array.resize(labels, refcheck=False)


def _bytes(faces: Faces | None) -> int:
    return sum(face.nbytes for face in faces or ())


def _foreign(index: int) -> DamageError:
    return DamageError(f"The record of tile {index} belongs to other tiles or labels.")


@compiled
def root(parents: NDArray[Any], label: int) -> int:
    """Returns the root of a label, and shortens the path to it. `parents` are integers."""
    while parents[label] != label:
        parents[label] = parents[parents[label]]
        label = parents[label]
    return label


@compiled
def _join(
    parents: NDArray[np.int64],
    first: int,
    low: NDArray[np.int32],
    second: int,
    high: NDArray[np.int32],
    steps: NDArray[np.int64],
) -> None:
    """Unites labels of two planes that touch, in place.

    Args:
        parents: of all labels.
        first: number of label 1 of `low`.
        low: labels on the plane of the tile, 0 for none.
        second: number of label 1 of `high`.
        high: labels on the plane of its neighbour, of the same shape.
        steps: from a voxel of `low` to its neighbours on `high`.
    """
    height, width = low.shape
    for k in range(len(steps)):
        dy, dx = steps[k]
        a = b = 0  # the last pair: most voxels repeat it
        for y in range(max(0, -dy), min(height, height - dy)):
            for x in range(max(0, -dx), min(width, width - dx)):
                own, other = low[y, x], high[y + dy, x + dx]
                if own and other and (own != a or other != b):
                    a, b = own, other
                    one, two = root(parents, first + a - 1), root(parents, second + b - 1)
                    parents[max(one, two)] = min(one, two)


@compiled
def gather(
    parents: NDArray[np.int64],
    sizes: NDArray[np.int64],
    first: NDArray[np.int64],
    border: NDArray[np.bool_],
) -> None:
    """Lets each label point to its root, and gathers the values of objects at the roots."""
    for label in range(len(parents)):
        # The parent has a lower number, so it already points to the root.
        root = parents[parents[label]]
        parents[label] = root
        if root != label:
            sizes[root] += sizes[label]
            first[root] = min(first[root], first[label])
            border[root] |= border[label]
