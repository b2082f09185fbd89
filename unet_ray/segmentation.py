"""From a volume and a model to a store: plan -> read -> predict -> write, and what is left to do.

Knows how the pieces fit: what fixes the bytes of a run, which tiles are missing, who runs them.
The arithmetic, the network, the files and the engines are in rooms of their own.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from unet_ray import engine as engines
from unet_ray.boxes import Box
from unet_ray.checkpoints import ModelHeader, find_model, read_model, sha256_of
from unet_ray.cost import halo_overhead
from unet_ray.errors import InputError, RunError, nearest, refuse_below_file
from unet_ray.files import remove_partial
from unet_ray.intensity import Intensity, measure
from unet_ray.ledger import Ledger
from unet_ray.memory import NetworkSize, WorkerMemory, format_bytes, worker_bytes
from unet_ray.mirror import read_mirrored, reflect
from unet_ray.network import UNet
from unet_ray.prediction import Device, Precision, Predictor, best_precision, instructions
from unet_ray.stores import (
    ARRAYS,
    FORMAT,
    PRIVATE,
    Store,
    StoreLayout,
    create_store,
    delete_store,
    provenance_of,
)
from unet_ray.tiles import Context, TilePlan, equal_core, round_up
from unet_ray.versions import versions
from unet_ray.volumes import Volume, open_volume

# Beyond a read of about 1532 voxels a larger pass gains nothing: the halo is 10 % of the work.
LARGEST_CORE = 1344
LEDGER = f"{PRIVATE}/segment.ledger"
# Told in the store, but another version of these gives the same bytes.
UNCOMPARED = ("versions.numpy", "versions.zarr")
# Slices of a tile where the input is not chunked along z: a tile is then about 16 MiB of output.
SLAB = 16
# A small stack is cut into about this many slabs, so that its tiles keep several workers busy.
SLABS = 8
# Voxels of one pass up to which slices are put together in a batch.
BATCH_VOXELS = 1 << 18


@dataclass(frozen=True)
class Settings:
    """What a user may ask of `segment`; None means: choose, or keep what the store has.

    Attributes:
        outputs: which of ``probabilities`` and ``classes`` to store.
        region: the part of the volume to do, (z, y, x); None is all of it.
        channel, time, level: which part of the input file is the volume.
        tile: core in voxels (z, y, x).
        memory: bytes that one worker may use.
        workers: how many tiles side by side.
        engine: who runs the tiles.
        precision: number format of the network.
        overwrite: delete what is at the output path first.
    """

    outputs: tuple[str, ...] | None = None
    region: Box | None = None
    channel: int | None = None
    time: int | None = None
    level: int = 0
    tile: tuple[int, int, int] | None = None
    memory: int = 4 << 30
    workers: int | None = None
    engine: engines.EngineName = "local"
    precision: Precision | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Segmentation:
    """A run that is ready to start: everything that fixes its bytes.

    Attributes:
        volume: the input.
        model: the model file.
        out: the output store.
        plan: the tiles.
        intensity: grey values of the volume.
        precision, device: of the network.
        outputs: what is stored.
        class_values: label value of each class.
        memory: what one worker needs.
        provenance: all of this as JSON, kept in the store and compared when a run goes on.
        resumed: the store was there already and is continued.
    """

    volume: Volume
    model: Path
    out: Path
    plan: TilePlan
    intensity: Intensity
    precision: Precision
    device: Device
    outputs: tuple[str, ...]
    class_values: tuple[int, ...]
    memory: WorkerMemory
    provenance: Mapping[str, Any]
    resumed: bool

    def make_worker(self) -> TileWorker:
        """The worker of the segment stage, for the process that runs it."""
        return TileWorker(self)


class TileWorker:
    """Reads, predicts and writes tiles of one run; may be shared by threads."""

    def __init__(self, run: Segmentation) -> None:
        self._run = run
        network, _ = read_model(run.model)
        self._predictor = Predictor(network, run.plan, run.intensity, run.precision, run.device)
        self._store = Store(run.out, run.outputs)

    def read(self, tile: int) -> NDArray[Any]:
        """The voxels that a tile reads, ``(c, z, y, x)``, mirrored beyond the volume's faces.

        Raises:
            RunError: if one of them is not a finite number; names the tile and the voxel.
        """
        volume, box = self._run.volume, self._run.plan[tile].read
        voxels = read_mirrored(volume.read, volume.shape[1:], box)
        if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
            raise RunError(_not_finite(self._run, tile, voxels))
        return voxels

    def predict(self, tile: int, voxels: NDArray[Any]) -> dict[str, NDArray[np.uint8]]:
        """The outputs on the core of a tile."""
        return self._predictor(self._run.plan[tile], voxels, self._run.outputs)

    def write(self, tile: int, result: dict[str, NDArray[np.uint8]]) -> None:
        """Writes the shards of a tile and waits until they are on disk."""
        self._store.write(self._run.plan[tile], result)


def _not_finite(run: Segmentation, tile: int, voxels: NDArray[Any]) -> str:
    volume, box = run.volume, run.plan[tile].read
    channel, *offset = np.argwhere(~np.isfinite(voxels))[0].tolist()
    seen = zip(box.start, offset, volume.shape[1:], strict=True)
    place = tuple(int(reflect(np.array(a + n), extent)) for a, n, extent in seen)
    return (
        f"{volume.path}: voxel (z, y, x) = {place} of channel {channel} is "
        f"{voxels[(channel, *offset)]}, read by tile {tile} ({run.plan[tile].write}); replace "
        f"values that are not finite and run again."
    )


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
        return tiles, _needed(size, tiles, volume, outputs)

    def here(chosen: tuple[TilePlan, WorkerMemory]) -> tuple[TilePlan, WorkerMemory]:
        return chosen[0], chosen[1].on(settings.engine)

    allowed = format_bytes(settings.memory)
    asked = here(planned(_fitted(settings.tile, shape, context))) if settings.tile else None
    if asked and asked[1].total <= settings.memory:
        return asked
    found = (
        planned((slab, *_plane(volume, context, largest)))
        for slab in dict.fromkeys((_slab(volume), 1))
        for largest in range(LARGEST_CORE, 0, -context.step[-1])
    )
    # By the needs of a Ray worker, the larger ones, so that both engines choose the same tiles.
    smallest = planned((1, *context.step[1:]))
    tiles, memory = here(next((f for f in found if f[1].total <= settings.memory), smallest))
    if memory.total > settings.memory:
        raise InputError(
            f"memory={allowed} is too little for this model: the smallest tile needs "
            f"{format_bytes(memory.total)} per worker; give --memory {memory.total} or more."
        )
    if asked:
        raise InputError(
            f"tile={_commas(asked[0].core)} needs {format_bytes(asked[1].total)} per worker, "
            f"{allowed} allowed; tile={_commas(tiles.core)} needs {format_bytes(memory.total)}."
        )
    return tiles, memory


def _commas(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _needed(size: NetworkSize, tiles: TilePlan, volume: Volume, outputs: int) -> WorkerMemory:
    voxel = volume.shape[0] * volume.dtype.itemsize
    extents = zip(tiles.read_shape, volume.chunk, strict=True)
    units = min(volume.decoded_at_once, math.prod(-(-n // c) + 1 for n, c in extents))
    return worker_bytes(size, tiles, voxel, outputs, units * math.prod(volume.chunk) * voxel)


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
        plan: the tiles.
        tiles: how many of them the region touches.
        memory: what one worker needs.
        precision, device: of the network.
        halo_overhead: arithmetic spent on the halo, as a part of what the cores alone would cost.
        disk_bytes: upper bound of what is stored.
    """

    volume: Volume
    plan: TilePlan
    tiles: int
    memory: WorkerMemory
    precision: Precision
    device: Device
    halo_overhead: float
    disk_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The keys that ``unet-ray plan --json`` prints; sizes in voxels and bytes."""
        return {
            "tiles": self.tiles,
            "tile": list(self.plan.core),
            "read": list(self.plan.read_shape),
            "pass": list(self.plan.pass_shape),
            "halo_overhead": round(self.halo_overhead, 4),
            "worker_memory_bytes": self.memory.total,
            "disk_bytes": self.disk_bytes,
            "precision": self.precision,
            "device": self.device,
        }


def plan(
    source: str | os.PathLike[str], model: str | os.PathLike[str], settings: Settings
) -> Outlook:
    """What `segment` would do with these settings and a new store; reads metadata only.

    Raises:
        InputError: for anything wrong with input, model or settings.
    """
    volume, network, _ = _open(source, model, settings)
    device = _device(settings)
    precision = settings.precision or _best(device, settings)
    values = _stored_values(network.classes, _checked_outputs(settings.outputs))
    size = network_size(network, precision)
    tiles, memory = choose_plan(volume, network, size, settings, values)
    stored = math.prod(tiles.core) * values * len(tiles)
    region = settings.region or Box.of(tiles.shape)
    overhead = halo_overhead(size, tiles)
    count = sum(1 for _ in tiles.within(region))
    return Outlook(volume, tiles, count, memory, precision, device, overhead, stored)


def _open(
    source: str | os.PathLike[str], model: str | os.PathLike[str], settings: Settings
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


def _stored_values(classes: int, outputs: Sequence[str]) -> int:
    """Bytes stored per voxel."""
    return (classes - 1) * ("probabilities" in outputs) + ("classes" in outputs)


def prepare(
    source: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings,
) -> Segmentation:
    """Checks everything and fixes what the bytes of the run depend on; writes nothing.

    Where the store exists, its plan, precision and normalisation are kept, so that a rerun from
    another machine or with another memory allowance goes on with the same bytes.

    Raises:
        InputError: for anything wrong with input, model, settings or an existing store.
    """
    volume, network, header = _open(source, model, settings)
    path = Path(out).absolute()
    refuse_below_file(path)
    _check_output(path, Path(volume.path))
    told = provenance_of(path)  # also refuses a path that is not ours, whatever is asked
    if settings.overwrite:
        told = None
    device: Device = told["device"] if told else _device(settings)
    if told and device == "cuda" and _device(settings) != "cuda":
        raise InputError(f"{path}: was begun on a GPU, and there is none here; run it on one.")
    precision = settings.precision or (told["precision"] if told else _best(device, settings))
    outputs = _checked_outputs(settings.outputs or (tuple(told["outputs"]) if told else None))
    size, values = network_size(network, precision), _stored_values(network.classes, outputs)
    if told and not settings.tile:
        tiles = _plan_from_json(told["plan"])
        memory = _needed(size, tiles, volume, values)
        memory = memory.on(settings.engine)
        _check_memory(memory, settings, path)
    else:
        tiles, memory = choose_plan(volume, network, size, settings, values)
    run = Segmentation(
        volume=volume,
        model=find_model(model),
        out=path,
        plan=tiles,
        intensity=Intensity.from_json(told["normalisation"]) if told else measure(volume),
        precision=precision,
        device=device,
        outputs=outputs,
        class_values=tuple(header.class_values),
        memory=memory,
        provenance={},
        resumed=told is not None,
    )
    run = replace(run, provenance=_provenance(run, header, settings))
    if told:
        _refuse_difference(path, told, run.provenance)
    return run


def _check_output(path: Path, read: Path) -> None:
    """Refuses a store that would lie in, or hold, something that is read."""
    there, source = path.resolve(), read.resolve()
    if there == source or there in source.parents or source in there.parents:
        raise InputError(f"{path}: overlaps {read}, which is read; choose another --out.")


def network_size(network: UNet, precision: Precision) -> NetworkSize:
    """The numbers of a network that memory depends on."""
    return NetworkSize(
        network.in_channels,
        network.classes,
        network.base_channels,
        network.depth,
        sum(p.numel() for p in network.parameters()),
        {"float32": 4, "bfloat16": 2}[precision],
    )


def _device(settings: Settings) -> Device:
    return "cuda" if engines.find_device(settings.engine, settings.workers) == "cuda" else "cpu"


def _best(device: Device, settings: Settings) -> Precision:
    if device == "cuda" and settings.engine == "ray":
        # The head of a cluster need not have the GPU that its workers have.
        return engines.ask_gpu(lambda: best_precision("cuda"))
    return best_precision(device)


def _checked_outputs(asked: tuple[str, ...] | None) -> tuple[str, ...]:
    for name in asked or ():
        if name not in ARRAYS:
            raise InputError(
                f"outputs={name!r} is not an output: choose from {', '.join(ARRAYS)}"
                f"{nearest(name, ARRAYS)}."
            )
    return tuple(name for name in ARRAYS if asked is None or name in asked)


def _check_memory(memory: WorkerMemory, settings: Settings, path: Path) -> None:
    if memory.total > settings.memory:
        raise InputError(
            f"{path}: its plan needs {format_bytes(memory.total)} per worker, "
            f"{format_bytes(settings.memory)} allowed; give --memory {memory.total} or more, or "
            f"another --out."
        )


def _provenance(run: Segmentation, header: ModelHeader, settings: Settings) -> dict[str, Any]:
    """Everything that fixes the bytes of a store, and nothing that does not."""
    channels = run.volume.shape[0]
    told = {
        "format": FORMAT,
        "model": {
            "sha256": sha256_of(run.model),
            "architecture": header.architecture,
            "training": header.training,
            "class_values": header.class_values,
        },
        "input": {
            **run.volume.identity(),
            # Not naming the only channel or time point is naming it.
            "channel": 0 if settings.channel is None and channels == 1 else settings.channel,
            "time": settings.time or 0,
            "level": settings.level,
        },
        "outputs": list(run.outputs),
        "plan": asdict(run.plan),
        "precision": run.precision,
        "normalisation": run.intensity.to_json(),
        "device": run.device,
        "instructions": instructions(run.device),
        "threads_per_pass": 1,
        "versions": versions(),
    }
    return cast(dict[str, Any], json.loads(json.dumps(told)))  # tuples become lists, as when read


def _plan_from_json(told: dict[str, Any]) -> TilePlan:
    context = Context(**{name: tuple(v) for name, v in told["context"].items()})
    return TilePlan(tuple(told["shape"]), tuple(told["core"]), context, tuple(told["passes"]))


def _refuse_difference(path: Path, told: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    there, here = dict(_flat(told)), dict(_flat(now))
    for field in UNCOMPARED:
        there.pop(field, None)
        here.pop(field, None)
    for field in [*here, *there]:
        if there.get(field) != here.get(field):
            raise InputError(
                f"{path}: was made with another {field} ({there.get(field)}, now "
                f"{here.get(field)}); choose another --out, or delete it with --overwrite."
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a tile.

    Attributes:
        done, total: tiles committed, and tiles asked for, in this region.
        finished: tiles done by this call.
        voxels: voxels written by this call so far.
        seconds: since the first tile was started.
    """

    done: int
    total: int
    finished: int
    voxels: int
    seconds: float


