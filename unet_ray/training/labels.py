"""Labelled volumes as training needs them: classes, cells, weights, and what is held out.

Knows files of images and labels and the weight maps that are kept of them; does not know what a
patch is, nor a network.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unet_ray.errors import InputError
from unet_ray.network.checkpoints import read_tensors, write_tensors
from unet_ray.storage.places import Guard
from unet_ray.tiling.boxes import Box
from unet_ray.training.recipes import Recipe
from unet_ray.training.weights import class_weights, separate, weight_map
from unet_ray.volumes.intensity import Intensity, measure
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume

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
class _Truth:
    """The labels of one volume.

    Attributes:
        targets: class numbers, uint8 ``(z, y, x)``; `IGNORED` where nothing is known.
        cells: numbers of cells, ``(z, y, x)``, if the labels are instances.
    """

    targets: NDArray[np.uint8]
    cells: NDArray[np.int64] | None

    def of(self, slices: NDArray[np.bool_]) -> _Truth:
        """The truth of some slices."""
        return _Truth(self.targets[slices], None if self.cells is None else self.cells[slices])

    @property
    def learned(self) -> NDArray[np.uint8]:
        """The targets with a class everywhere; where nothing is known the weight is 0."""
        return np.where(self.targets == IGNORED, 0, self.targets).astype(np.uint8)


def load_training_data(
    images: Sequence[str], labels: Sequence[str], recipe: Recipe, kept: Path | None = None
) -> TrainingData:
    """Reads labelled volumes, and computes their weight maps or takes those that were kept.

    Args:
        images: paths of the images.
        labels: path of the labels of each, in the same order.
        recipe: what the labels are, which slices are held out, and the weights.
        kept: file that `keep_weights` may have written for the same labels and recipe.

    Raises:
        InputError: if files do not pair up, shapes or channels differ, or there is one class only.
    """
    pairs = _open_pairs(images, labels)
    labelled = [label.read(Box.of(label.shape[1:]))[0] for _, label in pairs]
    values, truths = _truths([label.path for _, label in pairs], labelled, recipe)
    pictures = [_read_finite(image) for image, _ in pairs]
    greys = [measure(image) for image, _ in pairs]
    held = _held_out([len(t.targets) for t in truths], recipe.val, recipe.val_fraction)
    identity = {
        "images": [_identity(pair[0], a) for pair, a in zip(pairs, pictures, strict=True)],
        "labels": [_identity(pair[1], a) for pair, a in zip(pairs, labelled, strict=True)],
    }
    every = list(zip(pictures, truths, greys, held, strict=True))
    learned = [(p[:, ~out], t.of(~out), grey) for p, t, grey, out in every if not out.all()]
    back = [(p[:, out], t.of(out), grey) for p, t, grey, out in every if out.any()]
    every_truth = [truth for _, truth, _ in learned]
    weights = _kept_weights(kept, identity, recipe, every_truth) or _weight_maps(
        every_truth, len(values), recipe
    )
    return TrainingData(
        tuple(
            TrainingVolume(picture, truth.learned, weight, grey)
            for (picture, truth, grey), weight in zip(learned, weights, strict=True)
        ),
        tuple(values),
        pairs[0][0].voxel_size,
        identity,
        tuple(HeldOut(picture, truth.targets, truth.cells, grey) for picture, truth, grey in back),
    )


def keep_weights(data: TrainingData, recipe: Recipe, path: Path, guard: Guard) -> None:
    """Writes the weight maps to a file, ``weights.N`` of each volume, unless they are there."""
    header = _weights_header(data.identity, recipe)
    if not (path.exists() and _read_kept(path)[1] == header):
        maps = {f"weights.{n}": torch.from_numpy(v.weights) for n, v in enumerate(data.volumes)}
        write_tensors(path, maps, header, guard)


def _open_pairs(images: Sequence[str], labels: Sequence[str]) -> list[tuple[Volume, Volume]]:
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
    return pairs


def _identity(volume: Volume, voxels: NDArray[Any]) -> dict[str, Any]:
    """What a run is bound to: every voxel, and no time of a file."""
    told = volume.identity()
    names = "name", "kind", "shape", "dtype", "bytes"
    digest = hashlib.sha256(np.ascontiguousarray(voxels).data).hexdigest()
    return {**{name: told[name] for name in names}, "sha256": digest}


def _truths(
    paths: Sequence[str], labels: Sequence[NDArray[Any]], recipe: Recipe
) -> tuple[list[int], list[_Truth]]:
    """The label value of each class, and the truth of each volume."""
    arrays, ignored = [_signed(*each) for each in zip(paths, labels, strict=True)], None
    if recipe.ignore_label is not None:
        ignored = recipe.ignore_label
        if not any((a == ignored).any() for a in arrays):
            raise InputError(f"{paths[0]}: no voxel has the label {ignored} of --ignore-label.")
    known = [np.ones(a.shape, bool) if ignored is None else a != ignored for a in arrays]
    cells: list[NDArray[np.int64] | None] = [None] * len(arrays)
    if recipe.labels_are == "instances":
        values = np.array([0, 1])
        apart = [_apart(path, a, k) for path, a, k in zip(paths, arrays, known, strict=True)]
        targets, cells = [(each != 0).astype(np.uint8) for each in apart], [*apart]
    else:
        values = _class_values(paths, arrays, known)
        targets = [np.searchsorted(values, a).astype(np.uint8) for a in arrays]
    for target, there in zip(targets, known, strict=True):
        target[~there] = IGNORED
    return values.tolist(), [_Truth(*each) for each in zip(targets, cells, strict=True)]


def _signed(path: str, labels: NDArray[Any]) -> NDArray[np.int64]:
    if labels.dtype == np.uint64 and labels.max() > np.iinfo(np.int64).max:
        raise InputError(f"{path}: holds the label {labels.max()}; labels must be below 2**63.")
    return labels.astype(np.int64)


def _read_finite(image: Volume) -> NDArray[Any]:
    picture = image.read(Box.of(image.shape[1:]))
    if not np.isfinite(picture).all():
        raise InputError(f"{image.path}: has voxels that are not finite; replace them first.")
    return picture


def _weight_maps(
    truths: Sequence[_Truth], classes: int, recipe: Recipe
) -> list[NDArray[np.float32]]:
    """The weight map of each volume; classes are balanced over all volumes together."""
    balance = class_weights(np.concatenate([t.targets.ravel() for t in truths]), classes)
    if np.count_nonzero(balance) < classes:
        raise InputError(
            f"The slices that are not held out show {np.count_nonzero(balance)} of {classes} "
            "classes only: hold out others, or none."
        )
    return [
        weight_map(t.targets, classes, recipe.w0, recipe.sigma, balance, t.cells) for t in truths
    ]


def _weights_header(identity: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """All that weight maps depend on."""
    names = "labels_are", "ignore_label", "val", "val_fraction", "w0", "sigma"
    told = {"labels": identity["labels"], **{name: getattr(recipe, name) for name in names}}
    as_read: dict[str, Any] = json.loads(json.dumps(told))
    return as_read


def _kept_weights(
    path: Path | None, identity: dict[str, Any], recipe: Recipe, truths: Sequence[_Truth]
) -> list[NDArray[np.float32]]:
    """The weight maps of a file; none if it is not there, damaged, or of something else."""
    if path is None or not path.exists():
        return []
    tensors, header = _read_kept(path)
    names = [f"weights.{n}" for n in range(len(truths))]
    if header != _weights_header(identity, recipe) or sorted(tensors) != sorted(names):
        return []
    maps = [tensors[name].numpy() for name in names]
    fit = all(m.shape == t.targets.shape for m, t in zip(maps, truths, strict=True))
    return maps if fit else []


def _read_kept(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What the file holds; nothing if it is damaged, for weights can be computed again."""
    try:
        return read_tensors(path)
    except InputError as error:
        print(f"unet-ray: {error} The weights are computed again.", file=sys.stderr)
        return {}, {}


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
    cells = np.where(known, labels, 0)
    if (cells < 0).any():
        raise InputError(f"{path}: holds {cells.min()}; numbers of cells are 0 or more.")
    apart = np.where(separate(cells), cells, 0)
    if not apart.any():
        raise InputError(
            f"{path}: holds no cell"
            + (" that is left once those that touch are pulled apart" if cells.any() else "")
            + "; --labels-are instances needs some."
        )
    return apart
