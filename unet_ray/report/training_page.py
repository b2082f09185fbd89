"""The content of the page about a training run: losses, scores, patches and weight maps.

Handles the files of a RUN folder. Independent of stores and of the layout of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from unet_ray.errors import InputError
from unet_ray.network.checkpoints import read_tensors
from unet_ray.report import charts
from unet_ray.report.figures import OVERLAY_GREYS, Facts, by, colours_of, figure
from unet_ray.report.pictures import (
    Picture,
    colour_classes,
    colour_log,
    colour_map,
    few_greys,
    frame,
    to_grey,
)
from unet_ray.report.results import WINDOW
from unet_ray.storage.events import measured, read_events
from unet_ray.training.gallery import PREDICTIONS
from unet_ray.training.run_folder import METRICS, MODEL, PATCHES, WEIGHTS
from unet_ray.training.truths import IGNORED

LARGEST_LOSS = 1e39  # beyond float32
# Side in pixels of the square that the images of all patches fit in, whatever their number.
SHEET = 1152


def about_run(run: Path) -> Facts:
    """The content of the page about a RUN folder.

    Raises:
        InputError: if the folder holds no log, model, checkpoint, patches or weight maps yet.
    """
    lines = list(read_events(run / METRICS))
    measures = [line for line in lines if _is_measure(line)]
    header = _header(run)
    patches = _unless_damaged(_patches, run / PATCHES)
    weight_map = _unless_damaged(_weight_map, run / WEIGHTS)
    if not (measures or header or patches or weight_map):
        raise InputError(
            f"{run}: training has written nothing yet; try again after the first steps."
        )
    return {
        "kind": "run",
        "measures": measures,
        "left_out": len(lines) - len(measures),
        "finished": (run / MODEL).exists(),
        "loss": _loss_chart(measures) if any(m["step"] for m in measures) else None,
        "validation": _validation_charts(measures),
        "header": header,
        "patches": patches,
        "weight_map": weight_map,
        "predictions": _unless_damaged(_predictions, run / PREDICTIONS),
    }


def _is_measure(line: Facts) -> bool:
    """Whether a line of the log has all its numbers; before the first step there is no loss."""
    numbers = [measured(line.get(name)) for name in ("step", "seconds", "progress")]
    return None not in numbers and (numbers[0] == 0 or _finite(line.get("loss")) is not None)


def _finite(value: object) -> float | None:
    return measured(value, -LARGEST_LOSS, LARGEST_LOSS)


def _header(run: Path) -> Facts:
    """The header of the model, or else of the newest checkpoint; empty if there is none."""
    checkpoints = sorted((run / "checkpoints").glob("step-*.safetensors"), reverse=True)
    newest = next((path for path in [run / MODEL, *checkpoints] if path.exists()), None)
    return read_tensors(newest)[1] if newest else {}


def _loss_chart(measures: Sequence[Facts]) -> Markup:
    steps, losses = zip(*((m["step"], m["loss"]) for m in measures if m["step"]), strict=True)
    line = charts.binned_series("loss", steps, losses)
    return Markup(charts.line_chart("Training loss", [line], "step", "loss", log=True))


def _validation_charts(measures: Sequence[Facts]) -> list[Markup]:
    """Charts of the scores: those within 0 to 1 six per chart, any other in its own chart."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for measure in measures:
        scores = measure.get("validation")
        for name, score in scores.items() if isinstance(scores, dict) else ():
            if (value := _finite(score)) is not None:
                lines.setdefault(name, []).append((measure["step"], value))
    shares: list[charts.Series] = []
    others: list[charts.Series] = []
    for name, points in lines.items():
        series = charts.binned_series(name, *np.array(points, np.float64).T)
        within = ((series.y >= 0) & (series.y <= 1)).all()
        (shares if within else others).append(series)
    groups = [shares[i : i + 6] for i in range(0, len(shares), 6)] + [[s] for s in others]
    return [
        Markup(charts.line_chart("Validation", group, "step", "score", names=True))
        for group in groups
    ]


