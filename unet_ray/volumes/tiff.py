"""The first image of a TIFF file as numbered planes, read by windows.

Handles tags, strips and tiles, and checks that the file contains all data that it declares. Does
not interpret the axes: it returns their letters as tifffile assigns them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from unet_ray.errors import InputError, RunError, reason, refusing
from unet_ray.units import printable
from unet_ray.volumes.inflate import inflater_of
from unet_ray.volumes.omissions import PALETTE, Omission

_UNIT_NAMES = {
    1e6: "m meter metre",
    1e4: "cm centimeter centimetre",
    1e3: "mm millimeter millimetre",
    1.0: "um \u00b5m \u03bcm \\u00b5m micron microns micrometer micrometre",
    1e-3: "nm nanometer nanometre",
    1e-4: "\u00e5 angstrom",
    25400.0: "in inch",
}
MICROMETRES = {name: size for size, names in _UNIT_NAMES.items() for name in names.split()}
"""Length of each unit in micrometres, by its name in lower case."""

Sizes = tuple[float | None, float | None, float | None]
"""Size of a voxel along z, y, x in micrometres; None where the file does not state it."""

_TYPE_BYTES = np.zeros(256, np.int64)
_TYPE_BYTES[1:19] = 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8  # TIFF 6.0, BigTIFF
_SUB_DIRECTORIES = 330
# Peak memory of a decoder in multiples of the decoded strip or tile, by compression tag; measured
# with and without imagecodecs. Other decoders need 2: the result, and a copy to assemble it or to
# undo byte order or predictor. PackBits is decoded to a list of numbers, JPEG 2000 to wide
# integers, and WebP with an opacity channel.
_COPIES = {32773: 9, **dict.fromkeys((33003, 33004, 33005, 34712), 7), 50001: 3}
# Upper bound of the memory needed to open a file, in multiples of the bytes that are read from it:
# tables of strips or tiles, descriptions with OME metadata, and a part of each directory. tifffile
# and the XML parser need 2 to 11 (measured).
_MARGIN = 14
# Each byte with its bits in reverse order.
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_DIRECTORY_BYTES = 64  # the part of a directory that stays in memory
_TABLES = 273, 279, 324, 325  # tags of the offsets and byte counts of strips and tiles
_DESCRIPTIONS = 270, 50839  # tags of the description and of the metadata of ImageJ
_X_RESOLUTION, _Y_RESOLUTION = 282, 283


@dataclass(frozen=True, eq=False)
class TiffImage:
    """The first image, at full resolution, of one TIFF file.

    Planes are numbered in C order over all axes except Y and X.
    """

    path: str
    axes: str
    """One letter per axis, as tifffile assigns them, such as ``TZCYXS`` or ``QYX``."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """Data type of the result of `read`, in native byte order; bits are read as uint8."""
    sizes: Sizes
    channel_names: tuple[str, ...]
    """From the OME metadata; there may be fewer names than channels."""
    segment: tuple[int, int, int]
    """Planes, rows and columns of one strip or tile."""
    planes: _Mapped | _Decoded
    overhead: int
    """Upper bound of the bytes that `read` needs beyond its result."""
    index_bytes: int
    """Upper bound of the bytes needed to open the file, for its pages, tables and metadata."""
    omissions: tuple[Omission, ...]
    """Content of the file that is not read."""

    def read(self, numbers: NDArray[np.int64], rows: slice, columns: slice) -> NDArray[Any]:
        """Reads one window of several planes into a new array ``(*numbers.shape, rows, columns)``.

        Thread-safe.

        Raises:
            RunError: if the file cannot be read or decoded, or is shorter than when it was opened.
        """
        window = rows.stop - rows.start, columns.stop - columns.start
        out = np.empty((numbers.size, *window), self.dtype)
        try:
            self.planes.copy(numbers.ravel().tolist(), rows, columns, out)
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {reason(error)}.") from error
        return out.reshape(*numbers.shape, *window)


def open_tiff(path: str, *, quiet: bool = False) -> TiffImage:
    """Opens the first image of a TIFF file and checks that the file contains all declared data.

    Args:
        path: path of the file.
        quiet: whether to drop tifffile's warnings about a readable file, for example because they
            were logged when it was first opened. If the file is refused, they are always dropped.

    Raises:
        InputError: if the file is truncated, damaged or not supported.
    """
    with _log_of_this_thread() as records, refusing(path, "a TIFF file"):
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            directory_bytes = _Directories(path, file, size).check()
        with tifffile.TiffFile(path) as tif:
            image = _load(path, tif, size, directory_bytes)
    for record in () if quiet else records:
        record.msg, record.args = printable(record.getMessage()), None
        logging.getLogger(record.name).handle(record)
    return image


@contextlib.contextmanager
def _log_of_this_thread() -> Iterator[list[logging.LogRecord]]:
    """Collects tifffile's log records of this thread, so that no error is also logged."""
    records: list[logging.LogRecord] = []
    this_thread = threading.get_ident()

    def collect(record: logging.LogRecord) -> bool:
        if record.thread == this_thread:
            records.append(record)
        return record.thread != this_thread

    logger = logging.getLogger("tifffile")
    logger.addFilter(collect)
    try:
        yield records
    finally:
        logger.removeFilter(collect)


