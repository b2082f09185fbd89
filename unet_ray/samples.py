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
from unet_ray.recipes import LabelsAre
from unet_ray.volumes import Volume, open_volume
from unet_ray.weights import class_weights, separate, weight_map

# More distinct values than this are object numbers, not classes.
MOST_CLASSES = 32
IGNORED = 255  # target of a voxel without annotation, until its weight is 0


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
class HeldOut:
    """Slices of one labelled volume that are not learned from.

    Attributes:
        image: ``(c, z, y, x)`` in its own units.
        targets: class numbers, uint8 ``(z, y, x)``; `IGNORED` where nothing is known.
        cells: numbers of cells, ``(z, y, x)``, if the labels are instances.
        intensity: grey values of the whole image.
    """

    image: NDArray[Any]
    targets: NDArray[np.uint8]
    cells: NDArray[np.int64] | None
    intensity: Intensity


@dataclass(frozen=True, eq=False)
class TrainingData:
    """All labelled volumes of a training run.

    Attributes:
        volumes: in the order given.
        class_values: label value of each class, ascending.
        voxel_size: (z, y, x) in micrometre of the first image, or None.
        identity: fingerprint of images and labels, JSON-able.
        held_out: slices to score the network on; empty if none are asked for.
    """

    volumes: tuple[TrainingVolume, ...]
    class_values: tuple[int, ...]
    voxel_size: tuple[float, float, float] | None
    identity: dict[str, Any]
    held_out: tuple[HeldOut, ...] = ()

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
    images: Sequence[str],
    labels: Sequence[str],
    w0: float = 10.0,
    sigma: float = 5.0,
    labels_are: LabelsAre = "classes",
    ignore_label: int | None = None,
    val: str | None = None,
    val_fraction: float = 0.0,
) -> TrainingData:
    """Reads labelled volumes and computes their weight maps.

    Args:
        images: paths of the images.
        labels: path of the labels of each, in the same order.
        w0: weight between two cells that all but touch (eq. 2 of the paper).
        sigma: width of that border term, in voxels.
        labels_are: ``classes``, or ``instances``: numbers of cells, of which the network learns
            where there are cells, 1, with background, 0, between those that touch.
        ignore_label: label of voxels without annotation, which weigh nothing.
        val: slices to hold out, as in ``20:24,40:44``; of several volumes the numbers run on.
        val_fraction: share of the slices to hold out, the last ones.

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
    paths = [label.path for _, label in pairs]
    arrays = [label.read(Box.of(label.shape[1:]))[0] for _, label in pairs]
    known = [np.ones(a.shape, bool) if ignore_label is None else a != ignore_label for a in arrays]
    cells: list[NDArray[np.int64] | None] = [None] * len(arrays)
    if labels_are == "instances":
        values = np.array([0, 1])
        apart = [_apart(path, a, k) for path, a, k in zip(paths, arrays, known, strict=True)]
        targets, cells = [(each != 0).astype(np.uint8) for each in apart], [*apart]
    else:
        values = _class_values(paths, arrays, known)
        targets = [np.searchsorted(values, a).astype(np.uint8) for a in arrays]
    for target, there in zip(targets, known, strict=True):
        target[~there] = IGNORED
    balance = class_weights(np.concatenate([t.ravel() for t in targets]), len(values))
    pictures = [image.read(Box.of(image.shape[1:])) for image, _ in pairs]
    for (image, _), picture in zip(pairs, pictures, strict=True):
        if not np.isfinite(picture).all():
            raise InputError(f"{image.path}: has voxels that are not finite; replace them first.")
    grey = [measure(image) for image, _ in pairs]
    held = _held_out([len(target) for target in targets], val, val_fraction)
    volumes, kept_back = [], []
    for n, (picture, target, cell, out) in enumerate(
        zip(pictures, targets, cells, held, strict=True)
    ):
        weights = weight_map(target, len(values), w0, sigma, balance, cell)
        known_targets = np.where(target == IGNORED, 0, target).astype(np.uint8)
        if not out.all():
            volumes.append(
                TrainingVolume(picture[:, ~out], known_targets[~out], weights[~out], grey[n])
            )
        if out.any():
            inside = None if cell is None else cell[out]
            kept_back.append(HeldOut(picture[:, out], target[out], inside, grey[n]))
    identity = {
        "images": [image.identity() for image, _ in pairs],
        "labels": [label.identity() for _, label in pairs],
    }
    return TrainingData(
        tuple(volumes),
        tuple(values.tolist()),
        pairs[0][0].voxel_size,
        identity,
        tuple(kept_back),
    )


def _held_out(depths: Sequence[int], val: str | None, fraction: float) -> list[NDArray[np.bool_]]:
    """Which slices of each volume are held out."""
    every = sum(depths)
    out = np.zeros(every, bool)
    if fraction:
        out[every - max(1, round(every * fraction)) :] = True
    for part in (val or "").split(",") if val else []:
        try:
            start, stop = (int(number) for number in part.split(":"))
        except ValueError:
            start = stop = -1
        if not 0 <= start < stop <= every:
            raise InputError(
                f"val={part!r} must be a range of slices, as in 20:24, from 0 up to {every}."
            )
        out[start:stop] = True
    if out.all():
        raise InputError(f"All {every} slices are held out; leave some to learn from.")
    return np.split(out, np.cumsum(depths)[:-1])


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


def _class_values(
    paths: Sequence[str], labels: Sequence[NDArray[Any]], known: Sequence[NDArray[np.bool_]]
) -> NDArray[np.int64]:
    found = [np.unique(a[k]).astype(np.int64) for a, k in zip(labels, known, strict=True)]
    values = np.unique(np.concatenate(found))
    if len(values) < 2:
        raise InputError(
            f"{paths[0]}: all labels are {', '.join(map(str, values)) or 'ignored'}, one class "
            "only; training needs at least two."
        )
    if len(values) > MOST_CLASSES:
        raise InputError(
            f"{paths[0]}: has {len(values)} label values, more than {MOST_CLASSES} classes: these "
            f"look like object numbers; give --labels-are instances, or labels whose values are "
            f"classes."
        )
    return values


def _apart(path: str, labels: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Numbers of cells with background between those that touch; 0 where nothing is known."""
    cells = np.where(known, labels, 0).astype(np.int64)
    if (cells < 0).any():
        raise InputError(f"{path}: holds {cells.min()}; numbers of cells are 0 or more.")
    if not cells.any():
        raise InputError(f"{path}: holds no cell; --labels-are instances needs some.")
    return np.where(separate(cells), cells, 0)


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
