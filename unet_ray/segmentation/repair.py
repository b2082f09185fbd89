"""Tiles of a store made again: to compare them with what is stored, or to replace it.

Knows how a run made a store, from its provenance and event log. Does not know which tiles to make.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine.rounds import Tries, tries
from unet_ray.engine.stages import Stage
from unet_ray.errors import DamageError, InputError, LostError, RunError
from unet_ray.segmentation.preparation import prepare
from unet_ray.segmentation.run import Segmentation
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.audit import Audit, refuse_link
from unet_ray.storage.events import read_events
from unet_ray.storage.layout import EVENTS, PRIVATE, SEGMENT
from unet_ray.storage.lease import Lease
from unet_ray.storage.places import Place, write_whole
from unet_ray.storage.stores import Store

Results = Mapping[str, NDArray[np.uint8]]


def run_that_made(audit: Audit) -> Segmentation:
    """The run that made a store, from its event log.

    Raises:
        InputError: if input or model are not there or not the same any more.
    """
    path, provenance = audit.path, audit.provenance
    events = (e for e in read_events(path / EVENTS) if e.get("event") == "start")
    *_, last = ({}, *(e for e in events if e.get("stage", SEGMENT) == SEGMENT))
    source, model = last.get("input"), last.get("model")
    try:
        if not isinstance(source, str) or not isinstance(model, str):
            raise InputError("its event log does not say of which input and model it was made")
        settings = Settings(
            channel=provenance.channel,
            time=provenance.time,
            level=provenance.level,
            memory=sys.maxsize,  # the plan of the store is kept, whatever it needs
            precision=provenance.precision,
            tta=provenance.tta,
            nan=provenance.nan,
        )
        return prepare(source, model, path, settings)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        # What comes after it is for those who segment.
        reason = str(error).partition("; ")[0].rstrip(".")
        raise InputError(
            f"{path}: its tiles cannot be made again: {reason}; put back input and model as they "
            "were, or check without them: --tiles 0 and no --repair."
        ) from error


@dataclass
class Remade:
    """Tiles that were made again.

    Attributes:
        agreed: those that gave what is stored, and are not of one value.
        differing: what is wrong with each output of those that did not.
        tiles: all of them.
        failed: a sentence for each that could not be made.
    """

    agreed: list[int] = field(default_factory=list)
    differing: dict[int, dict[str, str]] = field(default_factory=dict)
    tiles: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def recompute(audit: Audit, run: Segmentation, tiles: Iterable[int], remade: Remade) -> None:
    """Makes tiles again, compares them with what is stored, and adds them to `remade`."""

    def compare(tile: int, result: Results) -> None:
        found = _differing(audit, tile, result)
        if found:
            remade.differing[tile] = found
        elif any(np.ptp(voxels) for voxels in result.values()):
            remade.agreed.append(tile)

    with closing(_made("verify", audit, run, tiles, compare)) as tried:
        for receipt, again in tried:
            if not receipt.error:
                remade.tiles.append(receipt.tile)
            elif not again:
                remade.failed.append(
                    f"{audit.path}: tile {receipt.tile} cannot be made again: {receipt.error}"
                )


def _differing(audit: Audit, tile: int, result: Results) -> dict[str, str]:
    """What is wrong with each output of a tile that does not hold the voxels of `result`."""
    found = {}
    z, y, x = audit.plan[tile].crop.slices
    for name in audit.outputs:
        voxels = result[name][..., z, y, x]
        try:
            differing = int(np.count_nonzero(audit.decode(name, tile) != voxels))
        except DamageError as error:  # since it was checked
            found[name] = str(error)
            continue
        if differing:
            found[name] = f"differs from the tile made again, in {differing} values"
    return found


def repair_shards(
    audit: Audit, run: Segmentation, bad: Mapping[int, Iterable[str]], lease: Lease
) -> tuple[list[int], list[str]]:
    """Makes damaged shards again and writes them.

    Args:
        audit: of the store.
        run: that made it.
        bad: the damaged outputs of each tile; those that are sound are left alone.
        lease: held for the store.

    Returns:
        Numbers of the repaired tiles, and a sentence for each that could not be repaired.

    Raises:
        RunError: if the disk takes nothing more.
    """
    repaired, failed = [], []

    def write(tile: int, result: Results) -> None:
        for name in bad[tile]:
            refuse_link(audit.path, audit.shard(name, tile).parent)
        Store(audit.path, [*bad[tile]], lease.fence.hold).write(audit.plan[tile], result)

    with closing(_made("repair", audit, run, sorted(bad), write)) as tried:
        for receipt, again in tried:
            lease.check(now=receipt.verdict == "stop")
            if receipt.verdict == "stop":
                raise RunError(f"{audit.path}: {receipt.error}; make room and repair again.")
            if not receipt.error:
                repaired.append(receipt.tile)
            elif not again:
                failed.append(
                    f"{audit.path}: tile {receipt.tile} cannot be repaired: {receipt.error}"
                )
    lease.check(now=True)
    return repaired, failed


def repair_metadata(audit: Audit, paths: Iterable[Place], lease: Lease) -> list[str]:
    """Writes metadata files as they should be; returns a sentence for each that it could not."""
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


def _made(
    name: str,
    audit: Audit,
    run: Segmentation,
    tiles: Iterable[int],
    use: Callable[[int, Results], None],
) -> Tries:
    """Makes tiles again and hands the outputs of each to `use`."""
    # The empty store is known to be sound, and nothing is written there.
    worker = _Again(replace(run, out=audit.empty), use)
    return tries(Stage(name, lambda: worker, run.device), tiles)


class _Again:
    """A worker that makes tiles as they were made; what it writes goes to a function."""

    def __init__(self, run: Segmentation, use: Callable[[int, Results], None]) -> None:
        worker = run.make_worker()
        self.read, self.predict, self.write = worker.read, worker.predict, use