class _Directories:
    """The chain of directories of a TIFF file, followed to its end.

    tifffile stops at the first broken link and returns the pages before it without an error.
    """

    def __init__(self, path: str, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.bytes_read = 0  # at most those of the file, unless its directories overlap
        header = self._bytes(0, 8)
        self.order: Literal["<", ">"] = "<" if header[:2] == b"II" else ">"
        big = header[2:4] in (b"\x2b\0", b"\0\x2b")
        self.link, self.count_bytes, self.start = ("u8", 8, 8) if big else ("u4", 2, 4)
        self.value_bytes = 8 if big else 4  # an entry contains the offset of a longer value
        fields = [("tag", "u2"), ("type", "u2"), ("count", self.link), ("value", self.link)]
        self.entry = np.dtype(fields).newbyteorder(self.order)
        self.directory_bytes = 0  # total so far

    def check(self) -> int:
        """Refuses links, tag values and sub-directories beyond the end of the file.

        Returns:
            Bytes of all directories, their tables and descriptions, as `_MARGIN` counts them.
        """
        visited: set[int] = set()
        offset = self._number(self.start, self.value_bytes)
        while offset:
            if offset in visited:
                raise InputError(
                    f"{self.path} is damaged: its directories form a loop; export it again."
                )
            visited.add(offset)
            tags, end = self._directory(offset)
            for sub_directory in self._sub_directories(tags):
                self._directory(sub_directory)
            offset = self._number(end, self.value_bytes)
        return self.directory_bytes

    def _directory(self, offset: int) -> tuple[NDArray[Any], int]:
        """Returns the entries of one directory and the offset of their end."""
        entries, first = self._number(offset, self.count_bytes), offset + self.count_bytes
        length = entries * self.entry.itemsize
        tags = np.frombuffer(self._bytes(first, length), self.entry)
        lengths = _TYPE_BYTES[tags["type"] & 255] * tags["count"].astype(float)
        ends = np.where(lengths > self.value_bytes, tags["value"] + lengths, 0)
        _refuse_truncated(self.path, self.size, int(ends.max(initial=0)))
        tables, texts = (np.isin(tags["tag"], each) for each in (_TABLES, _DESCRIPTIONS))
        # In memory, each number of a table takes eight bytes, however few it has in the file.
        self.directory_bytes += _DIRECTORY_BYTES + 8 * int(tags["count"][tables].sum())
        self.directory_bytes += int(lengths[texts].sum())
        return tags, first + length

    def _sub_directories(self, tags: NDArray[Any]) -> list[int]:
        """Offsets of the sub-directories (pyramid levels) of one directory."""
        offsets: list[int] = []
        for i in np.flatnonzero(tags["tag"] == _SUB_DIRECTORIES):
            width = int(_TYPE_BYTES[tags["type"][i] & 255])
            length = width * int(tags["count"][i])
            data = tags["value"][i : i + 1].tobytes()
            if length > self.value_bytes:
                data = self._bytes(int(tags["value"][i]), length)
            offsets += np.frombuffer(data[:length], f"{self.order}u{width}").tolist()
        return [offset for offset in offsets if offset]

    def _number(self, offset: int, width: int) -> int:
        return int(np.frombuffer(self._bytes(offset, width), f"{self.order}u{width}")[0])

    def _bytes(self, offset: int, length: int) -> bytes:
        _refuse_truncated(self.path, self.size, offset + length)
        self.bytes_read += length
        if self.bytes_read > 2 * self.size:  # else a small file could take hours
            raise InputError(f"{self.path} is damaged: its directories overlap; export it again.")
        self.file.seek(offset)
        return self.file.read(length)


def _refuse_truncated(path: str, size: int, needed: int) -> None:
    """Refuses a file of `size` bytes that must have at least `needed` bytes."""
    if needed > size:
        raise InputError(
            f"{path} is truncated: it has {size} bytes and needs at least {needed}; copy or export "
            "it again."
        )


def _load(path: str, tif: Any, size: int, directory_bytes: int) -> TiffImage:
    """Describes the first series of an open file, after checking that it is complete."""
    if "<!ENTITY" in (tif.ome_metadata or ""):  # entities can grow without bound
        raise InputError(f"{path} has OME metadata with XML entities; export it again.")
    if not tif.series:
        raise InputError(f"{path} contains no image.")
    series = tif.series[0]
    page, axes, shape = series.keyframe, series.get_axes(False), tuple(series.get_shape(False))
    if page.dtype is None or 0 in shape:
        content = f"an empty image of shape {shape}" if page.dtype else "samples of unknown type"
        raise InputError(f"{path} contains {content}.")
    image = shape[axes.find("Y") :][:2]
    if "YX" not in axes or axes.count("Y") > 1 or image != (page.imagelength, page.imagewidth):
        raise InputError(f"{path} has axes {axes} of extents {shape}: its pages must be (y, x).")
    _refuse_missing_planes(path, tif, series)
    _refuse_codec(path, page)
    dtype = np.dtype(np.uint8) if series.dtype.kind == "b" else series.dtype.newbyteorder("=")
    sizes, names = _ome_metadata(tif) if series.kind == "ome" else (_sizes(tif), ())
    planes = _planes(path, tif, series, size)
    # Any part of a mapped plane can be read separately, so large strips must not seem costly.
    mapped = 1, min(64, page.imagelength), page.imagewidth
    segment = mapped if isinstance(planes, _Mapped) else _segment(page)
    overhead = 0 if isinstance(planes, _Mapped) else _overhead(page, dtype, planes)
    index_bytes = _MARGIN * directory_bytes
    return TiffImage(
        *(path, axes, shape, dtype, sizes, names, segment, planes, overhead, index_bytes),
        _omissions(tif, page),
    )


def _omissions(tif: Any, page: Any) -> tuple[Omission, ...]:
    """Further images, except thumbnails of lower resolution, and a palette."""
    images = 1 + sum(not series.keyframe.is_reduced for series in tif.series[1:])
    further = Omission(
        f"only the first of its {images} images is read",
        "save another one as a file of its own",
    )
    is_palette = page.photometric == tifffile.PHOTOMETRIC.PALETTE
    return (*([further] if images > 1 else []), *([PALETTE] if is_palette else []))


def _overhead(page: Any, dtype: np.dtype[Any], planes: _Decoded) -> int:
    """Bytes of the largest stored strip or tile, and of decoding it."""
    decoded = planes.blank.size * dtype.itemsize
    return int(planes.counts.max()) + _COPIES.get(page.compression, 2) * decoded


def _segment(page: Any) -> tuple[int, int, int]:
    """Planes, rows and columns of one strip or tile of a page."""
    if page.is_tiled:
        return page.tiledepth, page.tilelength, page.tilewidth
    return 1, min(page.rowsperstrip, page.imagelength), page.imagewidth


def _refuse_missing_planes(path: str, tif: Any, series: Any) -> None:
    """Refuses a file whose metadata declare more planes than it contains."""
    if tif.is_ome and series.kind not in ("ome", "imagej"):
        raise InputError(f"{path} does not contain the images that its OME metadata describe.")
    if series.is_multifile:
        raise InputError(
            f"{path} belongs to an OME-TIFF of several files: convert it to a single file or to "
            "OME-Zarr."
        )
    plane_size = series.keyframe.imagelength * series.keyframe.imagewidth
    declared, present = 0, math.prod(series.get_shape(False)) // plane_size
    if tif.is_shaped:
        declared = math.prod(tif.shaped_metadata[0]["shape"]) // plane_size
    elif tif.is_imagej and series.kind != "ome":
        meta = tif.imagej_metadata
        counts = [int(meta.get(name, 1)) for name in ("frames", "slices", "channels")]
        declared = max(int(meta.get("images", 1)), math.prod(counts))
    if declared > present:
        raise InputError(
            f"{path} is truncated or damaged: it declares {declared} planes and contains {present}."
        )


def _refuse_codec(path: str, page: Any) -> None:
    """Refuses a compression for which no decoder is installed."""
    try:
        tifffile.TIFF.DECOMPRESSORS[page.compression]
        tifffile.TIFF.UNPREDICTORS[page.predictor]
    except KeyError as error:
        cause = str(error.args[0])
        remedy = "export it uncompressed or with deflate"
        if "imagecodecs" in cause:
            remedy = "pip install 'unet-ray[tiff]'"
        raise InputError(f"{path} cannot be decompressed: {cause}; {remedy}.") from error


def _sizes(tif: Any) -> Sizes:
    """Voxel size along z, y, x in micrometres, from the metadata of ImageJ or tifffile.

    Resolution tags without a unit in these metadata are ignored: most are 72 dots per inch, a
    default of image editors.
    """
    meta: dict[str, Any] = tif.imagej_metadata or (tif.shaped_metadata or ({},))[0]
    unit = MICROMETRES.get(str(meta.get("unit", "")).lower())
    if unit is None:
        return None, None, None
    tags = tif.pages.first.tags
    y, x = (tags.valueof(tag) or (0, 1) for tag in (_Y_RESOLUTION, _X_RESOLUTION))
    sizes = meta.get("spacing", 0), y[1] / y[0] if y[0] else 0, x[1] / x[0] if x[0] else 0
    z, y, x = (positive_size(abs(float(size)), unit) for size in sizes)
    return z, y, x


def positive_size(size: float, unit: float | None) -> float | None:
    """Size in micrometres; None if its unit is unknown, or if it is not finite and above zero."""
    length = size * unit if unit else 0.0
    return length if 0 < length < math.inf else None


def _ome_metadata(tif: Any) -> tuple[Sizes, tuple[str, ...]]:
    """Voxel size along z, y, x in micrometres, and the names of the channels."""
    root = ElementTree.fromstring(tif.ome_metadata)
    pixels = next(element for element in root.iter() if element.tag.endswith("Pixels"))
    names = (part.get("Name", "") for part in pixels if part.tag.endswith("Channel"))
    sizes = []
    for axis in "ZYX":
        unit = MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "um").lower())
        sizes.append(positive_size(float(pixels.get(f"PhysicalSize{axis}", 0)), unit))
    return (sizes[0], sizes[1], sizes[2]), tuple(names)


