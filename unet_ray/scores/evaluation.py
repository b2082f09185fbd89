"""Scores a stored prediction against a stored truth.

Handles paths, unet-ray stores, the pairing of slices and the mapping of labels to classes.
Independent of how a score is computed (metrics.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from unet_ray.errors import InputError, refuse_unknown
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
from unet_ray.storage.layout import ARRAYS, INSTANCES, LEDGER, PRIVATE
from unet_ray.storage.ledger import committed, skipped
from unet_ray.storage.places import PathOrUrl, Place, place_of
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import Store
from unet_ray.storage.written import is_made
from unet_ray.units import text_of
from unet_ray.volumes.folder import last_number, slices_by_number
from unet_ray.volumes.omissions import sentences_of
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume

Kind = Literal["isbi", "instances", "classes"]
# The output of a store that each kind of score needs; probabilities p are stored as 255 p.
STORED: dict[str, str] = {"isbi": "probabilities", "instances": "instances", "classes": "classes"}
LARGEST_CLASS = 31
REUSED_IDS = 0.5  # share of ids on two slices that do not overlap
WHITES = (1, 255, 65535)


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Scores of one prediction.

    Attributes:
        kind: the kind of scores.
        scores: each score by its name in metrics.py.
        shape: of the compared stacks, (z, y, x).
        note: how slices and labels were matched, and tiles left out; may be empty.
        labels: the truth's label of each class number; empty if they are equal.
    """

    kind: Kind
    scores: Mapping[str, Score]
    shape: tuple[int, ...]
    note: str = ""
    labels: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return "\n".join(filter(None, [self.note, self.table()]))

    def to_json(self) -> dict[str, Any]:
        """The scores as JSON values; NaN becomes None."""
        values: dict[str, Any] = {name: self._one(score) for name, score in self.scores.items()}
        columns = {name: score.slices for name, score in self.scores.items() if score.slices}
        if columns:
            values["slices"] = [
                {name: _or_none(value) for name, value in zip(columns, row, strict=True)}
                for row in zip(*columns.values(), strict=True)
            ]
        return values

    def _one(self, score: Score) -> Any:
        if isinstance(score, ClassScore):
            by_class = {str(label): _or_none(value) for label, value in score.classes}
            return {**by_class, "mean": _or_none(score.value)}
        if self.kind == "isbi":
            curve = [[threshold, _or_none(value)] for threshold, value in score.curve]
            return {"value": _or_none(score.value), "threshold": score.threshold, "curve": curve}
        return _or_none(score.value)

    def table(self) -> str:
        """The scores as text, one per line, then one line per slice if requested."""
        table = _table("", "score", "at", "best", "meaning", right=(1, 3))
        for name, score in self.scores.items():
            threshold = "" if score.threshold is None else f"{score.threshold:.1f}"
            best, meaning = MEANINGS[name]
            table.add_row(name, _number(score.value), threshold, str(best), meaning)
            for number, value in getattr(score, "classes", ()):
                table.add_row(f"  {self._class(number)}", _number(value), "", "", "")
        columns = {name: score.slices for name, score in self.scores.items() if score.slices}
        if not columns:
            return text_of(table)
        by_slice = _table("slice", *columns, right=range(1, len(columns) + 1))
        for z, row in enumerate(zip(*columns.values(), strict=True)):
            by_slice.add_row(str(z), *map(_number, row))
        return f"{text_of(table)}\n\n{text_of(by_slice)}"

    def _class(self, number: int) -> str:
        label = f" (label {self.labels[number]})" if number < len(self.labels) else ""
        return f"class {number}{label}"


def _table(*columns: str, right: Iterable[int]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number in right else "left", no_wrap=True)
    return table


