"""The page about a training run or a segmentation: one HTML file with pictures, without a network.

Knows what is worth showing. Which parts of a store stand for the whole is in results.py; how it
is drawn is charts.py's and pictures.py's; the words are in page.html.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from numpy.typing import NDArray
from scipy import ndimage

from unet_ray.errors import InputError
from unet_ray.network.checkpoints import read_tensors
from unet_ray.progress import format_seconds
from unet_ray.report import charts
from unet_ray.report.pictures import (
    Picture,
    colour_cells,
    colour_classes,
    colour_log,
    colour_map,
    encode_png,
    few_greys,
    frame,
    overlay,
    strike_out,
    to_grey,
)
from unet_ray.report.results import (
    CHUNKS,
    WINDOW,
    Result,
    image_windows,
    open_result,
    open_truth,
    read_log,
    sampled_chunks,
    windows,
)
from unet_ray.scores.evaluation import MEANINGS, Evaluation, Kind, evaluate
from unet_ray.storage.events import measured, read_events
from unet_ray.storage.places import Place, Where, place_of, write_whole
from unet_ray.storage.stores import EVENTS
from unet_ray.tiling.boxes import Box
from unet_ray.training.run_folder import METRICS, MODEL, PATCHES, WEIGHTS
from unet_ray.versions import VERSION
from unet_ray.volumes.volume import Volume

CHANNELS = 6  # histograms, of as many classes
# Maps of slabs of tiles, and cells along each side of a map.
LARGEST_MAP = (4, 64)
# Enough under a colour, and small as a file.
OVERLAY_GREYS = 64
# Characters of provenance on the page; a file may hold any amount.
LONGEST_JSON = 200_000
LARGEST_LOSS = 1e39  # beyond float32
# Pictures so many times as long as wide are zoomed in until they are so many pixels wide.
STRIP, STRIP_WIDTH = 8, 32
# Pixels along a side of the square that all kept images fit in, however many there are.
SHEET = 1152

Facts = dict[str, Any]


def write_report(path: Where, truth: Where | None = None) -> Place:
    """Writes the page about a RUN folder, into it, or about an output store, beside it.

    The page is one file that loads nothing from elsewhere. Its size and what is read for it are
    bounded, but for the kept weight maps and the scores, for which all of the maps, of the store
    and of the truth is read.

    Args:
        path: RUN folder of `train`, or store of `segment`; either may be unfinished.
        truth: labels of the volume that was segmented, to draw and to score.

    Returns:
        Path of the page: ``RUN/report.html``, or ``NAME.report.html`` beside ``NAME.zarr``.

    Raises:
        InputError: if `path` is neither, or holds nothing yet; if `truth` does not fit.
        RunError: if what is stored is damaged.
    """
    found = place_of(path)
    page: Place
    if isinstance(found, Path) and any(
        (found / name).exists() for name in (MODEL, METRICS, "checkpoints")
    ):
        if truth is not None:
            raise InputError(f"{found}: is a training run; --truth is for an output of segment.")
        page, facts = found / "report.html", _about_run(found)
    else:
        page, facts = (
            found.with_name(f"{_stem(found.name)}.report.html"),
            _about_store(found, truth),
        )
    text = _rendered({"name": found.name, "version": VERSION, **facts})
    write_whole(page, text.encode("utf-8", "replace"))  # a file's name need not be UTF-8
    return page


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MODEL, METRICS, "checkpoints"))


def _stem(name: str) -> str:
    """A store's name without its ending; ``v1.5`` has none."""
    return name[:-5] if name.lower().endswith(".zarr") and len(name) > 5 else name


