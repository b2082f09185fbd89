"""A run that is ready to start: everything that fixes its bytes, checked, and its worker.

Knows plan -> read -> predict -> write of one tile, and what a store tells of the run that made it;
does not know which tiles are done, or who runs them. Writes nothing before a worker does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine import cluster
from unet_ray.errors import InputError, RunError, VoxelError, refuse_below_file
from unet_ray.network.checkpoints import ModelHeader, find_model, read_model, sha256_of
from unet_ray.network.prediction import Device, Precision, Predictor, instructions
from unet_ray.segmentation.choice import (
    Settings,
    checked_outputs,
    choose_plan,
    device_of,
    needed_bytes,
    needed_memory,
    network_size,
    open_inputs,
    precision_of,
    process_bytes,
    stored_values,
)
from unet_ray.segmentation.memory import WorkerMemory, format_bytes, room
from unet_ray.storage.lease import Fence
from unet_ray.storage.places import Place, Where, place_of, unusable
from unet_ray.storage.stores import FORMAT, Store, is_untouched, provenance_of, refuse_others
from unet_ray.tiling.mirror import read_mirrored, reflect
from unet_ray.tiling.tiles import Tile, TilePlan
from unet_ray.versions import versions
from unet_ray.volumes.intensity import Intensity, measure
from unet_ray.volumes.masks import open_mask
from unet_ray.volumes.volume import Volume

# What of the machine and its software fixes the bytes.
KIND = ("instructions", "versions")
# Told in the store, but another version of these gives the same bytes.
UNCOMPARED = ("versions.numpy", "versions.zarr")


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
        tta: average over the 8 symmetries of the square.
        nan: ``zero`` if voxels that are not finite count as 0.
        outputs: what is stored.
        class_values: label value of each class.
        memory: what one worker needs.
        provenance: all of this as JSON, kept in the store and compared when a run goes on.
        resumed: the store was there already and is continued.
        mask: shows which tiles are asked for; None for all.
        fence: keeps workers from writing once the run has lost its output; None for no such run.
    """

    volume: Volume
    model: Path
    out: Place
    plan: TilePlan
    intensity: Intensity
    precision: Precision
    device: Device
    tta: bool
    nan: str
    outputs: tuple[str, ...]
    class_values: tuple[int, ...]
    memory: WorkerMemory
    provenance: Mapping[str, Any]
    resumed: bool
    mask: Volume | None = None
    fence: Fence | None = None

    def make_worker(self) -> TileWorker:
        """The worker of the segment stage, for the process that runs it."""
        return TileWorker(self)

    def make_helper(self) -> TileHelper:
        """A worker that only reads or writes, where another predicts."""
        return TileHelper(self)


class TileHelper:
    """Reads and writes tiles of one run; may be shared by threads."""

    def __init__(self, run: Segmentation) -> None:
        self._run = run
        _refuse_other_kind(run)
        self._store = Store(run.out, run.outputs, run.fence.look if run.fence else None)

    def read(self, tile: int) -> NDArray[Any]:
        """The voxels that a tile reads, ``(c, z, y, x)``, mirrored beyond the volume's faces.

        Raises:
            VoxelError: if one of them is not a finite number; names the tile and the voxel.
        """
        return read_tile(self._run.volume, self._run.plan[tile], self._run.nan)

    def write(self, tile: int, result: dict[str, NDArray[np.uint8]]) -> None:
        """Writes the shards of a tile and waits until they are on disk."""
        self._store.write(self._run.plan[tile], result)


class TileWorker(TileHelper):
    """Reads, predicts and writes tiles of one run; may be shared by threads."""

    def __init__(self, run: Segmentation) -> None:
        super().__init__(run)
        network, _ = read_model(run.model)
        self._predictor = Predictor(
            network, run.plan, run.intensity, run.precision, run.device, run.tta
        )

    def predict(self, tile: int, voxels: NDArray[Any]) -> dict[str, NDArray[np.uint8]]:
        """The outputs on the core of a tile."""
        return self._predictor(self._run.plan[tile], voxels, self._run.outputs)


