"""Parts of the real volume, tried before a run: how long a tile takes, and how much it stores.

Knows the steps of a tile; does not know how many there are to be, or what an hour costs. First some
passes from all over are read, to see how many are constant, which cost next to nothing; then some
of both kinds are tried. Reads from the input and writes to a folder of its own, which is gone
afterwards. Of a large tile it holds one slab, so that it needs little memory beside what a pass
takes.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unet_ray.engine import cluster
from unet_ray.engine.rounds import tries
from unet_ray.engine.stages import Stage
from unet_ray.errors import RunError
from unet_ray.machine import memory_available
from unet_ray.network.prediction import Predictor, constant_value
from unet_ray.segmentation.memory import stored_values
from unet_ray.segmentation.outlook import Outlook, numbered
from unet_ray.segmentation.run import read_tile
from unet_ray.storage.layout import StoreLayout, chunk_of
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import Store, create_store
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import Tile, TilePlan
from unet_ray.volumes.intensity import summarise

LOOKS = 64  # passes that are read to see whether they are constant
LOOK_SECONDS = 6.0  # after which no more are read
SECONDS = 12.0  # after which none is tried any more
ROUNDS = 12  # passes tried per thread, at most
KINDS = 2  # of passes: constant or not
GREY = 1 << 14  # voxels of each pass that tell the grey values
SLAB_BYTES = 96 << 20  # of voxels read and values written for a tile


@dataclass(frozen=True)
class Pilot:
    """What was measured.

    Attributes:
        tiles: of how many tiles some part was tried.
        passes: how many passes were computed for it, and timed.
        threads: how many of them side by side.
        in_flight: of these, by one worker: one step of each at a time.
        helpers: processes that read for it, and as many that write; 0 if it does so itself.
        read, predict, write: seconds of each step of a whole tile, the mean.
        stored: bytes of a tile on disk, the mean.
        first: seconds of the first constant pass of a run; 0 if none was seen.
        looks, constant: passes that were read, and how many of them were constant.
        failures: why others could not be read, one sentence each.
    """

    tiles: int
    passes: int
    threads: int
    in_flight: int
    read: float
    predict: float
    write: float
    stored: float
    first: float = 0.0
    looks: int = 0
    constant: int = 0
    failures: tuple[str, ...] = ()
    helpers: int = 0

    @property
    def seconds(self) -> float:
        """From one tile to the next, by one worker."""
        if self.helpers:
            return max(self.predict, self.read / self.helpers, self.write / self.helpers)
        return max(self.predict, (self.read + self.predict + self.write) / self.in_flight)

    def run_seconds(self, outlook: Outlook) -> float:
        """Of the whole run, after its start."""
        at_once = outlook.workers
        if outlook.engine == "local" and outlook.device == "cpu":
            at_once = min(at_once, cluster.usable_cores())  # more gain nothing
        return self.first + self.seconds * math.ceil(outlook.tiles / at_once)


def try_tiles(outlook: Outlook, workers: int | None = None) -> Pilot | None:
    """Tries passes from all over the tiles, as many side by side as a run would on this machine.

    All passes that are not constant take as long, since they have the same shape; how many there
    are is told by those that were read. With a pass its slab of the tile is read and written.

    Args:
        outlook: of the run.
        workers: how many tiles side by side at most.

    Returns:
        What was measured; zeros if no tile is asked for. None if the device of the run, or memory
        for one worker, is not in this machine.

    Raises:
        RunError: if none of them can be read.
    """
    if not outlook.sample:
        return Pilot(0, 0, 0, 1, 0.0, 0.0, 0.0, 0.0)
    if outlook.device == "cuda" and not torch.cuda.is_available():
        return None
    threads = _threads(outlook, workers)
    if not threads:
        return None
    seen = _look(outlook)
    with tempfile.TemporaryDirectory(prefix="unet-ray-") as folder:
        worker = _Trial(outlook, seen, Path(folder, "store"))
        stage = Stage("pilot", lambda: worker, outlook.device, in_flight=threads)
        passes = _until(time.monotonic() + SECONDS, seen.mixed(ROUNDS * threads))
        with closing(tries(stage, passes, "local", threads, most=1)) as tried:
            failures = [receipt.error for receipt, _ in tried if receipt.error]
    if not (worker.varied if seen.varied else worker.constant):
        raise RunError(f"{outlook.volume.path}: no tile could be tried: {failures[0]}")
    return _summed(outlook, seen, worker, threads)


def _summed(outlook: Outlook, seen: _Seen, worker: _Trial, threads: int) -> Pilot:
    """What was measured of passes, as of a tile that has as many of each kind as the mean one."""
    looks, constant = len(seen.varied) + len(seen.constant), len(seen.constant)
    kinds = [(looks - constant, worker.varied), (constant, worker.constant)]
    tried = [(count, steps) for count, steps in kinds if count and steps]
    means = [
        np.mean([(s.read, s.predict, s.write, s.stored) for s in steps], 0) for _, steps in tried
    ]
    read, predict, write, stored = np.average(means, 0, [count for count, _ in tried]).tolist()
    passes = statistics.mean(_passes_of(outlook.plan, outlook.plan[t]) for t in outlook.sample)
    one = statistics.mean(s.predict for s in worker.varied) if worker.varied else worker.first
    return Pilot(
        tiles=len({step.tile for _, steps in kinds for step in steps}),
        passes=len(worker.varied),
        threads=threads,
        in_flight=outlook.in_flight,
        read=read,
        predict=predict * passes,
        write=write,
        stored=stored * passes,
        first=one if constant else 0.0,
        looks=looks,
        constant=constant,
        failures=seen.failures,
        helpers=cluster.HELPERS if outlook.helper_memory else 0,
    )


def _threads(outlook: Outlook, workers: int | None) -> int:
    """How many tiles this machine can have under way, as far as a worker on a GPU or all go."""
    cores = cluster.side_by_side("cpu", "local", None)
    passes = None if outlook.device == "cpu" else 1
    most = min(outlook.tiles, outlook.in_flight if passes else min(cores, workers or cores))
    there = memory_available() or math.inf
    fits = (n for n in range(most, 0, -1) if outlook.memory.shared_by(n, passes) <= there)
    return next(fits, 0)


def slab_of(plan: TilePlan, voxel: int, values: int) -> TilePlan:
    """The same tiles, cut along z until what one holds is little; whole where they are small.

    Args:
        plan: the tiles.
        voxel: bytes read of each voxel.
        values: bytes written for each.
    """
    (z, y, x), step = plan.core, plan.passes[0]
    read = voxel * math.prod(plan.read_shape[1:])
    free = SLAB_BYTES - read * plan.context.halo[0]
    slices = min(z, max(step, free // (read + values * y * x) // step * step))
    # As deep as the chunks that are stored, if it can be.
    whole = math.lcm(step, chunk_of(plan.core)[0])
    return replace(plan, core=(slices // whole * whole or slices, y, x))


@dataclass(frozen=True)
class _Seen:
    """Passes that were read: numbers of those that vary and of constant ones; and grey values.

    And why others could not be.
    """

    varied: Sequence[int]
    constant: Sequence[int]
    grey: NDArray[Any]
    failures: tuple[str, ...]

    def mixed(self, most: int) -> Iterator[int]:
        """At most so many of them, both kinds in turn."""
        both = itertools.chain(*itertools.zip_longest(self.varied, self.constant))
        return itertools.islice((n for n in both if n is not None), most)


def _look(outlook: Outlook) -> _Seen:
    """Reads some passes, in no order, so that those that time allows are from all over as well.

    Raises:
        RunError: if none can be read.
    """
    passes = _plan_of_passes(outlook.plan)
    varied: list[int] = []
    constant: list[int] = []
    grey, failures = [], []
    numbers = np.random.default_rng(0).permutation(_some_passes(outlook, passes)).tolist()
    for number in _until(time.monotonic() + LOOK_SECONDS, numbers):
        one = replace(passes[number], index=_owner(outlook.plan, passes[number]).index)
        try:
            voxels = read_tile(outlook.volume, one, outlook.nan)
        except RunError as error:
            failures.append(error)
            continue
        (varied if constant_value(voxels) is None else constant).append(number)
        flat = voxels.reshape(len(voxels), -1)
        grey.append(flat[:, :: flat.shape[1] // GREY + 1].copy())
    if not grey:
        raise RunError(f"{outlook.volume.path}: no tile could be tried: {failures[0]}")
    return _Seen(varied, constant, np.concatenate(grey, 1), tuple(map(str, failures)))


def _plan_of_passes(plan: TilePlan) -> TilePlan:
    """The same plan with a tile for each pass."""
    return replace(plan, core=plan.passes)


def _some_passes(outlook: Outlook, passes: TilePlan) -> list[int]:
    """Numbers of passes of the sample: one of each of `LOOKS` equal parts, wherever it lies."""
    parts = [passes.part(outlook.plan[tile].write) for tile in outlook.sample]
    ends = np.cumsum([part.size for part in parts])
    edges = np.linspace(0, ends[-1], min(LOOKS, int(ends[-1])) + 1)
    chosen = np.unique(np.random.default_rng(0).uniform(edges[:-1], edges[1:]).astype(int))
    found: list[int] = []
    for part, end in zip(parts, ends, strict=True):
        first = end - part.size
        found += numbered(passes, part, chosen[(first <= chosen) & (chosen < end)] - first)
    return found


def _owner(plan: TilePlan, part: Tile) -> Tile:
    """The tile of `plan` in whose core a smaller one begins."""
    place = [a // c for a, c in zip(part.write.start, plan.core, strict=True)]
    return plan[int(np.ravel_multi_index(place, plan.counts))]


def _passes_of(plan: TilePlan, tile: Tile) -> int:
    return _plan_of_passes(plan).part(tile.write).size


def _until(end: float, numbers: Iterable[int]) -> Iterator[int]:
    """Numbers of passes until it is time to end, but one of each kind in any case."""
    for count, number in enumerate(numbers):
        if count >= KINDS and time.monotonic() >= end:
            return
        yield number


@dataclass(frozen=True)
class _Steps:
    """What was measured of one pass of a tile: seconds and bytes.

    Of `predict` and `stored` what the pass took, of the others what the whole tile would take.
    """

    tile: int
    read: float
    predict: float
    write: float
    stored: int


class _Trial:
    """A worker that times its steps; what it is given are numbers of passes."""

    def __init__(self, outlook: Outlook, seen: _Seen, path: Path) -> None:
        self.varied: list[_Steps] = []
        self.constant: list[_Steps] = []
        self.first = 0.0  # seconds of a constant pass, where no other tells how long one takes
        self._warm = threading.local()  # the first pass of a thread takes longer
        self._volume, self._plan, self._nan = outlook.volume, outlook.plan, outlook.nan
        self._known, self._varied = frozenset(seen.constant), bool(seen.varied)
        self._outputs = outlook.outputs
        network = outlook.network
        self._classes = network.classes
        voxel = self._volume.shape[0] * self._volume.dtype.itemsize
        self._slab = slab_of(self._plan, voxel, stored_values(network.classes, self._outputs))
        self._passes = _plan_of_passes(self._plan)
        # What the grey values are exactly changes no time, and little of what is stored.
        self._predictor = Predictor(
            network,
            self._passes,
            summarise(seen.grey),
            outlook.precision,
            outlook.device,
            outlook.tta,
        )
        values = tuple(range(network.classes))
        self._store, self._small = (
            _store(path / name, StoreLayout(plan, values, self._outputs, None))
            for name, plan in (("slab", self._slab), ("pass", self._passes))
        )

    def read(self, number: int) -> tuple[NDArray[Any], float]:
        """The voxels of a pass; and how long those of its tile take, by those of its slab."""
        one = self._passes[number]
        tile, slab = _owner(self._plan, one), _owner(self._slab, one)
        start = time.monotonic()
        voxels = read_tile(self._volume, replace(slab, index=tile.index), self._nan)
        seconds = (time.monotonic() - start) * self._layers(tile.read) / self._layers(slab.read)
        inside = one.read.relative_to(slab.read.start)
        return voxels[(slice(None), *inside.slices)], seconds

    def _layers(self, box: Box) -> int:
        """Layers of the input's chunks along z that a read touches."""
        inside, deep = box.intersect(Box.of(self._plan.shape)), self._volume.chunk[0]
        return max(1, -(-inside.stop[0] // deep) - inside.start[0] // deep)

    def predict(
        self, number: int, told: tuple[NDArray[Any], float]
    ) -> tuple[dict[str, NDArray[np.uint8]], float, float]:
        """What the pass gives, or nothing but zeros if it is constant; seconds of both steps."""
        voxels, read = told
        one = self._passes[number]
        if number in self._known:  # it costs a run nothing, and is stored in as good as nothing
            if not self._varied:
                start = time.monotonic()
                self._predictor(one, voxels, self._outputs)
                self.first = max(self.first, time.monotonic() - start)
            return self._zeros(), read, 0.0
        if not getattr(self._warm, "up", False):
            self._predictor(one, voxels, self._outputs)
            self._warm.up = True
        start = time.monotonic()
        found = self._predictor(one, voxels, self._outputs)
        return found, read, time.monotonic() - start

    def _zeros(self) -> dict[str, NDArray[np.uint8]]:
        core = self._passes.core
        shapes = {"probabilities": (self._classes - 1, *core), "classes": core}
        return {name: np.zeros(shapes[name], np.uint8) for name in self._outputs}

    def write(self, number: int, told: tuple[dict[str, NDArray[np.uint8]], float, float]) -> None:
        """Writes a slab of such passes, and notes what was measured."""
        found, read, predict = told
        filled = {name: self._filled(values) for name, values in found.items()}
        one = self._passes[number]
        tile, slab = _owner(self._plan, one), _owner(self._slab, one)
        start = time.monotonic()
        self._store.write(slab, filled)
        parts = tile.write.shape[0] / slab.write.shape[0]
        seconds = (time.monotonic() - start) * parts
        if number in self._known:  # many such share a chunk, which tells what it is once
            whole = sum(len(self._store.encoded(n, slab, v)) for n, v in filled.items())
            stored, kind = round(whole * parts / _passes_of(self._plan, tile)), self.constant
        else:
            stored = sum(len(self._small.encoded(n, one, v)) for n, v in found.items())
            kind = self.varied
        kind.append(_Steps(tile.index, read, predict, seconds, stored))

    def _filled(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A slab of one pass and its mirror images: what is the same twice is stored once."""
        z, y, x = (c // p for c, p in zip(self._slab.core, self._slab.passes, strict=True))
        turned = itertools.cycle(
            [values, values[..., ::-1], values[..., ::-1, :], values[..., ::-1, ::-1]]
        )
        return np.tile(np.concatenate([*itertools.islice(turned, z)], axis=-3), (y, x))


def _store(path: Path, layout: StoreLayout) -> Store:
    create_store(path, layout, Provenance({}))
    return Store(path, layout.outputs)
