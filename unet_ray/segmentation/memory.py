"""Bytes that a tile, a worker and a driver need: sums that can be read, before anything runs.

Knows measured sizes of processes and the plan of a run. Does not know torch. Tests compare it with
measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unet_ray.engine import cluster
from unet_ray.network.arithmetic import CONSTANTS, NetworkSize, pass_bytes
from unet_ray.network.prediction import Device, Precision
from unet_ray.network.unet import UNet
from unet_ray.segmentation.settings import Settings
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.volume import Volume

# Anonymous memory of a worker process that has loaded torch and zarr, and on Ray also Ray Data,
# before it holds any weight or voxel. Measured, as the two below; a test compares.
PROCESS_BYTES = {"local": 165 << 20, "ray": 250 << 20}
# What the allocator keeps beyond what lives at the peak (see `keep_freed_memory`): holes between
# buffers of different sizes, and a fixed part for the convolution library's own code and scratch.
KEPT = 1.65
SCRATCH_BYTES = 96 << 20
# Anonymous memory of the driver of a run on Ray, and what it notes of each tile: is it asked for,
# left, committed, quarantined, skipped. Measured with 32 and with 4096 tiles; where there are GPUs,
# whose waves have more blocks, with 16384.
DRIVER_BYTES = {"cpu": 400 << 20, "cuda": 480 << 20, "mps": 480 << 20}
TILE_NOTES = 12


@dataclass(frozen=True)
class WorkerMemory:
    """What one worker needs, in bytes; `total` is what is promised.

    Attributes:
        process: the interpreter with its libraries.
        index: of the input, which every process opens: where its strips or tiles are.
        load: peak while the model is loaded: file, network and folded network beside each other.
        weights: of the network that predicts.
        tile: voxels read and values to be written, with the constant passes that are kept.
        copy: of voxels or values, while a tile is read or written.
        forward: peak of one pass.
    """

    process: int
    index: int
    load: int
    weights: int
    tile: int
    copy: int
    forward: int

    @property
    def total(self) -> int:
        """All of it together, with what the allocator keeps."""
        return self.shared_by(1)

    def on(self, engine: str) -> WorkerMemory:
        """The same for a worker of this engine, ``local`` or ``ray``."""
        return replace(self, process=PROCESS_BYTES[engine])

    def shared_by(self, threads: int, passes: int | None = None) -> int:
        """Bytes of one process with so many tiles under way.

        Args:
            threads: tiles that are read, predicted or written at the same time.
            passes: of these are predicted at the same time; all of them, if not given.
        """
        passes = threads if passes is None else passes
        # While a tile is read or written no pass of it runs.
        most = passes * max(self.forward, self.copy) + (threads - passes) * self.copy
        work = self.weights + threads * self.tile + most
        return self.process + self.index + max(self.load, SCRATCH_BYTES + int(KEPT * work))

    def helper(self, tiles: int) -> int:
        """Bytes of a process that reads or writes so many tiles together for one that predicts."""
        # What is read or to be written, as it crosses, and as it is put there.
        work = 3 * tiles * self.tile + self.copy
        return self.process + self.index + SCRATCH_BYTES + int(KEPT * work)


def worker_bytes(
    net: NetworkSize,
    plan: TilePlan,
    voxel_bytes: int,
    outputs: int,
    overhead: int = 0,
    index: int = 0,
) -> WorkerMemory:
    """What a worker needs that reads, predicts and writes one tile at a time.

    Args:
        net: size of the network.
        plan: the tiles.
        voxel_bytes: bytes of one voxel of the volume, all channels.
        outputs: uint8 values stored per voxel.
        overhead: bytes of the input's storage units while a tile is read.
        index: bytes that opening the input takes.
    """
    read = math.prod(plan.read_shape) * voxel_bytes
    write = math.prod(plan.core) * outputs
    constants = CONSTANTS * math.prod(plan.passes) * outputs
    forward = pass_bytes(net, (plan.pass_shape[0], plan.pass_shape[1], plan.pass_shape[2]))
    return WorkerMemory(
        # The larger of the two, or a plan would depend on the engine.
        process=PROCESS_BYTES["ray"],
        index=index,
        load=net.weights * (3 * 4 + net.itemsize),
        weights=net.weights * net.itemsize,
        tile=read + write + constants,
        copy=max(write, read, overhead),  # for mirroring and encoding
        forward=forward,
    )


def driver_bytes(
    workers: int, engine: str, device: str, tiles: int, measuring: int = 0, index: int = 0
) -> int:
    """What the process needs that starts a run: on the local engine with all its workers.

    Args:
        workers: bytes of a process with workers.
        engine: ``local`` or ``ray``.
        device: of the workers.
        tiles: of the plan.
        measuring: what grey values are measured with, before there are workers.
        index: bytes that opening the input takes.
    """
    running = workers if engine == "local" else DRIVER_BYTES[device] + index
    return TILE_NOTES * tiles + max(running, PROCESS_BYTES[engine] + index + measuring)


# Tiles that a GPU has under way at most, so that others come and go while it predicts one.
GPU_TILES = 4
# Of the tiles that cross Ray's object store together; with twice that a GPU was seen to wait.
TOGETHER_BYTES = 64 << 20


def needed_memory(size: NetworkSize, tiles: TilePlan, volume: Volume, outputs: int) -> WorkerMemory:
    """What a worker needs for `tiles` of `volume`, with `outputs` bytes stored per voxel."""
    voxel = volume.shape[0] * volume.dtype.itemsize
    overhead = volume.read_overhead(tiles.read_shape)
    return worker_bytes(size, tiles, voxel, outputs, overhead, volume.index_bytes)


def in_flight(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Tiles that one worker has under way; on a GPU as many as ``--memory`` allows."""
    most = 1 if device == "cpu" else GPU_TILES
    return next((n for n in range(most, 1, -1) if memory.shared_by(n, 1) <= settings.memory), 1)


def together(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Tiles that go to a GPU of a Ray cluster, and from it, together."""
    if device == "cpu" or settings.engine == "local":
        return 1
    ahead, most = in_flight(memory, device, settings), max(1, TOGETHER_BYTES // memory.tile)
    fits = (n for n in range(most, 1, -1) if memory.shared_by(n * ahead, 1) <= settings.memory)
    return next(fits, 1)


def process_bytes(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Bytes of one process with workers: with one of them on Ray or a GPU, else with all."""
    if device == "cpu" and settings.engine == "local":
        return memory.shared_by(cluster.side_by_side(device, "local", settings.workers))
    tiles = in_flight(memory, device, settings) * together(memory, device, settings)
    return memory.shared_by(tiles, passes=1)


def helper_bytes(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Bytes of a process that reads or writes for a GPU of a Ray cluster; 0 if there is none."""
    if device == "cpu" or settings.engine == "local":
        return 0
    return memory.helper(together(memory, device, settings))


def needed_bytes(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Bytes that a cluster is to have for each worker, with those that help it."""
    helpers = 2 * cluster.HELPERS * helper_bytes(memory, device, settings)
    return process_bytes(memory, device, settings) + helpers


def stored_values(classes: int, outputs: Sequence[str]) -> int:
    """Bytes stored per voxel."""
    return (classes - 1) * ("probabilities" in outputs) + ("classes" in outputs)


def network_size(network: UNet, precision: Precision, tta: bool = False) -> NetworkSize:
    """The numbers of a network that memory depends on."""
    return NetworkSize(
        network.in_channels,
        network.classes,
        network.base_channels,
        network.levels,
        sum(p.numel() for p in network.parameters()),
        {"float32": 4, "bfloat16": 2}[precision],
        tta,
    )