def read_tile(volume: Volume, tile: Tile, nan: str) -> NDArray[Any]:
    """The voxels that `tile` reads, ``(c, z, y, x)``, mirrored beyond the volume's faces.

    Args:
        volume: the input.
        tile: of any plan of it.
        nan: ``zero`` if voxels that are not finite count as 0.

    Raises:
        VoxelError: if one of them is not a finite number; names the tile and the voxel.
    """
    voxels = read_mirrored(volume.read, volume.shape[1:], tile.read)
    if voxels.dtype.kind != "f" or np.isfinite(voxels).all():
        return voxels
    if nan == "zero":
        return np.where(np.isfinite(voxels), voxels, voxels.dtype.type(0))
    raise VoxelError(_not_finite(volume, tile, voxels))


def _not_finite(volume: Volume, tile: Tile, voxels: NDArray[Any]) -> str:
    channel, *offset = np.argwhere(~np.isfinite(voxels))[0].tolist()
    seen = zip(tile.read.start, offset, volume.shape[1:], strict=True)
    place = tuple(int(reflect(np.array(a + n), extent)) for a, n, extent in seen)
    return (
        f"{volume.path}: voxel (z, y, x) = {place} of channel {channel} is "
        f"{voxels[(channel, *offset)]}, read by tile {tile.index} ({tile.write}); replace "
        f"values that are not finite, or give --nan zero and another --out."
    )


def prepare(
    source: Where,
    model: str | os.PathLike[str],
    out: Where,
    settings: Settings,
) -> Segmentation:
    """Checks everything and fixes what the bytes of the run depend on; writes nothing.

    Where the store exists, its plan, precision and normalisation are kept, so that a rerun from
    another machine or with another memory allowance goes on with the same bytes.

    Raises:
        InputError: for anything wrong with input, model, settings or an existing store.
    """
    volume, network, header = open_inputs(source, model, settings)
    path = place_of(out)
    if isinstance(path, Path):
        refuse_below_file(path)
    for read in (volume.path, find_model(model), *([settings.mask] if settings.mask else [])):
        refuse_overlap(path, place_of(read))
    told = told_by(path, settings.overwrite)
    device: Device = told["device"] if told else device_of(settings)
    if told and device == "cuda" and device_of(settings) != "cuda":
        raise InputError(f"{path}: was begun on a GPU, and there is none here; run it on one.")
    precision = settings.precision or (
        told["precision"] if told else precision_of(device, settings)
    )
    outputs = checked_outputs(settings.outputs or (tuple(told["outputs"]) if told else None))
    size, values = (
        network_size(network, precision, settings.tta),
        stored_values(network.classes, outputs),
    )
    if told and not settings.tile:
        tiles = TilePlan.from_json(told["plan"])
        memory = needed_memory(size, tiles, volume, values)
        memory = memory.on(settings.engine)
        _check_memory(memory, settings, path)
    else:
        tiles, memory = choose_plan(volume, network, size, settings, values)
    if not (told and settings.engine == "ray"):  # a finished store needs no cluster to say so
        check_room(path, memory, device, settings)
    mask = open_mask(settings.mask, volume.shape[1:]) if settings.mask else None
    run = Segmentation(
        volume=volume,
        model=find_model(model),
        out=path,
        plan=tiles,
        intensity=Intensity.from_json(told["normalisation"]) if told else measure(volume),
        precision=precision,
        device=device,
        tta=settings.tta,
        nan=settings.nan,
        outputs=outputs,
        class_values=tuple(header.class_values),
        memory=memory,
        provenance={},
        resumed=told is not None,
        mask=mask,
    )
    # On a cluster a worker compares its machine with what the store tells, when it is made.
    kind = told if told and settings.engine == "ray" else _asked_kind(device, settings)
    run = replace(run, provenance=_provenance(run, header, settings, kind))
    if told:
        refuse_difference(path, told, run.provenance)
    return run