def execute(run: Segmentation, settings: Settings, watch: Callable[[Progress], None]) -> int:
    """Does what is missing of a run; returns the number of tiles that it did.

    Args:
        run: from `prepare`.
        settings: the same as given there.
        watch: called after each tile is committed.

    Raises:
        RunError: if a tile fails; what was committed stays and the next run goes on from it.
    """
    if not run.resumed:
        if settings.overwrite and run.out.exists():
            with Ledger(run.out / LEDGER, len(run.plan)):  # refuses beside a live run
                delete_store(run.out)
        layout = StoreLayout(run.plan, run.class_values, run.outputs, run.volume.voxel_size)
        create_store(run.out, layout, run.provenance)
    stage = engines.Stage("segment", run.make_worker, run.device)
    region = settings.region or Box.of(run.plan.shape)
    start, done, voxels = time.monotonic(), 0, 0
    with Ledger(run.out / LEDGER, len(run.plan)) as ledger:
        remove_partial(run.out / PRIVATE)
        total = sum(1 for _ in run.plan.within(region))
        missing = list(ledger.missing(run.plan.within(region)))
        before = total - len(missing)
        if not missing:
            return 0
        for receipt in engines.run(stage, missing, settings.engine, settings.workers):
            if receipt.error:
                raise RunError(receipt.error)
            ledger.commit(receipt.tile)
            done, voxels = done + 1, voxels + run.plan[receipt.tile].write.size
            watch(Progress(before + done, total, done, voxels, time.monotonic() - start))
    return done


