"""Training patches: which voxels a step sees, and how they are bent on the way.

A sample is a function of seed, step and slot, so whoever asks for it, and when, gets the same
one; a thread or a Ray Data stream draws samples before the trainer asks. Does not know files, nor
the network.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
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


Wanted = TypeVar("Wanted")
Drawn = TypeVar("Drawn")
SampleSlot = tuple[int, int]  # step, and slot: which of the patches of that step, of all workers
Wave = tuple[int, list[SampleSlot]]


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

    def __getitem__(self, slot: SampleSlot) -> Sample:
        """The sample of this step and slot, drawn from the seed and these alone."""
        rng = np.random.default_rng([self._seed, *slot])
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


def sample_slots(step: int, rank: int, batch: int) -> Iterator[SampleSlot]:
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
