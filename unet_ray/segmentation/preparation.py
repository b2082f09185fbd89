"""Preparation of a run: checks the input, the model, the store and the settings.

Knows everything that determines the stored bytes. Writes nothing; does not know how tiles are run.
"""

from __future__ import annotations

import os
import re
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
from unet_ray.network.checkpoints import ModelHeader, find_model
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
    refuse_threshold,
)
from unet_ray.storage.inspection import inspect, refuse_others
from unet_ray.storage.layout import LEDGER
from unet_ray.storage.ledger import committed, skipped
from unet_ray.storage.places import PathOrUrl, Place, place_of, unusable
from unet_ray.storage.provenance import Provenance
from unet_ray.tiling.boxes import Box, Ints
from unet_ray.tiling.pyramid import factors_of
from unet_ray.units import format_bytes
from unet_ray.volumes.intensity import Intensity, measure
from unet_ray.volumes.masks import open_mask, tiles_under
from unet_ray.volumes.volume import Volume


def prepare(
    source: PathOrUrl,
    model: str | os.PathLike[str],
    out: PathOrUrl,
    settings: Settings,
) -> Segmentation:
    """Checks all inputs and fixes everything that the stored bytes depend on; writes nothing.

    An existing store keeps its plan, precision and normalisation. A rerun on another machine, or
    with another memory limit, therefore resumes with the same bytes.

    Args:
        source: path or URL of the volume.
        model: RUN folder or model file.
        out: path or URL of the store.
        settings: the settings of the run.

    Raises:
        InputError: if the input, the model, a setting or an existing store is invalid.
    """
    _refuse_image_name(str(out))
    volume, network, header, model_sha256 = open_inputs(source, model, settings)
    path = place_of(out)
    if isinstance(path, Path):
        refuse_below_file(path)
    masks = [settings.mask] if settings.mask else []
    for input_path in (volume.path, find_model(model), *masks):
        refuse_overlap(path, place_of(input_path))
    stored = stored_at(path, settings.overwrite)
    device: Device = stored.device if stored else device_of(settings)
    if stored and device != "cpu" and device_of(settings) != device:
        raise InputError(
            f"{path}: was started on a GPU, but none is available; use a machine with a GPU."
        )
    precision = settings.precision or (
        stored.precision if stored else precision_of(device, settings)
    )
    outputs = checked_outputs(settings.outputs or (stored.outputs if stored else None))
    size, values = (
        network_size(network, precision, settings.tta),
        stored_values(network.classes, outputs),
    )
    refuse_threshold(settings.threshold, network.classes)
    threshold = header.threshold if settings.threshold is None else settings.threshold
    rules = settings.rules_for(outputs)
    factors = _factors(volume, stored, settings.pyramid)
    later = rules is not None or bool(factors)
    if stored and not settings.tile:
        tiles = stored.plan
        memory = needed_memory(size, tiles, volume, values, rules, later)
        memory = memory.on(settings.engine)
        _check_memory_limit(memory, settings, path)
    else:
        tiles, memory = choose_plan(volume, network, size, settings, values, rules, later)
    if not (stored and settings.engine == "ray"):  # a finished store must not require a cluster
        check_memory(path, memory, device, settings)
    mask = None
    if settings.mask:
        mask = open_mask(settings.mask, volume.shape[1:], settings.strict)
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
        threshold=threshold,
        factors=factors,
        rules=rules,
        class_values=tuple(header.class_values),
        memory=memory,
        memory_limit=settings.memory,
        provenance=Provenance({}),
        resumed=stored is not None,
        mask=mask,
    )
    # On a cluster each new worker compares its machine with the provenance.
    kind = stored.kind if stored and settings.engine == "ray" else _worker_kind(device, settings)
    run = replace(run, provenance=_provenance(run, header, model_sha256, settings, kind))
    if stored:
        refuse_difference(path, stored, run.provenance)
    return run


def _refuse_image_name(out: str) -> None:
    """Refuses an output that is named as an image, since a folder of Zarr chunks is written."""
    if re.search(r"\.(tiff?|png|jpe?g|h5|hdf5|npy)$", out, re.I):
        stem = out.rpartition(".")[0]
        raise InputError(
            f"{out}: the output is an OME-Zarr folder, not an image file; name it {stem}.zarr."
        )


def _factors(volume: Volume, stored: Provenance | None, pyramid: bool | None) -> tuple[Ints, ...]:
    """The pyramid levels of a run; a store that is resumed keeps its own unless a flag differs."""
    if stored and pyramid is None:
        return stored.factors
    return () if pyramid is False else factors_of(volume.shape[1:], volume.voxel_size)


