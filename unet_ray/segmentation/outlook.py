"""The outlook of a run: its tiles, memory and disk space, estimated before it starts.

Knows metadata and arithmetic. Reads no voxel and writes nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine import cluster
from unet_ray.network.arithmetic import NetworkSize, halo_overhead, read_amplification
from unet_ray.network.prediction import Device, Precision
from unet_ray.network.unet import UNet
from unet_ray.segmentation.memory import (
    WorkerMemory,
    driver_bytes,
    helper_bytes,
    in_flight,
    needed_bytes,
    network_size,
    process_bytes,
    stored_values,
)
from unet_ray.segmentation.planning import choose_plan
from unet_ray.segmentation.settings import (
    Settings,
    checked_outputs,
    device_of,
    open_inputs,
    precision_of,
)
from unet_ray.storage.layout import PREDICTED, chunk_of
from unet_ray.storage.places import PathOrUrl
from unet_ray.tiling.boxes import Box, Ints
from unet_ray.tiling.pyramid import factors_of, level_plan
from unet_ray.tiling.tiles import TilePlan, round_up
from unet_ray.volumes.intensity import measured_bytes
from unet_ray.volumes.masks import open_mask, tiles_under
from unet_ray.volumes.volume import Volume

# Size of the sample of tiles from which a trial takes its passes.
SAMPLE = 64
# Storage overhead: per chunk its frame, checksum and index entry; per tile the end of each index.
CHUNK_BYTES, SHARD_BYTES = 128, 64
# Of a voxel for its id, the record of its tile and its row in the table; all are compressed.
OBJECT_DISK_BYTES = 2
OBJECT_RECORDS = 5  # files of a tile: labels and ids of objects and of holes, and rows
# File systems allocate whole blocks. Each tile adds an event to the log and entries to its folders;
# each store has metadata, a ledger and a lease.
DISK_BLOCK, TILE_RECORD_BYTES, STORE_BYTES = 4096, 256, 128 << 10


@dataclass(frozen=True)
class Outlook:
    """Tiles and resources of a run, estimated before it starts.

    Attributes:
        volume: the input.
        network: the network.
        plan: the tiles of the whole volume.
        tiles: number of tiles inside region and mask.
        sample: numbers of at most `SAMPLE` of these tiles, evenly spread.
        outputs: names of the predicted outputs.
        tta: average over the 8 symmetries of the square, in 3-D over 16 or 48.
        nan: treatment of non-finite voxels: ``error`` or ``zero``.
        memory: memory of one worker for one tile.
        driver_memory: bytes of the process that starts the run; on the local engine it includes all
            workers.
        engine: the engine that runs the tiles.
        workers: number of tiles computed in parallel.
        in_flight: tiles in flight per worker; 1 on a CPU.
        worker_memory: bytes of one worker on Ray, with all its tiles in flight. The local engine
            needs less, since its workers share the process that starts the run.
        helper_memory: bytes of each process that reads or writes for a GPU of a cluster; 0 if there
            are none.
        precision, device: number format and device of the network.
        halo_overhead: extra arithmetic for halo and padding, as a fraction of the cores' own.
        overhead_without_streams: the same if tiles of this size were computed each by itself; None
            for a plan without streams.
        disk_bytes: upper bound of the store's size on disk.
        most_objects: objects that the join and the table can hold within ``--memory``; None without
            objects.
        read_amplification: voxels decoded by all tiles, divided by the voxels of the volume.
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
    in_flight: int
    worker_memory: int
    helper_memory: int
    precision: Precision
    device: Device
    halo_overhead: float
    overhead_without_streams: float | None
    disk_bytes: int
    most_objects: int | None
    read_amplification: float

    def to_json(self) -> dict[str, Any]:
        """The outlook as ``unet-ray plan --json`` prints it; sizes in voxels and bytes."""
        return {
            "tiles": self.tiles,
            "tile": list(self.plan.core),
            "read": list(self.plan.read_shape),
            "pass": list(self.plan.pass_shape),
            "halo_overhead": round(self.halo_overhead, 4),
            **self._streams(),
            "worker_memory_bytes": self.worker_memory,
            "helper_memory_bytes": self.helper_memory,
            "driver_memory_bytes": self.driver_memory,
            "workers": self.workers,
            "disk_bytes": self.disk_bytes,
            **({} if self.most_objects is None else {"objects_at_most": self.most_objects}),
            "read_amplification": round(self.read_amplification, 4),
            "precision": self.precision,
            "device": self.device,
        }

    def _streams(self) -> dict[str, Any]:
        without = self.overhead_without_streams
        return {} if without is None else {"overhead_without_streams": round(without, 4)}


