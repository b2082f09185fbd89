"""A few tiles of the real volume, tried before a run: how long one takes, and how much it stores.

Knows the steps of a tile; does not know how many there are to be, or what an hour costs. Reads from
the input and writes to a folder of its own, which is gone afterwards. Of a large tile it holds one
slab, so that it needs little memory beside what a pass takes.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unet_ray import engine as engines
from unet_ray.attempts import Stage
from unet_ray.boxes import Box
from unet_ray.errors import RunError
from unet_ray.intensity import summarise
from unet_ray.memory import room
from unet_ray.planning import Outlook, spread, stored_values
from unet_ray.prediction import Predictor
from unet_ray.preparation import read_tile
from unet_ray.stores import Store, StoreLayout, chunk_of, create_store
from unet_ray.tiles import Tile, TilePlan

SECONDS = 12.0  # after which no more tiles are begun
ROUNDS = 12  # tiles per thread, at most
GREY = 10  # tiles of which one slice each tells the grey values
SLAB_BYTES = 96 << 20  # of voxels read and values written for a tile
Steps = tuple[float, float, float, int]


@dataclass(frozen=True)
class Pilot:
    """What was measured.

    Attributes:
        tiles: how many were tried.
        threads: how many of them side by side.
        under_way: of these, by one worker: one step of each at a time.
        read, predict, write: seconds of each step of a whole tile, the mean.
        stored: bytes of a tile on disk, the mean.
    """

    tiles: int
    threads: int
    under_way: int
    read: float
    predict: float
    write: float
    stored: float

    @property
    def seconds(self) -> float:
        """From one tile to the next, by one worker."""
        return max(self.predict, (self.read + self.predict + self.write) / self.under_way)

    def run_seconds(self, outlook: Outlook) -> float:
        """Of the whole run, after its start."""
        return self.seconds * math.ceil(outlook.tiles / outlook.workers)


def try_tiles(outlook: Outlook, workers: int | None = None) -> Pilot | None:
    """Tries tiles that are evenly spread, as many side by side as a run would on this machine.

    Of each tile one pass is computed; the others take as long, since all have the same shape. Of a
    large one the first slab is read and written.

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
        return Pilot(0, 0, 1, 0.0, 0.0, 0.0, 0.0)
    if outlook.device == "cuda" and not torch.cuda.is_available():
        return None
    threads = _threads(outlook, workers)
    if not threads:
        return None
    with tempfile.TemporaryDirectory(prefix="unet-ray-") as folder:
        worker = _Trial(outlook, Path(folder, "store"))
        stage = Stage("pilot", lambda: worker, outlook.device, under_way=threads)
        tiles = _until(time.monotonic() + SECONDS, spread(outlook.sample, ROUNDS * threads))
        with closing(engines.run(stage, tiles, "local", threads)) as receipts:
            failures = [receipt.error for receipt in receipts if receipt.error]
    if not worker.steps:
        raise RunError(f"{outlook.volume.path}: no tile could be tried: {failures[0]}")
    read, predict, write, stored = map(statistics.mean, zip(*worker.steps, strict=True))
    tried, ahead = len(worker.steps), outlook.under_way
    return Pilot(tried, threads, ahead, read, predict, write, stored)


def _threads(outlook: Outlook, workers: int | None) -> int:
    """How many tiles this machine can have under way, as far as a worker on a GPU or all go."""
    cores = engines.side_by_side("cpu", "local", None)
    passes = 1 if outlook.device == "cuda" else None
    most = outlook.under_way if passes else min(cores, workers or cores)
    there = room() or math.inf
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


def _until(end: float, tiles: Sequence[int]) -> Iterator[int]:
    """Tiles in no order, so that those that time allows are as evenly spread as all are."""
    mixed = np.random.default_rng(0).permutation(tiles)
    return (int(tile) for tile in mixed if time.monotonic() < end)