def segment(
    source: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Segments one volume into a store, or goes on with it where it stopped.

    Args:
        source: path of the volume.
        model: RUN folder or model file.
        out: path of the store.
        settings: what to do otherwise than by default.
        watch: called after each tile.

    Returns:
        Path of the store.

    Raises:
        InputError: for anything wrong with input, model, settings or an existing store.
        RunError: if a tile fails.
    """
    settings = settings or Settings()
    run = prepare(source, model, out, settings)
    execute(run, settings, watch)
    return run.out


def prepare_all(
    sources: Sequence[str], model: str, out: str, settings: Settings
) -> list[Segmentation]:
    """Prepares every input before any is run; see `prepare` and `output_paths`.

    Raises:
        InputError: also if a store would overlap the input of another, or the model.
    """
    stores = output_paths(sources, out)
    runs = [
        prepare(source, model, store, settings)
        for source, store in zip(sources, stores, strict=True)
    ]
    for run in runs:
        for other in [run.model, *(Path(each.volume.path) for each in runs)]:
            _check_output(run.out, other)
    return runs


def output_paths(sources: Sequence[str], out: str) -> list[Path]:
    """The store of each input: `out` itself for one, a store each in folder `out` for several.

    Raises:
        InputError: if two inputs would share a store.
    """
    if len(sources) == 1:
        return [Path(out)]
    names = [Path(source).name for source in sources]
    stems = [re.sub(r"(\.ome)?\.(tiff?|zarr|png)$", "", name, flags=re.I) for name in names]
    for stem in stems:
        if stems.count(stem) > 1:
            raise InputError(f"Two inputs are named {stem!r}: run them with an --out each.")
    return [Path(out) / f"{stem}.zarr" for stem in stems]
