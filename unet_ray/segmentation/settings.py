"""Settings of `segment`, and their checks against input and model.

Knows the flags of the command line as values. Does not know how tiles or memory are planned.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import numpy as np

from unet_ray.engine import cluster
from unet_ray.errors import InputError, nearest, refuse_unknown
from unet_ray.network.checkpoints import ModelHeader, find_model, read_hashed_model
from unet_ray.network.prediction import Device, Precision, best_precision
from unet_ray.network.unet import UNet
from unet_ray.segmentation.rules import Connect, Ids, Rules
from unet_ray.storage.layout import ARRAYS, PREDICTED
from unet_ray.storage.places import PathOrUrl
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.omissions import report_omissions
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume


@dataclass(frozen=True)
class Settings:
    """Settings of `segment`.

    Attributes:
        outputs: which of ``probabilities``, ``classes`` and ``instances`` to store; None for those
            of an existing store, else the first two. Instances need the class map, so it is
            stored with them.
        pyramid: store coarser levels for viewers; None to keep an existing store's, else True.
        threshold: probability above which a voxel is of class 1, for two classes; None for the
            threshold of the model, or the likelier class if the model has none.
        connect, connectivity, split, min_size, fill_holes, exclude_border, ids: see `Rules`.
        region: part of the volume to segment, (z, y, x); None for the whole volume.
        mask: path of a volume that is nonzero where tiles are requested; see `masks`.
        channel, time, level: channel, time point and pyramid level of the input.
        tile: core in voxels, (z, y, x); None to keep an existing store's core, or choose one.
        memory: upper bound of the bytes of one worker.
        workers: number of tiles computed in parallel; None for one per core or GPU.
        engine: ``local`` (threads of this process) or ``ray``.
        precision: number format of the network; None to keep an existing store's, or choose the
            fastest.
        tta: average over 8 symmetries, in 3-D over 16 or 48 (test-time augmentation).
        nan: treatment of non-finite voxels: ``error`` quarantines their tile, ``zero`` replaces
            them by 0.
        overwrite: first delete an existing store.
        takeover: end another run that is writing to the store.
        strict: refuse an input or a mask of which a part would be left out; otherwise the part is
            only named on standard error.
    """

    outputs: tuple[str, ...] | None = None
    pyramid: bool | None = None
    threshold: float | None = None
    connect: Connect = "volume"
    connectivity: Literal[6, 18, 26] = 6
    split: bool = False
    min_size: int = 0
    fill_holes: bool = False
    exclude_border: bool = False
    ids: Ids = "dense"
    region: Box | None = None
    mask: PathOrUrl | None = None
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
    strict: bool = False

    def __post_init__(self) -> None:
        refuse_unknown("nan", self.nan, ("error", "zero"))
        refuse_unknown("engine", self.engine, ("local", "ray"))
        if self.precision is not None:
            refuse_unknown("precision", self.precision, ("float32", "bfloat16"))
        for name in ("channel", "time", "level", "workers", "memory"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int | np.integer):
                raise InputError(f"{name}={value!r} must be a whole number.")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise InputError(f"threshold={self.threshold} must be at least 0 and below 1.")
        _ = self.rules  # refuses invalid ones

    @property
    def rules(self) -> Rules:
        """The rules of the objects.

        Raises:
            InputError: if one is not allowed.
        """
        return Rules(**{field.name: getattr(self, field.name) for field in fields(Rules)})

    def rules_for(self, outputs: tuple[str, ...]) -> Rules | None:
        """The rules of the objects; None without ``instances`` among the `outputs`.

        Raises:
            InputError: if a rule is set without instances; names it.
        """
        if "instances" in outputs:
            return self.rules
        for field in fields(Rules):
            if (value := getattr(self, field.name)) != field.default:
                raise InputError(
                    f"{field.name}={value!r} applies to objects, but the outputs are "
                    f"{' and '.join(outputs)}: add instances to --outputs."
                )
        return None


def open_inputs(
    source: PathOrUrl, model: str | os.PathLike[str], settings: Settings
) -> tuple[Volume, UNet, ModelHeader, str]:
    """Opens input and model, and checks that they match each other and the region.

    Returns:
        The volume, the network, its header, and the SHA-256 of the model file.

    Raises:
        InputError: if the input or the model is invalid, their channels differ, or the region is
            empty or leaves the volume; with `strict` also if a part of the input is left out.
    """
    volume = open_volume(source, channel=settings.channel, time=settings.time, level=settings.level)
    report_omissions(volume.path, volume.omissions, settings.strict)
    volume.pin()  # before anything is read from it
    file = find_model(model)
    network, header, sha256 = read_hashed_model(file)
    refuse_channels(volume, network, str(file))
    extent = Box.of(volume.shape[1:])
    region = settings.region
    if region and (region.size == 0 or region.intersect(extent) != region):
        raise InputError(
            f"region={region} must be a box of at least one voxel inside the volume, {extent}."
        )
    return volume, network, header, sha256


def refuse_channels(volume: Volume, network: UNet, model: str) -> None:
    """Refuses a volume with another number of channels than the network reads.

    Raises:
        InputError: naming both numbers.
    """
    if volume.shape[0] != network.in_channels:
        choice = "select it before, as image[0]" if volume.kind == "array" else "use --channel N"
        hint = f"; for one channel, {choice}" if network.in_channels == 1 else ""
        raise InputError(
            f"{volume.path}: has {volume.shape[0]} channels, but {model} was trained on "
            f"{network.in_channels}{hint}."
        )


def refuse_threshold(threshold: float | None, classes: int) -> None:
    """Refuses a threshold for a network of more than two classes.

    Raises:
        InputError: naming both.
    """
    if threshold is not None and classes != 2:
        raise InputError(
            f"threshold={threshold} needs a network of 2 classes, but this one has {classes}: "
            "leave it out, and each voxel gets its most probable class."
        )


def device_of(settings: Settings) -> Device:
    """The device for the tiles: a GPU if this machine or the cluster has one, else the CPU.

    Raises:
        InputError: if the cluster can never run ``settings.workers`` workers.
    """
    return cluster.find_device(settings.engine, settings.workers)


def precision_of(device: Device, settings: Settings) -> Precision:
    """The fastest number format of the machines that run the tiles."""
    return cluster.ask(partial(best_precision, device), device, settings.engine)


def checked_outputs(names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The outputs to store, in the order of the store; without objects if `names` is None.

    Instances are made from the class map, so it is stored with them.

    Raises:
        InputError: if a name is not an output; suggests the nearest.
    """
    for name in names or ():
        if name not in ARRAYS:
            raise InputError(
                f"outputs={name!r} is not an output: choose from {', '.join(ARRAYS)}"
                f"{nearest(name, ARRAYS)}."
            )
    chosen = {*(names or PREDICTED)}
    if "instances" in chosen:
        chosen.add("classes")
    return tuple(name for name in ARRAYS if name in chosen)
