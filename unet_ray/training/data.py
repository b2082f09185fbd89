"""Labelled volumes of a training: images, classes, weight maps and held-out slices.

Holds arrays, in memory or read by windows. Independent of how they are loaded or drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.training.windows import Windowed, take_planes
from unet_ray.volumes.intensity import Intensity

SQUARE = 32  # voxels along y and x of the squares for which a volume knows whether they have labels


@dataclass(frozen=True, eq=False)
class TrainingVolume:
    """One labelled volume, in memory or read by windows.

    Attributes:
        image: grey values as stored in the file, ``(c, z, y, x)``.
        targets: class numbers, uint8 ``(z, y, x)``.
        weights: the paper's weight map, float32 ``(z, y, x)``.
        intensity: mean and standard deviation of the image, for its normalisation.
        squares: which squares of `SQUARE` voxels have labels; None to see from the weights.
    """

    image: Windowed
    targets: Windowed
    weights: Windowed
    intensity: Intensity
    squares: NDArray[np.bool_] | None = None

    @cached_property
    def labelled(self) -> NDArray[np.bool_]:
        """Which squares of a slice, `SQUARE` voxels wide, have a weight: ``(z, rows, columns)``."""
        return labelled_squares(self.weights[:]) if self.squares is None else self.squares


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

    image: Windowed
    targets: NDArray[np.uint8]
    cells: NDArray[np.int64] | None
    intensity: Intensity
    planes: tuple[int, ...] | None = None

    @property
    def slices(self) -> Windowed:
        """Grey values of the slices of `targets`, ``(c, z, y, x)``."""
        return self.image if self.planes is None else take_planes(self.image, self.planes)


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
        counts: voxels of each class to learn from.
    """

    volumes: tuple[TrainingVolume, ...]
    class_values: tuple[int, ...]
    voxel_size: tuple[float, float, float] | None
    identity: dict[str, Any]
    held_out: tuple[HeldOut, ...] = ()
    unlabelled: int = 0
    instances: bool = False
    counts: tuple[int, ...] = ()

    @property
    def channels(self) -> int:
        """Number of channels of every image."""
        return self.volumes[0].image.shape[0]


def labelled_squares(weights: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns which squares of `SQUARE` voxels have a weight above 0, of weights (z, y, x)."""
    annotated: NDArray[np.bool_] = weights > 0
    for axis in (1, 2):
        starts = range(0, weights.shape[axis], SQUARE)
        annotated = np.logical_or.reduceat(annotated, [*starts], axis=axis)
    return annotated
