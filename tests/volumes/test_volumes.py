"""Volumes: every format against NumPy windows, damaged files against their error messages."""

import errno
import gc
import json
import logging
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc, GZip
from PIL import Image

from unet_ray.errors import InputError, RunError
from unet_ray.tiling.boxes import Box
from unet_ray.volumes import image_files, ome_zarr
from unet_ray.volumes import tiff as tiff_module
from unet_ray.volumes.opening import open_volume


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


# One entry per way of writing a TIFF file: shape, dtype and axes of the written array, and the
# options of the writer.

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
    "ImageJ, one directory": (
        (5, 33, 47),
        "uint16",
        "zyx",
        {"imagej": True, "truncate": True, **ZYX},
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
    """Writes one of `TIFFS`; returns its voxels as (c, z, y, x)."""
    shape, dtype, axes, options = TIFFS[name]
    voxels = noise(shape, dtype)
    if "byteorder" in options:
        voxels = voxels.astype(voxels.dtype.newbyteorder(options["byteorder"]))
    tifffile.imwrite(path, voxels, **{"photometric": "minisblack", **options})
    native = voxels.astype(dtype, copy=False)
    order = [axes.index(axis) for axis in "czyx" if axis in axes]
    with_all_axes = tuple(slice(None) if axis in axes else None for axis in "czyx")
    return native.transpose(order)[with_all_axes]


@pytest.fixture(params=TIFFS)
def tiff(request, tmp_path):
    """Path and voxels (c, z, y, x) of one file of each kind."""
    path = tmp_path / "image.tif"
    return path, write_tiff(path, request.param)


def check_windows(path, want, examples=15):
    """Reads boxes of an open volume and compares them with the same windows of an array."""
    volume = open_volume(path)
    assert volume.shape == want.shape
    assert volume.dtype == want.dtype
    assert volume.dtype.isnative

    @settings(max_examples=examples)
    @given(boxes(volume.shape[1:]))
    def same(box):
        voxels = volume.read(box)
        assert voxels.dtype == want.dtype
        np.testing.assert_array_equal(voxels, want[:, *box.slices])

    same()


# TIFF -----------------------------------------------------------------------------------------


def test_every_kind_of_tiff_reads_as_numpy_does(tiff):
    path, want = tiff
    volume = open_volume(str(path))
    voxels = whole(path)
    np.testing.assert_array_equal(voxels, want)
    assert voxels.dtype == volume.dtype == want.dtype
    assert volume.shape == want.shape
    assert volume.path == str(path) and volume.omissions == ()
    box = Box((0, 3, 14), (volume.shape[1], 13, 17))
    np.testing.assert_array_equal(volume.read(box), want[:, *box.slices])


@pytest.mark.parametrize(
    "name", ["stack of signed, big-endian", "tiles, float predictor", "strips, LZW, predictor"]
)
def test_any_box_of_a_tiff(tmp_path, name):
    want = write_tiff(tmp_path / "image.tif", name)
    check_windows(tmp_path / "image.tif", want, examples=60)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_written_by_another_library(tmp_path, compression):
    want = noise((4, 33, 47))
    first, *rest = map(Image.fromarray, want)
    first.save(tmp_path / "i.tif", save_all=True, append_images=rest, compression=compression)
    np.testing.assert_array_equal(whole(tmp_path / "i.tif"), want[None])


@pytest.mark.parametrize("compression", [None, "packbits"])
def test_bits_are_read_as_bytes(tmp_path, compression):
    want = noise((33, 48)) > 99
    Image.fromarray(want).save(tmp_path / "i.tif", compression=compression)
    voxels = whole(tmp_path / "i.tif")
    assert voxels.dtype == np.uint8
    np.testing.assert_array_equal(voxels[0, 0], want)


@pytest.mark.parametrize("ome", [True, False])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("big", [True, False])
@pytest.mark.parametrize("levels", [1, 2])
def test_the_finest_level_of_a_pyramid_is_read(tmp_path, ome, order, big, levels):
    want = noise((3, 64, 64))
    options = {"tile": (16, 16), "compression": "zlib", "photometric": "minisblack"}
    with tifffile.TiffWriter(tmp_path / "i.tif", bigtiff=big, byteorder=order, ome=ome) as writer:
        writer.write(want, subifds=levels, **ZYX, **options)
        for level in range(levels):
            coarse = want[:, :: 2 << level, :: 2 << level]
            writer.write(coarse, subfiletype=1, **options)
    np.testing.assert_array_equal(whole(tmp_path / "i.tif"), want[None])


def test_the_first_of_several_images_is_read(tmp_path):
    want = noise((4, 33, 47))
    with tifffile.TiffWriter(tmp_path / "i.tif") as writer:
        writer.write(want, photometric="minisblack")
        writer.write(want[:, :20, :20], photometric="minisblack")
    np.testing.assert_array_equal(whole(tmp_path / "i.tif"), want[None])


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_blank_tiles_of_a_sparse_file_are_zero(tmp_path, compression):
    want = noise((32, 32)) | 1
    want[:16, 16:] = 0
    tiles = [want[:16, :16], None, want[16:, :16], want[16:, 16:]]
    path = tmp_path / "i.tif"
    options = {"shape": (32, 32), "dtype": "uint8", "tile": (16, 16)}
    tifffile.imwrite(path, iter(tiles), compression=compression, **options)
    with tifffile.TiffFile(path) as tif:
        assert 0 in tif.pages[0].databytecounts
    np.testing.assert_array_equal(whole(path)[0, 0], want)


def bytes_of_open_volume(path):
    """Bytes that an open volume needs; checks that opening it needs no more than estimated."""
    open_volume(path)  # so that late imports are not counted
    tracemalloc.start()
    try:
        volume = open_volume(path)
        peak = tracemalloc.get_traced_memory()[1]
        gc.collect()
        assert peak / 3 < volume.index_bytes and peak < volume.index_bytes + (64 << 10)
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_an_open_volume_needs_few_bytes_per_strip(tmp_path):
    path, options = tmp_path / "i.tif", {"rowsperstrip": 1, "compression": "zlib"}
    tifffile.imwrite(path, noise((10, 5000, 8)), **ZYX, **options)
    assert bytes_of_open_volume(path) < 20 * 50_000


def test_the_estimate_includes_uncompressed_strips(tmp_path):
    with tifffile.TiffWriter(tmp_path / "i.tif") as writer:
        for page in noise((10, 5000, 8)):
            writer.write(page, rowsperstrip=1, contiguous=False, metadata=None)
    assert bytes_of_open_volume(tmp_path / "i.tif") < 20 * 50_000
    assert open_volume(tmp_path / "i.tif").index_bytes > 40 * 50_000


LISTED = '<TiffData IFD="{0}" FirstZ="{0}" PlaneCount="1"/>'
ELEMENTS = {
    "short": LISTED,
    "as Bio-Formats writes them": '<TiffData FirstC="0" FirstT="0" FirstZ="{0}" IFD="{0}" '
    'PlaneCount="1"><UUID FileName="i.ome.tif">urn:uuid:12345678-1234-1234-1234-123456789abc'
    '</UUID></TiffData><Plane DeltaT="0.0" ExposureTime="0.1" PositionX="1.0" PositionY="2.0" '
    'TheC="0" TheT="0" TheZ="{0}"><AnnotationRef ID="Annotation:{0}"/></Plane>',
    "of many attributes": LISTED + "<Plane " + " ".join(f'a{n}="{{0}}"' for n in range(40)) + "/>",
    "in other letters": LISTED
    + '<Plane TheC="0" TheZ="{0}" PositionZUnit="\U0001f52c">\n\n</Plane>',
}


@pytest.mark.parametrize("elements", ELEMENTS.values(), ids=ELEMENTS)
def test_the_estimate_includes_ome_metadata_that_list_every_plane(tmp_path, elements):
    planes, path = 2000, tmp_path / "i.ome.tif"
    listed = "".join(elements.format(plane) for plane in range(planes))
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:12345678-1234-1234-1234-123456789abc"><Image ID="Image:0"><Pixels '
        f'ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="8" SizeY="8" SizeZ="{planes}" '
        f'SizeC="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{listed}</Pixels>'
        "</Image></OME>"
    )
    with tifffile.TiffWriter(path) as writer:
        for plane in noise((planes, 8, 8)):
            writer.write(plane, description=xml and xml.encode(), metadata=None, compression="zlib")
            xml = None
    assert bytes_of_open_volume(path) < 100 * planes
    assert open_volume(path).shape == (1, planes, 8, 8)


