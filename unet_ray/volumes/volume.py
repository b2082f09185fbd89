"""A stored volume, read by boxes, always as (c, z, y, x).

Handles the common parts of all formats: selection of channels, identity of an input, and letters of
axes. Independent of any format.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import ChangedError, InputError, RunError
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.fingerprint import Fingerprint, changed
from unet_ray.volumes.omissions import Omission
from unet_ray.volumes.tiff import Sizes

LARGEST_VOLUME = 1 << 53  # voxels: numbers of voxels are exact in floats, too
_SAMPLES, _SAMPLE_BYTES = 16, 2**20
_TRIES, _PAUSE = 3, 0.2  # attempts to read a box; seconds between two attempts


@dataclass(frozen=True)
class Choice:
    """The part of a file to read: one or all channels, a time point and a resolution level.

    `quiet` suppresses the warnings of file readers.
    """

    channel: int | None = None
    time: int | None = None
    level: int = 0
    quiet: bool = False

    def select(self, path: str, times: int, channels: int) -> tuple[int, slice]:
        """Returns the time point and the slice of channels to read from `path`.

        Raises:
            InputError: if the file does not have them, or has several time points to choose from.
        """
        if self.time is None and times > 1:
            raise InputError(f"{path} has {times} time points: choose one, such as --time 0.")
        if not 0 <= (self.time or 0) < times:
            raise InputError(f"{path} has no --time {self.time}: time points are 0 to {times - 1}.")
        if self.channel is None:
            return self.time or 0, slice(0, channels)
        if not 0 <= self.channel < channels:
            last = channels - 1
            raise InputError(f"{path} has no --channel {self.channel}: channels are 0 to {last}.")
        return self.time or 0, slice(self.channel, self.channel + 1)


class Volume(ABC):
    """A stored image.

    A pickle contains this description only; the file is reopened in the process that reads it.

    Attributes:
        path: absolute path of the file or folder, or its URL.
        shape: extents, always (c, z, y, x).
        dtype: data type of the result of `read`: integers or floats, in native byte order.
        voxel_size: size along z, y, x in micrometres, or None if the file does not state it. If a
            single plane has sizes only along y and x, the size along z is 1.
        channel_names: one name per channel, "" if unknown.
        chunk: extent of the storage unit (z, y, x): inner chunk of Zarr, strip or tile of TIFF.
        index_bytes: upper bound of the bytes that each process needs to open the file.
        omissions: content of the file or folder that the volume leaves out.
    """

    kind: ClassVar[str]
    path: str
    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    voxel_size: tuple[float, float, float] | None
    channel_names: tuple[str, ...]
    chunk: tuple[int, int, int]
    index_bytes: int = 0
    _pinned: Fingerprint | None = None
    omissions: tuple[Omission, ...] = ()

    def __init__(self, path: str, choice: Choice) -> None:
        self.path, self._choice = path, choice
        self._source = self._open()

    def read(self, box: Box) -> NDArray[Any]:
        """Reads the voxels of `box` (z, y, x) into a new array of shape ``(c, *box.shape)``.

        Only the storage units that the box touches are read. Thread-safe.

        Raises:
            RunError: if the file is damaged, or smaller than when the volume was opened.
            ChangedError: if a file has changed since `pin`.
            ValueError: if the box extends beyond the volume.
        """
        if box.intersect(Box.of(self.shape[1:])) != box:
            raise ValueError(
                f"Box {box} extends beyond {self.path}, which has shape {self.shape[1:]} (z, y, x)."
            )
        if not box.size:
            return np.empty((self.shape[0], *box.shape), self.dtype)
        voxels = self._read(box)
        if self._pinned:
            self._pinned.refuse_change(self._files_of(box))
        if voxels.shape != (self.shape[0], *box.shape):
            raise RunError(f"{self.path} has become smaller since it was opened.")
        return voxels

    @abstractmethod
    def read_overhead(self, shape: Sequence[int]) -> int:
        """Upper bound of the bytes that reading a box of `shape` (z, y, x) needs beyond its result.

        They are the storage units, as stored and as decoded, with all their channels.
        """

    def read_with_retries(self, box: Box) -> NDArray[Any]:
        """Reads `box` like `read`, with retries, since faults of disks and servers may be short.

        Raises:
            RunError: if all attempts fail.
        """
        for _ in range(_TRIES - 1):
            try:
                return self.read(box)
            except ChangedError:
                raise
            except RunError:
                time.sleep(_PAUSE)
        return self.read(box)

    def pin(self) -> None:
        """Records the state of the files. From now on, `read` refuses files that have changed.

        Copies of this volume in other processes do so, too.
        """
        self._pinned = self._fingerprint()
        # The files are opened again, since they may have changed after they were first opened.
        vars(self).pop("_source", None)

    def refuse_changes(self) -> None:
        """Compares all files with their state at `pin`, also those that no read has used.

        Raises:
            ChangedError: if they have changed; names the input.
        """
        try:
            if self._pinned and self._fingerprint() != self._pinned:
                raise changed(self.path, mixed=not self._reads_are_compared())
        except (OSError, RunError) as error:
            if isinstance(error, FileNotFoundError):
                raise changed(self.path) from error
            raise

    def identity(self) -> dict[str, Any]:
        """Returns a JSON object that identifies this input; it is the same on every call.

        One hash covers the names, sizes and modification times of the image files; of a Zarr array
        those of the metadata and of all selected chunks, or of 1,000 evenly spaced chunks if there
        are more than 100,000. The other hash covers at most 16 evenly spaced storage units, and at
        most 1 MiB of each.
        """
        fingerprint = self._pinned or self._fingerprint()
        return {
            "name": os.path.basename(self.path),
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            **fingerprint.to_json(),
            "sampled_sha256": self._sampled_hash(),
        }

    def slice_files(self) -> list[str]:
        """File name of each slice of a folder; empty for other kinds of volume."""
        return []

    def _sampled_hash(self) -> str:
        digest = hashlib.sha256(f"{self.shape} {self.dtype}".encode())
        grid = [-(-n // m) for n, m in zip(self.shape[1:], self.chunk, strict=True)]
        limit = max(1, _SAMPLE_BYTES // (self.shape[0] * self.dtype.itemsize))
        x = min(self.chunk[2], limit)
        y = min(self.chunk[1], limit // x)
        extent = min(self.chunk[0], limit // (x * y)), y, x
        numbers = np.unique(np.linspace(0, math.prod(grid) - 1, _SAMPLES).astype(np.int64))
        for number in numbers:
            index = np.unravel_index(number, grid)
            start = tuple(int(i) * m for i, m in zip(index, self.chunk, strict=True))
            box = Box(start, start).grow((0, 0, 0), extent).intersect(Box.of(self.shape[1:]))
            try:
                voxels = self.read_with_retries(box)
            except ChangedError:
                raise
            except RunError:  # a tile that needs these voxels reports the error later
                digest.update(b"cannot be read")
                continue
            digest.update(voxels.astype(self.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    def _describe(
        self, shape: Sequence[int], dtype: np.dtype[Any], chunk: Sequence[int], sizes: Sizes
    ) -> None:
        """Checks and sets the attributes that all kinds of file have."""
        if min(shape) < 1:
            raise InputError(f"{self.path} is empty: its shape (c, z, y, x) is {tuple(shape)}.")
        if math.prod(shape) > LARGEST_VOLUME or min(chunk) < 1:
            raise InputError(
                f"{self.path} has shape (c, z, y, x) {tuple(shape)!r:.100} in units of "
                f"{tuple(chunk)!r:.100} voxels: a volume has at most 2^53 voxels, and each extent "
                "is at least 1."
            )
        if dtype.kind not in "iuf" or dtype.itemsize > 8:
            raise InputError(
                f"{self.path} has {dtype} voxels: use integers or floats of at most 64 bits."
            )
        c, z, y, x = (int(n) for n in shape)
        self.shape, self.dtype = (c, z, y, x), dtype
        depth, height, width = (min(int(n), m) for n, m in zip(chunk, (z, y, x), strict=True))
        self.chunk = depth, height, width
        along_z = 1.0 if sizes[0] is None and z == 1 else sizes[0]
        complete = None not in (along_z, *sizes[1:])
        self.voxel_size = (along_z, *sizes[1:]) if complete else None  # type: ignore[assignment]

    def _name_channels(self, names: Sequence[str], selected: slice) -> None:
        """Sets the names of the selected channels, or "" for all if the file lacks some names."""
        self.channel_names = tuple(names[selected])
        if len(self.channel_names) != self.shape[0] or len(names) < selected.stop:
            self.channel_names = ("",) * self.shape[0]

    @abstractmethod
    def _open(self) -> Any:
        """Sets the attributes and returns the source that `_read` uses."""

    @abstractmethod
    def _read(self, box: Box) -> NDArray[Any]:
        """Reads a box that is not empty and is inside the volume."""

    def _files(self) -> list[str]:
        """Names of the files, without the chunks of Zarr arrays."""
        return [self.path]

    def _reads_are_compared(self) -> bool:
        """Whether each read compares all its files with the fingerprint."""
        return self._pinned is not None and self._pinned.all_chunks

    def _files_of(self, box: Box) -> Iterable[str]:
        """Names of the files, including chunks, that `_read` uses for a box."""
        return self._files()

    def _fingerprint(self) -> Fingerprint:
        return Fingerprint.of(self.path, self._files(), {})

    @cached_property
    def _source(self) -> Any:
        """The source that `_read` uses, recreated after the volume was unpickled."""
        source = self._reopen()
        if self._pinned:
            self._pinned.refuse_change(self._pinned.stats)
        return source

    def _reopen(self) -> Any:
        return reopen(type(self), self.path, self._choice, self.shape, self.dtype)._source

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_source"}

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All voxels as an array (c, z, y, x); loads the whole volume into memory."""
        voxels = self.read(Box.of(self.shape[1:]))
        return voxels if dtype is None else voxels.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"<{self.kind} volume {self.path} {self.shape} {self.dtype}>"


