"""Trial on a few parts of the volume: measures the time and the disk space of a tile before a run.

Knows the steps of a tile. Does not know the price of a run. A trial first reads a random sample of
passes to count the constant ones, which cost next to nothing. It then runs some passes of both
kinds and writes their outputs to a temporary folder. Large tiles are processed by slab, to save
memory.
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
from unet_ray.segmentation.outlook import Outlook, tile_numbers
from unet_ray.segmentation.run import read_tile
from unet_ray.storage.layout import StoreLayout, chunk_of
from unet_ray.storage.provenance import Provenance
from unet_ray.storage.stores import Store, create_store
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import Tile, TilePlan
from unet_ray.volumes.intensity import summarise

INSPECTIONS = 64  # maximum number of passes that are read to count the constant ones
INSPECT_SECONDS = 6.0  # time limit of these reads
TRIAL_SECONDS = 12.0  # time after which no further pass is started
PASSES_PER_THREAD = 12  # maximum number of passes that are run, per thread
KINDS = 2  # kinds of passes: constant or varied
GREY_VOXELS = 1 << 14  # voxels per channel of each inspected pass that enter the normalisation
SLAB_BYTES = 96 << 20  # maximum size of the voxels read and the values written for a slab


@dataclass(frozen=True)
class Pilot:
    """Measurements of a trial.

    Attributes:
        tiles: number of tiles of which at least one pass was run.
        passes: number of varied passes that were computed and timed.
        threads: number of passes that ran in parallel.
        in_flight: tiles in flight per worker of the planned run.
        read, predict, write: mean seconds of each step for a whole tile.
        stored: mean bytes of a tile on disk.
        first: seconds of a run's first constant pass; later ones are cached. 0 if none was read.
        inspected, constant: number of passes that were read, and of constant ones among them.
        failures: error messages of the passes that could not be read.
        helpers: reader processes per worker, and as many writers; 0 if the worker reads and writes.
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
    inspected: int = 0
    constant: int = 0
    failures: tuple[str, ...] = ()
    helpers: int = 0

    @property
    def seconds(self) -> float:
        """Mean seconds per tile of one worker, with overlapping steps."""
        if self.helpers:
            return max(self.predict, self.read / self.helpers, self.write / self.helpers)
        return max(self.predict, (self.read + self.predict + self.write) / self.in_flight)

    @property
    def needed_helpers(self) -> int:
        """Readers per GPU, and as many writers, that keep it busy; 0 without helpers."""
        slowest = max(self.read, self.write)
        return math.ceil(slowest / self.predict) if self.helpers and self.predict else 0

    def run_seconds(self, outlook: Outlook) -> float:
        """Estimated seconds of the whole run, without startup."""
        parallel = outlook.workers
        if outlook.engine == "local" and outlook.device == "cpu":
            parallel = min(parallel, cluster.usable_cores())  # more workers are no faster
        return self.first + self.seconds * math.ceil(outlook.tiles / parallel)


def try_tiles(outlook: Outlook, workers: int | None = None) -> Pilot | None:
    """Runs a sample of passes on this machine, with as many threads as a run would use.

    All varied passes take the same time, since they have the same shape. Their share is estimated
    from the inspected passes. For each pass, the slab of the tile that contains it is read and
    written.

    Args:
        outlook: the planned run.
        workers: maximum number of threads on a CPU; None for one per core.

    Returns:
        The measurements; all zeros if the run has no tile. None if this machine lacks the device of
        the run, or the memory for one worker.

    Raises:
        RunError: if no pass can be read or run.
    """
    if not outlook.sample:
        return Pilot(0, 0, 0, 1, 0.0, 0.0, 0.0, 0.0)
    if outlook.device == "cuda" and not torch.cuda.is_available():
        return None
    threads = _threads(outlook, workers)
    if not threads:
        return None
    sample = _inspect(outlook)
    with tempfile.TemporaryDirectory(prefix="unet-ray-") as folder:
        worker = _TrialWorker(outlook, sample, Path(folder, "store"))
        stage = Stage("pilot", lambda: worker, outlook.device, in_flight=threads)
        passes = _until(time.monotonic() + TRIAL_SECONDS, sample.mixed(PASSES_PER_THREAD * threads))
        with closing(tries(stage, passes, "local", threads, most=1)) as receipts:
            failures = [receipt.error for receipt, _ in receipts if receipt.error]
    if not (worker.varied if sample.varied else worker.constant):
        raise RunError(f"{outlook.volume.path}: no tile could be processed: {failures[0]}")
    return _summary(outlook, sample, worker, threads)


