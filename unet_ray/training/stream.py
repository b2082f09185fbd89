"""Patches drawn by Ray Data while the network trains.

Knows waves of patches and Ray. Does not know what a patch is for.
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

from unet_ray.training.patches import Sample, Sampler, SampleSlot, Wave
from unet_ray.training.recipes import Recipe

# What is drawn as one block, and how many of them each task is ahead.
WAVE_BYTES, WAVES_AHEAD = 8 << 20, 2
LOST = "a task that drew training patches was lost"
DRAWING_CPUS = 0.001  # bookkeeping that leaves the CPUs to the trainers


def streamed(
    data: Any, recipe: Recipe, channels: int, wanted: Iterator[SampleSlot], drawers: int = 1
) -> Iterator[Sample]:
    """Yields the samples of `wanted` in order, drawn ahead by tasks of Ray Data.

    One run of Ray Data, as long as the training; its tasks draw what they are asked for, a wave
    at a time. So drawing keeps pace with the steps, and no block waits to be taken: a run of Ray
    Data with such blocks spins a core.

    Args:
        data: object reference of the `TrainingData`.
        recipe: of the patches.
        channels: of the images.
        wanted: which samples; may have no end.
        drawers: how many tasks draw.

    Raises:
        RuntimeError: if a task that draws is lost.
    """
    import ray

    each = 4 * channels * math.prod(recipe.patch) + 5 * math.prod(recipe.output)
    size = max(1, WAVE_BYTES // each)
    waves, asked = enumerate(_waves(wanted, size)), _asked()
    blocks = _blocks(data, recipe, asked, drawers, size * each)
    early: dict[int, dict[str, NDArray[Any]]] = {}  # drawn before an earlier wave was
    sent: list[int] = []  # how many samples each wave has

    def ask() -> None:
        wave = next(waves, None)
        asked.put.remote(wave)
        if wave:
            sent.append(len(wave[1]))

    try:
        for _ in range(WAVES_AHEAD * drawers):
            ask()
        for number in itertools.count():
            while number not in early:
                if (block := next(blocks, None)) is None:
                    if number == len(sent):
                        return
                    raise RuntimeError(LOST)
                drawn = block["wave"].tolist()
                if drawn != [drawn[0]] * sent[drawn[0]]:
                    raise RuntimeError(f"a block of training patches is no whole wave: {drawn}")
                early[drawn[0]] = block
            ask()
            block = early.pop(number)
            for image, targets, weights in zip(*(block[k] for k in _COLUMNS), strict=True):
                yield Sample(image, targets, weights)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"drawing of training patches failed: {error}") from error
    finally:
        blocks.close()
        ray.kill(asked)


def _waves(wanted: Iterator[SampleSlot], size: int) -> Iterator[list[SampleSlot]]:
    while wave := list(itertools.islice(wanted, size)):
        yield wave


def _blocks(
    data: Any, recipe: Recipe, asked: Any, drawers: int, size: int
) -> Generator[dict[str, NDArray[Any]]]:
    """The waves that are asked for, each a block of so many bytes, as they are drawn."""
    import ray.data

    # Ray Data writes down what it counts every five seconds, 280 MB a day.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a long validation asks for nothing
    context.target_max_block_size = size * 4 // 5  # a wave fills it, and is not cut
    run = ray.data.from_items(list(range(drawers)), override_num_blocks=drawers).map_batches(
        _draw,
        fn_args=([data], recipe, asked),
        batch_size=None,
        num_cpus=DRAWING_CPUS,
        label_selector=_here(),
    )
    # One that fetched ahead would keep back what is drawn until more is asked for.
    try:
        yield from run.iter_batches(batch_size=None, prefetch_batches=0)
    except AssertionError as error:  # of Ray 2.60, where a task ends between two of its answers
        raise RuntimeError(LOST) from error


_COLUMNS = ("image", "targets", "weights")


def _asked() -> Any:
    """An actor of Ray that passes on what is to be drawn."""
    import ray

    # Inside a function, so that Ray sends the class itself: its process imports none of this.
    class Asked:
        def __init__(self) -> None:
            self._waves: asyncio.Queue[Wave | None] = asyncio.Queue()
            self._drawers: set[int] = set()

        async def join(self, drawer: int) -> None:
            """A task that joins again was lost, with the waves that it had: all end."""
            if drawer in self._drawers:
                await self.put(None)
            self._drawers.add(drawer)

        async def put(self, wave: Wave | None) -> None:
            await self._waves.put(wave)

        async def get(self) -> Wave | None:
            """The next wave, or nothing ever after."""
            wave = await self._waves.get()
            if wave is None:
                await self.put(None)
            return wave

    return ray.remote(num_cpus=0, label_selector=_here())(Asked).remote()


def _here() -> dict[str, str]:
    """This machine: drawers that are lost with their trainer leave nobody waiting for blocks."""
    import ray

    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def _draw(
    batch: dict[str, Any], data: Sequence[Any], recipe: Recipe, asked: Any
) -> Iterator[dict[str, NDArray[Any]]]:
    """Draws waves until nothing is asked for any more.

    `data` is a reference in a list, so that Ray copies none of it.
    """
    import ray

    ray.get(asked.join.remote(int(batch["item"][0])))
    os.nice(19)  # below the trainers, which Ray runs at 15
    sampler = Sampler(ray.get(data[0]), recipe)
    while (wave := ray.get(asked.get.remote())) is not None:
        number, wanted = wave
        drawn = [sampler[slot] for slot in wanted]
        columns = {name: np.stack([getattr(each, name) for each in drawn]) for name in _COLUMNS}
        yield {"wave": np.full(len(drawn), number), **columns}
