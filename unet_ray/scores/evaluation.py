"""Scoring of files: a prediction and its truth are opened, brought together, scored and shown.

Knows paths, our own stores and which label is which class; what a score is stands in metrics.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError
from unet_ray.scores.overlaps import Overlaps
from unet_ray.scores.stacks import Stack
from unet_ray.scores.totals import (
    MEANINGS,
    ClassScore,
    OnPiece,
    Score,
    class_scores,
    instance_scores,
    isbi_scores,
    overlap_tables,
)
from unet_ray.storage.inspection import Found, inspect
from unet_ray.storage.layout import ARRAYS, LEDGER, PRIVATE
from unet_ray.storage.ledger import committed, skipped
from unet_ray.storage.places import PathOrUrl, Place, place_of
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import Store
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume

Kind = Literal["isbi", "instances", "classes"]
# What a store holds for each kind of score; probabilities are stored as 255 p.
STORED: dict[str, str] = {"isbi": "probabilities", "instances": "instances", "classes": "classes"}
LARGEST_CLASS = 31
WHITES = (1, 255, 65535)


@dataclass(frozen=True)
class Evaluation:
    """Scores of one prediction.

    Attributes:
        kind: which scores.
        scores: by their names in metrics.py.
        shape: of what was compared, (z, y, x).
        note: on how the two were brought together, or nothing.
        labels: the label in the truth of each class number, where they differ.
    """

    kind: Kind
    scores: Mapping[str, Score]
    shape: tuple[int, ...]
    note: str = ""
    labels: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The scores for a machine; NaN becomes None."""
        told: dict[str, Any] = {name: self._one(score) for name, score in self.scores.items()}
        columns = {name: score.slices for name, score in self.scores.items() if score.slices}
        if columns:
            told["slices"] = [
                {name: _known(value) for name, value in zip(columns, row, strict=True)}
                for row in zip(*columns.values(), strict=True)
            ]
        return told

    def _one(self, score: Score) -> Any:
        if isinstance(score, ClassScore):
            each = {str(label): _known(value) for label, value in score.classes}
            return {**each, "mean": _known(score.value)}
        if self.kind == "isbi":
            curve = [[threshold, _known(value)] for threshold, value in score.curve]
            return {"value": _known(score.value), "threshold": score.threshold, "curve": curve}
        return _known(score.value)

    def table(self) -> str:
        """The scores for people, one a line; then one line a slice if that was asked for."""
        lines = [f"{'':22}{'score':>10}  {'at':3}  best  what it tells"]
        for name, score in self.scores.items():
            cut = "" if score.threshold is None else f"{score.threshold:.1f}"
            best, what = MEANINGS[name]
            lines.append(f"{name:22}{_number(score.value):>10}  {cut:3}  {best:>4}  {what}")
            if isinstance(score, ClassScore):
                lines += [f"  {self._class(k):<20}{_number(v):>10}" for k, v in score.classes]
        return "\n".join(lines + self._slice_lines())

    def _class(self, number: int) -> str:
        label = f" (label {self.labels[number]})" if number < len(self.labels) else ""
        return f"class {number}{label}"

    def _slice_lines(self) -> list[str]:
        columns = {name: score.slices for name, score in self.scores.items() if score.slices}
        if not columns:
            return []
        widths = [max(10, len(name) + 2) for name in columns]
        head = "".join(f"{name:>{w}}" for name, w in zip(columns, widths, strict=True))
        rows = zip(*columns.values(), strict=True)
        return ["", f"slice {head}"] + [
            f"{z:<6}" + "".join(f"{_number(v):>{w}}" for v, w in zip(row, widths, strict=True))
            for z, row in enumerate(rows)
        ]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.6f}"


def evaluate(
    prediction: PathOrUrl | NDArray[Any],
    truth: PathOrUrl | NDArray[Any],
    kind: Kind,
    per_slice: bool = False,
    watch: OnPiece = lambda done, total: None,
) -> Evaluation:
    """Scores a stored prediction against a stored truth.

    Args:
        prediction: a volume, a folder of slices or a store of ours, of which what fits `kind` is
            taken: probabilities, instances or classes.
        truth: likewise; of two folders that differ in their number of slices, those slices are
            compared whose file names end in the same number.
        kind: ``isbi`` for membranes, ``instances`` for objects, ``classes`` for class maps.
        per_slice: each slice is an image of its own, and its scores are told too.
        watch: called with the number of pieces done and their total.

    Raises:
        InputError: if files cannot be read, do not fit each other, or hold what is not allowed.
    """
    found, right = _Opened(prediction, kind), _Opened(truth, kind)
    first, note = _side_by_side(found, right)
    notes = [note, found.note, right.note]
    second = right.stack()
    scores: dict[str, Score]
    labels: tuple[int, ...] = ()
    if kind == "isbi":
        scores = isbi_scores(first, second, watch=watch)
        if not per_slice:
            scores = {k: Score(s.value, s.threshold, s.curve) for k, s in scores.items()}
    elif kind == "instances":
        scores = instance_scores(first, second, per_slice, watch=watch)
    else:
        tables = overlap_tables(first, second, per_slice, watch)
        numbering = _numbering(tables, found, right)
        scores = class_scores([numbering.applied(table) for table in tables], per_slice)
        labels, notes = numbering.labels, [*notes, numbering.note()]
    return Evaluation(kind, scores, first.shape, " ".join(filter(None, notes)), labels)


