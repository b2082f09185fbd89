"""A run prepared from what a user asks: input, model, store and settings, checked.

Knows everything that fixes the bytes of a run. Writes nothing; does not know who runs the tiles.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine import cluster
from unet_ray.errors import InputError, refuse_below_file
from unet_ray.machine import memory_available
from unet_ray.network.checkpoints import ModelHeader, find_model, sha256_of
from unet_ray.network.prediction import Device
from unet_ray.segmentation.memory import (
    WorkerMemory,
    needed_bytes,
    needed_memory,
    network_size,
    process_bytes,
    stored_values,
)
from unet_ray.segmentation.planning import choose_plan
from unet_ray.segmentation.run import Segmentation, kind_of_machine, refuse_difference
from unet_ray.segmentation.settings import (
    Settings,
    checked_outputs,
    device_of,
    open_inputs,
    precision_of,
)
from unet_ray.storage.inspection import inspect, refuse_others
from unet_ray.storage.layout import LEDGER
from unet_ray.storage.ledger import committed, skipped
from unet_ray.storage.places import PathOrUrl, Place, place_of, unusable
from unet_ray.storage.provenance import Provenance
from unet_ray.tiling.boxes import Box
from unet_ray.units import format_bytes
from unet_ray.volumes.intensity import Intensity, measure
from unet_ray.volumes.masks import open_mask, tiles_under


def prepare(
    source: PathOrUrl,
    model: str | os.PathLike[str],
    out: PathOrUrl,
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
    stored = stored_at(path, settings.overwrite)
    device: Device = stored.device if stored else device_of(settings)
    if stored and device != "cpu" and device_of(settings) != device:
        raise InputError(f"{path}: was begun on a GPU, and there is none here; run it on one.")
    precision = settings.precision or (
        stored.precision if stored else precision_of(device, settings)
    )
    outputs = checked_outputs(settings.outputs or (stored.outputs if stored else None))
    size, values = (
        network_size(network, precision, settings.tta),
        stored_values(network.classes, outputs),
    )
    if stored and not settings.tile:
        tiles = stored.plan
        memory = needed_memory(size, tiles, volume, values)
        memory = memory.on(settings.engine)
        _check_memory(memory, settings, path)
    else:
        tiles, memory = choose_plan(volume, network, size, settings, values)
    if not (stored and settings.engine == "ray"):  # a finished store needs no cluster to say so
        check_room(path, memory, device, settings)
    mask = open_mask(settings.mask, volume.shape[1:]) if settings.mask else None
    run = Segmentation(
        volume=volume,
        model=find_model(model),
        out=path,
        plan=tiles,
        intensity=Intensity.from_json(stored.normalisation) if stored else measure(volume),
        precision=precision,
        device=device,
        tta=settings.tta,
        nan=settings.nan,
        outputs=outputs,
        class_values=tuple(header.class_values),
        memory=memory,
        provenance=Provenance({}),
        resumed=stored is not None,
        mask=mask,
    )
    # On a cluster a worker compares its machine with the provenance, when it is made.
    kind = stored.kind if stored and settings.engine == "ray" else _asked_kind(device, settings)
    run = replace(run, provenance=_provenance(run, header, settings, kind))
    if stored:
        refuse_difference(path, stored, run.provenance)
    return run


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
    there = memory_available()
    if there and needed > there:
        workers = cluster.side_by_side(device, "local", settings.workers)
        fitting = [n for n in range(1, workers) if memory.shared_by(n) <= there]
        remedy = f"--workers {fitting[-1]}" if fitting else "a smaller --memory and another --out"
        raise InputError(
            f"{path}: {workers} workers need {format_bytes(needed)} in this process, "
            f"{format_bytes(there)} could be had; give {remedy}."
        )


def _asked_kind(device: Device, settings: Settings) -> dict[str, Any]:
    return cluster.ask(partial(kind_of_machine, device), device, settings.engine)


def _provenance(
    run: Segmentation, header: ModelHeader, settings: Settings, kind: Mapping[str, Any]
) -> Provenance:
    """Everything that fixes the bytes of a store, and nothing that does not."""
    channels = run.volume.shape[0]
    return Provenance.of(
        model={
            "sha256": sha256_of(run.model),
            "architecture": header.architecture,
            "training": header.training,
            "class_values": header.class_values,
        },
        source={
            **run.volume.identity(),
            # Not naming the only channel or time point is naming it.
            "channel": 0 if settings.channel is None and channels == 1 else settings.channel,
            "time": settings.time or 0,
            "level": settings.level,
        },
        outputs=run.outputs,
        plan=run.plan,
        precision=run.precision,
        normalisation=run.intensity.to_json(),
        device=run.device,
        tta=run.tta,
        nan=run.nan,
        kind=kind,
    )


def stored_at(path: Place, overwrite: bool) -> Provenance | None:
    """How the store was made that a run continues; None if the run begins a new one.

    Raises:
        InputError: if what is there is not ours, or cannot be read.
    """
    if not overwrite:
        return inspect(path).continued()
    try:
        refuse_others(path)
        return None
    except OSError as error:
        raise InputError(unusable(path, error)) from error


@dataclass(frozen=True)
class Request:
    """What was asked for: the tiles of a region, and of those the ones that a mask shows.

    Attributes:
        region: of the volume.
        tiles: bits of the tiles that are to be done, (tiles,).
        skipped: bits of those in the region that are not, (tiles,).
    """

    region: Box
    tiles: NDArray[np.bool_]
    skipped: NDArray[np.bool_]


def wanted_tiles(run: Segmentation, settings: Settings) -> Request:
    """Which tiles of a run were asked for."""
    region = settings.region or Box.of(run.plan.shape)
    inside = np.zeros(run.plan.counts, bool)
    inside[run.plan.part(region).slices] = True
    shown = tiles_under(run.mask, run.plan) if run.mask else np.ones(1, bool)
    return Request(region, (inside & shown).ravel(), (inside & ~shown).ravel())


def tiles_left(run: Segmentation, wanted: Request) -> NDArray[np.bool_]:
    """Bits of the tiles that are still to be done, (tiles,); of a store made anew all."""
    return pending_tiles(run, wanted) & wanted.tiles if run.resumed else wanted.tiles


def pending_tiles(run: Segmentation, wanted: Request) -> NDArray[np.bool_]:
    """Bits of the tiles that are still to be done, or to be noted as skipped."""
    done = committed(run.out / LEDGER, len(run.plan))
    noted = skipped(run.out / LEDGER, len(run.plan)) if wanted.skipped.any() else done
    return (wanted.tiles & ~done) | (wanted.skipped & ~done & ~noted)