def _summary(outlook: Outlook, sample: _Sample, worker: _TrialWorker, threads: int) -> Pilot:
    """Scales the measured passes to a tile with the mean number of passes of each kind."""
    inspected, constant = len(sample.varied) + len(sample.constant), len(sample.constant)
    kinds = [(inspected - constant, worker.varied), (constant, worker.constant)]
    measured = [(count, steps) for count, steps in kinds if count and steps]
    means = [
        np.mean([(s.read, s.predict, s.write, s.stored) for s in steps], 0) for _, steps in measured
    ]
    read, predict, write, stored = np.average(means, 0, [count for count, _ in measured]).tolist()
    passes = statistics.mean(_passes_of(outlook.plan, outlook.plan[t]) for t in outlook.sample)
    first = statistics.mean(s.predict for s in worker.varied) if worker.varied else worker.first
    return Pilot(
        tiles=len({step.tile for _, steps in kinds for step in steps}),
        passes=len(worker.varied),
        threads=threads,
        in_flight=outlook.in_flight,
        read=read,
        predict=predict * _passes_in_a_stream(outlook.plan, passes),
        write=write,
        stored=stored * passes,
        first=first if constant else 0.0,
        inspected=inspected,
        constant=constant,
        failures=sample.failures,
        helpers=cluster.HELPERS if outlook.helper_memory else 0,
    )


