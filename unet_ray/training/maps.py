"""Weight maps of whole volumes: computed at once or box by box, and kept with the run.

Handles the labels of each volume and the settings of the border term. Independent of images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray

from unet_ray.errors import InputError
from unet_ray.network.checkpoints import read_tensors, write_tensors
from unet_ray.storage.places import Guard
from unet_ray.tiling.boxes import Box
from unet_ray.training.data import SQUARE, HeldOut, TrainingData, TrainingVolume, labelled_squares
from unet_ray.training.recipes import Recipe
from unet_ray.training.run_folder import CHECKPOINTS, PART
from unet_ray.training.truths import IGNORED, Components, Source, Truth
from unet_ray.training.weights import NEGLIGIBLE, border_reach, shares_of, weight_map
from unet_ray.training.windows import Arrays, Stored, Windowed, drop, header_of, keep, take_planes
from unet_ray.units import warn
from unet_ray.volumes.intensity import Intensity

BLOCK = (32, 128, 128)  # voxels of a volume whose weight map is computed at a time


def boxes_of(shape: Sequence[int], dims: int, windowed: bool) -> list[Box]:
    """Returns the boxes (z, y, x) in which labels and weights of a volume are computed."""
    whole = Box.of(shape)
    if not windowed:
        return [whole]
    return [*whole.split((1, *shape[1:]) if dims == 2 else BLOCK)]


@dataclass(frozen=True, eq=False)
class Part:
    """The slices and labels of one volume to learn from.

    Attributes:
        image: grey values, (c, z, y, x).
        source: the labels of the volume.
        planes: numbers of the slices to learn from; in 3-D of all slices.
        hidden: which of these slices are held out.
        intensity: mean and standard deviation of the image.
        boxes: windows (z, y, x) to compute at a time; their z counts `planes`.
    """

    image: Windowed
    source: Source
    planes: NDArray[np.intp]
    hidden: NDArray[np.bool_]
    intensity: Intensity
    boxes: Sequence[Box]

    @classmethod
    def of(
        cls,
        image: Windowed,
        source: Source,
        intensity: Intensity,
        out: NDArray[np.bool_],
        dims: int,
        windowed: bool,
    ) -> Part:
        """Leaves the held-out slices out; in 3-D only their labels.

        So a patch beside held-out slices sees their grey values, but not their labels.
        """
        planes = np.flatnonzero(~out) if dims == 2 else np.arange(len(out))
        if len(planes) < len(out):
            image = take_planes(image, planes)
        boxes = boxes_of((len(planes), *source.shape[1:]), dims, windowed)
        return cls(image, source, planes, out[planes], intensity, boxes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents (z, y, x)."""
        return len(self.planes), *self.source.shape[1:]

    def truth(self, box: Box) -> Truth:
        """Returns the labels of a window."""
        truth, hidden = self.source.of(self.planes, box), self.hidden[box.slices[0]]
        return truth.without(hidden) if hidden.any() else truth

    def counts(self) -> NDArray[np.int64]:
        """Returns the number of annotated voxels of each class."""
        total = np.zeros(256, np.int64)
        for box in self.boxes:
            total += np.bincount(self.truth(box).targets.ravel(), minlength=256)
        return total[: len(self.source.rule.values)]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Labelled volumes without their weight maps.

    Attributes:
        parts: slices and labels to learn from, of each volume, in the order of the arguments.
        class_values, voxel_size, identity, held_out, unlabelled, instances: see `TrainingData`.
        counts: voxels of each class to learn from.
        windowed: whether the volumes are read by windows.
    """

    parts: Sequence[Part]
    class_values: tuple[int, ...]
    voxel_size: tuple[float, float, float] | None
    identity: dict[str, Any]
    held_out: tuple[HeldOut, ...]
    unlabelled: int
    instances: bool
    counts: NDArray[np.int64]
    windowed: bool

    @property
    def longest(self) -> int:
        """Largest extent along y and x of the slices to learn from, in voxels."""
        return max(max(part.shape[-2:]) for part in self.parts)


def weighted(
    labelled: Labelled, recipe: Recipe, path: Path | None = None, guard: Guard = nullcontext
) -> TrainingData:
    """Adds the weight maps, and keeps them with the run, so that it need not compute them again.

    Args:
        labelled: the volumes.
        recipe: the settings that the weight maps depend on.
        path: the file of a RUN folder, with tensors ``weights.N``. Weight maps of volumes that are
            read by windows become arrays in a folder beside it. None to keep nothing; the volumes
            must be in memory.
        guard: entered around each change; raises if the run has lost its lease.

    Raises:
        RunError: if the weight maps cannot be written.
    """
    balance, spacing = shares_of(labelled.counts), _spacing(recipe, labelled.voxel_size)
    weighting = _Weighting(len(balance), recipe, balance, spacing)
    header = _header(labelled.identity["labels"], recipe, labelled.voxel_size)
    if labelled.windowed and path is not None:
        volumes = _on_disk(labelled.parts, weighting, header, path, guard)
    else:
        known = _stored_weights(path, header, [part.shape for part in labelled.parts])
        volumes = weighting.all(labelled.parts, Arrays(), known)
        if path is not None:
            drop(_folder(path), _scratch(path), guard)
        if path is not None and not known:
            maps = {
                f"weights.{n}": torch.from_numpy(np.asarray(volume.weights))
                for n, volume in enumerate(volumes)
            }
            write_tensors(path, maps, header, guard)
    return TrainingData(
        volumes,
        labelled.class_values,
        labelled.voxel_size,
        labelled.identity,
        labelled.held_out,
        labelled.unlabelled,
        labelled.instances,
        tuple(labelled.counts.tolist()),
    )


def _on_disk(
    parts: Sequence[Part],
    weighting: _Weighting,
    header: dict[str, Any],
    path: Path,
    guard: Guard,
) -> tuple[TrainingVolume, ...]:
    """Returns the parts with weight maps in a folder, which are computed unless it has them."""
    folder = _folder(path)
    if header_of(folder) != header:
        part = _scratch(path)
        weighting.all(parts, Arrays(part, 1 if weighting.spacing is None else BLOCK[0]))
        keep(part, folder, header, guard)
        with guard():
            path.unlink(missing_ok=True)  # of a start with more memory
    return tuple(_opened(part, number, folder) for number, part in enumerate(parts))


def _scratch(path: Path) -> Path:
    """Returns a new name in the folder of checkpoints, which the owner of a run cleans."""
    return path.parent / CHECKPOINTS / f"weights-{uuid4().hex}{PART}"


def _folder(weights_file: Path) -> Path:
    return weights_file.with_suffix(".zarr")


def _spacing(
    recipe: Recipe, voxel_size: tuple[float, float, float] | None
) -> tuple[float, float, float] | None:
    """Returns the size of a voxel in units of x; None if slices are weighted one by one."""
    if recipe.dims == 2:
        return None
    z, y, x = voxel_size if voxel_size and recipe.anisotropy == "auto" else (1.0, 1.0, 1.0)
    return z / x, y / x, 1.0


@dataclass(frozen=True, eq=False)
class _Weighting:
    """Computes weight maps, all at once or box by box; the values are the same.

    Attributes:
        classes: number of classes.
        recipe: sets the border term.
        balance: weight of each class.
        spacing: size of a voxel in units of x; None for slice by slice.
    """

    classes: int
    recipe: Recipe
    balance: NDArray[np.float32]
    spacing: tuple[float, float, float] | None

    def all(
        self, parts: Sequence[Part], arrays: Arrays, known: Sequence[Windowed] = ()
    ) -> tuple[TrainingVolume, ...]:
        """Computes targets and weights of each part.

        Args:
            parts: slices and labels to learn from, of each volume.
            arrays: where the targets and weights are kept.
            known: the weights, if they are stored.
        """
        return tuple(
            self._volume(part, number, arrays, known[number] if known else None)
            for number, part in enumerate(parts)
        )

    def _volume(
        self, part: Part, number: int, arrays: Arrays, known: Windowed | None
    ) -> TrainingVolume:
        targets = arrays.new(f"targets.{number}", part.shape, np.uint8)
        weights = (
            arrays.new(f"weights.{number}", part.shape, np.float32) if known is None else known
        )
        squares = _Squares(part.shape)
        components = self._components(part, number, arrays)
        for box in part.boxes:
            grown = self._grown(box, part.shape)
            crop = box.relative_to(grown.start).slices
            truth = part.truth(grown)
            learned = truth.targets[crop]
            targets[box.slices] = np.where(learned == IGNORED, 0, learned)
            if known is None:
                cells = components.of(grown) if components else truth.cells
                computed = weight_map(
                    truth.targets,
                    self.classes,
                    self.recipe.w0,
                    self.recipe.sigma,
                    self.balance,
                    cells,
                    self.spacing,
                )
                weights[box.slices] = computed[crop]
            squares.see(box, weights[box.slices])
        arrays.remove(f"components.{number}")
        return TrainingVolume(part.image, targets, weights, part.intensity, squares.labelled)

    def _grown(self, box: Box, shape: Sequence[int]) -> Box:
        """Returns a box with the voxels around it that its border term depends on."""
        whole = Box.of(shape)
        if self.spacing is None or box == whole:
            return box
        reach = border_reach(self.recipe.w0, self.recipe.sigma)
        halo = [int(reach / size) + 1 for size in self.spacing] if reach else (0, 0, 0)
        return box.grow(halo, halo).intersect(whole)

    def _components(self, part: Part, number: int, arrays: Arrays) -> Components | None:
        """Numbers the components of classes, if they extend over several boxes of a volume."""
        several = self.spacing is not None and len(part.boxes) > 1
        if part.source.rule.instances or not several or self.recipe.w0 <= NEGLIGIBLE:
            return None
        numbers = arrays.new(f"components.{number}", part.shape, np.int64)
        targets = lambda box: part.truth(box).targets  # noqa: E731
        return Components(targets, part.boxes, numbers, self.classes)


def _opened(part: Part, number: int, folder: Path) -> TrainingVolume:
    """Returns a part with the arrays of an earlier start of the run."""
    targets, weights = (Stored(folder / f"{name}.{number}") for name in ("targets", "weights"))
    squares = _Squares(part.shape)
    for box in part.boxes:
        squares.see(box, weights[box.slices])
    return TrainingVolume(part.image, targets, weights, part.intensity, squares.labelled)


class _Squares:
    """Collects which squares of a volume of `shape` (z, y, x) have labels."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.labelled = np.zeros((shape[0], *(-(-n // SQUARE) for n in shape[1:])), bool)

    def see(self, box: Box, weights: NDArray[np.float32]) -> None:
        """Adds the weights of a box that starts at multiples of `SQUARE` along y and x."""
        z, *plane = box.slices
        place = z, *(slice(s.start // SQUARE, -(-s.stop // SQUARE)) for s in plane)
        self.labelled[place] = labelled_squares(weights)


def _header(
    labels: Sequence[dict[str, Any]], recipe: Recipe, voxel_size: tuple[float, float, float] | None
) -> dict[str, Any]:
    """Returns everything that weight maps depend on, as it is read back from JSON."""
    names = "labels_are", "ignore_label", "val", "val_fraction", "w0", "sigma", "dims", "anisotropy"
    fields = {"labels": list(labels), **{name: getattr(recipe, name) for name in names}}
    if recipe.dims == 3:
        fields["voxel_size"] = voxel_size
    as_read: dict[str, Any] = json.loads(json.dumps(fields, allow_nan=False))
    return as_read


def _stored_weights(
    path: Path | None, header: dict[str, Any], shapes: Sequence[tuple[int, ...]]
) -> list[NDArray[np.float32]]:
    """Reads stored weight maps; returns ``[]`` if they are missing, damaged or do not fit."""
    if path is None or not path.exists():
        return []
    tensors, stored_header = _read_weights(path)
    names = [f"weights.{n}" for n in range(len(shapes))]
    if stored_header != header or sorted(tensors) != sorted(names):
        return []
    maps = [tensors[name].numpy() for name in names]
    fit = all(each.shape == shape for each, shape in zip(maps, shapes, strict=True))
    return maps if fit else []


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads the file; returns no tensors if it is damaged, since weight maps can be recomputed."""
    try:
        return read_tensors(path)
    except InputError as error:
        warn(f"{error} The weight maps are recomputed.")
        return {}, {}
