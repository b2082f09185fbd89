"""Training patches: which voxels a step sees, and how they are bent on the way.

Knows volumes with their class labels and weights; a sample is a function of seed and number, so
whoever asks for it, and when, gets the same one. Does not know the network but for its context.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.augment import Deformation, change_grey, draw_deformation, warp_image, warp_labels
from unet_ray.boxes import Box
from unet_ray.errors import InputError
from unet_ray.intensity import Intensity, measure
from unet_ray.mirror import read_mirrored
from unet_ray.volumes import Volume, open_volume
from unet_ray.weights import class_weights, weight_map

# More distinct values than this are object numbers, not classes.
MOST_CLASSES = 32


@dataclass(frozen=True, eq=False)
class TrainingVolume:
    """One labelled volume in memory.

    Attributes:
        image: ``(c, z, y, x)`` in its own units.
        targets: class numbers, uint8 ``(z, y, x)``.
        weights: the paper's weight map, float32 ``(z, y, x)``.
        intensity: grey values of the image.
    """

    image: NDArray[Any]
    targets: NDArray[np.uint8]
    weights: NDArray[np.float32]
    intensity: Intensity


@dataclass(frozen=True, eq=False)
class TrainingData:
    """All labelled volumes of a training run.

    Attributes:
        volumes: in the order given.
        class_values: label value of each class, ascending.
        voxel_size: (z, y, x) in micrometre of the first image, or None.
        identity: fingerprint of images and labels, JSON-able.
    """

    volumes: tuple[TrainingVolume, ...]
    class_values: tuple[int, ...]
    voxel_size: tuple[float, float, float] | None
    identity: dict[str, Any]

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return len(self.volumes[0].image)


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


def load_training_data(
    images: Sequence[str], labels: Sequence[str], w0: float = 10.0, sigma: float = 5.0
) -> TrainingData:
    """Reads labelled volumes and computes their weight maps.

    Args:
        images: paths of the images.
        labels: path of the class labels of each, in the same order.
        w0: weight between two cells that all but touch (eq. 2 of the paper).
        sigma: width of that border term, in voxels.

    Raises:
        InputError: if files do not pair up, shapes or channels differ, or there is one class only.
    """
    if len(images) != len(labels):
        raise InputError(
            f"--images names {len(images)} files and --labels {len(labels)}: give one each."
        )
    pairs = [_open_pair(a, b) for a, b in zip(images, labels, strict=True)]
    for image, _ in pairs:
        if image.shape[0] != pairs[0][0].shape[0]:
            raise InputError(
                f"{image.path}: has {image.shape[0]} channels, {pairs[0][0].path} has "
                f"{pairs[0][0].shape[0]}; all images need the same."
            )
    label_arrays = [label.read(Box.of(label.shape[1:]))[0] for _, label in pairs]
    values = _class_values([label.path for _, label in pairs], label_arrays)
    targets = [np.searchsorted(values, a).astype(np.uint8) for a in label_arrays]
    balance = class_weights(np.concatenate([t.ravel() for t in targets]), len(values))
    volumes = tuple(
        TrainingVolume(
            image.read(Box.of(image.shape[1:])),
            target,
            weight_map(target, len(values), w0, sigma, balance),
            measure(image),
        )
        for (image, _), target in zip(pairs, targets, strict=True)
    )
    for (image, _), volume in zip(pairs, volumes, strict=True):
        if not np.isfinite(volume.image).all():
            raise InputError(f"{image.path}: has voxels that are not finite; replace them first.")
    identity = {
        "images": [image.identity() for image, _ in pairs],
        "labels": [label.identity() for _, label in pairs],
    }
    return TrainingData(volumes, tuple(values.tolist()), pairs[0][0].voxel_size, identity)


def _open_pair(image: str, label: str) -> tuple[Volume, Volume]:
    picture, truth = open_volume(image), open_volume(label)
    if picture.shape[1:] != truth.shape[1:]:
        raise InputError(
            f"{picture.path} and {truth.path}: image and labels must have the same shape, but are "
            f"{_by(picture.shape[1:])} and {_by(truth.shape[1:])} (z, y, x)."
        )
    if truth.shape[0] != 1 or truth.dtype.kind not in "ui":
        raise InputError(
            f"{truth.path}: labels must be integers of one channel, not {truth.dtype} of "
            f"{truth.shape[0]}."
        )
    return picture, truth


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _class_values(paths: Sequence[str], labels: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    values = np.unique(np.concatenate([np.unique(a).astype(np.int64) for a in labels]))
    if len(values) == 1:
        raise InputError(
            f"{paths[0]}: all labels are {values[0]}, one class only; training needs at least two."
        )
    if len(values) > MOST_CLASSES:
        raise InputError(
            f"{paths[0]}: has {len(values)} label values, more than {MOST_CLASSES} classes: these "
            f"look like object numbers; give labels whose values are classes."
        )
    return values


class Sampler:
    """Draws patches of `data` for a network.

    Args:
        data: labelled volumes.
        patch: size of the image patch along y and x, in voxels.
        output: size of what the network returns for it.
        seed: where chance starts.
        elastic: standard deviation of the deformation, in voxels; 0 for none.
    """

    def __init__(
        self,
        data: TrainingData,
        patch: tuple[int, int],
        output: tuple[int, int],
        seed: int,
        elastic: float,
    ) -> None:
        self._data, self._patch, self._output = data, patch, output
        self._seed, self._elastic = seed, elastic
        sizes = np.array([v.targets.size for v in data.volumes], float)
        self._shares = sizes / sizes.sum()

    def __getitem__(self, number: int) -> Sample:
        """The sample of this number, drawn from ``(seed, number)`` alone."""
        rng = np.random.default_rng([self._seed, number])
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


def ahead(
    draw: Callable[[int], Sample], numbers: Iterator[int], depth: int = 4
) -> Iterator[Sample]:
    """Yields ``draw(number)`` in order, drawn by a thread up to `depth` samples ahead.

    The thread ends when the numbers do or when the caller stops asking; what it raises is raised
    here.
    """
    ready: queue.Queue[Sample | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Sample | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for number in numbers:
                if stopped.is_set():
                    return
                put(draw(number))
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
