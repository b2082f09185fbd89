"""The basins of all tiles, as a forest in which each tree is one object between its necks.

Knows the records of tiles with basins, and where tiles touch. Does not know ids, voxels or files.

First the parts of each basin are united: where a pointer leads to another tile, and where a flat
top continues there. Then basins are merged over all necks of the volume, from the highest neck to
the lowest. Equal necks are ordered by the first voxels of their basins, which no tiling changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unet_ray.compiled import compiled
from unet_ray.segmentation.components import Connection, Faces, TileRecord
from unet_ray.segmentation.forest import (
    Admit,
    Contact,
    Forest,
    ReadRecord,
    ReadSummary,
    gather,
    root,
)
from unet_ray.segmentation.watershed import BasinRecord, highest_necks, merge, voxel_height
from unet_ray.tiling.tiles import TilePlan

# Bytes of a neck: two basins and a height are 20, its order 8, and copies while it is sorted.
NECK_BYTES = 80
# Bytes of the top and the target of a label; the arrays grow by a quarter.
TOP_BYTES = 16


class BasinForest(Forest):
    """The union of the open labels of all tiles; see `Forest`.

    Attributes:
        tops: greatest height of each label, int32.
        targets: voxel of another tile to which its pointers lead, int64; -1 for none.
    """

    def __init__(
        self,
        plan: TilePlan,
        record: ReadRecord,
        summary: ReadSummary,
        connection: Connection,
    ) -> None:
        super().__init__(plan, record, summary, connection)
        self.tops, self.targets = np.empty(0, np.int32), np.empty(0, np.int64)
        self._pairs: list[NDArray[np.int64]] = []
        self._necks: list[NDArray[np.int32]] = []

    def grow(self, admit: Admit, closed: bool = False) -> None:
        """Reads all records, unites the parts of each basin, and merges basins without a neck."""
        super().grow(admit, closed)
        np.maximum.at(self.tops, self.parents, self.tops)
        self.sizes[self.parents != np.arange(len(self.parents))] = 0  # now part of their roots
        pairs = self.parents[np.concatenate([np.empty((0, 2), np.int64), *self._pairs])]
        necks = np.concatenate([np.empty(0, np.int32), *self._necks])
        self._pairs.clear()
        self._necks.clear()
        first = np.sort(self.first[pairs], axis=1)
        order = np.lexsort((first[:, 1], first[:, 0], -necks))
        unit = voxel_height(self._connection)
        merge(self.parents, self.tops, pairs[order], necks[order], unit)
        gather(self.parents, self.sizes, self.first, self.border)

    def held(self) -> int:
        """Returns the bytes of the labels and necks."""
        necks = sum(map(len, self._necks))
        return super().held() + TOP_BYTES * self._count + NECK_BYTES * necks

    def _take(self, tile: TileRecord, start: int, stop: int) -> None:
        super()._take(tile, start, stop)
        assert isinstance(tile, BasinRecord)
        self.tops[start:stop] = tile.tops
        self.targets[start:stop] = tile.targets
        self._add_necks(tile.necks, start, start)

    def _add_necks(self, rows: NDArray[np.int32], first: int, second: int) -> None:
        """Adds rows of two labels, counted from `first` and from `second`, and their neck."""
        self._pairs.append(rows[:, :2] + np.array([first, second]))
        self._necks.append(rows[:, 2].copy())

    def _low_planes(self, tile: TileRecord) -> Faces:
        assert isinstance(tile, BasinRecord)
        return (*super()._low_planes(tile), *tile.low_heights)

    def _high_planes(self, tile: TileRecord) -> Faces:
        assert isinstance(tile, BasinRecord)
        return (*super()._high_planes(tile), *tile.high_heights)

    def _join(self, contact: Contact, index: int, low: Faces, other: int, high: Faces) -> None:
        """Unites the parts of basins where two tiles touch, and adds the necks between others."""
        axis = contact.axis
        own = contact.part(low[axis], True), contact.part(low[axis + 3], True)
        there = contact.part(high[axis], False), contact.part(high[axis + 3], False)
        first, second = int(self.starts[index]), int(self.starts[other])
        necks = _meet(
            self.parents,
            self.tops,
            self.targets,
            (first, second),
            own,
            there,
            (self._positions(contact, index, True), self._positions(contact, other, False)),
            contact.steps,
        )
        self._add_necks(highest_necks(necks), first - 1, second - 1)

    def _positions(self, contact: Contact, index: int, own: bool) -> tuple[int, int, int]:
        """Returns the linear index of the first voxel of a plane at a contact, and its strides."""
        write, (_, height, width) = self._plan[index].write, self._plan.shape
        strides = (height * width, width, 1)
        start = 0
        for axis, (a, b) in enumerate(zip(write.start, write.stop, strict=True)):
            # The neighbour is before the tile where `offset` is -1, and behind it where it is 1.
            last = contact.offset[axis] == (1 if own else -1)
            start += strides[axis] * (b - 1 if last else a)
        along: Sequence[int] = [strides[axis] for axis in range(3) if axis != contact.axis]
        return start, along[0], along[1]

    def _resize(self, labels: int) -> None:
        super()._resize(labels)
        for array in (self.tops, self.targets):
            array.resize(labels, refcheck=False)


@compiled
def _meet(
    parents: NDArray[np.int64],
    tops: NDArray[np.int32],
    targets: NDArray[np.int64],
    numbers: tuple[int, int],
    low: tuple[NDArray[np.int32], NDArray[np.int32]],
    high: tuple[NDArray[np.int32], NDArray[np.int32]],
    positions: tuple[tuple[int, int, int], tuple[int, int, int]],
    steps: NDArray[np.int64],
) -> NDArray[np.int32]:
    """Unites the parts of basins on two planes that touch, and returns all other contacts.

    Args:
        parents: of all labels; changed in place.
        tops: of all labels.
        targets: of all labels.
        numbers: of label 1 of the plane of the tile, and of its neighbour.
        low: labels on the plane of the tile, 0 for none, and heights.
        high: labels and heights on the plane of its neighbour, of the same shape.
        positions: linear index of the first voxel of each plane in the volume, and its strides.
        steps: from a voxel of `low` to its neighbours on `high`.

    Returns:
        Rows (label of `low`, label of `high`, height of their neck), int32, shape (k, 3).
    """
    height, width = low[0].shape
    rows = np.empty((low[0].size * len(steps), 3), np.int32)
    count = 0
    for k in range(len(steps)):
        dy, dx = steps[k]
        for y in range(max(0, -dy), min(height, height - dy)):
            for x in range(max(0, -dx), min(width, width - dx)):
                v, u = y + dy, x + dx
                if low[0][y, x] == 0 or high[0][v, u] == 0:
                    continue
                a, b = numbers[0] + low[0][y, x] - 1, numbers[1] + high[0][v, u] - 1
                here, there = low[1][y, x], high[1][v, u]
                one = positions[0][0] + y * positions[0][1] + x * positions[0][2]
                other = positions[1][0] + v * positions[1][1] + u * positions[1][2]
                flat = here == tops[a] and there == tops[b] and targets[a] == targets[b] == -1
                if targets[a] == other or targets[b] == one or (flat and here == there):
                    a, b = root(parents, a), root(parents, b)
                    parents[max(a, b)] = min(a, b)
                else:
                    rows[count, 0], rows[count, 1] = low[0][y, x], high[0][v, u]
                    rows[count, 2] = min(here, there)
                    count += 1
    return rows[:count]
