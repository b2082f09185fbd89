"""Held-out slices, segmented and scored while a network is trained.

Knows which slices are held out and which scores fit their labels; does not know how a network
learns, nor what is done with a score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.errors import InputError
from unet_ray.network.prediction import Device, Precision, Predictor
from unet_ray.network.unet import UNet
from unet_ray.scores.overlaps import Overlaps
from unet_ray.scores.totals import MEANINGS, class_scores, instance_scores, isbi_scores
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.tiling.tiles import TilePlan, equal_core
from unet_ray.training.labels import IGNORED, HeldOut

LARGEST_CORE = 512
MEMBRANES = ("pixel_error", "warping_error", "v_rand", "v_info")
CELLS = ("seg", "ap50")


class Validator:
    """Scores a network on held-out slices.

    Args:
        held_out: the slices.
        classes: how many classes there are.
        best_by: name of the score that decides which model is best; by default `v_rand` for
            membranes, `seg` for cells and `iou` for anything else.
        precision, device: of the network.

    Raises:
        InputError: if there is no score of that name for these labels.
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

    def __call__(self, network: UNet) -> dict[str, float]:
        """The scores of `network`, by name; one that is not defined is left out."""
        shares = [self._predict(network, each) for each in self._held_out]
        scores = self._scores(shares)
        return {name: value for name, value in scores.items() if not math.isnan(value)}

    def better(self, scores: Mapping[str, float], than: Mapping[str, float] | None) -> bool:
        """Whether a validation is better than the best so far, by the score that decides."""
        if self.best_by not in scores:
            return False
        if than is None or self.best_by not in than:
            return True
        sign = 1 if MEANINGS[self.best_by][0] == 1 else -1
        return sign * scores[self.best_by] > sign * than[self.best_by]

    def _predict(self, network: UNet, held: HeldOut) -> NDArray[np.uint8]:
        """Probabilities of classes 1.. as they would be stored, (classes - 1, z, y, x)."""
        shape = held.image.shape[1:]
        core = (
            1,
            *(
                equal_core(n, LARGEST_CORE, s)
                for n, s in zip(shape[1:], network.context.step[1:], strict=True)
            ),
        )
        plan = TilePlan(shape, core, network.context, core)
        predictor = Predictor(network, plan, held.intensity, self._precision, self._device)
        stored = np.zeros((self._classes - 1, *shape), np.uint8)
        for number in range(len(plan)):
            tile = plan[number]
            voxels = read_mirrored(partial(_cut, held.image), shape, tile.read)
            found = predictor(tile, voxels, ("probabilities",))["probabilities"]
            stored[(slice(None), *tile.write.slices)] = found[(slice(None), *tile.crop.slices)]
        return stored

    def _scores(self, shares: Sequence[NDArray[np.uint8]]) -> dict[str, float]:
        """All slices of all volumes count alike, and by their voxels where sizes differ."""
        classes = [_classes(each) for each in shares]
        tables = [
            _known(Overlaps.of(held.targets, found))
            for held, found in zip(self._held_out, classes, strict=True)
        ]
        every = class_scores(tables)
        scores = {name: every[name].value for name in ("iou", "dice")}
        if "v_rand" in self.names:
            scores |= self._isbi([each[0] / 255 for each in shares])
        if "seg" in self.names:
            known = [held.targets != IGNORED for held in self._held_out]
            found = _stacked(
                [_numbered(each * there) for each, there in zip(classes, known, strict=True)]
            )
            cells = _stacked([held.cells for held in self._held_out if held.cells is not None])
            objects = instance_scores(found, cells, True, CELLS)
            scores |= {name: score.value for name, score in objects.items()}
        return scores

    def _isbi(self, shares: Sequence[NDArray[np.floating[Any]]]) -> dict[str, float]:
        """The scores of membranes, of slices of one size together."""
        truths = [held.targets for held in self._held_out]
        sizes = sorted({truth.shape[1:] for truth in truths})
        voxels, scores = [], []
        for size in sizes:
            which = [n for n, truth in enumerate(truths) if truth.shape[1:] == size]
            truth = np.concatenate([truths[n] for n in which])
            found = isbi_scores(np.concatenate([shares[n] for n in which]), truth, MEMBRANES)
            voxels.append(truth.size)
            scores.append([found[name].value for name in MEMBRANES])
        return dict(zip(MEMBRANES, np.average(scores, 0, voxels).tolist(), strict=True))


def _cells_in(held: HeldOut) -> NDArray[np.bool_]:
    """Where another class than the first one is known."""
    there: NDArray[np.bool_] = (held.targets != 0) & (held.targets != IGNORED)
    return there


def _cut(image: NDArray[Any], box: Box) -> NDArray[Any]:
    voxels: NDArray[Any] = image[(slice(None), *box.slices)]
    return voxels


def score_names(held_out: Sequence[HeldOut], classes: int) -> list[str]:
    """The scores that fit the labels; the last one decides unless another is named."""
    names = ["dice", "iou"]
    if held_out[0].cells is not None:
        return [*names, "ap50", "seg"]
    whole = all((held.targets != IGNORED).all() for held in held_out)
    if classes == 2 and whole:
        return [*names, "pixel_error", "warping_error", "v_info", "v_rand"]
    return names


def checked_score(held_out: Sequence[HeldOut], classes: int, best_by: str | None) -> str:
    """The score that decides which model is best.

    Raises:
        InputError: if there is no score of that name for these labels.
    """
    names = score_names(held_out, classes)
    if all((held.targets == IGNORED).all() for held in held_out):
        raise InputError("The held-out slices have no voxel with annotation: hold out others.")
    if not any(_cells_in(held).any() for held in held_out):
        raise InputError("The held-out slices show the first class only: hold out others.")
    if best_by is not None and best_by not in names:
        raise InputError(
            f"best_by={best_by!r} is no score of these labels: choose from {', '.join(names)}."
        )
    return best_by or names[-1]


def _classes(stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The most probable class of stored probabilities, (z, y, x)."""
    first = 255 - stored.sum(0, dtype=np.int64, keepdims=True)
    classes: NDArray[np.int64] = np.concatenate([first, stored]).argmax(0)
    return classes.astype(np.uint8)


def _known(table: Overlaps) -> Overlaps:
    return table.where(table.truth != IGNORED)


def _numbered(classes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """4-connected parts of every slice, (z, y, x)."""
    return np.stack([ndimage.label(plane != 0)[0] for plane in classes]).astype(np.int64)


def _stacked(stacks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One stack of all slices; smaller ones are filled up with 0 behind."""
    height, width = (max(s.shape[axis] for s in stacks) for axis in (1, 2))
    return np.concatenate(
        [np.pad(s, ((0, 0), (0, height - s.shape[1]), (0, width - s.shape[2]))) for s in stacks]
    )