def test_an_open_volume_needs_few_bytes_per_page(tmp_path):
    pytest.importorskip("imagecodecs")
    path, options = tmp_path / "i.tif", {"tile": (16, 16), "compression": "jpeg"}
    tifffile.imwrite(path, noise((4000, 16, 16, 3)), photometric="ycbcr", **options)
    assert bytes_of_open_volume(path) < 64 * 4000


def test_time_points_and_channels_are_chosen(tmp_path):
    want = noise((3, 4, 2, 13, 17), "uint16")  # t, z, c
    path = tmp_path / "i.tif"
    tifffile.imwrite(path, want, imagej=True, metadata={"axes": "TZCYX"})
    with pytest.raises(InputError, match=r"i\.tif has 3 time points: choose one, .* --time 0"):
        open_volume(path)
    with pytest.raises(InputError, match="no --time 3: time points are 0 to 2"):
        open_volume(path, time=3)
    with pytest.raises(InputError, match="no --channel 2: channels are 0 to 1"):
        open_volume(path, time=0, channel=2)
    with pytest.raises(InputError, match="no --channel -1"):
        open_volume(path, time=0, channel=-1)
    with pytest.raises(InputError, match="has one level: --level 1 needs an OME-Zarr image"):
        open_volume(path, time=0, level=1)
    np.testing.assert_array_equal(whole(path, time=1), want[1].swapaxes(0, 1))
    np.testing.assert_array_equal(whole(path, time=2, channel=1)[0], want[2, :, 1])


def test_a_sample_of_rgb_is_a_channel(tmp_path):
    want = write_tiff(tmp_path / "i.tif", "RGB stack")
    np.testing.assert_array_equal(whole(tmp_path / "i.tif", channel=1), want[1:2])


def test_samples_vary_faster_than_channels(tmp_path):
    want = noise((2, 33, 47, 3))
    tifffile.imwrite(tmp_path / "i.tif", want, metadata={"axes": "CYXS"}, **RGB)
    flat = want.transpose(0, 3, 1, 2).reshape(6, 1, 33, 47)
    np.testing.assert_array_equal(whole(tmp_path / "i.tif"), flat)


def test_ome_metadata(tmp_path):
    path = tmp_path / "i.ome.tif"
    metadata = {
        "axes": "CZYX",
        "PhysicalSizeX": 325,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.5,
        "PhysicalSizeZ": 0.002,
        "PhysicalSizeZUnit": "mm",
        "Channel": {"Name": ["nuclei", "walls"]},
    }
    tifffile.imwrite(path, noise((2, 5, 13, 17)), metadata=metadata, photometric="minisblack")
    volume = open_volume(path)
    assert volume.voxel_size == pytest.approx((2.0, 0.5, 0.325))
    assert volume.channel_names == ("nuclei", "walls")
    assert open_volume(path, channel=1).channel_names == ("walls",)


@pytest.mark.parametrize("depth", [1, 5])
def test_imagej_metadata(tmp_path, depth):
    path = tmp_path / "i.tif"
    metadata = {"axes": "ZYX", "unit": "nm"} | ({"spacing": 50.0} if depth > 1 else {})
    voxels = noise((depth, 13, 17))
    tifffile.imwrite(path, voxels, imagej=True, resolution=(0.25, 0.1), metadata=metadata)
    volume = open_volume(path)
    assert volume.voxel_size == pytest.approx((0.05 if depth > 1 else 1.0, 0.01, 0.004))
    assert volume.channel_names == ("",)


@pytest.mark.parametrize("size", ["INF", "NaN", "-1", "0", "1e999"])
def test_a_voxel_size_in_ome_metadata_is_finite_and_positive(tmp_path, size):
    path = tmp_path / "i.ome.tif"
    metadata = {"axes": "ZYX", **{f"PhysicalSize{axis}": 777.0 for axis in "XYZ"}}
    tifffile.imwrite(path, noise((5, 13, 17)), metadata=metadata)
    path.write_bytes(path.read_bytes().replace(b"777.0", size.encode().ljust(5)))
    assert open_volume(path).voxel_size is None


@pytest.mark.parametrize("spacing", [math.inf, math.nan, 0.0])
def test_a_voxel_size_of_imagej_is_finite_and_positive(tmp_path, spacing):
    path, metadata = tmp_path / "i.tif", {"axes": "ZYX", "unit": "um", "spacing": 7.0}
    tifffile.imwrite(
        path, noise((5, 13, 17)), imagej=True, resolution=(2.0, 2.0), metadata=metadata
    )
    assert open_volume(path).voxel_size == (7.0, 0.5, 0.5)
    path.write_bytes(path.read_bytes().replace(b"spacing=7.0", f"spacing={spacing}".encode()))
    assert open_volume(path).voxel_size is None


@pytest.mark.parametrize("scale", [math.inf, math.nan, -2.0, 0.0])
def test_a_voxel_size_of_ome_zarr_is_finite_and_positive(tmp_path, scale):
    transform = {"coordinateTransformations": [{"type": "scale", "scale": [1, scale, 1, 1]}]}
    write_ome_zarr(tmp_path / "i.zarr", [noise((2, 5, 8, 8))], "0.5", **transform)
    assert open_volume(tmp_path / "i.zarr").voxel_size is None


def test_a_voxel_size_without_a_unit_or_an_axis_is_unknown(tmp_path):
    path, options = tmp_path / "i.tif", {"imagej": True, "resolution": (0.25, 0.1)}
    for metadata in ({"spacing": 50.0}, {"unit": "um"}, {"unit": "pixel", "spacing": 1.0}):
        tifffile.imwrite(path, noise((5, 13, 17)), metadata={"axes": "ZYX", **metadata}, **options)
        assert open_volume(path).voxel_size is None


@pytest.mark.parametrize(
    ("name", "chunk"),
    [("tiles, zstd", (1, 32, 16)), ("strips, deflate", (1, 8, 47)), ("deep tiles", (2, 16, 16))],
)
def test_the_chunk_of_a_tiff_is_its_tile_or_strip(tmp_path, name, chunk):
    write_tiff(tmp_path / "i.tif", name)
    assert open_volume(tmp_path / "i.tif").chunk == chunk


def test_axes_that_cannot_be_placed_are_refused(tmp_path):
    path = tmp_path / "i.tif"
    tifffile.imwrite(path, noise((2, 5, 13, 17)), metadata={"axes": "QZYX"})
    with pytest.raises(InputError, match=r"axes '\?zyx' of extents \(2, 5, 13, 17\)"):
        open_volume(path)
    tifffile.imwrite(path, noise((2, 13, 17)), metadata={"axes": "AYX"})
    with pytest.raises(InputError, match="axes 'ayx'"):
        open_volume(path)
    tifffile.imwrite(path, noise((2, 13, 17)), metadata={"axes": "ZXY"})
    with pytest.raises(InputError, match=r"its pages must be \(y, x\)"):
        open_volume(path)


def test_a_colour_image_is_never_read_as_a_stack(tmp_path):
    voxels = noise((33, 47, 3))
    tifffile.imwrite(tmp_path / "grey.tif", voxels, photometric="minisblack")
    with pytest.raises(InputError, match=r"grey\.tif looks like a colour image .* save it as RGB"):
        open_volume(tmp_path / "grey.tif")
    zarr.save_array(tmp_path / "grey.zarr", voxels)
    with pytest.raises(InputError, match=r"grey\.zarr looks like a colour image"):
        open_volume(tmp_path / "grey.zarr")


