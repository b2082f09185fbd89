"""A store as people look at it: some windows of some slices, some chunks, and how the run went.

Knows which few parts stand for the whole, so that a page about a terabyte is made in seconds;
does not know how anything is drawn.
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
from unet_ray.storage.layout import ARRAYS, LEDGER, SEGMENT
from unet_ray.storage.ledger import committed, quarantined, skipped
from unet_ray.storage.places import PathOrUrl, Place
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import Store
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume

# What bounds the reading, whatever the volume.
SLICES, WINDOW, CHUNKS = 5, 640, 64
LONGEST_TEXT = 4096
FAILURES = 10_000  # tiles of which the first one is kept

# What a damaged shard is met with.
DAMAGE = (ValueError, RuntimeError, OSError)


@dataclass(frozen=True)
class Result:
    """A store that is looked at.

    Attributes:
        path: the store.
        provenance: how it was made.
        plan: its tiles.
        done: which of them are committed.
        given_up: numbers of those that are quarantined.
        masked: how many a mask left out.
        store: its arrays.
    """

    path: Place
    provenance: Provenance
    plan: TilePlan
    done: NDArray[np.bool_]
    given_up: Sequence[int]
    masked: int
    store: Store

    @property
    def class_values(self) -> list[int]:
        """Label value of each class in training."""
        return self.provenance.class_values

    def read(self, output: str, box: Box) -> NDArray[Any]:
        """The voxels of an output, (..., z, y, x)."""
        for index in self.plan.within(box):
            if self.done[index]:
                self.store.require(output, self.plan[index])
        try:
            voxels: NDArray[Any] = np.asarray(self.store.read(output)[(..., *box.slices)])
        except DAMAGE as error:
            raise RunError(
                f"{self._damaged(output, box)}: {output} at {box} cannot be read ({error}); the "
                "file is damaged or missing: repair it with `unet-ray verify --repair`."
            ) from error
        return voxels

    def _damaged(self, output: str, box: Box) -> Place:
        """The first file of a box that cannot be read; the array if each can, by itself."""
        for tile in (self.plan[index] for index in self.plan.within(box)):
            try:
                self.store.read(output)[(..., *tile.write.intersect(box).slices)]
            except DAMAGE:
                return self.store.shard(output, tile)
        return self.path / ARRAYS[output]

    def probabilities(self, box: Box) -> NDArray[np.uint8]:
        """Of all classes, the first one included: (classes, z, y, x)."""
        stored = self.read("probabilities", box)
        rest = np.maximum(255 - stored.sum(0, dtype=np.int64, keepdims=True), 0)
        return np.concatenate([rest.astype(np.uint8), stored])

    def classes(self, box: Box) -> NDArray[Any]:
        """Class numbers, (z, y, x)."""
        if "classes" in self.provenance.outputs:
            return self.read("classes", box)
        classes: NDArray[np.int64] = self.probabilities(box).argmax(0)
        return classes

    def known(self, box: Box) -> NDArray[np.bool_]:
        """Which voxels of a box are computed, (z, y, x)."""
        known = np.zeros(box.shape, bool)
        for tile in self.plan.within(box):
            inside = self.plan[tile].write.intersect(box).relative_to(box.start)
            known[inside.slices] = self.done[tile]
        return known


def open_result(path: Place) -> Result:
    """Opens a store to look at it, finished or not.

    Raises:
        InputError: if there is no store of ours at `path`.
    """
    found = inspect(path)
    if found.what in ("foreign", "damaged"):
        raise InputError(f"{path}: is neither a training run nor an output of segment.")
    if not found.provenance:
        what = "is neither a training run nor an output" if path.exists() else "does not exist"
        raise InputError(f"{path}: {what}; name a folder of train or segment.")
    provenance = found.provenance
    if damage := provenance.damage("plan", "outputs", "class_values"):
        raise InputError(f"{path}: its provenance is damaged ({damage}).")
    plan, outputs = provenance.plan, provenance.outputs
    done = committed(path / LEDGER, len(plan))
    given_up = np.flatnonzero(quarantined(path / LEDGER, len(plan))).tolist()
    masked = int(skipped(path / LEDGER, len(plan)).sum())
    return Result(path, provenance, plan, done, given_up, masked, Store(path, outputs))


def open_truth(truth: PathOrUrl, result: Result) -> Volume:
    """Opens the labels of the volume that was segmented.

    Raises:
        InputError: if they cannot be read or have another shape.
    """
    volume = open_volume(truth)
    if volume.shape != (1, *result.plan.shape):
        found, wanted = (" x ".join(map(str, s)) for s in (volume.shape, (1, *result.plan.shape)))
        raise InputError(
            f"{volume.path}: its shape (c, z, y, x) is {found}, but truth for {result.path} must "
            f"be {wanted}."
        )
    return volume


@dataclass
class RunLog:
    """What the event log says of all starts together.

    Attributes:
        seconds: of each tile, NaN if unknown.
        starts: number of times that `segment` was started.
        start: the facts of the last start that are texts or whole numbers.
        began, ended: times of the first and of the last event, or None.
        working: seconds from each start to the last event before the next, summed.
        voxels: written in that time.
        failed: how often a tile failed.
        failure: what the last of them failed with.
        failures: facts of the first failure of each tile of the plan, of so many tiles.
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
    def known(self) -> NDArray[np.float64]:
        """Seconds of the tiles of which they are known, ascending."""
        return np.sort(self.seconds[np.isfinite(self.seconds)])


