"""The table of objects: partial sums of each tile, merged to one row per object, as Parquet.

Knows ids, probabilities and grey values of one tile at a time. Does not know files, or how objects
get their ids.

Sums of integers are exact, so rows do not depend on the tiles. Means of floating-point images
depend on them in the last digits.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unet_ray.compiled import compiled
from unet_ray.errors import DamageError, RunError
from unet_ray.segmentation.components import Connection
from unet_ray.segmentation.packing import pack, unpack
from unet_ray.tiling.boxes import Box
from unet_ray.units import format_bytes

_KIND = b"objects1"
_AXES = ("z", "y", "x")
_MOST_CHANNELS = 1 << 16
_PIECE = 1 << 16  # voxels that are converted together; they fit the cache of a core
ROW_GROUP = 1 << 20  # rows of a part of a Parquet file
# Tables of tiles are gathered up to this size, or half of the merged table, before a merge.
BATCH_BYTES = 32 << 20
# At a merge there are the merged rows, half as many new ones, the result, and one column more; at
# the end the sums, the table and the file.
_COPIES = 4


@dataclass(frozen=True, eq=False)
class TileRows:
    """Sums over the voxels of the `n` objects of a tile, or of several tiles.

    Attributes:
        ids: uint64, shape (n,), ascending, above 0.
        voxels: number of voxels, int64, shape (n,).
        positions: sums of the positions in the volume, int64, shape (n, 3).
        start: lowest position, int64, shape (n, 3).
        stop: highest position + 1, int64, shape (n, 3).
        border: whether the object touches the border of the volume, bool, shape (n,).
        probabilities: sums of the stored values (0 to 255) over all foreground channels, int64,
            shape (n, 1); (n, 0) without probabilities.
        greys: sums of integer grey values per channel, int64, shape (n, channels); (n, 0)
            without an image, or if its values are not integers of at most 32 bits.
        floats: sums of other grey values per channel, float64, likewise.
    """

    ids: NDArray[np.uint64]
    voxels: NDArray[np.int64]
    positions: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    border: NDArray[np.bool_]
    probabilities: NDArray[np.int64]
    greys: NDArray[np.int64]
    floats: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        labels: NDArray[np.int32],
        ids: NDArray[np.uint64],
        write: Box,
        shape: Sequence[int],
        probabilities: NDArray[np.uint8] | None,
        grey: NDArray[Any] | None,
        connection: Connection,
    ) -> TileRows:
        """Sums over the objects of a tile.

        Args:
            labels: label of each voxel (z, y, x), 0 outside of objects.
            ids: id of each label, shape (labels + 1,), 0 for label 0 and for removed objects.
                Several labels may have the same id. Each label has voxels.
            write: the voxels of the tile.
            shape: shape of the volume (z, y, x).
            probabilities: of the foreground channels (c, z, y, x), or None.
            grey: the input image (c, z, y, x), of any real dtype, or None.
            connection: decides which axes have a border.
        """
        labels = np.ascontiguousarray(labels)
        # Labels count up from 1, so their row needs no search. Row 0 is the background.
        distinct, rows = np.unique(ids, return_inverse=True)
        n = len(distinct)
        voxels, positions = np.zeros(n, np.int64), np.zeros((n, 3), np.int64)
        start = np.full((n, 3), np.iinfo(np.int64).max)
        stop = np.zeros((n, 3), np.int64)
        _measure(labels, rows, np.array(write.start), voxels, positions, start, stop)
        border = np.zeros(n, np.bool_)
        for axis in connection.borders(shape):
            border |= (start[:, axis] == 0) | (stop[:, axis] == shape[axis])
        exact = grey is not None and grey.dtype.kind in "bui" and grey.dtype.itemsize <= 4
        foreground = _sums(labels, rows, n, probabilities, np.int64).sum(1, keepdims=True)
        return cls(
            distinct[1:],
            voxels[1:],
            positions[1:],
            start[1:],
            stop[1:],
            border[1:],
            foreground[1:] if probabilities is not None else foreground[1:, :0],
            _sums(labels, rows, n, grey if exact else None, np.int64)[1:],
            _sums(labels, rows, n, None if exact else grey, np.float64)[1:],
        )

    @classmethod
    def none(cls) -> TileRows:
        """Returns rows of no object, without probabilities and image."""
        labels, ids = np.zeros((0, 0, 0), np.int32), np.zeros(1, np.uint64)
        return cls.of(labels, ids, Box((0, 0, 0), (0, 0, 0)), (0, 0, 0), None, None, Connection())

    @property
    def channels(self) -> int:
        """Number of channels of the image."""
        return int(self.greys.shape[1] + self.floats.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def merged(cls, parts: Sequence[TileRows]) -> TileRows:
        """Sums the rows of the same objects.

        Raises:
            DamageError: if the parts do not have the same channels.
        """
        ids = np.concatenate([part.ids for part in parts])
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: len(ids)])
        rules = {"start": np.minimum, "stop": np.maximum, "border": np.logical_or}
        columns = {}
        # One column after the other, so that only one exists twice.
        for name in (field.name for field in fields(cls) if field.name != "ids"):
            values = [getattr(part, name) for part in parts]
            if len({column.shape[1:] for column in values}) > 1:
                raise DamageError("The tables of tiles have different channels.")
            column = np.concatenate(values)[order]
            empty = column[:0]  # `reduceat` refuses an empty column
            columns[name] = (
                rules.get(name, np.add).reduceat(column, starts, axis=0) if len(ids) else empty
            )
        return cls(ids[starts], **columns)

    def to_bytes(self) -> bytes:
        """Returns the rows as a compressed block with a checksum.

        Raises:
            RunError: if they exceed 1 GiB.
        """
        channels = np.array([a.shape[1] for a in (self.probabilities, self.greys, self.floats)])
        return pack(_KIND, [channels, *(getattr(self, field.name) for field in fields(self))])

    @classmethod
    def from_bytes(cls, data: bytes) -> TileRows:
        """Reverses `to_bytes`, for bytes from any source.

        Raises:
            DamageError: if `data` is not the table of a tile. The message continues from a name.
        """
        dtypes = ["<i8", "<u8", "<i8", "<i8", "<i8", "<i8", "|u1", "<i8", "<i8", "<f8"]
        channels, ids, voxels, positions, start, stop, border, *sums = unpack(_KIND, dtypes, data)
        n = len(ids)
        try:
            if not (0 <= channels.min() <= channels.max() <= _MOST_CHANNELS):
                raise ValueError("impossible channels")
            positions, start, stop = (a.reshape(n, 3) for a in (positions, start, stop))
            foreground, greys, floats = (
                column.reshape(n, count)
                for column, count in zip(sums, channels.tolist(), strict=True)
            )
            border = border.reshape(n) != 0
            voxels = voxels.reshape(n)
        except ValueError as error:
            raise DamageError("its columns have different lengths") from error
        ascending = (ids > 0).all() and (ids[1:] > ids[:-1]).all()
        boxes = ((start >= 0) & (start < stop)).all() and (voxels > 0).all()
        if not (ascending and boxes):
            raise DamageError("it is not the table of a tile")
        return cls(ids, voxels, positions, start, stop, border, foreground, greys, floats)


def table_bytes(objects: int, channels: int) -> int:
    """Memory of `merge_rows` and `write_table`, in bytes, besides the rows of one tile.

    Args:
        objects: number of objects of the volume.
        channels: channels of the input image.
    """
    return _COPIES * _row_bytes(channels) * objects + BATCH_BYTES


def merge_rows(
    rows: Iterable[TileRows], voxel_size: Sequence[float] | None, max_bytes: int
) -> pa.Table:
    """Returns the table of objects, one row per object, in ascending order of the ids.

    Args:
        rows: of all tiles, each read when it is needed.
        voxel_size: in micrometres (z, y, x); None if unknown.
        max_bytes: the available memory; see `table_bytes`.

    Returns:
        Columns `id` and `voxels` (uint64), `volume` (float64, cubic micrometres, null if the voxel
        size is unknown), `centroid_*` (float64, voxels), `start_*` and `stop_*` (int64, voxels, a
        half-open box), `mean_probability` (float64, 0 to 1, absent without probabilities),
        `mean_grey_0`, … (float64, absent without an image) and `border` (bool). The metadata of a
        column states its unit.

    Raises:
        RunError: if `max_bytes` is too small; names the needed memory and the remedy.
        DamageError: if the tiles do not have the same channels.
    """
    return _table(_total(iter(rows), max_bytes), voxel_size)


def write_table(table: pa.Table) -> bytes:
    """Returns a table as a Parquet file. The same table gives the same bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP)
    return sink.getvalue()


