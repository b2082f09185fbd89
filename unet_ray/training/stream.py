"""Training patches drawn by Ray Data tasks while the network trains.

Handles waves, the groups of samples that one task draws at a time. Independent of the network.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import UnetRayError
from unet_ray.training.patches import Sample, Sampler, SampleSlot, Wave
from unet_ray.training.recipes import Recipe

# Size of a wave, and the number of waves that are requested in advance for each task.
WAVE_BYTES, WAVES_AHEAD = 8 << 20, 2
LOST = "a task that drew training patches was lost"
DRAWING_CPUS = 0.001  # only for Ray's scheduler; leaves the CPUs to the trainers


def streamed(
    data: Any, recipe: Recipe, channels: int, slots: Iterator[SampleSlot], drawers: int = 1
) -> Iterator[Sample]:
    """Yields samples in the order of `slots`, drawn in advance by tasks of Ray Data.

    A single Ray Data execution lasts as long as the training. Its tasks draw one requested wave
    at a time, so drawing keeps pace with the steps. No finished block has to wait, because Ray
    Data keeps a core busy while one does.

    Args:
        data: Ray object reference of the `TrainingData`.
        recipe: settings of the patches.
        channels: number of image channels.
        slots: the samples to draw; may be infinite.
        drawers: number of tasks.

    Raises:
        RuntimeError: if a task is lost or drawing fails.
    """
    import ray

    sample_bytes = 4 * channels * math.prod(recipe.patch) + 5 * math.prod(recipe.output)
    size = max(1, WAVE_BYTES // sample_bytes)
    waves, wave_queue = enumerate(_waves(slots, size)), _start_queue()
    blocks = _blocks(data, recipe, wave_queue, drawers, size * sample_bytes)
    early: dict[int, dict[str, NDArray[Any]]] = {}  # waves that arrived before their turn
    sizes: list[int] = []  # number of samples in each requested wave

    def request() -> None:
        wave = next(waves, None)
        wave_queue.put.remote(wave)
        if wave:
            sizes.append(len(wave[1]))

    try:
        for _ in range(WAVES_AHEAD * drawers):
            request()
        for number in itertools.count():
            while number not in early:
                if (block := next(blocks, None)) is None:
                    if number == len(sizes):
                        return
                    raise RuntimeError(LOST)
                numbers = block["wave"].tolist()
                if numbers != [numbers[0]] * sizes[numbers[0]]:
                    raise RuntimeError(
                        f"a block of training patches is not one complete wave: {numbers}"
                    )
                early[numbers[0]] = block
            request()
            block = early.pop(number)
            for image, targets, weights in zip(*(block[k] for k in _COLUMNS), strict=True):
                yield Sample(image, targets, weights)
    except ray.exceptions.RayError as error:
        if own := _own(error):  # such as an image that has changed; a retry would not help
            raise own from error
        raise RuntimeError(f"drawing training patches failed: {error}") from error
    finally:
        blocks.close()
        ray.kill(wave_queue)


def _own(error: BaseException | None) -> UnetRayError | None:
    """Returns the error of unet-ray that made a task of Ray fail, if it was one."""
    while error is not None and not isinstance(error, UnetRayError):
        error = getattr(error, "cause", None) or error.__cause__
    return error


def _waves(slots: Iterator[SampleSlot], size: int) -> Iterator[list[SampleSlot]]:
    while wave := list(itertools.islice(slots, size)):
        yield wave


def _blocks(
    data: Any, recipe: Recipe, wave_queue: Any, drawers: int, size: int
) -> Generator[dict[str, NDArray[Any]]]:
    """Yields each wave as one block of `size` bytes, in the order in which they are drawn."""
    import ray.data

    # At its default level, Ray Data logs its counters every five seconds, 280 MB a day.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a long validation requests no samples
    context.target_max_block_size = size * 4 // 5  # a full wave exceeds it and is not split
    dataset = ray.data.from_items(list(range(drawers)), override_num_blocks=drawers).map_batches(
        _draw,
        fn_args=([data], recipe, wave_queue),
        batch_size=None,
        num_cpus=DRAWING_CPUS,
        label_selector=_this_node(),
    )
    # Prefetching would hold back a finished block until the next wave is requested.
    try:
        yield from dataset.iter_batches(batch_size=None, prefetch_batches=0)
    except AssertionError as error:  # raised by Ray 2.60 when a task ends between two blocks
        raise RuntimeError(LOST) from error


_COLUMNS = ("image", "targets", "weights")


def _start_queue() -> Any:
    """Starts a Ray actor that hands the requested waves to the tasks."""
    import ray

    # Defined inside a function, so that Ray pickles the class and the actor imports no module.
    class WaveQueue:
        def __init__(self) -> None:
            self._waves: asyncio.Queue[Wave | None] = asyncio.Queue()
            self._drawers: set[int] = set()

        async def join(self, drawer: int) -> None:
            """Registers a task.

            A task that joins twice was lost and restarted. Its waves are lost, so all tasks end.
            """
            if drawer in self._drawers:
                await self.put(None)
            self._drawers.add(drawer)

        async def put(self, wave: Wave | None) -> None:
            await self._waves.put(wave)

        async def get(self) -> Wave | None:
            """Returns the next wave, or None once all waves have been handed out."""
            wave = await self._waves.get()
            if wave is None:
                await self.put(None)
            return wave

    return ray.remote(num_cpus=0, label_selector=_this_node())(WaveQueue).remote()


def _this_node() -> dict[str, str]:
    """Label selector of this machine.

    If the machine is lost, the trainer and its tasks are lost together, and no trainer waits for
    blocks that never arrive.
    """
    import ray

    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def _draw(
    batch: dict[str, Any], data: Sequence[Any], recipe: Recipe, wave_queue: Any
) -> Iterator[dict[str, NDArray[Any]]]:
    """Draws waves until no more are requested.

    `data` is a list that holds one object reference, so that Ray does not copy the object.
    """
    import ray

    ray.get(wave_queue.join.remote(int(batch["item"][0])))
    os.nice(19)  # a lower priority than the trainers, which Ray runs at 15
    sampler = Sampler(ray.get(data[0]), recipe)
    while (wave := ray.get(wave_queue.get.remote())) is not None:
        number, slots = wave
        samples = [sampler[slot] for slot in slots]
        columns = {
            name: np.stack([getattr(sample, name) for sample in samples]) for name in _COLUMNS
        }
        yield {"wave": np.full(len(samples), number), **columns}
