"""What a user may ask of `segment`, checked against input and model.

Knows flags as values. Does not know tiles or memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Literal

from unet_ray.engine import cluster
from unet_ray.errors import InputError, nearest
from unet_ray.network.checkpoints import ModelHeader, find_model, read_model
from unet_ray.network.prediction import Device, Precision, best_precision
from unet_ray.network.unet import UNet
from unet_ray.storage.layout import ARRAYS
from unet_ray.storage.places import PathOrUrl
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume


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


def open_inputs(
    source: PathOrUrl, model: str | os.PathLike[str], settings: Settings
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


def device_of(settings: Settings) -> Device:
    """Where tiles would run: on a GPU where there are any, of this machine or of the cluster.

    Raises:
        InputError: if the cluster can never hold so many workers.
    """
    return cluster.find_device(settings.engine, settings.workers)


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
