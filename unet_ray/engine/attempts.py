"""One attempt at a tile: read, predict, write; classification of failures, and time limits.

Knows the three steps of a worker and tile numbers. Does not know who runs them, or what a tile
contains.
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

from unet_ray.engine.stages import (
    STEPS,
    Deadline,
    Helper,
    Receipt,
    Step,
    TileState,
    Verdict,
    Worker,
)
from unet_ray.errors import ChangedError, LostError, UnetRayError, VoxelError
from unet_ray.machine import memory_available, memory_in_use

# Attempts per tile and run, before the tile is given up.
TRIES = 3
# The disk accepts no more data: full, over quota, read-only.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
# torch and its libraries have an exception type for a lack of memory only on a GPU.
_NO_MEMORY = re.compile(
    r"(can.t|cannot) allocate memory|(out of|not enough) memory|bad_alloc|ALLOC_FAILED|new thread",
    re.I,
)
# The median duration is that of the last SAMPLES attempts, once there are MIN_SAMPLES.
SAMPLES, MIN_SAMPLES = 101, 3
TICK = 1.0  # seconds between two checks of the clock
# After this time a block starts no further tile: its receipts arrive only when it ends.
MAX_BLOCK_SECONDS = 60.0
# The same for tiles that continue each other: a new worker would begin again.
MAX_RUN_SECONDS = 1200.0


def attempt(worker: Helper, tile: int, predict_lock: AbstractContextManager[Any]) -> Receipt:
    """Reads, predicts and writes a tile. A failure becomes a receipt with its cause.

    Args:
        worker: runs the steps.
        tile: its number.
        predict_lock: entered while predicting.
    """
    return run_steps(worker, TileState(Receipt(tile, 0.0)), STEPS, predict_lock).receipt


def run_steps(
    worker: Helper,
    state: TileState,
    steps: Sequence[Step],
    predict_lock: AbstractContextManager[Any],
) -> TileState:
    """Runs some steps of a tile. A failure becomes a receipt with its cause.

    Args:
        worker: runs the steps.
        state: of the tile after the previous steps.
        steps: to run now.
        predict_lock: entered while predicting.
    """
    before, data, start = state.receipt, state.data, time.monotonic()
    try:
        for step in steps:
            data = _run_step(worker, step, before.tile, data, predict_lock)
    except Exception as error:  # not swallowed: the driver handles and shows it
        return TileState(failure(before.tile, before.seconds + time.monotonic() - start, error))
    seconds = before.seconds + time.monotonic() - start
    memory = max(before.memory, memory_in_use())
    if steps[-1] != "write":
        return TileState(Receipt(before.tile, seconds, memory=memory), data)
    return TileState(Receipt(before.tile, seconds, memory=memory, checksum=data or ""))


def _run_step(
    worker: Helper, step: Step, tile: int, data: Any, predict_lock: AbstractContextManager[Any]
) -> Any:
    if step == "read":
        return worker.read(tile)
    if step == "write":
        return worker.write(tile, data)
    with predict_lock:
        return cast(Worker, worker).predict(tile, data)


def failure(tile: int, seconds: float, error: Exception) -> Receipt:
    """Returns the receipt of an attempt that raised `error`; call it in the ``except`` block."""
    verdict = _verdict(error)
    available = _memory_limit(error) if verdict == "alone" else 0
    sentence = str(error) if isinstance(error, UnetRayError) else f"{type(error).__name__}: {error}"
    return Receipt(
        tile, seconds, _encodable(sentence), _encodable(traceback.format_exc()), verdict, available
    )


def _encodable(text: str) -> str:
    """Replaces characters that UTF-8 cannot encode; a file name may contain undecodable bytes."""
    return text.encode(errors="replace").decode()


def _verdict(error: Exception) -> Verdict:
    full = isinstance(error, OSError) and error.errno in DISK_ERRORS
    if full or isinstance(error, LostError):
        return "stop"
    if isinstance(error, ChangedError):
        return "changed"
    if is_out_of_memory(error):
        return "alone"
    if isinstance(error, RuntimeError) and "CUDA error" in str(error):
        return "broken"
    return "never" if isinstance(error, VoxelError) else "again"


def _memory_limit(error: Exception) -> int:
    """Returns the bytes that were available to an attempt that ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved()
    return memory_available()


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether Python, NumPy, torch or the system raised `error` for lack of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


class Timeouts:
    """Time limits of the attempts in one process, from the durations of earlier attempts."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._seconds: deque[float] = deque(maxlen=SAMPLES)

    def record(self, receipt: Receipt) -> None:
        """Records the duration of an attempt, unless it failed."""
        if not receipt.error:
            self._seconds.append(receipt.seconds)

    @property
    def silence(self) -> float:
        """Seconds without any receipt after which all workers are considered dead.

        With GPUs three workers process a block in turn; the limit is assumed to suffice for them.
        """
        return TRIES * (self._deadline.make + self.limit) + MAX_BLOCK_SECONDS

    @property
    def limit(self) -> float:
        """Seconds that an attempt may take now."""
        seconds = [*self._seconds]
        if len(seconds) < MIN_SAMPLES:
            return self._deadline.first
        return max(self._deadline.least, self._deadline.multiple * statistics.median(seconds))


class Clock:
    """Seconds that this process was running: the time for which it was stopped does not count.

    Some thread must call `now` about every second.
    """

    def __init__(self) -> None:
        self._last, self._now, self._lock = time.monotonic(), 0.0, threading.Lock()

    def now(self) -> float:
        """Returns the seconds since creation; at most two are counted between two calls."""
        with self._lock:
            last, self._last = self._last, time.monotonic()
            self._now += min(self._last - last, 2 * TICK)
            return self._now
