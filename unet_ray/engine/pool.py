"""Runs tiles on pools of Ray Data actors, in waves of blocks.

Knows Ray Data, tile numbers and receipts. Does not know what a tile contains. Without GPUs, only
tile numbers and receipts pass through the object store. With GPUs, separate actors read and write,
and voxels and results pass through it too.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine.actors import GpuActor, Reader, TileActor, Writer
from unet_ray.engine.attempts import MAX_BLOCK_SECONDS, SAMPLES, Timeouts
from unet_ray.engine.cluster import (
    CPUS_PER_ACTOR,
    CPUS_PER_HELPER,
    HELPERS,
    connect,
    gpus_present,
    max_workers,
    memory_request,
)
from unet_ray.engine.parcels import RECEIPT
from unet_ray.engine.stages import Receipt, Stage, runs_of
from unet_ray.engine.threads import Receipts
from unet_ray.errors import RunError
from unet_ray.machine import kept_memory_environment
from unet_ray.storage.places import Place, remove_below

if TYPE_CHECKING:
    from ray.data import Dataset

# Tile numbers go to Ray in waves of blocks, so that the driver's memory does not grow with the
# volume. WAVE and FIRST_WAVE are numbers of blocks. A worker idles for about 50 ms between two
# blocks, and one driver feeds some tens of blocks per second, so a block must be at least
# BLOCK_SECONDS of work. The first wave measures how long a tile takes. Each wave starts new actors,
# so it must last about WAVE_SECONDS, for any number of actors. If tiles take longer than the
# previous ones, as tissue does after empty background, a block ends early, and its remaining tiles
# join the next wave.
WAVE, FIRST_WAVE = 4096, 512
BLOCK_SECONDS, WAVE_SECONDS, LARGEST_BLOCK = 2.0, 600.0, 512
# Minimum for each worker, given enough tiles: with fewer, some workers would wait for the last one.
BLOCKS_PER_WORKER = 4
# GPUs need less time per tile, and voxels pass between their actors, so their blocks are small.
GPU_WAVE = 4 * WAVE
_GPU = {"num_cpus": 0, "num_gpus": 1}  # what an actor with a GPU requests
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt): ")


def run_on_ray(stage: Stage, tiles: Iterator[int], workers: int | None, alone: bool) -> Receipts:
    """Tries tiles on actors and yields a receipt for each, soon after its block has ended.

    Args:
        stage: the work.
        tiles: their numbers; consumed wave by wave.
        workers: number of actors; by default as many as the cluster can run.
        alone: put each tile into a block of its own.

    Raises:
        RunError: if a worker cannot be made, no receipt arrives for too long, or Ray loses tiles.
    """
    import ray.data  # noqa: F401  # first: it sets its log level, which `connect` overrides

    connect(workers)
    limit, _ = max_workers(stage.device, stage.memory)  # machines may be lost between two rounds
    size = max(1, min(workers or limit, limit))
    block_size = 1
    wave_size = min(WAVE, max(FIRST_WAVE, BLOCKS_PER_WORKER * size))
    seconds: list[float] = []
    timeouts = Timeouts(stage.deadline)
    pending = np.empty(0, np.int64)
    while True:
        new = np.fromiter(itertools.islice(tiles, max(0, wave_size - pending.size)), np.int64)
        wave, pending = np.concatenate([pending[:wave_size], new]), pending[wave_size:]
        if not wave.size:
            return
        reported = array("q")
        blocks = _blocks(wave, block_size, size)
        if stage.layer and not alone:
            most = stage.together if stage.device == "cuda" else LARGEST_BLOCK
            runs = runs_of(wave.tolist(), stage)
            blocks = [run[n : n + most] for run in runs for n in range(0, len(run), most)]
        for receipt in _run_wave(stage, blocks, size, alone, timeouts.silence):
            reported.append(receipt.tile)
            timeouts.record(receipt)
            seconds = seconds if receipt.error else [*seconds[-SAMPLES:], receipt.seconds]
            yield receipt
        if not reported:
            raise RunError(
                f"{stage.name}: Ray has lost {wave.size} tiles. Run the same command again to "
                "resume."
            )
        left = wave[~np.isin(wave, np.frombuffer(reported, np.int64))]  # in the order of the wave
        pending = np.concatenate([left, pending])
        if stage.marks:
            _remove_marks(stage.marks)
        if seconds and not alone:
            block_size = _tiles_per_block(stage, size, seconds)
            wave_size = block_size * (GPU_WAVE if stage.device == "cuda" else WAVE)


def _run_wave(
    stage: Stage, wave: Sequence[Sequence[int]], size: int, alone: bool, silence: float
) -> Receipts:
    """Yields receipts of the tiles of a wave that its blocks had time for.

    Raises:
        RunError: if no receipt arrives for `silence` seconds, or a worker cannot be made.
    """
    import ray
    from ray.data.exceptions import ExecutionTimeoutError

    # `from_items`, not `range`, whose read tasks take a whole CPU each and starve the actors.
    blocks = ray.data.from_items(
        [{"tiles": ",".join(map(str, block))} for block in wave], override_num_blocks=len(wave)
    )
    # A worker ends itself when a tile takes too long, but not while it is frozen or blocked by a
    # disk. A worker that never starts cannot end itself either.
    blocks.context.execution_no_progress_timeout_s = silence if stage.marks else -1
    # Ray Data warns of workers that use over 80 % of the memory that they request. The plan of a
    # stage is a closer bound, and every run shows it beside the memory in use.
    blocks.context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    size = min(size, len(wave))
    if stage.device == "cpu":
        share = {"num_cpus": CPUS_PER_ACTOR, **_worker_memory(stage)}
        done = _map_blocks(blocks, TileActor, stage, size, share)
    elif alone:
        done = _map_blocks(blocks, TileActor, stage, size, {**_GPU, **_worker_memory(stage)})
    else:
        done = _on_gpus(blocks, stage, size)
    try:
        for rows in done.iter_batches(batch_size=None, prefetch_batches=0):
            for row in zip(*(rows[name].tolist() for name in RECEIPT), strict=True):
                receipt = Receipt(*row)
                if receipt.verdict == "refused":
                    raise RunError(receipt.error)
                yield receipt
    except ExecutionTimeoutError as error:
        raise RunError(
            f"no tile has finished for {silence:.0f} s. Check that workers can start and that "
            "input and output respond, then run the same command again to resume."
        ) from error
    except ray.exceptions.RayError as error:  # usually from a worker that could not be made
        raise RunError(_cause(error)) from error


def _on_gpus(blocks: Dataset, stage: Stage, size: int) -> Dataset:
    """Passes each tile through a reader, a GPU actor and a writer."""
    # Readers and writers request almost no CPU, and GPU actors none. So Ray can always start all of
    # them: otherwise readers could occupy the CPUs that writers need, and no tile would finish.
    # Readers and writers are as many as the GPUs present now require: otherwise all of them would
    # start on the first machine.
    helpers = HELPERS * max(1, min(size, gpus_present()))
    share = {"num_cpus": CPUS_PER_HELPER, **memory_request(stage.helper_memory)}
    read = _map_blocks(blocks, Reader, stage, helpers, share)
    worker = {**_GPU, **_worker_memory(stage)}
    predicted = _map_blocks(read, GpuActor, stage, size, worker, stage.in_flight)
    return _map_blocks(predicted, Writer, stage, helpers, share)


def _worker_memory(stage: Stage) -> dict[str, int]:
    """Returns the request for the memory of a worker without its helpers."""
    return memory_request(stage.memory - 2 * HELPERS * stage.helper_memory)


def _map_blocks(
    blocks: Dataset,
    actor: type[TileActor],
    stage: Stage,
    size: int,
    resources: Mapping[str, float],
    calls: int = 1,
) -> Dataset:
    """Processes blocks on a pool of actors.

    Args:
        blocks: the input.
        actor: class of the actors.
        stage: the work.
        size: number of actors.
        resources: that each actor requests from Ray.
        calls: concurrent calls of each actor.
    """
    from ray.data import ActorPoolStrategy

    return blocks.map_batches(
        actor,
        fn_constructor_args=(stage,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=size, max_concurrent_calls_per_actor=calls, enable_true_multi_threading=calls > 1
        ),
        runtime_env={"env_vars": kept_memory_environment()},
        **resources,
    )


def _remove_marks(marks: Place) -> None:
    """Removes the marks of a finished wave, which are no longer needed."""
    with suppress(OSError):  # leftover marks remain valid
        remove_below(marks)


def _cause(error: Exception) -> str:
    """Extracts the original error from Ray's message, which begins with traces."""
    lines = str(error).strip().splitlines()
    starts = (n for n, line in enumerate(lines) if _ERROR.match(line))
    cause = " ".join(line.strip() for line in lines[max(starts, default=-1) :])
    return re.sub(r"^unet_ray\.errors\.\w+: ", "", cause)


def _tiles_per_block(stage: Stage, size: int, seconds: Sequence[float]) -> int:
    """Returns how many tiles give a block enough work."""
    if stage.device == "cuda":
        # A tile also waits for the others in flight on its GPU.
        return min(stage.together, _tiles_for(BLOCK_SECONDS * stage.in_flight, seconds))
    goal = min(MAX_BLOCK_SECONDS, max(BLOCK_SECONDS, WAVE_SECONDS * size / WAVE))
    return _tiles_for(goal, seconds)


def _blocks(wave: NDArray[np.int64], size: int, workers: int) -> list[list[int]]:
    """Splits a wave into blocks of at most `size` tiles, and into enough blocks for all workers."""
    size = max(1, min(size, math.ceil(wave.size / (BLOCKS_PER_WORKER * workers))))
    return [wave[first : first + size].tolist() for first in range(0, wave.size, size)]


def _tiles_for(goal: float, seconds: Sequence[float]) -> int:
    """Returns how many tiles take `goal` seconds, at most the largest block."""
    median = statistics.median(seconds)
    return min(LARGEST_BLOCK, math.ceil(goal / max(median, goal / LARGEST_BLOCK)))