def _planes(path: str, tif: Any, series: Any, size: int) -> _Mapped | _Decoded:
    """Locates the bytes of every plane and refuses any beyond the end of the file."""
    page, dtype = series.keyframe, series.dtype.newbyteorder(tif.byteorder)
    count = math.prod(series.get_shape(False)) // math.prod(page.shaped)
    if series.dataoffset:  # one block of bytes; the pages after the first may have no directory
        _refuse_truncated(path, size, series.dataoffset + count * page.nbytes)
        starts = series.dataoffset + np.arange(count, dtype=np.int64) * page.nbytes
    else:
        pages = [page for page in series if page is not None]
        if len(pages) != count:
            raise InputError(f"{path} declares {count} planes and contains {len(pages)}.")
        if not (page.is_final and all(_is_one_block(page) for page in pages)):
            _refuse_missing_segments(path, page, pages, size)
            return _decoded(path, page, pages)
        starts = np.array([page.dataoffsets[0] for page in pages], np.int64)
    _refuse_truncated(path, size, int(starts.max()) + page.nbytes)
    return _Mapped(path, dtype, page.shaped, starts)


def _is_one_block(page: Any) -> bool:
    """Whether the strips or tiles of an uncompressed page are stored and contiguous."""
    offsets, counts = np.asarray(page.dataoffsets), np.asarray(page.databytecounts)
    return bool(offsets[0] and (offsets[:-1] + counts[:-1] == offsets[1:]).all())


