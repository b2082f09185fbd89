"""Whether a store is whole: every committed shard decodes, and some tiles give the same again.

Knows which tiles to check and to make again, and when a repair is safe. Does not know the files of
a store, or how a tile is made.

A shard that is sound but of another tile, or of another model, only recomputing can find.
"""

from __future__ import annotations

import itertools
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
    Remade,
    recompute,
    repair_metadata,
    repair_shards,
    run_that_made,
)
from unet_ray.segmentation.run import Segmentation
from unet_ray.storage.audit import Audit, sound_provenance
from unet_ray.storage.inspection import Found, inspect
from unet_ray.storage.layout import LEDGER, PRIVATE
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import newest
from unet_ray.storage.places import PathOrUrl, Place, place_of

VOUCHERS = 64  # tiles that are made again at most before one is repaired, if none differs


@dataclass(frozen=True)
class Verification:
    """What was checked of a store and what was found.

    Attributes:
        tiles: tiles that are committed.
        shards: shards that were checked.
        recomputed: numbers of the tiles that were made again and compared.
        damage: a sentence for each damaged or missing file, or tile, that is so still.
        notes: what is worth knowing and no damage; also what was damaged and is repaired.
        repaired: numbers of the tiles that were made and written again.
        refusal: why tiles could not be made again though it was asked for, or nothing.
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
        """Whether all that was asked for was checked, and nothing is damaged now."""
        return not self.damage and not self.refusal

    def summary(self) -> str:
        """One line: how much was checked and whether it is well."""
        facts = [f"{self.tiles} tiles", f"{self.shards} shards checked"]
        for tiles, done in ((self.recomputed, "recomputed"), (self.repaired, "repaired")):
            if tiles:
                facts.append(f"{len(tiles)} {done} (tiles {', '.join(map(str, tiles))})")
        found = f"{len(self.damage)} damaged" if self.damage else "all as they should be"
        return f"{', '.join(facts)}: {found}."


def verify(out: PathOrUrl, tiles: int = 3, repair: bool = False) -> Verification:
    """Checks every shard of the committed tiles, and makes some tiles again to compare them.

    Decoded voxels of all outputs are compared; compressed bytes may differ between versions of a
    compressor. Memory holds one tile, and as many as the machine has cores while recomputing.

    Args:
        out: the store; a run may be writing there.
        tiles: how many sound tiles to make again, chosen at random; all if there are fewer. It
            needs input and model, where the event log says they are.
        repair: makes damaged and missing shards again, and writes them.

    Raises:
        InputError: if `out` is no output of ours; with `repair`, if a run is writing there.
        RunError: if the disk takes nothing more while repairing.
    """
    path = place_of(out)
    if tiles < 0:
        raise InputError(f"tiles={tiles} must be at least 0.")
    found = inspect(path)
    if not found.is_output:
        what = "is not an output of unet-ray" if path.exists() else "does not exist"
        raise InputError(f"{path}: {what}; name an OUT.zarr that `unet-ray segment` has made.")
    with tempfile.TemporaryDirectory(prefix="unet-ray-") as folder:
        try:
            sound_provenance(found)  # before a lease is made where there was none
            # Until it is whole nobody else changes what was checked.
            after = newest(path / LEDGER)
            with Lease(path / PRIVATE, after=after) if repair else nullcontext() as lease:
                return _Check(inspect(path), Path(folder), lease).run(tiles)
        except DamageError as error:
            return Verification(0, 0, damage=(str(error),))


class _Check:
    """One call of `verify`: what was found so far, and what was made again."""

    def __init__(self, found: Found, scratch: Path, lease: Lease | None) -> None:
        self._audit = Audit(found, scratch)
        self._path, self._done = self._audit.path, self._audit.done
        self._lease = lease  # to repair what is damaged
        self._bad: dict[int, dict[str, str]] = {}  # what is wrong, by tile and output
        self._metadata: dict[Place, str] = {}  # what is wrong, by file
        self._failed: list[str] = []  # what could not be made again
        self._notes: list[str] = []
        self._remade = Remade()
        self._repaired: list[int] = []
        self._refusal = ""

    def run(self, tiles: int) -> Verification:
        """Checks all, then makes again what is to be compared or repaired."""
        sample = sorted(self._check_shards(tiles))
        self._metadata, self._notes = self._audit.metadata_damage(), self._audit.remarks()
        if sample or (self._lease and (self._bad or self._metadata)):
            self._make_again(sample)
        done, failed = int(self._done.sum()), (*self._remade.failed, *self._failed)
        return Verification(
            tiles=done,
            shards=done * len(self._audit.outputs),
            recomputed=tuple(sorted(self._remade.tiles)),
            damage=(*self._sentences(), *failed, *self._audit.ledger_damage()),
            notes=tuple(self._notes),
            repaired=tuple(sorted(self._repaired)),
            refusal=self._refusal,
        )

    def _check_shards(self, most: int) -> list[int]:
        """Checks every committed tile; returns at most `most` of the sound ones, at random."""
        random_numbers, sound = random.SystemRandom(), 0
        chosen: list[int] = []
        stage = Stage("verify", lambda: Whole(self._check_tile), "cpu")
        with closing(tries(stage, numbers_of(self._done))) as tried:
            for receipt, again in tried:
                if receipt.error and not again:
                    raise RunError(f"{self._path}: tile {receipt.tile}: {receipt.error}")
                if receipt.error or receipt.tile in self._bad:
                    continue
                sound += 1
                # Each tile so far was chosen with equal probability (Knuth, algorithm R).
                if len(chosen) < most:
                    chosen.append(receipt.tile)
                elif (at := random_numbers.randrange(sound)) < most:
                    chosen[at] = receipt.tile
        return chosen

    def _check_tile(self, tile: int) -> None:
        found = self._audit.damage_of(tile)
        self._bad.pop(tile, None)
        if found:
            self._bad[tile] = found

    def _make_again(self, sample: list[int]) -> None:
        audit = self._audit
        try:
            run = run_that_made(audit)
        except InputError as error:
            self._refusal = str(error)
            return
        audit.expect(run.volume.voxel_size)  # until here it was what the store says of itself
        self._metadata = audit.metadata_damage()
        self._recompute(run, iter(sample))
        if not self._lease or not any(self._sentences()):
            return
        if not self._is_vouched_for(run, sample):
            self._refusal = (
                f"{self._path}: tiles without damage differ from what input, model and zarr.json "
                "give, and none agrees, so nobody knows which is right; nothing was repaired: make "
                "the store anew with --overwrite."
            )
            return
        found = [*self._sentences()]
        self._repair(run, self._lease)
        left = {*self._sentences()}
        self._notes += [f"repaired: {each}" for each in found if each not in left]

    def _recompute(self, run: Segmentation, tiles: Iterator[int]) -> None:
        recompute(self._audit, run, tiles, self._remade)
        self._bad |= self._remade.differing

    def _is_vouched_for(self, run: Segmentation, sample: list[int]) -> bool:
        """Whether what makes the tiles again is, as far as is known, what made this store.

        Makes others again to see: all, if one was found that differs, else some until one agrees.
        A tile of one value agrees with almost anything, so it vouches for nothing.
        """
        known = {*sample, *self._bad}
        others = (tile for tile in numbers_of(self._done) if tile not in known)
        self._recompute(run, self._until_settled(others))
        if self._remade.differing:
            self._recompute(run, others)
        return bool(self._remade.agreed) or not self._remade.differing

    def _until_settled(self, tiles: Iterator[int]) -> Iterator[int]:
        """A few tiles; no more of them once one agreed or differed."""
        for _ in range(VOUCHERS):
            if self._remade.agreed or self._remade.differing:
                return
            yield from itertools.islice(tiles, 1)

    def _repair(self, run: Segmentation, lease: Lease) -> None:
        """Writes damaged files again, and checks them again."""
        self._failed += repair_metadata(self._audit, self._metadata, lease)
        self._metadata = self._audit.metadata_damage()
        bad = {tile: list(found) for tile, found in self._bad.items()}
        written, failed = repair_shards(self._audit, run, bad, lease)
        self._failed += failed
        for tile in written:
            self._check_tile(tile)
            if tile not in self._bad:
                self._repaired.append(tile)

    def _sentences(self) -> Iterator[str]:
        yield from self._metadata.values()
        for tile, found in sorted(self._bad.items()):
            for name, what in found.items():
                yield f"{self._audit.shard(name, tile)}: the shard of tile {tile} {what}."
