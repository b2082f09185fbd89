"""Loads labelled volumes for training: classes, cells, weight maps and held-out slices.

Handles image files, label files and stored weight maps. Independent of patches and of the network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.errors import InputError
from unet_ray.network.checkpoints import read_tensors, write_tensors
from unet_ray.storage.places import Guard
from unet_ray.tiling.boxes import Box
from unet_ray.training.recipes import Recipe
from unet_ray.training.weights import class_weights, separate, weight_map
from unet_ray.units import warn
from unet_ray.volumes.folder import slices_by_number
from unet_ray.volumes.intensity import Intensity, measure
from unet_ray.volumes.omissions import report_omissions
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume

# Labels with more distinct values than this are taken for object numbers, not classes.
MOST_CLASSES = 32
# Labels with fewer values may still number cells: nearly each value is one object on each slice.
FEWEST_CELLS, SINGLE_OBJECTS = 5, 0.9
# Gold labels with less than this share of the median number of cells are annotated in part.
GOLD, FEW_CELLS = "man_seg", 0.5
RING = 5  # voxels around a cell that are background where 0 means not annotated
# Shares of voxels that equal a neighbour, in an image and in labels that seem to be exchanged.
EXCHANGED = (0.9, 0.6)
IGNORED = 255  # target of a voxel without annotation, until its weight is 0


@dataclass(frozen=True, eq=False)
class TrainingVolume:
    """One labelled volume in memory.

    Attributes:
        image: grey values as stored in the file, ``(c, z, y, x)``.
        targets: class numbers, uint8 ``(z, y, x)``.
        weights: the paper's weight map, float32 ``(z, y, x)``.
        intensity: mean and standard deviation of the image, for its normalisation.
    """

    image: NDArray[Any]
    targets: NDArray[np.uint8]
    weights: NDArray[np.float32]
    intensity: Intensity


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out slices of one labelled volume, which are not used for learning.

    Attributes:
        image: grey values as stored in the file, ``(c, z, y, x)``.
        targets: class numbers, uint8 ``(z, y, x)``; `IGNORED` without annotation.
        cells: cell numbers, ``(z, y, x)``, if the labels are instances.
        intensity: mean and standard deviation of the whole image, for its normalisation.
        planes: the slices of the image that `targets` hold, for a network in 3-D, which sees their
            neighbours; None for all.
    """

    image: NDArray[Any]
    targets: NDArray[np.uint8]
    cells: NDArray[np.int64] | None
    intensity: Intensity
    planes: tuple[int, ...] | None = None

    @property
    def slices(self) -> NDArray[Any]:
        """Grey values of the slices of `targets`, ``(c, z, y, x)``."""
        chosen: NDArray[Any] = self.image
        return chosen if self.planes is None else chosen[:, list(self.planes)]


@dataclass(frozen=True, eq=False)
class TrainingData:
    """All labelled volumes of a training run.

    Attributes:
        volumes: the volumes with slices to learn from, in the order of the arguments.
        class_values: label value of each class, ascending.
        voxel_size: (z, y, x) in micrometres of the first image, or None.
        identity: names, shapes and checksums of images and labels; serialisable as JSON.
        unlabelled: slices of the images without labels.
        held_out: slices for validation; empty if no slices are held out.
        instances: whether the labels number objects.
    """

    volumes: tuple[TrainingVolume, ...]
    class_values: tuple[int, ...]
    voxel_size: tuple[float, float, float] | None
    identity: dict[str, Any]
    held_out: tuple[HeldOut, ...] = ()
    unlabelled: int = 0
    instances: bool = False

    @property
    def channels(self) -> int:
        """Number of channels of every image."""
        return len(self.volumes[0].image)


@dataclass(frozen=True, eq=False)
class _Truth:
    """The labels of one volume.

    Attributes:
        targets: class numbers, uint8 ``(z, y, x)``; `IGNORED` without annotation.
        cells: cell numbers, ``(z, y, x)``, if the labels are instances.
    """

    targets: NDArray[np.uint8]
    cells: NDArray[np.int64] | None

    def of(self, slices: NDArray[np.bool_]) -> _Truth:
        """Returns the labels of the selected slices."""
        return _Truth(self.targets[slices], None if self.cells is None else self.cells[slices])

    @property
    def learned(self) -> NDArray[np.uint8]:
        """The targets with class 0 for voxels without annotation, whose weight is 0."""
        return np.where(self.targets == IGNORED, 0, self.targets).astype(np.uint8)


