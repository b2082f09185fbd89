"""A few tiles of the real volume, tried before a run: how long one takes, and how much it stores.

Knows the steps of a tile; does not know how many there are to be, or what an hour costs. Reads from
the input and writes to a folder of its own, which is gone afterwards.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
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
from unet_ray.mirror import read_mirrored
from unet_ray.planning import Outlook, spread
from unet_ray.prediction import Predictor
from unet_ray.stores import Store, StoreLayout, create_store
from unet_ray.tiles import TilePlan

SECONDS = 12.0  # after which no more tiles are begun
ROUNDS = 5  # tiles per thread, at most
GREY = 10  # tiles of which one slice each tells the grey values
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


def try_tiles(outlook: Outlook, workers: int | None = None) -> Pilot | None:
    """Tries tiles that are evenly spread, as many side by side as a run would on this machine.

    Of each tile one pass is computed; the others take as long, since all have the same shape.

    Args:
        outlook: of the run.
        workers: how many tiles side by side at most.

    Returns:
        None if the device of the run is not in this machine, or if there is nothing to try.

    Raises:
        RunError: if none of them can be read.
    """
    if not outlook.sample or (outlook.device == "cuda" and not torch.cuda.is_available()):
        return None
    cores = engines.side_by_side("cpu", "local", None)
    threads = outlook.under_way if outlook.device == "cuda" else min(cores, workers or cores)
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


def _until(end: float, tiles: Sequence[int]) -> Iterator[int]:
    return (tile for tile in tiles if time.monotonic() < end)


class _Trial:
    """A worker that times its steps, and computes one pass of each tile."""

    def __init__(self, outlook: Outlook, path: Path) -> None:
        self.steps: list[Steps] = []
        self._warm = threading.local()  # the first pass of a thread takes longer
        self._volume, self._plan = outlook.volume, outlook.plan
        self._outputs = outlook.outputs
        small = self._plan.passes
        network = outlook.network
        self._one = TilePlan(self._plan.shape, small, self._plan.context, small)
        # What they are exactly changes no time, and little of what is stored.
        intensity = summarise(self._slices(spread(outlook.sample, GREY)))
        self._predictor = Predictor(
            network, self._one, intensity, outlook.precision, outlook.device, outlook.tta
        )
        values = tuple(range(network.classes))
        self._store, self._small = (
            _store(path / name, StoreLayout(plan, values, self._outputs, None))
            for name, plan in (("whole", self._plan), ("pass", self._one))
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
        """The voxels of a tile, and how long they took."""
        start, volume = time.monotonic(), self._volume
        voxels = read_mirrored(volume.read, volume.shape[1:], self._plan[tile].read)
        return voxels, time.monotonic() - start

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
        """Writes a tile of such passes, and notes what was measured."""
        found, read, predict = told
        whole = {name: self._filled(values) for name, values in found.items()}
        start = time.monotonic()
        self._store.write(self._plan[tile], whole)
        seconds = time.monotonic() - start
        one = sum(len(self._small.encoded(n, self._one[0], v)) for n, v in found.items())
        self.steps.append((read, predict, seconds, one * self._passes(tile)))

    def _filled(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A core of one pass and its mirror images: what is the same twice is stored once."""
        z, y, x = (c // p for c, p in zip(self._plan.core, self._plan.passes, strict=True))
        turned = itertools.cycle(
            [values, values[..., ::-1], values[..., ::-1, :], values[..., ::-1, ::-1]]
        )
        return np.tile(np.concatenate([*itertools.islice(turned, z)], axis=-3), (y, x))


def _store(path: Path, layout: StoreLayout) -> Store:
    create_store(path, layout, {})
    return Store(path, layout.outputs)
