"""Runs tiles on threads of this process, at most a given number at a time.

Knows a function that tries one tile, and time limits. Does not know what a tile contains.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext, suppress
from queue import Empty, SimpleQueue
from typing import Any

import torch

from unet_ray.engine.attempts import TICK, Clock, Timeouts, failure
from unet_ray.engine.stages import STEPS, Deadline, Helper, Receipt, Stage, Step, TryOne
from unet_ray.errors import RunError

Receipts = Generator[Receipt, None, None]
# Wait at most this long for tiles in flight when the caller stops early.
GRACE_SECONDS = 5.0
JOIN_SECONDS = 5.0  # longest wait for an idle thread to end
THREAD = "tile"  # the name of every thread that a tile may keep busy


def worker_of(stage: Stage, steps: Sequence[Step] = STEPS) -> Helper:
    """Makes a worker of a stage for some steps; it opens model, input and output.

    Raises:
        RunError: if this takes longer than the deadline of the stage allows.
    """
    made: SimpleQueue[Helper | Exception] = SimpleQueue()

    def make() -> None:
        try:
            made.put(stage.make_for(steps))
        except Exception as error:  # raised below, in the calling thread
            made.put(error)

    threading.Thread(target=make, name=THREAD, daemon=True).start()
    try:
        worker = made.get(timeout=min(stage.deadline.make, threading.TIMEOUT_MAX))
    except Empty:
        raise RunError(
            f"{stage.name}: no worker started within {stage.deadline.make:.0f} s. Check that "
            "input, model and output respond, then run the same command again to resume."
        ) from None
    if isinstance(worker, Exception):
        raise worker
    return worker


def run_on_threads(
    try_one: TryOne, device: str, deadline: Deadline, runs: Iterator[list[int]], threads: int
) -> Receipts:
    """Tries tiles in parallel and yields a receipt for each attempt that finishes or times out.

    Args:
        try_one: tries a tile; enters the context manager passed to it while predicting.
        device: ``cpu``, or a GPU, where one pass runs at a time.
        deadline: time limits of an attempt.
        runs: tiles to run one after the other; consumed as threads become free.
        threads: tiles in flight.

    Raises:
        RunError: if too many tiles hang: none finishes in between, or together they would fill
            the memory.
    """
    # On a GPU only reading and writing run in parallel with a pass.
    predict_lock = nullcontext() if device == "cpu" else threading.Lock()
    run = _ParallelRun(lambda tile: try_one(tile, predict_lock), deadline, runs, threads)
    return run.receipts()


def has_left_threads() -> bool:
    """Returns whether threads of tiles that were given up still run in this process."""
    threads = [thread for thread in threading.enumerate() if thread.name == THREAD]
    for thread in threads:
        thread.join(0.1)  # idle threads end at once
    return any(thread.is_alive() for thread in threads)


class _TileThread:
    """A thread that tries the tiles it receives, one after another."""

    def __init__(self, try_one: Callable[[int], Receipt], ended: SimpleQueue[Any]) -> None:
        self._try, self._ended = try_one, ended
        self._tiles: SimpleQueue[int | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Ends the idle thread and waits for it.

        Python aborts the process if a thread of torch is still ending as the interpreter exits.
        """
        self._tiles.put(None)
        self._thread.join(JOIN_SECONDS)

    def take(self, tile: int | None) -> None:
        """Queues a tile, or ends the thread after the current one with None."""
        self._tiles.put(tile)

    def _work(self) -> None:
        torch.set_num_threads(1)
        while (tile := self._tiles.get()) is not None:
            try:
                receipt = self._try(tile)
            except Exception as error:  # otherwise the tile would disappear with the thread
                receipt = failure(tile, 0.0, error)
            self._ended.put((self, receipt))


class _ParallelRun:
    """Tries tiles on a fixed number of threads of this process.

    A thread cannot be ended. An attempt that exceeds its time limit is given up with its thread,
    and a new thread takes the next tile. If the attempt succeeds later, it yields a second
    receipt. The run fails if too many attempts in a row are given up, or too many still hang.
    """

    def __init__(
        self,
        try_one: Callable[[int], Receipt],
        deadline: Deadline,
        runs: Iterator[list[int]],
        threads: int,
    ) -> None:
        self._try, self._runs, self._threads = try_one, runs, threads
        self._begun: list[list[int]] = []  # the rest of runs of which no tile is in flight
        self._timeouts, self._clock = Timeouts(deadline), Clock()
        self._ended: SimpleQueue[tuple[_TileThread, Receipt]] = SimpleQueue()
        self._idle: list[_TileThread] = []
        self._busy: dict[_TileThread, tuple[list[int], float]] = {}
        self._overdue: set[_TileThread] = set()
        self._given_up_in_a_row = 0

    def receipts(self) -> Receipts:
        """Yields a receipt for each attempt that finishes or times out."""
        try:
            while self._start_tiles():
                ended = self._wait(min(TICK, self._timeouts.limit / 4))
                yield from [*ended, *self._give_up_overdue()]
                self._refuse_to_hang()
        except GeneratorExit:
            end = time.monotonic() + GRACE_SECONDS
            while self._busy and (left := end - time.monotonic()) > 0:
                self._wait(left)
            raise
        finally:
            for thread in [*self._busy, *self._overdue]:
                thread.take(None)
            for thread in self._idle:
                thread.end()

    def _start_tiles(self) -> bool:
        """Starts a tile on every free thread. Returns whether any thread is busy."""
        while len(self._busy) < self._threads:
            run = self._begun.pop() if self._begun else next(self._runs, None)
            if run is None:
                break
            thread = self._idle.pop() if self._idle else _TileThread(self._try, self._ended)
            self._busy[thread] = run, self._clock.now()
            thread.take(run[0])
        return bool(self._busy)

    def _end(self, thread: _TileThread) -> int:
        """Ends the tile of a busy thread, so that its run can go on; returns its number."""
        (tile, *rest), _ = self._busy.pop(thread)
        if rest:
            self._begun.append(rest)
        return tile

    def _wait(self, seconds: float) -> list[Receipt]:
        """Returns new receipts; waits at most `seconds` for the first."""
        receipts = []
        with suppress(Empty):
            while True:
                thread, receipt = self._ended.get(timeout=seconds)
                seconds, self._given_up_in_a_row = 0.0, 0
                self._timeouts.record(receipt)
                if thread in self._busy:
                    self._end(thread)
                    self._idle.append(thread)
                    receipts.append(receipt)
                else:
                    self._overdue.remove(thread)
                    thread.take(None)
                    receipts += [] if receipt.error else [receipt]
        return receipts

    def _give_up_overdue(self) -> list[Receipt]:
        now, limit = self._clock.now(), self._timeouts.limit
        starts = {thread: start for thread, (_, start) in self._busy.items() if now - start > limit}
        self._overdue |= {*starts}
        self._given_up_in_a_row += len(starts)
        return [
            Receipt(self._end(thread), now - start, f"did not end within {limit:.0f} s.")
            for thread, start in starts.items()
        ]

    def _refuse_to_hang(self) -> None:
        if self._given_up_in_a_row >= 2 * max(2, self._threads):
            reason = "and none finished in between"
        elif len(self._overdue) > 8 * self._threads:
            reason = "and each keeps its memory"
        else:
            return
        raise RunError(
            f"{len(self._overdue)} tiles hang, {reason} (limit for one: "
            f"{self._timeouts.limit:.0f} s). Check that input and output respond, then run the "
            "same command again to resume."
        )