def load_training_data(
    images: Sequence[Any],
    labels: Sequence[Any],
    recipe: Recipe,
    weights_file: Path | None = None,
    any_classes: bool = False,
    strict: bool = False,
) -> TrainingData:
    """Reads labelled volumes, and reads or computes their weight maps.

    Args:
        images: paths of the images, or arrays.
        labels: paths of the labels, or arrays, in the same order.
        recipe: sets the kind of labels, the held-out slices and the weight maps.
        weights_file: file of `store_weights`. Its weight maps are used if they belong to the same
            labels and settings; the file need not exist.
        any_classes: accept label values as classes even if they look like cell numbers.
        strict: refuse images and labels of which a part would be left out.

    Raises:
        InputError: if the numbers of files, the shapes or the channels differ, if values are
            invalid, or if there are fewer than two classes.
    """
    pairs = _open_pairs(images, labels)
    voxel_size = recipe.voxel_size or pairs[0].image.voxel_size
    recipe.fitted(voxel_size)  # refuses a patch that does not fit before anything is read
    for volume in _all_read(pairs):
        report_omissions(volume.path, volume.omissions, strict)
    labelled = [pair.label.read(Box.of(pair.label.shape[1:]))[0] for pair in pairs]
    arrays = [_read_finite(pair) for pair in pairs]
    paths = [pair.label.path for pair in pairs]
    for pair, voxels, label_voxels in zip(pairs, arrays, labelled, strict=True):
        _refuse_exchanged(pair.image.path, pair.label.path, voxels, label_voxels)
    if recipe.labels_are == "classes" and not any_classes:
        _refuse_cell_numbers(paths, labelled, recipe.ignore_label)
    cells = recipe.labels_are == "instances" and recipe.ignore_label is None
    partial = [
        _partial(pair.label, array) if cells else np.zeros(len(array), bool)
        for pair, array in zip(pairs, labelled, strict=True)
    ]
    values, truths = _truths(paths, labelled, partial, recipe)
    intensities = [measure(pair.image) for pair in pairs]
    masks = _held_out([len(t.targets) for t in truths], recipe.val, recipe.val_fraction)
    identity = {
        "images": [_identity(pair.image, a) for pair, a in zip(pairs, arrays, strict=True)],
        "labels": [_identity(pair.label, a) for pair, a in zip(pairs, labelled, strict=True)],
    }
    volumes = list(zip(arrays, truths, intensities, masks, strict=True))
    split = _split_slices if recipe.dims == 2 else _split_volumes
    learned, held_out = split(volumes)
    learned_truths = [truth for _, truth, _ in learned]
    weights = _stored_weights(
        weights_file, identity, recipe, learned_truths, voxel_size
    ) or _weight_maps(learned_truths, len(values), recipe, voxel_size)
    return TrainingData(
        tuple(
            TrainingVolume(image, truth.learned, weight, grey)
            for (image, truth, grey), weight in zip(learned, weights, strict=True)
        ),
        tuple(values),
        voxel_size,
        identity,
        tuple(held_out),
        sum(pair.image.shape[1] - len(pair.planes) for pair in pairs),
        recipe.labels_are == "instances",
    )


_Labelled = tuple[NDArray[Any], _Truth, Intensity]


def _split_slices(
    volumes: Sequence[tuple[NDArray[Any], _Truth, Intensity, NDArray[np.bool_]]],
) -> tuple[list[_Labelled], list[HeldOut]]:
    """Returns the slices to learn from, and the held-out slices, of volumes with their masks."""
    learned = [(a[:, ~out], t.of(~out), grey) for a, t, grey, out in volumes if not out.all()]
    parts = [(a[:, out], t.of(out), grey) for a, t, grey, out in volumes if out.any()]
    return learned, [HeldOut(image, t.targets, t.cells, grey) for image, t, grey in parts]


def _split_volumes(
    volumes: Sequence[tuple[NDArray[Any], _Truth, Intensity, NDArray[np.bool_]]],
) -> tuple[list[_Labelled], list[HeldOut]]:
    """The same for a network in 3-D: the image stays whole, labels that are held out do not count.

    So a patch beside held-out slices sees their grey values, but not their labels.
    """
    learned: list[_Labelled] = []
    held_out = []
    for image, truth, grey, out in volumes:
        if not out.all():
            targets = truth.targets.copy()
            targets[out] = IGNORED
            cells = None if truth.cells is None else np.where(out[:, None, None], 0, truth.cells)
            learned.append((image, _Truth(targets, cells), grey))
        if out.any():
            part = truth.of(out)
            planes = tuple(np.flatnonzero(out).tolist())
            held_out.append(HeldOut(image, part.targets, part.cells, grey, planes))
    return learned, held_out


