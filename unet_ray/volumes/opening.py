"""Opens a volume of any supported format by its path.

Detects the format at a path. Independent of how each format is read.
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
    """Returns the class or function that opens the format at `path`."""
    if isinstance(place := place_of(path), ObjectPath):
        try:
            if any((place / name).is_file() for name in METADATA_FILES):
                return Zarr
        except OSError as error:
            raise InputError(unusable(place, error)) from error
        raise InputError(
            f"{path} is not a Zarr array or OME-Zarr image. Other formats cannot be read from an "
            "object store: copy the file to a disk."
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
        source: path, or URL of a Zarr array or OME-Zarr image in an object store. If a file or
            group contains several images, the first is opened. Or an array (y, x), (z, y, x),
            (c, z, y, x) or (t, c, z, y, x), which is not copied. A volume is returned unchanged.
        channel: channel to read, from 0; all channels by default. RGB samples are channels.
        time: time point to read, from 0; required if there are several.
        level: resolution level of an OME-Zarr image; 0 is the finest.

    Raises:
        InputError: if the file cannot be read, or has no such channel, time point or level.
    """
    if isinstance(source, Volume):
        return source
    choice = Choice(channel, time, level)
    if isinstance(source, np.ma.MaskedArray):
        raise InputError("a masked array: fill it first, as in array.filled(0).")
    if isinstance(source, list | tuple) or hasattr(source, "__array__"):
        if level:
            raise InputError(f"level={level}: an array has one level.")
        return Array(np.asarray(source), choice)
    if not isinstance(source, str | os.PathLike | ObjectPath):
        raise InputError(f"{type(source).__name__} is not a volume; pass a path or an array.")
    return _open(str(place_of(source)), choice)