def _rendered(facts: Facts) -> str:
    pages = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {
        "by": _by,
        "digits": _digits,
        "seconds": lambda s: format_seconds(s) if s >= 10 else f"{_digits(s)} s",
        "json": lambda told: json.dumps(told, indent=2, ensure_ascii=False),
    }
    pages.globals["longest"] = LONGEST_JSON
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return pages.from_string(template).render(facts)


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _digits(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, or all of those before the point."""
    if not math.isfinite(value):
        return "undefined" if math.isnan(value) else "infinite"
    if abs(value) >= 10**digits:
        return charts.number(round(value))
    return f"{value:#.{digits}g}".rstrip(".")


def _figure(picture: Picture, caption: str) -> Facts:
    data = base64.b64encode(encode_png(picture)).decode()
    short, long = sorted(picture.shape[:2])
    return {
        "source": f"data:image/png;base64,{data}",
        "caption": caption,
        "width": picture.shape[1],
        "height": picture.shape[0],
        "zoom": -(-STRIP_WIDTH // short) if long > STRIP * short and long > 200 else 0,
    }


# A training run


def _about_run(run: Path) -> Facts:
    lines = list(read_events(run / METRICS))
    measures = [line for line in lines if _is_measure(line)]
    header = _header(run)
    patches = _unless_damaged(_patches, run / PATCHES)
    weight_map = _unless_damaged(_weight_map, run / WEIGHTS)
    if not (measures or header or patches or weight_map):
        raise InputError(f"{run}: nothing has been trained here yet; come back when it has.")
    return {
        "kind": "run",
        "measures": measures,
        "left_out": len(lines) - len(measures),
        "finished": (run / MODEL).exists(),
        "loss": _loss_chart(measures) if measures else None,
        "validation": _validation_charts(measures),
        "header": header,
        "patches": patches,
        "weight_map": weight_map,
    }


def _is_measure(line: Facts) -> bool:
    """Whether a line of the log can be drawn."""
    known = (measured(line.get(name)) for name in ("step", "seconds", "progress"))
    return _finite(line.get("loss")) is not None and None not in known


def _finite(value: object) -> float | None:
    return measured(value, -LARGEST_LOSS, LARGEST_LOSS)


def _header(run: Path) -> Facts:
    """What the model, or else the newest checkpoint, says of itself; nothing if there is none."""
    checkpoints = sorted((run / "checkpoints").glob("step-*.safetensors"), reverse=True)
    newest = next((path for path in [run / MODEL, *checkpoints] if path.exists()), None)
    return read_tensors(newest)[1] if newest else {}


def _loss_chart(measures: Sequence[Facts]) -> Markup:
    steps, losses = [m["step"] for m in measures], [m["loss"] for m in measures]
    line = charts.binned_series("loss", steps, losses)
    return Markup(charts.line_chart("Training loss", [line], "step", "loss", log=True))


def _validation_charts(measures: Sequence[Facts]) -> list[Markup]:
    """Scores from 0 to 1 share charts, six a chart; any other number has a chart of its own."""
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
    """What is drawn of a file, or a sentence on why it is not; nothing if there is no file."""
    if not path.exists():
        return {}
    try:
        return draw(path)
    except InputError as error:
        return {"refused": str(error)}


def _patches(path: Path) -> Facts:
    """The kept patches as pictures, each an image, its classes and its weights."""
    kept = _kept(path)
    images, targets, weights = zip(*kept, strict=True)
    longest = max(max(image.shape[1:]) for image in images)
    step = math.ceil(longest * math.sqrt(len(kept)) / SHEET)
    ends, scale = _weight_scale(np.concatenate([each.ravel() for each in weights]))
    return {
        "sheet": [_patch(*each, ends, step) for each in kept],
        "thinned": step,
        "colours": _colours(1 + max(int(each.max()) for each in targets)),
        **scale,
    }


def _kept(path: Path) -> list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Image, classes and weights of each kept patch.

    Raises:
        InputError: if the file is damaged, or of another kind.
    """
    tensors = read_tensors(path)[0]
    numbers = [name[6:] for name in tensors if name.startswith("image.")]
    try:
        kept = [
            (
                tensors[f"image.{n}"].numpy(),
                tensors[f"targets.{n}"].numpy(),
                tensors[f"weights.{n}"].numpy(),
            )
            for n in _in_order(numbers)
        ]
    except (KeyError, TypeError):  # a tensor is missing, or of a type that NumPy lacks
        kept = []
    if not kept or not all(_is_patch(*each) for each in kept):
        raise InputError(f"{path}: does not hold patches as train keeps them.")
    return kept


def _in_order(numbers: Iterable[str]) -> list[str]:
    """Numbers as they are written in names, 2 before 10."""
    return sorted(numbers, key=lambda number: (len(number), number))


def _is_patch(image: NDArray[Any], targets: NDArray[Any], weights: NDArray[Any]) -> bool:
    """Whether (c, y, x) pixels, (y, x) classes and weights can be drawn."""
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
        _figure(
            frame(greys, top, left, *classes.shape[:2]),
            f"Image, {_by(grey.shape)} pixels; framed: what the network returns.",
        ),
        _figure(classes, "Classes of the framed part."),
        _figure(colour_log(_greatest(weights, step), *ends), "Weights of the framed part."),
    ]


