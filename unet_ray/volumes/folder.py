"""A folder of slices as one volume.

Handles the natural order of file names. Independent of the format of each file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import ChangedError, InputError, RunError, reason
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.image_files import open_file
from unet_ray.volumes.omissions import gap_in, merge_omissions
from unet_ray.volumes.volume import Volume, reopen

# Files that only folders of other formats contain.
_OTHER_FOLDERS = {"attributes.json": "N5", "info": "Neuroglancer precomputed"}


class Folder(Volume):
    """A folder of TIFF or PNG slices, one plane per file, in natural order."""

    kind = "folder"

    def _open(self) -> list[str]:
        paths = self._slices()
        first = open_file(paths[0], self._choice)
        c, z, y, x = first.shape
        if z != 1:
            raise InputError(
                f"{paths[0]} contains {z} planes: each file of a folder must contain one slice."
            )
        self._costliest = first
        names = [os.path.basename(path) for path in paths]
        omissions = [(names[0], omission) for omission in first.omissions]
        for name, path in zip(names[1:], paths[1:], strict=True):
            other = open_file(path, replace(self._choice, quiet=True))
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                raise InputError(
                    f"{self.path} contains different slices: {names[0]} is {first.shape} "
                    f"{first.dtype}, {name} is {other.shape} {other.dtype}. All must have the same "
                    "shape (c, z, y, x) and data type."
                )
            if other.read_overhead((1, y, x)) > self._costliest.read_overhead((1, y, x)):
                self._costliest = other
            omissions += [(name, omission) for omission in other.omissions]
        sizes = (None, *first.voxel_size[1:]) if first.voxel_size else (None, None, None)
        self._describe((c, len(paths), y, x), first.dtype, first.chunk, sizes)
        self.channel_names = first.channel_names
        self.index_bytes = self._costliest.index_bytes
        gap = gap_in(names)
        self.omissions = (*merge_omissions(omissions), *([gap] if gap else []))
        return paths

    def read_overhead(self, shape: Sequence[int]) -> int:
        """See `Volume.read_overhead`. One slice is read at a time."""
        one_slice = 1, *shape[1:]
        return (
            self._costliest.read_overhead(one_slice)
            + self.shape[0] * math.prod(one_slice) * self.dtype.itemsize
        )

    def slice_files(self) -> list[str]:
        """File name of each slice, in order."""
        return [os.path.basename(path) for path in self._source]

    def _slices(self) -> list[str]:
        """Returns the paths of the slices in natural order: t2 before t10."""
        try:
            names = [name for name in os.listdir(self.path) if not name.startswith(".")]
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {reason(error)}.") from error
        names = [name for name in names if name.lower().endswith((".tif", ".tiff", ".png"))]
        if not names:
            for name, label in _OTHER_FOLDERS.items():
                if os.path.exists(os.path.join(self.path, name)):
                    raise InputError(
                        f"{self.path} is a {label} volume, which unet-ray does not read; convert "
                        "it to OME-Zarr."
                    )
            raise InputError(f"{self.path} contains no TIFF or PNG slices and no Zarr metadata.")
        return [os.path.join(self.path, name) for name in sorted(names, key=_natural)]

    def _read(self, box: Box) -> NDArray[Any]:
        c, _, y, x = self.shape
        voxels = np.empty((c, *box.shape), self.dtype)
        in_slice = Box((0, *box.start[1:]), (1, *box.stop[1:]))
        for z, path in enumerate(self._source[box.slices[0]]):
            slice_ = reopen(open_file, path, self._choice, (c, 1, y, x), self.dtype)
            voxels[:, z] = slice_.read(in_slice)[:, 0]
        return voxels

    def _reopen(self) -> list[str]:
        """Lists the slices only: `_read` checks each slice when it opens it."""
        try:
            paths = self._slices()
        except InputError as error:
            raise RunError(str(error)) from error
        if len(paths) != self.shape[1]:
            raise ChangedError(
                f"{self.path} has changed since it was opened: it had {self.shape[1]} slices and "
                f"now has {len(paths)}."
            )
        return paths

    def _files(self) -> list[str]:
        return list(self._source)

    def _files_of(self, box: Box) -> list[str]:
        return self._files()[box.slices[0]]


def _natural(name: str) -> tuple[list[int | str], str]:
    """Sort key that compares runs of digits as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def slices_by_number(larger: Volume, other: Volume) -> list[int] | None:
    """Pairs the slices of two folders by the last number in the names of their files.

    A sequence of the Cell Tracking Challenge has many frames (t000.tif, ...) and truth for a few of
    them (man_seg021.tif, ...).

    Args:
        larger: the folder with more slices.
        other: the folder with fewer slices.

    Returns:
        The slice of `larger` for each slice of `other`; None if numbers are missing or not unique.

    Raises:
        InputError: if `larger` lacks the number of a slice; names its file.
    """
    names, numbered = larger.slice_files(), other.slice_files()
    index = {last_number(name): n for n, name in enumerate(names)}
    unique = len(index) == len(names) and len({*map(last_number, numbered)}) == len(numbered)
    if not unique or None in index:
        return None
    for name in numbered:
        if last_number(name) not in index:
            raise InputError(
                f"{larger.path}: has no slice with the number of {name} in {other.path}; slices "
                "of folders of different length are paired by the last number in their names."
            )
    return [index[last_number(name)] for name in numbered]


def last_number(name: str) -> int | None:
    """Returns the last number in the name of a file, without its ending; None without a number."""
    numbers = re.findall(r"[0-9]+", os.path.splitext(name)[0])
    return int(numbers[-1]) if numbers else None
