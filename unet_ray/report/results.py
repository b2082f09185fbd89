"""Reads the parts of a store that its report shows: windows of slices, chunks, the event log.

Handles the choice of a few representative parts, so that the page about a terabyte takes seconds.
Independent of drawing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError, RunError
from unet_ray.report.pictures import Picture, to_grey
from unet_ray.storage.events import measured, read_events
from unet_ray.storage.inspection import inspect
from unet_ray.storage.layout import ARRAYS, INSTANCES, LEDGER, SEGMENT
from unet_ray.storage.ledger import committed, quarantined, skipped
from unet_ray.storage.places import PathOrUrl, Place
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import Store
from unet_ray.storage.written import is_made
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.omissions import report_omissions
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume

# Bounds of the reading: slices, the side of a window in voxels, and storage chunks.
SLICES, WINDOW, CHUNKS = 5, 640, 64
LONGEST_TEXT = 4096
# Parts of a provenance that a report reads by name.
DRAWN_PARTS = (
    *("plan", "outputs", "class_values", "shape", "sampled_sha256"),
    *("channel", "time", "level"),
)
FAILURES = 10_000  # at most this many tiles whose first failure is stored


@dataclass(frozen=True)
class Result:
    """An output store, opened for a report.

    Attributes:
        path: the store.
        provenance: how it was made.
        outputs: names of its arrays, without unfinished objects.
        plan: its tiles.
        done: whether each tile is committed.
        given_up: indices of the quarantined tiles.
        masked: number of tiles that a mask left out.
        store: its arrays.
    """

    path: Place
    provenance: Provenance
    outputs: tuple[str, ...]
    plan: TilePlan
    done: NDArray[np.bool_]
    given_up: Sequence[int]
    masked: int
    store: Store

    @property
    def class_values(self) -> list[int]:
        """The label value of each class in the training labels."""
        return self.provenance.class_values

    def read(self, output: str, box: Box, channels: slice | None = None) -> NDArray[Any]:
        """Reads a box of an output, (..., z, y, x), and only `channels` of the probabilities.

        Raises:
            RunError: if a shard of a committed tile is missing or damaged; it names the file.
        """
        for index in self.plan.within(box):
            if self.done[index]:
                self.store.require(output, self.plan[index])
        try:
            array = self.store.read(output)
            leading = channels if channels is not None and array.ndim > 3 else ...
            voxels: NDArray[Any] = np.asarray(array[(leading, *box.slices)])
        except Exception as error:  # each codec raises its own errors
            raise RunError(
                f"{self._damaged(output, box)}: {output} at {box} cannot be read ({error}); the "
                "file is damaged or missing: repair it with `unet-ray verify --repair`."
            ) from error
        return voxels

    def _damaged(self, output: str, box: Box) -> Place:
        """The first shard of a box that cannot be read, or the array if each can be read singly."""
        for tile in (self.plan[index] for index in self.plan.within(box)):
            try:
                self.store.read(output)[(..., *tile.write.intersect(box).slices)]
            except Exception:
                return self.store.shard(output, tile)
        return self.path / ARRAYS[output]

    def probabilities(self, box: Box) -> NDArray[np.uint8]:
        """Probabilities times 255 of all classes, including the first: (classes, z, y, x)."""
        stored = self.read("probabilities", box)
        # The first class is not stored. Rounding may bring the sum of the others above 255.
        first = np.maximum(255 - stored.sum(0, dtype=np.int64, keepdims=True), 0)
        return np.concatenate([first.astype(np.uint8), stored])

    def classes(self, box: Box) -> NDArray[Any]:
        """Class numbers, (z, y, x)."""
        if "classes" in self.outputs:
            return self.read("classes", box)
        classes: NDArray[np.int64] = self.probabilities(box).argmax(0)
        return classes

    def computed(self, box: Box) -> NDArray[np.bool_]:
        """Whether each voxel of a box is computed, (z, y, x)."""
        computed = np.zeros(box.shape, bool)
        for tile in self.plan.within(box):
            inside = self.plan[tile].write.intersect(box).relative_to(box.start)
            computed[inside.slices] = self.done[tile]
        return computed


def open_result(path: Place) -> Result:
    """Opens a store, finished or not.

    Raises:
        InputError: if `path` is not an output of segment, or its provenance is damaged.
        RunError: if the metadata of an array are damaged or do not match the provenance.
    """
    inspected = inspect(path)
    if inspected.what in ("foreign", "damaged"):
        raise InputError(f"{path}: is neither a training run nor an output of segment.")
    if not inspected.provenance:
        reason = "is neither a training run nor an output" if path.exists() else "does not exist"
        raise InputError(f"{path}: {reason}; name an output of train or segment.")
    provenance = inspected.provenance
    if damage := provenance.damage(*DRAWN_PARTS):
        raise InputError(f"{path}: its provenance is damaged ({damage}).")
    plan = provenance.plan
    finished = INSTANCES in provenance.outputs and is_made(path, INSTANCES, plan, len(plan))
    outputs = [name for name in provenance.outputs if name != INSTANCES or finished]
    done = committed(path / LEDGER, len(plan))
    given_up = np.flatnonzero(quarantined(path / LEDGER, len(plan))).tolist()
    masked = int(skipped(path / LEDGER, len(plan)).sum())
    store = Store(path, outputs)
    store.require_plan(plan)
    return Result(path, provenance, tuple(outputs), plan, done, given_up, masked, store)


def open_truth(truth: PathOrUrl, result: Result) -> Volume:
    """Opens the true labels of the segmented volume.

    Raises:
        InputError: if they cannot be read or their shape differs from that of `result`.
    """
    volume = open_volume(truth)
    report_omissions(volume.path, volume.omissions, strict=False)
    if volume.shape != (1, *result.plan.shape):
        shape, needed = (" x ".join(map(str, s)) for s in (volume.shape, (1, *result.plan.shape)))
        raise InputError(
            f"{volume.path}: its shape (c, z, y, x) is {shape}, but the truth for {result.path} "
            f"must be {needed}."
        )
    return volume


@dataclass
class RunLog:
    """A summary of the event log over all starts of `segment`.

    Attributes:
        seconds: time of each tile, NaN if unknown.
        starts: number of starts.
        start: the facts of the last start that are texts or integers.
        began, ended: dates of the first and of the last event, or None.
        working: seconds from each start to its last event, summed.
        voxels: voxels written in that time.
        failed: number of failures of tiles.
        failure: error of the last failure.
        failures: facts of the first failure of a tile, by tile, for at most `FAILURES` tiles.
    """

    seconds: NDArray[np.float64]
    starts: int = 0
    start: Mapping[str, Any] | None = None
    began: str | None = None
    ended: str | None = None
    working: float = 0.0
    voxels: int = 0
    failed: int = 0
    failure: str = ""
    failures: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def sorted_seconds(self) -> NDArray[np.float64]:
        """Times of all tiles with a time, in seconds, ascending."""
        return np.sort(self.seconds[np.isfinite(self.seconds)])


def read_log(path: Place, plan: TilePlan) -> RunLog:
    """Summarises the event log of a store; skips tiles that are not in the plan."""
    log = RunLog(np.full(len(plan), np.nan))
    last = 0.0
    for event in read_events(path):
        now, kind, tile = measured(event.get("time")), event.get("event"), event.get("tile")
        if now is None:
            continue
        if event.get("stage", SEGMENT) != SEGMENT:
            continue
        log.began, log.ended = log.began or _date(now), _date(now)
        if kind == "start":
            log.starts, log.start = log.starts + 1, _plain(event)
        else:
            log.working += max(0.0, now - last)
        if kind == "tile" and type(tile) is int and 0 <= tile < len(plan):
            seconds = measured(event.get("seconds"))
            log.seconds[tile] = math.nan if seconds is None else seconds
            log.voxels += plan[tile].write.size
        elif kind == "failed":
            facts = _plain(event)
            log.failed, log.failure = log.failed + 1, str(facts.get("error", "unknown"))
            if type(tile) is int and 0 <= tile < len(plan) and len(log.failures) < FAILURES:
                log.failures.setdefault(tile, facts)
        last = now
    return log


def _plain(event: Mapping[str, Any]) -> dict[str, str | int]:
    """The facts of an event that are integers or texts; long texts are cut."""
    return {
        name: value[:LONGEST_TEXT] if isinstance(value, str) else value
        for name, value in event.items()
        if isinstance(value, str | int)
    }


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def windows(result: Result) -> list[Box]:
    """At most `SLICES` windows, each in one slice, evenly spaced over the committed slices."""
    depth, core = result.plan.shape[0], result.plan.core[0]
    slabs = np.flatnonzero(result.done.reshape(result.plan.counts).any((1, 2)))
    planes = (slabs[:, None] * core + np.arange(core)).ravel()
    planes = planes[planes < depth]
    count = min(SLICES, len(planes))
    return [
        _window(result, int(planes[(2 * i + 1) * len(planes) // (2 * count)])) for i in range(count)
    ]


def _window(result: Result, z: int) -> Box:
    """At most `WINDOW` x `WINDOW` voxels on committed tiles, near the centre of slice `z`."""
    core, extents = np.array(result.plan.core[1:]), np.array(result.plan.shape[1:])
    tiles = np.argwhere(result.done.reshape(result.plan.counts)[z // result.plan.core[0]])
    centres = np.minimum(tiles * core + core // 2, extents)
    centre = centres[np.abs(centres - extents / 2).max(1).argmin()]
    low, high = tiles.min(0) * core, (tiles.max(0) + 1) * core
    size = np.minimum(extents, WINDOW)
    start = np.clip(centre - size // 2, low, np.maximum(low, high - size))
    start = np.clip(start, 0, extents - size)
    return Box((z, *start.tolist()), (z + 1, *(start + size).tolist()))


def _can_name(path: str) -> bool:
    """Whether a text is a valid path of a file."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def image_windows(
    result: Result, log: RunLog, boxes: Sequence[Box]
) -> tuple[list[Picture | None], str]:
    """The windows of the segmented image, or None for each and the reason."""
    missing: list[Picture | None] = [None] * len(boxes)
    source = result.provenance
    place = (log.start or {}).get("input")
    if not (isinstance(place, str) and _can_name(place)):
        return missing, "The event log of this store does not name the image."
    try:
        volume = open_volume(place, channel=source.channel, time=source.time, level=source.level)
        if volume.shape != source.shape:
            return missing, f"{volume.path} now has another shape, {volume.shape} (c, z, y, x)."
        if volume.identity()["sampled_sha256"] != source.sampled_sha256:
            return missing, f"The voxels of {volume.path} have changed since the segmentation."
        return [to_grey(volume.read(box)[0, 0]) for box in boxes], ""
    except (InputError, RunError) as error:
        return missing, str(error)


def sampled_chunks(result: Result) -> tuple[list[Box], int]:
    """Boxes of at most `CHUNKS` random committed chunks, and the number of committed chunks."""
    chunk = result.store.read("probabilities").chunks[-3:]
    grid = [n // m for n, m in zip(result.plan.core, chunk, strict=True)]
    tiles, chunks_per_tile = np.flatnonzero(result.done), math.prod(grid)
    chunks = len(tiles) * chunks_per_tile
    picks = np.random.default_rng(0).choice(chunks, min(CHUNKS, chunks), replace=False)
    boxes = []
    for pick in np.sort(picks).tolist():
        write = result.plan[int(tiles[pick // chunks_per_tile])].write
        index = np.unravel_index(pick % chunks_per_tile, grid)
        start = [a + int(i) * n for a, i, n in zip(write.start, index, chunk, strict=True)]
        boxes.append(Box.of(chunk).shift(start).intersect(write))
    return [box for box in boxes if box.size], chunks
