"""What is left to do of a run, done: tiles tried and tried again, noted, given up.

Knows tile numbers and their receipts, lease, ledger and log; does not know what is in a tile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine import cluster, engines
from unet_ray.engine.attempts import DISK_ERRORS, TRIES, Patience, is_out_of_memory
from unet_ray.engine.stages import Receipt, Stage
from unet_ray.errors import LostError, QuarantinedError, RunError
from unet_ray.machine import room
from unet_ray.segmentation.memory import (
    helper_bytes,
    needed_bytes,
    process_bytes,
    together,
    under_way,
)
from unet_ray.segmentation.preparation import Wanted, pending_tiles, wanted_tiles
from unet_ray.segmentation.run import Segmentation, refuse_difference
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.events import EventLog
from unet_ray.storage.inspection import told_by
from unet_ray.storage.layout import EVENTS, LEDGER, MARKS, PRIVATE, StoreLayout
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import Ledger, begin, committed, newest
from unet_ray.storage.marks import remove_older, tiles_done
from unet_ray.storage.places import remove_partial
from unet_ray.storage.stores import Store, create_store, remove_deleted
from unet_ray.units import format_bytes

PIECE = 1 << 16  # tiles whose numbers are in memory at once
TOLD = 100  # failures whose sentences are


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a tile.

    Attributes:
        done, total: tiles committed, and tiles asked for, in this region.
        quarantined: tiles that this call has given up.
        finished: tiles done by this call.
        voxels: voxels written by this call so far.
        seconds: since the first tile was started.
        failures: tries that failed in this call.
        held: the most bytes that a process held after a tile; 0 if unknown.
        promised: bytes that one was planned to hold at most.
        workers: tiles that are under way side by side.
    """

    done: int
    total: int
    quarantined: int
    finished: int
    voxels: int
    seconds: float
    failures: int = 0
    held: int = 0
    promised: int = 0
    workers: int = 1


def execute(run: Segmentation, settings: Settings, watch: Callable[[Progress], None]) -> int:
    """Does what is missing of a run; returns the number of tiles that it did.

    A tile that fails is tried again after all others, and quarantined when that was of no use.

    Args:
        run: from `prepare`.
        settings: the same as given there.
        watch: called after each tile that is done or given up.

    Raises:
        QuarantinedError: if tiles failed too often; all others are done.
        InputError: if another run is writing there.
        LostError: if another run has taken over.
        RunError: if the disk takes nothing more. What was committed stays in either case, and the
            next run goes on from it.
    """
    wanted = wanted_tiles(run, settings)
    if run.resumed and not pending_tiles(run, wanted).any():
        return 0  # a finished store is not touched at all
    try:
        with Lease(run.out / PRIVATE, settings.takeover, after=newest(run.out / LEDGER)) as lease:
            try:
                return _execute(run, settings, wanted, lease, watch)
            except OSError:
                lease.check(now=True)  # what another run deleted is no error of a disk
                raise
    except OSError as error:  # of ledger, lease or log, which lie on the same disk
        if error.errno not in DISK_ERRORS:
            raise
        raise RunError(_stopped(run, str(error.strerror))) from error
    except (RuntimeError, MemoryError) as error:  # of torch, while a worker is made
        if isinstance(error, RunError) or not is_out_of_memory(error):
            raise
        raise RunError(
            f"{run.out}: no memory for a worker ({error}); its plan is for "
            f"{format_bytes(run.memory.total)} each, {format_bytes(room())} could be had: give "
            "fewer --workers, or use a machine with more."
        ) from error


def _execute(
    run: Segmentation,
    settings: Settings,
    wanted: Wanted,
    lease: Lease,
    watch: Callable[[Progress], None],
) -> int:
    _open_store(run, settings, lease)
    lease.check(now=True)  # from here on what is half-written is of runs that are over
    remove_partial(run.out / PRIVATE)
    remove_partial(run.out / LEDGER)
    remove_deleted(run.out)
    with Ledger(run.out / LEDGER, len(run.plan), lease.epoch) as ledger:
        owned = replace(run, fence=lease.fence)
        execution = _Execution(owned, settings, wanted, lease, ledger, watch)
        try:
            return execution.go()
        finally:
            with suppress(LostError):  # then it is the log of another run
                execution.log.flush()


