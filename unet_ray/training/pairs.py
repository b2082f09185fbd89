"""Images and their labels: opened, checked against each other, and identified by their voxels.

Handles volumes, in memory or by windows. Independent of classes, weight maps and patches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Box
from unet_ray.training.truths import MOST_CLASSES, RING
from unet_ray.training.windows import Planes, Windowed
from unet_ray.units import warn
from unet_ray.volumes.folder import slices_by_number
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume

# Labels with fewer values than `MOST_CLASSES` may still number cells: nearly each value is one
# object on each slice.
FEWEST_CELLS, SINGLE_OBJECTS = 5, 0.9
# Gold labels with less than this share of the median number of cells are annotated in part.
GOLD, FEW_CELLS = "man_seg", 0.5
# Shares of voxels that equal a neighbour, in an image and in labels that seem to be exchanged.
EXCHANGED = (0.9, 0.6)
LOOKED_AT = 32  # evenly spaced slices that show whether a file is an image, classes or cells
SLAB_BYTES = 32 << 20  # hashed at a time


@dataclass(frozen=True)
class Pair:
    """An image and its labels.

    Attributes:
        image: the image, of which some slices may have no labels.
        label: the labels.
        planes: slices of the image that have labels, in the order of the labels.
        voxels: grey values of these slices, (c, z, y, x).
        labels: label values, (1, z, y, x).
    """

    image: Volume
    label: Volume
    planes: Sequence[int]
    voxels: Windowed
    labels: Windowed

    @property
    def voxel_count(self) -> int:
        """Number of labelled voxels."""
        return int(np.prod(self.labels.shape))

    def loaded(self) -> Pair:
        """Returns this pair with all its voxels in memory.

        Raises:
            InputError: if grey values are not finite.
        """
        return replace(self, voxels=_load(self.voxels), labels=_load(self.labels))

    def pinned(self) -> Pair:
        """Returns this pair; reads refuse files that change from now on."""
        self.image.pin()
        self.label.pin()
        return self

    def identity(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Identifies image and labels by their voxels, so that a changed file time does not matter.

        Raises:
            InputError: if grey values are not finite.
        """
        return _identity(self.image, self.voxels), _identity(self.label, self.labels)

    def partial(self) -> NDArray[np.bool_]:
        """Returns which slices of gold labels of the Cell Tracking Challenge lack most cells.

        Its organisers have annotated only some cells of a few frames. Slices of other labels may
        really have few objects.
        """
        files = self.label.slice_files()
        depth = self.labels.shape[1]
        if not files or not all(name.startswith(GOLD) for name in files):
            return np.zeros(depth, bool)
        counts = np.array([np.count_nonzero(np.unique(plane)) for plane in _planes(self.labels)])
        partial: NDArray[np.bool_] = counts < FEW_CELLS * np.median(counts)
        if partial.any():
            names = ", ".join(files[z] for z in np.flatnonzero(partial))
            warn(
                f"{self.label.path}: {names}: far fewer cells than in the other frames, so "
                f"background is learned there within {RING} voxels of a cell only."
            )
        return partial


def open_pairs(images: Sequence[Any], labels: Sequence[Any]) -> list[Pair]:
    """Opens images and their labels; reads no voxels.

    Args:
        images: paths of the images, or arrays.
        labels: paths of the labels, or arrays, in the same order.

    Raises:
        InputError: if numbers of files, shapes or channels differ, or labels are not integers.
    """
    if len(images) != len(labels):
        raise InputError(
            f"--images names {len(images)} files and --labels {len(labels)}; pass one label file "
            "per image."
        )
    pairs = [_open_pair(a, b) for a, b in zip(images, labels, strict=True)]
    first = pairs[0].image
    for image in (pair.image for pair in pairs):
        if image.shape[0] != first.shape[0]:
            raise InputError(
                f"{image.path}: has {image.shape[0]} channels, {first.path} has "
                f"{first.shape[0]}; all images must have the same number."
            )
    return pairs


def all_read(pairs: Sequence[Pair]) -> list[Volume]:
    """Returns the volumes of all pairs, except folders of labels that are paired by number.

    Gaps between such labels are intended, and `summary` states the slices without labels.
    """
    images = [pair.image for pair in pairs]
    labels = [pair.label for pair in pairs if len(pair.planes) == pair.image.shape[1]]
    return images + labels


