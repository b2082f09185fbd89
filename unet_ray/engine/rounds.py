"""A stage run to its end: every tile is tried, tried again, tried alone, or given up.

Knows receipts, and where the ledger, marks and event log of a stage lie. Does not know what a tile
is about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine import cluster, engines
from unet_ray.engine.attempts import TRIES, Patience
from unet_ray.engine.cluster import EngineName
from unet_ray.engine.stages import Receipt, Stage
from unet_ray.errors import LostError, QuarantinedError, RunError
from unet_ray.storage.events import EventLog
from unet_ray.storage.layout import EVENTS, ledger_of, marks_of
from unet_ray.storage.lease import Lease
from unet_ray.storage.ledger import Ledger, committed
from unet_ray.storage.marks import remove_older, tiles_done
from unet_ray.storage.places import Place, remove_partial
from unet_ray.tiling.tiles import TilePlan

PIECE = 1 << 16  # tiles whose numbers are in memory at once
KEPT_ERRORS = 100  # failures whose sentences are in memory; the event log has all


Tries = Generator[tuple[Receipt, bool], None, None]


@dataclass(frozen=True)
class Progress:
    """Where a stage stands after a tile.

    Attributes:
        done, total: tiles committed, and tiles asked for, in this region.
        quarantined: tiles that this call has given up.
        finished: tiles done by this call.
        voxels: voxels written by this call so far.
        seconds: since the first tile was started.
        failures: tries that failed in this call.
        memory: the most bytes that a process held after a tile; 0 if unknown.
        memory_stated: bytes that one was planned to hold at most.
        workers: tiles that are under way side by side.
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


def tries(
    stage: Stage,
    tiles: Iterable[int],
    engine: EngineName = "local",
    workers: int | None = None,
    most: int = TRIES,
) -> Tries:
    """Tries the tiles of a stage; those that fail again after all others, or alone.

    Args:
        stage: the work.
        tiles: their numbers.
        engine: runs the tiles.
        workers: tiles side by side.
        most: tries of a tile before it is given up.

    Yields:
        A receipt of every try, and whether the tile will be tried again.
    """
    patience = Patience(stage.deadline)
    failed: dict[int, Receipt] = {}

    def one_round(tiles: Iterable[int], last: bool, alone: bool = False) -> Tries:
        # Workers that are made anew have measured nothing yet.
        deadline = replace(stage.deadline, first=patience.limit)
        running = engines.run(replace(stage, deadline=deadline), tiles, engine, workers, alone)
        with closing(running) as receipts:
            for receipt in receipts:
                patience.saw(receipt)
                failed.pop(receipt.tile, None)
                given_up = {"again": last, "alone": alone or most == 1}.get(receipt.verdict, True)
                again = bool(receipt.error) and not given_up
                if again:
                    failed[receipt.tile] = replace(receipt, error="", trace="")
                yield receipt, again

    yield from one_round(tiles, last=most == 1)
    for number in range(2, most + 1):
        for verdict in ("again", "alone"):
            waiting = [tile for tile, receipt in failed.items() if receipt.verdict == verdict]
            if waiting:
                alone = verdict == "alone"
                yield from one_round(waiting, last=alone or number == most, alone=alone)


def numbers_of(bits: NDArray[np.bool_]) -> Iterator[int]:
    """Where `bits` are true, in ascending order, without a list of all."""
    for start in range(0, bits.size, PIECE):
        yield from (start + np.flatnonzero(bits[start : start + PIECE])).tolist()


def stopped(out: Place, stage: str, tiles: int, error: str) -> RunError:
    """The error of a stage that a full disk ended, with what is done and the remedy."""
    done = int(committed(out / ledger_of(stage), tiles).sum())
    return RunError(
        f"{out}: {error}; {done} of {tiles} tiles are done and stay: make room, and give the same "
        "command again."
    )


