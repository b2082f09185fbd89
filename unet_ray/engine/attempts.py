"""One try of a tile: read, predict, write; what a failure means, and how long a try may take.

Knows a worker's three steps and tile numbers. Does not know who runs them, or what a tile is about.
"""

from __future__ import annotations

import errno
import re
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from unet_ray.engine.stages import STEPS, Carried, Deadline, Helper, Receipt, Step, Verdict, Worker
from unet_ray.errors import LostError, UnetRayError, VoxelError
from unet_ray.machine import memory_available, memory_in_use

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
MOST_SECONDS = 60.0  # after which a block begins no more tiles: it reports when it ends


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
    return Carried(Receipt(before.tile, seconds, memory=max(before.memory, memory_in_use())), data)


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
    sentence = str(error) if isinstance(error, UnetRayError) else f"{type(error).__name__}: {error}"
    return Receipt(
        tile, seconds, _text(sentence), _text(traceback.format_exc()), verdict, bytes_left
    )


def _text(sentence: str) -> str:
    """What can be written down: a name of a file may hold bytes that are no text."""
    return sentence.encode(errors="replace").decode()


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
    return memory_available()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python, NumPy, torch or the system says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


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
