"""Volumes of one image file: TIFF or PNG.

Handles the arrangement of a file's planes as (c, z, y, x). Independent of folders and Zarr.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from unet_ray.errors import InputError, RunError, nearest, reason, refusing
from unet_ray.storage.parsing import refuse_special
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.omissions import PALETTE
from unet_ray.volumes.tiff import TiffImage, open_tiff
from unet_ray.volumes.volume import Choice, Volume, name_axes

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_MAGIC = b"\x89PNG"
_COPIED_ROWS = 64  # rows of a PNG image that are copied at a time


class Tiff(Volume):
    """One TIFF file."""

    kind = "tiff"

    def _open(self) -> tuple[TiffImage, NDArray[np.int64]]:
        image = open_tiff(self.path, quiet=self._choice.quiet)
        axes = name_axes(self.path, re.sub("[iq]", "?", image.axes.lower()), image.shape)
        planes = _plane_numbers(axes, image.shape)
        time, channels = self._choice.select(self.path, planes.shape[0], planes.shape[1])
        extents = [image.shape[axes.index(axis)] for axis in "yx"]
        planes = planes[time, channels]
        self._describe((*planes.shape, *extents), image.dtype, image.segment, image.sizes)
        self._name_channels(image.channel_names, channels)
        self._overhead, self.index_bytes = image.overhead, image.index_bytes
        self.omissions = image.omissions
        return image, planes

    def read_overhead(self, shape: Sequence[int]) -> int:
        """See `Volume.read_overhead`. It is 0 for memory-mapped files: uncompressed, contiguous."""
        return self._overhead

    def _read(self, box: Box) -> NDArray[Any]:
        image, planes = self._source
        z, y, x = box.slices
        voxels: NDArray[Any] = image.read(planes[:, z], y, x)
        return voxels


def _plane_numbers(axes: str, shape: Sequence[int]) -> NDArray[np.int64]:
    """Returns the plane numbers of a TIFF image as an array (t, c, z).

    Samples of a pixel (s) are treated as channels that vary faster than c.
    """
    counts = {axis: n for axis, n in zip(axes, shape, strict=True) if axis not in "yx-"}
    numbers = np.arange(math.prod(counts.values()), dtype=np.int64).reshape(tuple(counts.values()))
    numbers = numbers.transpose([list(counts).index(axis) for axis in "tcsz" if axis in counts])
    t, c, s, z = (counts.get(axis, 1) for axis in "tcsz")
    return numbers.reshape(t, c * s, z)


class Png(Volume):
    """One PNG image. A palette image is read as its colour numbers, not its colours."""

    kind = "png"

    def _open(self) -> None:
        with (
            refusing(self.path, "a PNG image"),
            PngImageFile(self.path) as image,
            open(self.path, "rb") as file,
        ):
            (width, height), bands = image.size, len(image.getbands())
            bit_depth, colour_type = file.read(26)[24:]
            file.seek(max(0, os.path.getsize(self.path) - 4096))
            has_end_mark = b"IEND" in file.read()
        if not has_end_mark:
            raise InputError(
                f"{self.path} is truncated: its PNG end mark is missing; copy or export it again."
            )
        if bit_depth == 16 and colour_type:
            raise InputError(
                f"{self.path} has 16 bits per colour, which cannot be read from PNG: export it as "
                "TIFF."
            )
        _, channels = self._choice.select(self.path, 1, bands)
        dtype = np.dtype(np.uint16 if bit_depth == 16 else np.uint8)
        shape = (channels.stop - channels.start, 1, height, width)
        self._describe(shape, dtype, shape[1:], (None, None, None))
        self._name_channels((), channels)
        self._bands = bands
        self.omissions = (PALETTE,) if colour_type == 3 else ()

    def read_overhead(self, shape: Sequence[int]) -> int:
        """See `Volume.read_overhead`. Pillow's whole image, and three copies of some rows."""
        pixel_bytes = 4 if self._bands > 1 else self.dtype.itemsize
        rows = self.shape[2] + 3 * min(_COPIED_ROWS, self.shape[2])
        return pixel_bytes * rows * self.shape[3]

    def _read(self, box: Box) -> NDArray[Any]:
        _, y, x = box.slices
        voxels = np.empty((self.shape[0], *box.shape), self.dtype)
        _, channels = self._choice.select(self.path, 1, self._bands)
        try:
            with PngImageFile(self.path) as image:
                if (*image.size, len(image.getbands())) != (*self.shape[:1:-1], self._bands):
                    raise ValueError("the image has changed since it was opened")
                for row in range(y.start, y.stop, _COPIED_ROWS):
                    stop = min(row + _COPIED_ROWS, y.stop)
                    pixels = np.asarray(image.crop((x.start, row, x.stop, stop)))
                    rows = slice(row - y.start, stop - y.start)
                    voxels[:, 0, rows] = np.moveaxis(np.atleast_3d(pixels), -1, 0)[channels]
        except Exception as error:  # as above
            raise RunError(f"{self.path} cannot be decoded: {reason(error)}.") from error
        return voxels


_OTHER_FORMATS = {
    b"\x89HDF": "an HDF5 file",
    b"\x93NUM": "a NumPy file",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
    b"\xff\xd8\xff": "a JPEG image",
    b"BM": "a BMP image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"NRRD": "an NRRD file",
}
# Formats of microscopes and of other fields, by the endings of their files. Bio-Formats reads them.
_MICROSCOPE_FORMATS = {
    ".mrc": "MRC",
    ".rec": "MRC",
    ".czi": "Zeiss CZI",
    ".nd2": "Nikon ND2",
    ".lif": "Leica LIF",
    ".dm3": "Gatan DM3",
    ".dm4": "Gatan DM4",
    ".nii": "NIfTI",
    ".nii.gz": "NIfTI",
    ".ims": "Imaris",
    ".oib": "Olympus OIB",
    ".vsi": "Olympus VSI",
}


def open_file(path: str, choice: Choice) -> Volume:
    """Opens a TIFF or PNG file.

    Raises:
        InputError: if the file has another format or cannot be read.
    """
    try:
        refuse_special(Path(path))
        with open(path, "rb") as file:
            head = file.read(8)
    except FileNotFoundError as error:
        folder, name = os.path.split(path)
        siblings = os.listdir(folder) if os.access(folder, os.R_OK) else []
        raise InputError(f"{path} does not exist{nearest(name, siblings)}.") from error
    except (OSError, ValueError) as error:  # ValueError: also a name with a NUL character
        raise InputError(f"{path} cannot be read: {reason(error)}.") from error
    if head.startswith(TIFF_MAGIC):
        return Tiff(path, choice)
    if head.startswith(PNG_MAGIC):
        return Png(path, choice)
    if not head:
        raise InputError(f"{path} is empty.")
    for ending, label in _MICROSCOPE_FORMATS.items():
        if path.lower().endswith(ending):
            raise InputError(
                f"{path} is a {label} file, which unet-ray does not read; convert it to OME-TIFF, "
                "for example with Bio-Formats in Fiji, or to OME-Zarr with bioformats2raw."
            )
    formats = [f": {label}" for magic, label in _OTHER_FORMATS.items() if head.startswith(magic)]
    raise InputError(
        f"{path} is not TIFF, PNG or Zarr: it starts with {head[:4]!r}{''.join(formats)}."
    )