def _or_none(value: float) -> float | None:
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
        prediction: a volume, a folder of slices, or a unet-ray store, whose output for `kind` is
            scored: probabilities, instances or classes.
        truth: likewise. If two folders differ in their number of slices, slices are paired by
            the last number in their file names.
        kind: ``isbi`` for membranes, ``instances`` for objects, ``classes`` for class maps.
        per_slice: treats each slice as a separate image and reports its scores too.
        watch: called with the number of pieces done and their total.

    Raises:
        InputError: if a file cannot be read or holds a value that is not allowed, a store is
            unfinished, or prediction and truth do not fit each other.
        RunError: if a store lacks a shard.
    """
    refuse_unknown("as", kind, STORED)
    predicted, true = _Opened(prediction, kind), _Opened(truth, kind)
    first, note = _side_by_side(predicted, true)
    notes = [note, predicted.note, true.note]
    # Gaps between slices that are paired by their numbers are intended.
    by_number = first.shape[0] < predicted.volume.shape[1]
    for opened in [predicted] if by_number else [predicted, true]:
        notes += sentences_of(str(opened.path), opened.volume.omissions)
    second = true.stack()
    scores: dict[str, Score]
    labels: tuple[int, ...] = ()
    if kind == "isbi":
        scores = isbi_scores(first, second, watch=watch)
        if not per_slice:
            scores = {k: Score(s.value, s.threshold, s.curve) for k, s in scores.items()}
    elif kind == "instances":
        scores = instance_scores(first, second, per_slice, watch=watch)
        notes.append("" if per_slice else _repeated_ids(second))
    else:
        tables = overlap_tables(first, second, per_slice, watch)
        numbering = _numbering(tables, predicted, true)
        scores = class_scores([numbering.applied(table) for table in tables], per_slice)
        labels, notes = numbering.labels, [*notes, numbering.note()]
    return Evaluation(kind, scores, first.shape, " ".join(filter(None, notes)), labels)


def _repeated_ids(truth: Stack) -> str:
    """A hint if ids are reused for other objects on the next slice, as in numbered frames."""
    shared = moved = 0
    before: NDArray[Any] | None = None
    for labels in truth.slices():
        if before is not None:
            ids = np.intersect1d(labels, before)
            ids = ids[ids != 0]
            overlapping = np.unique(labels[labels == before])
            shared, moved = shared + len(ids), moved + len(np.setdiff1d(ids, overlapping))
        before = labels
    if shared and moved >= REUSED_IDS * shared:
        return (
            "Most ids name another object on the next slice. If slices are numbered one by one, "
            "score them with --per-slice."
        )
    return ""


class _Opened:
    """The prediction or the truth, opened for one kind of score."""

    def __init__(self, source: PathOrUrl | NDArray[Any], kind: Kind) -> None:
        self.class_values: list[int] | None = None
        self.note = ""
        self._scale: float | None = None
        if isinstance(source, np.ndarray):
            self.volume: Volume = open_volume(source)
            self.path: Place | str = self.volume.path
            return
        self.path = path = place_of(source)
        inspected = inspect(path)
        if inspected.is_output:
            provenance = _provenance(inspected)
            path, self.note = _stored(path, provenance, kind)
            self._scale = 255.0 if kind == "isbi" else None
            self.class_values = provenance.class_values
        self.volume = open_volume(path)

    def stack(self, planes: list[int] | None = None) -> Stack:
        """The volume as a stack of the slices `planes`; of all slices by default."""
        return Stack(self.volume, str(self.path), self._scale, planes)


def _provenance(inspected: Found) -> Provenance:
    """The provenance of a store.

    Raises:
        InputError: if its private folder is missing or its provenance is damaged.
    """
    path = inspected.path
    if not inspected.private:
        raise InputError(
            f"{path}: its folder {PRIVATE} is missing, so completeness cannot be checked; copy the "
            "store with its hidden files, or name one of its arrays."
        )
    provenance = inspected.provenance
    if not provenance or provenance.damage("plan", "outputs", "class_values"):
        raise InputError(f"{path}: is an output of unet-ray with damaged metadata.")
    return provenance


def _stored(path: Place, provenance: Provenance, kind: Kind) -> tuple[Place, str]:
    """The path of the array that `kind` needs, and a note on tiles that a mask left out.

    Raises:
        InputError: if the store lacks the output or tiles are missing.
        RunError: if a shard is missing.
    """
    output = STORED[kind]
    if output not in provenance.outputs:
        raise InputError(
            f"{path}: holds {' and '.join(provenance.outputs)}, no {output}, which --as {kind} "
            "needs; set another --as or name another store."
        )
    plan = provenance.plan
    done = committed(path / LEDGER, len(plan))
    masked = skipped(path / LEDGER, len(plan))
    missing, left_out = int((~done & ~masked).sum()), int(masked.sum())
    if missing:
        raise InputError(
            f"{path}: {missing} of {len(plan)} tiles are not done; run the same `unet-ray "
            "segment` without --region."
        )
    if output == INSTANCES and not is_made(path, INSTANCES, plan, len(plan)):
        raise InputError(
            f"{path}: its objects are not finished; run the same `unet-ray segment` again."
        )
    store = Store(path, [output])
    for index in np.flatnonzero(done):
        store.require(output, plan[int(index)])
    note = f"{left_out} of {len(plan)} tiles were left out by a mask and count as 0."
    return path / ARRAYS[output], note if left_out else ""


def _side_by_side(predicted: _Opened, true: _Opened) -> tuple[Stack, str]:
    """The slices of the prediction that have a truth, and a note on how they were paired."""
    results, truths = predicted.volume.slice_files(), true.volume.slice_files()
    if not results or not truths:
        return predicted.stack(), ""
    if len(results) == len(truths):
        for pair in zip(results, truths, strict=True):
            if len({*map(last_number, pair)}) == 2:
                note = f"Slices are compared in order: {pair[0]} with {pair[1]}, ..."
                return predicted.stack(), note
        return predicted.stack(), ""
    planes = slices_by_number(predicted.volume, true.volume)
    if planes is None:
        return predicted.stack(), ""
    note = f"{len(truths)} of {len(results)} slices have a truth, paired by their numbers."
    return predicted.stack(planes), note


@dataclass(frozen=True)
class _Numbering:
    """The mapping of labels to class numbers.

    Attributes:
        truth, prediction: the class number of each label.
        labels: the truth's label of each class number; empty if they are equal.
    """

    truth: Mapping[int, int]
    prediction: Mapping[int, int]
    labels: tuple[int, ...]

    def applied(self, table: Overlaps) -> Overlaps:
        """Converts a table of labels into one of class numbers."""
        truth, prediction = (
            np.array([numbers[label] for label in labels.tolist()], np.uint64)
            for numbers, labels in (
                (self.truth, table.truth),
                (self.prediction, table.prediction),
            )
        )
        return Overlaps(truth, prediction, table.voxels)

    def note(self) -> str:
        """States the mapping if a label differs from its class number and the sides differ."""
        plain = all(k == n for side in (self.truth, self.prediction) for k, n in side.items())
        if plain or all(self.truth.get(k) == n for k, n in self.prediction.items()):
            return ""
        sides = [
            f"{side} {', '.join(f'{label} = {n}' for label, n in numbers.items())}"
            for side, numbers in (("truth", self.truth), ("prediction", self.prediction))
        ]
        return f"Labels read as classes: {'; '.join(sides)}."


def _numbering(tables: Sequence[Overlaps], predicted: _Opened, true: _Opened) -> _Numbering:
    """Maps labels to classes 0, 1, ...; a prediction holds class numbers or the truth's labels."""
    true_labels = np.unique(np.concatenate([table.truth for table in tables])).tolist()
    labels = np.unique(np.concatenate([table.prediction for table in tables])).tolist()
    for opened, held_labels in ((predicted, labels), (true, true_labels)):
        if len(held_labels) > LARGEST_CLASS + 1:
            raise InputError(
                f"{opened.path}: holds {len(held_labels)} labels, too many for a class map (at "
                f"most {LARGEST_CLASS + 1}); score objects with --as instances."
            )
    stored = predicted.class_values is not None
    if not stored and true.class_values is None and _is_mask(labels) and _is_mask(true_labels):
        truth, prediction = ({k: int(k > 0) for k in side} for side in (true_labels, labels))
        return _Numbering(truth, prediction, (0, max(true_labels)) if max(true_labels) > 1 else ())
    values = _class_values(true_labels, predicted, true)
    numbers = _numbers(labels, values, stored)
    if numbers is None and max(labels + values) <= LARGEST_CLASS:
        values = sorted({*labels, *values})
        numbers = _numbers(labels, values, stored=False)
    if numbers is None:
        foreign = next(label for label in labels if label not in values)
        raise InputError(
            f"{predicted.path}: holds {foreign}, which is no class of {true.path} "
            f"({_listed(true_labels)}); --as classes compares class maps."
        )
    true_numbers = {label: values.index(label) for label in true_labels}
    differing = tuple(values) if values != [*range(len(values))] else ()
    return _Numbering(true_numbers, numbers, differing)


