"""Predictions on held-out slices, stored in the RUN folder for the report.

Knows which windows show the progress and the best and worst places of a network. Does not know how
they are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unet_ray.errors import InputError
from unet_ray.network.checkpoints import read_tensors, write_tensors
from unet_ray.storage.places import Guard
from unet_ray.tiling.boxes import Box
from unet_ray.training.data import HeldOut
from unet_ray.training.truths import IGNORED

PREDICTIONS = "predictions.safetensors"
WINDOW, PLACE = 256, 96  # voxels along y and x
PLACES = 3  # best and worst places, each


def store_predictions(
    path: Path,
    step: int,
    held_out: Sequence[HeldOut],
    predictions: Sequence[NDArray[np.uint8]],
    guard: Guard,
    threshold: float | None = None,
) -> None:
    """Adds the predictions of one validation to the file, and drops those of later steps.

    Tensors: ``image`` and ``targets`` (y, x) of one window, ``step.N`` (y, x) its prediction after
    N steps; ``place.K.image``, ``.targets`` and ``.prediction`` (y, x) of the latest validation,
    from the worst place to the best. A prediction is 255 p of class 1 for two classes, else the
    class number.

    Args:
        path: the file; it need not exist.
        step: steps done.
        held_out: the held-out slices.
        predictions: of each volume, 255 p of the classes above 0, (classes - 1, z, y, x).
        guard: held while the file takes its place.
        threshold: of the class map, by which places are right or wrong; None for 1/2.
    """
    window = _middle(held_out[0].targets.shape)
    tensors = {name: tensor for name, tensor in _stored(path).items() if 0 <= _step_of(name) < step}
    shown = [_shown(prediction) for prediction in predictions]
    tensors |= _windows("", held_out[0], window)
    tensors[f"step.{step}"] = _tensor(shown[0][window.slices][0])
    classes = len(predictions[0]) + 1
    wrong = [
        _wrong(each, prediction, classes, threshold)
        for each, prediction in zip(held_out, shown, strict=True)
    ]
    for number, (volume, box) in enumerate(_places(held_out, wrong)):
        tensors |= _windows(f"place.{number}.", held_out[volume], box)
        tensors[f"place.{number}.prediction"] = _tensor(shown[volume][box.slices][0])
    write_tensors(path, tensors, {"classes": classes}, guard)


def _stored(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)[0]
    except InputError:  # missing or damaged: pictures are not worth an error
        return {}


def _step_of(name: str) -> int:
    """Returns the step of a tensor ``step.N``; -1 for another tensor."""
    return int(name[5:]) if name.startswith("step.") and name[5:].isdecimal() else -1


def _tensor(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array.copy())  # windows of one array may overlap


def _windows(prefix: str, held_out: HeldOut, box: Box) -> dict[str, Tensor]:
    image = held_out.slices[(slice(None), *box.slices)][0, 0].astype(np.float32)
    return {
        f"{prefix}image": _tensor(image),
        f"{prefix}targets": _tensor(held_out.targets[box.slices][0]),
    }


def _shown(prediction: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns 255 p of class 1 for two classes, else the most probable class, (z, y, x)."""
    if len(prediction) == 1:
        single: NDArray[np.uint8] = prediction[0]
        return single
    first = 255 - prediction.sum(0, dtype=np.int64)
    classes: NDArray[np.int64] = np.concatenate([first[None], prediction]).argmax(0)
    return classes.astype(np.uint8)


def _middle(shape: Sequence[int]) -> Box:
    """Returns a window in the middle of the middle slice."""
    z, (y, x) = shape[0] // 2, (max(0, (n - WINDOW) // 2) for n in shape[1:])
    return Box((z, y, x), (z + 1, min(shape[1], y + WINDOW), min(shape[2], x + WINDOW)))


def _wrong(
    held_out: HeldOut, shown: NDArray[np.uint8], classes: int, threshold: float | None
) -> NDArray[np.bool_]:
    """Returns which annotated voxels have the wrong class, (z, y, x)."""
    cut = 255 * (0.5 if threshold is None else threshold)
    predicted = shown > cut if classes == 2 else shown
    wrong: NDArray[np.bool_] = (predicted != held_out.targets) & (held_out.targets != IGNORED)
    return wrong


def _places(
    held_out: Sequence[HeldOut], wrong: Sequence[NDArray[np.bool_]]
) -> list[tuple[int, Box]]:
    """Returns the windows with the largest and the smallest shares of errors, worst first."""
    shares: list[tuple[float, int, Box]] = []
    for number, (each, errors) in enumerate(zip(held_out, wrong, strict=True)):
        annotated = each.targets != IGNORED
        for box in Box.of(errors.shape).split((1, PLACE, PLACE)):
            if count := int(annotated[box.slices].sum()):
                shares.append((int(errors[box.slices].sum()) / count, number, box))
    shares.sort(key=lambda share: -share[0])
    chosen = shares if len(shares) <= 2 * PLACES else shares[:PLACES] + shares[-PLACES:]
    return [(number, box) for _, number, box in chosen]