def _open_store(run: Segmentation, settings: Settings, lease: Lease) -> None:
    """Opens the store, or makes it; makes sure that what lies there is of this run."""
    told = None if settings.overwrite else told_by(run.out, anew=False)
    if told is None:
        with lease.fence.hold():
            begin(run.out / LEDGER, lease.epoch)  # from here on nothing counts as done
        layout = StoreLayout(run.plan, run.class_values, run.outputs, run.volume.voxel_size)
        create_store(run.out, layout, run.provenance, lease.fence.hold)
    else:  # another may have made it since
        refuse_difference(run.out, told, run.provenance)
    Store(run.out, run.outputs).require_plan(run.plan)


def _numbers(bits: NDArray[np.bool_]) -> Iterator[int]:
    """Where `bits` are true, in ascending order, without a list of them all."""
    for start in range(0, bits.size, PIECE):
        yield from (start + np.flatnonzero(bits[start : start + PIECE])).tolist()


def _stopped(run: Segmentation, error: str) -> str:
    done = int(committed(run.out / LEDGER, len(run.plan)).sum())
    return (
        f"{run.out}: {error}; {done} of {len(run.plan)} tiles are done and stay: make room, and "
        "give the same command again."
    )


class _Execution:
    """One call of `execute`: what it has done so far, in ledger, event log and progress."""

    def __init__(
        self,
        run: Segmentation,
        settings: Settings,
        wanted: Wanted,
        lease: Lease,
        ledger: Ledger,
        watch: Callable[[Progress], None],
    ) -> None:
        self._run, self._settings, self._watch = run, settings, watch
        self._lease, self._ledger = lease, ledger
        self.log = EventLog(run.out / EVENTS, lease.fence.check)
        self._wanted, self._total = wanted, int(wanted.tiles.sum())
        self._start, self._before, self._done, self._voxels = time.monotonic(), 0, 0, 0
        self._given_up: dict[int, str] = {}
        self._failures, self._held = 0, 0
        kinds = process_bytes, helper_bytes
        self._promised = max(kind(run.memory, run.device, settings) for kind in kinds)
        self._workers = 1

    def go(self) -> int:
        run, settings = self._run, self._settings
        self._lease.check(now=True)
        self._commit_unheard()
        self._ledger.skip(self._wanted.skipped, self._wanted.tiles)
        missing = self._wanted.tiles & ~self._ledger.committed
        self._before = self._total - int(missing.sum())
        self._workers = max(1, min(self._side_by_side(), int(missing.sum())))
        self.log.add(
            "start",
            input=run.volume.path,
            model=str(run.model.absolute()),
            engine=settings.engine,
            workers=settings.workers,
            missing=self._total - self._before,
            **({"mask": run.mask.path} if run.mask else {}),
        )
        self.log.flush()  # it tells `verify` of input and model
        marks = run.out / MARKS / str(self._lease.epoch)  # of this run alone
        with suppress(OSError):  # workers of a run that is over may still be adding to theirs
            remove_older(run.out / MARKS, self._lease.epoch)
        marks.mkdir(parents=True, exist_ok=True)
        self._stage = Stage(
            "segment",
            run.make_worker,
            run.device,
            marks,
            under_way=under_way(run.memory, run.device, settings),
            together=together(run.memory, run.device, settings),
            memory=needed_bytes(run.memory, run.device, settings),
            make_helper=run.make_helper,
        )
        self._patience = Patience(self._stage.deadline)
        again = self._try(_numbers(missing))
        for last in [False] * (TRIES - 2) + [True]:
            crowd = [receipt.tile for receipt in again if receipt.verdict == "again"]
            again = [receipt for receipt in again if receipt.verdict == "alone"]
            again += self._try(crowd, last) if crowd else []
            alone = [receipt.tile for receipt in again if receipt.verdict == "alone"]
            again = [receipt for receipt in again if receipt.verdict == "again"]
            again += self._try(alone, last=True, alone=True) if alone else []
        self._lease.check(now=True)  # else it would tell of the work of another
        self.log.add("end", tiles=self._done, seconds=round(self._seconds, 3))
        if self._given_up:
            raise QuarantinedError(self._told())
        return self._done

    def _side_by_side(self) -> int:
        run, settings = self._run, self._settings
        need = needed_bytes(run.memory, run.device, settings)
        return cluster.side_by_side(run.device, settings.engine, settings.workers, need)

    def _commit_unheard(self) -> None:
        """Commits what workers of earlier runs had done, though no driver noted it any more."""
        with suppress(OSError):  # then it is done again
            for tile in tiles_done(self._run.out / MARKS, since=self._ledger.born):
                if tile not in self._ledger:
                    self._ledger.commit(tile)
        self._ledger.flush()

    def _try(self, tiles: Iterable[int], last: bool = False, alone: bool = False) -> list[Receipt]:
        """Tries tiles; gives the failures of those that are to be tried again."""
        failed: dict[int, Receipt] = {}
        settings = self._settings
        # Workers that are made anew have measured nothing yet.
        deadline = replace(self._stage.deadline, first=self._patience.limit)
        stage = replace(self._stage, deadline=deadline)
        trying = engines.run(stage, tiles, settings.engine, settings.workers, alone)
        with closing(trying) as receipts:
            for receipt in receipts:
                self._lease.check()
                self._patience.saw(receipt)
                if not receipt.error:
                    failed.pop(receipt.tile, None)
                    self._commit(receipt)
                elif self._failed(receipt, last, alone):
                    failed[receipt.tile] = replace(receipt, error="", trace="")  # the log has it
        return [*failed.values()]

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _commit(self, receipt: Receipt) -> None:
        self._given_up.pop(receipt.tile, None)  # it ended after all
        self._ledger.commit(receipt.tile)
        self.log.add("tile", tile=receipt.tile, seconds=round(receipt.seconds, 4))
        self._done += 1
        self._voxels += self._run.plan[receipt.tile].write.size
        self._held = max(self._held, receipt.held)
        self._tell()

    def _failed(self, receipt: Receipt, last: bool, alone: bool) -> bool:
        """Notes a failure; whether the tile is to be tried again in this run."""
        if receipt.verdict == "stop":
            self._lease.check(now=True)  # a worker may have found out first
        tile, box = receipt.tile, str(self._run.plan[receipt.tile].write)
        error = receipt.error + (self._fitting(receipt.room) if receipt.room else "")
        self._failures += 1
        self.log.add("failed", tile=tile, box=box, error=error, trace=receipt.trace)
        if receipt.verdict == "stop":
            self._ledger.flush()
            raise RunError(_stopped(self._run, error))
        if receipt.verdict == "broken":
            raise RunError(
                f"{self._run.out}: tile {tile} ({box}): {error}; the GPU cannot be used any more "
                "in this process: give the same command again, it goes on."
            )
        given_up = {"again": last, "alone": alone}.get(receipt.verdict, True)
        if not given_up:
            return True
        self._ledger.quarantine(tile)
        self.log.add("quarantined", tile=tile, box=box, error=error)
        self._given_up[tile] = error if len(self._given_up) < TOLD else ""  # the log has them all
        self._tell()
        return False

    def _fitting(self, room: int) -> str:
        """What to do about a lack of memory where a worker could have had `room` bytes."""
        planned = self._run.memory.total
        # A worker that failed within its plan had less than the system says; and all have more.
        fits = min(int(0.9 * room), int(0.75 * planned)) >> 20
        return (
            f" The plan of this store is for {format_bytes(planned)} per worker, and "
            f"{format_bytes(room)} could be had: give --memory {fits}MiB and another --out."
        )

    def _tell(self) -> None:
        done, given_up = self._before + self._done, len(self._given_up)
        self._watch(
            Progress(
                done,
                self._total,
                given_up,
                self._done,
                self._voxels,
                self._seconds,
                self._failures,
                self._held,
                self._promised,
                self._workers,
            )
        )

    def _told(self) -> str:
        tile, error = next(iter(self._given_up.items()))
        return (
            f"{self._run.out}: quarantined {len(self._given_up)} of {self._total} tiles, all "
            f"others are done; the first is tile {tile} ({self._run.plan[tile].write}): {error} "
            "The same command tries only these again."
        )
