"""Training patches: which voxels a step sees, and how they are bent on the way.

A sample is a function of seed, step and slot, so whoever asks for it, and when, gets the same
one; a thread or a Ray Data stream draws samples before the trainer asks. Does not know files, nor
the network.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from unet_ray.tiling.boxes import Box
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.training.augment import (
    Deformation,
    change_grey,
    draw_deformation,
    warp_image,
    warp_labels,
)
from unet_ray.training.labels import TrainingData
from unet_ray.training.recipes import Recipe


@dataclass(frozen=True, eq=False)
class Sample:
    """One training patch.

    Attributes:
        image: float32 ``(c, y, x)``, normalised.
        targets: uint8 ``(y', x')``: what the network returns for the image.
        weights: float32 ``(y', x')``.
    """

    image: NDArray[np.float32]
    targets: NDArray[np.uint8]
    weights: NDArray[np.float32]


# What is drawn as one block, and how many of them each task is ahead.
WAVE_BYTES, WAVES_AHEAD = 8 << 20, 2
LOST = "a task that drew training patches was lost"
DRAWING_CPUS = 0.001  # bookkeeping that leaves the CPUs to the trainers

Wanted = TypeVar("Wanted")
Drawn = TypeVar("Drawn")
Place = tuple[int, int]  # step, and slot: which of the patches of that step, of all workers
_Wave = tuple[int, list[Place]]


class Sampler:
    """Draws patches of `data` for a network.

    Args:
        data: labelled volumes.
        recipe: its patch and output, seed and deformation.
    """

    def __init__(self, data: TrainingData, recipe: Recipe) -> None:
        self._data, self._seed, self._elastic = data, recipe.seed, recipe.elastic
        self._patch, self._output = recipe.patch, recipe.output
        sizes = np.array([v.targets.size for v in data.volumes], float)
        self._shares = sizes / sizes.sum()

    def __getitem__(self, place: Place) -> Sample:
        """The sample of this step and slot, drawn from the seed and these alone."""
        rng = np.random.default_rng([self._seed, *place])
        volume = self._data.volumes[rng.choice(len(self._shares), p=self._shares)]
        z = int(rng.integers(volume.targets.shape[0]))
        centre = self._draw_centre(volume.targets.shape[1:], rng)
        bend = draw_deformation(self._patch, rng, self._elastic)
        inner = Deformation(bend.offsets[(slice(None), *self._inner)])
        image = volume.intensity.normalise(_window(volume.image, z, bend.reach(centre)))
        here = inner.reach(centre)
        targets = _window(volume.targets, z, here)
        weights = _window(volume.weights, z, here)
        return Sample(
            change_grey(warp_image(image, _seen_from(bend.reach(centre), centre), bend), rng),
            warp_labels(targets, _seen_from(here, centre), inner),
            warp_labels(weights, _seen_from(here, centre), inner),
        )

    @property
    def _inner(self) -> tuple[slice, ...]:
        """The voxels of the patch that the network returns: its middle."""
        margins = ((p - o) // 2 for p, o in zip(self._patch, self._output, strict=True))
        return tuple(slice(m, m + o) for m, o in zip(margins, self._output, strict=True))

    def _draw_centre(self, shape: Sequence[int], rng: np.random.Generator) -> tuple[float, float]:
        """A centre whose returned voxels lie in the volume, where they fit.

        Drawn with an overhang of half an output and then pushed inside, or the volume's corners
        would hardly ever be seen.
        """
        found = []
        for extent, output in zip(shape, self._output, strict=True):
            start = int(rng.integers(-(output // 2), max(1, extent - output // 2)))
            start = min(max(start, 0), max(0, extent - output))
            found.append(start + (output - 1) / 2)
        return found[0], found[1]


def _window(array: NDArray[Any], z: int, box: Box) -> NDArray[Any]:
    """A box (y, x) of slice `z`, mirrored at the faces; axes before z are kept."""
    plane = array[..., z, :, :]

    def read(inside: Box) -> NDArray[Any]:
        rows, columns = inside.slices
        return plane[..., rows, columns]

    return read_mirrored(read, plane.shape[-2:], box)


def _seen_from(box: Box, centre: tuple[float, float]) -> tuple[float, float]:
    return centre[0] - box.start[0], centre[1] - box.start[1]


def places(step: int, rank: int, batch: int) -> Iterator[Place]:
    """Steps and slots of one worker, from a step on, without end."""
    return (
        (number, slot)
        for number in itertools.count(step)
        for slot in range(rank * batch, (rank + 1) * batch)
    )


def ahead(
    draw: Callable[[Wanted], Drawn], wanted: Iterator[Wanted], depth: int = 4
) -> Iterator[Drawn]:
    """Yields what `draw` makes of each that is wanted, in order, by a thread up to `depth` ahead.

    The thread ends when they do or when the caller stops asking; what it raises is raised
    here.
    """
    ready: queue.Queue[Drawn | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Drawn | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for each in wanted:
                if stopped.is_set():
                    return
                put(draw(each))
            put(None)
        except BaseException as error:  # handed to the caller
            put(error)

    threading.Thread(target=work, name="samples", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()


def streamed(
    data: Any, recipe: Recipe, channels: int, wanted: Iterator[Place], drawers: int = 1
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


def _waves(wanted: Iterator[Place], size: int) -> Iterator[list[Place]]:
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
            self._waves: asyncio.Queue[_Wave | None] = asyncio.Queue()
            self._drawers: set[int] = set()

        async def join(self, drawer: int) -> None:
            """A task that joins again was lost, with the waves that it had: all end."""
            if drawer in self._drawers:
                await self.put(None)
            self._drawers.add(drawer)

        async def put(self, wave: _Wave | None) -> None:
            await self._waves.put(wave)

        async def get(self) -> _Wave | None:
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
        drawn = [sampler[place] for place in wanted]
        columns = {name: np.stack([getattr(each, name) for each in drawn]) for name in _COLUMNS}
        yield {"wave": np.full(len(drawn), number), **columns}
