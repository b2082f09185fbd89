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
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine.stages import Whole
from unet_ray.segmentation.components import Connection, TileRecord, TileSummary, label_components
from unet_ray.segmentation.foreground import Foreground, ids_to_bytes, read_ids
from unet_ray.segmentation.pyramid import Source
from unet_ray.segmentation.rules import Rules
from unet_ray.segmentation.run import Segmentation, finite
from unet_ray.segmentation.table import TileRows, merge_rows, write_table
from unet_ray.segmentation.unions import holes, unite
from unet_ray.segmentation.watershed import BasinRecord, label_basins, window
from unet_ray.storage.layout import LEDGER, PRIVATE, TABLE
from unet_ray.storage.lease import Fence
from unet_ray.storage.ledger import skipped
from unet_ray.storage.places import Guard, write_whole
from unet_ray.storage.records import IDS, LABELS, ROWS, Records
from unet_ray.storage.shards import CHECKSUM_BYTES, checksum_of
from unet_ray.storage.stores import Store
from unet_ray.tiling.tiles import Tile


class _Labeller:
    """Labels the objects of single tiles, the same in each stage."""

    def __init__(self, run: Segmentation, rules: Rules) -> None:
        self._plan, self._split = run.plan, rules.split
        self._connection = Connection(rules.connect, rules.connectivity)
        self._foreground = Foreground(run, rules)
        self._skipped = skipped(run.out / LEDGER, len(run.plan))

    def objects(self, tile: int) -> tuple[NDArray[np.int32], int]:
        """Returns the labels of a tile's own voxels, (z, y, x) from 1, and their number."""
        if self._split:
            labels, record = self._basins(tile)
            return labels, record.count
        return label_components(self._foreground.read(self._plan[tile].write), self._connection)

    def record(self, tile: int) -> TileRecord:
        """Returns the record of the objects of a tile."""
        if self._split:
            return self._basins(tile)[1]
        labels, count = self.objects(tile)
        write, shape = self._plan[tile].write, self._plan.shape
        return TileRecord.of(labels, count, write, shape, self._connection)

    def background(self, tile: int) -> TileRecord:
        """Returns the record of the background of a tile."""
        labels, count = self._foreground.background(tile)
        write, shape = self._plan[tile].write, self._plan.shape
        record = TileRecord.of(labels, count, write, shape, self._connection.complement)
        # Nobody knows the voxels of a skipped tile, so nothing that reaches it is a hole.
        return replace(record, border=record.border | self._skipped[tile])

    def _basins(self, tile: int) -> tuple[NDArray[np.int32], BasinRecord]:
        write, shape = self._plan[tile].write, self._plan.shape
        read = window(write, shape, self._connection)
        return label_basins(self._foreground.read(read), read, write, shape, self._connection)


class LabelWorker(Whole):
    """First pass: writes a record of each tile's labels.

    Args:
        run: the run.
        background: label the background, to find holes.
    """

    def __init__(self, run: Segmentation, background: bool) -> None:
        super().__init__(self._record)
        self._background, self._labeller = background, _Labeller(run, _rules_of(run))
        self._records = Records(run.out, LABELS[background], _guard_of(run.fence))

    def _record(self, tile: int) -> str:
        labeller = self._labeller
        record = labeller.background(tile) if self._background else labeller.record(tile)
        return self._records.write(tile, record.to_bytes())


class JoinWorker(Whole):
    """Unites the labels of all tiles; writes the final id of each tile's labels.

    Args:
        run: the run.
        background: unite the background; its ids are 1 for holes and 0 for the rest.
    """

    def __init__(self, run: Segmentation, background: bool) -> None:
        super().__init__(self._join)
        self._run, self._rules, self._background = run, _rules_of(run), background
        self._labels = Records(run.out, LABELS[background])
        self._ids = Records(run.out, IDS[background], _guard_of(run.fence))

    def _join(self, task: int) -> str:
        digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
        for tile, ids in self._united():
            data = ids_to_bytes(ids)
            self._ids.write(tile, data)
            digest.update(data)
        return digest.hexdigest()

    def _united(self) -> Iterator[tuple[int, NDArray[Any]]]:
        plan, rules, limit = self._run.plan, self._rules, self._run.join_memory
        connection = Connection(rules.connect, rules.connectivity)
        if self._background:
            return holes(plan, self._record, connection, limit, self._summary)
        return unite(
            plan,
            self._record,
            connection,
            split=rules.split,
            min_size=rules.min_size,
            exclude_border=rules.exclude_border,
            ids=rules.ids,
            max_bytes=limit,
            summary=self._summary,
        )

    def _record(self, tile: int) -> TileRecord:
        split = self._rules.split and not self._background
        return self._labels.parsed(tile, (BasinRecord if split else TileRecord).from_bytes)

    def _summary(self, tile: int) -> TileSummary:
        return self._labels.parsed(tile, TileSummary.from_bytes)


class InstanceWorker(Whole):
    """Second pass: writes the final ids of a tile, and its part of the table."""

    def __init__(self, run: Segmentation) -> None:
        super().__init__(self._write)
        self._run, self._rules, guard = run, _rules_of(run), _guard_of(run.fence)
        self._labeller = _Labeller(run, self._rules)
        self._store = Store(run.out, ("instances",), guard)
        self._rows = Records(run.out, ROWS, guard)
        stored = "probabilities" in run.outputs
        self._probabilities = Source(run, ("probabilities",)) if stored else None

    def _write(self, tile: int) -> str:
        planned = self._run.plan[tile]
        labels, count = self._labeller.objects(tile)
        ids = read_ids(self._run.out, tile, count, background=False)
        source = self._probabilities
        rows = TileRows.of(
            labels,
            ids,
            planned.write,
            self._run.plan.shape,
            source.read("probabilities", planned.write) if source else None,
            self._grey(planned) if ids.any() else self._no_grey(planned),
            Connection(self._rules.connect, self._rules.connectivity),
        )
        checksum = self._rows.write(tile, rows.to_bytes())
        return self._store.write(planned, {"instances": ids[labels]}) + checksum

    def _grey(self, tile: Tile) -> NDArray[Any]:
        return finite(self._run.volume.read(tile.write))

    def _no_grey(self, tile: Tile) -> NDArray[Any]:
        """Zeros, of one voxel in memory, for a tile without objects, which is not read."""
        volume = self._run.volume
        return np.broadcast_to(volume.dtype.type(0), (volume.shape[0], *tile.write.shape))


class TableWorker(Whole):
    """Merges the rows of all tiles into the table of objects."""

    def __init__(self, run: Segmentation) -> None:
        super().__init__(self._merge)
        self._run, self._rows = run, Records(run.out, ROWS)

    def _merge(self, task: int) -> str:
        run = self._run
        rows = (self._rows.parsed(tile, TileRows.from_bytes) for tile in range(len(run.plan)))
        table = write_table(merge_rows(rows, run.volume.voxel_size, run.join_memory))
        write_whole(run.out / TABLE, table, run.out / PRIVATE, _guard_of(run.fence))
        return checksum_of(np.frombuffer(table, np.uint8))


def _rules_of(run: Segmentation) -> Rules:
    if run.rules is None:
        raise ValueError("a run without objects has no rules")
    return run.rules


def _guard_of(fence: Fence | None) -> Guard | None:
    return fence.look if fence else None