@dataclass(frozen=True, eq=False)
class _Mapped:
    """Planes of plain bytes, memory-mapped: a window loads only the pages that it touches."""

    path: str
    dtype: np.dtype[Any]
    page: tuple[int, int, int, int, int]
    """Extents of one page: separate samples, depth, rows, columns, interleaved samples."""
    starts: NDArray[np.int64]
    """Offset of each page in bytes."""

    def copy(self, numbers: Sequence[int], rows: slice, columns: slice, out: NDArray[Any]) -> None:
        """Fills `out`, shape (planes, rows, columns), with one window of the planes `numbers`.

        The file is mapped for this call only, so that no data stays in memory.
        """
        samples, depth, _, _, interleaved = self.page
        data = np.memmap(self.path, np.uint8, "r")
        if data.size < self.starts.max() + math.prod(self.page) * self.dtype.itemsize:
            raise RunError(f"{self.path} has become shorter since it was opened.")
        for number, target in zip(numbers, out, strict=True):
            index = np.unravel_index(number, (self.starts.size, samples, depth, interleaved))
            page, sample, plane, channel = index
            image = np.ndarray(self.page, self.dtype, data, int(self.starts[page]))
            target[:] = image[sample, plane, rows, columns, channel]


def _refuse_missing_segments(path: str, keyframe: Any, pages: Sequence[Any], size: int) -> None:
    """Refuses pages that lack strips or tiles, or have some beyond the end of the file."""
    expected = math.prod(_grid(keyframe))
    for number, page in enumerate(pages):
        if not len(page.dataoffsets) == len(page.databytecounts) == expected:
            raise InputError(
                f"{path} is damaged: page {number} lists {len(page.dataoffsets)} of its "
                f"{expected} strips or tiles."
            )
        ends = np.add(page.dataoffsets, page.databytecounts, dtype=np.int64)
        _refuse_truncated(path, size, int(ends.max()))


