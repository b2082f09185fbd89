"""Chooses between the two engines: threads in this process, or actors of Ray Data.

Knows both engines and the number of tiles in flight. Does not know what a tile contains. Both
engines run the same steps of the same worker, so their results cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from unet_ray.engine import cluster
from unet_ray.engine.attempts import attempt
from unet_ray.engine.cluster import EngineName
from unet_ray.engine.pool import run_on_ray
from unet_ray.engine.stages import Stage, runs_of
from unet_ray.engine.threads import Receipts, run_on_threads, worker_of
from unet_ray.machine import give_back_freed_memory, reserve_memory


def run(
    stage: Stage,
    tiles: Iterable[int],
    engine: EngineName,
    workers: int | None = None,
    alone: bool = False,
) -> Receipts:
    """Runs the tiles of a stage and yields a receipt for each as soon as it is available.

    A caller that stops early must close the generator, or tiles in flight continue unnoticed. A
    tile that was given up may finish later and then yields a second receipt, without an error.

    Args:
        stage: the work.
        tiles: their numbers.
        engine: ``local`` or ``ray``.
        workers: tiles in parallel; by default one per core or per GPU.
        alone: process one tile at a time, by one new worker.

    Raises:
        RunError: if too many tiles hang: none finishes in between, or together they would fill
            the memory.
    """
    if engine == "ray":
        return run_on_ray(stage, iter(tiles), 1 if alone else workers, alone)
    if alone:
        give_back_freed_memory()
        if stage.device == "cuda":
            torch.cuda.empty_cache()
    else:
        reserve_memory(stage.reserve)
    threads = 1 if alone else _threads(stage, workers)
    try_one = partial(attempt, worker_of(stage))
    return run_on_threads(try_one, stage.device, stage.deadline, runs_of(tiles, stage), threads)


def _threads(stage: Stage, workers: int | None) -> int:
    return workers or cluster.usable_cores() if stage.device == "cpu" else stage.in_flight
