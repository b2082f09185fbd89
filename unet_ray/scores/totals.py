"""How counts become scores: everything of one kind in one pass over two stacks.

Knows what is summed and what is averaged over slices; what is counted in a slice is in cuts.py,
in labels in overlaps.py. What each score means is in metrics.py.
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

# Summed as Fiji's loops do: the third is 0.30000000000000004, the last 0.9999999999999999.
THINNED_THRESHOLDS = tuple(accumulate(repeat(0.1, 10), initial=0.0))
THRESHOLDS = THINNED_THRESHOLDS[:10]
IOU_PERCENT = tuple(range(50, 100, 5))

JOINED_AT_ONCE = 64  # tables of pieces: their sum is bounded however many pieces there are

Counts = tuple[float, ...] | None
OnPiece = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """A score of a whole image or stack.

    Attributes:
        value: NaN where the score is not defined, as without any object in the truth.
        threshold: where the best value was found, the first of equals; None without thresholds.
        curve: (threshold, value) at every threshold.
        slices: the value of each slice, at the threshold of the stack, if it was asked for.
    """

    value: float
    threshold: float | None = None
    curve: tuple[tuple[float, float], ...] = ()
    slices: tuple[float, ...] = ()


@dataclass(frozen=True)
class ClassScore(Score):
    """A score of each class and their mean, `value`.

    Attributes:
        classes: the value of each class; NaN for one that neither side has, which the mean skips.
    """

    classes: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class _Measure:
    """How one score is made: counted in a cut slice or in a table, then put together.

    Attributes:
        count: what is counted in one slice or image; None if it says nothing.
        value: the score from the counts of all of them.
        best: which of the values at several thresholds is kept.
        thresholds: where slices are cut.
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
    """The scores of the ISBI 2012 challenge, all in one pass over the slices.

    Args:
        prediction: probability of cell, 0 to 1; integers that are not all 0 or 1 are divided by
            the largest number of their type.
        truth: 0 is membrane; 1, or the largest number of the type, is cell.
        names: which scores; all six by default.
        watch: called with the number of slices done and their total.

    Raises:
        InputError: if the shapes differ, or a number is not allowed.
    """
    proposal, cells = paired(prediction, truth)
    wanted = {name: ISBI[name] for name in (list(names) or ISBI)}
    counts: dict[str, list[list[Counts]]] = {
        name: [[] for _ in measure.thresholds] for name, measure in wanted.items()
    }
    both = zip(proposal.probabilities(), cells.cells(), strict=True)
    for done, (plane, right) in enumerate(both, start=1):
        section = Slice(plane, right)
        for i, threshold in enumerate(THINNED_THRESHOLDS):
            cut = Cut(section, threshold)
            for name, measure in wanted.items():
                if i < len(measure.thresholds):
                    counts[name][i].append(measure.count(cut))
        watch(done, proposal.shape[0])
    return {name: _best(measure, counts[name]) for name, measure in wanted.items()}


def _best(measure: _Measure, counts: list[list[Counts]]) -> Score:
    """The best of all thresholds; the first of equals, as in Fiji."""
    values = [measure.value(each) for each in counts]
    curve = tuple(zip(measure.thresholds, values, strict=True))
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return Score(math.nan, None, curve, tuple(math.nan for _ in counts[0]))
    place = values.index(measure.best(defined))
    each = tuple(measure.value([count]) for count in counts[place])
    return Score(values[place], measure.thresholds[place], curve, each)