def store_weights(data: TrainingData, recipe: Recipe, path: Path, guard: Guard) -> None:
    """Writes the weight maps to `path` as tensors ``weights.N``, unless it contains them.

    Args:
        data: volumes with their weight maps.
        recipe: the settings that the weight maps depend on.
        path: the file.
        guard: entered around the write; raises if the run has lost its lease.
    """
    header = _weights_header(data.identity, recipe, data.voxel_size)
    if not (path.exists() and _read_weights(path)[1] == header):
        maps = {f"weights.{n}": torch.from_numpy(v.weights) for n, v in enumerate(data.volumes)}
        write_tensors(path, maps, header, guard)


@dataclass(frozen=True)
class _Pair:
    """An image and its labels.

    Attributes:
        image: the image, of which some slices may have no labels.
        label: the labels.
        planes: slices of the image that have labels, in the order of the labels.
    """

    image: Volume
    label: Volume
    planes: Sequence[int]


def _open_pairs(images: Sequence[Any], labels: Sequence[Any]) -> list[_Pair]:
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


def _all_read(pairs: Sequence[_Pair]) -> list[Volume]:
    """Returns the volumes of all pairs, except folders of labels that are paired by number.

    Gaps between such labels are intended, and `summary` states the slices without labels.
    """
    images = [pair.image for pair in pairs]
    labels = [pair.label for pair in pairs if len(pair.planes) == pair.image.shape[1]]
    return images + labels


def _identity(volume: Volume, voxels: NDArray[Any]) -> dict[str, Any]:
    """Identifies a volume by its voxels, so that a changed modification time does not matter."""
    properties = volume.identity()
    names = "name", "kind", "shape", "dtype", "bytes"
    digest = hashlib.sha256(np.ascontiguousarray(voxels).data).hexdigest()
    return {**{name: properties[name] for name in names}, "sha256": digest}


