"""Memory estimates for tiles, workers and the driver, in bytes, before anything runs.

Knows the tile plan and the measured sizes of processes. Does not know torch. Tests compare the
estimates with measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unet_ray.engine import cluster
from unet_ray.engine.stages import Stage
from unet_ray.network.arithmetic import (
    CONSTANTS,
    NetworkSize,
    kept_bytes,
    pass_bytes,
    slab_bytes,
)
from unet_ray.network.prediction import Device, Precision
from unet_ray.network.unet import UNet
from unet_ray.segmentation.rules import Rules
from unet_ray.segmentation.settings import Settings
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.streaming import stream_along
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.volume import Volume

# Anonymous memory of an idle worker process, with torch and zarr loaded, on Ray also Ray Data.
# Measured, like the constants below; a test compares them.
PROCESS_BYTES = {"local": 86 << 20, "ray": 185 << 20}
# The allocator keeps freed memory (see `keep_freed_memory`), so the process grows beyond the live
# buffers: by a factor for gaps between buffers, and by a fixed amount for the convolution library.
# glibc adds the alignment to a request before it looks for room. So the gap that a buffer leaves
# between two others does not fit the next buffer of the same size. Measured: up to 1.9.
ALLOCATOR_FACTOR = 2.1
SCRATCH_BYTES = 96 << 20
# The part of it outside the C library's heap, as code that the convolution library generates.
# Measured: 3 MiB.
OUTSIDE_BYTES = 16 << 20
# Anonymous memory of the compiled code and the libraries of the stages after the prediction: of
# pyramid levels alone (measured: 40 MiB), and of objects, too.
PYRAMID_BYTES, LATER_BYTES = 48 << 20, 88 << 20
# Least memory to unite the labels of tiles and to merge their rows; more objects need more, and a
# run refuses more than fit into ``--memory``.
JOIN_BYTES = 128 << 20
# Of a voxel while ids are written: class, mask, label, id, and the id's copy in the encoder.
OBJECT_BYTES = 1 + 1 + 4 + 8 + 8
# Of a voxel while the holes of a tile are filled: its class, mask, label of the background, hole.
HOLE_BYTES = 1 + 1 + 4 + 1
# Anonymous memory of the driver on Ray. Measured with 32 and 4096 tiles; on GPUs with 16384 tiles,
# since their waves have more blocks.
DRIVER_BYTES = {"cpu": 336 << 20, "cuda": 416 << 20, "mps": 416 << 20}
# The driver's flags per tile: requested, pending, committed, quarantined, skipped.
DRIVER_BYTES_PER_TILE = 12


@dataclass(frozen=True)
class WorkerMemory:
    """Memory of one worker, by part, in bytes; `total` is the upper bound that the plan states.

    Attributes:
        process: the interpreter with its libraries.
        index: offsets of the input's strips or tiles; every process that opens the input has them.
        load: peak while the model is loaded: file, network and folded network together.
        weights: weights of the folded network.
        tile: input voxels and output values of a tile, with the cached constant passes.
        copy: copy of voxels or values, or the read overhead, while a tile is read or written.
        forward: peak of one pass; a GPU has it in its own memory, and the host has page-locked
            buffers in its place, which are smaller.
        objects: arrays of a tile in the stages that make objects; 0 without objects.
        later: libraries of the stages after the prediction; 0 without such stages.
        streams: planes that the streams of a tile keep from pass to pass; 0 without streams.
    """

    process: int
    index: int
    load: int
    weights: int
    tile: int
    copy: int
    forward: int
    objects: int = 0
    later: int = 0
    streams: int = 0

    @property
    def total(self) -> int:
        """Memory of the whole worker, including the allocator's overhead."""
        return self.shared_by(1)

    def left_of(self, limit: int) -> int:
        """Returns the bytes of `limit` that a task can use which unites all tiles."""
        return max(0, limit - self.process - self.later - self.index)

    def on(self, engine: str) -> WorkerMemory:
        """The memory of a worker on `engine`, ``local`` or ``ray``."""
        return replace(self, process=PROCESS_BYTES[engine])

    def shared_by(self, threads: int, passes: int | None = None) -> int:
        """Bytes of one process with several tiles in flight.

        Args:
            threads: tiles that are read, predicted or written at the same time.
            passes: how many of them are predicted at the same time; all if None.
        """
        passes = threads if passes is None else passes
        # A tile needs either a pass or a copy, since it is never predicted while read or written.
        transient = passes * max(self.forward, self.copy) + (threads - passes) * self.copy
        live = self.weights + threads * self.tile + transient
        allocated = SCRATCH_BYTES + int(ALLOCATOR_FACTOR * live) + threads * self.streams
        # Memory that is freed after loading is kept, but its pieces may not fit the first passes.
        objects = SCRATCH_BYTES + int(ALLOCATOR_FACTOR * threads * self.objects)
        join = JOIN_BYTES * (self.objects > 0)
        largest = max(self.load + transient, allocated, objects, join)
        return self.process + self.later + self.index + largest

    def helper(self, tiles: int) -> int:
        """Bytes of a process that only reads or writes, with `tiles` tiles per batch."""
        # Each tile exists three times: as data, in transfer, and as Ray stores it.
        live = 3 * tiles * self.tile + self.copy
        return self.process + self.index + SCRATCH_BYTES + int(ALLOCATOR_FACTOR * live)


