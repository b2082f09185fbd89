"""Choice of the tile size of a run, from volume, network and memory.

Knows the cost of tiles in time and memory. Reads no voxel and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from unet_ray.errors import InputError
from unet_ray.network.arithmetic import NetworkSize, halo_overhead, read_amplification
from unet_ray.network.unet import UNet
from unet_ray.segmentation.memory import WorkerMemory, needed_memory, worker_bytes
from unet_ray.segmentation.rules import Rules
from unet_ray.segmentation.settings import Settings
from unet_ray.tiling.streaming import stream_along
from unet_ray.tiling.tiles import Context, TilePlan, equal_core, round_up
from unet_ray.units import commas, format_bytes
from unet_ray.volumes.volume import Volume

# Largest core in y and x, in voxels. Larger ones gain nothing: at this size the halo is only 10 %
# of the work.
LARGEST_CORE = 1344
# Slices per tile where the input is not chunked along z; such a tile stores about 16 MiB.
SLAB = 16
# Cost of decoding a voxel, relative to computing it; a guess. A tile that covers part of a deep
# chunk decodes the chunk again, which pays off where a tile of full depth would be mostly halo.
READ_COST = 0.05
# Deeper tiles may cost up to this factor more, since they need fewer files.
DEPTH_TOLERANCE = 1.25
# Tiles that fit into a Ray worker may cost up to this factor more than tiles for the local engine.
RAY_TOLERANCE = 2.0
# A small stack is split into about this many slabs, so that several workers have tiles to compute.
SLABS = 8
# Upper bound of the voxels in a pass that batches several slices.
BATCH_VOXELS = 1 << 18

# Planes per pass of a stream, and voxels per tile of a network in 3-D.
SLAB_PLANES, SHARD_VOXELS = 8, 1 << 24

Candidate = tuple[TilePlan, WorkerMemory]


def choose_plan(
    volume: Volume,
    network: UNet,
    size: NetworkSize,
    settings: Settings,
    outputs: int,
    rules: Rules | None = None,
    later: bool = False,
) -> Candidate:
    """Chooses the tiles of a run: ``settings.tile`` if set, else the cheapest that fit into memory.

    The choice depends on the volume, the network and ``settings``, never on the machine.

    Args:
        volume: the input.
        network: the network.
        size: size of the network.
        settings: tile, memory and engine of the run.
        outputs: bytes predicted per voxel.
        rules: rules of the objects; None without objects.
        later: whether there are stages after the prediction.

    Returns:
        The plan, and the memory of one worker.

    Raises:
        InputError: if the requested tile, or the smallest possible one, needs more than
            ``settings.memory``.
    """
    shape, context = volume.shape[1:], network.context

    def measured(tiles: TilePlan) -> Candidate:
        return tiles, needed_memory(size, tiles, volume, outputs, rules, later)

    def planned(core: tuple[int, ...]) -> Candidate:
        if network.axes == 3:
            return measured(TilePlan(shape, core, context, core))
        return measured(TilePlan(shape, core, context, (_batch(core, context), *core[1:])))

    def on_engine(candidate: Candidate) -> Candidate:
        return candidate[0], candidate[1].on(settings.engine)

    allowed = format_bytes(settings.memory)
    requested = None
    if settings.tile:
        core = _fitted(settings.tile, shape, context)
        both = [planned(core), *map(measured, _streamed(core, shape, network))]
        # As below, the choice does not depend on the engine, unless the tile fits only locally.
        on_ray = [c for c in both if c[1].on("ray").total <= settings.memory]
        fitting = on_ray or [c for c in map(on_engine, both) if c[1].total <= settings.memory]
        requested = on_engine(min(fitting or both, key=lambda c: _cost(size, c[0], volume)))
    if requested and requested[1].total <= settings.memory:
        return requested

    def largest_of(slab: int, engine: str) -> Candidate | None:
        planes = (
            _plane(volume, context, largest)
            for largest in range(LARGEST_CORE, 0, -context.step[-1])
        )
        if slab:
            candidates = (planned((slab, *plane)) for plane in planes)
        else:
            candidates = (
                measured(tiles)
                for plane in planes
                for tiles in _streamed((_column(shape, plane, network), *plane), shape, network)
            )
        fitting = (c for c in candidates if c[1].on(engine).total <= settings.memory)
        return next(fitting, None)

    def without_chunks(tiles: TilePlan) -> WorkerMemory:
        voxel = volume.shape[0] * volume.dtype.itemsize
        memory = worker_bytes(size, tiles, voxel, outputs, 0, volume.index_bytes, rules, later)
        return memory.on(settings.engine)

    def cheapest(engine: str) -> tuple[float, Candidate]:
        slabs = _slabs(volume) if network.axes == 2 else _depths(shape, context)
        fitting = [candidate for slab in slabs if (candidate := largest_of(slab, engine))]
        costs = [_cost(size, tiles, volume) for tiles, _ in fitting]
        least = min(costs, default=math.inf)
        cheap = (
            c for c, cost in zip(fitting, costs, strict=True) if cost <= DEPTH_TOLERANCE * least
        )
        return least, next(cheap, planned(context.step))

    # Tiles must fit into a Ray worker, the larger one, so that both engines store the same bytes.
    # Exception: tiles that would then be nearly all halo.
    by_engine = [cheapest(engine) for engine in dict.fromkeys(("ray", settings.engine))]
    best = by_engine[-1] if by_engine[0][0] > RAY_TOLERANCE * by_engine[-1][0] else by_engine[0]
    tiles, memory = on_engine(best[1])
    if memory.total > settings.memory:
        chunks = f", because the input is stored in chunks of {commas(volume.chunk)}"
        cause = chunks if without_chunks(tiles).total <= settings.memory else ""
        raise InputError(
            f"memory={allowed} is too little for this model: the smallest tile needs "
            f"{format_bytes(memory.total)} per worker{cause}; set --memory {memory.total} or more."
        )
    if requested:
        raise InputError(
            f"tile={commas(requested[0].core)} needs {format_bytes(requested[1].total)} per "
            f"worker, but only {allowed} are allowed; tile={commas(tiles.core)} needs "
            f"{format_bytes(memory.total)}."
        )
    return tiles, memory


def _fitted(tile: Sequence[int], shape: Sequence[int], context: Context) -> tuple[int, ...]:
    """The requested core, clamped to the volume and rounded up to the network's step."""
    clamped = (min(t, n) for t, n in zip(tile, shape, strict=True))
    return tuple(round_up(t, s) for t, s in zip(clamped, context.step, strict=True))