def _partial(volume: Volume, labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns which slices of gold labels of the Cell Tracking Challenge lack most cells.

    Its organisers have annotated only some cells of a few frames. Slices of other labels may
    really have few objects.

    Args:
        volume: the labels.
        labels: their voxels, (z, y, x).
    """
    files = volume.slice_files()
    if not files or not all(name.startswith(GOLD) for name in files):
        return np.zeros(len(labels), bool)
    counts = np.array([np.count_nonzero(np.unique(plane)) for plane in labels])
    partial: NDArray[np.bool_] = counts < FEW_CELLS * np.median(counts)
    if partial.any():
        names = ", ".join(files[z] for z in np.flatnonzero(partial))
        warn(
            f"{volume.path}: {names}: far fewer cells than in the other frames, so background is "
            f"learned there within {RING} voxels of a cell only."
        )
    return partial


def _truths(
    paths: Sequence[str],
    labels: Sequence[NDArray[Any]],
    partial: Sequence[NDArray[np.bool_]],
    recipe: Recipe,
) -> tuple[list[int], list[_Truth]]:
    """Returns the label value of each class, and the truth of each volume.

    Args:
        paths: of the labels.
        labels: their voxels, (z, y, x).
        partial: which slices lack most cells; matters if the labels are instances.
        recipe: sets the kind of labels and the label of voxels without annotation.
    """
    arrays, ignored = [_signed(*pair) for pair in zip(paths, labels, strict=True)], None
    if recipe.ignore_label is not None:
        ignored = recipe.ignore_label
        if not any((a == ignored).any() for a in arrays):
            raise InputError(f"{paths[0]}: no voxel has the label {ignored} set by --ignore-label.")
    annotated = [np.ones(a.shape, bool) if ignored is None else a != ignored for a in arrays]
    cells: list[NDArray[np.int64] | None] = [None] * len(arrays)
    if recipe.labels_are == "instances":
        if ignored == 0:
            annotated = [_with_ring(mask) for mask in annotated]
        for mask, array, few in zip(annotated, arrays, partial, strict=True):
            if few.any():
                mask[few] &= _with_ring(array[few] != 0)
        values = np.array([0, 1])
        separated = [
            _separated(path, a, m, recipe.dims)
            for path, a, m in zip(paths, arrays, annotated, strict=True)
        ]
        targets, cells = [(numbers != 0).astype(np.uint8) for numbers in separated], [*separated]
    else:
        values = _class_values(paths, arrays, annotated)
        targets = [np.searchsorted(values, a).astype(np.uint8) for a in arrays]
    for target, mask in zip(targets, annotated, strict=True):
        target[~mask] = IGNORED
    return values.tolist(), [_Truth(*pair) for pair in zip(targets, cells, strict=True)]


def _refuse_exchanged(image: str, label: str, voxels: NDArray[Any], labels: NDArray[Any]) -> None:
    """Refuses an image that is constant in large parts where its labels are not.

    Raises:
        InputError: naming both files.
    """
    if _constant_share(voxels[0]) > EXCHANGED[0] and _constant_share(labels) < EXCHANGED[1]:
        raise InputError(
            f"{label} looks like an image and {image} like its labels; exchange images and labels."
        )


def _constant_share(array: NDArray[Any]) -> float:
    """Returns the share of voxels of (z, y, x) that equal their neighbour along x."""
    return float((array[..., 1:] == array[..., :-1]).mean()) if array.shape[-1] > 1 else 1.0


def _refuse_cell_numbers(
    paths: Sequence[str], labels: Sequence[NDArray[Any]], ignore_label: int | None
) -> None:
    """Refuses labels of which nearly every value is one connected object on each slice.

    Raises:
        InputError: naming the file and the flag for cell numbers.
    """
    for path, array in zip(paths, labels, strict=True):
        values = [v for v in np.unique(array).tolist() if v not in (0, ignore_label)]
        if not FEWEST_CELLS <= len(values) <= MOST_CLASSES:
            continue
        parts = [ndimage.label(plane == v, np.ones((3, 3)))[1] for plane in array for v in values]
        present = [count for count in parts if count]
        if sum(count == 1 for count in present) >= SINGLE_OBJECTS * len(present):
            raise InputError(
                f"{path}: has {len(values)} values besides 0, and nearly each is one connected "
                "object on a slice, so they look like cell numbers; set --labels-are instances, or "
                "--labels-are classes if they are classes."
            )


def _with_ring(cells: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Adds the voxels of each slice near a cell; other voxels of such a frame are unknown."""
    disk = np.hypot(*np.ogrid[-RING : RING + 1, -RING : RING + 1]) <= RING
    grown = [ndimage.binary_dilation(plane, disk) for plane in cells]
    return np.stack(grown)


def _signed(path: str, labels: NDArray[Any]) -> NDArray[np.int64]:
    if labels.dtype == np.uint64 and labels.max() > np.iinfo(np.int64).max:
        raise InputError(f"{path}: contains the label {labels.max()}; labels must be below 2**63.")
    return labels.astype(np.int64)


def _read_finite(pair: _Pair) -> NDArray[Any]:
    image = pair.image
    whole = Box.of(image.shape[1:])
    if len(pair.planes) == image.shape[1]:
        voxels = image.read(whole)
    else:
        slices = (Box((z, 0, 0), (z + 1, *whole.stop[1:])) for z in pair.planes)
        voxels = np.concatenate([image.read(box) for box in slices], axis=1)
    if not np.isfinite(voxels).all():
        raise InputError(f"{image.path}: has voxels that are not finite; replace them first.")
    return voxels


def _weight_maps(
    truths: Sequence[_Truth],
    classes: int,
    recipe: Recipe,
    voxel_size: tuple[float, float, float] | None,
) -> list[NDArray[np.float32]]:
    """Computes the weight map of each volume, with class weights balanced over all volumes."""
    balance = class_weights(np.concatenate([t.targets.ravel() for t in truths]), classes)
    if np.count_nonzero(balance) < classes:
        raise InputError(
            f"The slices that are not held out contain only {np.count_nonzero(balance)} of "
            f"{classes} classes; hold out other slices, or none."
        )
    spacing = None  # slices are weighted one by one
    if recipe.dims == 3:
        z, y, x = voxel_size if voxel_size and recipe.anisotropy == "auto" else (1.0, 1.0, 1.0)
        spacing = (z / x, y / x, 1.0)
    return [
        weight_map(t.targets, classes, recipe.w0, recipe.sigma, balance, t.cells, spacing)
        for t in truths
    ]


def _weights_header(
    identity: dict[str, Any], recipe: Recipe, voxel_size: tuple[float, float, float] | None
) -> dict[str, Any]:
    """Returns everything that weight maps depend on, as it is read back from JSON."""
    names = "labels_are", "ignore_label", "val", "val_fraction", "w0", "sigma", "dims", "anisotropy"
    fields = {"labels": identity["labels"], **{name: getattr(recipe, name) for name in names}}
    if recipe.dims == 3:
        fields["voxel_size"] = voxel_size
    as_read: dict[str, Any] = json.loads(json.dumps(fields, allow_nan=False))
    return as_read


def _stored_weights(
    path: Path | None,
    identity: dict[str, Any],
    recipe: Recipe,
    truths: Sequence[_Truth],
    voxel_size: tuple[float, float, float] | None,
) -> list[NDArray[np.float32]]:
    """Reads stored weight maps; returns ``[]`` if they are missing, damaged or do not fit."""
    if path is None or not path.exists():
        return []
    tensors, header = _read_weights(path)
    names = [f"weights.{n}" for n in range(len(truths))]
    if header != _weights_header(identity, recipe, voxel_size) or sorted(tensors) != sorted(names):
        return []
    maps = [tensors[name].numpy() for name in names]
    fit = all(m.shape == t.targets.shape for m, t in zip(maps, truths, strict=True))
    return maps if fit else []


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads the file; returns no tensors if it is damaged, since weight maps can be recomputed."""
    try:
        return read_tensors(path)
    except InputError as error:
        warn(f"{error} The weight maps are recomputed.")
        return {}, {}


def _held_out(depths: Sequence[int], val: str | None, fraction: float) -> list[NDArray[np.bool_]]:
    """Returns a mask of the held-out slices for each volume; slices count over all volumes."""
    total = sum(depths)
    out = np.zeros(total, bool)
    if fraction:
        out[total - max(1, round(total * fraction)) :] = True
    for part in (val or "").split(",") if val else []:
        try:
            start, stop = (int(number) for number in part.split(":"))
        except ValueError:
            start = stop = -1
        if not 0 <= start < stop <= total:
            raise InputError(
                f"val={part!r} must be a range of slices, such as 20:24, within 0:{total}."
            )
        out[start:stop] = True
    if out.all():
        raise InputError(f"All {total} slices are held out; leave some for training.")
    return np.split(out, np.cumsum(depths)[:-1])


def _open_pair(image: Any, label: Any) -> _Pair:
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
    return _Pair(volume, truth, planes)


def _labelled_planes(image: Volume, truth: Volume) -> Sequence[int]:
    """Returns the slices of the image that have labels; of two folders, paired by number."""
    folders = image.slice_files() and truth.slice_files()
    if folders and image.shape[1] > truth.shape[1]:
        return slices_by_number(image, truth) or range(image.shape[1])
    return range(image.shape[1])


def _format_shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _class_values(
    paths: Sequence[str], labels: Sequence[NDArray[Any]], annotated: Sequence[NDArray[np.bool_]]
) -> NDArray[np.int64]:
    """Returns the distinct label values of the annotated voxels of all volumes, ascending."""
    distinct = [np.unique(a[m]).astype(np.int64) for a, m in zip(labels, annotated, strict=True)]
    values = np.unique(np.concatenate(distinct))
    if len(values) < 2:
        raise InputError(
            f"{paths[0]}: all labels are {', '.join(map(str, values)) or 'ignored'}, which is "
            "at most one class; training needs at least two."
        )
    if len(values) > MOST_CLASSES:
        raise InputError(
            f"{paths[0]}: has {len(values)} label values, but at most {MOST_CLASSES} classes are "
            "allowed; for labels that number the cells, set --labels-are instances."
        )
    return values


def _separated(
    path: str, labels: NDArray[Any], annotated: NDArray[np.bool_], dims: int
) -> NDArray[np.int64]:
    """Returns cell numbers with background between touching cells, and 0 without annotation."""
    cells = np.where(annotated, labels, 0)
    if (cells < 0).any():
        raise InputError(f"{path}: contains {cells.min()}; cell numbers must be at least 0.")
    separated = np.where(separate(cells, dims), cells, 0)
    if not separated.any():
        raise InputError(
            f"{path}: contains no cell"
            + (" after touching cells are separated" if cells.any() else "")
            + "; --labels-are instances needs at least one."
        )
    return separated
