"""Computes all scores of one kind in one pass over prediction and truth.

Handles the sums and means of counts over slices, and the best threshold. Independent of how a
slice or a label table is counted (cuts.py, overlaps.py). metrics.py explains each score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.scores.cuts import Cut, Slice
from unet_ray.scores.overlaps import (
    Matches,
    Overlaps,
    conditional_entropies,
    foreground_information,
    foreground_pair_counts,
    pair_counts,
)
from unet_ray.scores.stacks import Scored, paired

# Accumulated as in Fiji's loops: the fourth is 0.30000000000000004, the last 0.9999999999999999.
THINNED_THRESHOLDS = tuple(accumulate(repeat(0.1, 10), initial=0.0))
THRESHOLDS = THINNED_THRESHOLDS[:10]
IOU_PERCENT = tuple(range(50, 100, 5))

JOINED_AT_ONCE = 64  # tables of pieces are summed in groups, which bounds the memory

Counts = tuple[float, ...] | None
OnPiece = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """A score of a whole image or stack.

    Attributes:
        value: the score; NaN if it is undefined, for example without any object in the truth.
        threshold: the threshold of the best value, the first of equals; None for scores without
            thresholds.
        curve: (threshold, value) at every threshold.
        slices: the value of each slice at `threshold`, if requested.
    """

    value: float
    threshold: float | None = None
    curve: tuple[tuple[float, float], ...] = ()
    slices: tuple[float, ...] = ()


@dataclass(frozen=True)
class ClassScore(Score):
    """A score of each class; `value` is their mean.

    Attributes:
        classes: (class, value) of each class. The value is NaN if the class occurs in neither
            truth nor prediction; the mean skips it.
    """

    classes: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class _Measure:
    """How one score is computed from the counts of slices or label tables.

    Attributes:
        count: returns the counts of one slice or table, or None if the score is undefined in it.
        value: returns the score from the counts of all slices or tables.
        best: `min` or `max`, selects the best value over the thresholds.
        thresholds: the thresholds of the score.
    """

    count: Callable[[Any], Counts]
    value: Callable[[Sequence[Counts]], float]
    best: Callable[..., float] = max
    thresholds: tuple[float, ...] = ()


def isbi_scores(
    prediction: Scored,
    truth: Scored,
    names: Iterable[str] = (),
    watch: OnPiece = lambda done, total: None,
) -> dict[str, Score]:
    """Computes the scores of the ISBI 2012 challenge in one pass over the slices.

    Args:
        prediction: probability of cell, 0 to 1. Integers that are not all 0 or 1 are divided by
            the largest value of their type.
        truth: 0 is membrane; 1, or the largest value of the type, is cell.
        names: scores to compute; all six by default.
        watch: called after each slice with the number of slices done and their total.

    Raises:
        InputError: if the shapes differ or a value is not allowed.
    """
    proposal, cells = paired(prediction, truth)
    measures = {name: ISBI[name] for name in (list(names) or ISBI)}
    counts: dict[str, list[list[Counts]]] = {
        name: [[] for _ in measure.thresholds] for name, measure in measures.items()
    }
    pairs = zip(proposal.probabilities(), cells.cells(), strict=True)
    for done, (probability, true_cells) in enumerate(pairs, start=1):
        section = Slice(probability, true_cells)
        for i, threshold in enumerate(THINNED_THRESHOLDS):
            cut = Cut(section, threshold)
            for name, measure in measures.items():
                if i < len(measure.thresholds):
                    counts[name][i].append(measure.count(cut))
        watch(done, proposal.shape[0])
    return {name: _best(measure, counts[name]) for name, measure in measures.items()}


def _best(measure: _Measure, counts: list[list[Counts]]) -> Score:
    """The score at the best threshold; the first of equals, as in Fiji."""
    values = [measure.value(slice_counts) for slice_counts in counts]
    curve = tuple(zip(measure.thresholds, values, strict=True))
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return Score(math.nan, None, curve, tuple(math.nan for _ in counts[0]))
    best = values.index(measure.best(defined))
    slices = tuple(measure.value([count]) for count in counts[best])
    return Score(values[best], measure.thresholds[best], curve, slices)


def instance_scores(
    prediction: Scored,
    truth: Scored,
    per_slice: bool = False,
    names: Iterable[str] = (),
    watch: OnPiece = lambda done, total: None,
) -> dict[str, Score]:
    """Computes the scores of labelled objects in one pass.

    Args:
        prediction: labels, integers of at least 0.
        truth: labels, likewise.
        per_slice: treats each slice as a separate image: equal labels in two slices are two
            objects. `value` then pools the objects, or the voxel pairs, of all slices.
        names: scores to compute; all six by default.
        watch: called after each piece with the number of pieces done and their total.

    Raises:
        InputError: if the shapes differ or a label is not an integer of at least 0.
    """
    tables = overlap_tables(prediction, truth, per_slice, watch)
    scores = {}
    for name in list(names) or INSTANCES:
        measure = INSTANCES[name]
        counts = [measure.count(table) for table in tables]
        curve = _ap_curve(counts) if name == "ap_mean" else ()
        slices = tuple(measure.value([count]) for count in counts) if per_slice else ()
        scores[name] = Score(measure.value(counts), None, curve, slices)
    return scores


def overlap_tables(
    prediction: Scored,
    truth: Scored,
    per_slice: bool = False,
    watch: OnPiece = lambda done, total: None,
) -> list[Overlaps]:
    """Counts the overlaps of a whole stack, or of each slice, piece by piece.

    Args:
        prediction: labels, integers of at least 0.
        truth: labels, likewise.
        per_slice: returns one table per slice, not one of the stack.
        watch: called after each piece with the number of pieces done and their total.

    Raises:
        InputError: if the shapes differ or a label is not an integer of at least 0.
    """
    predicted, true = paired(prediction, truth)
    parts: list[list[Overlaps]] = [[] for _ in range(predicted.shape[0] if per_slice else 1)]
    pieces = list(predicted.pieces())
    for done, piece in enumerate(pieces, start=1):
        labels = true.labels(piece), predicted.labels(piece)
        if per_slice:
            for z, *planes in zip(range(piece.start[0], piece.stop[0]), *labels, strict=True):
                parts[z].append(Overlaps.of(*planes))
        else:
            parts[0].append(Overlaps.of(*labels))
            if len(parts[0]) == JOINED_AT_ONCE:
                parts[0] = [Overlaps.joined(parts[0])]
        watch(done, len(pieces))
    return [Overlaps.joined(part) for part in parts]


def class_scores(tables: Sequence[Overlaps], per_slice: bool = False) -> dict[str, Score]:
    """Computes accuracy, IoU and Dice of class maps; the last two are `ClassScore`.

    Args:
        tables: from `overlap_tables`; equal labels must be the same class.
        per_slice: also returns the value of each table, as the value of a slice.
    """
    whole = Overlaps.joined(tables)
    classes = np.union1d(whole.truth, whole.prediction)
    totals = _of_classes(whole, classes)
    slices = [_of_classes(table, classes) for table in tables] if per_slice else []
    accuracies = tuple(_accuracy(table) for table in tables) if per_slice else ()
    scores = {"accuracy": Score(_accuracy(whole), slices=accuracies)}
    for name in ("iou", "dice"):
        means = tuple(_mean(values[name]) for values in slices)
        by_class = tuple(zip(classes.tolist(), totals[name].tolist(), strict=True))
        scores[name] = ClassScore(_mean(totals[name]), slices=means, classes=by_class)
    return scores


def _accuracy(table: Overlaps) -> float:
    return int(table.voxels[table.truth == table.prediction].sum()) / table.total


def _of_classes(table: Overlaps, classes: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """IoU and Dice of each class; NaN for a class that does not occur."""
    correct = np.array(
        [table.voxels[(table.truth == c) & (table.prediction == c)].sum() for c in classes]
    )
    both = np.array(
        [
            table.voxels[table.truth == c].sum() + table.voxels[table.prediction == c].sum()
            for c in classes
        ]
    )
    with np.errstate(invalid="ignore"):
        return {"iou": correct / (both - correct), "dice": 2 * correct / both}


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def _summed(counts: Sequence[Counts]) -> list[float] | None:
    """The sums over all slices with counts; None if there is no such slice."""
    defined = [count for count in counts if count is not None]
    return [sum(column) for column in zip(*defined, strict=True)] if defined else None


def _ratio(part: float, whole: float, empty: float = math.nan) -> float:
    return part / whole if whole else empty


def _pixel_error(counts: Sequence[Counts]) -> float:
    tp, fp, fn = _summed(counts) or (0, 0, 0)
    return 1 - _ratio(2 * tp, 2 * tp + fp + fn, empty=1.0)


def _pair_f(counts: Sequence[Counts]) -> float:
    """F1 of pairs that are in the same segment of (both, the truth, the prediction)."""
    summed = _summed(counts)
    return _ratio(2 * summed[0], summed[1] + summed[2]) if summed else math.nan


def _pair_error(counts: Sequence[Counts]) -> float:
    return 1 - _pair_f(counts)


def _topology_error(counts: Sequence[Counts]) -> float:
    wrong, pixels = _summed(counts) or (0, 0)
    return _ratio(wrong, pixels)


def _mean_of(value: Callable[[Sequence[Counts]], float]) -> Callable[[Sequence[Counts]], float]:
    """Returns a function that averages `value` over all slices with counts."""

    def mean(counts: Sequence[Counts]) -> float:
        values = [value([count]) for count in counts if count is not None]
        return sum(values) / len(values) if values else math.nan

    return mean


def _information_f(counts: Sequence[Counts]) -> float:
    """F of one slice from its entropies (truth, prediction, joint)."""
    truth, prediction, joint = counts[0] or (0.0, 0.0, 0.0)
    if truth == 0 or prediction == 0:
        return 0.0
    return 2 * (truth + prediction - joint) / (truth + prediction)


def _topology(cut: Cut) -> Counts:
    mismatches = cut.mismatches
    return mismatches.splits + mismatches.mergers, cut.size


ISBI: Mapping[str, _Measure] = {
    "pixel_error": _Measure(Cut.pixels, _pixel_error, min, THRESHOLDS),
    "rand_error": _Measure(lambda cut: pair_counts(cut.overlaps), _pair_error, min, THRESHOLDS),
    "rand_error_foreground": _Measure(
        lambda cut: foreground_pair_counts(cut.overlaps), _pair_error, min, THRESHOLDS
    ),
    "warping_error": _Measure(_topology, _topology_error, min, THRESHOLDS),
    "v_rand": _Measure(
        lambda cut: foreground_pair_counts(cut.thinned), _mean_of(_pair_f), max, THINNED_THRESHOLDS
    ),
    "v_info": _Measure(
        lambda cut: foreground_information(cut.thinned),
        _mean_of(_information_f),
        max,
        THINNED_THRESHOLDS,
    ),
}


def _coverage(table: Overlaps) -> Counts:
    objects = Matches.of(table)
    return float(objects.covered().sum()), objects.truths


def _matched(table: Overlaps, percents: Sequence[int]) -> Counts:
    """The number of true and predicted objects, then of matched objects at each IoU."""
    objects = Matches.of(table)
    return objects.truths + objects.predictions, *(objects.matched(p) for p in percents)


def _precision(counts: Sequence[Counts]) -> float:
    """Mean over the IoU thresholds of TP / (TP + FP + FN)."""
    objects, *matched = _summed(counts) or [0, 0]
    return sum(_ratio(tp, objects - tp) for tp in matched) / len(matched)


def _ap_curve(counts: Sequence[Counts]) -> tuple[tuple[float, float], ...]:
    objects, *matched = _summed(counts) or [0]
    return tuple(
        (percent / 100, _ratio(tp, objects - tp))
        for percent, tp in zip(IOU_PERCENT, matched, strict=True)
    )


def _inside(table: Overlaps) -> Overlaps:
    return table.where(table.truth != 0)


def _bits(table: Overlaps, index: int) -> Counts:
    """Conditional entropy weighted by voxels, so that slices can be averaged by their size."""
    inside = _inside(table)
    return conditional_entropies(inside)[index] * inside.total, inside.total


def _mean_ratio(counts: Sequence[Counts]) -> float:
    part, whole = _summed(counts) or (0, 0)
    return _ratio(part, whole)


INSTANCES: Mapping[str, _Measure] = {
    "seg": _Measure(_coverage, _mean_ratio),
    "ap50": _Measure(lambda table: _matched(table, IOU_PERCENT[:1]), _precision),
    "ap_mean": _Measure(lambda table: _matched(table, IOU_PERCENT), _precision),
    "adapted_rand_error": _Measure(lambda table: pair_counts(_inside(table)), _pair_error),
    "voi_split": _Measure(lambda table: _bits(table, 0), _mean_ratio),
    "voi_merge": _Measure(lambda table: _bits(table, 1), _mean_ratio),
}


# The best value and the short meaning of each score; metrics.py explains them in full.
MEANINGS: dict[str, tuple[int, str]] = {
    "pixel_error": (0, "1 - F1 of cell pixels (not the fraction of wrong pixels)"),
    "rand_error": (0, "pixel pairs wrongly merged or split; membrane counts too"),
    "rand_error_foreground": (0, "the same, within true cells"),
    "warping_error": (0, "fraction of pixels that split or merge cells; shifts are free"),
    "v_rand": (1, "F1 of pixel pairs within true cells, membranes thinned"),
    "v_info": (1, "the same by information: small cells count more"),
    "seg": (1, "mean IoU of each true object with its prediction"),
    "ap50": (1, "matched objects among all true and false ones, at IoU 0.5"),
    "ap_mean": (1, "the same, mean over IoU 0.5 to 0.95"),
    "adapted_rand_error": (0, "voxel pairs wrongly merged or split"),
    "voi_split": (0, "over-segmentation, in bits"),
    "voi_merge": (0, "under-segmentation, in bits"),
    "accuracy": (1, "fraction of correct voxels"),
    "iou": (1, "intersection over union, mean over classes"),
    "dice": (1, "F1, mean over classes"),
}
