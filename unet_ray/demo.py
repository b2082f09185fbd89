"""The demonstration: trains a network on a phantom and segments a larger phantom on Ray.

Handles the sequence of steps. Independent of internals: it uses only what users can call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

from unet_ray.progress import TilesBar, TrainingBar
from unet_ray.report.page import write_report
from unet_ray.report.pictures import (
    colour_classes,
    colour_map,
    overlay,
    side_by_side,
    to_grey,
    write_png,
)
from unet_ray.scores.evaluation import evaluate
from unet_ray.scores.metrics import accuracy, iou
from unet_ray.segmentation.segment import segment
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.layout import ARRAYS
from unet_ray.training.recipes import Recipe
from unet_ray.training.train import train
from unet_ray.volumes.phantom import Phantom, make_phantom

TRAINING_SHAPE, TEST_SHAPE = (8, 512, 512), (12, 768, 768)
TRAINING_SEED, TEST_SEED = 1, 2
# A limit in steps gives the same network on a busy machine. The phantom has thick membranes; with
# the paper's w0 of 10, a short training predicts them too thick. Stronger deformation needs more
# steps.
RECIPE = {"base_channels": 16, "patch": (316, 316), "steps": 1400, "w0": 2.0, "elastic": 10.0}
SHOWN_SLICE, SHOWN_CORNER = 6, 384

Say = Callable[[str], None]


def run(out: Path, say: Say) -> None:
    """Runs the demonstration in folder `out`; the same call resumes it or repeats its output.

    Args:
        out: folder of phantoms, run, store and pictures.
        say: receives progress messages; results go to standard output.
    """
    say(f"Making two phantoms: {_by(TRAINING_SHAPE)} for training, {_by(TEST_SHAPE)} for testing.")
    training = _phantom(out / "phantom" / "train", TRAINING_SHAPE, TRAINING_SEED)[1]
    truth, test = _phantom(out / "phantom" / "test", TEST_SHAPE, TEST_SEED)
    say("Training a U-Net on the first phantom.")
    with TrainingBar("train") as watch:
        model = train(
            [str(training / "volume.tif")],
            [str(training / "labels.tif")],
            out / "run",
            Recipe.of("default", **RECIPE),
            watch=watch,
            announce=watch.show_table,
        )
    say("Segmenting the second phantom on Ray.")
    settings = Settings(engine="ray")
    with TilesBar("segment") as watch_tiles:
        store = segment(test / "volume.tif", model, out / "test.zarr", settings, watch_tiles)
    classes = zarr.open_array(store / ARRAYS["classes"], mode="r")[:]
    probability = zarr.open_array(store / ARRAYS["probabilities"], mode="r")[0]
    print(_score_table(truth, np.asarray(classes)))
    print(evaluate(store, test / "labels.tif", "isbi").table())
    for path in _draw(out / "pictures", truth, np.asarray(probability), np.asarray(classes)):
        print(path)
    for page in (write_report(out / "run"), write_report(store, test / "labels.tif")):
        print(os.path.relpath(str(page)))


def _phantom(folder: Path, shape: tuple[int, int, int], seed: int) -> tuple[Phantom, Path]:
    """Returns the phantom and the folder of its files; writes the files if they are missing."""
    phantom = make_phantom(shape, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, voxels in (("volume", phantom.image), ("labels", phantom.classes)):
        path = folder / f"{name}.tif"
        if not path.exists():
            partial = path.with_suffix(".partial.tif")
            tifffile.imwrite(partial, voxels, compression="zlib", metadata={"axes": "ZYX"})
            os.replace(partial, path)
    return phantom, folder


def _score_table(truth: Phantom, classes: NDArray[np.uint8]) -> str:
    """Compares the network with two baselines: the best threshold, and cell everywhere."""
    cells = (truth.classes > 0).astype(np.uint8)
    predictions = {
        "U-Net": classes,
        "best threshold": _best_threshold(truth.image, cells),
        "all cell": np.ones_like(cells),
    }
    lines = [f"{'':16}{'accuracy':>10}{'IoU membrane':>15}{'IoU cell':>11}"]
    for name, prediction in predictions.items():
        correct, overlap = accuracy(prediction, cells), dict(iou(prediction, cells).classes)
        lines.append(f"{name:16}{correct.value:>10.4f}{overlap[0]:>15.4f}{overlap[1]:>11.4f}")
    return "\n".join(lines)


def _best_threshold(image: NDArray[np.uint8], cells: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Predicts cell above the grey value that gives the best mean IoU."""
    predictions: list[Any] = [(image > level).astype(np.uint8) for level in range(16, 240, 8)]
    return max(predictions, key=lambda prediction: iou(prediction, cells).value)


def _draw(
    folder: Path, truth: Phantom, probability: NDArray[np.uint8], classes: NDArray[np.uint8]
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    z = SHOWN_SLICE
    image, cells = to_grey(truth.image[z]), truth.classes[z] > 0
    panels = {
        "input": np.repeat(image[..., None], 3, axis=2),
        "probability": colour_map(probability[z]),
        "classes": colour_classes(classes[z]),
        "truth": colour_classes(cells.astype(np.uint8)),
        "overlay": overlay(image, classes[z] == 0),
    }
    captions = ["input", "probability of cell", "classes", "truth", "membrane found, over input"]
    corners = [panel[:SHOWN_CORNER, :SHOWN_CORNER] for panel in panels.values()]
    panels["all"] = side_by_side(corners, captions)
    for name, picture in panels.items():
        write_png(folder / f"{name}.png", picture)
    return [folder / f"{name}.png" for name in panels]


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