def test_a_window_of_a_huge_plain_file_needs_only_its_own_size(tmp_path):
    path = tmp_path / "sparse.tif"
    stack = tifffile.memmap(path, shape=(64, 2048, 2048), dtype="uint8", photometric="minisblack")
    stack[40, 100, 200] = 7
    stack.flush()
    del stack
    volume = open_volume(path)
    tracemalloc.start()
    voxels = volume.read(Box((30, 50, 60), (50, 150, 260)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert voxels[0, 10, 50, 140] == 7
    assert voxels.sum() == 7
    assert voxels.base is None or not isinstance(voxels.base, np.memmap)
    assert peak < 2 * voxels.nbytes


# Damaged TIFF ---------------------------------------------------------------------------------


def refused_or_same(path, want):
    """Whether a file is refused; if it is read, its voxels must equal `want`."""
    try:
        voxels = whole(path)
    except InputError:
        return True
    assert voxels.dtype == want.dtype
    np.testing.assert_array_equal(voxels, want)
    return False


def test_a_truncated_tiff_is_refused_or_complete(tiff):
    path, want = tiff
    stored = path.read_bytes()
    random = np.random.default_rng(1).integers(0, len(stored), 30).tolist()
    cuts = {*range(0, 300, 11), *range(len(stored) - 20, len(stored)), *random}
    refused = 0
    for cut in cuts:
        path.write_bytes(stored[:cut])
        refused += refused_or_same(path, want)
    assert refused > len(cuts) // 2


def test_truncated_files_of_imagej_are_refused(shared_data, tmp_path):
    source = shared_data / "formats/tiff_imagej/DeconvolutionSampleVerticalGrid1AU-crop.tif"
    stored, want = source.read_bytes(), whole(source)
    for cut in np.linspace(1, len(stored) - 1, 60).astype(int):
        (tmp_path / "i.tif").write_bytes(stored[:cut])
        refused_or_same(tmp_path / "i.tif", want)


def test_tifffile_itself_reads_a_truncated_stack_in_part(tmp_path, caplog):
    path = tmp_path / "i.tif"
    want = write_tiff(path, "ImageJ, one directory")
    path.write_bytes(path.read_bytes()[:-1000])
    assert tifffile.imread(path).size < want.size  # hence the checks of open_volume
    caplog.clear()
    with pytest.raises(InputError, match=r"i\.tif is truncated or damaged: it declares 5 planes"):
        open_volume(path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stack", b'"shape": [5,', b'"shape": [8,'),
        ("strips, deflate", b'"shape": [3,', b'"shape": [4,'),
        ("OME", b'SizeZ="5"', b'SizeZ="6"'),
        ("ImageJ stack", b"slices=5", b"slices=6"),
        ("ImageJ, deflate", b"images=5", b"images=6"),
    ],
)
def test_fewer_planes_than_declared_are_refused(tmp_path, name, old, new):
    path = tmp_path / "i.tif"
    write_tiff(path, name)
    stored = path.read_bytes()
    assert stored.count(old) == 1
    path.write_bytes(stored.replace(old, new))
    with pytest.raises(InputError, match=r"i\.tif (is truncated|declares)"):
        open_volume(path)


def test_log_messages_of_tifffile_reach_the_user_once(tmp_path, caplog):
    path = tmp_path / "i.tif"
    write_tiff(path, "OME")
    path.write_bytes(path.read_bytes().replace(b'SizeZ="5"', b'SizeZ="4"'))
    volume = open_volume(path)
    assert volume.shape[1] == 4
    assert ["expected 8 frames, got 10" in record.getMessage() for record in caplog.records] == [1]
    pickle.loads(pickle.dumps(volume)).read(Box((0, 0, 0), (1, 1, 1)))
    assert len(caplog.records) == 1
    assert not logging.getLogger("tifffile").filters


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"II*\0" + bytes(4), r"contains no image"),
        (b"II*\0\x09\0\0\0", r"is truncated: it has 64 bytes and needs at least 6179"),
        (b"II+\0\x07\0\0\0" + bytes(8), r"cannot be read as a TIFF file: invalid BigTIFF"),
    ],
)
def test_headers_with_invalid_links_are_refused(tmp_path, header, message):
    (tmp_path / "i.tif").write_bytes(header.ljust(64, b"\2"))
    with pytest.raises(InputError, match=rf"i\.tif {message}"):
        open_volume(tmp_path / "i.tif")


def test_metadata_that_do_not_match_the_images_are_refused(tmp_path):
    path = tmp_path / "i.tif"
    write_tiff(path, "OME")
    path.write_bytes(path.read_bytes().replace(b"<Image ", b"<Imago "))
    with pytest.raises(InputError, match=r"does not contain the images that its OME metadata"):
        open_volume(path)


@pytest.mark.parametrize(
    ("name", "tag", "value", "message"),
    [
        (
            "strips, deflate",
            259,
            9999,
            r"cannot be decompressed: 9999 .*; export it uncompressed or",
        ),
        ("no metadata", 258, 57, r"contains samples of unknown type"),
        ("strips, deflate", 278, 4, r"is damaged: page 0 lists 5 of its 9 strips or tiles"),
    ],
)
def test_tags_with_invalid_values_are_refused(tmp_path, name, tag, value, message):
    path = tmp_path / "i.tif"
    write_tiff(path, name)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags[tag].overwrite(value)
    with pytest.raises(InputError, match=rf"i\.tif {message}"):
        open_volume(path)


def test_a_loop_of_directories_is_refused(tmp_path):
    path = tmp_path / "i.tif"
    write_tiff(path, "no metadata")
    with tifffile.TiffFile(path) as tif:
        first, link = tif.pages[0].offset, tif.pages.next_page_offset
    stored = bytearray(path.read_bytes())
    stored[link : link + 4] = first.to_bytes(4, "little")
    path.write_bytes(stored)
    with pytest.raises(InputError, match=r"i\.tif is damaged: its directories form a loop"):
        open_volume(path)


def test_overlapping_directories_are_refused(tmp_path):
    """Each of 1000 directories names the same 1000 sub-directories: a million reads."""
    count = 1000
    entry, table = 2 + 12 + 4, 8 + count * (2 + 12 + 4)
    data = bytearray(b"II*\0" + struct.pack("<I", 8))
    for number in range(count):
        following = 8 + (number + 1) * entry if number + 1 < count else 0
        data += struct.pack("<HHHIII", 1, 330, 4, count, table, following)
    data += struct.pack("<I", 8) * count
    (tmp_path / "i.tif").write_bytes(data)
    with pytest.raises(InputError, match=r"i\.tif is damaged: its directories overlap"):
        open_volume(tmp_path / "i.tif")


def test_entities_in_ome_metadata_are_refused(tmp_path):
    path = tmp_path / "i.ome.tif"
    tifffile.imwrite(path, noise((5, 13, 17)), metadata={"axes": "ZYX"}, ome=True)
    with tifffile.TiffFile(path) as tif:
        xml = tif.ome_metadata
    entity = '<!DOCTYPE OME [<!ENTITY a "aaaaaaaaaa">]><OME'
    tifffile.imwrite(path, noise((13, 17)), metadata=None, description=xml.replace("<OME", entity))
    with pytest.raises(InputError, match=r"i\.ome\.tif has OME metadata with XML entities"):
        open_volume(path)


