"""What a run would do and need, before it starts.

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
from unet_ray.network.arithmetic import halo_overhead, read_amplification
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
from unet_ray.storage.layout import chunk_of
from unet_ray.storage.places import PathOrUrl
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.intensity import measured_bytes
from unet_ray.volumes.masks import open_mask, tiles_under
from unet_ray.volumes.volume import Volume

# Tiles of which a few are tried before a run.
SAMPLE = 64
# Beside its voxels: frame, checksum and index entry of a chunk; ends of the indices of a tile.
CHUNK_BYTES, SHARD_BYTES = 128, 64
# Disks give whole blocks. Of a tile, its event and its names in folders; of a store, its metadata,
# ledger and lease.
DISK_BLOCK, NOTE_BYTES, STORE_BYTES = 4096, 256, 128 << 10


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
        in_flight: tiles that a worker on a GPU has under way.
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
    in_flight: int
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


def plan(source: PathOrUrl, model: str | os.PathLike[str], settings: Settings) -> Outlook:
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
            volume.index_bytes,
        ),
        engine=settings.engine,
        workers=workers,
        in_flight=in_flight(memory, device, settings),
        worker_memory=process_bytes(memory, device, replace(settings, workers=1)),
        helper_memory=helper_bytes(memory, device, settings),
        precision=precision,
        device=device,
        halo_overhead=halo_overhead(size, tiles),
        disk_bytes=most_bytes(tiles, values, len(outputs), len(wanted)),
        read_amplification=read_amplification(tiles, volume.chunk),
    )


def spread(numbers: Sequence[int] | NDArray[np.intp], most: int) -> list[int]:
    """At most `most` of `numbers`, in their order, evenly spread."""
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
