"""Who runs the tiles: a loop with threads in this process, or actors of Ray Data.

Knows which of the two, and how many tiles at a time. Both take the same steps of the same worker
and yield one receipt per tile, in any order, so they cannot differ in what they compute.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from unet_ray.engine import cluster
from unet_ray.engine.attempts import attempt
from unet_ray.engine.cluster import EngineName
from unet_ray.engine.pool import run_on_ray
from unet_ray.engine.stages import Stage
from unet_ray.engine.threads import Receipts, tried, worker_of
from unet_ray.machine import give_back_freed_memory


def run(
    stage: Stage,
    tiles: Iterable[int],
    engine: EngineName,
    workers: int | None = None,
    alone: bool = False,
) -> Receipts:
    """Runs `tiles` of a stage and yields a receipt for each as it is done.

    Who stops before the end closes it, or what is under way goes on unheard. A tile that was given
    up may be told of twice, the second time as done.

    Args:
        stage: what to do.
        tiles: which tiles.
        engine: who does it.
        workers: how many side by side; by default one per core, or one per GPU.
        alone: one tile at a time, by one fresh worker.

    Raises:
        RunError: if tile after tile hangs and none ends, or so many that they fill the memory.
    """
    if engine == "ray":
        return run_on_ray(stage, iter(tiles), 1 if alone else workers, alone)
    if alone:
        give_back_freed_memory()
        if stage.device == "cuda":
            torch.cuda.empty_cache()
    threads = 1 if alone else _threads(stage, workers)
    try_one = partial(attempt, worker_of(stage))
    return tried(try_one, stage.device, stage.deadline, iter(tiles), threads)


def _threads(stage: Stage, workers: int | None) -> int:
    return workers or cluster.usable_cores() if stage.device == "cpu" else stage.in_flight
