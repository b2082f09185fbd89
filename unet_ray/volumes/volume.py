"""Stored volumes: opened by their path, read by boxes, always as (c, z, y, x).

Knows which axis of a TIFF file, of a folder of slices or of a Zarr array is which, and what may
be asked of it; does not know tiles, networks, or what the voxels mean.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from unet_ray.errors import InputError, RunError, nearest
from unet_ray.storage.places import ObjectPath, Where, open_array, place_of, stat_of, unusable
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.tiff import MICROMETRES, Sizes, TiffImage, open_tiff, reason

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG"
_FOREIGN = {
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
_ZARR = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
_SAMPLES, _SAMPLE_BYTES = 16, 2**20
# Chunks of Zarr are read together up to so many bytes, or one by one; of these so many are under
# way at a time (its setting async.concurrency).
READ_BYTES, ZARR_UNITS = 32 << 20, 10
_ROWS = 64  # of a PNG image, taken out at a time
_TRIES, _PAUSE = 3, 0.2  # seconds between two tries


@dataclass(frozen=True)
class _Choice:
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
        index: bytes at most that opening takes in each process: where the strips or tiles are.
    """

    kind: ClassVar[str]
    path: str
    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    voxel_size: tuple[float, float, float] | None
    channel_names: tuple[str, ...]
    chunk: tuple[int, int, int]
    index: int = 0

    def __init__(self, path: str, choice: _Choice) -> None:
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
    def held(self, shape: Sequence[int]) -> int:
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
        return _reopen(self.path, self._choice, self.shape, self.dtype)._source

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_source"}

    def __repr__(self) -> str:
        return f"<{self.kind} volume {self.path} {self.shape} {self.dtype}>"


class _Tiff(Volume):
    """One TIFF file."""

    kind = "tiff"

    def _open(self) -> tuple[TiffImage, NDArray[np.int64]]:
        image = open_tiff(self.path, quiet=self._choice.quiet)
        axes = _name_axes(self.path, re.sub("[iq]", "?", image.axes.lower()), image.shape)
        planes = _plane_numbers(axes, image.shape)
        time, channels = self._choice.select(self.path, planes.shape[0], planes.shape[1])
        extents = [image.shape[axes.index(axis)] for axis in "yx"]
        planes = planes[time, channels]
        self._describe((*planes.shape, *extents), image.dtype, image.segment, image.sizes)
        self._name_channels(image.channel_names, channels)
        self._held, self.index = image.held, image.index
        return image, planes

    def held(self, shape: Sequence[int]) -> int:
        """As of any volume; plain strips that follow each other are mapped, and hold nothing."""
        return self._held

    def _read(self, box: Box) -> NDArray[Any]:
        image, planes = self._source
        z, y, x = box.slices
        voxels: NDArray[Any] = image.read(planes[:, z], y, x)
        return voxels


def _plane_numbers(axes: str, shape: Sequence[int]) -> NDArray[np.int64]:
    """Numbers of the planes of a TIFF image, as an array over (t, c, z).

    Samples of a pixel (s) are channels too, and vary faster than c.
    """
    rest = {axis: n for axis, n in zip(axes, shape, strict=True) if axis not in "yx-"}
    numbers = np.arange(math.prod(rest.values()), dtype=np.int64).reshape(tuple(rest.values()))
    numbers = numbers.transpose([list(rest).index(axis) for axis in "tcsz" if axis in rest])
    t, c, s, z = (rest.get(axis, 1) for axis in "tcsz")
    return numbers.reshape(t, c * s, z)


