"""Loads labelled volumes for training: slices to learn from, and held-out slices.

Handles images and labels as files or arrays. Independent of patches and of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Box
from unet_ray.training.data import HeldOut
from unet_ray.training.maps import Labelled, Part, boxes_of
from unet_ray.training.pairs import (
    Pair,
    all_read,
    open_pairs,
    refuse_cell_numbers,
    refuse_exchanged,
)
from unet_ray.training.recipes import Recipe
from unet_ray.training.truths import Source, rule_of
from unet_ray.training.windows import Windowed, take_planes
from unet_ray.volumes.intensity import Intensity, measure
from unet_ray.volumes.omissions import report_omissions

# Bytes per voxel while labels and weight maps of a whole volume are computed, in 2-D and 3-D.
WORKING_BYTES = {2: 32, 3: 100}


def load_labels(
    images: Sequence[Any],
    labels: Sequence[Any],
    recipe: Recipe,
    any_classes: bool = False,
    strict: bool = False,
    memory: int | None = None,
) -> Labelled:
    """Reads labelled volumes; writes nothing.

    Args:
        images: paths of the images, or arrays.
        labels: paths of the labels, or arrays, in the same order.
        recipe: sets the kind of labels, the held-out slices and the weight maps.
        any_classes: accept label values as classes even if they look like cell numbers.
        strict: refuse images and labels of which a part would be left out.
        memory: bytes above which volumes are read by windows; None for no limit. The samples are
            the same.

    Raises:
        InputError: if the numbers of files, the shapes or the channels differ, if values are
            invalid, or if there are fewer than two classes.
    """
    pairs = open_pairs(images, labels)
    voxel_size = recipe.voxel_size or pairs[0].image.voxel_size
    recipe.fitted(voxel_size)  # refuses a patch that does not fit before anything is read
    for volume in all_read(pairs):
        report_omissions(volume.path, volume.omissions, strict)
    windowed = memory is not None and _bytes(pairs, recipe) > memory
    pairs = [pair.pinned() if windowed else pair.loaded() for pair in pairs]
    for pair in pairs:
        refuse_exchanged(pair)
        if recipe.labels_are == "classes" and not any_classes:
            refuse_cell_numbers(pair, recipe.ignore_label)
    sources = _sources(pairs, recipe, windowed)
    intensities = [measure(pair.image) for pair in pairs]
    masks = _held_out([pair.labels.shape[1] for pair in pairs], recipe.val, recipe.val_fraction)
    identities = [pair.identity() for pair in pairs]
    identity = {"images": [a for a, _ in identities], "labels": [b for _, b in identities]}
    learned, held_out = [], []
    for pair, source, grey, out in zip(pairs, sources, intensities, masks, strict=True):
        if not out.all():
            learned.append(Part.of(pair.voxels, source, grey, out, recipe.dims, windowed))
        if out.any():
            held_out.append(_held_out_slices(pair.voxels, source, grey, out, recipe.dims))
    return Labelled(
        learned,
        sources[0].rule.values,
        voxel_size,
        identity,
        tuple(held_out),
        sum(pair.image.shape[1] - len(pair.planes) for pair in pairs),
        recipe.labels_are == "instances",
        _counts(learned),
        windowed,
    )


def _counts(parts: Sequence[Part]) -> NDArray[np.int64]:
    """Returns the number of voxels of each class to learn from.

    Raises:
        InputError: if there is none of a class.
    """
    counts: NDArray[np.int64] = np.sum([part.counts() for part in parts], 0)
    occurring = np.count_nonzero(counts)
    if occurring < len(counts):
        raise InputError(
            f"The slices that are not held out contain only {occurring} of {len(counts)} classes; "
            "hold out other slices, or none."
        )
    return counts


def _bytes(pairs: Sequence[Pair], recipe: Recipe) -> int:
    """Returns an estimate of the memory that loading the pairs takes."""
    working = WORKING_BYTES[recipe.dims]
    return sum(
        pair.voxel_count * (2 * pair.image.shape[0] * pair.image.dtype.itemsize + working)
        for pair in pairs
    )


def _sources(pairs: Sequence[Pair], recipe: Recipe, windowed: bool) -> list[Source]:
    """Returns the labels of each pair as classes and cells.

    Raises:
        InputError: if values do not fit, or if labels that number cells contain none.
    """
    instances = recipe.labels_are == "instances"
    boxes = partial(boxes_of, dims=recipe.dims, windowed=windowed)
    labels = [(pair.label.path, pair.labels) for pair in pairs]
    rule = rule_of(labels, boxes, instances, recipe.ignore_label, recipe.dims)
    sources = []
    for pair in pairs:
        depth = pair.labels.shape[1]
        few = instances and recipe.ignore_label is None
        partly = pair.partial() if few else np.zeros(depth, bool)
        sources.append(source := Source(pair.label.path, pair.labels, partly, rule))
        if instances:
            source.refuse_no_cell(boxes(source.shape))
    return sources


def _held_out_slices(
    image: Windowed, source: Source, intensity: Intensity, out: NDArray[np.bool_], dims: int
) -> HeldOut:
    planes = np.flatnonzero(out)
    truth = source.of(planes, Box.of((len(planes), *source.shape[1:])))
    if dims == 2:
        return HeldOut(take_planes(image, planes), truth.targets, truth.cells, intensity)
    return HeldOut(image, truth.targets, truth.cells, intensity, tuple(planes.tolist()))


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
