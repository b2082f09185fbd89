"""Marks and deadlines around the tiles of one Ray worker.

Knows tiles that end or outlast their process. Does not know what a tile is about.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from unet_ray.engine.attempts import TICK, TRIES, Clock, Patience, failure
from unet_ray.engine.stages import Carried, Deadline, Receipt, Step
from unet_ray.errors import RunError
from unet_ray.machine import machine_name, memory_available
from unet_ray.storage.marks import Mark, Marks
from unet_ray.storage.places import Place

NOTE_SECONDS = 5.0  # for the last marks of a process


class Guarded:
    """Steps of tiles in a Ray worker: each is marked, and one that takes too long ends the process.

    Ray tries a tile that ends its actor without end; the marks say when to stop. It also hands out
    again what is done, if it did not hear the end of the block; such a tile is marked, and keeps
    its shards. A thread cannot be ended, so a step that hangs takes its process along, and
    Ray starts another.

    Args:
        folder: of the marks.
        steps: that are taken here.
        deadline: of a tile.
    """

    def __init__(self, folder: Place, steps: Sequence[Step], deadline: Deadline) -> None:
        self._folder, self._last = folder, steps[-1]
        self._patience = Patience(deadline)
        self._clock, self._begun = Clock(), dict[int, tuple[float, Marks]]()
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def marks_of(self, first: int) -> Marks:
        """The marks of the tiles that are handed out together, by the first of them."""
        name = f"{first}" if self._last == "write" else f"{self._last}-{first}"
        return Marks(self._folder / name)

    def carry(self, tile: int, marks: Marks, go: Callable[[], Carried]) -> Carried:
        """Goes on with a tile, unless it is done, or has ended too many processes.

        Args:
            tile: its number.
            marks: of its block.
            go: takes the steps.
        """
        self._begun[tile] = start = self._clock.now(), marks
        try:
            if known := _known(tile, marks.before(tile)):
                return Carried(known)
            marks.add(Mark(tile, "begun"))
            carried = go()
            if carried.receipt.verdict == "broken":
                os.kill(os.getpid(), signal.SIGKILL)  # a fresh process may do better
            self._patience.saw(carried.receipt)
            with suppress(OSError):  # then it may be done again
                marks.add(self._mark_of(carried.receipt))
            return carried
        except OSError as error:  # of the marks before it
            return Carried(failure(tile, self._clock.now() - start[0], error))
        finally:
            self._begun.pop(tile, None)

    def _mark_of(self, receipt: Receipt) -> Mark:
        if receipt.error or self._last != "write":
            return Mark(receipt.tile, "ended")
        return Mark(receipt.tile, "done", receipt.seconds, receipt.memory)

    def _watch(self) -> None:
        while True:
            time.sleep(min(TICK, self._patience.limit / 4))
            now, limit = self._clock.now(), self._patience.limit
            late = [n for n, (begun, _) in self._begun.copy().items() if now - begun > limit]
            if late:
                self._end(late)

    def _end(self, late: list[int]) -> None:
        """Ends the process; marks why, if the disk of the marks answers."""
        try:
            noting = threading.Thread(target=self._note, args=(late,), daemon=True)
            noting.start()
            noting.join(NOTE_SECONDS)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, late: list[int]) -> None:
        with suppress(OSError):
            for tile in late:
                if begun := self._begun.get(tile):
                    _, marks = begun
                    marks.add(Mark(tile, "late"))


@contextmanager
def made_in_time(folder: Place, name: str) -> Iterator[None]:
    """Held while a worker is made; refuses to begin if that has ended its process too often.

    Ray makes a worker again without end.

    Args:
        folder: of marks.
        name: of the worker, the same when it is made again.

    Raises:
        RunError: if it has.
    """
    marks, begun = Marks(folder / f"made-{name}"), 0
    with suppress(OSError):  # the first tile fails with the same error
        begun = [mark.event for mark in marks.before(0)].count("begun")
        marks.add(Mark(0, "begun"))
    if begun >= TRIES:
        raise RunError(
            f"a worker on {machine_name()} ended {begun} times while it was made: killed, as "
            "by a lack of memory, or by its libraries, such as those of a GPU; give fewer "
            "--workers, or use machines that can run it; the same command goes on."
        )
    yield
    with suppress(OSError):
        marks.add(Mark(0, "ended"))  # so that those before count no more


def is_suspect(tile: int, marks: Marks) -> bool:
    """Whether a tile may have ended its process, alone or with those beside it."""
    try:
        before = marks.before(tile)
    except OSError:  # the try reads them again and reports it
        return False
    return bool(before) and not _is_done(before)


def _is_done(before: list[Mark]) -> bool:
    return bool(before) and before[-1].event == "done"


def _known(tile: int, before: list[Mark]) -> Receipt | None:
    """The receipt of a tile that the marks say all of; None for one that is to be tried."""
    if _is_done(before):
        return Receipt(tile, before[-1].seconds, memory=before[-1].memory)
    events = [mark.event for mark in before]
    begun, late = events.count("begun"), events.count("late")
    if begun < TRIES:
        return None
    return Receipt(tile, 0.0, _deadly(begun, late), "", "never", 0 if late else memory_available())


def _deadly(tries: int, late: int) -> str:
    if late:
        return (
            f"was begun {tries} times and did not end in time, {late} times; see whether its part "
            "of the input can be read, and whether the output's disk answers."
        )
    return (
        f"was begun {tries} times and never ended: its workers were killed, as by a lack of "
        "memory, their GPUs failed, or their machines were lost."
    )
