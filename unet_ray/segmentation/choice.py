"""What a run would do and need, before it starts: tiles chosen from volume, network and memory.

Knows metadata and arithmetic: reads no voxel and writes nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine import cluster
from unet_ray.errors import InputError, nearest
from unet_ray.network.arithmetic import halo_overhead, read_amplification
from unet_ray.network.checkpoints import ModelHeader, find_model, read_model
from unet_ray.network.prediction import Device, Precision, best_precision
from unet_ray.network.unet import UNet
from unet_ray.segmentation.memory import (
    NetworkSize,
    WorkerMemory,
    driver_bytes,
    format_bytes,
    worker_bytes,
)
from unet_ray.storage.places import Where
from unet_ray.storage.stores import ARRAYS, chunk_of
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import Context, TilePlan, equal_core, round_up
from unet_ray.volumes.intensity import measured_bytes
from unet_ray.volumes.masks import open_mask, tiles_under
from unet_ray.volumes.volume import Volume, open_volume

# Beyond a read of about 1532 voxels a larger pass gains nothing: the halo is 10 % of the work.
LARGEST_CORE = 1344
# Slices of a tile where the input is not chunked along z: a tile is then about 16 MiB of output.
SLAB = 16
# Of decoding a voxel, where computing it is 1; a guess. Times add up: a tile of a part of a deep
# chunk, which is then decoded again, pays where a tile of all of it would be mostly halo.
READ_COST = 0.05
# Deeper tiles may cost this much more: they are fewer files.
DEEP = 1.25
# Tiles for Ray may cost this many times as much as those that fit without it.
LITTLE = 2.0
# A small stack is cut into about this many slabs, so that its tiles keep several workers busy.
SLABS = 8
# Voxels of one pass up to which slices are put together in a batch.
BATCH_VOXELS = 1 << 18
# Tiles that a GPU has under way at most, so that others come and go while it predicts one.
GPU_TILES = 4
# Of the tiles that cross Ray's object store together; with twice that a GPU was seen to wait.
TOGETHER_BYTES = 64 << 20
# Tiles of which a few are tried before a run.
SAMPLE = 64
# Beside its voxels: frame, checksum and index entry of a chunk; ends of the indices of a tile.
CHUNK_BYTES, SHARD_BYTES = 128, 64
# Disks give whole blocks. Of a tile, its event and its names in folders; of a store, its metadata,
# ledger and lease.
DISK_BLOCK, NOTE_BYTES, STORE_BYTES = 4096, 256, 128 << 10


@dataclass(frozen=True)
class Settings:
    """What a user may ask of `segment`; None means: choose, or keep what the store has.

    Attributes:
        outputs: which of ``probabilities`` and ``classes`` to store.
        region: the part of the volume to do, (z, y, x); None is all of it.
        mask: path of a volume that is not zero where tiles are wanted; see `masks`.
        channel, time, level: which part of the input file is the volume.
        tile: core in voxels (z, y, x).
        memory: bytes that one worker may use.
        workers: how many tiles side by side.
        engine: who runs the tiles.
        precision: number format of the network.
        tta: average over the 8 symmetries of the square.
        nan: what a voxel that is not a finite number is: an ``error`` of its tile, or ``zero``.
        overwrite: delete what is at the output path first.
        takeover: force out another run that is writing there.
    """

    outputs: tuple[str, ...] | None = None
    region: Box | None = None
    mask: Where | None = None
    channel: int | None = None
    time: int | None = None
    level: int = 0
    tile: tuple[int, int, int] | None = None
    memory: int = 4 << 30
    workers: int | None = None
    engine: cluster.EngineName = "local"
    precision: Precision | None = None
    tta: bool = False
    nan: Literal["error", "zero"] = "error"
    overwrite: bool = False
    takeover: bool = False


def choose_plan(
    volume: Volume, network: UNet, size: NetworkSize, settings: Settings, outputs: int
) -> tuple[TilePlan, WorkerMemory]:
    """The tiles of a run: as asked for, or the largest that pay within the memory allowed.

    Depends on the volume, the network and the allowance only, never on the machine.

    Raises:
        InputError: if the tile asked for, or even the smallest, needs more memory than allowed.
    """
    shape, context = volume.shape[1:], network.context

    def planned(core: tuple[int, ...]) -> tuple[TilePlan, WorkerMemory]:
        tiles = TilePlan(shape, core, context, (_batch(core, context), *core[1:]))
        return tiles, needed_memory(size, tiles, volume, outputs)

    def here(chosen: tuple[TilePlan, WorkerMemory]) -> tuple[TilePlan, WorkerMemory]:
        return chosen[0], chosen[1].on(settings.engine)

    allowed = format_bytes(settings.memory)
    asked = here(planned(_fitted(settings.tile, shape, context))) if settings.tile else None
    if asked and asked[1].total <= settings.memory:
        return asked

    def largest_of(slab: int, engine: str) -> tuple[TilePlan, WorkerMemory] | None:
        planes = (
            planned((slab, *_plane(volume, context, largest)))
            for largest in range(LARGEST_CORE, 0, -context.step[-1])
        )
        fitting = (found for found in planes if found[1].on(engine).total <= settings.memory)
        return next(fitting, None)

    def without_chunks(tiles: TilePlan) -> WorkerMemory:
        voxel = volume.shape[0] * volume.dtype.itemsize
        bare = worker_bytes(size, tiles, voxel, outputs, index=volume.index)
        return bare.on(settings.engine)

    def cheapest(engine: str) -> tuple[float, tuple[TilePlan, WorkerMemory]]:
        fitting = [found for slab in _slabs(volume) if (found := largest_of(slab, engine))]
        costs = [_cost(size, found[0], volume) for found in fitting]
        least = min(costs, default=math.inf)
        good = (f for f, cost in zip(fitting, costs, strict=True) if cost <= DEEP * least)
        return least, next(good, planned((1, *context.step[1:])))

    # By the needs of a Ray worker, the larger, so that both engines choose the same tiles; unless
    # those that fit then are nearly all halo.
    choices = [cheapest(engine) for engine in dict.fromkeys(("ray", settings.engine))]
    chosen = choices[-1] if choices[0][0] > LITTLE * choices[-1][0] else choices[0]
    tiles, memory = here(chosen[1])
    if memory.total > settings.memory:
        chunks = f", since the input is stored in chunks of {_commas(volume.chunk)}"
        cause = chunks if without_chunks(tiles).total <= settings.memory else ""
        raise InputError(
            f"memory={allowed} is too little for this model: the smallest tile needs "
            f"{format_bytes(memory.total)} per worker{cause}; give --memory {memory.total} or more."
        )
    if asked:
        raise InputError(
            f"tile={_commas(asked[0].core)} needs {format_bytes(asked[1].total)} per worker, "
            f"{allowed} allowed; tile={_commas(tiles.core)} needs {format_bytes(memory.total)}."
        )
    return tiles, memory


def _commas(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def needed_memory(size: NetworkSize, tiles: TilePlan, volume: Volume, outputs: int) -> WorkerMemory:
    """What a worker needs for `tiles` of `volume`, with `outputs` bytes stored per voxel."""
    voxel = volume.shape[0] * volume.dtype.itemsize
    held = volume.held(tiles.read_shape)
    return worker_bytes(size, tiles, voxel, outputs, held, volume.index)


def under_way(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Tiles that one worker has under way; on a GPU as many as ``--memory`` allows."""
    most = GPU_TILES if device == "cuda" else 1
    return next((n for n in range(most, 1, -1) if memory.shared_by(n, 1) <= settings.memory), 1)