class _Opened:
    """One of the two files, opened as what `kind` needs of it."""

    def __init__(self, source: PathOrUrl | NDArray[Any], kind: Kind) -> None:
        self.class_values: list[int] | None = None
        self.note = ""
        self._scale: float | None = None
        if isinstance(source, np.ndarray):
            self.volume: Volume = open_volume(source)
            self.path: Place | str = self.volume.path
            return
        self.path = path = place_of(source)
        found = inspect(path)
        if found.is_output:
            provenance = _provenance(found)
            path, self.note = _stored(path, provenance, kind)
            self._scale = 255.0 if kind == "isbi" else None
            self.class_values = provenance.class_values
        self.volume = open_volume(path)

    def stack(self, planes: list[int] | None = None) -> Stack:
        """The volume as a stack of some of its slices."""
        return Stack(self.volume, str(self.path), self._scale, planes)


def _provenance(found: Found) -> Provenance:
    """How a store was made.

    Raises:
        InputError: if it does not say so.
    """
    path = found.path
    if not found.private:
        raise InputError(
            f"{path}: its folder {PRIVATE} is missing, so nothing says whether it is whole; copy "
            "it with hidden files, or name one of its arrays."
        )
    provenance = found.provenance
    if not provenance or provenance.damage("plan", "outputs", "class_values"):
        raise InputError(f"{path}: is an output of unet-ray with damaged metadata.")
    return provenance


def _stored(path: Place, provenance: Provenance, kind: Kind) -> tuple[Place, str]:
    """The array of a store that holds what `kind` needs, all of it; and what a mask left out."""
    what = STORED[kind]
    if what not in provenance.outputs:
        raise InputError(
            f"{path}: holds {' and '.join(provenance.outputs)}, no {what}, which --as {kind} "
            "needs; give another --as or another store."
        )
    plan = provenance.plan
    done = committed(path / LEDGER, len(plan))
    masked = skipped(path / LEDGER, len(plan))
    missing, left_out = int((~done & ~masked).sum()), int(masked.sum())
    if missing:
        raise InputError(
            f"{path}: {missing} of {len(plan)} tiles are not done; finish it with the same "
            "`unet-ray segment` and no --region."
        )
    store = Store(path, [what])
    for number in np.flatnonzero(done):
        store.require(what, plan[int(number)])
    counts = f"{left_out} of {len(plan)} tiles were left out by a mask and count as 0."
    return path / ARRAYS[what], counts if left_out else ""


def _side_by_side(found: _Opened, right: _Opened) -> tuple[Stack, str]:
    """The slices of the prediction that have a truth, and a sentence if they are not all.

    A sequence of the Cell Tracking Challenge has many result frames, mask000.tif and on, and a
    truth, man_seg021.tif, for a few of them.
    """
    results, truths = found.volume.slice_files(), right.volume.slice_files()
    if not results or not truths:
        return found.stack(), ""
    if len(results) == len(truths):
        for pair in zip(results, truths, strict=True):
            if len({*map(_last_number, pair)}) == 2:
                return found.stack(), f"Slices are compared in order: {pair[0]} with {pair[1]}, ..."
        return found.stack(), ""
    by_number = {_last_number(name): z for z, name in enumerate(results)}
    once = len(by_number) == len(results) and len({*map(_last_number, truths)}) == len(truths)
    if not once or None in by_number:
        return found.stack(), ""
    for name in truths:
        if _last_number(name) not in by_number:
            raise InputError(
                f"{found.path}: has no slice numbered as {name} of {right.path}; slices of "
                "folders of different length are compared by the last number of their names."
            )
    note = f"{len(truths)} of {len(results)} slices have a truth, found by their numbers."
    return found.stack([by_number[_last_number(name)] for name in truths]), note


