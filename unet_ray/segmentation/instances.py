"""The workers of the stages that make objects: label, join, write, table.

Knows which files each stage reads and writes. Does not know how components are labelled or united,
or who runs the tiles.

A tile is labelled twice, with equal labels. The first pass keeps only what other tiles need: the
labels on its faces, and the size and first voxel of each. The join unites these labels over the
whole volume. The second pass writes the final ids, so no shard ever contains others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine.stages import Whole
from unet_ray.segmentation.components import Connection, TileRecord, label_components
from unet_ray.segmentation.packing import pack, unpack
from unet_ray.segmentation.pyramid import Source
from unet_ray.segmentation.run import Segmentation, finite
from unet_ray.segmentation.table import TileRows, merge_rows, write_table
from unet_ray.segmentation.unions import holes, unite
from unet_ray.storage.layout import PRIVATE, TABLE
from unet_ray.storage.places import Place, write_whole
from unet_ray.storage.records import Records
from unet_ray.storage.shards import CHECKSUM_BYTES, checksum_of
from unet_ray.storage.stores import Store
from unet_ray.tiling.tiles import Tile

# Folders of private files, one file for each tile: of the foreground, and of its background.
LABELS = {False: "labels", True: "hole-labels"}
IDS = {False: "ids", True: "hole-ids"}
ROWS = "rows"
_IDS = b"tile-ids"  # the first bytes of each file of ids


class _Labelled(Whole):
    """Labels the objects of tiles, the same in each stage.

    Args:
        run: the run.
        function: processes a tile.
    """

    def __init__(self, run: Segmentation) -> None:
        super().__init__(self._process)
        if run.rules is None:
            raise ValueError("a run without objects")
        self._run, self._plan, self._rules = run, run.plan, run.rules
        self._connection = Connection(run.rules.connect, run.rules.connectivity)
        self._guard = run.fence.look if run.fence else None
        self._classes = Source(run, ("classes",))

    def _process(self, tile: int) -> str:
        raise NotImplementedError

    def _labels(self, tile: Tile, background: bool) -> tuple[NDArray[np.int32], int]:
        """Local labels (z, y, x) of a tile's own voxels, from 1 on, and their number."""
        mask = self._classes.read("classes", tile.write) != 0
        if background:
            return label_components(~mask, self._connection.complement)
        if self._rules.fill_holes:
            labels, _ = label_components(~mask, self._connection.complement)
            mask |= _read_ids(self._run.out, tile.index, background=True).astype(bool)[labels]
        return label_components(mask, self._connection)


class LabelWorker(_Labelled):
    """First pass: writes a record of each tile's labels."""

    def __init__(self, run: Segmentation, background: bool) -> None:
        super().__init__(run)
        self._background = background
        self._records = Records(run.out, LABELS[background], self._guard)

    def _process(self, tile: int) -> str:
        planned = self._plan[tile]
        labels, count = self._labels(planned, self._background)
        connection = self._connection.complement if self._background else self._connection
        record = TileRecord.of(labels, count, planned.write, self._plan.shape, connection)
        return self._records.write(tile, record.to_bytes())


class JoinWorker(Whole):
    """Unites the labels of all tiles; writes the final id of each tile's labels.

    For the background, the ids are 1 for holes and 0 for the rest.
    """

    def __init__(self, run: Segmentation, background: bool) -> None:
        super().__init__(self._join)
        if run.rules is None:
            raise ValueError("a run without objects")
        self._run, self._rules, self._background = run, run.rules, background
        guard = run.fence.look if run.fence else None
        self._records = Records(run.out, LABELS[background])
        self._ids = Records(run.out, IDS[background], guard)

    def _join(self, task: int) -> str:
        digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
        for tile, ids in self._united():
            data = pack(_IDS, [ids.astype(np.uint64)])
            self._ids.write(tile, data)
            digest.update(data)
        return digest.hexdigest()

    def _united(self) -> Iterator[tuple[int, NDArray[Any]]]:
        rules = self._rules
        connection = Connection(rules.connect, rules.connectivity)
        if self._background:
            return holes(self._run.plan, self._record, connection, self._run.memory_limit)
        return unite(
            self._run.plan,
            self._record,
            connection,
            min_size=rules.min_size,
            exclude_border=rules.exclude_border,
            ids=rules.ids,
            max_bytes=self._run.memory_limit,
        )

    def _record(self, tile: int) -> TileRecord:
        return self._records.parsed(tile, TileRecord.from_bytes)


def _read_ids(out: Place, tile: int, background: bool) -> NDArray[np.uint64]:
    """The final id of each label of a tile, as the join has written it, shape (labels + 1,).

    Raises:
        DamageError: if the file is missing or damaged; names it.
    """
    records = Records(out, IDS[background])
    (ids,) = records.parsed(tile, lambda data: unpack(_IDS, ["<u8"], data))
    return ids


class InstanceWorker(_Labelled):
    """Second pass: writes the final ids of a tile, and its part of the table."""

    def __init__(self, run: Segmentation) -> None:
        super().__init__(run)
        self._store = Store(run.out, ("instances",), self._guard)
        self._rows = Records(run.out, ROWS, self._guard)
        stored = "probabilities" in run.outputs
        self._probabilities = Source(run, ("probabilities",)) if stored else None

    def _process(self, tile: int) -> str:
        planned = self._plan[tile]
        labels, _ = self._labels(planned, background=False)
        ids = _read_ids(self._run.out, tile, background=False)[labels]
        source = self._probabilities
        rows = TileRows.of(
            ids,
            planned.write,
            self._plan.shape,
            source.read("probabilities", planned.write) if source else None,
            finite(self._run.volume.read(planned.write)) if ids.any() else None,
            self._connection,
        )
        checksum = self._rows.write(tile, rows.to_bytes())
        return self._store.write(planned, {"instances": ids}) + checksum


class TableWorker(Whole):
    """Merges the rows of all tiles into the table of objects."""

    def __init__(self, run: Segmentation) -> None:
        super().__init__(self._merge)
        self._run, self._rows = run, Records(run.out, ROWS)

    def _merge(self, task: int) -> str:
        run = self._run
        rows = (self._rows.parsed(tile, TileRows.from_bytes) for tile in range(len(run.plan)))
        table = write_table(merge_rows(rows, run.volume.voxel_size, run.memory_limit))
        guard = run.fence.look if run.fence else None
        write_whole(run.out / TABLE, table, run.out / PRIVATE, guard)
        return checksum_of(np.frombuffer(table, np.uint8))