def _is_mask(labels: Sequence[int]) -> bool:
    """Whether all labels are 0 or one white value (1, 255 or 65535), which is class 1."""
    white = [label for label in labels if label]
    return not white or (len(white) == 1 and white[0] in WHITES)


def _class_values(labels: list[int], predicted: _Opened, true: _Opened) -> list[int]:
    """The truth's label of each class; a store also lists classes that do not occur.

    Args:
        labels: the labels that occur in the truth.
        predicted: the prediction.
        true: the truth.
    """
    if true.class_values is not None:
        return list(range(len(true.class_values)))
    if predicted.class_values is None:
        return labels
    for values in (predicted.class_values, list(range(len(predicted.class_values)))):
        if set(labels) <= set(values):
            return values
    if len(predicted.class_values) == 2 and _is_mask(labels) and _is_mask(predicted.class_values):
        return [0, max(labels)]
    raise InputError(
        f"{true.path}: holds {_listed(labels)}, but the classes of {predicted.path} are "
        f"{_listed(predicted.class_values)}; --as classes compares class maps."
    )


def _numbers(labels: list[int], values: list[int], stored: bool) -> dict[int, int] | None:
    """The class number of each label of the prediction; None if the labels are no classes.

    Labels are the truth's labels, class numbers, or black and white, tried in this order.

    Args:
        labels: the labels that occur in the prediction.
        values: the truth's label of each class.
        stored: skips the truth's labels, since unet-ray stores hold class numbers.
    """
    truth_labels = [] if stored else [values]
    for candidates in [*truth_labels, list(range(len(values)))]:
        if set(labels) <= set(candidates):
            return {label: candidates.index(label) for label in labels}
    if len(values) == 2 and values[0] == 0 and _is_mask(labels):
        return {label: int(label > 0) for label in labels}
    return None


def _listed(labels: Sequence[int]) -> str:
    shown = ", ".join(map(str, labels[:8]))
    return shown if len(labels) <= 8 else f"{shown}, ... {len(labels)} values"