class _Png(Volume):
    """One PNG image; of a palette image the numbers of the colours, not the colours."""

    kind = "png"

    def _open(self) -> None:
        try:
            with PngImageFile(self.path) as image, open(self.path, "rb") as file:
                (width, height), bands = image.size, len(image.getbands())
                bits, colours = file.read(26)[24:]
                file.seek(max(0, os.path.getsize(self.path) - 4096))
                ends = b"IEND" in file.read()
        except Exception as error:  # a parser of arbitrary bytes may fail in any way
            raise InputError(
                f"{self.path} cannot be read as a PNG image: {reason(error)}."
            ) from error
        if not ends:
            raise InputError(f"{self.path} is truncated: no PNG end mark; copy or export it again.")
        if bits == 16 and colours:
            raise InputError(f"{self.path} has 16 bits per colour, which only TIFF is read with.")
        _, channels = self._choice.select(self.path, 1, bands)
        dtype = np.dtype(np.uint16 if bits == 16 else np.uint8)
        shape = (channels.stop - channels.start, 1, height, width)
        self._describe(shape, dtype, shape[1:], (None, None, None))
        self._name_channels((), channels)
        self._bands = bands

    def held(self, shape: Sequence[int]) -> int:
        """As of any volume: the image as Pillow has it, and some rows in copies."""
        pixel = 4 if self._bands > 1 else self.dtype.itemsize
        rows = self.shape[2] + 3 * min(_ROWS, self.shape[2])
        return pixel * rows * self.shape[3]

    def _read(self, box: Box) -> NDArray[Any]:
        _, y, x = box.slices
        voxels = np.empty((self.shape[0], *box.shape), self.dtype)
        _, channels = self._choice.select(self.path, 1, self._bands)
        try:
            with PngImageFile(self.path) as image:
                if (*image.size, len(image.getbands())) != (*self.shape[:1:-1], self._bands):
                    raise ValueError("it has become another image since it was opened")
                for row in range(y.start, y.stop, _ROWS):
                    end = min(row + _ROWS, y.stop)
                    part = np.asarray(image.crop((x.start, row, x.stop, end)))
                    there = slice(row - y.start, end - y.start)
                    voxels[:, 0, there] = np.moveaxis(np.atleast_3d(part), -1, 0)[channels]
        except Exception as error:  # as above
            raise RunError(f"{self.path} cannot be decoded: {reason(error)}.") from error
        return voxels


class _Folder(Volume):
    """A folder of TIFF or PNG slices, one plane each, in natural order."""

    kind = "folder"

    def _open(self) -> list[str]:
        names = self._slices()
        first = _open(names[0], self._choice)
        c, z, y, x = first.shape
        if z != 1:
            raise InputError(f"{names[0]} holds {z} planes: files of a folder hold one slice each.")
        self._largest = first
        for name in names[1:]:
            other = _open(name, replace(self._choice, quiet=True))
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                raise InputError(
                    f"{self.path} mixes slices: {os.path.basename(names[0])} is {first.shape} "
                    f"{first.dtype}, {os.path.basename(name)} is {other.shape} {other.dtype} "
                    "(c, z, y, x)."
                )
            if other.held((1, y, x)) > self._largest.held((1, y, x)):
                self._largest = other
        sizes = (None, *first.voxel_size[1:]) if first.voxel_size else (None, None, None)
        self._describe((c, len(names), y, x), first.dtype, first.chunk, sizes)
        self.channel_names = first.channel_names
        self.index = self._largest.index
        return names

    def held(self, shape: Sequence[int]) -> int:
        """As of any volume; the slices are read one after the other."""
        one = 1, *shape[1:]
        return self._largest.held(one) + self.shape[0] * math.prod(one) * self.dtype.itemsize

    def slice_files(self) -> list[str]:
        """Name of the file of each slice."""
        return [os.path.basename(name) for name in self._source]

    def _slices(self) -> list[str]:
        """Paths of the slices, so sorted that t2 comes before t10."""
        try:
            names = [name for name in os.listdir(self.path) if not name.startswith(".")]
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {reason(error)}.") from error
        names = [name for name in names if name.lower().endswith((".tif", ".tiff", ".png"))]
        if not names:
            raise InputError(f"{self.path} holds neither TIFF or PNG slices nor Zarr metadata.")
        return [os.path.join(self.path, name) for name in sorted(names, key=_natural)]

    def _read(self, box: Box) -> NDArray[Any]:
        c, _, y, x = self.shape
        voxels = np.empty((c, *box.shape), self.dtype)
        flat = Box((0, *box.start[1:]), (1, *box.stop[1:]))
        for z, name in enumerate(self._source[box.slices[0]]):
            slice_ = _reopen(name, self._choice, (c, 1, y, x), self.dtype)
            voxels[:, z] = slice_.read(flat)[:, 0]
        return voxels

    def _open_again(self) -> list[str]:
        """The list alone: every slice is checked where it is read."""
        try:
            names = self._slices()
        except InputError as error:
            raise RunError(str(error)) from error
        if len(names) != self.shape[1]:
            raise RunError(f"{self.path} now has {len(names)} slices: it had {self.shape[1]}.")
        return names

    def _files(self) -> list[str]:
        return list(self._source)


