"""Ray actors that process tiles: one kind runs all steps; with GPUs, three kinds run one each.

Knows a worker's steps, marks, and the tables that carry tiles. Does not know who starts the
actors, or what a tile contains.
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

from unet_ray.engine.attempts import MAX_BLOCK_SECONDS, MAX_RUN_SECONDS, failure, run_steps
from unet_ray.engine.guard import Guard, is_suspect, limit_restarts
from unet_ray.engine.parcels import packed, receipts, unpacked
from unet_ray.engine.stages import STEPS, Receipt, Stage, Step, TileState, Verdict
from unet_ray.engine.threads import worker_of
from unet_ray.errors import ChangedError, UnetRayError
from unet_ray.machine import reserve_memory
from unet_ray.storage.marks import Marks


class TileActor:
    """Runs all steps of a tile, so that only receipts leave the actor."""

    steps: ClassVar[tuple[Step, ...]] = STEPS

    def __init__(self, stage: Stage) -> None:
        self._refusal: UnetRayError | None = None
        self._in_runs = bool(stage.layer)
        reserve_memory(stage.reserve)
        try:
            with limit_restarts(stage.marks, _actor_name()) if stage.marks else nullcontext():
                self._worker = worker_of(stage, self.steps)
        except UnetRayError as error:  # if it left this constructor, Ray would print its own traces
            self._refusal = error
        self._guard = Guard(stage.marks, self.steps, stage.deadline) if stage.marks else None
        self._predict_lock: AbstractContextManager[Any] = nullcontext()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Processes the tiles of a block until its time is up.

        Args:
            table: a block, as comma-separated numbers in its column ``tiles``; or one tile with
                the output of the previous step.

        Returns:
            The receipts, with the output of this step unless it is the last.
        """
        # One thread: the convolution library keeps buffers for every thread that calls it.
        torch.set_num_threads(1)
        tiles = _tiles_of(table)
        marks = self._guard.marks_of(tiles[0].receipt.tile) if self._guard else None
        done = [
            tile if tile.receipt.error else self._process(tile, marks)
            for tile in _in_time(tiles, self._in_runs)
        ]
        if self._is_last:
            return receipts(done)
        return pa.concat_tables(packed([t]) if t.receipt.error else t.data for t in done)

    @property
    def _is_last(self) -> bool:
        return self.steps[-1] == STEPS[-1]

    def _process(self, tile: TileState, marks: Marks | None) -> TileState:
        if self._refusal:
            verdict: Verdict = "changed" if isinstance(self._refusal, ChangedError) else "refused"
            return TileState(Receipt(tile.receipt.tile, 0.0, str(self._refusal), "", verdict))
        run = partial(self._run_steps, tile)
        return self._guard.run(tile.receipt.tile, marks, run) if self._guard and marks else run()

    def _run_steps(self, tile: TileState) -> TileState:
        """Runs the steps, and packs their output for the next actor while the guard watches."""
        done = run_steps(self._worker, tile, self.steps, self._predict_lock)
        if done.receipt.error or self._is_last:
            return done
        try:
            return TileState(done.receipt, packed([done]))
        except Exception as error:  # for example too little memory; becomes a receipt
            return TileState(failure(done.receipt.tile, done.receipt.seconds, error))


class Reader(TileActor):
    """Reads tiles for a GPU."""

    steps = ("read",)


class GpuActor(TileActor):
    """Predicts one tile at a time on its own GPU, while it receives and sends others."""

    steps = ("predict",)

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._predict_lock, self._queue = threading.Lock(), threading.Lock()
        self._in_flight, self._slots = stage.in_flight, threading.Semaphore(stage.in_flight)

    def _process(self, tile: TileState, marks: Marks | None) -> TileState:
        # A tile that may have killed its process takes all slots: no other tile may run beside it.
        suspect = marks is not None and is_suspect(tile.receipt.tile, marks)
        with self._hold_slots(self._in_flight if suspect else 1):
            return super()._process(tile, marks)

    @contextmanager
    def _hold_slots(self, count: int) -> Iterator[None]:
        # One thread at a time: two with some of their slots each would wait for each other.
        with self._queue:
            for _ in range(count):
                self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release(count)


class Writer(TileActor):
    """Writes the results of a GPU."""

    steps = ("write",)


def _tiles_of(table: pa.Table) -> list[TileState]:
    if "tiles" not in table.column_names:
        return unpacked(table)
    (block,) = table["tiles"].to_pylist()
    return [TileState(Receipt(int(tile), 0.0)) for tile in block.split(",")]


def _in_time(tiles: Sequence[TileState], in_runs: bool) -> Iterator[TileState]:
    """Yields the first tile, and further ones until the time of the block is up."""
    end = time.monotonic() + (MAX_RUN_SECONDS if in_runs else MAX_BLOCK_SECONDS)
    return itertools.takewhile(lambda tile: tile is tiles[0] or time.monotonic() < end, tiles)


def _actor_name() -> str:
    """Returns the name of this actor, which stays the same when Ray restarts it."""
    import ray

    return ray.get_runtime_context().get_actor_id() if ray.is_initialized() else str(os.getpid())
