"""Runs a stage to its end: each tile is tried, retried, tried alone, or given up.

Knows receipts, and the paths of ledger, marks and event log of a stage. Does not know what a tile
contains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine import cluster, engines
from unet_ray.engine.attempts import TRIES, Timeouts
from unet_ray.engine.cluster import EngineName
from unet_ray.engine.stages import Receipt, Stage
from unet_ray.errors import ChangedError, LostError, QuarantinedError, RunError
from unet_ray.storage.events import EventLog
from unet_ray.storage.layout import EVENTS, SEGMENT, ledger_of, marks_of
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import Ledger, committed
from unet_ray.storage.marks import marks_done, remove_older
from unet_ray.storage.places import Place, remove_partial, retried
from unet_ray.tiling.tiles import TilePlan

BITS_PER_STEP = 1 << 16  # tiles whose numbers are in memory at once
ERRORS_IN_MEMORY = 100  # given-up tiles whose messages are in memory; the event log has all


Tries = Generator[tuple[Receipt, bool], None, None]


@dataclass(frozen=True)
class Progress:
    """Progress of a stage after a tile.

    Attributes:
        done, total: committed tiles and requested tiles of this region.
        quarantined: tiles that this call has given up.
        finished: tiles that this call has committed.
        voxels: voxels that this call has written.
        seconds: elapsed since the first tile started.
        failures: failed attempts of this call.
        memory: largest memory use of a process after a tile, in bytes; 0 if unknown.
        memory_stated: planned upper bound of that memory use, in bytes.
        workers: tiles processed in parallel.
        stage: name of the stage.
    """

    done: int
    total: int
    quarantined: int
    finished: int
    voxels: int
    seconds: float
    failures: int = 0
    memory: int = 0
    memory_stated: int = 0
    workers: int = 1
    stage: str = SEGMENT


def tries(
    stage: Stage,
    tiles: Iterable[int],
    engine: EngineName = "local",
    workers: int | None = None,
    most: int = TRIES,
) -> Tries:
    """Tries the tiles of a stage. Failed tiles are retried after all others, or alone.

    Args:
        stage: the work.
        tiles: their numbers.
        engine: runs the tiles.
        workers: tiles in parallel; by default one per core or per GPU.
        most: attempts per tile before it is given up.

    Yields:
        The receipt of each attempt, and whether the tile will be tried again.
    """
    timeouts = Timeouts(stage.deadline)
    failed: dict[int, Receipt] = {}

    def one_round(tiles: Iterable[int], last: bool, alone: bool = False) -> Tries:
        # New workers have not measured any attempt yet.
        deadline = replace(stage.deadline, first=timeouts.limit)
        running = engines.run(replace(stage, deadline=deadline), tiles, engine, workers, alone)
        with closing(running) as receipts:
            for receipt in receipts:
                timeouts.record(receipt)
                failed.pop(receipt.tile, None)
                given_up = {"again": last, "alone": alone or most == 1}.get(receipt.verdict, True)
                again = bool(receipt.error) and not given_up
                if again:
                    failed[receipt.tile] = replace(receipt, error="", trace="")
                yield receipt, again

    yield from one_round(tiles, last=most == 1)
    for number in range(2, most + 1):
        for verdict in ("again", "alone"):
            retries = [tile for tile, receipt in failed.items() if receipt.verdict == verdict]
            if retries:
                alone = verdict == "alone"
                yield from one_round(retries, last=alone or number == most, alone=alone)


def numbers_of(bits: NDArray[np.bool_], layer: int = 0) -> Iterator[int]:
    """Yields the indices of true `bits`, without a list of all of them.

    Args:
        bits: of all tiles.
        layer: yield indices with this distance after each other; 0 for ascending ones.
    """
    if layer:
        for first in range(layer):
            yield from (first + layer * np.flatnonzero(bits[first::layer])).tolist()
        return
    for start in range(0, bits.size, BITS_PER_STEP):
        yield from (start + np.flatnonzero(bits[start : start + BITS_PER_STEP])).tolist()


def stopped(out: Place, stage: str, tiles: int, error: str) -> RunError:
    """Returns the error of a stage that a full disk ended, with the number of committed tiles."""
    done = int(committed(out / ledger_of(stage), tiles).sum())
    return RunError(
        f"{out}: {error}; {done} of {tiles} tiles are done and stay. Free disk space, then run the "
        "same command again to resume."
    )


class Rounds:
    """Runs one stage of one output to its end, by one call of `run`.

    Each stage has its own marks and ledger. All stages of an output share the event log.

    Args:
        stage: the work; its `marks` are replaced.
        plan: its tiles.
        out: the output, which has a private folder.
        lease: of the output, taken by the caller.
        engine: runs the tiles.
        workers: tiles in parallel; by default one per core or per GPU.
        watch: called after each tile that is done or given up.
        memory_stated: planned upper bound of the memory use of a process, in bytes.
        remedy: returns advice for a tile that failed for lack of memory, from its receipt.
    """

    def __init__(
        self,
        stage: Stage,
        plan: TilePlan,
        out: Place,
        lease: Lease,
        engine: EngineName = "local",
        workers: int | None = None,
        watch: Callable[[Progress], None] = lambda progress: None,
        memory_stated: int = 0,
        remedy: Callable[[Receipt], str] = lambda receipt: "",
    ) -> None:
        self._marks = out / marks_of(stage.name)
        self._stage = replace(stage, marks=self._marks / str(lease.epoch))  # only of this run
        self._plan, self._out, self._lease, self._watch = plan, out, lease, watch
        self._engine, self._workers, self._remedy = engine, workers, remedy
        self._log = EventLog(out / EVENTS, lease.fence.check)
        self._given_up: dict[int, str] = {}
        self._progress = Progress(0, 0, 0, 0, 0, 0.0, memory_stated=memory_stated, stage=stage.name)
        self._start = time.monotonic()

    def run(
        self,
        requested: NDArray[np.bool_],
        skipped: NDArray[np.bool_],
        absent: NDArray[np.bool_] | None = None,
        **facts: Any,
    ) -> int:
        """Processes all requested tiles that are not committed, or whose results are absent.

        Args:
            requested: bits of the requested tiles, (tiles,).
            skipped: bits of the tiles that a mask excludes, (tiles,).
            absent: bits of the tiles whose results do not exist, (tiles,); None if unknown.
            facts: of this run, for the event log.

        Returns:
            The number of tiles committed by this call.

        Raises:
            QuarantinedError: if tiles failed too often; all others are done.
            ChangedError: if an input of the stage has changed since it was prepared.
            RunError: if the disk accepts no more data, a GPU fails, or too many tiles hang.
            LostError: if another run has taken over the output.
        """
        folder = self._out / ledger_of(self._stage.name)
        remove_partial(folder)
        with Ledger(folder, len(self._plan), self._lease.epoch) as ledger:
            self._ledger = ledger
            try:
                return self._run(requested, skipped, absent, facts)
            finally:
                with suppress(LostError):  # the log now belongs to another run
                    self._log.flush()

    def _run(
        self,
        requested: NDArray[np.bool_],
        skipped: NDArray[np.bool_],
        absent: NDArray[np.bool_] | None,
        facts: dict[str, Any],
    ) -> int:
        self._lease.check(now=True)
        self._commit_marked()
        self._ledger.skip(skipped, requested)
        missing = requested & ~self._ledger.committed
        if absent is not None:
            missing |= requested & absent
        total, left = int(requested.sum()), int(missing.sum())
        workers = cluster.side_by_side(
            self._stage.device, self._engine, self._workers, self._stage.memory
        )
        self._progress = replace(
            self._progress, total=total, done=total - left, workers=max(1, min(workers, left))
        )
        self._add("start", engine=self._engine, workers=self._workers, missing=left, **facts)
        self._log.flush()  # `verify` reads the paths of input and model from it
        self._make_marks()
        tiles = numbers_of(missing, self._stage.layer)
        attempts = tries(self._stage, tiles, self._engine, self._workers)
        with closing(attempts):
            for receipt, again in attempts:
                self._lease.check()
                if receipt.error:
                    self._failed(receipt, again)
                else:
                    self._commit(receipt)
        self._stage.check()
        self._lease.check(now=True)  # otherwise the event would belong to another run
        self._add("end", tiles=self._progress.finished, seconds=round(self._seconds, 3))
        if self._given_up:
            raise QuarantinedError(self._quarantined())
        return self._progress.finished

    def _add(self, event: str, **facts: Any) -> None:
        self._log.add(event, stage=self._stage.name, **facts)

    def _commit_marked(self) -> None:
        """Commits tiles that workers of earlier runs finished, but no driver recorded."""
        with suppress(OSError):  # unreadable marks: the tiles are recomputed
            for mark in marks_done(self._marks, since=self._ledger.born):
                if 0 <= mark.tile < len(self._plan) and mark.tile not in self._ledger:
                    self._ledger.commit(mark.tile, mark.checksum)
        self._ledger.flush()

    def _make_marks(self) -> None:
        with suppress(OSError):  # workers of an ended run may still add marks
            remove_older(self._marks, self._lease.epoch)
        folder = self._marks / str(self._lease.epoch)
        if isinstance(folder, Path):  # object stores have no folders
            retried(folder, partial(folder.mkdir, parents=True, exist_ok=True))

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _commit(self, receipt: Receipt) -> None:
        self._given_up.pop(receipt.tile, None)  # it finished after its time limit
        self._ledger.commit(receipt.tile, receipt.checksum)
        self._add("tile", tile=receipt.tile, seconds=round(receipt.seconds, 4))
        now = self._progress
        self._show(
            done=now.done + 1,
            finished=now.finished + 1,
            voxels=now.voxels + self._plan[receipt.tile].write.size,
            memory=max(now.memory, receipt.memory),
        )

    def _failed(self, receipt: Receipt, again: bool) -> None:
        """Logs a failed attempt, and gives the tile up unless it will be tried again."""
        if receipt.verdict == "stop":
            self._lease.check(now=True)  # a worker may detect a lost lease first
        tile, box = receipt.tile, str(self._plan[receipt.tile].write)
        error = receipt.error + (self._remedy(receipt) if receipt.room else "")
        self._progress = replace(self._progress, failures=self._progress.failures + 1)
        self._add("failed", tile=tile, box=box, error=error, trace=receipt.trace)
        if receipt.verdict == "stop":
            self._ledger.flush()
            raise stopped(self._out, self._stage.name, len(self._plan), error)
        if receipt.verdict == "changed":
            self._ledger.flush()
            raise ChangedError(f"{self._out}: tile {tile} ({box}): {error}")
        if receipt.verdict == "broken":
            raise RunError(
                f"{self._out}: tile {tile} ({box}): {error}; this process can no longer use the "
                "GPU. Run the same command again to resume."
            )
        if again:
            return
        self._ledger.quarantine(tile)
        self._add("quarantined", tile=tile, box=box, error=error)
        self._given_up[tile] = error if len(self._given_up) < ERRORS_IN_MEMORY else ""
        self._show()

    def _show(self, **changed: Any) -> None:
        self._progress = replace(
            self._progress, quarantined=len(self._given_up), seconds=self._seconds, **changed
        )
        self._watch(self._progress)

    def _quarantined(self) -> str:
        tile, error = next(iter(self._given_up.items()))
        return (
            f"{self._out}: quarantined {len(self._given_up)} of {self._progress.total} tiles; all "
            f"others are done. The first is tile {tile} ({self._plan[tile].write}): {error} "
            "Run the same command again to retry only these tiles."
        )
