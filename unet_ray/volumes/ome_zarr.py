"""Zarr arrays, and the images of OME-Zarr groups.

Handles the metadata of OME-Zarr 0.1 to 0.5. Independent of the stores that this package writes.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError, RunError, reason
from unet_ray.storage.objects import ObjectPath
from unet_ray.storage.parsing import parse_json, read_file, refuse_special
from unet_ray.storage.places import open_array, place_of, stats_of
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.fingerprint import Fingerprint
from unet_ray.volumes.tiff import MICROMETRES, Sizes, positive_size
from unet_ray.volumes.volume import Volume, name_axes

METADATA_FILES = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
READ_BYTES = 32 << 20  # upper bound of one read, unless a single chunk is larger
LISTED_CHUNKS, SAMPLED_CHUNKS = 100_000, 1000  # in the fingerprint of an array
ZARR_CONCURRENCY = 10  # chunks in flight in one read, zarr's default of async.concurrency


class Zarr(Volume):
    """A Zarr array, or one level of the first image of an OME-Zarr group."""

    kind = "zarr"

    def _open(self) -> tuple[Any, str, int, slice]:
        try:
            image = _zarr_image(self.path, self._choice.level)
        except InputError:
            raise
        except Exception as error:  # metadata may have any form
            raise InputError(
                f"{self.path} has invalid OME-Zarr metadata: {error!r:.300}."
            ) from error
        try:
            return self._open_image(image)
        except InputError:
            raise
        except Exception as error:  # zarr fails in many ways on damaged metadata
            raise InputError(
                f"{image.folder} cannot be opened as Zarr: {reason(error)}."
            ) from error

    def _open_image(self, image: _ZarrImage) -> tuple[Any, str, int, slice]:
        self._folder = image.folder
        if image.folder != self.path:  # zarr would read metadata of any size
            _ = _json(image.folder, "zarr.json") or _zarr_v2(image.folder)
        array = open_array(place_of(image.folder))
        axes = name_axes(image.folder, image.axes or "?" * array.ndim, array.shape)
        extents = dict(zip(axes, array.shape, strict=True))
        chunks = dict(zip(axes, array.chunks, strict=True))
        time, channels = self._choice.select(self.path, extents.get("t", 1), extents.get("c", 1))
        shape = channels.stop - channels.start, *(extents.get(axis, 1) for axis in "zyx")
        dtype = np.dtype(np.uint8) if array.dtype.kind == "b" else array.dtype.newbyteorder("=")
        self._describe(shape, dtype, [chunks.get(axis, 1) for axis in "zyx"], image.sizes)
        self._name_channels(image.channel_names, channels)
        # A unit is all chunks at one (z, y, x) position that contain a selected channel.
        step = chunks.get("c", 1)
        unit_voxels = math.prod(array.chunks) * (-(-channels.stop // step) - channels.start // step)
        self.unit_bytes = int(unit_voxels * array.dtype.itemsize)
        self._units_per_read = max(1, READ_BYTES // self.unit_bytes)
        # In a sharded array, all inner chunks of a read may be in memory at once.
        self._units_in_flight = (
            self._units_per_read if array.shards else min(self._units_per_read, ZARR_CONCURRENCY)
        )
        return array, axes, time, channels

    def read_overhead(self, shape: Sequence[int]) -> int:
        """See `Volume.read_overhead`.

        Each unit in flight counts twice: as stored and as decoded. A box that needs several reads
        adds the result of one read.
        """
        units = math.prod(
            min((extent - 2) // n + 2, -(-whole // n))
            for extent, whole, n in zip(shape, self.shape[1:], self.chunk, strict=True)
        )
        result_units = self._units_per_read if units > self._units_per_read else 0
        return (2 * min(self._units_in_flight, units) + result_units) * self.unit_bytes

    def _read(self, box: Box) -> NDArray[Any]:
        parts = [*box.split_by_chunks(self.chunk, self._units_per_read)]
        if len(parts) == 1:
            return self._read_part(box)
        voxels = np.empty((self.shape[0], *box.shape), self.dtype)
        for part in parts:
            target = part.relative_to(box.start)
            voxels[(slice(None), *target.slices)] = self._read_part(part)
        return voxels

    def _read_part(self, box: Box) -> NDArray[Any]:
        array, axes, _, _ = self._source
        window = self._window(box)
        try:
            _refuse_truncated_chunks(array, self._folder, window)
            voxels = np.asarray(array[window])
        except Exception as error:  # each codec and each store raises its own errors
            raise RunError(f"{self._folder} cannot be read at {box}: {reason(error)}.") from error
        order = [*(i for i, axis in enumerate(axes) if axis in "t-")]
        order += [axes.index(axis) for axis in "czyx" if axis in axes]
        voxels = voxels.transpose(order).reshape(self.shape[0], *box.shape)
        return voxels.astype(self.dtype, copy=False)

    def _window(self, box: Box) -> tuple[slice, ...]:
        """The part of the array that contains a box and the selected channels and time point."""
        _, axes, time, channels = self._source
        slices = {"t": slice(time, time + 1), "-": slice(0, 1), "c": channels}
        slices |= dict(zip("zyx", box.slices, strict=True))
        return tuple(slices[axis] for axis in axes)

    def _files_of(self, box: Box) -> Iterable[str]:
        if isinstance(place_of(self._folder), ObjectPath):
            return ()  # each would cost a request
        array = self._source[0]
        numbers = itertools.product(*_chunk_ranges(array, self._window(box)))
        return (_chunk_file(array, self._folder, number) for number in numbers)

    def _reads_are_compared(self) -> bool:
        on_disk = not isinstance(place_of(self._folder), ObjectPath)
        return on_disk and super()._reads_are_compared()

    def _fingerprint(self) -> Fingerprint:
        array = self._source[0]
        ranges = _chunk_ranges(array, self._window(Box.of(self.shape[1:])))
        extents = [len(numbers) for numbers in ranges]
        total = math.prod(extents)
        chunks: Iterable[tuple[int, ...]] = itertools.product(*ranges)
        if total > LISTED_CHUNKS:
            spaced = np.unique(np.linspace(0, total - 1, SAMPLED_CHUNKS).astype(np.int64))
            offsets = np.stack(np.unravel_index(spaced, extents), 1)
            chunks = map(tuple, (offsets + [numbers.start for numbers in ranges]).tolist())
        names = [_chunk_file(array, self._folder, chunk) for chunk in chunks]
        stats = stats_of(place_of(self._folder), names)
        return Fingerprint.of(self.path, self._files(), stats, total <= LISTED_CHUNKS)

    def _files(self) -> list[str]:
        folders = dict.fromkeys((self.path, self._folder))
        names = [os.path.join(folder, name) for folder in folders for name in METADATA_FILES]
        return [name for name in names if place_of(name).is_file()]


def _refuse_truncated_chunks(array: Any, folder: str, window: Sequence[slice]) -> None:
    """Refuses truncated chunk files that zarr would misread without an error.

    zarr reads an empty shard as fill values, and Blosc reads past the end of a truncated chunk.
    Arrays in an object store are not checked: objects are written whole, and each check would cost
    a request.
    """
    if isinstance(place_of(folder), ObjectPath):
        return
    last = type(array.compressors[-1]).__name__ if array.compressors and not array.shards else ""
    for chunk in itertools.product(*_chunk_ranges(array, window)):
        name = _chunk_file(array, folder, chunk)
        try:
            refuse_special(Path(name))
            with open(name, "rb") as file:
                head, size = file.read(16), os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            continue  # a chunk that was never written has the fill value
        declared = int.from_bytes(head[12:], "little") if "Blosc" in last else size
        if not size or declared != size:
            raise ValueError(f"chunk {name} is truncated to {size} bytes")


def _chunk_ranges(array: Any, window: Sequence[slice]) -> list[range]:
    """Positions along each axis of the chunks, or of the shards, that a window touches."""
    extents = array.shards or array.chunks
    return [range(s.start // n, -(-s.stop // n)) for s, n in zip(window, extents, strict=True)]


def _chunk_file(array: Any, folder: str, chunk: tuple[int, ...]) -> str:
    return os.path.join(folder, *array.metadata.encode_chunk_key(chunk).split("/"))


@dataclass(frozen=True)
class _ZarrImage:
    """Location of an array, with axes, voxel size and channel names from the metadata."""

    folder: str
    axes: str
    sizes: Sizes = (None, None, None)
    channel_names: tuple[str, ...] = ()


def _zarr_image(path: str, level: int) -> _ZarrImage:
    """Finds the array to read in a Zarr array or OME-Zarr group (versions 0.1 to 0.5)."""
    node = _json(path, "zarr.json") or {"node_type": "group", **_zarr_v2(path)}
    if node.get("node_type") == "array":
        if level:
            raise InputError(
                f"{path} is a single Zarr array: --level {level} needs an OME-Zarr image."
            )
        names = node.get("dimension_names") or ()
        return _ZarrImage(path, "".join(_letter(name or "?") for name in names))
    attributes = node.get("attributes", {})
    attributes = attributes.get("ome", attributes)
    if "multiscales" not in attributes:
        choices = (
            ""
            if "://" in path
            else f" of {sorted(e.name for e in os.scandir(path) if e.is_dir())[:5]}"
        )
        raise InputError(f"{path} is a Zarr group without an image: open one{choices} inside it.")
    return _multiscale(path, attributes, level)


def _zarr_v2(path: str) -> dict[str, Any]:
    """Metadata of a Zarr v2 array or group, under the keys of v3."""
    attributes = _json(path, ".zattrs")
    node: dict[str, Any] = {"attributes": attributes}
    if place_of(os.path.join(path, ".zarray")).is_file():
        node["node_type"] = "array"
        node["dimension_names"] = attributes.get("_ARRAY_DIMENSIONS")
    return node


def _json(folder: str, name: str) -> dict[str, Any]:
    """The JSON object of a metadata file; empty if the file does not exist."""
    path = os.path.join(folder, name)
    try:
        content = parse_json(read_file(place_of(path)))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {reason(error)}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object.")
    return content


def _multiscale(path: str, attributes: dict[str, Any], level: int) -> _ZarrImage:
    """One level of the first multiscale image in the attributes of a group."""
    image = attributes["multiscales"][0]
    levels = image["datasets"]
    if not 0 <= level < len(levels):
        raise InputError(f"{path} has no --level {level}: levels are 0 to {len(levels) - 1}.")
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in image.get("axes", ())]
    letters = "".join(_letter(axis["name"], axis.get("type")) for axis in axes)
    units = [MICROMETRES.get(str(axis.get("unit", "")).lower()) for axis in axes]
    scales = np.ones(len(axes))
    for metadata in (levels[level], image):
        for transform in metadata.get("coordinateTransformations", ()):
            scales = scales * (transform["scale"] if transform["type"] == "scale" else 1)
    measured = zip(letters, scales, units, strict=True)
    size = {axis: positive_size(float(scale), unit) for axis, scale, unit in measured}
    channels = (attributes.get("omero") or {}).get("channels", ())
    names = tuple(str(channel.get("label", "")) for channel in channels)
    folder = os.path.join(path, *levels[level]["path"].split("/"))
    return _ZarrImage(folder, letters, (size.get("z"), size.get("y"), size.get("x")), names)


def _letter(name: str, kind: str | None = None) -> str:
    """Letter of an axis, from its name and OME type: t, c, z, y or x, or "?" for other axes."""
    word = kind if kind in ("time", "channel") else name.lower()
    letter = {"time": "t", "channel": "c"}.get(word, word)
    return letter if letter in ("t", "c", "z", "y", "x") else "?"