def _last_number(name: str) -> int | None:
    numbers = re.findall(r"[0-9]+", os.path.splitext(name)[0])
    return int(numbers[-1]) if numbers else None


@dataclass(frozen=True)
class _Numbering:
    """Which label is which class.

    Attributes:
        truth, prediction: the class number of each label.
        labels: the label in the truth of each class.
    """

    truth: Mapping[int, int]
    prediction: Mapping[int, int]
    labels: tuple[int, ...]

    def applied(self, table: Overlaps) -> Overlaps:
        """A table of labels as one of class numbers."""
        truth, prediction = (
            np.array([names[label] for label in labels.tolist()], np.uint64)
            for names, labels in (
                (self.truth, table.truth),
                (self.prediction, table.prediction),
            )
        )
        return Overlaps(truth, prediction, table.voxels)

    def note(self) -> str:
        """How labels were read, if one is not the number of its class and the sides differ."""
        plain = all(k == n for names in (self.truth, self.prediction) for k, n in names.items())
        if plain or all(self.truth.get(k) == n for k, n in self.prediction.items()):
            return ""
        sides = [
            f"{side} {', '.join(f'{label} = {n}' for label, n in names.items())}"
            for side, names in (("truth", self.truth), ("prediction", self.prediction))
        ]
        return f"Labels read as classes: {'; '.join(sides)}."


def _numbering(tables: Sequence[Overlaps], found: _Opened, right: _Opened) -> _Numbering:
    """Classes are 0, 1, ...; a prediction holds their numbers or the label values of the truth."""
    theirs = np.unique(np.concatenate([table.truth for table in tables])).tolist()
    ours = np.unique(np.concatenate([table.prediction for table in tables])).tolist()
    for opened, labels in ((found, ours), (right, theirs)):
        if len(labels) > LARGEST_CLASS + 1:
            raise InputError(
                f"{opened.path}: holds {len(labels)} labels, too many for a class map; objects "
                "are scored with --as instances."
            )
    stored = found.class_values is not None
    if not stored and right.class_values is None and _is_mask(ours) and _is_mask(theirs):
        truth, prediction = ({k: int(k > 0) for k in each} for each in (theirs, ours))
        return _Numbering(truth, prediction, (0, max(theirs)) if max(theirs) > 1 else ())
    values = _class_values(theirs, found, right)
    known = _numbers(ours, values, stored)
    if known is None and max(ours + values) <= LARGEST_CLASS:
        values = sorted({*ours, *values})
        known = _numbers(ours, values, stored=False)
    if known is None:
        strange = next(label for label in ours if label not in values)
        raise InputError(
            f"{found.path}: holds {strange}, which is no class of {right.path} "
            f"({_few(theirs)}); --as classes compares class maps."
        )
    numbers = {label: values.index(label) for label in theirs}
    return _Numbering(numbers, known, tuple(values) if values != [*range(len(values))] else ())


def _is_mask(labels: Sequence[int]) -> bool:
    """Whether labels are black and white, one of them perhaps missing: then 255 is 1."""
    white = [label for label in labels if label]
    return not white or (len(white) == 1 and white[0] in WHITES)


def _class_values(theirs: list[int], found: _Opened, right: _Opened) -> list[int]:
    """The label value of each class in the truth; a store knows also those that do not occur."""
    if right.class_values is not None:
        return list(range(len(right.class_values)))
    if found.class_values is None:
        return theirs
    for values in (found.class_values, list(range(len(found.class_values)))):
        if set(theirs) <= set(values):
            return values
    if len(found.class_values) == 2 and _is_mask(theirs) and _is_mask(found.class_values):
        return [0, max(theirs)]
    raise InputError(
        f"{right.path}: holds {_few(theirs)}, but the classes of {found.path} are "
        f"{_few(found.class_values)}; --as classes compares class maps."
    )


def _numbers(ours: list[int], values: list[int], stored: bool) -> dict[int, int] | None:
    """The class number of each label of the prediction: label values, numbers, or black and white.

    A store of ours holds class numbers. None if the labels are none of these.
    """
    meanings = [] if stored else [values]
    for labels in [*meanings, list(range(len(values)))]:
        if set(ours) <= set(labels):
            return {label: labels.index(label) for label in ours}
    if len(values) == 2 and values[0] == 0 and _is_mask(ours):
        return {label: int(label > 0) for label in ours}
    return None


def _few(labels: Sequence[int]) -> str:
    shown = ", ".join(map(str, labels[:8]))
    return shown if len(labels) <= 8 else f"{shown}, ... {len(labels)} values"
