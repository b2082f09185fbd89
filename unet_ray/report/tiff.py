"""Writes an array of a store as an OME-TIFF file, from slabs of a few planes.

Knows slabs, strips and the metadata that ImageJ and Bio-Formats read. Does not know which output a
user needs or whether it is finished.

A slab has at most `SLAB_BYTES`. It has all planes of a chunk if they fit, so each chunk is read
once. If they do not fit it has fewer planes, and each chunk is read once for each slab. In memory
there are one slab, its compressed strips, and a few copies of `READ_BYTES`.

The planes follow each other in the order of ImageJ: all channels of a slice, then the next slice.
Strips have no predictor and there are no TIFF tiles, since not all versions of ImageJ read these.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import tifffile
from numpy.typing import NDArray

from unet_ray.errors import DamageError
from unet_ray.report.results import Result
from unet_ray.storage.audit import stored_voxel_size
from unet_ray.storage.layout import ARRAYS
from unet_ray.storage.places import replacing
from unet_ray.tiling.boxes import Box, Ints
from unet_ray.units import warn
from unet_ray.versions import VERSION

SLAB_BYTES, READ_BYTES, STRIP_BYTES = 64 << 20, 16 << 20, 1 << 18
ZLIB_LEVEL = 3  # at least twice as fast as 6, for at most 4 % more bytes
# Bytes of voxels and of the headers of all pages; a larger file may need BigTIFF.
LARGEST_TIFF, PAGE_BYTES = (1 << 32) - (1 << 25), 512

Watch = Callable[[int, int], None]


def largest_value(result: Result, output: str) -> int:
    """Returns the largest value of an array, which is read once."""
    boxes = _parts(result, output, Box.of(result.plan.shape), 1)
    return max(int(result.read(output, box).max()) for box in boxes)


def write_tiff(result: Result, output: str, dtype: np.dtype[Any], path: Path, watch: Watch) -> None:
    """Writes an array to a TIFF file, which appears when it is complete.

    Args:
        result: the store.
        output: name of the array.
        dtype: of the file: unsigned integers, or float32 for k / 255.
        path: the file; it is replaced.
        watch: called with the number of slices that are written, and of all.

    Raises:
        RunError: if a shard is missing or damaged, or a value does not fit `dtype`.
        OSError: if the file cannot be written.
    """
    channels = math.prod(result.store.read(output).shape[:-3])
    depth, height, width = result.plan.shape
    rows = min(height, max(1, STRIP_BYTES // (width * dtype.itemsize)))
    shape = (depth, *((channels,) if channels > 1 else ()), height, width)
    size = math.prod(shape) * dtype.itemsize + depth * channels * PAGE_BYTES
    if dtype.itemsize > 4:
        warn(
            f"{path}: has ids above 4294967295, so it is a plain TIFF of 64-bit integers, which "
            "ImageJ cannot open."
        )
    with (
        replacing(path) as partial,
        ThreadPoolExecutor() as pool,
        tifffile.TiffWriter(
            partial,
            bigtiff=size > LARGEST_TIFF,
            byteorder="<",
            ome=dtype.itemsize <= 4,  # OME has no larger integers
        ) as writer,
    ):
        writer.write(
            _strips(result, output, dtype, rows, pool, watch),
            shape=shape,
            dtype=dtype,
            photometric="minisblack",
            compression="zlib",
            rowsperstrip=rows,
            software=f"unet-ray {VERSION}",
            **_metadata(result, output, channels, dtype),
        )
    watch(depth, depth)


def _metadata(result: Result, output: str, channels: int, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Axes, names of the channels and voxel size, as arguments of tifffile."""
    names = [f"label {value}" for value in result.class_values[1:]]
    identity = json.dumps([result.provenance.json, output, dtype.str], allow_nan=False)
    metadata: dict[str, Any] = {
        "axes": "ZCYX" if channels > 1 else "ZYX",
        "Name": output,
        "Channel": {"Name": names if output == "probabilities" else [output]},
        "Creator": f"unet-ray {VERSION}",
        # Two exports give the same bytes. By default it has the time and the address of the host.
        "UUID": str(uuid5(NAMESPACE_URL, identity)),
    }
    size = stored_voxel_size(result.path)
    if size is None:
        return {"metadata": metadata}
    for axis, extent in zip("ZYX", size, strict=True):
        metadata |= {f"PhysicalSize{axis}": extent, f"PhysicalSize{axis}Unit": "µm"}
    # The same as TIFF tags, for programs that ignore OME; 1 cm is 10,000 micrometre.
    per_cm = tuple(1e4 / extent for extent in reversed(size[1:]))
    if max(per_cm) >= 1 << 32:  # larger than a TIFF tag can hold
        return {"metadata": metadata}
    return {"metadata": metadata, "resolution": per_cm, "resolutionunit": "CENTIMETER"}