def _slab(volume: Volume) -> int:
    """Slices per tile for a 2-D network."""
    depth, chunk = volume.shape[1], volume.chunk[0]
    if chunk > 1:
        # Whole chunks along z, so that no chunk is decoded for two tiles.
        return min(round_up(min(SLAB, depth), chunk), depth)
    return equal_core(depth, min(SLAB, max(1, math.ceil(depth / SLABS))), 1)


def _slabs(volume: Volume) -> list[int]:
    """Possible numbers of slices per tile, in descending order."""
    slabs = [_slab(volume)]
    while slabs[-1] > 1:
        slabs.append(slabs[-1] // 2)
    return slabs


def _depths(shape: Sequence[int], context: Context) -> list[int]:
    """Possible numbers of planes per tile of a network in 3-D, descending; 0 for streams."""
    depths = [round_up(shape[0], context.step[0])]
    while depths[-1] > context.step[0]:
        depths.append(round_up(depths[-1] // 2, context.step[0]))
    return [0, *dict.fromkeys(depths)]


def _column(shape: Sequence[int], plane: Sequence[int], network: UNet) -> int:
    """Planes of a tile that is streamed; its shards have about `SHARD_VOXELS` voxels."""
    return equal_core(shape[0], SHARD_VOXELS // math.prod(plane), _slab_of(network))


def _streamed(core: Sequence[int], shape: Sequence[int], network: UNet) -> list[TilePlan]:
    """The plan that streams tiles of about `core` along z; none for a 2-D network."""
    if network.axes == 2:
        return []
    slab = _slab_of(network)
    context = stream_along(network.levels, slab).around(network.context)
    core = (round_up(core[0], slab), *core[1:])
    return [TilePlan(tuple(shape), core, context, (slab, *core[1:]), streamed=True)]


def _slab_of(network: UNet) -> int:
    """Planes per pass of a stream."""
    return round_up(SLAB_PLANES, network.context.step[0])


def _cost(size: NetworkSize, tiles: TilePlan, volume: Volume) -> float:
    """Cost of a plan, relative to the arithmetic without halo and padding."""
    reads = read_amplification(tiles, volume.chunk)
    return 1 + halo_overhead(size, tiles) + READ_COST * reads


def _plane(volume: Volume, context: Context, largest: int) -> tuple[int, int]:
    """Rows and columns per tile, each at most `largest`."""
    y, x = (
        equal_core(n, largest, s) for n, s in zip(volume.shape[2:], context.step[1:], strict=True)
    )
    return y, x


def _batch(core: Sequence[int], context: Context) -> int:
    """Slices per pass; small slices form a batch, since a larger pass runs faster."""
    area = math.prod(c + h for c, h in zip(core[1:], context.halo[1:], strict=True))
    limit = max(1, BATCH_VOXELS // area)
    return max(n for n in range(1, min(limit, core[0]) + 1) if core[0] % n == 0)
