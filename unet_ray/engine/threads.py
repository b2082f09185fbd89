"""Tiles on threads of this process, as many at a time as are wanted.

Knows a way to try one tile, and how long a try may take; does not know what a tile is about.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext, suppress
from queue import Empty, SimpleQueue
from typing import Any

import torch

from unet_ray.engine.attempts import TICK, Clock, Patience, failure
from unet_ray.engine.stages import STEPS, Deadline, Helper, Receipt, Stage, Step, TryOne
from unet_ray.errors import RunError

Receipts = Generator[Receipt, None, None]
# How long one waits for tiles that are under way when no more are wanted.
GRACE_SECONDS = 5.0
THREAD = "tile"  # the name of each thread that a tile may keep busy


def worker_of(stage: Stage, steps: Sequence[Step] = STEPS) -> Helper:
    """A worker of a stage for some steps, made in time: it opens model, input and output."""
    made: SimpleQueue[Helper | Exception] = SimpleQueue()

    def make() -> None:
        try:
            made.put(stage.make_for(steps))
        except Exception as error:  # raised below, where it is awaited
            made.put(error)

    threading.Thread(target=make, name=THREAD, daemon=True).start()
    try:
        worker = made.get(timeout=min(stage.deadline.make, threading.TIMEOUT_MAX))
    except Empty:
        raise RunError(
            f"{stage.name}: no worker could be made within {stage.deadline.make:.0f} s; see "
            "whether input, model and output answer; the same command goes on."
        ) from None
    if isinstance(worker, Exception):
        raise worker
    return worker


def tried(
    try_one: TryOne, device: str, deadline: Deadline, tiles: Iterator[int], threads: int
) -> Receipts:
    """Tries tiles side by side and yields a receipt for each as it ends.

    Args:
        try_one: tries a tile; while it predicts it holds what it is given with the tile.
        device: ``cpu``, or a GPU, where one pass runs at a time.
        deadline: of a try.
        tiles: which tiles; taken as they are needed.
        threads: how many at a time.

    Raises:
        RunError: if tile after tile hangs and none ends, or so many that they fill the memory.
    """
    # On a GPU one pass runs at a time, while others read or write theirs.
    alone = nullcontext() if device == "cpu" else threading.Lock()
    return _SideBySide(lambda tile: try_one(tile, alone), deadline, tiles, threads).receipts()


def has_left_threads() -> bool:
    """Whether tiles may still be under way in this process, of which nobody wants to hear."""
    threads = [thread for thread in threading.enumerate() if thread.name == THREAD]
    for thread in threads:
        thread.join(0.1)  # those that are told to end do so at once
    return any(thread.is_alive() for thread in threads)


class _Hand:
    """A thread that tries one tile after another, as they are handed to it."""

    def __init__(self, try_one: Callable[[int], Receipt], ended: SimpleQueue[Any]) -> None:
        self._try, self._ended = try_one, ended
        self._tiles: SimpleQueue[int | None] = SimpleQueue()
        threading.Thread(target=self._work, name=THREAD, daemon=True).start()

    def take(self, tile: int | None) -> None:
        """Hands it a tile, or lets it go with None."""
        self._tiles.put(tile)

    def _work(self) -> None:
        torch.set_num_threads(1)
        while (tile := self._tiles.get()) is not None:
            try:
                receipt = self._try(tile)
            except Exception as error:  # nobody would ever hear of this tile
                receipt = failure(tile, 0.0, error)
            self._ended.put((self, receipt))


class _SideBySide:
    """Tries tiles on threads of this process, as many at a time as there are threads.

    A try that takes too long is given up with its thread, since a thread cannot be ended, and
    another takes the next tile; should it end after all, that is told in a second receipt. When
    that happens again and again and no try ends in between, nothing works any more.
    """

    def __init__(
        self,
        try_one: Callable[[int], Receipt],
        deadline: Deadline,
        tiles: Iterator[int],
        threads: int,
    ) -> None:
        self._try, self._tiles, self._threads = try_one, tiles, threads
        self._patience, self._clock = Patience(deadline), Clock()
        self._ended: SimpleQueue[tuple[_Hand, Receipt]] = SimpleQueue()
        self._idle: list[_Hand] = []
        self._busy: dict[_Hand, tuple[int, float]] = {}
        self._lost: set[_Hand] = set()
        self._in_a_row = 0  # tries given up since one ended

    def receipts(self) -> Receipts:
        """A receipt for each tile, as it ends."""
        try:
            while self._hand_out():
                told = self._await(min(TICK, self._patience.limit / 4))
                yield from [*told, *self._give_up_late()]
                self._refuse_to_hang()
        except GeneratorExit:
            end = time.monotonic() + GRACE_SECONDS  # what is under way may just end
            while self._busy and (left := end - time.monotonic()) > 0:
                self._await(left)
            raise
        finally:
            for hand in [*self._idle, *self._busy, *self._lost]:
                hand.take(None)

    def _hand_out(self) -> bool:
        """Gives every idle thread a tile; whether any is busy then."""
        for tile in itertools.islice(self._tiles, self._threads - len(self._busy)):
            hand = self._idle.pop() if self._idle else _Hand(self._try, self._ended)
            self._busy[hand] = tile, self._clock.now()
            hand.take(tile)
        return bool(self._busy)

    def _await(self, seconds: float) -> list[Receipt]:
        """What has ended since; waits so long for the first."""
        told = []
        with suppress(Empty):
            while True:
                hand, receipt = self._ended.get(timeout=seconds)
                seconds, self._in_a_row = 0.0, 0
                self._patience.saw(receipt)
                if self._busy.pop(hand, None):
                    self._idle.append(hand)
                    told.append(receipt)
                else:
                    self._lost.remove(hand)
                    hand.take(None)
                    told += [] if receipt.error else [receipt]
        return told

    def _give_up_late(self) -> list[Receipt]:
        now, limit = self._clock.now(), self._patience.limit
        late = {hand: told for hand, told in self._busy.items() if now - told[1] > limit}
        for hand in late:
            del self._busy[hand]
            self._lost.add(hand)
            self._in_a_row += 1
        return [
            Receipt(tile, now - begun, f"did not end within {limit:.0f} s.")
            for tile, begun in late.values()
        ]

    def _refuse_to_hang(self) -> None:
        if self._in_a_row >= 2 * max(2, self._threads):
            reason = "and none ended in between"
        elif len(self._lost) > 8 * self._threads:
            reason = "and each keeps its memory"
        else:
            return
        raise RunError(
            f"{len(self._lost)} tiles hang, {reason} (each may take {self._patience.limit:.0f} s): "
            "see whether input and output answer; what is done stays, the same command goes on."
        )