def _unless_damaged(draw: Callable[[Path], Facts], path: Path) -> Facts:
    """The result of `draw`, or the reason why it failed; empty if there is no file."""
    if not path.exists():
        return {}
    try:
        return draw(path)
    except InputError as error:
        return {"refused": str(error)}


def _patches(path: Path) -> Facts:
    """The stored patches as pictures, each an image, its classes and its weights."""
    patches = _stored_patches(path)
    images, targets, weights = zip(*patches, strict=True)
    longest = max(max(image.shape[1:]) for image in images)
    step = math.ceil(longest * math.sqrt(len(patches)) / SHEET)
    ends, scale = _weight_scale(np.concatenate([each.ravel() for each in weights]))
    return {
        "sheet": [_patch(*each, ends, step) for each in patches],
        "thinned": step,
        "colours": colours_of(1 + max(int(each.max()) for each in targets)),
        **scale,
    }


def _predictions(path: Path) -> Facts:
    """One held-out window after each validation, and the worst and the best places."""
    tensors, header = read_tensors(path)
    try:
        classes = int(header["classes"])
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        steps = [int(n) for n in _in_order(name[5:] for name in arrays if name.startswith("step."))]
        places = sorted({int(name.split(".")[1]) for name in arrays if name.startswith("place.")})
        image = figure(to_grey(arrays["image"]), "image")
        progress = [_truth_panel(arrays, "", classes)] + [
            figure(_predicted(arrays[f"step.{step}"], classes), f"step {step}") for step in steps
        ]
        pairs = [_place(arrays, number, classes) for number in places]
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InputError(f"{path}: does not hold predictions as train writes them.") from error
    half = (len(pairs) + 1) // 2
    return {
        "progress": [image, *progress],
        "worst": pairs[:half],
        "best": pairs[half:],
    }


def _place(arrays: dict[str, NDArray[Any]], number: int, classes: int) -> list[Facts]:
    prefix = f"place.{number}."
    predicted = _predicted(arrays[f"{prefix}prediction"], classes)
    return [
        figure(to_grey(arrays[f"{prefix}image"]), "image"),
        _truth_panel(arrays, prefix, classes),
        figure(predicted, "prediction"),
    ]


def _truth_panel(arrays: dict[str, NDArray[Any]], prefix: str, classes: int) -> Facts:
    targets = arrays[f"{prefix}targets"]
    if classes == 2:
        shown = np.where(targets == IGNORED, 128, np.where(targets > 0, 255, 0)).astype(np.uint8)
        return figure(colour_map(shown), "truth")
    return figure(colour_classes(np.where(targets == IGNORED, 0, targets)), "truth")


def _predicted(prediction: NDArray[Any], classes: int) -> Picture:
    return colour_map(prediction) if classes == 2 else colour_classes(prediction)