class _Trial:
    """A worker that times its steps, and computes one pass of each tile."""

    def __init__(self, outlook: Outlook, path: Path) -> None:
        self.steps: list[Steps] = []
        self._warm = threading.local()  # the first pass of a thread takes longer
        self._volume, self._plan = outlook.volume, outlook.plan
        self._outputs, self._nan = outlook.outputs, outlook.nan
        small = self._plan.passes
        network = outlook.network
        voxel = self._volume.shape[0] * self._volume.dtype.itemsize
        self._slab = slab_of(self._plan, voxel, stored_values(network.classes, self._outputs))
        self._one = TilePlan(self._plan.shape, small, self._plan.context, small)
        # What they are exactly changes no time, and little of what is stored.
        intensity = summarise(self._slices(spread(outlook.sample, GREY)))
        self._predictor = Predictor(
            network, self._one, intensity, outlook.precision, outlook.device, outlook.tta
        )
        values = tuple(range(network.classes))
        self._store, self._small = (
            _store(path / name, StoreLayout(plan, values, self._outputs, None))
            for name, plan in (("slab", self._slab), ("pass", self._one))
        )

    def _slices(self, tiles: Sequence[int]) -> NDArray[Any]:
        """The first slices of the cores of some tiles, side by side, (c, n)."""
        found: list[NDArray[Any]] = [np.empty((self._volume.shape[0], 0), self._volume.dtype)]
        for tile in tiles:
            core = self._plan[tile].write
            first = Box(core.start, (core.start[0] + 1, *core.stop[1:]))
            with suppress(RunError):  # the tiles themselves may do better, or tell
                found.append(self._volume.read(first).reshape(self._volume.shape[0], -1))
        return np.concatenate(found, 1)

    def read(self, tile: int) -> tuple[NDArray[Any], float]:
        """The voxels of a slab, and how long those of the tile take."""
        start, volume = time.monotonic(), self._volume
        first, whole = self._first(tile), self._plan[tile].read
        voxels = read_tile(volume, replace(first, index=tile), self._nan)
        layers = self._layers(whole) / self._layers(first.read)
        return voxels, (time.monotonic() - start) * layers

    def _first(self, tile: int) -> Tile:
        """The slab where a tile begins."""
        place = [*np.unravel_index(tile, self._plan.counts)]
        place[0] = place[0] * self._plan.core[0] // self._slab.core[0]
        return self._slab[int(np.ravel_multi_index(place, self._slab.counts))]

    def _layers(self, box: Box) -> int:
        """Layers of the input's chunks along z that a read touches."""
        inside, deep = box.intersect(Box.of(self._plan.shape)), self._volume.chunk[0]
        return max(1, -(-inside.stop[0] // deep) - inside.start[0] // deep)

    def predict(
        self, tile: int, told: tuple[NDArray[Any], float]
    ) -> tuple[dict[str, NDArray[np.uint8]], float, float]:
        """What one pass of a tile gives; and seconds of reading, and of all passes."""
        voxels, read = told
        seen = voxels[(slice(None), *Box.of(self._plan.pass_shape).slices)]
        constant = (seen == seen[:, :1, :1, :1]).all()  # then it is kept once it was computed
        if constant or not getattr(self._warm, "up", False):
            self._predictor(self._one[0], seen, self._outputs)
            self._warm.up = True
        start = time.monotonic()
        found = self._predictor(self._one[0], seen, self._outputs)
        return found, read, (time.monotonic() - start) * self._passes(tile)

    def _passes(self, tile: int) -> int:
        return sum(1 for _ in self._plan.pass_boxes(self._plan[tile]))

    def write(self, tile: int, told: tuple[dict[str, NDArray[np.uint8]], float, float]) -> None:
        """Writes a slab of such passes, and notes what was measured, for the whole tile."""
        found, read, predict = told
        filled = {name: self._filled(values) for name, values in found.items()}
        slab = self._first(tile)
        start = time.monotonic()
        self._store.write(slab, filled)
        parts = self._plan[tile].write.shape[0] / slab.write.shape[0]
        seconds = (time.monotonic() - start) * parts
        one = sum(len(self._small.encoded(n, self._one[0], v)) for n, v in found.items())
        self.steps.append((read, predict, seconds, one * self._passes(tile)))

    def _filled(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A slab of one pass and its mirror images: what is the same twice is stored once."""
        z, y, x = (c // p for c, p in zip(self._slab.core, self._slab.passes, strict=True))
        turned = itertools.cycle(
            [values, values[..., ::-1], values[..., ::-1, :], values[..., ::-1, ::-1]]
        )
        return np.tile(np.concatenate([*itertools.islice(turned, z)], axis=-3), (y, x))


def _store(path: Path, layout: StoreLayout) -> Store:
    create_store(path, layout, {})
    return Store(path, layout.outputs)
