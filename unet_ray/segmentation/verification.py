"""Verification of a store: every committed shard decodes, and recomputed tiles equal the stored.

Knows which tiles to check and to recompute, and when a repair is safe. Does not know the files of
a store, or how a tile is computed.

The ledger has a checksum of each tile's voxels, so a shard of another tile or another run is
detected without recomputing. Recomputing shows that input, model and machine still give the same.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from unet_ray.engine.rounds import numbers_of, tries
from unet_ray.engine.stages import Stage, Whole
from unet_ray.errors import DamageError, InputError, RunError
from unet_ray.segmentation.repair import (
    Recomputed,
    recompute,
    repair_metadata,
    repair_shards,
    run_that_made,
)
from unet_ray.segmentation.run import Segmentation
from unet_ray.storage.audit import Audit, sound_provenance
from unet_ray.storage.inspection import Found, inspect, refuse_links
from unet_ray.storage.layout import LEDGER, PRIVATE
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import newest
from unet_ray.storage.places import PathOrUrl, Place, place_of


@dataclass(frozen=True)
class Verification:
    """Result of `verify`.

    Attributes:
        tiles: number of committed tiles.
        shards: number of checked shards.
        recomputed: numbers of the tiles that were recomputed and compared.
        damage: a sentence for each file or tile that is damaged or missing after the repair.
        notes: remarks that are no damage, and a sentence for each repaired file.
        repaired: numbers of the repaired tiles.
        refusal: why a requested recomputation or repair was refused; "" if it was not.
    """

    tiles: int
    shards: int
    recomputed: tuple[int, ...] = ()
    damage: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    repaired: tuple[int, ...] = ()
    refusal: str = ""

    @property
    def sound(self) -> bool:
        """Whether all requested checks were done and no damage is left."""
        return not self.damage and not self.refusal

    def summary(self) -> str:
        """One line with the number of checks and their result."""
        facts = [f"{self.tiles} tiles", f"{self.shards} shards checked"]
        for tiles, action in ((self.recomputed, "recomputed"), (self.repaired, "repaired")):
            if tiles:
                facts.append(f"{len(tiles)} {action} (tiles {', '.join(map(str, tiles))})")
        result = f"{len(self.damage)} damaged" if self.damage else "no damage found"
        return f"{', '.join(facts)}: {result}."


def verify(out: PathOrUrl, tiles: int = 3, repair: bool = False) -> Verification:
    """Checks every shard of the committed tiles, and recomputes some tiles to compare them.

    The comparison uses decoded voxels, since compressed bytes may differ between versions of a
    compressor. Memory use is one tile, and while recomputing one tile per core.

    Args:
        out: path or URL of the store; a run may be writing to it.
        tiles: number of sound tiles to recompute, chosen at random; all if there are fewer. If not
            0, the input and the model must be at the paths that the event log names.
        repair: recompute damaged and missing shards, and replace them.

    Raises:
        InputError: if `tiles` is negative, `out` is not an output of unet-ray, or, with `repair`, a
            run is writing to it.
        RunError: if the disk is full or read-only while repairing.
    """
    path = place_of(out)
    if tiles < 0:
        raise InputError(f"tiles={tiles} must be at least 0.")
    inspection = inspect(path)
    if not inspection.is_output:
        reason = "is not an output of unet-ray" if path.exists() else "does not exist"
        raise InputError(f"{path}: {reason}; name an OUT.zarr that `unet-ray segment` has made.")
    with tempfile.TemporaryDirectory(prefix="unet-ray-") as folder:
        try:
            sound_provenance(inspection)  # before a lease is created in a damaged copy
            if repair:
                refuse_links(path)
            # The lease keeps other runs from changing the store between check and repair.
            after = newest(path / LEDGER)
            with Lease(path / PRIVATE, after=after) if repair else nullcontext() as lease:
                return _Check(inspect(path), Path(folder), lease).run(tiles)
        except DamageError as error:
            return Verification(0, 0, damage=(str(error),))


class _Check:
    """State of one call of `verify`: the damage so far and the recomputed tiles."""

    def __init__(self, inspection: Found, scratch: Path, lease: Lease | None) -> None:
        self._audit = Audit(inspection, scratch)
        self._path, self._done = self._audit.path, self._audit.done
        self._lease = lease  # None without repair
        self._damage: dict[int, dict[str, str]] = {}  # damage by tile and output
        self._metadata_damage: dict[Place, str] = {}  # damage by file
        self._failed: list[str] = []  # failed repairs
        self._notes: list[str] = []
        self._recomputed = Recomputed()
        self._repaired: list[int] = []
        self._refusal = ""

    def run(self, tiles: int) -> Verification:
        """Checks all files, then recomputes `tiles` tiles and repairs damage if requested."""
        sample = sorted(self._check_shards(tiles))
        self._metadata_damage, self._notes = self._audit.metadata_damage(), self._audit.remarks()
        if sample or (self._lease and (self._damage or self._metadata_damage)):
            self._recompute_and_repair(sample)
        done, failed = int(self._done.sum()), (*self._recomputed.failed, *self._failed)
        return Verification(
            tiles=done,
            shards=done * len(self._audit.outputs),
            recomputed=tuple(sorted(self._recomputed.tiles)),
            damage=(
                *self._audit.edited_fields(),
                *self._sentences(),
                *failed,
                *self._audit.ledger_damage(),
            ),
            notes=tuple(self._notes),
            repaired=tuple(sorted(self._repaired)),
            refusal=self._refusal,
        )

    def _check_shards(self, limit: int) -> list[int]:
        """Checks every committed tile; returns a random sample of at most `limit` sound tiles."""
        random_numbers, sound = random.SystemRandom(), 0
        chosen: list[int] = []
        stage = Stage("verify", lambda: Whole(self._check_tile), "cpu")
        with closing(tries(stage, numbers_of(self._done))) as receipts:
            for receipt, will_retry in receipts:
                if receipt.error and not will_retry:
                    raise RunError(f"{self._path}: tile {receipt.tile}: {receipt.error}")
                if receipt.error or receipt.tile in self._damage:
                    continue
                sound += 1
                # Reservoir sampling (Knuth, algorithm R): all tiles so far are equally likely.
                if len(chosen) < limit:
                    chosen.append(receipt.tile)
                elif (slot := random_numbers.randrange(sound)) < limit:
                    chosen[slot] = receipt.tile
        return chosen

    def _check_tile(self, tile: int) -> None:
        damage = self._audit.damage_of(tile)
        self._damage.pop(tile, None)
        if damage:
            self._damage[tile] = damage

    def _recompute_and_repair(self, sample: list[int]) -> None:
        audit = self._audit
        try:
            run = run_that_made(audit)
        except InputError as error:
            self._refusal = str(error)
            return
        audit.expect(run.volume.voxel_size)  # so far the voxel size was the store's own
        self._metadata_damage = audit.metadata_damage()
        recompute(audit, run, sample, self._recomputed)
        self._damage |= self._recomputed.differing
        if not self._lease or not any(self._sentences()):
            return
        before = [*self._sentences()]
        self._repair(run, self._lease)
        after = {*self._sentences()}
        self._notes += [f"repaired: {damage}" for damage in before if damage not in after]

    def _repair(self, run: Segmentation, lease: Lease) -> None:
        """Replaces damaged files, and checks them again."""
        self._failed += repair_metadata(self._audit, self._metadata_damage, lease)
        self._metadata_damage = self._audit.metadata_damage()
        damaged = {tile: list(damage) for tile, damage in self._damage.items()}
        written, failed = repair_shards(self._audit, run, damaged, lease)
        self._failed += failed
        for tile in written:
            self._check_tile(tile)
            if tile not in self._damage:
                self._repaired.append(tile)

    def _sentences(self) -> Iterator[str]:
        """One sentence for each damaged file."""
        yield from self._metadata_damage.values()
        for tile, outputs in sorted(self._damage.items()):
            for name, damage in outputs.items():
                yield f"{self._audit.shard(name, tile)}: the shard of tile {tile} {damage}."
