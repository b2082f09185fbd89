"""The content of the page about an output store: slices, histograms, times and scores.

Handles the selection of content. Independent of training runs and of the layout of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.errors import InputError
from unet_ray.report import charts
from unet_ray.report.figures import OVERLAY_GREYS, Facts, colours_of, digits_of, figure
from unet_ray.report.objects import about_objects
from unet_ray.report.pictures import (
    Picture,
    colour_cells,
    colour_classes,
    colour_map,
    few_greys,
    overlay,
    strike_out,
)
from unet_ray.report.results import (
    CHUNKS,
    Result,
    image_windows,
    open_result,
    open_truth,
    read_log,
    sampled_chunks,
    windows,
)
from unet_ray.scores.evaluation import Evaluation, Kind, evaluate
from unet_ray.scores.seams import instance_seams
from unet_ray.scores.totals import MEANINGS
from unet_ray.storage.layout import EVENTS, INSTANCES
from unet_ray.storage.places import PathOrUrl, Place, place_of
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.volume import Volume

HISTOGRAMS = 6  # at most, one per class
# At most this many maps of tiles, and cells along each side of a map.
LARGEST_MAP = (4, 64)
SEAM_PAIRS = 1 << 24  # pairs of voxels along an axis: seconds for a volume of any size


def about_store(path: Place, truth: PathOrUrl | None) -> Facts:
    """The content of the page about the store at `path`; scored if `truth` is set."""
    result = open_result(path)
    truth_volume = open_truth(truth, result) if truth is not None else None
    log = read_log(path / EVENTS, result.plan)
    boxes = windows(result)
    images, no_image = image_windows(result, log, boxes)
    classes = [result.classes(box)[0] for box in boxes]
    # The class that covers less of the windows is painted over the image.
    share = np.mean([(each != 0).mean() for each in classes]) if classes else 0.0
    painted = share <= 0.5
    plan, counts = result.plan, result.plan.counts
    maps, bar, grouped = charts.tile_maps(
        log.seconds.reshape(counts), result.done.reshape(counts), plan.shape, plan.core, LARGEST_MAP
    )
    return {
        "kind": "store",
        "provenance": result.provenance.json,
        "values": result.class_values,
        "class_colours": colours_of(len(result.class_values)),
        "tiles": len(plan),
        "done": int(result.done.sum()),
        "given_up": result.given_up,
        "masked": result.masked,
        "log": log,
        "no_image": no_image,
        "slices": [
            _slice(result, box, each, image, truth_volume, bool(painted))
            for box, each, image in zip(boxes, classes, images, strict=True)
        ],
        "probability_bar": Markup(charts.colour_bar("Probability", (0.0, 1.0), "")),
        "truth": place_of(truth_volume.path) if truth_volume else None,
        "objects": about_objects(result),
        **_histograms(result),
        "seams": instance_seams(result.path, plan, result.done, SEAM_PAIRS)
        if INSTANCES in result.outputs
        else None,
        "tile_maps": [(title, Markup(svg)) for title, svg in maps],
        "tile_bar": Markup(bar),
        "grouped": grouped,
        "evaluations": _evaluations(result, truth_volume) if truth_volume else [],
    }


def _slice(
    result: Result,
    box: Box,
    classes: NDArray[Any],
    image: Picture | None,
    truth: Volume | None,
    painted: bool,
) -> Facts:
    """The panels of one slice; voxels that are not computed are hatched."""
    computed = result.computed(box)[0]
    grey = np.zeros(classes.shape, np.uint8) if image is None else few_greys(image, OVERLAY_GREYS)
    border = None if truth is None else _objects_of(truth.read(box)[0, 0], result.class_values)
    panels = {"prediction": overlay(grey, (classes != 0) == painted, border)}
    if "probabilities" in result.outputs:
        panels["probability"] = colour_map(_shown_probability(result, box))
    panels |= _parts(result, box, classes, image)
    if not computed.all():
        panels = {name: strike_out(picture, ~computed) for name, picture in panels.items()}
    if image is not None:
        panels = {"image": image, **panels}
    whole = classes.shape == result.plan.shape[1:]
    return {
        "z": box.start[0],
        "window": "" if whole else str(box),
        "panels": [figure(picture, name) for name, picture in panels.items()],
    }


def _objects_of(labels: NDArray[Any], class_values: Sequence[int]) -> NDArray[Any]:
    """Truth with 0 for the first class.

    Truth that holds other values than the label values of training is returned unchanged.
    """
    if set(np.unique(labels).tolist()) <= set(class_values):
        return np.where(labels == class_values[0], 0, labels)
    return labels


def _shown_probability(result: Result, box: Box) -> NDArray[np.uint8]:
    """Probability of class 1 if there are two classes, else of the most probable class."""
    probabilities = result.probabilities(box)[:, 0]
    shown: NDArray[np.uint8] = probabilities[1] if len(probabilities) == 2 else probabilities.max(0)
    return shown


def _parts(
    result: Result, box: Box, classes: NDArray[Any], image: Picture | None
) -> dict[str, Picture]:
    """One panel: instances, or connected parts of class 1, or several classes."""
    if "instances" in result.outputs:
        return {"instances": colour_cells(result.read("instances", box)[0], image)}
    if len(result.class_values) == 2:
        return {"parts": colour_cells(ndimage.label(classes == 1)[0], image)}
    return {"classes": colour_classes(classes)}


def _histograms(result: Result) -> Facts:
    """Histograms of the stored probabilities in randomly chosen storage chunks."""
    if "probabilities" not in result.outputs or not result.done.any():
        return {"histograms": []}
    counts = np.zeros((len(result.class_values) - 1, 256), np.int64)
    boxes, chunks = sampled_chunks(result)
    for box in boxes:
        for channel, voxels in enumerate(result.read("probabilities", box)):
            counts[channel] += np.bincount(voxels.ravel(), minlength=256)
    shares = 100 * counts.reshape(len(counts), 32, 8).sum(2) / counts[0].sum()
    edges = np.linspace(0, 1, 33)
    histograms = [
        charts.histogram(f"class {k}", edges, share, "probability", "% of the voxels")
        for k, share in enumerate(shares[:HISTOGRAMS], start=1)
    ]
    return {
        "histograms": [Markup(svg) for svg in histograms],
        "sampled": len(boxes),
        "chunks": chunks,
        "all_chunks": chunks <= CHUNKS,
    }


def _evaluations(result: Result, truth: Volume) -> list[Facts]:
    """The scores of each kind that the store allows, or the reason why one cannot be computed."""
    outputs = result.outputs
    kinds: list[Kind] = []
    if "probabilities" in outputs and len(result.class_values) == 2:
        kinds.append("isbi")
    kinds += [kind for kind in ("instances", "classes") if kind in outputs]
    evaluations: list[Facts] = []
    refused: list[Facts] = []
    for kind in kinds:
        try:
            evaluations.append(_scored(evaluate(result.path, truth.path, kind)))
        except InputError as error:
            refused.append({"kind": kind, "refused": str(error)})
    return evaluations or refused[:1]  # one reason is enough


def _scored(evaluation: Evaluation) -> Facts:
    rows = []
    for name, score in evaluation.scores.items():
        x_label = "IoU threshold" if name == "ap_mean" else "threshold"
        x, y = np.array(score.curve).reshape(-1, 2).T
        mark = None
        if score.threshold is not None:
            text = f"best {digits_of(score.value)} at {score.threshold:.1f}"
            mark = score.threshold, score.value, text
        label = name.replace("_", " ")
        curve = charts.line_chart(label, [charts.Series(label, x, y)], x_label, label, mark=mark)
        rows.append(
            {
                "name": name,
                "score": score,
                "rises": MEANINGS[name][0] == 1,
                "meaning": MEANINGS[name][1],
                "curve": Markup(curve) if len(x) > 1 else None,
                "classes": getattr(score, "classes", ()),
            }
        )
    return {"kind": evaluation.kind, "rows": rows, "note": evaluation.note}
