"""A volume opened by its path, whatever its format.

Knows which format lies at a path. Does not know how any format is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError
from unet_ray.storage.objects import ObjectPath
from unet_ray.storage.places import PathOrUrl, place_of, unusable
from unet_ray.volumes.array import Array
from unet_ray.volumes.folder import Folder
from unet_ray.volumes.image_files import open_file
from unet_ray.volumes.ome_zarr import METADATA_FILES, Zarr
from unet_ray.volumes.volume import Choice, Volume


def _open(path: str, choice: Choice) -> Volume:
    kind = _kind(path)
    if choice.level and kind is not Zarr:
        raise InputError(f"{path} has one level: --level {choice.level} needs an OME-Zarr image.")
    return kind(path, choice)


def _kind(path: str) -> Callable[[str, Choice], Volume]:
    """What opens a path, by what is there."""
    if isinstance(place := place_of(path), ObjectPath):
        try:
            if any((place / name).is_file() for name in METADATA_FILES):
                return Zarr
        except OSError as error:
            raise InputError(unusable(place, error)) from error
        raise InputError(
            f"{path} is no Zarr array or OME-Zarr image; of an object store only these are read: "
            "copy anything else to a disk."
        )
    if os.path.isdir(path):
        is_zarr = any(os.path.exists(os.path.join(path, name)) for name in METADATA_FILES)
        return Zarr if is_zarr else Folder
    return open_file


def open_volume(
    source: PathOrUrl | NDArray[Any] | Volume,
    *,
    channel: int | None = None,
    time: int | None = None,
    level: int = 0,
) -> Volume:
    """Opens a TIFF or PNG file, a folder of slices, a Zarr array, an OME-Zarr image, or an array.

    Args:
        source: path, or URL of a Zarr array or OME-Zarr image in an object store. Of several images
            in one file or group the first is taken. Or an array (y, x), (z, y, x), (c, z, y, x) or
            (t, c, z, y, x), which is not copied. A volume is returned as it is.
        channel: the one channel to read, from 0; all by default. RGB samples are channels.
        time: the time point to read, from 0; needed where there are several.
        level: of the resolutions of an OME-Zarr image, 0 being the finest.

    Raises:
        InputError: if the path, the file or the choice is at fault.
    """
    if isinstance(source, Volume):
        return source
    choice = Choice(channel, time, level)
    if hasattr(source, "__array__"):
        if level:
            raise InputError(f"level={level}: an array has one level.")
        return Array(np.asarray(source), choice)
    return _open(str(place_of(source)), choice)