def _strips(
    result: Result,
    output: str,
    dtype: np.dtype[Any],
    rows: int,
    pool: ThreadPoolExecutor,
    watch: Watch,
) -> Iterator[bytes]:
    """Yields the compressed strips of all planes, each of `rows` rows."""
    array = result.store.read(output)
    channels, shape = math.prod(array.shape[:-3]), result.plan.shape

    def compressed(strip: NDArray[Any]) -> bytes:
        values = strip.astype(dtype) / dtype.type(255) if dtype.kind == "f" else strip
        return zlib.compress(np.ascontiguousarray(values, dtype).data, ZLIB_LEVEL)

    kept = array.dtype if dtype.kind == "f" else dtype
    for channel, box in _slabs(channels, shape, array.chunks[-3], rows, kept.itemsize):
        slab = _read_slab(result, output, channel, box, kept)
        planes = (plane for planes in slab.swapaxes(0, 1) for plane in planes)
        starts = range(0, box.shape[1], rows)
        yield from pool.map(compressed, (plane[y : y + rows] for plane in planes for y in starts))
        del slab, planes  # before the next slab is read
        watch(box.stop[0], shape[0])


def _slabs(
    channels: int, shape: Ints, chunk_depth: int, rows: int, voxel_bytes: int
) -> Iterator[tuple[slice, Box]]:
    """Yields the channels and the box of each slab, in the order of the file.

    A slab has whole planes of all channels, or a band of one plane of one channel if that is more
    than `SLAB_BYTES`. The height of a band is a multiple of `rows`.
    """
    whole, (_, height, width) = Box.of(shape), shape
    if planes := SLAB_BYTES // (channels * height * width * voxel_bytes):
        for chunks in whole.split((chunk_depth, height, width)):
            for box in chunks.split((planes, height, width)):
                yield slice(channels), box
        return
    band = max(1, SLAB_BYTES // (rows * width * voxel_bytes)) * rows
    for plane in whole.split((1, height, width)):
        for channel in range(channels):
            for box in plane.split((1, band, width)):
                yield slice(channel, channel + 1), box


def _read_slab(
    result: Result, output: str, channels: slice, box: Box, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Reads a slab, (channels, z, y, x), as `dtype`.

    Raises:
        DamageError: if a value does not fit `dtype`.
        RunError: if a shard is missing or damaged.
    """
    count = len(range(channels.stop)[channels])
    slab = np.empty((count, *box.shape), dtype)
    for part in _parts(result, output, box, count):
        voxels = result.read(output, part, channels)
        if voxels.dtype != dtype and voxels.max() > np.iinfo(dtype).max:
            raise DamageError(
                f"{result.path / ARRAYS[output]}: has the id {voxels.max()}, which the table of "
                "objects lacks; check the store with `unet-ray verify`."
            )
        z, y, x = part.relative_to(box.start).slices
        slab[:, z, y, x] = voxels
    return slab


def _parts(result: Result, output: str, box: Box, channels: int) -> Iterator[Box]:
    """Yields boxes of few chunks that partition `box`, so that a read needs little memory."""
    array = result.store.read(output)
    chunk = array.chunks[-3:]
    chunk_bytes = channels * math.prod(chunk) * array.dtype.itemsize
    return box.split_by_chunks(chunk, max(1, READ_BYTES // chunk_bytes))