def _total(parts: Iterator[TileRows], max_bytes: int) -> TileRows:
    """Sums the rows of all tiles, a batch of tiles at a time."""
    batch: list[TileRows] = []  # the merged rows, then new ones
    new = 0
    for part in parts:
        if batch and not len(part):
            continue
        batch.append(part)
        new += len(part)
        size = _row_bytes(part.channels)
        if size * new >= max(BATCH_BYTES, size * len(batch[0]) // 2):
            batch, new = [TileRows.merged(batch)], 0
            _refuse_above(max_bytes, batch[0], parts)
    total = TileRows.merged(batch or [TileRows.none()])
    _refuse_above(max_bytes, total, parts)
    return total


def _refuse_above(max_bytes: int, rows: TileRows, others: Iterator[TileRows]) -> None:
    if table_bytes(len(rows), rows.channels) > max_bytes:
        objects = len(rows) + sum(map(len, others))
        needed = table_bytes(objects, rows.channels)
        raise RunError(
            f"The table of up to {objects} objects needs {format_bytes(needed)}, and "
            f"{format_bytes(max_bytes)} are allowed; use --memory {-(-needed // (1 << 20))}MiB or "
            "more, or a larger --min-size."
        )


def _row_bytes(channels: int) -> int:
    return 97 + 8 * channels


def _table(rows: TileRows, voxel_size: Sequence[float] | None) -> pa.Table:
    """Returns the columns of `merge_rows`, each with its unit."""
    voxel = math.nan if voxel_size is None else math.prod(voxel_size)
    volume = pa.array(rows.voxels * voxel, pa.float64(), mask=np.full(len(rows), voxel != voxel))
    columns: list[tuple[str, str, Any]] = [
        ("id", "", rows.ids),
        ("voxels", "voxel", rows.voxels.astype(np.uint64)),
        ("volume", "micrometer^3", volume),
    ]
    centroid = rows.positions / rows.voxels[:, None]
    for name, values in (("centroid", centroid), ("start", rows.start), ("stop", rows.stop)):
        columns += [(f"{name}_{_AXES[axis]}", "voxel", values[:, axis]) for axis in range(3)]
    if rows.probabilities.shape[1]:
        mean = rows.probabilities[:, 0] / (255 * rows.voxels)
        columns.append(("mean_probability", "", mean))
    greys = np.concatenate([rows.greys, rows.floats], 1)
    for channel in range(greys.shape[1]):
        mean = greys[:, channel] / rows.voxels
        columns.append((f"mean_grey_{channel}", "grey value", mean))
    columns.append(("border", "", rows.border))
    arrays = [
        pa.array(np.ascontiguousarray(v)) if isinstance(v, np.ndarray) else v for *_, v in columns
    ]
    schema = pa.schema(
        pa.field(name, array.type, metadata={"unit": unit} if unit else None)
        for (name, unit, _), array in zip(columns, arrays, strict=True)
    )
    return pa.Table.from_arrays(arrays, schema=schema)


def _sums(
    labels: NDArray[np.int32],
    rows: NDArray[np.int64],
    count: int,
    channels: NDArray[Any] | None,
    dtype: type[np.int64 | np.float64],
) -> NDArray[Any]:
    """Sums the values of each of `count` rows and each channel, in `dtype`; (count, channels)."""
    sums = np.zeros((0 if channels is None else len(channels), count), dtype)
    flat = labels.reshape(-1)
    for channel, totals in zip(() if channels is None else channels, sums, strict=True):
        values = channel.reshape(-1)
        for low in range(0, len(flat), _PIECE):
            piece = slice(low, low + _PIECE)
            # Of one dtype, since each further one would be compiled again.
            _add(flat[piece], rows, values[piece].astype(dtype), totals)
    return sums.T


@compiled
def _measure(
    labels: NDArray[np.int32],
    rows: NDArray[np.int64],
    origin: NDArray[np.int64],
    voxels: NDArray[np.int64],
    positions: NDArray[np.int64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
) -> None:
    """Sums voxels and positions of each object, and bounds its box, in place.

    Args:
        labels: label of each voxel (z, y, x).
        rows: row of each label.
        origin: position of the first voxel in the volume.
        voxels: number of voxels of each row.
        positions: sums of positions, shape (rows, 3).
        start: lowest positions, likewise.
        stop: highest positions + 1, likewise.
    """
    width = labels.shape[2]
    for k in range(labels.shape[0]):
        z = origin[0] + k
        for j in range(labels.shape[1]):
            line, y, low = labels[k, j], origin[1] + j, 0
            while low < width:
                label, high = line[low], low + 1
                while high < width and line[high] == label:
                    high += 1
                if label:
                    row, n = rows[label], high - low
                    first, last = origin[2] + low, origin[2] + high - 1
                    voxels[row] += n
                    positions[row, 0] += n * z
                    positions[row, 1] += n * y
                    positions[row, 2] += n * (first + last) // 2
                    start[row, 0] = min(start[row, 0], z)
                    start[row, 1] = min(start[row, 1], y)
                    start[row, 2] = min(start[row, 2], first)
                    stop[row, 0] = max(stop[row, 0], z + 1)
                    stop[row, 1] = max(stop[row, 1], y + 1)
                    stop[row, 2] = max(stop[row, 2], last + 1)
                low = high


@compiled
def _add(
    labels: NDArray[np.int32],
    rows: NDArray[np.int64],
    values: NDArray[Any],
    sums: NDArray[Any],
) -> None:
    """Adds the values of the voxels of each object to its sum, in place, in their order.

    Args:
        labels: label of each voxel, 1-D.
        rows: row of each label.
        values: of each voxel, 1-D.
        sums: of each row, int64 or float64.
    """
    last, row = 0, rows[0]
    total = sums[row]  # of the object of the last voxels; few voxels change it
    for i in range(len(labels)):
        if labels[i] != last:
            sums[row] = total
            last = labels[i]
            row = rows[last]
            total = sums[row]
        total += values[i]
    sums[row] = total