def refuse_exchanged(pair: Pair) -> None:
    """Refuses an image that is constant in large parts where its labels are not.

    Raises:
        InputError: naming both files.
    """
    shares = [
        np.mean([_constant_share(plane) for plane in _planes(array, LOOKED_AT)])
        for array in (pair.voxels, pair.labels)
    ]
    if shares[0] > EXCHANGED[0] and shares[1] < EXCHANGED[1]:
        raise InputError(
            f"{pair.label.path} looks like an image and {pair.image.path} like its labels; "
            "exchange images and labels."
        )


def refuse_cell_numbers(pair: Pair, ignore_label: int | None) -> None:
    """Refuses labels of which nearly every value is one connected object on each slice.

    Raises:
        InputError: naming the file and the flag for cell numbers.
    """
    values: set[int | None] = set()
    for plane in _planes(pair.labels, LOOKED_AT):
        values |= set(np.unique(plane).tolist())
    values -= {0, ignore_label}
    if not FEWEST_CELLS <= len(values) <= MOST_CLASSES:
        return
    parts = [
        ndimage.label(plane == v, np.ones((3, 3)))[1]
        for plane in _planes(pair.labels, LOOKED_AT)
        for v in values
    ]
    present = [count for count in parts if count]
    if sum(count == 1 for count in present) >= SINGLE_OBJECTS * len(present):
        raise InputError(
            f"{pair.label.path}: has {len(values)} values besides 0, and nearly each is one "
            "connected object on a slice, so they look like cell numbers; set --labels-are "
            "instances, or --labels-are classes if they are classes."
        )


def _planes(array: Windowed, most: int | None = None) -> Iterator[NDArray[Any]]:
    """Yields slices (y, x) of the first channel.

    Args:
        array: (c, z, y, x).
        most: yield at most this many evenly spaced ones, unless the array is in memory.
    """
    _, depth, height, width = array.shape
    if isinstance(array, np.ndarray):
        most = None
    for z in np.unique(np.linspace(0, depth - 1, min(depth, most or depth)).astype(int)).tolist():
        yield array[:, z : z + 1, 0:height, 0:width][0, 0]


def _constant_share(array: NDArray[Any]) -> float:
    """Returns the share of voxels of (y, x) that equal their neighbour along x."""
    return float((array[..., 1:] == array[..., :-1]).mean()) if array.shape[-1] > 1 else 1.0


def _load(array: Windowed) -> NDArray[Any]:
    _, depth, height, width = array.shape
    loaded: NDArray[Any] = array[:, 0:depth, 0:height, 0:width]
    return loaded


def _identity(volume: Volume, voxels: Windowed) -> dict[str, Any]:
    properties = volume.identity()
    names = "name", "kind", "shape", "dtype", "bytes"
    digest = hashlib.sha256()
    plane_bytes = int(np.prod(voxels.shape[2:])) * voxels.dtype.itemsize
    slab = max(1, SLAB_BYTES // max(1, plane_bytes)), *voxels.shape[2:]
    for channel in range(voxels.shape[0]):
        for box in Box.of(voxels.shape[1:]).split(slab):
            part = voxels[(slice(None), *box.slices)][channel]
            digest.update(np.ascontiguousarray(part).data)
    return {**{name: properties[name] for name in names}, "sha256": digest.hexdigest()}


def _open_pair(image: Any, label: Any) -> Pair:
    volume, truth = open_volume(image), open_volume(label)
    if volume.kind == truth.kind == "array":
        volume.path, truth.path = "the array of images", "the array of labels"
    planes = _labelled_planes(volume, truth)
    if (len(planes), *volume.shape[2:]) != truth.shape[1:]:
        raise InputError(
            f"{volume.path} and {truth.path}: image and labels must have the same shape, but "
            f"are {_format_shape(volume.shape[1:])} and {_format_shape(truth.shape[1:])} (z, y, x)."
        )
    if truth.shape[0] != 1 or truth.dtype.kind not in "ui":
        raise InputError(
            f"{truth.path}: labels must be integers with one channel; this file has dtype "
            f"{truth.dtype} and {truth.shape[0]} channel(s)."
        )
    return Pair(volume, truth, planes, Planes(volume, planes), Planes(truth, range(truth.shape[1])))


def _labelled_planes(image: Volume, truth: Volume) -> Sequence[int]:
    """Returns the slices of the image that have labels; of two folders, paired by number."""
    folders = image.slice_files() and truth.slice_files()
    if folders and image.shape[1] > truth.shape[1]:
        return slices_by_number(image, truth) or range(image.shape[1])
    return range(image.shape[1])


def _format_shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
