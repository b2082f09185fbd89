"""Ids of the objects of the volume, and holes, from the records of all tiles.

Knows whole objects: which are removed, and in which order they are numbered. Does not know voxels,
files, or how labels of different tiles are united.

Objects are numbered by their first voxels. Tiles form slabs that follow each other in scan order,
so an object that starts in an earlier slab has a lower number, and only the objects that start in
one slab are sorted at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import RunError
from unet_ray.segmentation.basins import BasinForest
from unet_ray.segmentation.components import Connection, TileSummary
from unet_ray.segmentation.forest import (
    TOUCHING_BYTES,
    WINDOW_BYTES,
    Forest,
    ReadRecord,
    ReadSummary,
)
from unet_ray.segmentation.rules import Ids
from unet_ray.tiling.tiles import TilePlan
from unet_ray.units import format_bytes

# Bytes of a label of a slab: its id, and its first voxel among the sorted ones.
LABEL_BYTES = 16


def join_bytes(labels: int, touching: int, ids: Ids) -> int:
    """Memory of `unite`, in bytes, besides the record of one tile and 8 bytes for each tile.

    Args:
        labels: number of labels in the slab with the most labels (see `slabs`).
        touching: number of labels of all tiles that touch another tile.
        ids: kind of the ids.
    """
    return WINDOW_BYTES + TOUCHING_BYTES * touching + LABEL_BYTES * labels * (ids == "dense")


def slabs(plan: TilePlan) -> Iterator[range]:
    """Yields the numbers of tiles in groups, so that all voxels of a group precede the next group.

    A slab has all tiles at one position along z; if tiles are single slices, along z and y.
    """
    extents = np.minimum(plan.shape, plan.core)
    axis = next((axis for axis in range(3) if extents[axis] > 1), 2)
    size = math.prod(plan.counts[axis + 1 :])
    for start in range(0, len(plan), size):
        yield range(start, start + size)


def unite(
    plan: TilePlan,
    record: ReadRecord,
    connection: Connection,
    *,
    min_size: int = 0,
    exclude_border: bool = False,
    ids: Ids = "dense",
    max_bytes: int,
    split: bool = False,
    summary: ReadSummary | None = None,
) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Yields the id of each label of each tile.

    Args:
        plan: the tiles.
        record: returns the record of a tile; None if a mask skipped it. It is called several
            times for a tile and must return the same record each time.
        connection: with which the tiles were labelled.
        min_size: objects with fewer voxels are removed.
        exclude_border: whether objects that touch the border of the volume are removed.
        ids: ``dense`` for 1, 2, … in the order of the first voxels (z, y, x); ``first-voxel`` for
            1 + the linear index of the first voxel in the volume.
        max_bytes: the available memory; see `join_bytes`.
        split: whether objects are split at their necks. The records are then `BasinRecord`s.
        summary: returns the summary of a tile, like `record`, but faster; by default its record.

    Yields:
        Tile and ids, uint64, shape (n + 1,), in ascending order of the tiles. Label 0 and the
        labels of removed objects have id 0. Skipped tiles are left out.

    Raises:
        RunError: if `max_bytes` is too small; names the needed memory and the remedy.
        DamageError: if a record belongs to another tile, another plan or another connection.
    """

    def kept(sizes: NDArray[np.int64], border: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return (sizes >= min_size) & ~(border & exclude_border)

    summary = summary or record
    budget = _Budget(plan, summary, ids, max_bytes)
    forest = (BasinForest if split else Forest)(plan, record, summary, connection)
    forest.grow(budget.admit)
    # The number of an object is 0 if it is removed, -1 - (its first voxel), later its dense id.
    numbers = np.subtract(-1, forest.first, out=forest.first)
    numbers[~kept(forest.sizes, forest.border)] = 0

    def numbers_of(index: int, tile: TileSummary) -> NDArray[np.int64]:
        own = np.where(kept(tile.sizes, tile.border), -1 - tile.first, 0)
        own[tile.touching - 1] = numbers[forest.roots_of(index)]
        return np.concatenate([np.zeros(1, np.int64), own])

    if ids == "first-voxel":
        for index in range(len(plan)):
            if tile := forest.read(index):
                yield index, (-numbers_of(index, tile)).astype(np.uint64)
        return
    starts, count = np.empty(max(budget.labels), np.int64), 0
    for slab in slabs(plan):
        numbered, objects = {}, 0  # objects that start in this slab
        for index in slab:
            if tile := forest.read(index):
                numbered[index] = numbers_of(index, tile)
                starting = tile.first[numbered[index][1:] == -1 - tile.first]
                starts[objects : objects + len(starting)] = starting
                objects += len(starting)
        starts[:objects].sort()
        for index, labels in numbered.items():
            _rank(labels, starts[:objects], count)
            _rank(numbers[forest.labels_of(index)], starts[:objects], count)
            yield index, labels.view(np.uint64)
        count += objects


def holes(
    plan: TilePlan,
    record: ReadRecord,
    connection: Connection,
    max_bytes: int,
    summary: ReadSummary | None = None,
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yields which background labels of each tile are holes: enclosed by objects.

    A hole is a whole component of the background that does not touch the border of the volume. A
    tile that a mask skipped is background that touches the border. A volume without a border, of
    one voxel, has no holes.

    Args:
        plan: the tiles.
        record: returns the record of a tile, whose background was labelled with the complement of
            `connection`; None if a mask skipped it.
        connection: of the foreground.
        max_bytes: the available memory; see `join_bytes` for ids of kind ``first-voxel``.
        summary: as for `unite`.

    Yields:
        Tile and holes, bool, shape (n + 1,), False for label 0, in ascending order of the tiles.
        Skipped tiles are left out.

    Raises:
        RunError: if `max_bytes` is too small; names the needed memory and the remedy.
        DamageError: if a record belongs to another tile, another plan or another connection.
    """
    summary = summary or record
    forest = Forest(plan, record, summary, connection.complement)
    budget = _Budget(plan, summary, "first-voxel", max_bytes)
    forest.grow(budget.admit, closed=True)
    bordered = bool(connection.borders(plan.shape))
    for index in range(len(plan)):
        if tile := forest.read(index):
            enclosed = np.zeros(tile.count + 1, np.bool_)
            enclosed[1:] = ~tile.border
            enclosed[tile.touching] = ~forest.border[forest.roots_of(index)]
            yield index, enclosed & bordered


def _rank(numbers: NDArray[np.int64], starts: NDArray[np.int64], count: int) -> None:
    """Replaces first voxels by dense ids, in place.

    Args:
        numbers: of labels; those below 0 are -1 - (first voxel).
        starts: first voxels of the objects that start in the slab, ascending.
        count: objects of earlier slabs.
    """
    pending = numbers < 0
    numbers[pending] = count + 1 + np.searchsorted(starts, -1 - numbers[pending])


class _Budget:
    """Counts labels while records are read, and refuses those that do not fit the memory.

    Attributes:
        labels: number of labels in each slab.
    """

    def __init__(self, plan: TilePlan, summary: ReadSummary, ids: Ids, max_bytes: int) -> None:
        self._plan, self._summary, self._ids, self._max_bytes = plan, summary, ids, max_bytes
        self._tiles = len(next(slabs(plan)))
        self.labels = [0] * (len(plan) // self._tiles)

    def admit(self, index: int, labels: int, touching: int, held: int) -> None:
        """Counts the labels of a tile.

        Args:
            index: number of the tile.
            labels: its number of labels.
            touching: labels of all tiles up to it that touch another tile.
            held: bytes of their union.

        Raises:
            RunError: if they need more memory than there is.
        """
        self.labels[index // self._tiles] += labels
        needed = join_bytes(self.labels[index // self._tiles], 0, self._ids) + held
        if needed > self._max_bytes:
            raise RunError(self._refusal(held / max(1, touching)))

    def _refusal(self, each: float) -> str:
        """Returns the message, given the bytes of a touching label."""
        labels, touching = [0] * len(self.labels), 0
        for index in range(len(self._plan)):
            if tile := self._summary(index):
                labels[index // self._tiles] += tile.count
                touching += len(tile.touching)
        without = join_bytes(0, 0, "first-voxel") + math.ceil(each * touching)
        needed = join_bytes(max(labels), 0, self._ids) + math.ceil(each * touching)
        remedy = f"use --memory {-(-needed // (1 << 20))}MiB or more"
        if self._ids == "dense" and without <= self._max_bytes:
            remedy += ", or --ids first-voxel"
        return (
            f"{sum(labels)} labels, of which {touching} touch another tile, need "
            f"{format_bytes(needed)} to be united, and {format_bytes(self._max_bytes)} are "
            f"allowed; {remedy}."
        )
