"""Tiles on a pool of Ray Data actors, in waves of blocks.

Knows Ray Data, tile numbers and receipts, which are all that crosses the object store; does not
know what a tile is about.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import statistics
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unet_ray.attempts import (
    MOST_SECONDS,
    SEEN,
    Clock,
    Deadline,
    Guarded,
    Patience,
    Receipt,
    Stage,
    TryOne,
    attempt,
    made_in_time,
)
from unet_ray.cluster import CPUS_PER_ACTOR, connect, most_workers
from unet_ray.errors import RunError
from unet_ray.loop import Receipts, tried, worker_of
from unet_ray.memory import kept_memory_environment
from unet_ray.places import Place, remove_below

# Tile numbers go to Ray in waves of blocks, so that the driver's memory does not grow with the
# volume. Between two blocks a worker idles for some 50 ms, and one driver feeds some tens of blocks
# a second, so a block is at least so much work; what a tile takes is measured in a first wave. Each
# wave begins with new actors, so it is to last long enough, however many they are. Where tiles take
# longer than those before, as tissue after empty background, a block ends early, and what is left
# of it goes with the next wave.
WAVE, FIRST_WAVE = 4096, 512
BLOCK_SECONDS, WAVE_SECONDS, LARGEST_BLOCK = 2.0, 600.0, 512
# So many a worker at least, where there are tiles enough: else some would wait for the last one.
BLOCKS_EACH = 4
# At the end of a block a GPU waits a fifth of a second: its last tile is to be written, and one of
# the next block to be read. So its blocks are long from the first.
TILES_PER_GPU_BLOCK, GPU_BLOCK_SECONDS = 32, 15.0
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt): ")
_COLUMNS = tuple(field.name for field in fields(Receipt))


def run_on_ray(stage: Stage, tiles: Iterator[int], workers: int | None, alone: bool) -> Receipts:
    """Tries tiles on actors and yields a receipt for each, soon after its block has ended.

    Args:
        stage: what to do.
        tiles: which tiles; taken wave by wave.
        workers: how many actors; by default as many as the cluster holds.
        alone: one tile a block.

    Raises:
        RunError: if a worker cannot be made, nothing is heard for too long, or Ray loses tiles.
    """
    import ray.data  # noqa: F401  # first: it says how loud it is, which `connect` says after it

    connect(workers)
    most, _ = most_workers(stage.device, stage.memory)  # a machine may be lost between two rounds
    size = max(1, min(workers or most, most))
    few = 1 if alone else _least(stage.device)
    count = min(few * WAVE, max(FIRST_WAVE, BLOCKS_EACH * few * size))
    seconds: list[float] = []
    left = np.empty(0, np.int64)
    while True:
        more = np.fromiter(itertools.islice(tiles, max(0, count - left.size)), np.int64)
        wave, left = np.concatenate([left[:count], more]), left[count:]
        if not wave.size:
            return
        told = array("q")
        for receipt in _run_wave(stage, _blocks(wave, few, size), size):
            told.append(receipt.tile)
            seconds = seconds if receipt.error else [*seconds[-SEEN:], receipt.seconds]
            yield receipt
        if not told:
            raise RunError(f"{stage.name}: Ray has lost {wave.size} tiles; give the command again.")
        left = np.concatenate([np.setdiff1d(wave, np.frombuffer(told, np.int64)), left])
        if stage.marks:
            _forget(stage.marks)
        if seconds and not alone:
            # No more than a block has time for: what is left of it needs another wave.
            least = min(_least(stage.device), _tiles_for(MOST_SECONDS * stage.under_way, seconds))
            few = max(least, _tiles_for(_block_seconds(stage, size), seconds))
            count = few * WAVE


def _run_wave(stage: Stage, wave: Sequence[Sequence[int]], size: int) -> Receipts:
    """Receipts of the tiles that some blocks had time for."""
    import ray
    from ray.data import ActorPoolStrategy

    with _ended_by_silence(stage) if stage.marks else nullcontext():
        # `from_items`, not `range`, whose read tasks take a whole CPU each and starve the actors.
        blocks = ray.data.from_items(
            [{"tiles": ",".join(map(str, block))} for block in wave], override_num_blocks=len(wave)
        )
        receipts = blocks.map_batches(
            TileActor,
            fn_constructor_args=(stage,),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(size, len(wave))),
            num_cpus=CPUS_PER_ACTOR,
            num_gpus=1 if stage.device == "cuda" else None,
            runtime_env={"env_vars": kept_memory_environment()},
        )
        try:
            for rows in receipts.iter_batches(batch_size=None, prefetch_batches=0):
                for row in zip(*(rows[name].tolist() for name in _COLUMNS), strict=True):
                    receipt = Receipt(*row)
                    if stage.marks:
                        _Silence.end(receipt)
                    yield receipt
        except ray.exceptions.RayError as error:  # of a worker that could not be made, mostly
            raise RunError(_cause(error)) from error


class TileActor:
    """A worker in a Ray actor. It reads, predicts and writes: only receipts leave it."""

    def __init__(self, stage: Stage) -> None:
        self._gpu, self._under_way = stage.device == "cuda", stage.under_way
        with made_in_time(stage.marks, _name()) if stage.marks else nullcontext():
            self._try: TryOne = partial(attempt, worker_of(stage))
        self._guard: Guarded | None = None
        if stage.marks:
            self._guard = Guarded(self._try, stage.marks, stage.deadline)
            self._try = self._guard.attempt

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Receipts, a list for each of their fields, of the tiles for which there was time.

        Args:
            batch: one block: ``tiles``, numbers with commas between.
        """
        (block,) = batch["tiles"]
        tiles = [int(tile) for tile in block.split(",")]
        if self._guard:
            self._guard.take(tiles)
        receipts = self._on_gpu(tiles) if self._gpu else self._on_cpu(tiles)  # of those in time
        return {name: [getattr(r, name) for r in receipts] for name in _COLUMNS}

    def _on_cpu(self, tiles: list[int]) -> list[Receipt]:
        # No threads of our own: the convolution library keeps buffers for each it has seen.
        torch.set_num_threads(1)
        return [self._try(tile, nullcontext()) for tile in _in_time(tiles)]

    def _on_gpu(self, tiles: list[int]) -> list[Receipt]:
        # A tile that may have ended its process is tried with nothing beside it.
        first = [tile for tile in tiles if self._guard and self._guard.is_suspect(tile)]
        others = _in_time([tile for tile in tiles if tile not in first])
        # The guard of the actor keeps the time.
        rest = tried(
            self._try, "cuda", Deadline(math.inf, math.inf, math.inf), others, self._under_way
        )
        return [*(self._try(tile, nullcontext()) for tile in first), *rest]


