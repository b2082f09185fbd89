"""Volumes: every format against NumPy windows, damaged files against their sentences."""

import io
import json
import logging
import os
import pickle
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unet_ray.boxes import Box
from unet_ray.errors import InputError, RunError
from unet_ray.volumes import open_volume


def noise(shape, dtype="uint8", seed=0):
    """Random voxels, signed ones on both sides of zero."""
    voxels = np.random.default_rng(seed).integers(0, 2**16, shape)
    return (voxels - (np.dtype(dtype).kind in "if") * 2**15).astype(dtype)


def whole(path, **choice):
    volume = open_volume(path, **choice)
    return volume.read(Box.of(volume.shape[1:]))


def boxes(shape):
    """Boxes inside a volume of `shape` (z, y, x), empty ones too."""
    ranges = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    return st.tuples(*ranges).map(lambda axes: Box(*map(tuple, zip(*axes, strict=True))))


# One entry per way of writing a TIFF file: shape and dtype of what is written, how it is moved to
# (c, z, y, x), and how it is written. An axis is left out where the entry reads "-".

RGB = {"photometric": "rgb"}
ZYX = {"metadata": {"axes": "ZYX"}}
TIFFS = {
    "plane": ((33, 47), "uint8", "yx", {}),
    "stack": ((5, 33, 47), "uint16", "zyx", {}),
    "stack of signed, big-endian": ((5, 33, 47), "int16", "zyx", {"byteorder": ">"}),
    "BigTIFF": ((5, 33, 47), "float32", "zyx", {"bigtiff": True}),
    "BigTIFF, big-endian, deflate": (
        (3, 33, 47),
        "uint32",
        "zyx",
        {"bigtiff": True, "byteorder": ">", "compression": "zlib", "tile": (16, 32)},
    ),
    "one directory for all": ((5, 33, 47), "uint8", "zyx", {"truncate": True}),
    "no metadata": ((5, 33, 47), "uint8", "zyx", {"metadata": None}),
    "no metadata, many pages": ((9, 13, 17), "uint8", "zyx", {"metadata": None}),
    "strips": ((3, 33, 47), "uint8", "zyx", {"rowsperstrip": 8}),
    "strips, deflate": ((3, 33, 47), "int8", "zyx", {"rowsperstrip": 8, "compression": "zlib"}),
    "strips, LZW, predictor": (
        (3, 33, 47),
        "uint16",
        "zyx",
        {"rowsperstrip": 5, "compression": "lzw", "predictor": 2},
    ),
    "tiles": ((3, 33, 47), "uint16", "zyx", {"tile": (16, 16)}),
    "tiles, zstd": ((3, 33, 47), "uint16", "zyx", {"tile": (32, 16), "compression": "zstd"}),
    "tiles, float predictor": (
        (3, 33, 47),
        "float32",
        "zyx",
        {"tile": (16, 16), "compression": "zlib", "predictor": 3},
    ),
    "deep tiles": (
        (5, 33, 47),
        "uint8",
        "zyx",
        {"tile": (2, 16, 16), "compression": "zlib", "volumetric": True},
    ),
    "half precision": ((3, 33, 47), "float16", "zyx", {}),
    "double precision": ((3, 33, 47), "float64", "zyx", {}),
    "64 bits": ((33, 47), "uint64", "yx", {}),
    "RGB": ((33, 47, 3), "uint8", "yxc", RGB),
    "RGB of 16 bits, tiles": ((33, 47, 3), "uint16", "yxc", {"tile": (16, 16), **RGB}),
    "RGB, separate, deflate": (
        (3, 33, 47),
        "uint8",
        "cyx",
        {"planarconfig": "separate", "compression": "zlib", "rowsperstrip": 8, **RGB},
    ),
    "RGB stack": ((5, 33, 47, 3), "uint8", "zyxc", RGB),
    "RGBA stack, deflate": ((5, 33, 47, 4), "uint8", "zyxc", {"compression": "zlib", **RGB}),
    "four axes, no names": ((2, 5, 33, 47), "uint8", "czyx", {}),
    "named axes": ((5, 2, 33, 47), "uint8", "zcyx", {"metadata": {"axes": "ZCYX"}}),
    "ImageJ stack": ((5, 33, 47), "uint8", "zyx", {"imagej": True, **ZYX}),
    "ImageJ hyperstack": (
        (4, 2, 33, 47),
        "uint16",
        "zcyx",
        {"imagej": True, "metadata": {"axes": "ZCYX"}},
    ),
    "ImageJ, deflate": (
        (5, 33, 47),
        "uint8",
        "zyx",
        {"imagej": True, "compression": "zlib", **ZYX},
    ),
    "ImageJ, RGB": (
        (5, 33, 47, 3),
        "uint8",
        "zyxc",
        {"imagej": True, "metadata": {"axes": "ZYXS"}, **RGB},
    ),
    "OME": ((2, 5, 33, 47), "uint16", "czyx", {"ome": True, "metadata": {"axes": "CZYX"}}),
    "OME, tiles, big-endian": (
        (5, 2, 33, 47),
        "uint16",
        "zcyx",
        {"ome": True, "tile": (16, 16), "byteorder": ">", "metadata": {"axes": "ZCYX"}},
    ),
    "OME, RGB": (
        (5, 33, 47, 3),
        "uint8",
        "zyxc",
        {"ome": True, "metadata": {"axes": "ZYXS"}, **RGB},
    ),
}


def write_tiff(path, name):
    """Writes one of `TIFFS`; gives its voxels as (c, z, y, x)."""
    shape, dtype, axes, options = TIFFS[name]
    voxels = noise(shape, dtype)
    if "byteorder" in options:
        voxels = voxels.astype(voxels.dtype.newbyteorder(options["byteorder"]))
    tifffile.imwrite(path, voxels, **{"photometric": "minisblack", **options})
    native = voxels.astype(dtype)
    order = [axes.index(axis) for axis in "czyx" if axis in axes]
    kept = tuple(slice(None) if axis in axes else None for axis in "czyx")
    return native.transpose(order)[kept]
