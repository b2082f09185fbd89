"""Recomputation of a store's tiles, to compare them with the stored ones or to replace them.

Knows how a run made a store, from its provenance and event log. Does not know which tiles to
recompute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine.rounds import Tries, tries
from unet_ray.engine.stages import Stage
from unet_ray.errors import DamageError, InputError, LostError, RunError, VoxelError
from unet_ray.segmentation.chain import Link
from unet_ray.segmentation.preparation import prepare
from unet_ray.segmentation.run import Segmentation
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.audit import Audit
from unet_ray.storage.events import read_events
from unet_ray.storage.layout import EVENTS, PRIVATE, SEGMENT
from unet_ray.storage.lease import Lease
from unet_ray.storage.places import Place, write_whole
from unet_ray.storage.stores import Store
from unet_ray.storage.tile_audit import refuse_link

Results = Mapping[str, NDArray[np.uint8]]


def run_that_made(audit: Audit) -> Segmentation:
    """Restores the run that made a store, from the store's provenance and event log.

    Raises:
        InputError: if the input or the model is missing, or has changed.
    """
    path, provenance = audit.path, audit.provenance
    starts = (e for e in read_events(path / EVENTS) if e.get("event") == "start")
    *_, latest = ({}, *(e for e in starts if e.get("stage", SEGMENT) == SEGMENT))
    source, model = latest.get("input"), latest.get("model")
    try:
        if not isinstance(source, str) or not isinstance(model, str):
            raise InputError("its event log does not name the input and the model")
        settings = Settings(
            channel=provenance.channel,
            time=provenance.time,
            level=provenance.level,
            memory=sys.maxsize,  # the store's plan is used, whatever memory it needs
            precision=provenance.precision,
            tta=provenance.tta,
            nan=provenance.nan,
            threshold=provenance.threshold,
            **(provenance.objects or {}),
        )
        return prepare(source, model, path, settings)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        # The remedy after the semicolon applies to `unet-ray segment`, not to `verify`.
        reason = str(error).partition("; ")[0].rstrip(".")
        raise InputError(
            f"{path}: its tiles cannot be recomputed: {reason}; restore the original input and "
            "model, or verify without them: --tiles 0 and no --repair."
        ) from error


@dataclass
class Recomputed:
    """Recomputed tiles.

    Attributes:
        differing: damage of the tiles that differ from the stored ones, by number and output.
        tiles: numbers of all recomputed tiles.
        failed: an error message for each tile that could not be recomputed.
    """

    differing: dict[int, dict[str, str]] = field(default_factory=dict)
    tiles: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def recompute(
    audit: Audit, run: Segmentation, tiles: Iterable[int], recomputed: Recomputed
) -> None:
    """Recomputes tiles, compares them with the stored ones, and adds them to `recomputed`."""

    def compare(tile: int, result: Results) -> None:
        if damage := _differences(audit, tile, result):
            recomputed.differing[tile] = damage

    with closing(_recompute_each("verify", audit, run, tiles, compare)) as receipts:
        for receipt, will_retry in receipts:
            if not receipt.error:
                recomputed.tiles.append(receipt.tile)
            elif not will_retry:
                recomputed.failed.append(
                    f"{audit.path}: tile {receipt.tile} cannot be recomputed: {receipt.error}"
                )


def _differences(audit: Audit, tile: int, result: Results) -> dict[str, str]:
    """Damage of each output of a tile whose stored voxels are not those of `result`."""
    damage = {}
    z, y, x = audit.predicted.plan[tile].crop.slices
    for name in audit.predicted.outputs:
        voxels = result[name][..., z, y, x]
        try:
            differing = int(np.count_nonzero(audit.predicted.decode(name, tile) != voxels))
        except DamageError as error:  # damaged after it was checked
            damage[name] = str(error)
            continue
        if differing:
            damage[name] = f"differs from the recomputed tile in {differing} values"
    return damage


def repair_shards(
    audit: Audit, run: Segmentation, damaged: Mapping[int, Iterable[str]], lease: Lease
) -> tuple[list[int], list[str]]:
    """Recomputes tiles and replaces their damaged shards.

    Args:
        audit: audit of the store.
        run: the run that made the store.
        damaged: names of the damaged outputs by tile number; other shards are not written.
        lease: lease of the store.

    Returns:
        Numbers of the repaired tiles, and an error message for each tile that was not repaired.

    Raises:
        RunError: if the disk is full or read-only.
        LostError: if another run has taken over the store.
    """

    def write(tile: int, result: Results) -> None:
        z, y, x = audit.predicted.plan[tile].crop.slices
        for name in damaged[tile]:
            refuse_link(audit.path, audit.predicted.shard(name, tile).parent)
            if audit.predicted.is_foreign(name, tile, result[name][..., z, y, x]):
                raise VoxelError("the recomputed voxels are not those that were committed")
        Store(audit.path, [*damaged[tile]], lease.fence.hold).write(
            audit.predicted.plan[tile], result
        )

    attempts = _recompute_each("repair", audit, run, sorted(damaged), write)
    return _repaired(attempts, audit.path, lease)


def repair_link(
    link: Link, run: Segmentation, damaged: Mapping[int, Iterable[Place]], lease: Lease
) -> tuple[list[int], list[str]]:
    """Makes tiles of a later stage again from the sound results of the stages before it.

    Args:
        link: the stage.
        run: the run that made the store.
        damaged: paths of the damaged files by tile number.
        lease: lease of the store.

    Returns:
        Numbers of the written tiles, and an error message for each tile that was not written.

    Raises:
        RunError: if the disk is full or read-only.
        LostError: if another run has taken over the store.
    """
    tiles, refused = [], []
    for tile, paths in sorted(damaged.items()):
        try:
            for path in paths:
                refuse_link(run.out, path.parent)  # a link may lead into another store
            tiles.append(tile)
        except DamageError as error:
            refused.append(f"{path}: cannot be repaired: it {error}.")
    name, make = link.written.stage, partial(link.make_worker, replace(run, fence=lease.fence))
    written, failed = _repaired(
        tries(Stage(name, make, "cpu"), tiles), run.out, lease, f" of {name}"
    )
    return written, [*refused, *failed]


def _repaired(
    attempts: Tries, out: Place, lease: Lease, of_stage: str = ""
) -> tuple[list[int], list[str]]:
    """Returns the tiles that were written, and an error message for each other; see above."""
    written, failed = [], []
    with closing(attempts) as receipts:
        for receipt, will_retry in receipts:
            lease.check(now=receipt.verdict == "stop")
            if receipt.verdict == "stop":
                raise RunError(f"{out}: {receipt.error}; free disk space and repair again.")
            if not receipt.error:
                written.append(receipt.tile)
            elif not will_retry:
                failed.append(
                    f"{out}: tile {receipt.tile}{of_stage} cannot be repaired: {receipt.error}"
                )
    lease.check(now=True)
    return written, failed


def repair_metadata(audit: Audit, paths: Iterable[Place], lease: Lease) -> list[str]:
    """Rewrites damaged metadata files; returns an error message for each failure."""
    failed = []
    for path in paths:
        try:
            refuse_link(audit.path, path.parent)
            expected = audit.empty / str(path)[len(str(audit.path)) + 1 :]
            write_whole(path, expected.read_bytes(), audit.path / PRIVATE, lease.fence.hold)
        except LostError:
            raise
        except (OSError, RunError) as error:
            failed.append(f"{path}: cannot be repaired: {error}.")
    return failed


def _recompute_each(
    name: str,
    audit: Audit,
    run: Segmentation,
    tiles: Iterable[int],
    consume: Callable[[int, Results], None],
) -> Tries:
    """Recomputes tiles and passes the outputs of each to `consume`; yields as `tries` does."""
    # A worker opens its store. The damaged one may fail to open, so it gets the empty store.
    worker = _Recomputer(replace(run, out=audit.empty), consume)
    return tries(Stage(name, lambda: worker, run.device), tiles)


class _Recomputer:
    """A worker that passes its outputs to a function instead of writing them."""

    def __init__(self, run: Segmentation, consume: Callable[[int, Results], None]) -> None:
        worker = run.make_worker()
        self.read, self.predict, self.write = worker.read, worker.predict, consume