def _passes_in_a_stream(plan: TilePlan, passes: float) -> float:
    """How often a tile takes as long as a pass that was tried; of a stream it had a warm-up."""
    if not plan.streamed:
        return passes
    warm_up = plan.context.halo[0] // plan.passes[0]
    columns = math.prod(c // p for c, p in zip(plan.core[1:], plan.passes[1:], strict=True))
    # The first tile of a column has the warm-up of all its tiles.
    return (passes + columns * warm_up / plan.counts[0]) / (1 + warm_up)


def _threads(outlook: Outlook, workers: int | None) -> int:
    """Tiles in flight on this machine: of one worker on a GPU, of all workers on a CPU."""
    cores = cluster.side_by_side("cpu", "local", None)
    passes = None if outlook.device == "cpu" else 1
    limit = min(outlook.tiles, outlook.in_flight if passes else min(cores, workers or cores))
    available = memory_available() or math.inf
    fitting = (n for n in range(limit, 0, -1) if outlook.memory.shared_by(n, passes) <= available)
    return next(fitting, 0)


def slab_of(plan: TilePlan, voxel: int, values: int) -> TilePlan:
    """Splits tiles along z into slabs of at most `SLAB_BYTES`, but at least one pass deep.

    Args:
        plan: the tiles.
        voxel: bytes read per voxel.
        values: bytes written per voxel.
    """
    (z, y, x), step = plan.core, plan.passes[0]
    read = voxel * math.prod(plan.read_shape[1:])
    available = SLAB_BYTES - read * plan.context.halo[0]
    slices = min(z, max(step, available // (read + values * y * x) // step * step))
    # A multiple of the stored chunks where possible, so that no chunk is only partly filled.
    multiple = math.lcm(step, chunk_of(plan.core)[0])
    return replace(plan, core=(slices // multiple * multiple or slices, y, x))


@dataclass(frozen=True)
class _Sample:
    """The inspected passes.

    Attributes:
        varied, constant: numbers of the passes of each kind.
        grey: a subset of their voxels, (c, n).
        failures: error messages of the passes that could not be read.
    """

    varied: Sequence[int]
    constant: Sequence[int]
    grey: NDArray[Any]
    failures: tuple[str, ...]

    def mixed(self, limit: int) -> Iterator[int]:
        """At most `limit` of the passes, of both kinds in turn."""
        both = itertools.chain(*itertools.zip_longest(self.varied, self.constant))
        return itertools.islice((n for n in both if n is not None), limit)


def _inspect(outlook: Outlook) -> _Sample:
    """Reads passes in random order, so that they cover the volume even if the time runs out.

    Raises:
        RunError: if no pass can be read.
    """
    passes = _plan_of_passes(outlook.plan)
    varied: list[int] = []
    constant: list[int] = []
    grey, failures = [], []
    numbers = np.random.default_rng(0).permutation(_random_passes(outlook, passes)).tolist()
    for number in _until(time.monotonic() + INSPECT_SECONDS, numbers):
        # Error messages name the tile that contains the pass, not the pass.
        part = replace(passes[number], index=_owner(outlook.plan, passes[number]).index)
        try:
            voxels = read_tile(outlook.volume, part, outlook.nan)
        except RunError as error:
            failures.append(error)
            continue
        alike = constant_value(voxels) is not None and not outlook.plan.streamed
        (constant if alike else varied).append(number)
        flat = voxels.reshape(len(voxels), -1)
        grey.append(flat[:, :: flat.shape[1] // GREY_VOXELS + 1].copy())
    if not grey:
        raise RunError(f"{outlook.volume.path}: no tile could be processed: {failures[0]}")
    return _Sample(varied, constant, np.concatenate(grey, 1), tuple(map(str, failures)))


def _plan_of_passes(plan: TilePlan) -> TilePlan:
    """A plan with the passes of `plan` as its tiles."""
    return replace(plan, core=plan.passes)


def _random_passes(outlook: Outlook, passes: TilePlan) -> list[int]:
    """Random passes of the sampled tiles: one from each of `INSPECTIONS` equal parts."""
    parts = [passes.part(outlook.plan[tile].write) for tile in outlook.sample]
    ends = np.cumsum([part.size for part in parts])
    edges = np.linspace(0, ends[-1], min(INSPECTIONS, int(ends[-1])) + 1)
    offsets = np.unique(np.random.default_rng(0).uniform(edges[:-1], edges[1:]).astype(int))
    numbers: list[int] = []
    for part, end in zip(parts, ends, strict=True):
        start = end - part.size
        inside = (start <= offsets) & (offsets < end)
        numbers += tile_numbers(passes, part, offsets[inside] - start)
    return numbers


def _owner(plan: TilePlan, part: Tile) -> Tile:
    """The tile of `plan` whose core contains the start of the smaller tile `part`."""
    position = [a // c for a, c in zip(part.write.start, plan.core, strict=True)]
    return plan[int(np.ravel_multi_index(position, plan.counts))]


def _passes_of(plan: TilePlan, tile: Tile) -> int:
    return _plan_of_passes(plan).part(tile.write).size


def _until(end: float, numbers: Iterable[int]) -> Iterator[int]:
    """Yields numbers until the time `end`, but at least one for each kind of pass."""
    for count, number in enumerate(numbers):
        if count >= KINDS and time.monotonic() >= end:
            return
        yield number


@dataclass(frozen=True)
class _Steps:
    """Measurements of one pass, in seconds and bytes.

    Attributes:
        tile: number of the tile that contains the pass.
        read, write: estimates for the whole tile.
        predict, stored: measurements of the pass.
    """

    tile: int
    read: float
    predict: float
    write: float
    stored: int


class _TrialWorker:
    """A worker that times its steps; its work items are numbers of passes."""

    def __init__(self, outlook: Outlook, sample: _Sample, path: Path) -> None:
        self.varied: list[_Steps] = []
        self.constant: list[_Steps] = []
        self.first = 0.0  # seconds of a constant pass, measured only if there is no varied pass
        self._warm = threading.local()  # the first pass of a thread is slower and is not timed
        self._volume, self._plan, self._nan = outlook.volume, outlook.plan, outlook.nan
        self._constant, self._has_varied = frozenset(sample.constant), bool(sample.varied)
        self._outputs = outlook.outputs
        network = outlook.network
        self._classes = network.classes
        voxel = self._volume.shape[0] * self._volume.dtype.itemsize
        self._slab = slab_of(self._plan, voxel, stored_values(network.classes, self._outputs))
        self._passes = _plan_of_passes(self._plan)
        # An approximate normalisation suffices: it does not affect time, and hardly affects size.
        self._predictor = Predictor(
            network,
            self._passes,
            summarise(sample.grey),
            outlook.precision,
            outlook.device,
            outlook.tta,
        )
        values = tuple(range(network.classes))
        self._slab_store, self._pass_store = (
            _store(path / name, StoreLayout(plan, values, self._outputs, None))
            for name, plan in (("slab", self._slab), ("pass", self._passes))
        )

    def read(self, number: int) -> tuple[NDArray[Any], float]:
        """Reads the slab of a pass; returns the voxels of the pass and the seconds for its tile."""
        part = self._passes[number]
        tile, slab = _owner(self._plan, part), _owner(self._slab, part)
        start = time.monotonic()
        voxels = read_tile(self._volume, replace(slab, index=tile.index), self._nan)
        seconds = (time.monotonic() - start) * self._layers(tile.read) / self._layers(slab.read)
        inside = part.read.relative_to(slab.read.start)
        return voxels[(slice(None), *inside.slices)], seconds

    def _layers(self, box: Box) -> int:
        """Number of the input's chunk layers along z that a read touches."""
        inside, depth = box.intersect(Box.of(self._plan.shape)), self._volume.chunk[0]
        return max(1, -(-inside.stop[0] // depth) - inside.start[0] // depth)

    def predict(
        self, number: int, timed_voxels: tuple[NDArray[Any], float]
    ) -> tuple[dict[str, NDArray[np.uint8]], float, float]:
        """Returns the outputs of a pass, or zeros if it is constant, and the seconds of both steps.

        A run caches constant passes, so they cost it no time and hardly any disk space.
        """
        voxels, read = timed_voxels
        part = self._passes[number]
        if number in self._constant:
            if not self._has_varied:
                start = time.monotonic()
                self._predictor(part, voxels, self._outputs)
                self.first = max(self.first, time.monotonic() - start)
            return self._zeros(), read, 0.0
        if not getattr(self._warm, "up", False):
            self._predictor(part, voxels, self._outputs)
            self._warm.up = True
        start = time.monotonic()
        outputs = self._predictor(part, voxels, self._outputs)
        return outputs, read, time.monotonic() - start

    def _zeros(self) -> dict[str, NDArray[np.uint8]]:
        core = self._passes.core
        shapes = {"probabilities": (self._classes - 1, *core), "classes": core}
        return {name: np.zeros(shapes[name], np.uint8) for name in self._outputs}

    def write(
        self, number: int, timed_outputs: tuple[dict[str, NDArray[np.uint8]], float, float]
    ) -> None:
        """Writes a slab that is filled with copies of the pass, and records the measurements."""
        outputs, read, predict = timed_outputs
        filled = {name: self._filled(values) for name, values in outputs.items()}
        part = self._passes[number]
        tile, slab = _owner(self._plan, part), _owner(self._slab, part)
        start = time.monotonic()
        self._slab_store.write(slab, filled)
        slabs = tile.write.shape[0] / slab.write.shape[0]
        seconds = (time.monotonic() - start) * slabs
        if number in self._constant:  # constant passes share chunks, which compress them together
            size = sum(len(self._slab_store.encoded(n, slab, v)) for n, v in filled.items())
            stored, kind = round(size * slabs / _passes_of(self._plan, tile)), self.constant
        else:
            stored = sum(len(self._pass_store.encoded(n, part, v)) for n, v in outputs.items())
            kind = self.varied
        kind.append(_Steps(tile.index, read, predict, seconds, stored))

    def _filled(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A slab filled with mirror images of a pass; plain copies would compress too well."""
        z, y, x = (c // p for c, p in zip(self._slab.core, self._slab.passes, strict=True))
        mirrored = itertools.cycle(
            [values, values[..., ::-1], values[..., ::-1, :], values[..., ::-1, ::-1]]
        )
        return np.tile(np.concatenate([*itertools.islice(mirrored, z)], axis=-3), (y, x))


def _store(path: Path, layout: StoreLayout) -> Store:
    create_store(path, layout, Provenance({}))
    return Store(path, layout.outputs)