class Rounds:
    """One stage of one output, run to its end by one call of `run`.

    Marks and ledger are of this stage alone; the event log is shared by all stages of an output.

    Args:
        stage: the work; its marks are set here.
        plan: of its tiles.
        out: the output, which has a private folder.
        lease: held for the output.
        engine: runs the tiles.
        workers: tiles side by side.
        watch: called after each tile that is done or given up.
        memory_stated: bytes that a process was planned to hold at most.
        remedy: what to do about a tile that failed for lack of memory.
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
        self._stage = replace(stage, marks=self._marks / str(lease.epoch))  # of this run alone
        self._plan, self._out, self._lease, self._watch = plan, out, lease, watch
        self._engine, self._workers, self._remedy = engine, workers, remedy
        self._log = EventLog(out / EVENTS, lease.fence.check)
        self._given_up: dict[int, str] = {}
        self._progress = Progress(0, 0, 0, 0, 0, 0.0, memory_stated=memory_stated)
        self._start = time.monotonic()

    def run(self, wanted: NDArray[np.bool_], skipped: NDArray[np.bool_], **facts: Any) -> int:
        """Does the tiles that are wanted and not committed; returns how many.

        Args:
            wanted: bits of the tiles to do, (tiles,).
            skipped: bits of those that a mask leaves out, (tiles,).
            facts: what the event log says of this run.

        Raises:
            QuarantinedError: if tiles failed too often; all others are done.
            RunError: if the disk takes nothing more.
            LostError: if another run has taken over.
        """
        folder = self._out / ledger_of(self._stage.name)
        remove_partial(folder)
        with Ledger(folder, len(self._plan), self._lease.epoch) as ledger:
            self._ledger = ledger
            try:
                return self._run(wanted, skipped, facts)
            finally:
                with suppress(LostError):  # then it is the log of another run
                    self._log.flush()

    def _run(
        self, wanted: NDArray[np.bool_], skipped: NDArray[np.bool_], facts: dict[str, Any]
    ) -> int:
        self._lease.check(now=True)
        self._commit_unheard()
        self._ledger.skip(skipped, wanted)
        missing = wanted & ~self._ledger.committed
        total, left = int(wanted.sum()), int(missing.sum())
        workers = cluster.side_by_side(
            self._stage.device, self._engine, self._workers, self._stage.memory
        )
        self._progress = replace(
            self._progress, total=total, done=total - left, workers=max(1, min(workers, left))
        )
        self._add("start", engine=self._engine, workers=self._workers, missing=left, **facts)
        self._log.flush()  # `verify` reads input and model there
        self._make_marks()
        with closing(tries(self._stage, numbers_of(missing), self._engine, self._workers)) as tried:
            for receipt, again in tried:
                self._lease.check()
                if receipt.error:
                    self._failed(receipt, again)
                else:
                    self._commit(receipt)
        self._lease.check(now=True)  # else it would speak of the work of another
        self._add("end", tiles=self._progress.finished, seconds=round(self._seconds, 3))
        if self._given_up:
            raise QuarantinedError(self._quarantined())
        return self._progress.finished

    def _add(self, event: str, **facts: Any) -> None:
        self._log.add(event, stage=self._stage.name, **facts)

    def _commit_unheard(self) -> None:
        """Commits what workers of earlier runs had done, though no driver noted it any more."""
        with suppress(OSError):  # then it is done again
            for tile in tiles_done(self._marks, since=self._ledger.born):
                if tile not in self._ledger:
                    self._ledger.commit(tile)
        self._ledger.flush()

    def _make_marks(self) -> None:
        with suppress(OSError):  # workers of a run that is over may still be adding to theirs
            remove_older(self._marks, self._lease.epoch)
        (self._marks / str(self._lease.epoch)).mkdir(parents=True, exist_ok=True)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _commit(self, receipt: Receipt) -> None:
        self._given_up.pop(receipt.tile, None)  # it ended after all
        self._ledger.commit(receipt.tile)
        self._add("tile", tile=receipt.tile, seconds=round(receipt.seconds, 4))
        now = self._progress
        self._show(
            done=now.done + 1,
            finished=now.finished + 1,
            voxels=now.voxels + self._plan[receipt.tile].write.size,
            memory=max(now.memory, receipt.memory),
        )

    def _failed(self, receipt: Receipt, again: bool) -> None:
        """Notes a failed try; gives the tile up unless it will be tried again."""
        if receipt.verdict == "stop":
            self._lease.check(now=True)  # a worker may have found out first
        tile, box = receipt.tile, str(self._plan[receipt.tile].write)
        error = receipt.error + (self._remedy(receipt) if receipt.room else "")
        self._progress = replace(self._progress, failures=self._progress.failures + 1)
        self._add("failed", tile=tile, box=box, error=error, trace=receipt.trace)
        if receipt.verdict == "stop":
            self._ledger.flush()
            raise stopped(self._out, self._stage.name, len(self._plan), error)
        if receipt.verdict == "broken":
            raise RunError(
                f"{self._out}: tile {tile} ({box}): {error}; the GPU cannot be used any more in "
                "this process: give the same command again, it goes on."
            )
        if again:
            return
        self._ledger.quarantine(tile)
        self._add("quarantined", tile=tile, box=box, error=error)
        self._given_up[tile] = error if len(self._given_up) < KEPT_ERRORS else ""
        self._show()

    def _show(self, **changed: int) -> None:
        self._progress = replace(
            self._progress, quarantined=len(self._given_up), seconds=self._seconds, **changed
        )
        self._watch(self._progress)

    def _quarantined(self) -> str:
        tile, error = next(iter(self._given_up.items()))
        return (
            f"{self._out}: quarantined {len(self._given_up)} of {self._progress.total} tiles, all "
            f"others are done; the first is tile {tile} ({self._plan[tile].write}): {error} "
            "The same command tries only these again."
        )
