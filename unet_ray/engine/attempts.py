"""One try of a tile: read, predict, write; what a failure means, and how long a try may take.

Knows a worker's three steps and tile numbers; does not know who runs them, in one process or in
three, or what a tile is about.
A tile that ends its process can tell nobody, so workers of Ray mark on disk what becomes of each.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch

from unet_ray.errors import LostError, RunError, UnetRayError, VoxelError
from unet_ray.segmentation.memory import held, room
from unet_ray.storage.marks import Mark, Marks
from unet_ray.storage.places import Place

Verdict = Literal["again", "alone", "never", "stop", "broken"]
Step = Literal["read", "predict", "write"]
STEPS: tuple[Step, ...] = ("read", "predict", "write")
# How often a tile is tried in a run, before it is given up.
TRIES = 3
# A disk that takes nothing more: full, over quota, read-only.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
# How torch and its libraries say it; they have no type of their own for it, but on a GPU.
_NO_MEMORY = re.compile(
    r"(can.t|cannot) allocate memory|(out of|not enough) memory|bad_alloc|ALLOC_FAILED|new thread",
    re.I,
)
# Tiles of which the median is taken, at most, and at least.
SEEN, ENOUGH = 101, 3
TICK = 1.0  # seconds between two looks at the clock
NOTE_SECONDS = 5.0  # for the last marks of a process
MOST_SECONDS = 60.0  # after which no more tiles of a block are begun: it is told of when it ends


@dataclass(frozen=True)
class Receipt:
    """What is known of a tile that was tried.

    Attributes:
        tile: its number.
        seconds: time spent reading, predicting and writing together.
        error: one sentence if it failed; nothing was committed then.
        trace: where it failed, as Python tells it.
        verdict: of a failure: ``again`` may do better, ``alone`` (on a machine's memory) may do
            better with nothing beside it, ``never`` cannot, ``stop``: nor can any other tile,
            ``broken``: nor can any other in this process, whose GPU has failed.
        held: anonymous bytes of the process when the tile was done; 0 if unknown.
        room: of a failure for lack of memory, bytes that the process could have had; 0 if unknown.
    """

    tile: int
    seconds: float
    error: str = ""
    trace: str = ""
    verdict: Verdict = "again"
    room: int = 0
    held: int = 0


@dataclass(frozen=True)
class Carried:
    """A tile between two steps.

    Attributes:
        receipt: of the steps so far.
        data: what the last step gave: voxels, the result, None at last; None after a failure. To
            cross to another process, an array, or arrays by their names.
    """

    receipt: Receipt
    data: Any = None


class Helper(Protocol):
    """What reads and writes tiles; made once in each process that does."""

    def read(self, tile: int) -> Any:
        """What the tile needs from the input."""

    def write(self, tile: int, result: Any) -> None:
        """Puts the result on disk; returns when it is there."""


class Worker(Helper, Protocol):
    """The three steps of one tile; made once in each process that predicts tiles."""

    def predict(self, tile: int, voxels: Any) -> Any:
        """The tile's result, from what was read."""


@dataclass(frozen=True)
class Deadline:
    """How long a try may take, so that nothing waits for ever.

    Attributes:
        first: seconds, until a few tiles are done.
        multiple: of the median of the tiles that were done.
        least: seconds; file servers that fail over take minutes.
        make: seconds to make a worker.
    """

    first: float = 3600.0
    multiple: float = 20.0
    least: float = 300.0
    make: float = 3600.0


@dataclass(frozen=True)
class Stage:
    """A piece of work on all tiles of a plan.

    Attributes:
        name: for messages and the ledger.
        make_worker: makes the worker where it is to run; small to pickle.
        device: ``cpu`` (one thread per pass, workers side by side) or ``cuda``.
        marks: folder, seen by every worker of Ray, of what became of the tiles of each block; None
            for no marks, and no deadline on Ray.
        deadline: of a try.
        under_way: tiles that a worker on a GPU has under way: others come and go while it predicts
            one.
        together: tiles that may go from one step to the next together, where steps are processes.
        memory: bytes that a worker needs, with its helpers; 0 if unknown.
        make_helper: makes what only reads or writes, where another predicts; by default a worker.
    """

    name: str
    make_worker: Callable[[], Worker]
    device: str
    marks: Place | None = None
    deadline: Deadline = Deadline()
    under_way: int = 1
    together: int = 1
    memory: int = 0
    make_helper: Callable[[], Helper] | None = None

    def make_for(self, steps: Sequence[Step]) -> Helper:
        """Makes what takes these steps: a worker if one of them is to predict."""
        helper = self.make_helper if "predict" not in steps else None
        return (helper or self.make_worker)()


def attempt(worker: Helper, tile: int, alone: AbstractContextManager[Any]) -> Receipt:
    """Read, predict, write; a failure becomes a receipt that says what happened.

    Args:
        worker: does it.
        tile: what is tried.
        alone: held while predicting.
    """
    return carry(worker, Carried(Receipt(tile, 0.0)), STEPS, alone).receipt


def carry(
    worker: Helper, tile: Carried, steps: Sequence[Step], alone: AbstractContextManager[Any]
) -> Carried:
    """Takes some steps with a tile; a failure becomes a receipt that says what happened.

    Args:
        worker: takes them.
        tile: after the steps before.
        steps: which are next.
        alone: held while predicting.
    """
    before, data, start = tile.receipt, tile.data, time.monotonic()
    try:
        for step in steps:
            data = _take(worker, step, before.tile, data, alone)
    except Exception as error:  # not swallowed: the driver decides, and shows it
        return Carried(failure(before.tile, before.seconds + time.monotonic() - start, error))
    seconds = before.seconds + time.monotonic() - start
    return Carried(Receipt(before.tile, seconds, held=max(before.held, held())), data)


def _take(
    worker: Helper, step: Step, tile: int, data: Any, alone: AbstractContextManager[Any]
) -> Any:
    if step == "read":
        return worker.read(tile)
    if step == "write":
        return worker.write(tile, data)
    with alone:
        return cast(Worker, worker).predict(tile, data)


def failure(tile: int, seconds: float, error: Exception) -> Receipt:
    """The receipt of a try that raised `error`, which is being handled."""
    verdict = _verdict(error)
    bytes_left = _room(error) if verdict == "alone" else 0
    told = str(error) if isinstance(error, UnetRayError) else f"{type(error).__name__}: {error}"
    return Receipt(tile, seconds, _text(told), _text(traceback.format_exc()), verdict, bytes_left)


def _text(told: str) -> str:
    """What can be written down: a name of a file may hold bytes that are no text."""
    return told.encode(errors="replace").decode()


def _verdict(error: Exception) -> Verdict:
    full = isinstance(error, OSError) and error.errno in DISK_ERRORS
    if full or isinstance(error, LostError):
        return "stop"
    if is_out_of_memory(error):
        return "alone"
    if isinstance(error, RuntimeError) and "CUDA error" in str(error):
        return "broken"
    return "never" if isinstance(error, VoxelError) else "again"


def _room(error: Exception) -> int:
    """Bytes that were there for a pass which ran out of them."""
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved()
    return room()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python, NumPy, torch or the system says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


TryOne = Callable[[int, AbstractContextManager[Any]], Receipt]


class Patience:
    """How long the tries of one process may take, from how long others took."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._seconds: deque[float] = deque(maxlen=SEEN)

    def saw(self, receipt: Receipt) -> None:
        """Counts a try that ended."""
        if not receipt.error:
            self._seconds.append(receipt.seconds)

    @property
    def silence(self) -> float:
        """Seconds after which no worker can be alive any more, if nothing was heard of a block.

        With GPUs three workers share a block; this is taken to be enough for them, too.
        """
        return TRIES * (self._deadline.make + self.limit) + MOST_SECONDS

    @property
    def limit(self) -> float:
        """Seconds that a try may take now."""
        seconds = [*self._seconds]
        if len(seconds) < ENOUGH:
            return self._deadline.first
        return max(self._deadline.least, self._deadline.multiple * statistics.median(seconds))


class Clock:
    """Seconds that this process was awake: one that is stopped for an hour has not waited.

    `now` is to be asked every second or so, by any thread.
    """

    def __init__(self) -> None:
        self._last, self._now, self._lock = time.monotonic(), 0.0, threading.Lock()

    def now(self) -> float:
        """Seconds since it was made; between two looks, two at most."""
        with self._lock:
            last, self._last = self._last, time.monotonic()
            self._now += min(self._last - last, 2 * TICK)
            return self._now


class Guarded:
    """Steps of tiles in a Ray worker: each is marked, and one that takes too long ends the process.

    Ray tries a tile that ends its actor without end; the marks say when to stop. It also hands out
    again what is done, if it did not hear the end of the block; the marks tell, and such a tile
    keeps its shards. A thread cannot be ended, so a step that hangs takes its process along, and
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
        return Mark(receipt.tile, "done", receipt.seconds, receipt.held)

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
    with suppress(OSError):  # the first tile will tell
        begun = [mark.event for mark in marks.before(0)].count("begun")
        marks.add(Mark(0, "begun"))
    if begun >= TRIES:
        raise RunError(
            f"a worker on {os.uname().nodename} ended {begun} times while it was made: killed, as "
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
    except OSError:  # the try asks again, and tells
        return False
    return bool(before) and not _is_done(before)


def _is_done(before: list[Mark]) -> bool:
    return bool(before) and before[-1].event == "done"


def _known(tile: int, before: list[Mark]) -> Receipt | None:
    """The receipt of a tile that the marks say all of; None for one that is to be tried."""
    if _is_done(before):
        return Receipt(tile, before[-1].seconds, held=before[-1].held)
    events = [mark.event for mark in before]
    begun, late = events.count("begun"), events.count("late")
    if begun < TRIES:
        return None
    return Receipt(tile, 0.0, _deadly(begun, late), "", "never", 0 if late else room())


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
