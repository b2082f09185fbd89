"""What an actor of Ray does with tiles: all their steps, or with GPUs one of them.

Knows a worker's steps, marks, and the tables in which tiles come and go; does not know who makes
actors, or what a tile is about.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa
import torch

from unet_ray.engine.attempts import MOST_SECONDS, carry, failure
from unet_ray.engine.guard import Guarded, is_suspect, made_in_time
from unet_ray.engine.parcels import packed, receipts, unpacked
from unet_ray.engine.stages import STEPS, Carried, Receipt, Stage, Step
from unet_ray.engine.threads import worker_of
from unet_ray.storage.marks import Marks


class TileActor:
    """Takes all steps of a tile: only receipts leave it."""

    steps: ClassVar[tuple[Step, ...]] = STEPS

    def __init__(self, stage: Stage) -> None:
        with made_in_time(stage.marks, _name()) if stage.marks else nullcontext():
            self._worker = worker_of(stage, self.steps)
        self._guard = Guarded(stage.marks, self.steps, stage.deadline) if stage.marks else None
        self._alone: AbstractContextManager[Any] = nullcontext()

    def __call__(self, table: pa.Table) -> pa.Table:
        """What has become of the tiles for which there was time.

        Args:
            table: one block in ``tiles``, numbers with commas between; or one tile, with what the
                step before has given.

        Returns:
            Their receipts, with what this step has given if there are more.
        """
        # No threads of our own: the convolution library keeps buffers for each it has seen.
        torch.set_num_threads(1)
        tiles = _tiles_of(table)
        marks = self._guard.marks_of(tiles[0].receipt.tile) if self._guard else None
        done = [
            tile if tile.receipt.error else self._go_on(tile, marks) for tile in _in_time(tiles)
        ]
        if self._is_last:
            return receipts(done)
        return pa.concat_tables(packed([t]) if t.receipt.error else t.data for t in done)

    @property
    def _is_last(self) -> bool:
        return self.steps[-1] == STEPS[-1]

    def _go_on(self, tile: Carried, marks: Marks | None) -> Carried:
        go = partial(self._take, tile)
        return self._guard.carry(tile.receipt.tile, marks, go) if self._guard and marks else go()

    def _take(self, tile: Carried) -> Carried:
        """Takes the steps; what goes on to another actor is packed here, where it is guarded."""
        done = carry(self._worker, tile, self.steps, self._alone)
        if done.receipt.error or self._is_last:
            return done
        try:
            return Carried(done.receipt, packed([done]))
        except Exception as error:  # as of too little memory; told by a receipt as any other
            return Carried(failure(done.receipt.tile, done.receipt.seconds, error))


class Reader(TileActor):
    """Reads tiles for a GPU."""

    steps = ("read",)


class GpuActor(TileActor):
    """Has a GPU for itself, and runs one pass at a time, while other tiles come and go."""

    steps = ("predict",)

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._alone, self._turn = threading.Lock(), threading.Lock()
        self._most, self._places = stage.in_flight, threading.Semaphore(stage.in_flight)

    def _go_on(self, tile: Carried, marks: Marks | None) -> Carried:
        # A tile that may have ended its process is tried with nothing beside it.
        suspect = marks is not None and is_suspect(tile.receipt.tile, marks)
        with self._at(self._most if suspect else 1):
            return super()._go_on(tile, marks)

    @contextmanager
    def _at(self, places: int) -> Iterator[None]:
        with self._turn:
            for _ in range(places):
                self._places.acquire()
        try:
            yield
        finally:
            self._places.release(places)


class Writer(TileActor):
    """Writes what a GPU has given."""

    steps = ("write",)


def _tiles_of(table: pa.Table) -> list[Carried]:
    if "tiles" not in table.column_names:
        return unpacked(table)
    (block,) = table["tiles"].to_pylist()
    return [Carried(Receipt(int(tile), 0.0)) for tile in block.split(",")]


def _in_time(tiles: Sequence[Carried]) -> Iterator[Carried]:
    """The first tile, and others as long as there is time for more."""
    end = time.monotonic() + MOST_SECONDS
    return itertools.takewhile(lambda tile: tile is tiles[0] or time.monotonic() < end, tiles)


def _name() -> str:
    """Of this actor, the same when Ray starts it anew."""
    import ray

    return ray.get_runtime_context().get_actor_id() if ray.is_initialized() else str(os.getpid())