def refuse_overlap(path: Place, source: Place) -> None:
    """Refuses a store at `path` that would contain the input `source`, or be inside it.

    Raises:
        InputError: if the two overlap.
    """
    out_path, source_path = (
        PurePath(os.path.realpath(p) if isinstance(p, Path) else str(p)) for p in (path, source)
    )
    if (
        out_path == source_path
        or out_path in source_path.parents
        or source_path in out_path.parents
    ):
        raise InputError(f"{path}: overlaps the input {source}; choose another --out.")


def _check_memory_limit(memory: WorkerMemory, settings: Settings, path: Place) -> None:
    if memory.total > settings.memory:
        raise InputError(
            f"{path}: its plan needs {format_bytes(memory.total)} per worker, but only "
            f"{format_bytes(settings.memory)} are allowed; set --memory {memory.total} or more, "
            "or choose another --out."
        )


def check_memory(path: Place, memory: WorkerMemory, device: Device, settings: Settings) -> None:
    """Refuses more workers than fit into the memory of this machine or the cluster.

    Raises:
        InputError: if they do not fit; names the largest number that does.
    """
    if settings.engine == "ray":
        cluster.pool_size(device, settings.workers, needed_bytes(memory, device, settings))
        return
    needed = process_bytes(memory, device, settings)
    available = memory_available()
    if available and needed > available:
        workers = cluster.side_by_side(device, "local", settings.workers)
        fitting = [n for n in range(1, workers) if memory.shared_by(n) <= available]
        remedy = f"--workers {fitting[-1]}" if fitting else "a smaller --memory and another --out"
        raise InputError(
            f"{path}: {workers} workers need {format_bytes(needed)} in this process, but only "
            f"{format_bytes(available)} are available; set {remedy}."
        )


def _worker_kind(device: Device, settings: Settings) -> dict[str, Any]:
    """The kind of machine that runs the workers, queried on the cluster if the engine is Ray."""
    return cluster.ask(partial(kind_of_machine, device), device, settings.engine)


def _provenance(
    run: Segmentation,
    header: ModelHeader,
    model_sha256: str,
    settings: Settings,
    kind: Mapping[str, Any],
) -> Provenance:
    """The provenance: exactly the facts that determine the stored bytes."""
    channels = run.volume.shape[0]
    return Provenance.of(
        model={
            "sha256": model_sha256,
            "architecture": header.architecture,
            "training": header.training,
            "class_values": header.class_values,
        },
        source={
            **run.volume.identity(),
            # The only channel or time point is the same, whether named or not.
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
        threshold=run.threshold,
        factors=run.factors,
        objects=run.rules.to_json() if run.rules else None,
    )


def stored_at(path: Place, overwrite: bool) -> Provenance | None:
    """Provenance of the store that a run resumes; None if the run starts a new store.

    Raises:
        InputError: if the path is not an output of unet-ray, or cannot be read.
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
    """The tiles requested by region and mask, as boolean arrays of shape (tiles,).

    Attributes:
        region: the requested part of the volume.
        tiles: true for tiles inside the region and the mask.
        skipped: true for tiles inside the region but outside the mask.
    """

    region: Box
    tiles: NDArray[np.bool_]
    skipped: NDArray[np.bool_]


def wanted_tiles(run: Segmentation, settings: Settings) -> Request:
    """The tiles that the region and the mask of a run request."""
    region = settings.region or Box.of(run.plan.shape)
    in_region = np.zeros(run.plan.counts, bool)
    in_region[run.plan.part(region).slices] = True
    in_mask = tiles_under(run.mask, run.plan) if run.mask else np.ones(1, bool)
    return Request(region, (in_region & in_mask).ravel(), (in_region & ~in_mask).ravel())


def remaining_tiles(run: Segmentation, request: Request) -> NDArray[np.bool_]:
    """True for each requested tile that must still be computed, (tiles,); all for a new store."""
    return pending_tiles(run, request) & request.tiles if run.resumed else request.tiles


def pending_tiles(run: Segmentation, request: Request) -> NDArray[np.bool_]:
    """True for each tile that must still be computed, or recorded as skipped, (tiles,).

    Raises:
        RunError: see `Segmentation.absent`.
    """
    done = committed(run.out / LEDGER, len(run.plan)) & ~run.absent
    recorded = skipped(run.out / LEDGER, len(run.plan)) if request.skipped.any() else done
    return (request.tiles & ~done) | (request.skipped & ~done & ~recorded)
