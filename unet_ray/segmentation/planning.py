"""The tiles of a run, chosen from volume, network and memory.

Knows what tiles cost in time and memory. Reads no voxel and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from unet_ray.errors import InputError
from unet_ray.network.arithmetic import NetworkSize, halo_overhead, read_amplification
from unet_ray.network.unet import UNet
from unet_ray.segmentation.memory import WorkerMemory, needed_memory, worker_bytes
from unet_ray.segmentation.settings import Settings
from unet_ray.tiling.tiles import Context, TilePlan, equal_core, round_up
from unet_ray.units import commas, format_bytes
from unet_ray.volumes.volume import Volume

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
        bare = worker_bytes(size, tiles, voxel, outputs, index=volume.index_bytes)
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
        chunks = f", since the input is stored in chunks of {commas(volume.chunk)}"
        cause = chunks if without_chunks(tiles).total <= settings.memory else ""
        raise InputError(
            f"memory={allowed} is too little for this model: the smallest tile needs "
            f"{format_bytes(memory.total)} per worker{cause}; give --memory {memory.total} or more."
        )
    if asked:
        raise InputError(
            f"tile={commas(asked[0].core)} needs {format_bytes(asked[1].total)} per worker, "
            f"{allowed} allowed; tile={commas(tiles.core)} needs {format_bytes(memory.total)}."
        )
    return tiles, memory


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
