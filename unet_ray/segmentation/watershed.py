"""Splits objects at their necks by a watershed of the distance to the background, in one tile.

Knows the voxels of a tile and those around it. Does not know other tiles, files or classes:
`basins.py` unites the tiles.

The height of a voxel is its smoothed distance to the background. It depends only on voxels within
`margin`. Each voxel points to its highest neighbour (steepest ascent; Zlateski and Seung 2015), and
the voxels whose pointers lead to the same top form a basin. Two basins meet at a neck. Where the
neck is hardly lower than the tops, they are one object. Heights are integers and all ties are
decided by position, so the objects of a volume do not depend on its tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from unet_ray.compiled import compiled
from unet_ray.errors import DamageError
from unet_ray.segmentation.components import (
    Connection,
    Faces,
    TileRecord,
    TileSummary,
    face_dtypes,
    faces_of,
    packed_faces,
)
from unet_ray.segmentation.forest import root
from unet_ray.segmentation.packing import pack, unpack
from unet_ray.tiling.boxes import Box, Ints

_KIND = b"basins-2"

# Distances are capped here, so that a margin suffices: an object is split only where half the
# width of its neck is below this. The margin of a volume costs more, so its cap is lower.
REACH = {"slice": 64, "volume": 32}
# A distance of one voxel is as many heights before smoothing.
STEPS = 16
# Weights (1, 2, 3, 2, 1) along each axis. Without them, rough outlines have many tops.
SMOOTHING = 9
SMOOTHING_RADIUS = 2
# A neck separates two basins if it is lower than 9/10 of the lower top, and at least 3/4 of a
# voxel below it. Chosen on touching cells, nuclei and discs with radii of 5 to 110 voxels.
NECK_SHARE = (9, 10)
NECK_DEPTH = (3, 4)


def margin(connection: Connection) -> Ints:
    """Returns the voxels to read around a tile, per axis (z, y, x)."""
    # One voxel beyond the tile is compared with it. Its smoothing needs distances, of which only
    # those below the reach are measured.
    width = 1 + SMOOTHING_RADIUS + (REACH[connection.connect] - 1)
    return (0 if connection.connect == "slice" else width, width, width)


def window(write: Box, shape: Sequence[int], connection: Connection) -> Box:
    """Returns the voxels to read for the tile `write` in a volume of `shape`."""
    width = margin(connection)
    return write.grow(width, width).intersect(Box.of(shape))


def voxel_height(connection: Connection) -> int:
    """Returns the height of a voxel at a distance of one voxel, far from other outlines."""
    return STEPS * SMOOTHING ** (2 if connection.connect == "slice" else 3)


def heights(foreground: NDArray[np.bool_], connection: Connection) -> NDArray[np.int32]:
    """Returns the smoothed distance of each voxel to the background.

    Args:
        foreground: (z, y, x), True in objects. Voxels outside are unknown, not background.
        connection: with ``slice``, distances are measured within each slice.

    Returns:
        Heights, (z, y, x), 0 in the background and at least 1 in the foreground; `voxel_height`
        for each voxel of distance.
    """
    cap, flat = REACH[connection.connect], connection.connect == "slice"
    table = [math.isqrt(STEPS * STEPS * squared) for squared in range(cap * cap + 1)]
    result = np.empty(foreground.shape, np.int32)
    for z in range(len(foreground) if flat else 1):
        part = slice(z, z + 1) if flat else slice(None)
        mask, height = foreground[part], result[part]
        squared = np.empty(mask.shape, np.float32)  # exact: the integers are below 2^24
        _distances_along_x(mask, cap, squared)
        _distances_along_y(squared, cap)
        if not flat:
            _distances_along_y(squared.transpose(1, 0, 2), cap)
        _look_up(squared, np.array(table, np.int32), height)
        _smooth_along_x(height)
        _smooth_along_y(height)
        if not flat:
            _smooth_along_y(height.transpose(1, 0, 2))
        height[~mask] = 0
    return result


def basin_bytes(read: Box, write: Box, connection: Connection) -> int:
    """Memory of `label_basins`, in bytes, besides the foreground; see `window` for `read`."""
    flat = connection.connect == "slice"
    # Distances and heights of all that is read. Then heights, parents and labels of the tile, and
    # the necks, of which noise has most.
    return (5 if flat else 9) * read.size + 48 * math.prod(n + 2 for n in write.shape)


@dataclass(frozen=True, eq=False)
class BasinRecord(TileRecord):
    """What the union of all tiles needs to know of the `n` labels of one tile.

    A component of the tile that touches no other tile is already split into whole objects, one
    label each. The labels of all other components are open: each is a basin, or a part of one.
    The `m` labels in `touching` are the open ones.

    Attributes:
        tops: height of the highest voxel of each open label, int32, shape (m,).
        targets: linear index, in the whole volume, of the voxel of another tile to which all
            pointers of an open label lead; -1 if they lead to a top in this tile; int64, shape
            (m,).
        necks: int32, shape (k, 3): two open labels that touch, as positions in `touching`, the
            first lower, and the greatest height of a path between them.
        low_heights: heights of the voxels of `low`, int32, of the same shapes.
        high_heights: heights of the voxels of `high`, likewise.
    """

    tops: NDArray[np.int32]
    targets: NDArray[np.int64]
    necks: NDArray[np.int32]
    low_heights: Faces
    high_heights: Faces

    def _tail(self) -> bytes:
        planes = *self.low_heights, *self.high_heights
        arrays = [*packed_faces(self), self.tops, self.targets, self.necks, *planes]
        return pack(_KIND, arrays)

    @classmethod
    def _parsed(cls, summary: TileSummary, tail: bytes) -> Self:
        dtypes = [*face_dtypes(summary), "<i4", "<i8", *["<i4"] * 7]
        arrays = unpack(_KIND, dtypes, tail)
        low, high = faces_of(summary, arrays[:6])
        tops, targets, necks, *planes = arrays[6:]
        labels, m = (*low, *high), len(summary.touching)
        valid = (
            len(tops) == len(targets) == m
            and len(necks) % 3 == 0
            and all(a.size == b.size for a, b in zip(planes, labels, strict=True))
        )
        pairs = necks.reshape(-1, 3)[:, :2] if valid else necks
        if not valid or not 0 <= pairs.min(initial=0) <= pairs.max(initial=-1) + 1 <= m:
            raise DamageError("it is not the record of a tile with basins")
        shaped = tuple(a.reshape(b.shape) for a, b in zip(planes, labels, strict=True))
        return cls(
            **vars(summary),
            low=low,
            high=high,
            tops=tops,
            targets=targets,
            necks=necks.reshape(-1, 3),
            low_heights=shaped[:3],
            high_heights=shaped[3:],
        )


def label_basins(
    foreground: NDArray[np.bool_],
    read: Box,
    write: Box,
    shape: Sequence[int],
    connection: Connection,
) -> tuple[NDArray[np.int32], BasinRecord]:
    """Labels the basins of a tile, in the order of their first voxels.

    Args:
        foreground: the voxels of `read`, (z, y, x), True in objects.
        read: `write` and its margin; see `window`.
        write: the voxels of the tile.
        shape: shape of the volume (z, y, x).
        connection: which voxels are neighbours.

    Returns:
        Labels (z, y, x) of the tile from 1, 0 outside of objects, and the record.

    Raises:
        ValueError: if `read` is not the tile and its margin.
    """
    if read != window(write, shape, connection) or foreground.shape != read.shape:
        raise ValueError(f"Tile {write} must be read with its margin, not as {read}.")
    height = _padded(heights(foreground, connection), read, write)
    steps = np.argwhere(connection.structure) - 1
    labels, ends = _label(height, write, steps)
    tops, targets = _ends(height, ends, steps, np.array(write.start), np.array(shape))
    # The steps before the centre reach each pair of neighbours once.
    along = [_necks_along(labels, height, step) for step in steps[: len(steps) // 2]]
    necks = highest_necks(np.concatenate(along))
    is_open = _open(necks, TileRecord.of(labels, len(ends), write, shape, connection))
    between_open = is_open[necks[:, 0] - 1]
    merged = _split(necks[~between_open], tops.copy(), connection)
    numbers = np.concatenate([[0], _ranks(merged == np.arange(len(ends)))[merged]])
    _renumber(labels, numbers)
    necks = necks[between_open]
    necks[:, :2] = _ranks(is_open)[necks[:, :2] - 1] - 1
    opened = numbers[1:][is_open].astype(np.int32)
    record = TileRecord.of(labels, int(numbers.max()), write, shape, connection, opened)
    inner = height[1:-1, 1:-1, 1:-1]
    return labels, BasinRecord(
        **vars(record),
        tops=tops[is_open],
        targets=targets[is_open],
        necks=necks,
        low_heights=_faces(inner, record.low, 0),
        high_heights=_faces(inner, record.high, -1),
    )


def _label(
    height: NDArray[np.int32], write: Box, steps: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Labels the basins of a tile, and returns where the pointers of each label end."""
    labels, parents = np.zeros(write.shape, np.int32), np.arange(write.size, dtype=np.int32)
    ends = np.empty(_climb(height, steps, parents), np.int64)
    _number(height, parents, labels, ends)
    return labels, ends