def _natural(name: str) -> tuple[list[int | str], str]:
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


class _Zarr(Volume):
    """A Zarr array, or one level of the first image of an OME-Zarr group."""

    kind = "zarr"

    def _open(self) -> tuple[Any, str, int, slice]:
        try:
            image = _zarr_image(self.path, self._choice.level)
        except InputError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path} has metadata that are not OME-Zarr: {error!r}."
            ) from error
        self._folder = image.folder
        try:
            array = open_array(place_of(image.folder))
        except Exception as error:  # zarr fails in many ways on damaged metadata
            raise InputError(
                f"{image.folder} cannot be opened as Zarr: {reason(error)}."
            ) from error
        axes = _name_axes(image.folder, image.axes or "?" * array.ndim, array.shape)
        extents = dict(zip(axes, array.shape, strict=True))
        chunks = dict(zip(axes, array.chunks, strict=True))
        time, channels = self._choice.select(self.path, extents.get("t", 1), extents.get("c", 1))
        shape = channels.stop - channels.start, *(extents.get(axis, 1) for axis in "zyx")
        dtype = np.dtype(np.uint8) if array.dtype.kind == "b" else array.dtype.newbyteorder("=")
        self._describe(shape, dtype, [chunks.get(axis, 1) for axis in "zyx"], image.sizes)
        self._name_channels(image.channel_names, channels)
        deep = chunks.get("c", 1)
        together = math.prod(array.chunks) * (-(-channels.stop // deep) - channels.start // deep)
        self.unit_bytes = int(together * array.dtype.itemsize)
        self._together = max(1, READ_BYTES // self.unit_bytes)
        # Of a sharded array all inner chunks of a part may be held, else those under way.
        self._under_way = self._together if array.shards else min(self._together, ZARR_UNITS)
        return array, axes, time, channels

    def held(self, shape: Sequence[int]) -> int:
        """As of any volume; of several units, and of the part that they are put together to."""
        touched = math.prod(
            min((extent - 2) // n + 2, -(-whole // n))
            for extent, whole, n in zip(shape, self.shape[1:], self.chunk, strict=True)
        )
        part = self._together if touched > self._together else 0
        return (2 * min(self._under_way, touched) + part) * self.unit_bytes

    def _read(self, box: Box) -> NDArray[Any]:
        parts = [*box.split_by_chunks(self.chunk, self._together)]
        if len(parts) == 1:
            return self._read_part(box)
        voxels = np.empty((self.shape[0], *box.shape), self.dtype)
        for part in parts:
            place = part.relative_to(box.start)
            voxels[(slice(None), *place.slices)] = self._read_part(part)
        return voxels

    def _read_part(self, box: Box) -> NDArray[Any]:
        array, axes, time, channels = self._source
        where = {"t": slice(time, time + 1), "-": slice(0, 1), "c": channels}
        where |= dict(zip("zyx", box.slices, strict=True))
        window = tuple(where[axis] for axis in axes)
        try:
            _refuse_cut_chunks(array, self._folder, window)
            voxels = np.asarray(array[window])
        except Exception as error:  # every codec and every store has errors of its own
            raise RunError(f"{self._folder} cannot be read at {box}: {reason(error)}.") from error
        order = [*(i for i, axis in enumerate(axes) if axis in "t-")]
        order += [axes.index(axis) for axis in "czyx" if axis in axes]
        voxels = voxels.transpose(order).reshape(self.shape[0], *box.shape)
        return voxels.astype(self.dtype, copy=False)

    def _files(self) -> list[str]:
        folders = dict.fromkeys((self.path, self._folder))
        names = [os.path.join(folder, name) for folder in folders for name in _ZARR]
        return [name for name in names if place_of(name).is_file()]


def _refuse_cut_chunks(array: Any, folder: str, window: Sequence[slice]) -> None:
    """Refuses chunk files that zarr would misread without an error.

    An empty shard is read as a blank one, and Blosc reads past the end of a truncated chunk. In an
    object store, which puts objects whole, it would take a request per chunk, and is left out.
    """
    if isinstance(place_of(folder), ObjectPath):
        return
    last = type(array.compressors[-1]).__name__ if array.compressors and not array.shards else ""
    extents = array.shards or array.chunks
    ranges = [range(s.start // n, -(-s.stop // n)) for s, n in zip(window, extents, strict=True)]
    for place in itertools.product(*ranges):
        name = array.metadata.encode_chunk_key(place)
        try:
            with open(os.path.join(folder, *name.split("/")), "rb") as file:
                head, size = file.read(16), os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            continue  # never written: the fill value
        declared = int.from_bytes(head[12:], "little") if "Blosc" in last else size
        if not size or declared != size:
            raise ValueError(f"chunk {name} is truncated: it has {size} bytes")


@dataclass(frozen=True)
class _ZarrImage:
    """Where an array lies and what the metadata around it say of it."""

    folder: str
    axes: str
    sizes: Sizes = (None, None, None)
    channel_names: tuple[str, ...] = ()


def _zarr_image(path: str, level: int) -> _ZarrImage:
    """Finds the array to read in a Zarr array or OME-Zarr group (versions 0.1 to 0.5)."""
    node = _json(path, "zarr.json") or {"node_type": "group", **_zarr_v2(path)}
    if node.get("node_type") == "array":
        if level:
            raise InputError(f"{path} is one Zarr array: --level {level} needs an OME-Zarr image.")
        names = node.get("dimension_names") or ()
        return _ZarrImage(path, "".join(_letter(name or "?") for name in names))
    attributes = node.get("attributes", {})
    attributes = attributes.get("ome", attributes)
    if "multiscales" not in attributes:
        inside = (
            ""
            if "://" in path
            else f" of {sorted(e.name for e in os.scandir(path) if e.is_dir())[:5]}"
        )
        raise InputError(f"{path} is a Zarr group without an image: open one{inside} in it.")
    return _multiscale(path, attributes, level)


def _groups(path: str) -> Iterator[PurePath]:
    """Names of what lies right below a group."""
    if isinstance(place := place_of(path), ObjectPath):
        yield from (PurePath(each.key).relative_to(place.key) for each in place.below())
    else:
        yield from (PurePath(entry.name) for entry in os.scandir(path) if entry.is_dir())


def _zarr_v2(path: str) -> dict[str, Any]:
    """The metadata of a Zarr v2 array or group, in the words of v3."""
    attributes = _json(path, ".zattrs")
    found: dict[str, Any] = {"attributes": attributes}
    if place_of(os.path.join(path, ".zarray")).is_file():
        found["node_type"] = "array"
        found["dimension_names"] = attributes.get("_ARRAY_DIMENSIONS")
    return found


def _json(folder: str, name: str) -> dict[str, Any]:
    """An object in a metadata file; empty where there is no such file."""
    path = os.path.join(folder, name)
    try:
        found = json.loads(place_of(path).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {reason(error)}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object.")
    return found


def _multiscale(path: str, attributes: dict[str, Any], level: int) -> _ZarrImage:
    """One level of the first multiscale image that the attributes of a group describe."""
    image = attributes["multiscales"][0]
    levels = image["datasets"]
    if not 0 <= level < len(levels):
        raise InputError(f"{path} has no --level {level}: it goes from 0 to {len(levels) - 1}.")
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in image.get("axes", ())]
    letters = "".join(_letter(axis["name"], axis.get("type")) for axis in axes)
    units = [MICROMETRES.get(str(axis.get("unit", "")).lower()) for axis in axes]
    scales = np.ones(len(axes))
    for part in (levels[level], image):
        for step in part.get("coordinateTransformations", ()):
            scales = scales * (step["scale"] if step["type"] == "scale" else 1)
    size = {a: float(n) * unit for a, n, unit in zip(letters, scales, units, strict=True) if unit}
    channels = (attributes.get("omero") or {}).get("channels", ())
    names = tuple(str(channel.get("label", "")) for channel in channels)
    folder = os.path.join(path, *levels[level]["path"].split("/"))
    return _ZarrImage(folder, letters, (size.get("z"), size.get("y"), size.get("x")), names)


def _letter(name: str, kind: str | None = None) -> str:
    """The letter of an axis of this name and OME type, "?" where it is none of t, c, z, y, x."""
    word = kind if kind in ("time", "channel") else name.lower()
    letter = {"time": "t", "channel": "c"}.get(word, word)
    return letter if letter in ("t", "c", "z", "y", "x") else "?"


def _name_axes(path: str, letters: str, shape: Sequence[int]) -> str:
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


def _reopen(path: str, choice: _Choice, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Volume:
    """Opens again what was opened before, as an image of `shape` and `dtype`.

    Raises:
        RunError: if it cannot be opened any more, or is another image now.
    """
    try:
        volume = _open(path, replace(choice, quiet=True))
    except InputError as error:
        raise RunError(str(error)) from error
    if (volume.shape, volume.dtype) != (shape, dtype):
        raise RunError(
            f"{path} has changed since it was opened: it was {shape} {dtype} and is "
            f"{volume.shape} {volume.dtype}."
        )
    return volume


def _open(path: str, choice: _Choice) -> Volume:
    kind = _kind(path)
    if choice.level and kind is not _Zarr:
        raise InputError(f"{path} has one level: --level {choice.level} needs an OME-Zarr image.")
    return kind(path, choice)


def _kind(path: str) -> type[Volume]:
    """Which class reads a path, by what is there."""
    if isinstance(place := place_of(path), ObjectPath):
        try:
            if any((place / name).is_file() for name in _ZARR):
                return _Zarr
        except OSError as error:
            raise InputError(unusable(place, error)) from error
        raise InputError(
            f"{path} is no Zarr array or OME-Zarr image; of an object store only these are read: "
            "copy anything else to a disk."
        )
    if os.path.isdir(path):
        return _Zarr if any(os.path.exists(os.path.join(path, name)) for name in _ZARR) else _Folder
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except FileNotFoundError as error:
        folder, name = os.path.split(path)
        beside = os.listdir(folder) if os.access(folder, os.R_OK) else []
        raise InputError(f"{path} does not exist{nearest(name, beside)}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}.") from error
    if head.startswith(_TIFF):
        return _Tiff
    if head.startswith(_PNG):
        return _Png
    if not head:
        raise InputError(f"{path} is empty.")
    known = [f": {what}" for magic, what in _FOREIGN.items() if head.startswith(magic)]
    raise InputError(
        f"{path} is neither TIFF, PNG nor Zarr: it starts with {head[:4]!r}{''.join(known)}."
    )


def open_volume(
    url: Where,
    *,
    channel: int | None = None,
    time: int | None = None,
    level: int = 0,
) -> Volume:
    """Opens a TIFF or PNG file, a folder of slices, a Zarr array or an OME-Zarr image.

    Args:
        url: path, or URL of a Zarr array or OME-Zarr image in an object store. Of several images in
            one file or group the first is taken.
        channel: the one channel to read, from 0; all by default. RGB samples are channels.
        time: the time point to read, from 0; needed where there are several.
        level: of the resolutions of an OME-Zarr image, 0 being the finest.

    Raises:
        InputError: if the path, the file or the choice is at fault.
    """
    return _open(str(place_of(url)), _Choice(channel, time, level))