def worker_bytes(
    net: NetworkSize,
    plan: TilePlan,
    voxel_bytes: int,
    outputs: int,
    overhead: int = 0,
    index: int = 0,
    rules: Rules | None = None,
    later: bool = False,
) -> WorkerMemory:
    """Memory of a Ray worker, one tile at a time; `WorkerMemory.on` converts it to an engine.

    Args:
        net: size of the network.
        plan: the tiles.
        voxel_bytes: bytes of one voxel of the volume, all channels together.
        outputs: uint8 values predicted per voxel.
        overhead: bytes of the input's storage units while a tile is read.
        index: upper bound of the bytes needed to open the input.
        rules: rules of the objects; None without objects.
        later: whether there are stages after the prediction.
    """
    read = math.prod(plan.read_shape) * voxel_bytes
    write = math.prod(plan.core) * outputs
    constants = CONSTANTS * math.prod(plan.passes) * outputs
    if not plan.streamed:
        forward, kept = pass_bytes(net, plan.pass_shape), 0
    else:
        columns = math.prod(c // p for c, p in zip(plan.core[1:], plan.passes[1:], strict=True))
        stream = stream_along(net.levels, plan.passes[0])
        forward = slab_bytes(net, plan.pass_shape)
        kept = columns * kept_bytes(net, stream, plan.pass_shape)
    return WorkerMemory(
        # The larger of both engines, so that the plan does not depend on the engine.
        process=PROCESS_BYTES["ray"],
        index=index,
        load=net.weights * (3 * 4 + net.itemsize),
        weights=net.weights * net.itemsize * net.copies,
        tile=read + write + constants,
        copy=max(write, read, overhead),  # for mirroring and encoding
        forward=forward,
        objects=_object_bytes(plan, rules, outputs + voxel_bytes) if rules else 0,
        later=(LATER_BYTES if rules else PYRAMID_BYTES) * later,
        streams=kept,
    )


def _object_bytes(plan: TilePlan, rules: Rules, input_bytes: int) -> int:
    """Peak of the arrays of a tile while its objects are labelled, or their ids written."""
    # Here, since their compiled code needs memory, and runs without objects do without it.
    from unet_ray.segmentation.components import Connection
    from unet_ray.segmentation.watershed import basin_bytes, margin

    core, connection = Box.of(plan.core), Connection(rules.connect, rules.connectivity)
    writing = core.size * (OBJECT_BYTES + input_bytes)
    width = margin(connection) if rules.split else (0, 0, 0)
    extents = zip(plan.core, width, plan.shape, strict=True)
    read = Box.of([max(c, min(c + 2 * w, n)) for c, w, n in extents])
    labelling = 2 * read.size + HOLE_BYTES * core.size * rules.fill_holes
    labelling += basin_bytes(read, core, connection) if rules.split else 0
    return max(writing, labelling)


def driver_bytes(
    workers: int,
    engine: str,
    device: str,
    tiles: int,
    measuring: int = 0,
    index: int = 0,
    later: int = 0,
) -> int:
    """Memory of the process that starts a run; on the local engine it includes all workers.

    Args:
        workers: bytes of a process with workers.
        engine: ``local`` or ``ray``.
        device: device of the workers.
        tiles: number of tiles in the plan.
        measuring: bytes for measuring the grey values, which ends before the workers start.
        index: upper bound of the bytes needed to open the input.
        later: memory that the stages after the prediction add; see `WorkerMemory`.
    """
    running = workers if engine == "local" else DRIVER_BYTES[device] + index + later
    return DRIVER_BYTES_PER_TILE * tiles + max(running, PROCESS_BYTES[engine] + index + measuring)


# Maximum tiles in flight per GPU: others are read and written while the GPU predicts one.
GPU_TILES = 4
# Size of a batch of tiles that crosses Ray's object store; with twice that, the GPU had to wait.
TILE_BATCH_BYTES = 64 << 20


def needed_memory(
    size: NetworkSize,
    tiles: TilePlan,
    volume: Volume,
    outputs: int,
    rules: Rules | None = None,
    later: bool = False,
) -> WorkerMemory:
    """Memory of a worker for `tiles` of `volume`; see `worker_bytes`."""
    voxel = volume.shape[0] * volume.dtype.itemsize
    overhead = volume.read_overhead(tiles.read_shape)
    return worker_bytes(size, tiles, voxel, outputs, overhead, volume.index_bytes, rules, later)


def in_flight(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Tiles in flight per worker: 1 on a CPU, on a GPU the number that fits into ``--memory``."""
    limit = 1 if device == "cpu" else GPU_TILES
    return next((n for n in range(limit, 1, -1) if memory.shared_by(n, 1) <= settings.memory), 1)


def together(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Tiles per batch that is sent to a GPU of a Ray cluster and back; 1 without such a GPU."""
    if device == "cpu" or settings.engine == "local":
        return 1
    batches, limit = in_flight(memory, device, settings), max(1, TILE_BATCH_BYTES // memory.tile)
    fitting = (
        n for n in range(limit, 1, -1) if memory.shared_by(n * batches, 1) <= settings.memory
    )
    return next(fitting, 1)


def process_bytes(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Bytes of one process: with all workers on a CPU of the local engine, else with one worker."""
    if device == "cpu" and settings.engine == "local":
        return memory.shared_by(cluster.side_by_side(device, "local", settings.workers))
    tiles = in_flight(memory, device, settings) * together(memory, device, settings)
    return memory.shared_by(tiles, passes=1)


def reserved_bytes(memory: WorkerMemory, device: Device, settings: Settings, tiles: int) -> int:
    """Bytes that a process on a CPU reserves before the first of `tiles`; 0 with a GPU.

    That is its plan without the libraries of later stages and without `OUTSIDE_BYTES`.
    """
    if device != "cpu":
        return 0
    local = settings.engine == "local"
    workers = cluster.side_by_side(device, "local", settings.workers) if local else 1
    return memory.shared_by(max(1, min(workers, tiles))) - memory.later - OUTSIDE_BYTES


def helper_bytes(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Bytes of a process that reads or writes for a GPU of a Ray cluster; 0 without such a GPU."""
    if device == "cpu" or settings.engine == "local":
        return 0
    return memory.helper(together(memory, device, settings))


def needed_bytes(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Bytes that a cluster must have for each worker, including its helper processes."""
    helpers = 2 * cluster.HELPERS * helper_bytes(memory, device, settings)
    return process_bytes(memory, device, settings) + helpers


def stored_values(classes: int, outputs: Sequence[str]) -> int:
    """Bytes predicted per voxel: a probability for each class but the first, and the class."""
    return (classes - 1) * ("probabilities" in outputs) + ("classes" in outputs)


def network_size(network: UNet, precision: Precision, tta: bool = False) -> NetworkSize:
    """The properties of a network that its memory depends on."""
    return NetworkSize(
        network.in_channels,
        network.classes,
        network.base_channels,
        network.levels,
        sum(p.numel() for p in network.parameters()),
        {"float32": 4, "bfloat16": 2}[precision],
        tta,
        network.doubling,
        network.orientation,
    )


def in_columns(stage: Stage, plan: TilePlan, settings: Settings) -> Stage:
    """The stage with tiles that continue each other along z, if the plan streams them."""
    if not plan.streamed:
        return stage
    depth, layer = plan.counts[0], math.prod(plan.counts[1:])
    workers = cluster.side_by_side(stage.device, settings.engine, settings.workers, stage.memory)
    parts = min(depth, -(-workers // layer))  # of each column, so that every worker has one
    return replace(stage, layer=layer, longest=-(-depth // parts))