def told_by(path: Place, anew: bool) -> dict[str, Any] | None:
    """How the store at `path` was made that is to be continued; None if there is none to be.

    Args:
        path: the store.
        anew: whether it is to be made anew in any case.

    Raises:
        InputError: if what is there is not ours, or cannot be read.
    """
    try:
        if not anew:
            told = provenance_of(path)
            return None if is_untouched(path) else told
        refuse_others(path)
        return None
    except OSError as error:
        raise InputError(unusable(path, error)) from error


def refuse_overlap(path: Place, read: Place) -> None:
    """Makes sure that a store at `path` would neither lie in what is read nor hold it.

    Raises:
        InputError: if it would.
    """
    there, source = (
        PurePath(os.path.realpath(p) if isinstance(p, Path) else str(p)) for p in (path, read)
    )
    if there == source or there in source.parents or source in there.parents:
        raise InputError(f"{path}: overlaps {read}, which is read; choose another --out.")


def _check_memory(memory: WorkerMemory, settings: Settings, path: Place) -> None:
    if memory.total > settings.memory:
        raise InputError(
            f"{path}: its plan needs {format_bytes(memory.total)} per worker, "
            f"{format_bytes(settings.memory)} allowed; give --memory {memory.total} or more, or "
            f"another --out."
        )


def check_room(path: Place, memory: WorkerMemory, device: Device, settings: Settings) -> None:
    """Refuses more workers than there is memory for, on this machine or the cluster.

    Raises:
        InputError: names how many fit.
    """
    if settings.engine == "ray":
        cluster.pool_size(device, settings.workers, needed_bytes(memory, device, settings))
        return
    needed = process_bytes(memory, device, settings)
    there = room()
    if there and needed > there:
        workers = cluster.side_by_side(device, "local", settings.workers)
        fitting = [n for n in range(1, workers) if memory.shared_by(n) <= there]
        remedy = f"--workers {fitting[-1]}" if fitting else "a smaller --memory and another --out"
        raise InputError(
            f"{path}: {workers} workers need {format_bytes(needed)} in this process, "
            f"{format_bytes(there)} could be had; give {remedy}."
        )


def _refuse_other_kind(run: Segmentation) -> None:
    """Makes sure that this machine gives the bytes that the store is said to have.

    Raises:
        RunError: if it is of another kind than the one that the run was prepared for.
    """
    told, here = dict(_flat(run.provenance)), _kind_of_machine(run.device)
    for field, value in _flat(here):
        if field not in UNCOMPARED and told.get(field, value) != value:
            raise RunError(
                f"{run.out}: its {field} is {told[field]}, but {value} on {os.uname().nodename}, "
                "so its tiles could have other bytes; run it on machines of one kind."
            )


def _kind_of_machine(device: Device) -> dict[str, Any]:
    """What of this machine and its software fixes the bytes."""
    return dict(zip(KIND, (instructions(device), versions()), strict=True))


def _asked_kind(device: Device, settings: Settings) -> dict[str, Any]:
    return cluster.ask(partial(_kind_of_machine, device), device, settings.engine)


def _provenance(
    run: Segmentation, header: ModelHeader, settings: Settings, kind: Mapping[str, Any]
) -> dict[str, Any]:
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
        "tta": run.tta,
        "nan": run.nan,
        "threads_per_pass": 1,
        **{name: kind.get(name) for name in KIND},
    }
    return cast(dict[str, Any], json.loads(json.dumps(told)))  # tuples become lists, as when read


def refuse_difference(path: Place, told: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Makes sure that a store was made as a run would make it.

    Args:
        path: the store.
        told: how it was made.
        now: how the run would make it.

    Raises:
        InputError: naming the first difference.
    """
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
