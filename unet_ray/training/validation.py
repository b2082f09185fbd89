"""Validation: segments the held-out slices during training and scores the result.

Knows the held-out slices and the scores that fit their labels. Does not know when validation runs
or how its scores are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError
from unet_ray.network.prediction import Device, Precision, Predictor
from unet_ray.network.unet import UNet
from unet_ray.scores.overlaps import Overlaps
from unet_ray.scores.totals import MEANINGS, class_scores, instance_scores, isbi_scores
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.tiling.tiles import TilePlan, equal_core
from unet_ray.training.calibration import best_threshold, numbered, stacked
from unet_ray.training.data import HeldOut, TrainingData
from unet_ray.training.truths import IGNORED
from unet_ray.training.windows import Windowed, take_planes

LARGEST_CORE = 512
LARGEST_VOLUME = (32, 128, 128)  # of a core in 3-D
CALIBRATION_SLICES = 8
MEMBRANES = ("pixel_error", "warping_error", "v_rand", "v_info")
CELLS = ("seg", "ap50")


@dataclass(frozen=True)
class Validated:
    """The result of one validation.

    Attributes:
        scores: by name, without undefined ones.
        predictions: of each volume, 255 p of the classes above 0, (classes - 1, z, y, x).
        threshold: of the class map; None for more than two classes. See `best_threshold`.
    """

    scores: dict[str, float]
    predictions: list[NDArray[np.uint8]]
    threshold: float | None


class Validator:
    """Scores a network on held-out slices.

    Args:
        held_out: the slices.
        classes: number of classes.
        best_by: name of the score that selects the best model; by default `v_info` for two fully
            annotated classes, `seg` for instances and `iou` otherwise.
        precision: number format of the network's arithmetic.
        device: device of the network.

    Raises:
        InputError: if `best_by` does not fit the labels, or if no score is defined for them.
    """

    def __init__(
        self,
        held_out: Sequence[HeldOut],
        classes: int,
        best_by: str | None,
        precision: Precision,
        device: Device,
    ) -> None:
        self._held_out, self._classes = held_out, classes
        self._precision, self._device = precision, device
        self.names = score_names(held_out, classes)
        self.best_by = checked_score(held_out, classes, best_by)

    def __call__(self, network: UNet) -> Validated:
        """Scores `network`, with the class map of the best threshold."""
        predictions = [
            predicted(network, each, self._precision, self._device) for each in self._held_out
        ]
        threshold = best_threshold(predictions, self._held_out)
        return Validated(
            self._defined(self._scores(predictions, threshold)), predictions, threshold
        )

    def _defined(self, scores: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in scores.items() if not math.isnan(value)}

    def better(self, scores: Mapping[str, float], than: Mapping[str, float] | None) -> bool:
        """Returns whether `scores` are better than `than`, compared by `best_by`."""
        if self.best_by not in scores:
            return False
        if than is None or self.best_by not in than:
            return True
        sign = 1 if MEANINGS[self.best_by][0] == 1 else -1
        return sign * scores[self.best_by] > sign * than[self.best_by]

    def _scores(
        self, stored: Sequence[NDArray[np.uint8]], threshold: float | None
    ) -> dict[str, float]:
        """Scores the stored probabilities of all volumes together."""
        classes = [_classes(probabilities, threshold) for probabilities in stored]
        tables = [
            _annotated(Overlaps.of(held_out.targets, predicted))
            for held_out, predicted in zip(self._held_out, classes, strict=True)
        ]
        pooled = class_scores(tables)
        scores = {name: pooled[name].value for name in ("iou", "dice")}
        if "v_rand" in self.names:
            scores |= self._isbi([probabilities[0] / 255 for probabilities in stored])
        if "seg" in self.names:
            masks = [held_out.targets != IGNORED for held_out in self._held_out]
            predicted_cells = stacked(
                [numbered((array != 0) & mask) for array, mask in zip(classes, masks, strict=True)]
            )
            cells = stacked([each.cells for each in self._held_out if each.cells is not None])
            objects = instance_scores(predicted_cells, cells, True, CELLS)
            scores |= {name: score.value for name, score in objects.items()}
        return scores

    def _isbi(self, probabilities: Sequence[NDArray[np.floating[Any]]]) -> dict[str, float]:
        """Scores membranes: slices of equal size together, then a mean weighted by voxels."""
        truths = [held_out.targets for held_out in self._held_out]
        sizes = sorted({truth.shape[1:] for truth in truths})
        voxels, scores = [], []
        for size in sizes:
            group = [n for n, truth in enumerate(truths) if truth.shape[1:] == size]
            truth = np.concatenate([truths[n] for n in group])
            predicted = np.concatenate([probabilities[n] for n in group])
            group_scores = isbi_scores(predicted, truth, MEMBRANES)
            voxels.append(truth.size)
            scores.append([group_scores[name].value for name in MEMBRANES])
        return dict(zip(MEMBRANES, np.average(scores, 0, voxels).tolist(), strict=True))


def predicted(
    network: UNet, held_out: HeldOut, precision: Precision, device: Device
) -> NDArray[np.uint8]:
    """Predicts held-out slices.

    Args:
        network: in inference mode.
        held_out: the slices.
        precision: number format of the network's arithmetic.
        device: device of the network.

    Returns:
        255 p of the classes above 0, (classes - 1, z, y, x).
    """
    shape = held_out.image.shape[1:]
    largest = (1, LARGEST_CORE, LARGEST_CORE) if network.axes == 2 else LARGEST_VOLUME
    extents = zip(shape, largest, network.context.step, strict=True)
    core = tuple(equal_core(n, most, step) for n, most, step in extents)
    plan = TilePlan(shape, core, network.context, core)
    predictor = Predictor(network, plan, held_out.intensity, precision, device)
    # Of a volume in which a few slices are held out, only these are kept.
    kept = np.arange(shape[0]) if held_out.planes is None else np.asarray(held_out.planes)
    stored = np.zeros((network.classes - 1, len(kept), *shape[1:]), np.uint8)
    for tile in map(plan.__getitem__, range(len(plan))):
        z, y, x = tile.write.slices
        here = np.flatnonzero((kept >= z.start) & (kept < z.stop))
        if not len(here):
            continue
        voxels = read_mirrored(partial(_crop, held_out.image), shape, tile.read)
        shares = predictor(tile, voxels, ("probabilities",))["probabilities"]
        written = shares[(slice(None), *tile.crop.slices)][:, kept[here] - z.start]
        stored[:, here, y, x] = written
    return stored


def calibrated(
    network: UNet, data: TrainingData, precision: Precision, device: Device
) -> float | None:
    """Returns the threshold of the class map, chosen on slices that the network has learned.

    Args:
        network: in inference mode.
        data: the labelled volumes; at most `CALIBRATION_SLICES` of their slices are predicted.
        precision: number format of the network's arithmetic.
        device: device of the network.

    Returns:
        See `best_threshold`.
    """
    if network.classes > 2:
        return None
    slices = _some_slices(data, network.axes)
    predictions = [predicted(network, each, precision, device) for each in slices]
    return best_threshold(predictions, slices)


def _some_slices(data: TrainingData, dims: int) -> list[HeldOut]:
    """Returns evenly spaced slices of all volumes; voxels without weight are not annotated."""
    labelled = [np.flatnonzero(volume.labelled.any((1, 2))) for volume in data.volumes]
    total = sum(map(len, labelled))
    count = min(total, CALIBRATION_SLICES)
    places, first, chosen = (np.arange(count) * total + total // 2) // max(1, count), 0, []
    for volume, slices in zip(data.volumes, labelled, strict=True):
        z = slices[places[(first <= places) & (places < first + len(slices))] - first]
        first += len(slices)
        if len(z):
            targets, weights = (
                np.stack([array[n] for n in z.tolist()])
                for array in (volume.targets, volume.weights)
            )
            targets = np.where(weights > 0, targets, IGNORED).astype(np.uint8)
            cells = numbered(targets == 1) if data.instances else None
            if dims == 3:
                planes = tuple(z.tolist())
                chosen.append(HeldOut(volume.image, targets, cells, volume.intensity, planes))
            else:
                image = take_planes(volume.image, z)
                chosen.append(HeldOut(image, targets, cells, volume.intensity))
    return chosen


def _foreground(held_out: HeldOut) -> NDArray[np.bool_]:
    """Returns the annotated voxels of all classes but the first."""
    mask: NDArray[np.bool_] = (held_out.targets != 0) & (held_out.targets != IGNORED)
    return mask


def _crop(image: Windowed, box: Box) -> NDArray[Any]:
    voxels: NDArray[Any] = image[(slice(None), *box.slices)]
    return voxels


def score_names(held_out: Sequence[HeldOut], classes: int) -> list[str]:
    """Returns the names of the scores that fit the labels; the last one is the default.

    Args:
        held_out: the held-out slices; at least one volume.
        classes: number of classes.
    """
    names = ["dice", "iou"]
    if held_out[0].cells is not None:
        return [*names, "ap50", "seg"]
    annotated = all((each.targets != IGNORED).all() for each in held_out)
    if classes == 2 and annotated:
        return [*names, "pixel_error", "warping_error", "v_rand", "v_info"]
    return names


def checked_score(held_out: Sequence[HeldOut], classes: int, best_by: str | None) -> str:
    """Returns the name of the score that selects the best model.

    Args:
        held_out: the held-out slices; at least one volume.
        classes: number of classes.
        best_by: the requested score; None for the default of the labels.

    Raises:
        InputError: if `best_by` does not fit the labels, or if no score is defined for them.
    """
    names = score_names(held_out, classes)
    if all((each.targets == IGNORED).all() for each in held_out):
        raise InputError("The held-out slices have no annotated voxel; hold out other slices.")
    if not any(_foreground(each).any() for each in held_out):
        raise InputError("The held-out slices contain only the first class; hold out others.")
    if best_by is not None and best_by not in names:
        raise InputError(
            f"best_by={best_by!r} does not fit these labels; choose from {', '.join(names)}."
        )
    return best_by or names[-1]


def _classes(stored: NDArray[np.uint8], threshold: float | None) -> NDArray[np.uint8]:
    """Returns the class map of stored probabilities, (z, y, x)."""
    if threshold is not None:
        above: NDArray[np.uint8] = (stored[0] > 255 * threshold).astype(np.uint8)
        return above
    first = 255 - stored.sum(0, dtype=np.int64, keepdims=True)
    classes: NDArray[np.int64] = np.concatenate([first, stored]).argmax(0)
    return classes.astype(np.uint8)


def _annotated(table: Overlaps) -> Overlaps:
    return table.where(table.truth != IGNORED)