def together(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Tiles that go to a GPU of a Ray cluster, and from it, together."""
    if device == "cpu" or settings.engine == "local":
        return 1
    ahead, most = under_way(memory, device, settings), max(1, TOGETHER_BYTES // memory.tile)
    fits = (n for n in range(most, 1, -1) if memory.shared_by(n * ahead, 1) <= settings.memory)
    return next(fits, 1)


def process_bytes(memory: WorkerMemory, device: Device, settings: Settings) -> int:
    """Bytes of one process with workers: with one of them on Ray or a GPU, else with all."""
    if device == "cpu" and settings.engine == "local":
        return memory.shared_by(cluster.side_by_side(device, "local", settings.workers))
    tiles = under_way(memory, device, settings) * together(memory, device, settings)
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


def _fitted(tile: Sequence[int], shape: Sequence[int], context: Context) -> tuple[int, ...]:
    """A core that a user asked for, clamped to the volume and rounded up to the step."""
    clamped = (min(t, n) for t, n in zip(tile, shape, strict=True))
    return tuple(round_up(t, s) for t, s in zip(clamped, context.step, strict=True))


def _slab(volume: Volume) -> int:
    """Slices of a tile for a 2-D network."""
    depth, unit = volume.shape[1], volume.chunk[0]
    if unit > 1:
        # Whole chunks along z, so that none is decoded for two tiles.
        return min(round_up(min(SLAB, depth), unit), depth)
    return equal_core(depth, min(SLAB, max(1, math.ceil(depth / SLABS))), 1)


def _slabs(volume: Volume) -> list[int]:
    """Slices that a tile may have, the most first."""
    slabs = [_slab(volume)]
    while slabs[-1] > 1:
        slabs.append(slabs[-1] // 2)
    return slabs


def _cost(size: NetworkSize, tiles: TilePlan, volume: Volume) -> float:
    """Of tiles, where 1 is the arithmetic on the voxels of the volume alone."""
    reads = read_amplification(tiles, volume.chunk)
    return 1 + halo_overhead(size, tiles) + READ_COST * reads


def _plane(volume: Volume, context: Context, largest: int) -> tuple[int, int]:
    """Rows and columns of a tile, at most `largest` each."""
    y, x = (
        equal_core(n, largest, s) for n, s in zip(volume.shape[2:], context.step[1:], strict=True)
    )
    return y, x


def _batch(core: Sequence[int], context: Context) -> int:
    """Slices of one pass: small slices are put together, since a larger pass runs faster."""
    area = math.prod(c + h for c, h in zip(core[1:], context.halo[1:], strict=True))
    most = max(1, BATCH_VOXELS // area)
    return max(n for n in range(1, min(most, core[0]) + 1) if core[0] % n == 0)


@dataclass(frozen=True)
class Outlook:
    """What a run would do and need, known before it starts.

    Attributes:
        volume: the input.
        network: that predicts.
        plan: the tiles.
        tiles: how many of them region and mask ask for.
        sample: numbers of some of these, evenly spread.
        outputs: what would be stored.
        tta: average over the 8 symmetries of the square.
        nan: ``zero`` if voxels that are not finite count as 0.
        memory: what one worker needs for one tile.
        driver_memory: bytes of the process that starts the run: on the local engine the one in
            which all workers run.
        engine: who runs them.
        workers: how many of them side by side.
        under_way: tiles that a worker on a GPU has under way.
        worker_memory: bytes of one worker, with all of these; on the local engine and a CPU, of one
            among others.
        helper_memory: bytes of each process that reads or writes for a GPU of a cluster; 0 if there
            are none.
        precision, device: of the network.
        halo_overhead: arithmetic spent on the halo, as a part of what the cores alone would cost.
        disk_bytes: upper bound of what is stored.
        read_amplification: voxels that all tiles decode, over those of the volume.
    """

    volume: Volume
    network: UNet
    plan: TilePlan
    tiles: int
    sample: tuple[int, ...]
    outputs: tuple[str, ...]
    tta: bool
    nan: str
    memory: WorkerMemory
    driver_memory: int
    engine: cluster.EngineName
    workers: int
    under_way: int
    worker_memory: int
    helper_memory: int
    precision: Precision
    device: Device
    halo_overhead: float
    disk_bytes: int
    read_amplification: float

    def to_json(self) -> dict[str, Any]:
        """The keys that ``unet-ray plan --json`` prints; sizes in voxels and bytes."""
        return {
            "tiles": self.tiles,
            "tile": list(self.plan.core),
            "read": list(self.plan.read_shape),
            "pass": list(self.plan.pass_shape),
            "halo_overhead": round(self.halo_overhead, 4),
            "worker_memory_bytes": self.worker_memory,
            "helper_memory_bytes": self.helper_memory,
            "driver_memory_bytes": self.driver_memory,
            "workers": self.workers,
            "disk_bytes": self.disk_bytes,
            "read_amplification": round(self.read_amplification, 4),
            "precision": self.precision,
            "device": self.device,
        }


def plan(source: Where, model: str | os.PathLike[str], settings: Settings) -> Outlook:
    """What `segment` would do with these settings and a new store; reads no voxel.

    Raises:
        InputError: for anything wrong with input, model or settings.
    """
    volume, network, _ = open_inputs(source, model, settings)
    device = device_of(settings)
    precision = settings.precision or precision_of(device, settings)
    outputs = checked_outputs(settings.outputs)
    values = stored_values(network.classes, outputs)
    size = network_size(network, precision, settings.tta)
    tiles, memory = choose_plan(volume, network, size, settings, values)
    part = tiles.part(settings.region or Box.of(tiles.shape))
    mask = open_mask(settings.mask, tiles.shape) if settings.mask else None
    wanted: Sequence[int] = range(part.size)
    if mask:
        wanted = np.flatnonzero(tiles_under(mask, tiles)[part.slices])  # type: ignore[assignment]
    need = needed_bytes(memory, device, settings)
    workers = cluster.side_by_side(device, settings.engine, settings.workers, need)
    return Outlook(
        volume=volume,
        network=network,
        plan=tiles,
        tiles=len(wanted),
        sample=numbered(tiles, part, spread(wanted, SAMPLE)),
        outputs=outputs,
        tta=settings.tta,
        nan=settings.nan,
        memory=memory,
        driver_memory=driver_bytes(
            process_bytes(memory, device, settings),
            settings.engine,
            device,
            len(tiles),
            measured_bytes(volume),
            volume.index,
        ),
        engine=settings.engine,
        workers=workers,
        under_way=under_way(memory, device, settings),
        worker_memory=process_bytes(memory, device, replace(settings, workers=1)),
        helper_memory=helper_bytes(memory, device, settings),
        precision=precision,
        device=device,
        halo_overhead=halo_overhead(size, tiles),
        disk_bytes=most_bytes(tiles, values, len(outputs), len(wanted)),
        read_amplification=read_amplification(tiles, volume.chunk),
    )


def spread(numbers: Sequence[int] | NDArray[np.intp], most: int) -> list[int]:
    """At most so many of `numbers`, in their order, evenly spread."""
    count = min(most, len(numbers))
    return [int(numbers[(2 * n + 1) * len(numbers) // (2 * count)]) for n in range(count)]


def numbered(
    tiles: TilePlan, part: Box, inside: Sequence[int] | NDArray[np.intp]
) -> tuple[int, ...]:
    """The tiles with these numbers in a part of the grid."""
    if not len(inside):
        return ()
    places = np.unravel_index(inside, part.shape)
    axes = tuple(a + p for a, p in zip(part.start, places, strict=True))
    return tuple(np.ravel_multi_index(axes, tiles.counts).tolist())


def most_bytes(tiles: TilePlan, values: int, files: int, count: int) -> int:
    """Bytes on disk of some tiles if nothing can be compressed, with all that lies beside them.

    Args:
        tiles: the plan.
        values: bytes stored per voxel.
        files: shards of a tile, one for each output.
        count: how many tiles.
    """
    if not count:
        return 0
    chunk = chunk_of(tiles.core)
    chunks = values * math.prod(c // n for c, n in zip(tiles.core, chunk, strict=True))
    shards = values * math.prod(tiles.core) * 257 // 256 + chunks * CHUNK_BYTES + SHARD_BYTES
    layers, rows, _ = tiles.counts
    folders = files * min(layers * (1 + rows), 2 * count)
    blocks = DISK_BLOCK * (files * count + folders)  # the last of each is hardly ever full
    return (shards + NOTE_BYTES) * count + blocks + STORE_BYTES


def open_inputs(
    source: Where, model: str | os.PathLike[str], settings: Settings
) -> tuple[Volume, UNet, ModelHeader]:
    """Opens input and model and checks that they fit each other and the region."""
    volume = open_volume(source, channel=settings.channel, time=settings.time, level=settings.level)
    file = find_model(model)
    network, header = read_model(file)
    if volume.shape[0] != network.in_channels:
        hint = "; choose one with --channel N" if network.in_channels == 1 else ""
        raise InputError(
            f"{volume.path}: has {volume.shape[0]} channels, but {file} was trained on "
            f"{network.in_channels}{hint}."
        )
    whole = Box.of(volume.shape[1:])
    region = settings.region
    if region and (region.size == 0 or region.intersect(whole) != region):
        raise InputError(
            f"region={region} must be a box of at least one voxel inside the volume, {whole}."
        )
    return volume, network, header


def stored_values(classes: int, outputs: Sequence[str]) -> int:
    """Bytes stored per voxel."""
    return (classes - 1) * ("probabilities" in outputs) + ("classes" in outputs)


def network_size(network: UNet, precision: Precision, tta: bool = False) -> NetworkSize:
    """The numbers of a network that memory depends on."""
    return NetworkSize(
        network.in_channels,
        network.classes,
        network.base_channels,
        network.depth,
        sum(p.numel() for p in network.parameters()),
        {"float32": 4, "bfloat16": 2}[precision],
        tta,
    )


def device_of(settings: Settings) -> Device:
    """Where tiles would run: on a GPU where there are any, of this machine or of the cluster.

    Raises:
        InputError: if the cluster can never hold so many workers.
    """
    return "cuda" if cluster.find_device(settings.engine, settings.workers) == "cuda" else "cpu"


def precision_of(device: Device, settings: Settings) -> Precision:
    """The number format that is fastest where tiles would run."""
    return cluster.ask(partial(best_precision, device), device, settings.engine)


def checked_outputs(asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The outputs to store, in the store's order; all of them if none are asked for.

    Raises:
        InputError: for a name that is not an output; names the nearest.
    """
    for name in asked or ():
        if name not in ARRAYS:
            raise InputError(
                f"outputs={name!r} is not an output: choose from {', '.join(ARRAYS)}"
                f"{nearest(name, ARRAYS)}."
            )
    return tuple(name for name in ARRAYS if asked is None or name in asked)
