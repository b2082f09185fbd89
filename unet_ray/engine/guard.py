"""Marks and deadlines for the tiles of one Ray worker.

Knows tiles that kill or hang their process. Does not know what a tile contains.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from unet_ray.engine.attempts import TICK, TRIES, Clock, Timeouts, failure
from unet_ray.engine.stages import Deadline, Receipt, Step, TileState
from unet_ray.errors import RunError
from unet_ray.machine import machine_name, memory_available
from unet_ray.storage.marks import Mark, Marks
from unet_ray.storage.places import Place

NOTE_SECONDS = 5.0  # to write the last marks of a process


class Guard:
    """Runs steps of tiles in a Ray worker: marks each tile, and ends the process if one hangs.

    Ray retries a tile that kills its actor without limit; the marks say when to stop. Ray also
    hands out finished tiles again if it missed the end of their block; their marks keep their
    shards from being written twice. A thread cannot be ended, so a step that hangs ends its
    process, and Ray starts another.

    Args:
        folder: of the marks.
        steps: that this worker runs.
        deadline: time limits of a tile.
    """

    def __init__(self, folder: Place, steps: Sequence[Step], deadline: Deadline) -> None:
        self._folder, self._last_step = folder, steps[-1]
        self._timeouts = Timeouts(deadline)
        self._clock, self._running = Clock(), dict[int, tuple[float, Marks]]()
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def marks_of(self, first: int) -> Marks:
        """Returns the marks of a block, named after its first tile."""
        name = f"{first}" if self._last_step == "write" else f"{self._last_step}-{first}"
        return Marks(self._folder / name)

    def run(self, tile: int, marks: Marks, take_steps: Callable[[], TileState]) -> TileState:
        """Runs the steps of a tile, unless it is done or has ended too many processes.

        Args:
            tile: its number.
            marks: of its block.
            take_steps: runs the steps.
        """
        self._running[tile] = start = self._clock.now(), marks
        try:
            if receipt := _final_receipt(tile, marks.before(tile)):
                return TileState(receipt)
            marks.add(Mark(tile, "begun"))
            state = take_steps()
            if state.receipt.verdict == "broken":
                os.kill(os.getpid(), signal.SIGKILL)  # a new process may be able to use the GPU
            self._timeouts.record(state.receipt)
            with suppress(OSError):  # without the mark, the tile may be recomputed
                marks.add(self._mark_of(state.receipt))
            return state
        except OSError as error:  # raised by the marks before the steps
            return TileState(failure(tile, self._clock.now() - start[0], error))
        finally:
            self._running.pop(tile, None)

    def _mark_of(self, receipt: Receipt) -> Mark:
        if receipt.error or self._last_step != "write":
            return Mark(receipt.tile, "ended")
        return Mark(receipt.tile, "done", receipt.seconds, receipt.memory, receipt.checksum)

    def _watch(self) -> None:
        while True:
            time.sleep(min(TICK, self._timeouts.limit / 4))
            now, limit = self._clock.now(), self._timeouts.limit
            running = self._running.copy()
            overdue = [tile for tile, (start, _) in running.items() if now - start > limit]
            if overdue:
                self._end(overdue)

    def _end(self, overdue: list[int]) -> None:
        """Ends the process; marks the reason first, if the disk of the marks responds in time."""
        try:
            marking = threading.Thread(target=self._mark_overdue, args=(overdue,), daemon=True)
            marking.start()
            marking.join(NOTE_SECONDS)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)

    def _mark_overdue(self, overdue: list[int]) -> None:
        with suppress(OSError):
            for tile in overdue:
                if running := self._running.get(tile):
                    _, marks = running
                    marks.add(Mark(tile, "late"))


@contextmanager
def limit_restarts(folder: Place, name: str) -> Iterator[None]:
    """Encloses the creation of a worker, which may end its process only a few times.

    Ray itself restarts a worker without limit.

    Args:
        folder: of marks.
        name: of the worker, the same after a restart.

    Raises:
        RunError: if creating the worker has ended its process too often.
    """
    marks, starts = Marks(folder / f"made-{name}"), 0
    with suppress(OSError):  # the first tile fails with the same error
        starts = [mark.event for mark in marks.before(0)].count("begun")
        marks.add(Mark(0, "begun"))
    if starts >= TRIES:
        raise RunError(
            f"a worker on {machine_name()} died {starts} times while starting, for example of a "
            "lack of memory or in a library of its GPU. Use fewer --workers or machines that can "
            "run it, then run the same command again to resume."
        )
    yield
    with suppress(OSError):
        marks.add(Mark(0, "ended"))  # resets the count


def is_suspect(tile: int, marks: Marks) -> bool:
    """Returns whether a process ended during this tile, which may or may not be the cause."""
    try:
        before = marks.before(tile)
    except OSError:  # the attempt reads the marks again and reports the error
        return False
    return bool(before) and not _is_done(before)


def _is_done(before: list[Mark]) -> bool:
    return bool(before) and before[-1].event == "done"


def _final_receipt(tile: int, before: list[Mark]) -> Receipt | None:
    """Returns the receipt of a tile that is done or must be given up; None to try the tile."""
    if _is_done(before):
        last = before[-1]
        return Receipt(tile, last.seconds, memory=last.memory, checksum=last.checksum)
    events = [mark.event for mark in before]
    begun, overdue = events.count("begun"), events.count("late")
    if begun < TRIES:
        return None
    error, room = _deadly(begun, overdue), 0 if overdue else memory_available()
    return Receipt(tile, 0.0, error, "", "never", room)


def _deadly(attempts: int, overdue: int) -> str:
    if overdue:
        return (
            f"was started {attempts} times and exceeded its time limit {overdue} times. Check that "
            "its part of the input can be read and that the disk of the output responds."
        )
    return (
        f"was started {attempts} times and never finished: its workers were killed, for example "
        "for lack of memory, their GPUs failed, or their machines were lost."
    )