def _name() -> str:
    """Of this actor, the same when Ray starts it anew."""
    import ray

    return ray.get_runtime_context().get_actor_id() if ray.is_initialized() else str(os.getpid())


def _in_time(tiles: Sequence[int]) -> Iterator[int]:
    """The first tile, and others as long as there is time for more."""
    end = time.monotonic() + MOST_SECONDS
    return itertools.takewhile(lambda tile: tile == tiles[0] or time.monotonic() < end, tiles)


class _Silence:
    """Ends a wave of which nothing is heard for too long; an `ExecutionCallback` of Ray Data.

    A worker ends itself when a tile takes too long, but not if it is frozen, or if a disk never
    lets it go; and where none can even begin, none counts. What a step of Ray's loop raises is
    raised where receipts are awaited.
    """

    patience: Patience  # of the wave of this process
    clock: Clock
    heard: float

    @classmethod
    def begin(cls, deadline: Deadline) -> None:
        """Begins to wait for a wave."""
        cls.patience, cls.clock, cls.heard = Patience(deadline), Clock(), 0.0

    @classmethod
    def end(cls, receipt: Receipt) -> None:
        """Something was heard."""
        cls.patience.saw(receipt)
        cls.heard = cls.clock.now()

    def on_execution_step(self, executor: object) -> None:
        """Looks at the clock.

        Raises:
            RunError: if it is too long.
        """
        silent = self.clock.now() - self.heard
        if silent > self.patience.silence:
            raise RunError(
                f"no tile has ended for {silent:.0f} s: see whether workers can start, and whether "
                "input and output answer; what is done stays, the same command goes on."
            )

    def before_execution_starts(self, executor: object) -> None:
        """Nothing."""

    def after_execution_succeeds(self, executor: object) -> None:
        """Nothing."""

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        """Nothing."""


@contextmanager
def _ended_by_silence(stage: Stage) -> Iterator[None]:
    """A wave may last as long as something is heard of it now and then."""
    from ray.data import DataContext

    classes: list[Any] = DataContext.get_current().custom_execution_callback_classes
    _Silence.begin(stage.deadline)
    classes.append(_Silence)
    try:
        yield
    finally:
        classes.remove(_Silence)


def _forget(marks: Place) -> None:
    """Removes the marks of blocks that are all done, of which nobody will ask again."""
    with suppress(OSError):  # they stay true
        remove_below(marks)


def _cause(error: Exception) -> str:
    """What Ray tells of an error of ours, without its traces, which come before."""
    lines = str(error).strip().splitlines()
    named = (n for n, line in enumerate(lines) if _ERROR.match(line))
    told = " ".join(line.strip() for line in lines[max(named, default=-1) :])
    return re.sub(r"^unet_ray\.errors\.\w+: ", "", told)


def _least(device: str) -> int:
    """Tiles of a block, if there are enough of them."""
    return TILES_PER_GPU_BLOCK if device == "cuda" else 1


def _block_seconds(stage: Stage, size: int) -> float:
    """How long the tiles of a block are to take, if they took their time one after another."""
    least = GPU_BLOCK_SECONDS if stage.device == "cuda" else BLOCK_SECONDS
    goal = min(MOST_SECONDS, max(least, WAVE_SECONDS * size / WAVE))
    return goal * stage.under_way  # so many take theirs at the same time


def _blocks(wave: NDArray[np.int64], size: int, workers: int) -> list[list[int]]:
    """A wave in blocks of at most so many tiles, and some a worker."""
    size = max(1, min(size, math.ceil(wave.size / (BLOCKS_EACH * workers))))
    return [wave[first : first + size].tolist() for first in range(0, wave.size, size)]


def _tiles_for(goal: float, seconds: Sequence[float]) -> int:
    """How many tiles take so many seconds, as far as a block goes."""
    usual = statistics.median(seconds)
    return min(LARGEST_BLOCK, math.ceil(goal / max(usual, goal / LARGEST_BLOCK)))
