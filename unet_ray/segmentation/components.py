"""Connected components of one tile, and the record that suffices to join them over tiles.

Knows one tile and its position in the volume. Does not know other tiles, files or classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.compiled import compiled
from unet_ray.errors import DamageError
from unet_ray.segmentation.packing import pack, unpack
from unet_ray.segmentation.rules import Connect
from unet_ray.segmentation.runs import label_runs
from unet_ray.tiling.boxes import Box, Ints

_KIND = b"labels-1"
Faces = tuple[NDArray[np.int32], ...]


@dataclass(frozen=True)
class Connection:
    """Which voxels are neighbours.

    Attributes:
        connect: ``volume`` for objects in 3-D; ``slice`` if each z slice has its own objects.
        connectivity: neighbours of a voxel in 3-D. In a slice, 6 means the 4 neighbours in the
            plane; 18 and 26 mean all 8.
    """

    connect: Connect = "volume"
    connectivity: Literal[6, 18, 26] = 6

    @property
    def structure(self) -> NDArray[np.bool_]:
        """The neighbours of the centre, shape (3, 3, 3), as `scipy.ndimage.label` takes them."""
        order = {6: 1, 18: 2, 26: 3}[self.connectivity]
        structure = ndimage.generate_binary_structure(3, order)
        if self.connect == "slice":
            structure[[0, 2]] = False
        return structure

    @property
    def complement(self) -> Connection:
        """The connection of the background, for which a closed surface has an inside."""
        return Connection(self.connect, 26 if self.connectivity == 6 else 6)

    def borders(self, shape: Sequence[int]) -> Ints:
        """Returns the axes along which a volume of `shape` (z, y, x) has a border.

        An axis of extent 1 has none, nor has z if each slice has its own objects.
        """
        first = 1 if self.connect == "slice" else 0
        return tuple(axis for axis in range(first, 3) if shape[axis] > 1)


def label_components(
    mask: NDArray[np.bool_], connection: Connection
) -> tuple[NDArray[np.int32], int]:
    """Labels the connected components of a tile, in the order of their first voxels.

    Args:
        mask: (z, y, x), True in objects.
        connection: which voxels are neighbours.

    Returns:
        Labels (z, y, x) from 1, 0 outside of objects, and the number of components.
    """
    return label_runs(mask, connection.structure)


@dataclass(frozen=True, eq=False)
class TileRecord:
    """What the union of all tiles needs to know of the `n` labels of one tile.

    Attributes:
        write: the voxels of the tile.
        shape: shape of the volume (z, y, x).
        low: labels on the first plane of the tile along z, y and x, int32, each with the two
            other axes; of shape (0, 0) where no other tile with the same objects follows.
        high: labels on the last planes, likewise.
        sizes: voxels of each label, int64, shape (n,).
        first: linear index, in the whole volume, of the first voxel of each label, int64, shape
            (n,), ascending.
        border: whether a label touches the border of the volume, shape (n,).
    """

    write: Box
    shape: Ints
    low: Faces
    high: Faces
    sizes: NDArray[np.int64]
    first: NDArray[np.int64]
    border: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        labels: NDArray[np.int32],
        count: int,
        write: Box,
        shape: Sequence[int],
        connection: Connection,
    ) -> TileRecord:
        """Returns the record of a tile.

        Args:
            labels: of `label_components`, with the shape of `write`.
            count: number of labels.
            write: the voxels of the tile.
            shape: shape of the volume (z, y, x).
            connection: with which the tile was labelled.
        """
        sizes, first = np.zeros(count, np.int64), np.zeros(count, np.int64)
        _measure(labels, np.array(write.start), np.array(shape), sizes, first)
        border = np.zeros(count + 1, np.bool_)
        for axis in connection.borders(shape):
            if write.start[axis] == 0:
                border[_plane(labels, axis, 0)] = True
            if write.stop[axis] == shape[axis]:
                border[_plane(labels, axis, -1)] = True
        empty = np.zeros((0, 0), np.int32)
        before = [a > 0 for a in write.start]
        after = [b < n for b, n in zip(write.stop, shape, strict=True)]
        if connection.connect == "slice":
            before[0] = after[0] = False
        low = (_plane(labels, axis, 0) if before[axis] else empty for axis in range(3))
        high = (_plane(labels, axis, -1) if after[axis] else empty for axis in range(3))
        return cls(write, tuple(shape), tuple(low), tuple(high), sizes, first, border[1:])

    @property
    def count(self) -> int:
        """Number of labels."""
        return len(self.sizes)

    @cached_property
    def touching(self) -> NDArray[np.int64]:
        """The labels on the faces towards other tiles, ascending."""
        touches = np.zeros(self.count + 1, np.bool_)
        for face in (*self.low, *self.high):
            touches[face] = True
        touches[0] = False
        return np.flatnonzero(touches)

    def to_bytes(self) -> bytes:
        """Returns the record as a compressed block with a checksum.

        Raises:
            RunError: if it exceeds 1 GiB.
        """
        position = np.array([self.write.start, self.write.stop, self.shape], np.int64)
        # Differences are small numbers, which compress well.
        first = np.diff(self.first, prepend=0)
        return pack(_KIND, [position, self.sizes, first, self.border, *self.low, *self.high])

    @classmethod
    def from_bytes(cls, data: bytes) -> TileRecord:
        """Reverses `to_bytes`, for bytes from any source.

        Raises:
            DamageError: if `data` is not the record of a tile. The message continues from a name.
        """
        dtypes = ["<i8", "<i8", "<i8", "|u1", *["<i4"] * 6]
        position, sizes, differences, border, *faces = unpack(_KIND, dtypes, data)
        try:
            start, stop, shape = (tuple(row) for row in position.reshape(3, 3).tolist())
            write, whole = Box(start, stop), Box.of(shape)
            shaped = tuple(
                face.reshape(_without(write.shape, axis) if face.size else (0, 0))
                for axis, face in zip((0, 1, 2) * 2, faces, strict=True)
            )
        except ValueError as error:
            raise DamageError("its parts have different sizes") from error
        first, n = np.cumsum(differences), len(sizes)
        valid = (
            write.size > 0
            and write.intersect(whole) == write
            and len(first) == len(border) == n
            and all(0 <= face.min(initial=0) <= face.max(initial=0) <= n for face in faces)
            and (n == 0 or 0 <= first[0] <= first[-1] < whole.size)
            and bool((first[1:] > first[:-1]).all() and (sizes > 0).all())
        )
        if not valid:
            raise DamageError("it is not the record of a tile")
        return cls(write, shape, shaped[:3], shaped[3:], sizes, first, border != 0)


def _plane(labels: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    """Returns a copy of one plane of `labels`."""
    return np.ascontiguousarray(labels.take(index, axis))


def _without(extents: Sequence[int], axis: int) -> Ints:
    return (*extents[:axis], *extents[axis + 1 :])


@compiled
def _measure(
    labels: NDArray[np.int32],
    start: NDArray[np.int64],
    shape: NDArray[np.int64],
    sizes: NDArray[np.int64],
    first: NDArray[np.int64],
) -> None:
    """Counts the voxels of each label and notes its first voxel, in place."""
    for z in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            row = ((start[0] + z) * shape[1] + start[1] + y) * shape[2] + start[2]
            for x in range(labels.shape[2]):
                label = labels[z, y, x]
                if label:
                    if sizes[label - 1] == 0:
                        first[label - 1] = row + x
                    sizes[label - 1] += 1