def plan(source: PathOrUrl, model: str | os.PathLike[str], settings: Settings) -> Outlook:
    """Estimates what `segment` would need for a new store; reads no voxel of the volume.

    Args:
        source: path or URL of the volume.
        model: RUN folder or model file.
        settings: the settings of `segment`.

    Raises:
        InputError: if the input, the model or a setting is invalid.
    """
    volume, network, *_ = open_inputs(source, model, settings)
    device = device_of(settings)
    precision = settings.precision or precision_of(device, settings)
    outputs = checked_outputs(settings.outputs)
    values = stored_values(network.classes, outputs)
    size = network_size(network, precision, settings.tta)
    rules = settings.rules_for(outputs)
    objects = rules is not None
    factors = () if settings.pyramid is False else factors_of(volume.shape[1:], volume.voxel_size)
    later = objects or bool(factors)
    tiles, memory = choose_plan(volume, network, size, settings, values, rules, later)
    part = tiles.part(settings.region or Box.of(tiles.shape))
    mask = open_mask(settings.mask, tiles.shape, settings.strict) if settings.mask else None
    selected: Sequence[int] = range(part.size)
    if mask:
        selected = np.flatnonzero(tiles_under(mask, tiles)[part.slices])  # type: ignore[assignment]
    needed = needed_bytes(memory, device, settings)
    workers = cluster.side_by_side(device, settings.engine, settings.workers, needed)
    return Outlook(
        volume=volume,
        network=network,
        plan=tiles,
        tiles=len(selected),
        sample=tile_numbers(tiles, part, spread(selected, SAMPLE)),
        outputs=tuple(name for name in outputs if name in PREDICTED),
        tta=settings.tta,
        nan=settings.nan,
        memory=memory,
        driver_memory=driver_bytes(
            process_bytes(memory, device, settings),
            settings.engine,
            device,
            len(tiles),
            measured_bytes(volume),
            volume.index_bytes,
            memory.later,
        ),
        engine=settings.engine,
        workers=workers,
        in_flight=in_flight(memory, device, settings),
        # A plan made here must hold where Ray runs it, too.
        worker_memory=process_bytes(memory.on("ray"), device, replace(settings, workers=1)),
        helper_memory=helper_bytes(memory, device, settings),
        precision=precision,
        device=device,
        halo_overhead=halo_overhead(size, tiles),
        overhead_without_streams=_overhead_without_streams(size, tiles, network),
        disk_bytes=max_disk_bytes(tiles, values, len(outputs), len(selected), objects, factors),
        most_objects=_most_objects(settings, memory, volume.shape[0]) if objects else None,
        read_amplification=read_amplification(tiles, volume.chunk),
    )


def _overhead_without_streams(size: NetworkSize, tiles: TilePlan, network: UNet) -> float | None:
    """Overhead of the same tiles, each computed by itself; None if no tile is streamed."""
    if not tiles.streamed:
        return None
    core = tuple(round_up(n, s) for n, s in zip(tiles.core, network.context.step, strict=True))
    return halo_overhead(size, TilePlan(tiles.shape, core, network.context, core))


def _most_objects(settings: Settings, memory: WorkerMemory, channels: int) -> int:
    """Objects that fit into the memory limit, if all of them touch a face of a tile."""
    from unet_ray.segmentation.table import table_bytes
    from unet_ray.segmentation.unions import join_bytes

    few, many, limit = 0, 1 << 48, memory.left_of(settings.memory)
    while few < many:
        middle = (few + many + 1) // 2
        needed = max(join_bytes(middle, middle, settings.ids), table_bytes(middle, channels))
        few, many = (middle, many) if needed <= limit else (few, middle - 1)
    return few


def spread(numbers: Sequence[int] | NDArray[np.intp], limit: int) -> list[int]:
    """At most `limit` of `numbers`, evenly spread and in their order."""
    count = min(limit, len(numbers))
    return [int(numbers[(2 * n + 1) * len(numbers) // (2 * count)]) for n in range(count)]


def tile_numbers(
    tiles: TilePlan, part: Box, offsets: Sequence[int] | NDArray[np.intp]
) -> tuple[int, ...]:
    """Numbers, in the plan, of tiles in a part of the grid.

    Args:
        tiles: the plan.
        part: part of the grid of tiles, (z, y, x).
        offsets: positions of the tiles within `part`, in C order.
    """
    if not len(offsets):
        return ()
    within = np.unravel_index(offsets, part.shape)
    positions = tuple(a + p for a, p in zip(part.start, within, strict=True))
    return tuple(np.ravel_multi_index(positions, tiles.counts).tolist())


def max_disk_bytes(
    tiles: TilePlan,
    values: int,
    shards: int,
    count: int,
    objects: bool = False,
    factors: Sequence[Ints] = (),
) -> int:
    """Upper bound of a store's size on disk: no compression, whole blocks, metadata and folders.

    Only ids of objects count as compressed, since an object has many voxels.

    Args:
        tiles: the plan.
        values: bytes predicted per voxel.
        shards: shards per tile, one for each output.
        count: number of stored tiles.
        objects: whether objects are stored.
        factors: voxels of the volume per voxel of each pyramid level.
    """
    if not count:
        return 0
    if factors:  # made only when no tile is missing
        levels = (level_plan(tiles, each) for each in factors)
        above = sum(max_disk_bytes(level, values, shards, len(level), objects) for level in levels)
        return max_disk_bytes(tiles, values, shards, count, objects) + above
    values += OBJECT_DISK_BYTES * objects
    chunk = chunk_of(tiles.core)
    chunks = values * math.prod(c // n for c, n in zip(tiles.core, chunk, strict=True))
    # Zstandard expands incompressible data by at most 1/256.
    content = values * math.prod(tiles.core) * 257 // 256 + chunks * CHUNK_BYTES + SHARD_BYTES
    layers, rows, _ = tiles.counts
    folders = shards * min(layers * (1 + rows), 2 * count)
    files = shards + OBJECT_RECORDS * objects
    blocks = DISK_BLOCK * (files * count + folders)  # a last, partial block each
    return (content + TILE_RECORD_BYTES) * count + blocks + STORE_BYTES
