"""What an actor of Ray does with a block of tiles: all steps, or with GPUs one of them.

Knows a worker's steps, and how tiles come and go between actors; does not know who makes actors,
or what a tile is about.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from unet_ray.attempts import (
    MOST_SECONDS,
    STEPS,
    Carried,
    Guarded,
    Receipt,
    Stage,
    Step,
    carry,
    is_suspect,
    made_in_time,
)
from unet_ray.loop import worker_of
from unet_ray.marks import Marks

COLUMNS = tuple(field.name for field in fields(Receipt))


class TileActor:
    """Takes all steps of a tile: only receipts leave it."""

    steps: ClassVar[tuple[Step, ...]] = STEPS

    def __init__(self, stage: Stage) -> None:
        # Tiles travel as objects, since what a step gives is of any kind; Ray need not say so.
        logging.getLogger("ray.data._internal.tensor_extensions.arrow").setLevel(logging.ERROR)
        with made_in_time(stage.marks, _name()) if stage.marks else nullcontext():
            self._worker = worker_of(stage, self.steps)
        self._guard = Guarded(stage.marks, self.steps, stage.deadline) if stage.marks else None
        self._alone: AbstractContextManager[Any] = nullcontext()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What has become of the tiles for which there was time.

        Args:
            batch: one block: ``tiles``, numbers with commas between, or ``carried``.

        Returns:
            A column for each field of their receipts; or ``carried`` while there are more steps.
        """
        # No threads of our own: the convolution library keeps buffers for each it has seen.
        torch.set_num_threads(1)
        tiles = _unpacked(batch)
        marks = self._guard.marks_of(tiles[0].receipt.tile) if self._guard else None
        done = [
            tile if tile.receipt.error else self._go_on(tile, marks) for tile in _in_time(tiles)
        ]
        return _receipts(done) if self.steps[-1] == STEPS[-1] else {"carried": _column(done)}

    def _go_on(self, tile: Carried, marks: Marks | None) -> Carried:
        go = partial(carry, self._worker, tile, self.steps, self._alone)
        return self._guard.carry(tile.receipt.tile, marks, go) if self._guard and marks else go()


class Reader(TileActor):
    """Reads tiles for a GPU."""

    steps = ("read",)


class Predictor(TileActor):
    """Has a GPU for itself, and runs one pass at a time, while other tiles come and go."""

    steps = ("predict",)

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._alone, self._turn = threading.Lock(), threading.Lock()
        self._most, self._places = stage.under_way, threading.Semaphore(stage.under_way)

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


def _unpacked(batch: dict[str, Any]) -> list[Carried]:
    if "carried" in batch:
        return [*batch["carried"]]
    (block,) = batch["tiles"]
    return [Carried(Receipt(int(tile), 0.0)) for tile in block.split(",")]


def _column(tiles: Sequence[Carried]) -> np.ndarray:
    column = np.empty(len(tiles), object)
    column[:] = tiles
    return column


def _receipts(tiles: Sequence[Carried]) -> dict[str, list[Any]]:
    return {name: [getattr(tile.receipt, name) for tile in tiles] for name in COLUMNS}


def _in_time(tiles: Sequence[Carried]) -> Iterator[Carried]:
    """The first tile, and others as long as there is time for more."""
    end = time.monotonic() + MOST_SECONDS
    return itertools.takewhile(lambda tile: tile is tiles[0] or time.monotonic() < end, tiles)


def _name() -> str:
    """Of this actor, the same when Ray starts it anew."""
    import ray

    return ray.get_runtime_context().get_actor_id() if ray.is_initialized() else str(os.getpid())