def _faces(height: NDArray[np.int32], planes: Faces, index: int) -> Faces:
    """Returns the heights of the first or last planes of a tile, where there are `planes`."""
    empty = np.zeros((0, 0), np.int32)
    return tuple(
        np.asarray(height.take(index, axis)) if plane.size else empty
        for axis, plane in enumerate(planes)
    )


def _ranks(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Numbers the chosen ones from 1; the numbers of others have no meaning."""
    return np.cumsum(chosen, dtype=np.int64)


def _padded(height: NDArray[np.int32], read: Box, write: Box) -> NDArray[np.int32]:
    """Cuts heights to a tile and one voxel around it, which is 0 outside of the volume."""
    ring = write.grow((1, 1, 1), (1, 1, 1))
    inside = ring.intersect(read)
    padded = np.zeros(ring.shape, np.int32)
    padded[inside.relative_to(ring.start).slices] = height[inside.relative_to(read.start).slices]
    return padded


def highest_necks(necks: NDArray[np.int32]) -> NDArray[np.int32]:
    """Returns the highest neck of each pair of labels, sorted by label.

    Args:
        necks: rows (label, other label, height), int32, shape (k, 3).
    """
    rows = necks[np.lexsort((necks[:, 2], necks[:, 1], necks[:, 0]))]
    last = np.ones(len(rows), np.bool_)
    last[:-1] = (rows[1:, :2] != rows[:-1, :2]).any(1)
    return rows[last]


def _necks_along(
    labels: NDArray[np.int32], height: NDArray[np.int32], step: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Returns the highest necks between voxels that are one step apart."""
    rows = np.empty((_find_necks(labels, height, step, np.empty((0, 3), np.int32)), 3), np.int32)
    _find_necks(labels, height, step, rows)
    return highest_necks(rows)


def _open(necks: NDArray[np.int32], tile: TileRecord) -> NDArray[np.bool_]:
    """Whether the component of each label touches another tile, shape (labels,)."""
    parents = np.arange(tile.count)
    _connect(parents, necks)
    touches = np.zeros(tile.count, np.bool_)
    touches[parents[tile.touching - 1]] = True
    return touches[parents]


def _split(
    necks: NDArray[np.int32], tops: NDArray[np.int32], connection: Connection
) -> NDArray[np.int64]:
    """Merges the basins of a tile that no neck separates; returns the first basin of each."""
    parents = np.arange(len(tops))
    ordered = necks[np.argsort(-necks[:, 2], kind="stable")]
    pairs = ordered[:, :2].astype(np.int64) - 1
    merge(parents, tops, pairs, ordered[:, 2], voxel_height(connection))
    return parents


@compiled
def _distances_along_x(mask: NDArray[np.bool_], cap: int, squared: NDArray[np.float32]) -> None:
    """Writes the squared distance to the background along x, at most the square of `cap`."""
    depth, height, width = mask.shape
    for z in range(depth):
        for y in range(height):
            distance = cap
            for x in range(width):
                distance = min(distance + 1, cap) if mask[z, y, x] else 0
                squared[z, y, x] = distance
            distance = cap
            for x in range(width - 1, -1, -1):
                distance = min(distance + 1, cap) if mask[z, y, x] else 0
                nearest = min(squared[z, y, x], np.float32(distance))
                squared[z, y, x] = nearest * nearest


@compiled
def _distances_along_y(squared: NDArray[np.float32], cap: int) -> None:
    """Adds the distance along the second axis to squared distances, in place.

    Whole rows are compared at a time, which compilers turn into vector instructions: several times
    as fast as the usual lower envelope of parabolas, since distances are capped.
    """
    depth, height, width = squared.shape
    nearest = np.empty((height, width), np.float32)
    for z in range(depth):
        plane = squared[z]
        for y in range(height):
            row = nearest[y]
            row[:] = plane[y]
            for k in range(1, cap):
                added = np.float32(k * k)
                if k % 4 == 1 and _greatest(row) <= added:
                    break
                before, after = plane[max(y - k, 0)], plane[min(y + k, height - 1)]
                for x in range(width):
                    row[x] = min(row[x], min(before[x], after[x]) + added)
        plane[:] = nearest


@compiled
def _greatest(row: NDArray[np.float32]) -> np.float32:
    greatest = np.float32(0)
    for x in range(len(row)):
        greatest = max(greatest, row[x])
    return greatest


@compiled
def _look_up(
    squared: NDArray[np.float32], table: NDArray[np.int32], height: NDArray[np.int32]
) -> None:
    for z in range(squared.shape[0]):
        for y in range(squared.shape[1]):
            for x in range(squared.shape[2]):
                height[z, y, x] = table[int(squared[z, y, x])]


@compiled
def _smooth_along_x(height: NDArray[np.int32]) -> None:
    depth, rows, width = height.shape
    source = np.empty(width + 4, np.int32)
    for z in range(depth):
        for y in range(rows):
            row = height[z, y]
            source[2:-2] = row
            source[:2] = row[0]
            source[-2:] = row[-1]
            for x in range(width):
                sides = 2 * (source[x + 1] + source[x + 3]) + source[x] + source[x + 4]
                row[x] = 3 * source[x + 2] + sides


@compiled
def _smooth_along_y(height: NDArray[np.int32]) -> None:
    depth, rows, width = height.shape
    source = np.empty((rows, width), np.int32)
    for z in range(depth):
        source[:] = height[z]
        for y in range(rows):
            row, middle = height[z, y], source[y]
            b, d = source[max(y - 1, 0)], source[min(y + 1, rows - 1)]
            a, e = source[max(y - 2, 0)], source[min(y + 2, rows - 1)]
            for x in range(width):
                row[x] = 3 * middle[x] + 2 * (b[x] + d[x]) + a[x] + e[x]


@compiled
def _steepest(height: NDArray[np.int32], z: int, y: int, x: int, steps: NDArray[np.int64]) -> int:
    """Returns the step to the highest neighbour, the first one of equals; -1 if none is higher."""
    best, step = height[z, y, x], -1
    for k in range(len(steps)):
        other = height[z + steps[k, 0], y + steps[k, 1], x + steps[k, 2]]
        if other > best:
            best, step = other, k
    return step


@compiled
def _climb(height: NDArray[np.int32], steps: NDArray[np.int64], parents: NDArray[np.int32]) -> int:
    """Lets each voxel of a tile point to its highest neighbour, and unites flat tops, in place.

    Args:
        height: of the tile and one voxel around it.
        steps: to the neighbours, in scan order.
        parents: linear index of each voxel in the tile.

    Returns:
        Number of voxels that point to themselves: the first voxel of each top, and voxels that
        point to another tile.
    """
    depth, rows, width = height.shape[0] - 2, height.shape[1] - 2, height.shape[2] - 2
    ends = 0
    for z in range(depth):
        for y in range(rows):
            for x in range(width):
                here = height[z + 1, y + 1, x + 1]
                if here == 0:
                    continue
                i = (z * rows + y) * width + x
                ends += 1
                k = _steepest(height, z + 1, y + 1, x + 1, steps)
                if k >= 0:
                    w, v, u = z + steps[k, 0], y + steps[k, 1], x + steps[k, 2]
                    if 0 <= w < depth and 0 <= v < rows and 0 <= u < width:
                        parents[i] = (w * rows + v) * width + u
                        ends -= 1
                    continue
                for k in range(len(steps) // 2):
                    w, v, u = z + steps[k, 0], y + steps[k, 1], x + steps[k, 2]
                    inside = 0 <= w < depth and 0 <= v < rows and 0 <= u < width
                    if (
                        inside
                        and height[w + 1, v + 1, u + 1] == here
                        and _steepest(height, w + 1, v + 1, u + 1, steps) < 0
                    ):
                        a, b = root(parents, i), root(parents, (w * rows + v) * width + u)
                        parents[max(a, b)] = min(a, b)
                        ends -= a != b
    return ends


@compiled
def _number(
    height: NDArray[np.int32],
    parents: NDArray[np.int32],
    labels: NDArray[np.int32],
    ends: NDArray[np.int64],
) -> None:
    """Labels the voxels whose pointers have the same end, and notes the end of each label."""
    depth, rows, width = labels.shape
    flat = labels.ravel()
    i = count = 0
    for z in range(depth):
        for y in range(rows):
            for x in range(width):
                if height[z + 1, y + 1, x + 1]:
                    end = root(parents, i)
                    if flat[end] == 0:
                        ends[count] = end
                        count += 1
                        flat[end] = count
                    flat[i] = flat[end]
                i += 1


@compiled
def _ends(
    height: NDArray[np.int32],
    ends: NDArray[np.int64],
    steps: NDArray[np.int64],
    start: NDArray[np.int64],
    shape: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Returns the height of each label's end, and the voxel of another tile to which it points."""
    rows, width = height.shape[1] - 2, height.shape[2] - 2
    tops, targets = np.empty(len(ends), np.int32), np.full(len(ends), -1)
    for label in range(len(ends)):
        z, rest = divmod(ends[label], rows * width)
        y, x = divmod(rest, width)
        tops[label] = height[z + 1, y + 1, x + 1]
        k = _steepest(height, z + 1, y + 1, x + 1, steps)
        if k >= 0:
            z, y, x = start[0] + z + steps[k, 0], start[1] + y + steps[k, 1], x + steps[k, 2]
            targets[label] = (z * shape[1] + y) * shape[2] + start[2] + x
    return tops, targets


@compiled
def _find_necks(
    labels: NDArray[np.int32],
    height: NDArray[np.int32],
    step: NDArray[np.int64],
    rows: NDArray[np.int32],
) -> int:
    """Writes (lower label, higher label, height) where voxels one step apart differ in label.

    Returns the number of such pairs, also of those beyond the end of `rows`.
    """
    extents, count = labels.shape, 0
    dz, dy, dx = step
    for z in range(max(0, -dz), min(extents[0], extents[0] - dz)):
        for y in range(max(0, -dy), min(extents[1], extents[1] - dy)):
            for x in range(max(0, -dx), min(extents[2], extents[2] - dx)):
                a, b = labels[z, y, x], labels[z + dz, y + dy, x + dx]
                if a and b and a != b:
                    if count < len(rows):
                        here = height[z + 1, y + 1, x + 1]
                        there = height[z + dz + 1, y + dy + 1, x + dx + 1]
                        rows[count, 0], rows[count, 1] = min(a, b), max(a, b)
                        rows[count, 2] = min(here, there)
                    count += 1
    return count


@compiled
def _renumber(labels: NDArray[np.int32], numbers: NDArray[np.int64]) -> None:
    flat = labels.ravel()
    for i in range(len(flat)):
        flat[i] = numbers[flat[i]]


@compiled
def _connect(parents: NDArray[np.int64], necks: NDArray[np.int32]) -> None:
    """Unites labels with a neck of any height, in place; each then points to its root."""
    for row in range(len(necks)):
        a, b = root(parents, necks[row, 0] - 1), root(parents, necks[row, 1] - 1)
        parents[max(a, b)] = min(a, b)
    for label in range(len(parents)):
        parents[label] = parents[parents[label]]


@compiled
def merge(
    parents: NDArray[np.int64],
    tops: NDArray[np.int32],
    pairs: NDArray[np.int64],
    necks: NDArray[np.int32],
    unit: int,
) -> None:
    """Merges the basins that no neck separates, in place; each then points to its root.

    Args:
        parents: of the basins; of two basins, the lower number becomes the root.
        tops: their greatest heights.
        pairs: numbers of basins that touch, shape (k, 2), in descending order of their necks.
            The order of equal necks decides between basins that touch several others.
        necks: heights of the necks.
        unit: height of a voxel of distance.
    """
    share, of = NECK_SHARE
    depth, parts = NECK_DEPTH
    for row in range(len(pairs)):
        a, b = root(parents, pairs[row, 0]), root(parents, pairs[row, 1])
        lower, neck = min(tops[a], tops[b]), necks[row]
        if a != b and (of * neck > share * lower or parts * (lower - neck) < depth * unit):
            a, b = min(a, b), max(a, b)
            parents[b] = a
            tops[a] = max(tops[a], tops[b])
    for label in range(len(parents)):
        parents[label] = parents[parents[label]]