def _stored_patches(path: Path) -> list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Image, classes and weights of each stored patch.

    Raises:
        InputError: if the file is damaged or of another kind.
    """
    tensors = read_tensors(path)[0]
    numbers = [name[6:] for name in tensors if name.startswith("image.")]
    try:
        patches = [
            (
                tensors[f"image.{n}"].numpy(),
                tensors[f"targets.{n}"].numpy(),
                tensors[f"weights.{n}"].numpy(),
            )
            for n in _in_order(numbers)
        ]
    except (KeyError, TypeError):  # a tensor is missing, or NumPy lacks its dtype
        patches = []
    if not patches or not all(_is_patch(*each) for each in patches):
        raise InputError(f"{path}: does not hold patches as train writes them.")
    return patches


def _in_order(numbers: Iterable[str]) -> list[str]:
    """Sorts the numbers in tensor names, 2 before 10."""
    return sorted(numbers, key=lambda number: (len(number), number))


def _is_patch(image: NDArray[Any], targets: NDArray[Any], weights: NDArray[Any]) -> bool:
    """Whether image (c, y, x), classes (y, x) and weights (y, x) can be drawn."""
    kinds = image.dtype.kind, targets.dtype.kind, weights.dtype.kind
    axes = image.ndim, targets.ndim, weights.ndim
    if kinds not in {("f", "u", "f"), ("f", "i", "f")} or axes != (3, 2, 2):
        return False
    fits = targets.shape == weights.shape and image.size > 0 and weights.size > 0
    fits &= all(a >= b for a, b in zip(image.shape[1:], weights.shape, strict=True))
    return bool(fits and targets.min() >= 0 and targets.max() < 256 and np.isfinite(weights).all())


def _patch(
    image: NDArray[Any],
    targets: NDArray[Any],
    weights: NDArray[Any],
    ends: tuple[float, float],
    step: int,
) -> list[Facts]:
    grey, thin = to_grey(image[0]), slice(None, None, step)
    top, left = ((a - b) // 2 // step for a, b in zip(grey.shape, weights.shape, strict=True))
    classes = colour_classes(targets[thin, thin])
    greys = few_greys(grey[thin, thin], OVERLAY_GREYS)
    return [
        figure(
            frame(greys, top, left, *classes.shape[:2]),
            f"Image, {by(grey.shape)} pixels; framed: the predicted part.",
        ),
        figure(classes, "Classes of the framed part."),
        figure(colour_log(_greatest(weights, step), *ends), "Weights of the framed part."),
    ]


def _greatest(weights: NDArray[Any], step: int) -> NDArray[Any]:
    """The maximum of each `step` x `step` pixels (y, x), so that thin lines remain."""
    rows = np.maximum.reduceat(weights, range(0, len(weights), step), axis=0)
    most: NDArray[Any] = np.maximum.reduceat(rows, range(0, rows.shape[1], step), axis=1)
    return most


def _weight_scale(weights: NDArray[Any]) -> tuple[tuple[float, float], Facts]:
    """The smallest weight above 0 and the largest, and the colour bar between them."""
    counted = weights[weights > 0] if (weights > 0).any() else np.ones(1)
    ends = float(counted.min()), float(counted.max())
    bar = Markup(charts.colour_bar("Weight of a pixel", ends, "", log=True))
    return ends, {"bar": bar, "weightless": bool((weights <= 0).any())}


def _weight_map(path: Path) -> Facts:
    """The slice with the largest mean weight in all training volumes."""
    maps = _weight_maps(path)
    means = {number: each.mean((1, 2), np.float64) for number, each in maps.items()}
    volume = max(means, key=lambda number: float(means[number].max()))
    z = int(means[volume].argmax())
    weights = maps[volume][z]
    step = -(-max(weights.shape) // WINDOW)
    ends, scale = _weight_scale(weights)
    caption = f"Volume {volume}, slice {z} of the training data, {by(weights.shape)} pixels"
    if step > 1:
        caption += f"; each pixel shows the greatest weight of {step} x {step}"
    picture = colour_log(_greatest(weights, step), *ends)
    return {"figure": figure(picture, f"{caption}."), **scale}


def _weight_maps(path: Path) -> dict[str, NDArray[Any]]:
    """The weights (z, y, x) of each volume, by its number.

    Raises:
        InputError: if the file is damaged or of another kind.
    """
    tensors = read_tensors(path)[0]
    try:
        maps = {n: tensors[f"weights.{n}"].numpy() for n in _in_order(t[8:] for t in tensors)}
    except (KeyError, TypeError):  # a tensor has another name, or NumPy lacks its dtype
        maps = {}
    if not maps or not all(_is_weight_map(each) for each in maps.values()):
        raise InputError(f"{path}: does not hold weight maps as train writes them.")
    return maps


def _is_weight_map(weights: NDArray[Any]) -> bool:
    """Whether the weights are float32 (z, y, x), finite and at least 0."""
    if weights.dtype != np.float32 or weights.ndim != 3 or weights.size == 0:
        return False
    return bool(np.isfinite(weights).all() and weights.min() >= 0)