def read_log(path: Place, plan: TilePlan) -> RunLog:
    """Adds up the event log of a store; what is not an event of a tile of the plan is left out."""
    log = RunLog(np.full(len(plan), np.nan))
    last = 0.0
    for event in read_events(path):
        now, what, tile = measured(event.get("time")), event.get("event"), event.get("tile")
        if now is None:
            continue
        if event.get("stage", SEGMENT) != SEGMENT:
            continue
        log.began, log.ended = log.began or _date(now), _date(now)
        if what == "start":
            log.starts, log.start = log.starts + 1, _plain(event)
        else:
            log.working += max(0.0, now - last)
        if what == "tile" and type(tile) is int and 0 <= tile < len(plan):
            seconds = measured(event.get("seconds"))
            log.seconds[tile] = math.nan if seconds is None else seconds
            log.voxels += plan[tile].write.size
        elif what == "failed":
            facts = _plain(event)
            log.failed, log.failure = log.failed + 1, str(facts.get("error", "nothing"))
            if type(tile) is int and 0 <= tile < len(plan) and len(log.failures) < FAILURES:
                log.failures.setdefault(tile, facts)
        last = now
    return log


def _plain(event: Mapping[str, Any]) -> dict[str, str | int]:
    """The facts of an event that are whole numbers or texts, these not endless."""
    return {
        name: told[:LONGEST_TEXT] if isinstance(told, str) else told
        for name, told in event.items()
        if isinstance(told, str | int)
    }


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def windows(result: Result) -> list[Box]:
    """Up to `SLICES` windows of one slice each, evenly spaced over what is committed."""
    depth, core = result.plan.shape[0], result.plan.core[0]
    slabs = np.flatnonzero(result.done.reshape(result.plan.counts).any((1, 2)))
    planes = (slabs[:, None] * core + np.arange(core)).ravel()
    planes = planes[planes < depth]
    count = min(SLICES, len(planes))
    return [
        _window(result, int(planes[(2 * i + 1) * len(planes) // (2 * count)])) for i in range(count)
    ]


def _window(result: Result, z: int) -> Box:
    """At most `WINDOW` square voxels of a slice, where tiles are committed: near its middle."""
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
    """Whether a text can be the path of a file at all."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def image_windows(
    result: Result, log: RunLog, boxes: Sequence[Box]
) -> tuple[list[Picture | None], str]:
    """The windows of the image that was segmented; or none, and a sentence that says why."""
    nothing: list[Picture | None] = [None] * len(boxes)
    source = result.provenance
    place = (log.start or {}).get("input")
    if not (isinstance(place, str) and _can_name(place)):
        return nothing, "The event log of this store does not say where its image lies."
    try:
        volume = open_volume(place, channel=source.channel, time=source.time, level=source.level)
        if volume.shape != source.shape:
            return nothing, f"{volume.path} has another shape now, {volume.shape} (c, z, y, x)."
        if volume.identity()["sampled_sha256"] != source.sampled_sha256:
            return nothing, f"{volume.path} holds other voxels now than when it was segmented."
        return [to_grey(volume.read(box)[0, 0]) for box in boxes], ""
    except (InputError, RunError) as error:
        return nothing, str(error)


def sampled_chunks(result: Result) -> tuple[list[Box], int]:
    """Boxes of at most `CHUNKS` committed storage chunks, and how many there are of these."""
    chunk = result.store.read("probabilities").chunks[-3:]
    grid = [n // m for n, m in zip(result.plan.core, chunk, strict=True)]
    tiles, each = np.flatnonzero(result.done), math.prod(grid)
    every = len(tiles) * each
    picks = np.random.default_rng(0).choice(every, min(CHUNKS, every), replace=False)
    boxes = []
    for pick in np.sort(picks).tolist():
        write = result.plan[int(tiles[pick // each])].write
        place = np.unravel_index(pick % each, grid)
        start = [a + int(i) * n for a, i, n in zip(write.start, place, chunk, strict=True)]
        boxes.append(Box.of(chunk).shift(start).intersect(write))
    return [box for box in boxes if box.size], every
