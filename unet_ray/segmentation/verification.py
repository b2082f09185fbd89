"""Verification of a store: every committed shard decodes, and recomputed tiles equal the stored.

Knows which tiles to check and to recompute, and when a repair is safe. Does not know the files of
a store, or how a tile is computed.

The ledger has a checksum of each tile's voxels, so a shard of another tile or another run is
detected without recomputing. Recomputing shows that input, model and machine still give the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from unet_ray.errors import DamageError, InputError
from unet_ray.scores.seams import instance_seams
from unet_ray.segmentation.chain import Link, chain_of
from unet_ray.segmentation.checked_stage import CheckedStage
from unet_ray.segmentation.repair import (
    Recomputed,
    recompute,
    repair_link,
    repair_metadata,
    repair_shards,
    run_that_made,
)
from unet_ray.segmentation.rules import Rules
from unet_ray.segmentation.run import Segmentation
from unet_ray.storage.audit import Audit, sound_provenance
from unet_ray.storage.inspection import Found, inspect, refuse_links
from unet_ray.storage.layout import INSTANCES, LEDGERS, PRIVATE, ROOT
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import newest_below
from unet_ray.storage.places import PathOrUrl, Place, place_of
from unet_ray.storage.written import source_of


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
            after = newest_below(path / LEDGERS)
            with Lease(path / PRIVATE, after=after) if repair else nullcontext() as lease:
                return _Check(inspect(path), Path(folder), lease).run(tiles)
        except DamageError as error:
            return Verification(0, 0, damage=(str(error),))


class _Check:
    """State of one call of `verify`: the damage so far and the recomputed tiles."""

    def __init__(self, inspection: Found, scratch: Path, lease: Lease | None) -> None:
        self._audit = Audit(inspection, scratch)
        self._predicted = CheckedStage(self._audit.predicted)
        self._links, self._unmade = _links(self._audit)
        self._path = self._audit.path
        self._lease = lease  # None without repair
        self._metadata_damage: dict[Place, str] = {}  # damage by file
        self._failed: list[str] = []  # failed repairs
        self._notes: list[str] = []
        self._recomputed = Recomputed()
        self._repaired: list[int] = []
        self._refusal = ""

    def run(self, tiles: int) -> Verification:
        """Checks all files, then recomputes `tiles` tiles and repairs damage if requested."""
        sample = sorted(self._predicted.check(tiles))
        for _, stage in self._links:
            stage.check()
        self._metadata_damage = self._audit.metadata_damage()
        self._notes = [line for stage in self._stages for line in stage.audit.remarks()]
        if self._unmade:
            self._notes.append(
                f"stages that are not made from the current tiles: {', '.join(self._unmade)}; the "
                "same `unet-ray segment` command makes them."
            )
        if sample or (self._lease and any(self._sentences())):
            self._recompute_and_repair(sample)
        if not any(self._sentences()):
            self._notes += self._seams()
        failed = (*self._recomputed.failed, *self._failed)
        return Verification(
            tiles=self._predicted.done,
            shards=sum(stage.done * len(stage.audit.outputs) for stage in self._stages),
            recomputed=tuple(sorted(self._recomputed.tiles)),
            damage=(
                *self._audit.edited_fields(),
                *self._sentences(),
                *failed,
                *(line for stage in self._stages for line in stage.audit.ledger_damage()),
            ),
            notes=tuple(self._notes),
            repaired=tuple(sorted(self._repaired)),
            refusal=self._refusal,
        )

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
        self._predicted.damage |= self._recomputed.differing
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
        stage = self._predicted
        damaged = {tile: list(damage) for tile, damage in stage.damage.items()}
        written, failed = repair_shards(self._audit, run, damaged, lease)
        self._failed += failed
        self._repaired += stage.check_again(written)
        for link, stage in self._links:  # each needs the sound results of those before
            paths = {
                tile: [stage.audit.shard(name, tile) for name in damage]
                for tile, damage in stage.damage.items()
            }
            written, failed = repair_link(link, run, paths, lease)
            self._failed += failed
            stage.check_again(written)

    @property
    def _stages(self) -> list[CheckedStage]:
        return [self._predicted, *(stage for _, stage in self._links)]

    def _seams(self) -> Iterator[str]:
        """A remark on the seams of the instances, if they are finished."""
        predicted = self._predicted.audit
        for _, stage in self._links:
            # A tile that a mask skips has no objects, so only predicted tiles count.
            if stage.audit.written.stage == INSTANCES and stage.audit.done.all():
                seams = instance_seams(self._path, predicted.plan, predicted.done)
                yield f"seams: {seams.summary()}; {seams.sentence()}."

    def _sentences(self) -> Iterator[str]:
        """One sentence for each damaged file."""
        yield from self._metadata_damage.values()
        for stage in self._stages:
            yield from stage.sentences()


def _links(audit: Audit) -> tuple[list[tuple[Link, CheckedStage]], list[str]]:
    """Returns the stages after the prediction that are made of the predicted tiles.

    Returns:
        These stages, and the names of the others; no names while predicted tiles are missing.

    Raises:
        DamageError: if the rules of the objects are damaged.
    """
    made = audit.provenance
    source = source_of(audit.path, made.plan)
    try:
        rules = Rules.from_json(made.objects) if made.objects else None
    except (InputError, TypeError, ValueError) as error:  # the provenance may contain anything
        raise DamageError(
            f"{audit.path / ROOT}: its rules of objects are damaged ({error})."
        ) from error
    links, unmade = [], []
    for link in chain_of(made.plan, made.outputs, made.factors, rules) if source else ():
        if source and link.continues(audit.path, source):
            links.append((link, CheckedStage(audit.of(link.written))))
        else:
            unmade.append(link.written.stage)
    return links, unmade