def _greatest(weights: NDArray[Any], step: int) -> NDArray[Any]:
    """One number for `step` x `step` pixels (y, x): the greatest, so that thin lines remain."""
    rows = np.maximum.reduceat(weights, range(0, len(weights), step), axis=0)
    most: NDArray[Any] = np.maximum.reduceat(rows, range(0, rows.shape[1], step), axis=1)
    return most


def _weight_scale(weights: NDArray[Any]) -> tuple[tuple[float, float], Facts]:
    """The least weight above 0 and the greatest, and the colour bar from one to the other."""
    counted = weights[weights > 0] if (weights > 0).any() else np.ones(1)
    ends = float(counted.min()), float(counted.max())
    bar = Markup(charts.colour_bar("Weight of a pixel", ends, "", log=True))
    return ends, {"bar": bar, "weightless": bool((weights <= 0).any())}


def _weight_map(path: Path) -> Facts:
    """The slice with the largest mean weight, of all volumes that were trained on."""
    maps = _weight_maps(path)
    means = {number: each.mean((1, 2), np.float64) for number, each in maps.items()}
    volume = max(means, key=lambda number: float(means[number].max()))
    z = int(means[volume].argmax())
    weights = maps[volume][z]
    step = -(-max(weights.shape) // WINDOW)
    ends, scale = _weight_scale(weights)
    told = f"Volume {volume}, slice {z} of those trained on, {_by(weights.shape)} pixels"
    if step > 1:
        told += f"; each pixel shows the greatest weight of {step} x {step}"
    picture = colour_log(_greatest(weights, step), *ends)
    return {"figure": _figure(picture, f"{told}."), **scale}


def _weight_maps(path: Path) -> dict[str, NDArray[Any]]:
    """The weights (z, y, x) of each volume, by its number.

    Raises:
        InputError: if the file is damaged, or of another kind.
    """
    tensors = read_tensors(path)[0]
    try:
        maps = {n: tensors[f"weights.{n}"].numpy() for n in _in_order(t[8:] for t in tensors)}
    except (KeyError, TypeError):  # a tensor has another name, or a type that NumPy lacks
        maps = {}
    if not maps or not all(_is_weight_map(each) for each in maps.values()):
        raise InputError(f"{path}: does not hold weight maps as train keeps them.")
    return maps


def _is_weight_map(weights: NDArray[Any]) -> bool:
    """Whether these are finite float32 numbers (z, y, x) of 0 and more."""
    if weights.dtype != np.float32 or weights.ndim != 3 or weights.size == 0:
        return False
    return bool(np.isfinite(weights).all() and weights.min() >= 0)


def _colours(classes: int) -> list[str]:
    """How the colours of so many classes are written in HTML."""
    return ["#" + bytes(colour).hex() for colour in colour_classes(np.arange(classes)[None])[0]]


# A segmentation


def _about_store(path: Place, truth: Where | None) -> Facts:
    result = open_result(path)
    right = open_truth(truth, result) if truth is not None else None
    log = read_log(path / EVENTS, result.plan)
    boxes = windows(result)
    images, no_image = image_windows(result, log, boxes)
    plan, counts = result.plan, result.plan.counts
    maps, bar, grouped = charts.tile_maps(
        log.seconds.reshape(counts), result.done.reshape(counts), plan.shape, plan.core, LARGEST_MAP
    )
    return {
        "kind": "store",
        "told": result.told,
        "values": result.class_values,
        "class_colours": _colours(len(result.class_values)),
        "tiles": len(plan),
        "done": int(result.done.sum()),
        "given_up": result.given_up,
        "masked": result.masked,
        "log": log,
        "no_image": no_image,
        "slices": [
            _slice(result, box, image, right) for box, image in zip(boxes, images, strict=True)
        ],
        "probability_bar": Markup(charts.colour_bar("Probability", (0.0, 1.0), "")),
        "truth": place_of(right.path) if right else None,
        **_histograms(result),
        "tile_maps": [(title, Markup(svg)) for title, svg in maps],
        "tile_bar": Markup(bar),
        "grouped": grouped,
        "evaluations": _evaluations(result, right) if right else [],
    }


def _slice(result: Result, box: Box, image: Picture | None, truth: Volume | None) -> Facts:
    """The panels of one slice; what is not computed in it is struck out."""
    known, classes = result.known(box)[0], result.classes(box)[0]
    grey = np.zeros(classes.shape, np.uint8) if image is None else few_greys(image, OVERLAY_GREYS)
    border = None if truth is None else _objects_of(truth.read(box)[0, 0], result.class_values)
    drawn = {"found": overlay(grey, classes != 0, border)}
    if "probabilities" in result.told["outputs"]:
        drawn["probability"] = colour_map(_shown_probability(result, box))
    drawn |= _parts(result, box, classes, image)
    if not known.all():
        drawn = {name: strike_out(picture, ~known) for name, picture in drawn.items()}
    if image is not None:
        drawn = {"image": image, **drawn}
    whole = classes.shape == result.plan.shape[1:]
    return {
        "z": box.start[0],
        "window": "" if whole else str(box),
        "panels": [_figure(picture, name) for name, picture in drawn.items()],
    }


def _objects_of(labels: NDArray[Any], class_values: Sequence[int]) -> NDArray[Any]:
    """Truth with 0 where it is of the first class, whether it holds label values or other ids."""
    if set(np.unique(labels).tolist()) <= set(class_values):
        return np.where(labels == class_values[0], 0, labels)
    return labels


def _shown_probability(result: Result, box: Box) -> NDArray[np.uint8]:
    """Of class 1 where there are two; of whichever is largest where there are more."""
    every = result.probabilities(box)[:, 0]
    shown: NDArray[np.uint8] = every[1] if len(every) == 2 else every.max(0)
    return shown


def _parts(
    result: Result, box: Box, classes: NDArray[Any], image: Picture | None
) -> dict[str, Picture]:
    if "instances" in result.told["outputs"]:
        return {"instances": colour_cells(result.read("instances", box)[0], image)}
    if len(result.class_values) == 2:
        return {"parts": colour_cells(ndimage.label(classes == 1)[0], image)}
    return {"classes": colour_classes(classes)}


def _histograms(result: Result) -> Facts:
    """How often each probability is stored, in some storage chunks drawn by chance."""
    if "probabilities" not in result.told["outputs"] or not result.done.any():
        return {"histograms": []}
    counts = np.zeros((len(result.class_values) - 1, 256), np.int64)
    boxes, every = sampled_chunks(result)
    for box in boxes:
        for channel, voxels in enumerate(result.read("probabilities", box)):
            counts[channel] += np.bincount(voxels.ravel(), minlength=256)
    shares = 100 * counts.reshape(len(counts), 32, 8).sum(2) / counts[0].sum()
    edges = np.linspace(0, 1, 33)
    drawn = [
        charts.histogram(f"class {k}", edges, share, "probability", "% of the voxels")
        for k, share in enumerate(shares[:CHANNELS], start=1)
    ]
    return {
        "histograms": [Markup(svg) for svg in drawn],
        "sampled": len(boxes),
        "chunks": every,
        "all_chunks": every <= CHUNKS,
    }


def _evaluations(result: Result, truth: Volume) -> list[Facts]:
    """The scores of each kind that fits the store, or a sentence on why there are none."""
    outputs = result.told["outputs"]
    kinds: list[Kind] = []
    if "probabilities" in outputs and len(result.class_values) == 2:
        kinds.append("isbi")
    kinds += [kind for kind in ("instances", "classes") if kind in outputs]
    found = []
    for kind in kinds:
        try:
            found.append(_scored(evaluate(result.path, truth.path, kind)))
        except InputError as error:
            found.append({"kind": kind, "refused": str(error)})
    return found


def _scored(evaluation: Evaluation) -> Facts:
    rows = []
    for name, score in evaluation.scores.items():
        across = "IoU threshold" if name == "ap_mean" else "threshold"
        x, y = np.array(score.curve).reshape(-1, 2).T
        mark = None
        if score.threshold is not None:
            told = f"best {_digits(score.value)} at {score.threshold:.1f}"
            mark = score.threshold, score.value, told
        label = name.replace("_", " ")
        curve = charts.line_chart(label, [charts.Series(label, x, y)], across, label, mark=mark)
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