def _grid(page: Any) -> tuple[int, int, int, int]:
    """Segments of one page along separate samples, depth, rows and columns."""
    samples, *extents, _ = page.shaped
    d, h, w = (-(-n // m) for n, m in zip(extents, _segment(page), strict=True))
    return samples, d, h, w


def _decoded(path: str, keyframe: Any, pages: Sequence[Any]) -> _Decoded:
    """Extracts the data needed to decode `pages`, which have the same layout as `keyframe`.

    The pages themselves are not stored: tifffile needs about 90 bytes per strip or tile, and each
    page refers to the object of the whole file.
    """
    tables: dict[bytes | None, bytes | None] = {}  # stores equal JPEG tables once
    locations = np.empty((2, len(pages), math.prod(_grid(keyframe))), np.int64)
    for location, page in zip(locations.swapaxes(0, 1), pages, strict=True):
        location[:] = page.dataoffsets, page.databytecounts
    blank = np.broadcast_to(
        keyframe.dtype.type(keyframe.nodata), (*_segment(keyframe), keyframe.shaped[-1])
    )
    return _Decoded(
        path,
        keyframe.shaped,
        _grid(keyframe),
        blank,
        _decoder(keyframe, blank.nbytes),
        [tables.setdefault(page.jpegtables, page.jpegtables) for page in pages],
        *locations,
    )


def _decoder(page: Any, limit: int) -> Callable[..., Any]:
    """Returns tifffile's decoder of a page, whose strips and tiles have `limit` bytes at most."""
    inflate = inflater_of(page.compression)
    if not inflate:
        return functools.partial(page.decode, jpegheader=page.jpegheader)
    plain = copy.copy(page)  # the page as it would be without compression
    plain.compression, plain.fillorder = 1, 1
    for cached in ("decode", "hash"):
        vars(plain).pop(cached, None)
    unpack, backwards = plain.decode, page.fillorder == 2  # the bits of each byte, in reverse

    def decode(data: bytes, index: int, **_: Any) -> Any:
        return unpack(inflate(data.translate(_REVERSED) if backwards else data, limit), index)

    return decode


@dataclass(frozen=True, eq=False)
class _Decoded:
    """Planes stored as strips or tiles, each of which is decoded once per window."""

    path: str
    page: tuple[int, int, int, int, int]
    """Extents of one page: separate samples, depth, rows, columns, interleaved samples."""
    grid: tuple[int, int, int, int]
    """Segments of one page along separate samples, depth, rows and columns."""
    blank: NDArray[Any]
    """Content of a strip or tile that the file omits, shape (depth, rows, columns, samples)."""
    decode: Callable[..., Any]
    """Decoder of tifffile, shared by all pages."""
    tables: list[bytes | None]
    """JPEG tables of each page."""
    offsets: NDArray[np.int64]
    """Offset of each strip or tile in bytes, shape (pages, segments)."""
    counts: NDArray[np.int64]
    """Stored bytes of each strip or tile, shape (pages, segments)."""

    def copy(self, numbers: Sequence[int], rows: slice, columns: slice, out: NDArray[Any]) -> None:
        """Fills `out`, shape (planes, rows, columns), with one window of the planes `numbers`."""
        depth, height, width, interleaved = self.blank.shape
        samples, planes, *_ = self.page
        uses = defaultdict(list)  # the planes of `out` that need each segment
        for target, number in zip(out, numbers, strict=True):
            position = np.unravel_index(number, (len(self.offsets), samples, planes, interleaved))
            page, sample, plane, channel = map(int, position)
            uses[page, sample, plane // depth].append((target, plane % depth, channel))
        with open(self.path, "rb") as file:
            for (page, *slab), targets in uses.items():
                for i in range(rows.start // height, -(-rows.stop // height)):
                    for j in range(columns.start // width, -(-columns.stop // width)):
                        index = int(np.ravel_multi_index((*slab, i, j), self.grid))
                        segment = self._segment_at(file, page, index)
                        a, b = _overlap(rows, i * height, height)
                        c, d = _overlap(columns, j * width, width)
                        for target, plane, channel in targets:
                            target[a, c] = segment[plane, b, d, channel]
                        del segment  # frees its memory before the next one is decoded

    def _segment_at(self, file: BinaryIO, page: int, index: int) -> NDArray[Any]:
        """One decoded strip or tile, shape (depth, rows, columns, interleaved samples)."""
        offset, count = int(self.offsets[page, index]), int(self.counts[page, index])
        if not (offset and count):  # a sparse file omits blank strips and tiles
            return self.blank
        file.seek(offset)
        data = file.read(count)
        try:
            segment: NDArray[Any] = self.decode(data, index, jpegtables=self.tables[page])[0]
        except Exception as error:  # each codec raises its own errors
            raise RunError(
                f"{self.path} cannot be decoded at page {page}, strip or tile {index}: "
                f"{reason(error)}."
            ) from error
        return segment


def _overlap(window: slice, start: int, length: int) -> tuple[slice, slice]:
    """Overlap of a window and the segment at `start`, relative to the start of each."""
    low, high = max(window.start, start), min(window.stop, start + length)
    return slice(low - window.start, high - window.start), slice(low - start, high - start)
