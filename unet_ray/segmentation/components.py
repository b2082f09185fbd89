"""Connected components of one tile, and the record that suffices to join them over tiles.

Knows one tile and its position in the volume. Does not know other tiles, files or classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.compiled import compiled
from unet_ray.errors import DamageError, RunError
from unet_ray.segmentation.packing import pack, pack_pair, unpack, unpack_pair
from unet_ray.segmentation.rules import Connect
from unet_ray.segmentation.runs import label_runs
from unet_ray.tiling.boxes import Box, Ints

_KIND, _SUMMARY, _FACES = b"labels-2", b"summary1", b"faces--1"
_OLDER = b"labels-1", b"basins-1"  # kinds of older versions
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
class TileSummary:
    """The `n` labels of one tile, without the voxels where it touches other tiles.

    Attributes:
        write: the voxels of the tile.
        shape: shape of the volume (z, y, x).
        sizes: voxels of each label, int64, shape (n,).
        first: linear index, in the whole volume, of the first voxel of each label, int64, shape
            (n,), ascending.
        border: whether a label touches the border of the volume, shape (n,).
        touching: the labels that may belong to an object of several tiles, int32, shape (m,),
            ascending: all labels on the faces towards other tiles are among them.
    """

    write: Box
    shape: Ints
    sizes: NDArray[np.int64]
    first: NDArray[np.int64]
    border: NDArray[np.bool_]
    touching: NDArray[np.int32]

    @property
    def count(self) -> int:
        """Number of labels."""
        return len(self.sizes)

    @classmethod
    def from_bytes(cls, data: bytes) -> TileSummary:
        """Returns the summary in the bytes of a `TileRecord`, which may be from any source.

        Raises:
            DamageError: if there is none. The message continues from a name.
            RunError: if an older version wrote them.
        """
        return _summary(_blocks(data)[0])


@dataclass(frozen=True, eq=False)
class TileRecord(TileSummary):
    """What the union of all tiles needs to know of the labels of one tile.

    Attributes:
        low: labels on the first plane of the tile along z, y and x, int32, each with the two
            other axes; of shape (0, 0) where no other tile with the same objects follows. They
            are numbered from 1 in the order of `touching`; 0 for none.
        high: labels on the last planes, likewise.
    """

    low: Faces
    high: Faces

    @classmethod
    def of(
        cls,
        labels: NDArray[np.int32],
        count: int,
        write: Box,
        shape: Sequence[int],
        connection: Connection,
        touching: NDArray[np.int32] | None = None,
    ) -> TileRecord:
        """Returns the record of a tile.

        Args:
            labels: of `label_components`, with the shape of `write`.
            count: number of labels.
            write: the voxels of the tile.
            shape: shape of the volume (z, y, x).
            connection: with which the tile was labelled.
            touching: as above; by default the labels on the faces.
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
        low = [_plane(labels, axis, 0) if before[axis] else empty for axis in range(3)]
        high = [_plane(labels, axis, -1) if after[axis] else empty for axis in range(3)]
        if touching is None:
            touches = np.zeros(count + 1, np.bool_)
            for face in (*low, *high):
                _mark(face, touches)
            touching = np.flatnonzero(touches[1:]).astype(np.int32) + np.int32(1)
        ranks = np.zeros(count + 1, np.int32)
        ranks[touching] = np.arange(1, len(touching) + 1)
        faces = (tuple(ranks.take(face) for face in planes) for planes in (low, high))
        return cls(write, tuple(shape), sizes, first, border[1:], touching, *faces)

    def to_bytes(self) -> bytes:
        """Returns the record as two compressed blocks with checksums: summary and faces.

        Raises:
            RunError: if one of them exceeds 1 GiB.
        """
        position = np.array([self.write.start, self.write.stop, self.shape], np.int64)
        # Differences are small numbers, which compress well.
        first = np.diff(self.first, prepend=0)
        head = pack(_SUMMARY, [position, self.sizes, first, self.border, self.touching])
        return pack_pair(_KIND, head, self._tail())

    def _tail(self) -> bytes:
        """Returns all but the summary as a block."""
        return pack(_FACES, packed_faces(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Reverses `to_bytes`, for bytes from any source.

        Raises:
            DamageError: if `data` is not such a record. The message continues from a name.
            RunError: if an older version wrote it.
        """
        head, tail = _blocks(data)
        return cls._parsed(_summary(head), tail)

    @classmethod
    def _parsed(cls, summary: TileSummary, tail: bytes) -> Self:
        """Reverses `_tail`."""
        low, high = faces_of(summary, unpack(_FACES, face_dtypes(summary), tail))
        return cls(**vars(summary), low=low, high=high)


def _blocks(data: bytes) -> tuple[bytes, bytes]:
    """Returns summary and faces of a record, whose bytes may be from any source."""
    if data.startswith(_OLDER):
        # Its checksum is right, so `verify --repair` finds no damage.
        raise RunError(
            "An older version of unet-ray has labelled the objects; start over with --overwrite, "
            "or finish the store with that version."
        )
    return unpack_pair(_KIND, data)


def _summary(head: bytes) -> TileSummary:
    """Reverses the first block of `TileRecord.to_bytes`."""
    dtypes = ["<i8", "<i8", "<i8", "|u1", "<i4"]
    position, sizes, differences, border, touching = unpack(_SUMMARY, dtypes, head)
    try:
        start, stop, shape = (tuple(row) for row in position.reshape(3, 3).tolist())
        write, whole = Box(start, stop), Box.of(shape)
    except ValueError as error:
        raise DamageError("its parts have different sizes") from error
    first, n = np.cumsum(differences), len(sizes)
    valid = (
        write.size > 0
        and write.intersect(whole) == write
        and len(first) == len(border) == n
        and (n == 0 or 0 <= first[0] <= first[-1] < whole.size)
        and bool((first[1:] > first[:-1]).all() and (sizes > 0).all())
        and (len(touching) == 0 or 1 <= touching[0] <= touching[-1] <= n)
        and bool((touching[1:] > touching[:-1]).all())
    )
    if not valid:
        raise DamageError("it is not the record of a tile")
    return TileSummary(write, shape, sizes, first, border != 0, touching)


def face_dtypes(tile: TileSummary) -> list[str]:
    """Returns the dtypes of `packed_faces`: nearly always 16 bits, which are packed faster."""
    return ["<u2" if len(tile.touching) < 1 << 16 else "<i4"] * 6


def packed_faces(tile: TileRecord) -> list[NDArray[Any]]:
    """Returns the faces of a record, as they are stored."""
    dtypes = zip((*tile.low, *tile.high), face_dtypes(tile), strict=True)
    return [face.astype(dtype) for face, dtype in dtypes]


def faces_of(tile: TileSummary, packed: Sequence[NDArray[Any]]) -> tuple[Faces, Faces]:
    """Reverses `packed_faces`; returns low and high, each with memory of its own.

    Raises:
        DamageError: if they are not the faces of this tile.
    """
    if not all(0 <= a.min(initial=0) <= a.max(initial=0) <= len(tile.touching) for a in packed):
        raise DamageError("a label on its faces does not touch other tiles")
    try:
        faces = tuple(
            face.reshape(_without(tile.write.shape, axis) if face.size else (0, 0)).astype("<i4")
            for axis, face in zip((0, 1, 2) * 2, packed, strict=True)
        )
    except ValueError as error:
        raise DamageError("its faces have other shapes") from error
    return faces[:3], faces[3:]


def _plane(labels: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    """Returns a copy of one plane of `labels`."""
    return np.ascontiguousarray(labels.take(index, axis))


def _without(extents: Sequence[int], axis: int) -> Ints:
    return (*extents[:axis], *extents[axis + 1 :])


@compiled
def _mark(face: NDArray[np.int32], touches: NDArray[np.bool_]) -> None:
    """Marks the labels on a face, several times as fast as NumPy."""
    for y in range(face.shape[0]):
        for x in range(face.shape[1]):
            touches[face[y, x]] = True


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
