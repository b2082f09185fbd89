"""Training patches: draws, crops and deforms the voxels of each training sample.

A sample depends only on the seed, the step and the slot. A thread or Ray Data can therefore draw
samples in advance. Reads windows of arrays; independent of files and of the network.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from unet_ray.tiling.boxes import Box
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.training import volumetric
from unet_ray.training.augment import (
    Deformation,
    change_grey,
    degrade,
    draw_deformation,
    warp_image,
    warp_labels,
)
from unet_ray.training.data import SQUARE, TrainingData, TrainingVolume
from unet_ray.training.recipes import Recipe
from unet_ray.training.windows import Windowed


@dataclass(frozen=True, eq=False)
class Sample:
    """One training patch, of a slice or of a volume.

    The targets and weights cover the middle of the image, which is what the network returns.

    Attributes:
        image: normalised, float32 ``(c, y, x)`` or ``(c, z, y, x)``.
        targets: class numbers, uint8 ``(y', x')`` or ``(z', y', x')``.
        weights: weights of the loss, float32, of the shape of the targets.
    """

    image: NDArray[np.float32]
    targets: NDArray[np.uint8]
    weights: NDArray[np.float32]

    def in_the_middle(self) -> Sample:
        """Returns the middle plane of a patch of a volume; a patch of a slice as it is."""
        if self.targets.ndim == 2:
            return self
        z, label_z = self.image.shape[1] // 2, len(self.targets) // 2
        return Sample(self.image[:, z], self.targets[label_z], self.weights[label_z])


Item = TypeVar("Item")
Drawn = TypeVar("Drawn")
SampleSlot = tuple[int, int]  # step, and index of the patch among those of all workers in the step
Wave = tuple[int, list[SampleSlot]]  # number of the wave, and the samples to draw


class Sampler:
    """Draws training patches at random positions of the labelled volumes.

    Volumes are chosen in proportion to their number of voxels. If only some voxels of a volume have
    labels, each patch shows the neighbourhood of a labelled one.

    Args:
        data: labelled volumes.
        recipe: sets the patch size, the random seed and the strength of the deformation.
    """

    def __init__(self, data: TrainingData, recipe: Recipe) -> None:
        self._data, self._seed = data, recipe.seed
        self._elastic, self._degrade = recipe.elastic, recipe.degrade
        self._turns = recipe.turns
        self._patch, self._output, self._dims = recipe.patch, recipe.output, recipe.dims
        z, y, x = data.voxel_size or (1.0, 1.0, 1.0)
        self._spacing = (z / x, y / x, 1.0) if recipe.anisotropy == "auto" else (1.0, 1.0, 1.0)
        sizes = np.array([math.prod(v.targets.shape) for v in data.volumes], float)
        self._shares = sizes / sizes.sum()
        self._places = [_Places.of(volume) for volume in data.volumes]

    def __getitem__(self, slot: SampleSlot) -> Sample:
        """Draws the sample of a step and slot; it depends only on these and the seed."""
        rng = np.random.default_rng([self._seed, *slot])
        number = rng.choice(len(self._shares), p=self._shares)
        volume, places = self._data.volumes[number], self._places[number]
        if self._dims == 2:
            return self._of_slice(volume, places, rng)
        return self._of_volume(volume, places, rng)

    def _of_slice(
        self, volume: TrainingVolume, places: _Places, rng: np.random.Generator
    ) -> Sample:
        if places.dense:
            z = int(places.planes[rng.integers(len(places.planes))])
            centre = self._draw_centre(volume.targets.shape[1:], rng)
        else:
            z, *voxel = places.draw(rng)
            centre = self._draw_around(voxel, volume.targets.shape[1:], rng)
        deformation = draw_deformation(self._patch, rng, self._elastic, *self._turns)
        inner = Deformation(deformation.offsets[(slice(None), *self._inner)])
        box, label_box = deformation.reach(centre), inner.reach(centre)
        image = volume.intensity.normalise(_window(volume.image, _in_slice(z, box))[..., 0, :, :])
        warped = warp_image(image, _relative_to(box, centre), deformation)
        targets, weights = (
            warp_labels(
                _window(array, _in_slice(z, label_box))[0], _relative_to(label_box, centre), inner
            )
            for array in (volume.targets, volume.weights)
        )
        return Sample(degrade(change_grey(warped, rng), rng, self._degrade), targets, weights)

    def _of_volume(
        self, volume: TrainingVolume, places: _Places, rng: np.random.Generator
    ) -> Sample:
        shape = volume.targets.shape
        if not places.dense:
            centre = self._draw_around(places.draw(rng), shape, rng)
        else:
            centre = self._draw_centre(shape, rng)
            if len(places.planes) < shape[0]:
                plane = int(rng.choice(places.planes))
                centre = (*self._draw_around([plane], shape[:1], rng), *centre[1:])
        warp = volumetric.draw_warp(self._patch, rng, self._elastic, self._spacing, *self._turns)
        inner = volumetric.Warp(warp.offsets[(slice(None), *self._inner)])
        box, label_box = warp.reach(centre), inner.reach(centre)
        image = volume.intensity.normalise(_window(volume.image, box))
        warped = volumetric.warp_image(image, _relative_to(box, centre), warp)
        targets, weights = (
            volumetric.warp_labels(
                _window(array, label_box), _relative_to(label_box, centre), inner
            )
            for array in (volume.targets, volume.weights)
        )
        return Sample(degrade(change_grey(warped, rng), rng, self._degrade), targets, weights)

    @property
    def _inner(self) -> tuple[slice, ...]:
        """The middle of the patch, for which the network returns classes."""
        margins = ((p - o) // 2 for p, o in zip(self._patch, self._output, strict=True))
        return tuple(slice(m, m + o) for m, o in zip(margins, self._output, strict=True))

    def _draw_centre(self, shape: Sequence[int], rng: np.random.Generator) -> tuple[float, ...]:
        """Draws a patch centre such that the network's output is inside the volume if it fits.

        A start is drawn up to half an output beyond either face and then clipped to the volume.
        Without the overhang, voxels in the corners would almost never be drawn.
        """
        centre = []
        for extent, output in zip(shape, self._output, strict=True):
            start = int(rng.integers(-(output // 2), max(1, extent - output // 2)))
            centre.append(_inside(start, extent, output))
        return tuple(centre)

    def _draw_around(
        self, voxel: Sequence[int], shape: Sequence[int], rng: np.random.Generator
    ) -> tuple[float, ...]:
        """Draws a patch centre such that the network's output shows a voxel of the volume."""
        centre = []
        for position, extent, output in zip(voxel, shape, self._output, strict=False):
            start = min(position, extent - 1) - int(rng.integers(output))
            centre.append(_inside(start, extent, output))
        return tuple(centre)


@dataclass(frozen=True, eq=False)
class _Places:
    """Where a volume has labels; elsewhere a patch would teach nothing.

    Attributes:
        planes: numbers of the slices with labels; of all slices if none has any.
        dense: whether these slices have labels everywhere.
        squares: indices into `labelled`, flattened, of the squares with labels.
        labelled: see `TrainingVolume.labelled`.
    """

    planes: NDArray[np.intp]
    dense: bool
    squares: NDArray[np.intp]
    labelled: NDArray[np.bool_]

    @classmethod
    def of(cls, volume: TrainingVolume) -> _Places:
        labelled = volume.labelled
        planes = np.flatnonzero(labelled.any((1, 2)))
        dense = bool(labelled[planes].all())
        squares = np.empty(0, np.intp) if dense else np.flatnonzero(labelled)
        return cls(planes if len(planes) else np.arange(len(labelled)), dense, squares, labelled)

    def draw(self, rng: np.random.Generator) -> list[int]:
        """Draws a voxel (z, y, x) of a square with labels; it may be beyond the volume."""
        square = self.squares[rng.integers(len(self.squares))]
        z, *place = (int(n) for n in np.unravel_index(square, self.labelled.shape))
        return [z, *(SQUARE * n + int(rng.integers(SQUARE)) for n in place)]


def _inside(start: int, extent: int, output: int) -> float:
    """Returns the centre of an output moved inside the volume, if it fits, along one axis."""
    start = min(max(start, 0), max(0, extent - output))
    return start + (output - 1) / 2


def _in_slice(z: int, box: Box) -> Box:
    """Returns the box (z, y, x) of a box (y, x) in slice `z`."""
    return Box((z, *box.start), (z + 1, *box.stop))


def _window(array: Windowed, box: Box) -> NDArray[Any]:
    """Crops a box along the last axes of an array, mirrored at its faces."""
    shape = array.shape[-len(box.start) :]

    def read(inside: Box) -> NDArray[Any]:
        index: tuple[Any, ...] = (..., *inside.slices)
        part: NDArray[Any] = array[index]
        return part

    return read_mirrored(read, shape, box)


def _relative_to(box: Box, centre: Sequence[float]) -> tuple[float, ...]:
    return tuple(c - start for c, start in zip(centre, box.start, strict=True))


def sample_slots(step: int, rank: int, batch: int) -> Iterator[SampleSlot]:
    """Yields the (step, slot) pairs of worker `rank`, endlessly, starting at `step`."""
    return (
        (number, slot)
        for number in itertools.count(step)
        for slot in range(rank * batch, (rank + 1) * batch)
    )


def ahead(draw: Callable[[Item], Drawn], items: Iterator[Item], depth: int = 4) -> Iterator[Drawn]:
    """Yields ``draw(item)`` for each item, in order; a thread computes up to `depth` in advance.

    The thread ends when the items are exhausted or this iterator is closed. Errors raised in the
    thread are raised again here.
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
            for item in items:
                if stopped.is_set():
                    return
                put(draw(item))
            put(None)
        except BaseException as error:  # raised again in the consuming thread
            put(error)

    threading.Thread(target=work, name="samples", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
