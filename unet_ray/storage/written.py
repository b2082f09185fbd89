"""The files that a stage of a run writes: shards, records and the table of objects.

Knows their paths, and whether they exist. Does not know how they are made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import DamageError
from unet_ray.storage.layout import LEDGER, TABLE, ledger_of
from unet_ray.storage.ledger import committed, creation_epoch, recorded_provenance, skipped
from unet_ray.storage.parsing import ContentError, read_file
from unet_ray.storage.places import Place, stats_of
from unet_ray.storage.records import LARGEST_RECORD, Records
from unet_ray.storage.shards import CHECKSUM_BYTES, checksum_of
from unet_ray.storage.stores import Store
from unet_ray.tiling.pyramid import NO_CONTEXT
from unet_ray.tiling.tiles import TilePlan

ONE_TASK = TilePlan((1, 1, 1), (1, 1, 1), NO_CONTEXT, (1, 1, 1))  # of a stage that unites tiles
LARGEST_TABLE = 1 << 40  # bytes


@dataclass(frozen=True)
class Written:
    """The files of one stage.

    Attributes:
        stage: name of the stage.
        plan: its tiles, or `ONE_TASK`.
        outputs: names of the arrays that it writes.
        level: pyramid level of these arrays.
        records: name of the folder of its records; "" if it writes none.
        files: number of records: one for each tile of the volume, also for `ONE_TASK`.
        table: whether it writes the table of objects.
    """

    stage: str
    plan: TilePlan
    outputs: tuple[str, ...] = ()
    level: int = 0
    records: str = ""
    files: int = 0
    table: bool = False

    @property
    def ledger(self) -> str:
        """Path of the ledger, relative to the output."""
        return ledger_of(self.stage)

    def present(self, out: Place) -> NDArray[np.bool_]:
        """Returns which tiles have all their files, none of them empty, bool, shape (tiles,).

        Raises:
            RunError: if metadata of the store are missing or damaged; names the file.
        """
        tiles = Store(out, self.outputs, level=self.level).present(self.plan)
        if self.records:
            files = Records(out, self.records).present(self.files)
            tiles &= files.all() if self.plan == ONE_TASK else files
        if self.table:
            table = stats_of(out, [str(out / TABLE)])[str(out / TABLE)]
            tiles &= table is not None and table.size > 0
        return tiles

    def path(self, out: Place) -> Place:
        """Returns the folder of the records, or the table."""
        return out / TABLE if self.table else Records(out, self.records).folder

    def checksum(self, out: Place, tile: int) -> str:
        """Returns a checksum of the records or the table that a tile wrote; "" if it wrote none.

        Raises:
            DamageError: if a file is missing or cannot be read; names it.
        """
        if self.table:
            return checksum_of(np.frombuffer(read_table(out), np.uint8))
        if not self.records:
            return ""
        records = Records(out, self.records)
        if self.plan != ONE_TASK:
            return checksum_of(np.frombuffer(records.read(tile, LARGEST_RECORD), np.uint8))
        digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
        for number in range(self.files):
            digest.update(records.read(number, LARGEST_RECORD))
        return digest.hexdigest()


def source_of(out: Place, plan: TilePlan) -> str | None:
    """Returns a digest of the predicted tiles of a store; None while tiles are missing."""
    done = committed(out / LEDGER, len(plan))
    if not (done | skipped(out / LEDGER, len(plan))).all():
        return None
    store = f"{creation_epoch(out / LEDGER)}:".encode()  # another store of the same tiles differs
    return hashlib.blake2b(store + np.packbits(done).tobytes(), digest_size=16).hexdigest()


def is_made_from(out: Place, stage: str, source: str) -> bool:
    """Returns whether a stage was begun from the predicted tiles of `source`; see `source_of`.

    False if the record of that is damaged, since the stage can be made again.
    """
    try:
        return recorded_provenance(out / ledger_of(stage)) == origin_of(stage, source)
    except DamageError:
        return False


def origin_of(stage: str, source: str) -> dict[str, str]:
    """Returns what the ledger of a stage records of the predicted tiles; see `source_of`."""
    return {"stage": stage, "tiles": source}


def is_made(out: Place, stage: str, plan: TilePlan, tasks: int) -> bool:
    """Returns whether a stage after the prediction has all results, from the current tiles.

    Args:
        out: the store.
        stage: name of the stage.
        plan: the predicted tiles.
        tasks: number of tiles of the stage.
    """
    source = source_of(out, plan)
    if source is None or not is_made_from(out, stage, source):
        return False
    return bool(committed(out / ledger_of(stage), tasks).all())


def read_table(out: Place) -> bytes:
    """Returns the bytes of the table of objects.

    Raises:
        DamageError: if it is missing or not a file; names it.
    """
    try:
        return read_file(out / TABLE, LARGEST_TABLE)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamageError(f"{out / TABLE}: is missing.") from error
    except ContentError as error:
        raise DamageError(f"{out / TABLE}: is damaged ({error}).") from error