def without_imagecodecs(code, folder, **options):
    """Runs Python as in an installation without the package imagecodecs."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['imagecodecs'] = None\n{code}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        **options,
    )


def test_a_deflate_bomb_does_not_fill_the_memory(tmp_path):
    """One strip of 624 bytes is stored as 2.6 MB that inflate to 2.5 GiB."""
    packer, zeros = zlib.compressobj(9), bytes(1 << 24)
    first, again = (packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    bomb = first + 159 * again
    tifffile.imwrite(tmp_path / "i.tif", noise((24, 26)), compression="zlib")
    with tifffile.TiffFile(tmp_path / "i.tif", mode="r+") as tif:
        end = tif.filehandle.size
        for tag, value in (("StripOffsets", end), ("StripByteCounts", len(bomb))):
            tif.pages[0].tags[tag].overwrite(value)
    with open(tmp_path / "i.tif", "ab") as file:
        file.write(bomb)
    done = without_imagecodecs(
        """if True:
        import resource
        from unet_ray.tiling.boxes import Box
        from unet_ray.volumes.opening import open_volume
        volume = open_volume("i.tif")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resource.setrlimit(resource.RLIMIT_DATA, (3 << 29, 3 << 29))
        try:
            volume.read(Box.of(volume.shape[1:]))
        except RuntimeError as error:
            print(error)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(volume.read_overhead((1, 24, 26)), grown << 10)
        """,
        tmp_path,
    )
    message, figures = done.stdout.splitlines()
    assert message.endswith("have more than the 624 bytes of a strip or tile.")
    stated, grown = map(int, figures.split())
    assert grown < stated + 2**23


@pytest.mark.parametrize("compression", ["zlib", "lzma", "packbits"])
@pytest.mark.parametrize("damage", ["", "truncated", "longer"])
def test_strips_are_decoded_without_imagecodecs(tmp_path, compression, damage):
    voxels = noise((45, 26), "uint16")
    data = voxels.repeat(2, axis=0) if damage == "longer" else voxels
    tifffile.imwrite(tmp_path / "long.tif", data, compression=compression, rowsperstrip=100)
    tifffile.imwrite(tmp_path / "i.tif", voxels, compression=compression, rowsperstrip=100)
    with (
        tifffile.TiffFile(tmp_path / "long.tif") as long,
        tifffile.TiffFile(tmp_path / "i.tif", mode="r+") as tif,
    ):
        page = long.pages[0]
        long.filehandle.seek(page.dataoffsets[0])
        strip = long.filehandle.read(page.databytecounts[0])
        strip = strip[: len(strip) // 2] if damage == "truncated" else strip
        end = tif.filehandle.size
        tif.pages[0].tags["StripOffsets"].overwrite(end)
        tif.pages[0].tags["StripByteCounts"].overwrite(len(strip))
        tif.filehandle.seek(end)
        tif.filehandle.write(strip)
    done = without_imagecodecs(
        """if True:
        from unet_ray.tiling.boxes import Box
        from unet_ray.volumes.opening import open_volume
        volume = open_volume("i.tif")
        try:
            print(volume.read(Box.of(volume.shape[1:])).tobytes().hex())
        except RuntimeError as error:
            print(error)
        """,
        tmp_path,
    )
    if damage:
        assert "cannot be decoded at page 0, strip or tile 0" in done.stdout
    else:
        assert done.stdout.strip() == voxels.tobytes().hex()


def test_a_multi_file_ome_tiff_is_refused(tmp_path):
    files = "".join(
        f'<TiffData FirstZ="{z}" IFD="0" PlaneCount="1"><UUID FileName="{z}.ome.tif">urn:uuid:{z}'
        "</UUID></TiffData>"
        for z in range(2)
    )
    for z in range(2):
        xml = (
            '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:{z}"><Image ID="Image:0"><Pixels ID="Pixels:0" Type="uint8" '
            'DimensionOrder="XYZCT" SizeX="17" SizeY="13" SizeZ="2" SizeC="1" SizeT="1">'
            f'<Channel ID="Channel:0" SamplesPerPixel="1"/>{files}</Pixels></Image></OME>'
        )
        path = tmp_path / f"{z}.ome.tif"
        tifffile.imwrite(path, noise((13, 17)), description=xml, metadata=None)
    with pytest.raises(InputError, match=r"belongs to an OME-TIFF of several files: convert it"):
        open_volume(tmp_path / "0.ome.tif")
    (tmp_path / "1.ome.tif").unlink()
    with pytest.raises(InputError, match=r"0\.ome\.tif declares 2 planes and contains 1"):
        open_volume(tmp_path / "0.ome.tif")


@pytest.mark.parametrize("name", ["strips, deflate", "tiles, zstd"])
def test_damaged_data_affect_only_the_boxes_that_touch_them(tmp_path, name):
    path = tmp_path / "i.tif"
    want = write_tiff(path, name)
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[1]
        offset, count = page.dataoffsets[0], page.databytecounts[0]
    stored = bytearray(path.read_bytes())
    stored[offset : offset + count] = bytes(count)
    path.write_bytes(stored)
    volume = open_volume(path)
    for box in (Box((0, 0, 0), (1, 33, 47)), Box((0, 32, 0), (3, 33, 47))):
        np.testing.assert_array_equal(volume.read(box), want[:, *box.slices])
    with pytest.raises(RunError, match=r"i\.tif cannot be decoded at page 1, strip or tile 0: ."):
        volume.read(Box((0, 7, 0), (3, 8, 1)))


@pytest.mark.parametrize("name", ["stack", "strips, deflate"])
def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path, name):
    path = tmp_path / "i.tif"
    write_tiff(path, name)
    volume = open_volume(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(RunError, match=r"i\.tif .*(become shorter|cannot be decoded)"):
        volume.read(Box.of(volume.shape[1:]))
    path.unlink()
    with pytest.raises(RunError, match=r"i\.tif cannot be read: No such file"):
        volume.read(Box.of(volume.shape[1:]))


def test_a_missing_codec_is_named_with_its_remedy(tmp_path):
    want = write_tiff(tmp_path / "lzw.tif", "strips, LZW, predictor")
    write_tiff(tmp_path / "deflate.tif", "strips, deflate")
    code = """if True:
        import sys
        sys.modules["imagecodecs"] = None
        from unet_ray.volumes.opening import open_volume
        from unet_ray.tiling.boxes import Box
        print(open_volume("deflate.tif").read(Box.of((1, 1, 1))).shape)
        try:
            open_volume("lzw.tif")
        except ValueError as error:
            print(error)
    """
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stderr) == (0, "")
    shape, message = process.stdout.splitlines()
    assert shape == "(1, 1, 1, 1)"
    assert re.search(r"lzw\.tif .*LZW.* requires .*; pip install 'unet-ray\[tiff\]'\.$", message)
    np.testing.assert_array_equal(whole(tmp_path / "lzw.tif"), want)


# Slices ---------------------------------------------------------------------------------------


def save_png(path, voxels):
    Image.fromarray(voxels).save(path)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_folder_of_slices_in_natural_order(tmp_path, dtype):
    want = noise((12, 13, 17), dtype)
    for z, plane in enumerate(want):
        if z % 2:
            tifffile.imwrite(tmp_path / f"t{z}.TIF", plane, compression="zlib")
        else:
            save_png(tmp_path / f"t{z}.png", plane)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.tif").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    check_windows(tmp_path, want[None])
    volume = open_volume(tmp_path)
    assert (volume.kind, volume.chunk) == ("folder", (1, 13, 17))


def test_a_folder_names_the_file_of_each_slice(tmp_path):
    folder, plane = tmp_path / "slices", noise((13, 17))
    folder.mkdir()
    names = ["a.TIFF", "mask2.tif", "mask010.png", "mask10.tif", "mask011.tif"]
    for name in reversed(names):
        (save_png if name.endswith("png") else tifffile.imwrite)(folder / name, plane)
    volume = open_volume(folder)
    assert volume.slice_files() == names
    # The planes have the same order, in another process too.
    assert len(names) == volume.shape[1]
    assert pickle.loads(pickle.dumps(volume)).slice_files() == names


def test_only_folders_have_slice_files(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", noise((5, 13, 17)))
    save_png(tmp_path / "one.png", noise((13, 17)))
    zarr.create_array(tmp_path / "stack.zarr", data=noise((3, 13, 17)))
    for name in ("stack.tif", "one.png", "stack.zarr"):
        assert open_volume(tmp_path / name).slice_files() == []


def test_slices_of_colour_images_are_read(tmp_path):
    want = noise((3, 13, 17, 3))
    for z, plane in enumerate(want):
        save_png(tmp_path / f"{z}.png", plane)
    np.testing.assert_array_equal(whole(tmp_path), want.transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(whole(tmp_path, channel=2)[0], want[..., 2])


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16"])
def test_a_single_png_is_read(tmp_path, mode):
    if mode in "1P":
        image = Image.fromarray(noise((13, 17)) % 2).convert(mode)
        want = np.asarray(image).astype(np.uint8)[..., None]
    else:
        want = noise((13, 17, len(mode.split(";")[0])), "uint16" if "16" in mode else "uint8")
        image = Image.fromarray(want.squeeze())
    assert image.mode == mode
    image.save(tmp_path / "i.png")
    check_windows(tmp_path / "i.png", np.moveaxis(want, -1, 0)[:, None])


# Content that is left out


def left_out(path):
    return [omission.part for omission in open_volume(path).omissions]


IMAGES, COLOURS = (
    "only the first of its 2 images is read",
    "colour numbers are read, not the colours of the palette",
)


def write_two_images(path):
    with tifffile.TiffWriter(path) as file:
        file.write(noise((2, 33, 47)), photometric="minisblack")
        file.write(noise((20, 22)), photometric="minisblack")


def write_palette(path):
    if path.suffix == ".png":
        Image.fromarray(noise((33, 47))).convert("P", palette=Image.Palette.ADAPTIVE).save(path)
    else:
        colours = noise((3, 256), "uint16")
        tifffile.imwrite(path, noise((33, 47)), photometric="palette", colormap=colours)


def test_further_images_of_a_tiff_are_named(tmp_path):
    write_two_images(tmp_path / "a.tif")
    assert left_out(tmp_path / "a.tif") == [IMAGES]


def test_a_thumbnail_is_not_a_further_image(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(noise((64, 64)), photometric="minisblack")
        file.write(noise((16, 16)), photometric="minisblack", subfiletype=1)
    assert left_out(tmp_path / "a.tif") == []


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_palette_is_named(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    write_palette(path)
    assert left_out(path) == [COLOURS]
    assert pickle.loads(pickle.dumps(open_volume(path))).omissions


@pytest.mark.parametrize(
    "names, gap",
    [
        ("z001 z002 z004", "1 in all, the first after z002"),
        ("z1 z2 z5 z6 z10", "5 in all, the first after z2"),
        ("z3-c1 z5-c1 z9-c1", "1 in all, the first after z5-c1"),
        ("z008 z009 z010", None),
        ("z10 z20 z30", None),
        ("z1 z4", None),
        ("z7", None),
        ("a b d", None),
        ("a1 a2 b4", None),
        ("s1z1 s1z2 s2z4", None),
        ("t05 t10 t17", None),
        ("z01 z1 z3", None),
    ],
)
def test_missing_slice_numbers_are_named(tmp_path, names, gap):
    for name in names.split():
        tifffile.imwrite(tmp_path / f"{name}.tif", noise((9, 11)))
    expected = [f"slice numbers are missing, {gap}.tif"] if gap else []
    assert left_out(tmp_path) == expected


def test_a_folder_names_the_slices_that_are_read_in_part(tmp_path):
    for number in (1, 2, 3):
        write_palette(tmp_path / f"{number}.tif")
    assert left_out(tmp_path) == [f"{COLOURS} in 1.tif and 2 other slices"]
    tifffile.imwrite(tmp_path / "1.tif", noise((33, 47)))
    tifffile.imwrite(tmp_path / "2.tif", noise((33, 47)))
    assert left_out(tmp_path) == [f"{COLOURS} in 3.tif"]


def test_slices_have_a_voxel_size_along_y_and_x_but_not_z(tmp_path):
    options = {"imagej": True, "resolution": (2, 4), "metadata": {"unit": "um"}}
    tifffile.imwrite(tmp_path / "0.tif", noise((13, 17)), **options)
    assert open_volume(tmp_path).voxel_size == (1, 0.25, 0.5)
    tifffile.imwrite(tmp_path / "1.tif", noise((13, 17)), **options)
    assert open_volume(tmp_path).voxel_size is None


def test_slices_that_differ_are_both_named(tmp_path):
    save_png(tmp_path / "t9.png", noise((13, 17)))
    save_png(tmp_path / "t10.png", noise((13, 18)))
    with pytest.raises(InputError, match=r"t9\.png is \(1, 1, 13, 17\).*t10\.png is .*13, 18\)"):
        open_volume(tmp_path)
    save_png(tmp_path / "t10.png", noise((13, 17), "uint16"))
    with pytest.raises(InputError, match=r"t9\.png is .* uint8, t10\.png is .* uint16"):
        open_volume(tmp_path)


def test_bad_slices_are_named(tmp_path):
    tifffile.imwrite(tmp_path / "1.tif", noise((5, 13, 17)))
    with pytest.raises(InputError, match=r"1\.tif contains 5 planes: .* one slice"):
        open_volume(tmp_path)
    (tmp_path / "1.tif").write_bytes(b"")
    with pytest.raises(InputError, match=r"1\.tif is empty"):
        open_volume(tmp_path)


def test_damaged_png_files_are_refused(tmp_path):
    path = tmp_path / "i.png"
    save_png(path, noise((50, 60)))
    stored = path.read_bytes()
    for cut in (*range(1, 60, 3), *range(60, len(stored) - 8, 50)):
        path.write_bytes(stored[:cut])
        with pytest.raises(InputError, match=r"i\.png"):
            open_volume(path)
    path.write_bytes(stored)
    volume = open_volume(path)
    save_png(path, noise((49, 60)))
    with pytest.raises(RunError, match=r"i\.png .* image has changed since it was opened"):
        volume.read(Box((0, 0, 0), (1, 50, 60)))
    path.write_bytes(stored[:60] + bytes(40) + stored[100:])
    with pytest.raises(RunError, match=r"i\.png cannot be decoded: ."):
        whole(path)
    head = stored[12:24] + bytes([16, 2]) + stored[26:29]  # 16 bits of each of red, green, blue
    path.write_bytes(stored[:12] + head + zlib.crc32(head).to_bytes(4, "big") + stored[33:])
    with pytest.raises(InputError, match=r"i\.png has 16 bits per colour"):
        open_volume(path)


def test_a_copy_notices_an_added_slice(tmp_path):
    save_png(tmp_path / "0.png", noise((13, 17)))
    sent = pickle.dumps(open_volume(tmp_path))
    save_png(tmp_path / "1.png", noise((13, 17)))
    with pytest.raises(RunError, match="had 1 slices and now has 2"):
        pickle.loads(sent).read(Box((0, 0, 0), (1, 1, 1)))
    shutil.rmtree(tmp_path)
    with pytest.raises(RunError, match="cannot be read: No such file"):
        pickle.loads(sent).read(Box((0, 0, 0), (1, 1, 1)))


def test_slices_that_change_or_vanish_after_the_folder_was_opened_are_refused(tmp_path):
    for z in range(3):
        save_png(tmp_path / f"{z}.png", noise((13, 17)))
    volume = open_volume(tmp_path)
    save_png(tmp_path / "2.png", noise((13, 18)))
    assert volume.read(Box((0, 0, 0), (2, 13, 17))).shape == (1, 2, 13, 17)
    with pytest.raises(RunError, match=r"2\.png has changed since it was opened"):
        volume.read(Box((2, 0, 0), (3, 13, 17)))
    (tmp_path / "2.png").unlink()
    with pytest.raises(RunError, match=r"2\.png does not exist"):
        volume.read(Box((2, 0, 0), (3, 13, 17)))


# Zarr -----------------------------------------------------------------------------------------

ZARRS = {
    "v3": {"chunks": (4, 16, 16)},
    "v3, sharded": {"chunks": (2, 8, 8), "shards": (4, 16, 16)},
    "v3, blosc": {"chunks": (4, 16, 16), "compressors": zarr.codecs.BloscCodec()},
    "v3, raw": {"chunks": (4, 16, 16), "compressors": None},
    "v2": {"chunks": (4, 16, 16), "zarr_format": 2},
    "v2, blosc": {"chunks": (4, 16, 16), "zarr_format": 2, "compressors": Blosc()},
    "v2, big-endian, gzip": {
        "chunks": (4, 16, 16),
        "zarr_format": 2,
        "dtype": ">u2",
        "compressors": GZip(),
    },
    "v2, nested": {
        "chunks": (4, 16, 16),
        "zarr_format": 2,
        "chunk_key_encoding": {"name": "v2", "separator": "/"},
    },
}


def write_zarr(path, voxels, **options):
    array = zarr.create_array(path, shape=voxels.shape, **{"dtype": voxels.dtype, **options})
    array[...] = voxels


@pytest.fixture(params=ZARRS)
def zarr_array(request, tmp_path):
    """Path and voxels (c, z, y, x) of an array of each kind."""
    voxels = noise((7, 20, 30), "uint16")
    write_zarr(tmp_path / "a.zarr", voxels, **ZARRS[request.param])
    return tmp_path / "a.zarr", voxels[None]


def test_any_box_of_a_zarr_array(zarr_array):
    path, want = zarr_array
    check_windows(path, want)
    sharded = "shard" in (path / "zarr.json").read_text() if (path / "zarr.json").exists() else 0
    assert open_volume(path).chunk == ((2, 8, 8) if sharded else (4, 16, 16))


@pytest.mark.parametrize("read_bytes", [1, 3 * 4 * 16 * 16 * 2])
def test_a_zarr_array_is_read_in_parts(zarr_array, monkeypatch, read_bytes):
    monkeypatch.setattr(ome_zarr, "READ_BYTES", read_bytes)
    check_windows(*zarr_array)


@given(st.tuples(*[st.integers(1, 30)] * 3), st.tuples(*[st.integers(1, 9)] * 3), st.data())
def test_no_box_touches_more_units_than_counted(shape, chunk, data):
    starts = [data.draw(st.integers(0, n - 1)) for n in shape]
    stops = [data.draw(st.integers(a + 1, n)) for a, n in zip(starts, shape, strict=True)]
    array = zarr.create_array({}, shape=shape, chunks=chunk, dtype="uint8")
    volume = object.__new__(ome_zarr.Zarr)
    volume.shape, volume.chunk, volume.unit_bytes = (1, *shape), array.chunks, 1
    volume._units_per_read = volume._units_in_flight = 10**9
    touched = math.prod(-(-b // n) - a // n for a, b, n in zip(starts, stops, chunk, strict=True))
    assert volume.read_overhead([b - a for a, b in zip(starts, stops, strict=True)]) >= 2 * touched


@pytest.mark.parametrize("shards", [None, (32, 256, 256)])
def test_the_overhead_of_a_read_is_bounded(tmp_path, monkeypatch, shards):
    voxels = noise((64, 512, 512), "uint8")
    options = {"chunks": (16, 128, 128), "shards": shards, "compressors": None}
    write_zarr(tmp_path / "a.zarr", voxels, **options)
    monkeypatch.setattr(ome_zarr, "READ_BYTES", 1 << 20)
    volume = open_volume(tmp_path / "a.zarr")
    box = Box((1, 1, 1), (64, 512, 512))
    volume.read(box)  # so that late imports are not counted
    tracemalloc.start()
    try:
        result = volume.read(box)
        peak = tracemalloc.get_traced_memory()[1] - result.nbytes
    finally:
        tracemalloc.stop()
    assert volume.read_overhead(box.shape) == 3 << 20
    assert peak <= volume.read_overhead(box.shape) + (1 << 19)


def test_a_truncated_chunk_is_refused(zarr_array):
    path, want = zarr_array
    chunk = next(p for p in (path / "c/0/0/0", path / "0.0.0", path / "0/0/0") if p.is_file())
    stored = chunk.read_bytes()
    for cut in (0, 1, 20, len(stored) // 2, len(stored) - 1):
        chunk.write_bytes(stored[:cut])
        volume = open_volume(path)
        box = Box((0, 0, 16), (7, 20, 30))
        np.testing.assert_array_equal(volume.read(box), want[:, *box.slices])
        with pytest.raises(RunError, match=r"a\.zarr cannot be read at 0:1,0:20,0:30: ."):
            volume.read(Box((0, 0, 0), (1, 20, 30)))


@pytest.mark.parametrize("dtype", ["int8", "uint64", "float16", "float32", "float64"])
def test_dtypes_of_zarr(tmp_path, dtype):
    want = noise((5, 13, 17), dtype)
    write_zarr(tmp_path / "a.zarr", want)
    check_windows(tmp_path / "a.zarr", want[None], examples=3)


def test_booleans_of_zarr_are_bytes(tmp_path):
    want = noise((13, 17)) > 99
    write_zarr(tmp_path / "a.zarr", want)
    check_windows(tmp_path / "a.zarr", want.astype(np.uint8)[None, None], examples=3)


def test_chunks_that_were_never_written_are_the_fill_value(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", shape=(8, 8), dtype="uint8", fill_value=9)
    assert (whole(tmp_path / "a.zarr") == 9).all()


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (None, "tczyx"),
        (["x", "y", "z", "c", "t"], "xyzct"),
        (["channel", "time", "z", "y", "x"], "ctzyx"),
        (["dim_0", "dim_1", "dim_2", "dim_3", "dim_4"], "tczyx"),
    ],
)
def test_axes_of_zarr_by_name_or_number(tmp_path, names, order):
    want = noise((2, 3, 4, 5, 6))
    write_zarr(tmp_path / "a.zarr", want, dimension_names=names)
    moved = want.transpose([order.index(axis) for axis in "tczyx"])
    for time in range(len(moved)):
        np.testing.assert_array_equal(whole(tmp_path / "a.zarr", time=time), moved[time])
    with pytest.raises(InputError, match=f"a.zarr has {len(moved)} time points"):
        open_volume(tmp_path / "a.zarr")


@pytest.mark.parametrize("ndim", [0, 1, 6])
def test_too_few_or_too_many_axes(tmp_path, ndim):
    write_zarr(tmp_path / "a.zarr", noise((2,) * ndim))
    with pytest.raises(InputError, match=r"a\.zarr has axes .*y and x must occur exactly once"):
        open_volume(tmp_path / "a.zarr")


def write_ome_zarr(path, images, version, **more):
    """Writes an OME-Zarr image with axes (c, z, y, x); each level is half as fine as the last."""
    axes = [
        {"name": "c", "type": "channel"},
        *({"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"),
    ]
    scale = [[1.0, 40.0, 4.0 * 2**level, 5.0 * 2**level] for level in range(len(images))]
    datasets = [
        {
            "path": f"scale{level}/image",
            "coordinateTransformations": [{"type": "scale", "scale": scale[level]}],
        }
        for level in range(len(images))
    ]
    image = {"axes": axes, "datasets": datasets, **more}
    attributes = {"multiscales": [image], "omero": {"channels": [{"label": "a"}, {"label": 1}]}}
    if version == "0.5":
        attributes = {"ome": attributes}
    form = 3 if version == "0.5" else 2
    zarr.create_group(path, zarr_format=form, attributes=attributes)
    for level, voxels in enumerate(images):
        write_zarr(path / datasets[level]["path"], voxels, zarr_format=form)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_levels_of_ome_zarr(tmp_path, version):
    path = tmp_path / "i.zarr"
    images = [noise((2, 5, 32, 40)), noise((2, 5, 16, 20), seed=1)]
    transform = {"coordinateTransformations": [{"type": "scale", "scale": [1, 1, 10, 1]}]}
    write_ome_zarr(path, images, version, **transform)
    for level, want in enumerate(images):
        np.testing.assert_array_equal(whole(path, level=level), want)
    volume = open_volume(path, level=1)
    assert volume.voxel_size == pytest.approx((0.04, 0.08, 0.01))
    assert volume.channel_names == ("a", "1")
    assert open_volume(path, channel=1).channel_names == ("1",)
    with pytest.raises(InputError, match=r"i\.zarr has no --level 2: levels are 0 to 1"):
        open_volume(path, level=2)
    with pytest.raises(InputError, match="--level 1 needs an OME-Zarr image"):
        open_volume(path / "scale0/image", level=1)


@pytest.mark.parametrize(
    ("attributes", "error"),
    [
        ({"multiscales": []}, "IndexError"),
        ({"multiscales": [{"datasets": [{}]}]}, "KeyError"),
        ({"multiscales": [{"datasets": 5}]}, "TypeError"),
        ({"multiscales": "zyx"}, "TypeError"),
    ],
)
def test_invalid_ome_zarr_metadata_are_refused(tmp_path, attributes, error):
    zarr.create_group(tmp_path / "g.zarr", attributes={"ome": attributes})
    with pytest.raises(InputError, match=rf"g\.zarr has invalid OME-Zarr metadata: {error}"):
        open_volume(tmp_path / "g.zarr")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", [2**63, 8, 8], "at most 2\\^53 voxels"),
        ("chunks", [0, 8, 8], "a.zarr"),
        ("shape", ["x" * 10**4], "cannot be opened as Zarr"),
        ("shape", [10**4000, 8, 8], "a.zarr"),
        ("dtype", "|V65536", "a.zarr"),
    ],
)
def test_hostile_values_in_zarr_metadata_are_refused(tmp_path, field, value, message):
    write_zarr(tmp_path / "a.zarr", noise((5, 8, 8)), zarr_format=2)
    metadata = tmp_path / "a.zarr/.zarray"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), field: value}))
    with pytest.raises(InputError, match=message) as error:
        open_volume(tmp_path / "a.zarr")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("level", ["", "scale0/image"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("device", "it is a device, pipe or socket"),
        ('{"a":' * 10**5, "nested too deep"),
        (f'{{"a": {"9" * 6000}}}', "too many digits"),
    ],
)
def test_hostile_metadata_files_of_zarr_are_refused(tmp_path, version, level, content, message):
    write_ome_zarr(tmp_path / "i.zarr", [noise((2, 5, 8, 8))], version)
    name = "zarr.json" if version == "0.5" else ".zattrs"
    metadata = tmp_path / "i.zarr" / level / name
    metadata.unlink()
    if content == "device":
        metadata.symlink_to("/dev/zero")
    else:
        metadata.write_text(content)
    with pytest.raises(InputError, match=rf"{name} cannot be read as JSON: .*{message}"):
        open_volume(tmp_path / "i.zarr")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_chunk_that_is_not_a_file_is_refused(tmp_path, kind):
    write_zarr(tmp_path / "a.zarr", noise((5, 8, 8)))
    volume = open_volume(tmp_path / "a.zarr")
    chunk = next(path for path in (tmp_path / "a.zarr/c").rglob("*") if path.is_file())
    chunk.unlink()
    if kind == "pipe":
        os.mkfifo(chunk)
    else:
        chunk.symlink_to("/dev/zero")
    with pytest.raises(RunError, match="it is a device, pipe or socket, not a file"):
        volume.read(Box.of(volume.shape[1:]))


def test_damaged_zarr_is_refused(tmp_path):
    path = tmp_path / "g.zarr"
    zarr.create_group(path).create_group("first")
    with pytest.raises(InputError, match=r"Zarr group without an image: open one of \['first'\]"):
        open_volume(path)
    (path / "zarr.json").write_text('{"zarr_format": 3, "node')
    with pytest.raises(InputError, match=r"zarr\.json cannot be read as JSON"):
        open_volume(path)
    (path / "zarr.json").write_text("[]")
    with pytest.raises(InputError, match=r"zarr\.json is not a JSON object"):
        open_volume(path)
    (path / "zarr.json").write_text('{"node_type": "array", "zarr_format": 3}')
    with pytest.raises(InputError, match=r"g\.zarr cannot be opened as Zarr: ."):
        open_volume(path)
    write_ome_zarr(tmp_path / "i.zarr", [noise((2, 5, 8, 8))], "0.5")
    shutil.rmtree(tmp_path / "i.zarr/scale0")
    with pytest.raises(InputError, match=r"scale0/image cannot be opened as Zarr"):
        open_volume(tmp_path / "i.zarr")


# Real files -----------------------------------------------------------------------------------

REAL = {
    "ome_tiff/multi-channel_tifffile.ome.tif": ((3, 1, 167, 439), "int8", None),
    "ome_zarr/blobs_image_v04_spatialdata.ome.zarr": ((3, 1, 12, 12), "float64", 234),
    "ome_zarr/blobs_image_v05_spatialdata.ome.zarr": ((3, 1, 12, 12), "float64", 234),
    "ome_zarr/simple_0.4_ngff-zarr": ((1, 1, 10, 10), "uint16", 4950),
    "ome_zarr/simple_0.5_ngff-zarr": ((1, 1, 10, 10), "uint16", 4950),
    "ome_zarr/ome-zarr-py_v0.1": ((2, 1, 16, 16), "uint8", 5235),
    "ome_zarr/ome-zarr-py_v0.2": ((2, 1, 16, 16), "uint8", 5235),
    "zarr_v3_sharded_zarrita/3d.chunked.compressed.sharded.i2": ((1, 4, 4, 4), "int16", 2016),
    "tiff_imagej/IXMtest_A02_s9.tif": ((3, 1, 395, 695), "uint16", None),
    "tiff_imagej/17P1_POS0013_D_1UL.tif": ((1, 1, 340, 340), "uint16", None),
    "tiff_imagej/DeconvolutionSampleVerticalGrid1AU-crop.tif": ((1, 21, 150, 150), "uint8", None),
    "tiff_tiled/boxes.tiff": ((3, 1, 250, 300), "uint8", None),
    "tiff_tiled/small.svs": ((3, 1, 16, 16), "uint8", None),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(shared_data, name):
    shape, dtype, total = REAL[name]
    path = shared_data / "formats" / name
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    volume = open_volume(path)
    assert (volume.shape, str(volume.dtype)) == (shape, dtype)
    voxels = whole(path)
    if total is None:
        axes = tifffile.imread(path, squeeze=True)
        moved = np.moveaxis(axes, -1, 0) if axes.shape[-1] == shape[0] > 1 else axes
        np.testing.assert_array_equal(voxels, moved.reshape(shape))
    else:
        assert voxels.sum() == pytest.approx(total, rel=1e-5)


def test_real_levels_and_sizes(shared_data):
    formats = shared_data / "formats"
    for version in ("0.4", "0.5"):
        path = formats / f"ome_zarr/simple_{version}_ngff-zarr"
        assert [whole(path, level=level).sum() for level in range(3)] == [4950, 1085, 94]
        assert open_volume(path, level=2).voxel_size == pytest.approx((1.0, 0.016, 0.12))
    grid = formats / "tiff_imagej/DeconvolutionSampleVerticalGrid1AU-crop.tif"
    assert open_volume(grid).voxel_size == pytest.approx((0.125, 0.0219647, 0.0219647))


def test_the_volume_of_isbi2012(shared_data):
    path = shared_data / "isbi2012/train-volume.tif"
    volume = open_volume(path)
    want = tifffile.imread(path)
    assert volume.shape == (1, *want.shape)
    box = Box((3, 100, 200), (7, 356, 456))
    np.testing.assert_array_equal(volume.read(box)[0], want[box.slices])


# Properties of every volume -------------------------------------------------------------------


def make_volumes(folder):
    """One volume of every class: mapped, decoded, single image, slices, Zarr."""
    write_tiff(folder / "mapped.tif", "RGB stack")
    write_tiff(folder / "decoded.tif", "tiles, zstd")
    save_png(folder / "image.png", noise((33, 47)))
    (folder / "slices").mkdir()
    for z in range(20):
        save_png(folder / f"slices/a_rather_long_name_of_a_slice_{z}.png", noise((33, 47), seed=z))
    write_ome_zarr(folder / "image.zarr", [noise((2, 5, 32, 40))], "0.5")
    names = ("mapped.tif", "decoded.tif", "image.png", "slices", "image.zarr")
    return [open_volume(folder / name) for name in names]


def test_a_volume_is_pickled_as_its_description(tmp_path):
    for volume in make_volumes(tmp_path):
        sent = pickle.dumps(volume)
        copy = pickle.loads(sent)
        assert len(sent) < 2000
        assert (copy.path, copy.shape, copy.dtype, copy.chunk, copy.voxel_size) == (
            *(volume.path, volume.shape, volume.dtype, volume.chunk, volume.voxel_size),
        )
        box = Box((0, 2, 3), (volume.shape[1], 30, 31))
        np.testing.assert_array_equal(copy.read(box), volume.read(box))
        assert len(pickle.dumps(copy)) == len(sent)


def test_a_copy_notices_another_image_at_its_path(tmp_path):
    path = tmp_path / "i.tif"
    write_tiff(path, "stack")
    sent = pickle.dumps(open_volume(path))
    write_tiff(path, "strips, deflate")
    with pytest.raises(RunError, match=r"i\.tif has changed since it was opened: it was \(1, 5, "):
        pickle.loads(sent).read(Box((0, 0, 0), (1, 1, 1)))
    path.unlink()
    with pytest.raises(RunError, match=r"i\.tif does not exist any more"):
        pickle.loads(sent).read(Box((0, 0, 0), (1, 1, 1)))


def test_many_threads_read_at_once(tmp_path):
    random = np.random.default_rng(0)
    with ThreadPoolExecutor(8) as pool:
        for volume in make_volumes(tmp_path):
            want = volume.read(Box.of(volume.shape[1:]))
            ends = np.sort(random.integers(0, np.add(volume.shape[1:], 1), (60, 2, 3)), axis=1)
            requests = [Box(tuple(start), tuple(stop)) for start, stop in ends.tolist()]
            copy = pickle.loads(pickle.dumps(volume))
            for box, voxels in zip(requests, pool.map(copy.read, requests), strict=True):
                np.testing.assert_array_equal(voxels, want[:, *box.slices])


def test_every_read_returns_a_new_array(tmp_path):
    for volume in make_volumes(tmp_path):
        box = Box.of(volume.shape[1:])
        first = volume.read(box)
        before = first.copy()
        if first.flags.writeable:
            first[:] = 0
        np.testing.assert_array_equal(volume.read(box), before)


def test_a_box_outside_the_volume_is_a_value_error(tmp_path):
    for volume in make_volumes(tmp_path):
        with pytest.raises(ValueError, match="Box -1:1,0:1,0:1 extends beyond"):
            volume.read(Box((-1, 0, 0), (1, 1, 1)))
        with pytest.raises(ValueError, match="extends beyond"):
            volume.read(Box.of(volume.shape[1:]).grow((0, 0, 0), (0, 0, 1)))


def test_identity_is_stable_and_describes_the_input(tmp_path):
    for volume in make_volumes(tmp_path):
        first = volume.identity()
        assert first == volume.identity() == pickle.loads(pickle.dumps(volume)).identity()
        assert json.loads(json.dumps(first)) == first
        assert first["name"] == os.path.basename(volume.path)
        assert (tuple(first["shape"]), first["dtype"]) == (volume.shape, str(volume.dtype))
        assert volume.kind == first["kind"] in repr(volume)
        assert str(tmp_path) not in json.dumps(first)
        assert first["modified_ns"] > 0


def test_identity_changes_with_the_content_of_a_file(tmp_path):
    path = tmp_path / "i.tif"
    write_tiff(path, "stack")
    before = open_volume(path).identity()
    assert before["bytes"] == path.stat().st_size
    assert before["modified_ns"] == path.stat().st_mtime_ns
    stored = bytearray(path.read_bytes())
    stored[-2000] ^= 1
    path.write_bytes(stored)
    after = open_volume(path).identity()
    assert after["sampled_sha256"] != before["sampled_sha256"]
    assert after["bytes"] == before["bytes"]


def test_identity_reads_at_most_16_mebibytes(tmp_path):
    zarr.create_array(
        tmp_path / "a.zarr", shape=(40, 2048, 2048), chunks=(8, 1024, 1024), dtype="uint16"
    )
    volume = open_volume(tmp_path / "a.zarr")
    read, boxes_read = volume.read, []
    volume.read = lambda box: boxes_read.append(box) or read(box)
    volume.identity()
    assert len(set(boxes_read)) == len(boxes_read) == 16
    assert max(box.size for box in boxes_read) * 2 == 2**20
    assert {box.start[0] for box in boxes_read} == {0, 8, 16, 24, 32}


def test_identity_does_not_depend_on_the_byte_order(tmp_path):
    want = noise((5, 33, 47), "uint16")
    for order in "<>":
        tifffile.imwrite(tmp_path / f"{order}.tif", want.astype(f"{order}u2"))
    hashes = {open_volume(tmp_path / f"{o}.tif").identity()["sampled_sha256"] for o in "<>"}
    assert len(hashes) == 1


# Bad input ------------------------------------------------------------------------------------


def test_paths_that_cannot_be_opened_are_refused(tmp_path, monkeypatch):
    (tmp_path / "train-volume.tif").write_bytes(b"")
    with pytest.raises(InputError, match=r"does not exist \(did you mean 'train-volume.tif'\?\)"):
        open_volume(tmp_path / "train-volumes.tif")
    with pytest.raises(InputError, match=r"train-volume\.tif is empty"):
        open_volume(tmp_path / "train-volume.tif")
    with pytest.raises(InputError, match="cannot be read: Not a directory"):
        open_volume(tmp_path / "train-volume.tif/0")
    with pytest.raises(InputError, match="does not exist"):
        open_volume(tmp_path / "nowhere/0")
    with pytest.raises(InputError, match=r"https:// is not a supported object store"):
        open_volume("https://server/volume.zarr")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none contains no TIFF or PNG slices and no Zarr"):
        open_volume(tmp_path / "none")


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    write_tiff(tmp_path / "i.tif", "plane")
    monkeypatch.chdir(tmp_path)
    assert open_volume("i.tif").path == str(tmp_path / "i.tif")


@pytest.mark.parametrize("name", ["i.tif", "folder"])
def test_a_path_without_permission(tmp_path, monkeypatch, name):
    def deny(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    write_tiff(tmp_path / "i.tif", "plane")
    (tmp_path / "folder").mkdir()
    for module in (image_files, tiff_module):
        monkeypatch.setattr(module, "open", deny, raising=False)
    monkeypatch.setattr(os, "listdir", deny)
    with pytest.raises(InputError, match=rf"{name} cannot be read: Permission denied"):
        open_volume(tmp_path / name)
    monkeypatch.delattr(image_files, "open")
    with pytest.raises(InputError, match=rf"{name} cannot be read: Permission denied"):
        open_volume(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89HDF\r\n", r"not TIFF, PNG or Zarr: it starts with b'\\x89HDF': an HDF5 file"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"\xff\xd8\xff\xe0rest", "a JPEG image"),
        (b"hello world", r"it starts with b'hell'\.$"),
    ],
)
def test_files_of_other_formats_are_named(tmp_path, content, message):
    (tmp_path / "i.tif").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_volume(tmp_path / "i.tif")


def test_voxels_that_are_not_grey_values_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "i.tif", np.zeros((13, 17), "complex64"))
    with pytest.raises(InputError, match=r"i\.tif has complex64 voxels: use integers or floats"):
        open_volume(tmp_path / "i.tif")
    write_zarr(tmp_path / "a.zarr", np.zeros((13, 17), "complex128"))
    with pytest.raises(InputError, match=r"a\.zarr has complex128 voxels"):
        open_volume(tmp_path / "a.zarr")


def test_empty_arrays_are_refused(tmp_path, caplog):
    write_zarr(tmp_path / "a.zarr", np.zeros((0, 13, 17), "uint8"))
    with pytest.raises(InputError, match=r"a\.zarr is empty: .* \(1, 0, 13, 17\)"):
        open_volume(tmp_path / "a.zarr")
    with pytest.warns(UserWarning, match="zero-size"):
        tifffile.imwrite(tmp_path / "i.tif", np.zeros((0, 13, 17), "uint8"))
    with pytest.raises(InputError, match=r"i\.tif"):
        open_volume(tmp_path / "i.tif")


def test_exchanging_two_slices_changes_the_identity(tmp_path):
    for number in range(40):
        tifffile.imwrite(tmp_path / f"{number}.tif", np.full((8, 8), number, np.uint8))
    before = open_volume(tmp_path).identity()
    for old, new in (("5", "x"), ("6", "5"), ("x", "6")):
        (tmp_path / f"{old}.tif").rename(tmp_path / f"{new}.tif")
    assert open_volume(tmp_path).identity() != before