def instance_scores(
    prediction: Scored,
    truth: Scored,
    per_slice: bool = False,
    names: Iterable[str] = (),
    watch: OnPiece = lambda done, total: None,
) -> dict[str, Score]:
    """The scores of labelled objects, all in one pass.

    Args:
        prediction: labels, integers of 0 or more.
        truth: labels, likewise.
        per_slice: each slice is an image of its own: equal labels of two slices are two objects.
            Scores are then of all objects, or all pairs of voxels, of all slices together.
        names: which scores; all six by default.
        watch: called with the number of pieces done and their total.

    Raises:
        InputError: if the shapes differ, or a label is not an integer of 0 or more.
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
    """The table of overlaps of a whole stack, or one of each slice; read piece by piece.

    Raises:
        InputError: if the shapes differ, or a label is not an integer of 0 or more.
    """
    found, right = paired(prediction, truth)
    parts: list[list[Overlaps]] = [[] for _ in range(found.shape[0] if per_slice else 1)]
    pieces = list(found.pieces())
    for done, piece in enumerate(pieces, start=1):
        both = right.labels(piece), found.labels(piece)
        if per_slice:
            for z, *planes in zip(range(piece.start[0], piece.stop[0]), *both, strict=True):
                parts[z].append(Overlaps.of(*planes))
        else:
            parts[0].append(Overlaps.of(*both))
            if len(parts[0]) == JOINED_AT_ONCE:
                parts[0] = [Overlaps.joined(parts[0])]
        watch(done, len(pieces))
    return [Overlaps.joined(part) for part in parts]


def class_scores(tables: Sequence[Overlaps], per_slice: bool = False) -> dict[str, Score]:
    """Accuracy, IoU and Dice of class maps; the last two are `ClassScore`.

    Args:
        tables: from `overlap_tables`, in which equal numbers are the same class.
        per_slice: also the value of each table.
    """
    whole = Overlaps.joined(tables)
    values = np.union1d(whole.truth, whole.prediction)
    found = _of_classes(whole, values)
    slices = [_of_classes(table, values) for table in tables] if per_slice else []
    shares = tuple(_accuracy(table) for table in tables) if per_slice else ()
    scores = {"accuracy": Score(_accuracy(whole), slices=shares)}
    for name in ("iou", "dice"):
        each = tuple(_mean(one[name]) for one in slices)
        classes = tuple(zip(values.tolist(), found[name].tolist(), strict=True))
        scores[name] = ClassScore(_mean(found[name]), slices=each, classes=classes)
    return scores


def _accuracy(table: Overlaps) -> float:
    return int(table.voxels[table.truth == table.prediction].sum()) / table.total


def _of_classes(table: Overlaps, values: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """IoU and Dice of each of the classes `values`; NaN for one that does not occur."""
    right = np.array(
        [table.voxels[(table.truth == v) & (table.prediction == v)].sum() for v in values]
    )
    both = np.array(
        [
            table.voxels[table.truth == v].sum() + table.voxels[table.prediction == v].sum()
            for v in values
        ]
    )
    with np.errstate(invalid="ignore"):
        return {"iou": right / (both - right), "dice": 2 * right / both}


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _summed(counts: Sequence[Counts]) -> list[float] | None:
    """Sums over slices; None if none of them says anything."""
    told = [count for count in counts if count is not None]
    return [sum(column) for column in zip(*told, strict=True)] if told else None


def _ratio(part: float, whole: float, empty: float = math.nan) -> float:
    return part / whole if whole else empty


def _pixel_error(counts: Sequence[Counts]) -> float:
    tp, fp, fn = _summed(counts) or (0, 0, 0)
    return 1 - _ratio(2 * tp, 2 * tp + fp + fn, empty=1.0)


def _pair_f(counts: Sequence[Counts]) -> float:
    """F of pairs (together in both, in truth, in prediction)."""
    summed = _summed(counts)
    return _ratio(2 * summed[0], summed[1] + summed[2]) if summed else math.nan


def _pair_error(counts: Sequence[Counts]) -> float:
    return 1 - _pair_f(counts)


def _topology_error(counts: Sequence[Counts]) -> float:
    wrong, pixels = _summed(counts) or (0, 0)
    return _ratio(wrong, pixels)


def _mean_of(value: Callable[[Sequence[Counts]], float]) -> Callable[[Sequence[Counts]], float]:
    """The mean over the slices that say something."""

    def mean(counts: Sequence[Counts]) -> float:
        told = [value([count]) for count in counts if count is not None]
        return sum(told) / len(told) if told else math.nan

    return mean


def _information_f(counts: Sequence[Counts]) -> float:
    """F of one slice from its entropies (truth, prediction, both)."""
    truth, prediction, both = counts[0] or (0.0, 0.0, 0.0)
    if truth == 0 or prediction == 0:
        return 0.0
    return 2 * (truth + prediction - both) / (truth + prediction)


def _topology(cut: Cut) -> Counts:
    left = cut.mismatches
    return left.splits + left.mergers, cut.size


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


def _found(table: Overlaps, percents: Sequence[int]) -> Counts:
    """Objects on both sides, then those found at each IoU."""
    objects = Matches.of(table)
    return objects.truths + objects.predictions, *(objects.found(p) for p in percents)


def _precision(counts: Sequence[Counts]) -> float:
    """Mean over the IoU thresholds of TP / (TP + FP + FN)."""
    both, *found = _summed(counts) or [0, 0]
    return sum(_ratio(tp, both - tp) for tp in found) / len(found)


def _ap_curve(counts: Sequence[Counts]) -> tuple[tuple[float, float], ...]:
    both, *found = _summed(counts) or [0]
    return tuple(
        (percent / 100, _ratio(tp, both - tp))
        for percent, tp in zip(IOU_PERCENT, found, strict=True)
    )


def _inside(table: Overlaps) -> Overlaps:
    return table.where(table.truth != 0)


def _bits(table: Overlaps, which: int) -> Counts:
    inside = _inside(table)
    return conditional_entropies(inside)[which] * inside.total, inside.total


def _mean_ratio(counts: Sequence[Counts]) -> float:
    part, whole = _summed(counts) or (0, 0)
    return _ratio(part, whole)


INSTANCES: Mapping[str, _Measure] = {
    "seg": _Measure(_coverage, _mean_ratio),
    "ap50": _Measure(lambda table: _found(table, IOU_PERCENT[:1]), _precision),
    "ap_mean": _Measure(lambda table: _found(table, IOU_PERCENT), _precision),
    "adapted_rand_error": _Measure(lambda table: pair_counts(_inside(table)), _pair_error),
    "voi_split": _Measure(lambda table: _bits(table, 0), _mean_ratio),
    "voi_merge": _Measure(lambda table: _bits(table, 1), _mean_ratio),
}


# The best value and the meaning of each score in a few words; metrics.py explains them in full.
MEANINGS: dict[str, tuple[int, str]] = {
    "pixel_error": (0, "1 - F1 of cell pixels (not the share of wrong ones)"),
    "rand_error": (0, "pixel pairs wrongly joined or parted; membrane counts too"),
    "rand_error_foreground": (0, "the same, within true cells"),
    "warping_error": (0, "pixels that split or merge cells; shifts are forgiven"),
    "v_rand": (1, "cells kept whole and apart, membranes thinned"),
    "v_info": (1, "the same by information: small cells count more"),
    "seg": (1, "overlap of each true object with its prediction"),
    "ap50": (1, "objects found, of all true and false ones, at IoU 0.5"),
    "ap_mean": (1, "the same, mean over IoU 0.5 to 0.95"),
    "adapted_rand_error": (0, "voxel pairs wrongly joined or parted"),
    "voi_split": (0, "bits: how torn true objects are"),
    "voi_merge": (0, "bits: how mixed predicted objects are"),
    "accuracy": (1, "share of voxels that are right"),
    "iou": (1, "overlap over union, mean of the classes"),
    "dice": (1, "twice the overlap over both sizes, mean of the classes"),
}
