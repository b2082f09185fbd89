"""A stored volume, read by boxes, always as (c, z, y, x).

Knows what volumes of all formats share: the choice of a channel, the identity of an input, the
letters of axes. Does not know any format.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError, RunError
from unet_ray.storage.places import place_of, stat_of
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.tiff import Sizes

_SAMPLES, _SAMPLE_BYTES = 16, 2**20
_TRIES, _PAUSE = 3, 0.2  # seconds between two tries


@dataclass(frozen=True)
class Choice:
    """What was asked for of all that a file holds."""

    channel: int | None = None
    time: int | None = None
    level: int = 0
    quiet: bool = False

    def select(self, path: str, times: int, channels: int) -> tuple[int, slice]:
        """The time point to read and the channels to read, of as many as `path` has."""
        if self.time is None and times > 1:
            raise InputError(f"{path} has {times} time points: choose one, such as --time 0.")
        if not 0 <= (self.time or 0) < times:
            raise InputError(f"{path} has no --time {self.time}: it goes from 0 to {times - 1}.")
        if self.channel is None:
            return self.time or 0, slice(0, channels)
        if not 0 <= self.channel < channels:
            last = channels - 1
            raise InputError(f"{path} has no --channel {self.channel}: it goes from 0 to {last}.")
        return self.time or 0, slice(self.channel, self.channel + 1)


class Volume(ABC):
    """A stored image; it pickles as this description and opens its file again where it is read.

    Attributes:
        path: absolute path of the file or folder.
        shape: extents, always (c, z, y, x).
        dtype: of what `read` returns: integers or floats, in native byte order.
        voxel_size: along z, y, x in micrometre, or None where the file does not say. Of a
            single plane of which only y and x are known, z counts as 1.
        channel_names: one per channel, "" if unknown.
        chunk: (z, y, x) extent of the storage unit: inner chunk of Zarr, strip or tile of TIFF.
        index_bytes: at most this many bytes are needed in each process to open the file.
    """

    kind: ClassVar[str]
    path: str
    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    voxel_size: tuple[float, float, float] | None
    channel_names: tuple[str, ...]
    chunk: tuple[int, int, int]
    index_bytes: int = 0

    def __init__(self, path: str, choice: Choice) -> None:
        self.path, self._choice = path, choice
        self._source = self._open()

    def read(self, box: Box) -> NDArray[Any]:
        """The voxels of `box` (over z, y, x), a fresh array of shape ``(c, *box.shape)``.

        Only the storage units that the box touches are read. Safe from several threads at once.

        Raises:
            RunError: if what is stored is damaged, or has changed since the volume was opened.
            ValueError: if the box leaves the volume.
        """
        if box.intersect(Box.of(self.shape[1:])) != box:
            raise ValueError(f"Box {box} leaves {self.path} of shape {self.shape[1:]} (z, y, x).")
        if not box.size:
            return np.empty((self.shape[0], *box.shape), self.dtype)
        voxels = self._read(box)
        if voxels.shape != (self.shape[0], *box.shape):
            raise RunError(f"{self.path} has become smaller since it was opened.")
        return voxels

    @abstractmethod
    def read_overhead(self, shape: Sequence[int]) -> int:
        """Bytes at most that reading a box of `shape` (z, y, x) holds beside what it gives.

        They are those of storage units, as they are stored and decoded, with all their channels.
        """

    def read_patiently(self, box: Box) -> NDArray[Any]:
        """As `read`, tried again if it fails: disks and file servers have bad moments.

        Raises:
            RunError: if it fails every time.
        """
        for _ in range(_TRIES - 1):
            with suppress(RunError):
                return self.read(box)
            time.sleep(_PAUSE)
        return self.read(box)

    def identity(self) -> dict[str, Any]:
        """What tells this input from another, for JSON; the same on every call.

        Size and time are those of the image files, but for Zarr of the metadata files alone: an
        array may have millions of chunks. One hash covers names, sizes and times of all these
        files; the other 16 storage units at most, evenly spread, of at most 1 MiB each.
        """
        files = sorted(self._files())
        stats = [stat_of(place_of(name)) for name in files]
        listed = [
            f"{os.path.basename(name)} {stat.size} {stat.modified_ns}\n"
            for name, stat in zip(files, stats, strict=True)
        ]
        return {
            "name": os.path.basename(self.path),
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            "bytes": sum(stat.size for stat in stats),
            "modified_ns": max(stat.modified_ns for stat in stats),
            "files_sha256": hashlib.sha256("".join(listed).encode()).hexdigest(),
            "sampled_sha256": self._sampled_hash(),
        }

    def slice_files(self) -> list[str]:
        """Name of the file of each slice, for a folder of slices; empty for anything else."""
        return []

    def _sampled_hash(self) -> str:
        digest = hashlib.sha256(f"{self.shape} {self.dtype}".encode())
        grid = [-(-n // m) for n, m in zip(self.shape[1:], self.chunk, strict=True)]
        limit = max(1, _SAMPLE_BYTES // (self.shape[0] * self.dtype.itemsize))
        x = min(self.chunk[2], limit)
        y = min(self.chunk[1], limit // x)
        extent = min(self.chunk[0], limit // (x * y)), y, x
        picks = np.unique(np.linspace(0, math.prod(grid) - 1, _SAMPLES).astype(np.int64))
        for pick in picks:
            index = np.unravel_index(pick, grid)
            start = tuple(int(i) * m for i, m in zip(index, self.chunk, strict=True))
            box = Box(start, start).grow((0, 0, 0), extent).intersect(Box.of(self.shape[1:]))
            try:
                voxels = self.read_patiently(box)
            except RunError:  # the tiles that read it will tell
                digest.update(b"cannot be read")
                continue
            digest.update(voxels.astype(self.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    def _describe(
        self, shape: Sequence[int], dtype: np.dtype[Any], chunk: Sequence[int], sizes: Sizes
    ) -> None:
        """Sets and checks what every kind of file has."""
        if 0 in shape:
            raise InputError(f"{self.path} is empty: its shape (c, z, y, x) is {tuple(shape)}.")
        if dtype.kind not in "iuf" or dtype.itemsize > 8:
            raise InputError(f"{self.path} holds {dtype} voxels: use integers or floats.")
        c, z, y, x = (int(n) for n in shape)
        self.shape, self.dtype = (c, z, y, x), dtype
        deep, high, wide = (min(int(n), m) for n, m in zip(chunk, (z, y, x), strict=True))
        self.chunk = deep, high, wide
        along_z = 1.0 if sizes[0] is None and z == 1 else sizes[0]
        known = None not in (along_z, *sizes[1:])
        self.voxel_size = (along_z, *sizes[1:]) if known else None  # type: ignore[assignment]

    def _name_channels(self, names: Sequence[str], chosen: slice) -> None:
        """Takes the names that a file gives all its channels, if it names each of them."""
        self.channel_names = tuple(names[chosen])
        if len(self.channel_names) != self.shape[0] or len(names) < chosen.stop:
            self.channel_names = ("",) * self.shape[0]

    @abstractmethod
    def _open(self) -> Any:
        """Fills the attributes and gives what `_read` reads from."""

    @abstractmethod
    def _read(self, box: Box) -> NDArray[Any]:
        """As `read`, of a box that is not empty and lies inside."""

    def _files(self) -> list[str]:
        return [self.path]

    @cached_property
    def _source(self) -> Any:
        """What `_read` reads from, made again after the volume came to another process."""
        return self._open_again()

    def _open_again(self) -> Any:
        return opened_again(type(self), self.path, self._choice, self.shape, self.dtype)._source

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_source"}

    def __repr__(self) -> str:
        return f"<{self.kind} volume {self.path} {self.shape} {self.dtype}>"


def opened_again(
    opener: Callable[[str, Choice], Volume],
    path: str,
    choice: Choice,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> Volume:
    """The volume at `path`, which was opened before with `shape` and `dtype`.

    Raises:
        RunError: if it cannot be opened any more, or is another image now.
    """
    if "://" not in path and not os.path.exists(path):
        raise RunError(f"{path} does not exist any more.")
    try:
        volume = opener(path, replace(choice, quiet=True))
    except InputError as error:
        raise RunError(str(error)) from error
    if (volume.shape, volume.dtype) != (shape, dtype):
        raise RunError(
            f"{path} has changed since it was opened: it was {shape} {dtype} and is "
            f"{volume.shape} {volume.dtype}."
        )
    return volume


def name_axes(path: str, letters: str, shape: Sequence[int]) -> str:
    """Gives every axis a letter: t, c, s (samples of a pixel), z, y or x.

    Axes without a name ("?") go by their number: yx, zyx, czyx, tczyx; one among named axes is
    z. What has extent 1 and no place becomes "-".
    """
    if not letters.strip("?"):
        letters = letters[2:] + "yx"
    axes, named = list(letters), set(letters) - set("yx?")
    if named or len(axes) > 5:
        pairs = zip(letters, shape, strict=False)
        axes = ["-" if n == 1 and axis not in "yx" else axis for axis, n in pairs]
        named = set(axes) - set("yx?-")
    unknown = [i for i, axis in enumerate(axes) if axis == "?"]
    free = "tcz" if not named else "z" if "z" not in named else ""
    for i, axis in zip(reversed(unknown), reversed(free), strict=False):
        axes[i] = axis
    known = sorted(set(axes) & set("tcszyx"))
    once = sorted("".join(axes).replace("-", "")) == known and {"y", "x"} <= set(known)
    if not once or len(letters) != len(shape):
        raise InputError(
            f"{path} has axes {letters!r} of extents {tuple(shape)}: each of t, c, z may be there "
            "once, y and x must be."
        )
    if unknown and not named:
        _refuse_colours(path, [shape[unknown[-1]], shape[axes.index("y")], shape[axes.index("x")]])
    return "".join(axes)


def _refuse_colours(path: str, shape: Sequence[int]) -> None:
    """Refuses what would be read as (z, y, x), and is rather a colour image (y, x, samples)."""
    if shape[2] in (3, 4) and min(shape[:2]) >= 16:
        raise InputError(
            f"{path} seems a colour image stored as {shape[0]} planes of {shape[1]} x {shape[2]}: "
            "save it as RGB, or name its axes."
        )
