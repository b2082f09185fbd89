"""Tiles on pools of Ray Data actors, in waves of blocks.

Knows Ray Data, tile numbers and receipts, which are all that crosses the object store; with GPUs
readers and writers are actors of their own, and what they read and write crosses too. Does not know
what a tile is about.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine.actors import GpuActor, Reader, TileActor, Writer
from unet_ray.engine.attempts import MOST_SECONDS, SEEN, Patience
from unet_ray.engine.cluster import (
    CPUS_PER_ACTOR,
    CPUS_PER_HELPER,
    HELPERS,
    connect,
    gpus_there,
    most_workers,
)
from unet_ray.engine.parcels import RECEIPT
from unet_ray.engine.stages import Receipt, Stage
from unet_ray.engine.threads import Receipts
from unet_ray.errors import RunError
from unet_ray.machine import kept_memory_environment
from unet_ray.storage.places import Place, remove_below

if TYPE_CHECKING:
    from ray.data import Dataset

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
# With GPUs, whose tiles take less, and whose blocks hold few since their voxels cross with them.
GPU_WAVE = 4 * WAVE
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt): ")


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
    few = 1
    count = min(WAVE, max(FIRST_WAVE, BLOCKS_EACH * size))
    seconds: list[float] = []
    patience = Patience(stage.deadline)
    left = np.empty(0, np.int64)
    while True:
        more = np.fromiter(itertools.islice(tiles, max(0, count - left.size)), np.int64)
        wave, left = np.concatenate([left[:count], more]), left[count:]
        if not wave.size:
            return
        told = array("q")
        for receipt in _run_wave(stage, _blocks(wave, few, size), size, alone, patience.silence):
            told.append(receipt.tile)
            patience.saw(receipt)
            seconds = seconds if receipt.error else [*seconds[-SEEN:], receipt.seconds]
            yield receipt
        if not told:
            raise RunError(f"{stage.name}: Ray has lost {wave.size} tiles; give the command again.")
        left = np.concatenate([np.setdiff1d(wave, np.frombuffer(told, np.int64)), left])
        if stage.marks:
            _forget(stage.marks)
        if seconds and not alone:
            few = _tiles_a_block(stage, size, seconds)
            count = few * (GPU_WAVE if stage.device == "cuda" else WAVE)


def _run_wave(
    stage: Stage, wave: Sequence[Sequence[int]], size: int, alone: bool, silence: float
) -> Receipts:
    """Receipts of the tiles that blocks had time for; fails after `silence` seconds without any."""
    import ray
    from ray.data.exceptions import ExecutionTimeoutError

    # `from_items`, not `range`, whose read tasks take a whole CPU each and starve the actors.
    blocks = ray.data.from_items(
        [{"tiles": ",".join(map(str, block))} for block in wave], override_num_blocks=len(wave)
    )
    # A worker ends itself when a tile takes too long, but not if it is frozen, or if a disk never
    # lets it go; and where none can even begin, none counts.
    blocks.context.execution_no_progress_timeout_s = silence if stage.marks else -1
    size = min(size, len(wave))
    if stage.device == "cpu":
        done = _by(blocks, TileActor, stage, size, num_cpus=CPUS_PER_ACTOR)
    elif alone:
        done = _by(blocks, TileActor, stage, size, num_cpus=0, num_gpus=1)
    else:
        done = _on_gpus(blocks, stage, size)
    try:
        for rows in done.iter_batches(batch_size=None, prefetch_batches=0):
            for row in zip(*(rows[name].tolist() for name in RECEIPT), strict=True):
                yield Receipt(*row)
    except ExecutionTimeoutError as error:
        raise RunError(
            f"no tile has ended for {silence:.0f} s: see whether workers can start, and whether "
            "input and output answer; what is done stays, the same command goes on."
        ) from error
    except ray.exceptions.RayError as error:  # of a worker that could not be made, mostly
        raise RunError(_cause(error)) from error


def _on_gpus(blocks: Dataset, stage: Stage, size: int) -> Dataset:
    """Each tile by a reader, by a GPU, and by a writer."""
    # As good as no part of a CPU, and none for a GPU's actor, so that all have room at any time,
    # however many CPUs are taken or lost: else readers could take what writers need, and none end.
    # For the GPUs that are there: else all would crowd where the first machine is.
    helpers = HELPERS * max(1, min(size, gpus_there()))
    read = _by(blocks, Reader, stage, helpers, num_cpus=CPUS_PER_HELPER)
    predicted = _by(read, GpuActor, stage, size, stage.in_flight, num_cpus=0, num_gpus=1)
    return _by(predicted, Writer, stage, helpers, num_cpus=CPUS_PER_HELPER)


def _by(
    blocks: Dataset, actor: type[TileActor], stage: Stage, size: int, calls: int = 1, **each: float
) -> Dataset:
    """Blocks that a pool of so many actors has worked on.

    Args:
        blocks: what comes in.
        actor: of what kind.
        stage: what to do.
        size: how many.
        calls: blocks that each may have under way.
        each: what each needs.
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
        **each,
    )


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


def _tiles_a_block(stage: Stage, size: int, seconds: Sequence[float]) -> int:
    """How many tiles are work enough for a block."""
    if stage.device == "cuda":
        # Each waits for those that are under way with it.
        return min(stage.together, _tiles_for(BLOCK_SECONDS * stage.in_flight, seconds))
    goal = min(MOST_SECONDS, max(BLOCK_SECONDS, WAVE_SECONDS * size / WAVE))
    return _tiles_for(goal, seconds)


def _blocks(wave: NDArray[np.int64], size: int, workers: int) -> list[list[int]]:
    """A wave in blocks of at most so many tiles, and some a worker."""
    size = max(1, min(size, math.ceil(wave.size / (BLOCKS_EACH * workers))))
    return [wave[first : first + size].tolist() for first in range(0, wave.size, size)]


def _tiles_for(goal: float, seconds: Sequence[float]) -> int:
    """How many tiles take so many seconds, as far as a block goes."""
    usual = statistics.median(seconds)
    return min(LARGEST_BLOCK, math.ceil(goal / max(usual, goal / LARGEST_BLOCK)))