def reopen(
    opener: Callable[[str, Choice], Volume],
    path: str,
    choice: Choice,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> Volume:
    """Reopens the volume at `path`, which had `shape` and `dtype` when it was first opened.

    Raises:
        RunError: if the volume can no longer be opened.
        ChangedError: if its shape or dtype has changed.
    """
    if "://" not in path and not os.path.exists(path):
        raise RunError(f"{path} does not exist any more.")
    try:
        volume = opener(path, replace(choice, quiet=True))
    except InputError as error:
        raise RunError(str(error)) from error
    if (volume.shape, volume.dtype) != (shape, dtype):
        raise ChangedError(
            f"{path} has changed since it was opened: it was {shape} {dtype} and is now "
            f"{volume.shape} {volume.dtype}."
        )
    return volume


def name_axes(path: str, letters: str, shape: Sequence[int]) -> str:
    """Assigns every axis a letter: t, c, s (samples of a pixel), z, y or x.

    If all axes are unnamed ("?"), their number decides: yx, zyx, czyx or tczyx. A single unnamed
    axis among named ones becomes z. Other axes of extent 1 become "-".

    Raises:
        InputError: if a letter occurs twice, y or x is missing, or an axis gets no letter.
    """
    if not letters.strip("?"):
        letters = letters[2:] + "yx"
    axes, named = list(letters), set(letters) - set("yx?")
    if named or len(axes) > 5:
        pairs = zip(letters, shape, strict=False)
        axes = ["-" if n == 1 and axis not in "yx" else axis for axis, n in pairs]
        named = set(axes) - set("yx?-")
    unnamed = [i for i, axis in enumerate(axes) if axis == "?"]
    free = "tcz" if not named else "z" if "z" not in named else ""
    for i, axis in zip(reversed(unnamed), reversed(free), strict=False):
        axes[i] = axis
    valid = sorted(set(axes) & set("tcszyx"))
    unique = sorted("".join(axes).replace("-", "")) == valid and {"y", "x"} <= set(valid)
    if not unique or len(letters) != len(shape):
        raise InputError(
            f"{path} has axes {letters!r} of extents {tuple(shape)}: t, c and z may occur at most "
            "once each, and y and x must occur exactly once."
        )
    if unnamed and not named:
        _refuse_colours(path, [shape[unnamed[-1]], shape[axes.index("y")], shape[axes.index("x")]])
    return "".join(axes)


def _refuse_colours(path: str, shape: Sequence[int]) -> None:
    """Refuses an array that would be read as (z, y, x) but looks like colours (y, x, samples)."""
    if shape[2] in (3, 4) and min(shape[:2]) >= 16:
        raise InputError(
            f"{path} looks like a colour image stored as {shape[0]} planes of {shape[1]} x "
            f"{shape[2]}: save it as RGB, or name its axes."
        )
