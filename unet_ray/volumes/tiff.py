"""The first image of a TIFF file as numbered planes, read by windows.

Knows tags, strips and tiles, and whether all that a file declares is really in it; does not know
which axis is depth, time or channel: it hands on the letters that tifffile gives the axes.
"""

from __future__ import annotations

import contextlib
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

from unet_ray.errors import InputError, RunError

_METRES = {
    1e6: "m meter metre",
    1e4: "cm centimeter centimetre",
    1e3: "mm millimeter millimetre",
    1.0: "um \u00b5m \u03bcm \\u00b5m micron microns micrometer micrometre",
    1e-3: "nm nanometer nanometre",
    1e-4: "\u00e5 angstrom",
    25400.0: "in inch",
}
MICROMETRES = {name: size for size, names in _METRES.items() for name in names.split()}
"""Micrometres in one unit of length, by its name in lower case."""

Sizes = tuple[float | None, float | None, float | None]
"""Size of a voxel along z, y, x in micrometre; None where the file does not say."""

_TYPE_BYTES = np.zeros(256, np.int64)
_TYPE_BYTES[1:19] = 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8  # TIFF 6.0, BigTIFF
_SUB_DIRECTORIES = 330
# Sizes of a decoded strip or tile that its decoder holds at the peak, measured with imagecodecs and
# without; of others two: it and a copy, for its pieces, byte order or predictor. PackBits is
# decoded to a list of numbers, JPEG 2000 to wide integers, and WebP with an opacity.
_COPIES = {32773: 9, **dict.fromkeys((33003, 33004, 33005, 34712), 7), 50001: 3}
# Opening a file takes at most this many times the bytes of what is read from it: tables of strips
# or tiles, descriptions (OME metadata among them), and a part of each directory.
_MARGIN = 14
_DIRECTORY_BYTES = 64  # the part of a directory that stays in memory
_TABLES = 273, 279, 324, 325  # where strips or tiles start, and how many bytes they have
_DESCRIPTIONS = 270, 50839  # of the image; and of ImageJ
_X_RESOLUTION, _Y_RESOLUTION = 282, 283


@dataclass(frozen=True, eq=False)
class TiffImage:
    """The first image, at full resolution, of one TIFF file.

    A plane is numbered by its position along all axes but Y and X, in C order.
    """

    path: str
    axes: str
    """One letter per axis, as tifffile names them, such as ``TZCYXS`` or ``QYX``."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """Of what `read` returns: native byte order, bits as uint8."""
    sizes: Sizes
    channel_names: tuple[str, ...]
    """As the OME metadata have them; may be fewer than there are channels."""
    segment: tuple[int, int, int]
    """Planes, rows and columns of one strip or tile."""
    planes: _Mapped | _Decoded
    overhead: int
    """Bytes at most that `read` holds beside what it gives."""
    index_bytes: int
    """Bytes at most that opening takes, for pages, strips or tiles and metadata."""

    def read(self, numbers: NDArray[np.int64], rows: slice, columns: slice) -> NDArray[Any]:
        """One window of several planes, shape ``(*numbers.shape, rows, columns)``, a fresh array.

        Safe from several threads at once.

        Raises:
            RunError: if stored bytes cannot be decoded, or are gone since the file was opened.
        """
        window = rows.stop - rows.start, columns.stop - columns.start
        out = np.empty((numbers.size, *window), self.dtype)
        try:
            self.planes.copy(numbers.ravel().tolist(), rows, columns, out)
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {reason(error)}.") from error
        return out.reshape(*numbers.shape, *window)


def open_tiff(path: str, *, quiet: bool = False) -> TiffImage:
    """Opens the first image of a TIFF file after a check that all it declares is there.

    Args:
        path: the file.
        quiet: drop what tifffile logs about oddities that do no harm, as for a file that was
            opened before. Whatever does harm is told by the error alone.

    Raises:
        InputError: if the file is truncated, damaged, or holds what cannot be read.
    """
    with _log_of_this_thread() as records:
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as file:
                listed = _Directories(path, file, size).check()
            with tifffile.TiffFile(path) as tif:
                image = _load(path, tif, size, listed)
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{path} cannot be read: {reason(error)}.") from error
        except Exception as error:  # a parser of arbitrary bytes may fail in any way
            raise InputError(f"{path} cannot be read as a TIFF file: {reason(error)}.") from error
    for record in () if quiet else records:
        logging.getLogger(record.name).handle(record)
    return image


def reason(error: Exception) -> str:
    """What a library says went wrong, as the end of a sentence."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = repr(error) if isinstance(error, LookupError) else text  # else no more than a key
    return (text.splitlines() or [type(error).__name__])[0].rstrip(". ")


@contextlib.contextmanager
def _log_of_this_thread() -> Iterator[list[logging.LogRecord]]:
    """Holds back what tifffile logs in this thread, so that a failure is told once."""
    records: list[logging.LogRecord] = []
    me = threading.get_ident()

    def pass_on(record: logging.LogRecord) -> bool:
        if record.thread == me:
            records.append(record)
        return record.thread != me

    logger = logging.getLogger("tifffile")
    logger.addFilter(pass_on)
    try:
        yield records
    finally:
        logger.removeFilter(pass_on)


class _Directories:
    """The directories of a TIFF file, followed to the end of their chain.

    tifffile stops at the first broken link and hands out the pages before it with no error.
    """

    def __init__(self, path: str, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        header = self._bytes(0, 8)
        self.order: Literal["<", ">"] = "<" if header[:2] == b"II" else ">"
        big = header[2:4] in (b"\x2b\0", b"\0\x2b")
        self.link, self.count, self.start = ("u8", 8, 8) if big else ("u4", 2, 4)
        self.room = 8 if big else 4  # a longer value stands elsewhere in the file
        fields = [("tag", "u2"), ("type", "u2"), ("count", self.link), ("value", self.link)]
        self.entry = np.dtype(fields).newbyteorder(self.order)
        self.listed = 0

    def check(self) -> int:
        """Refuses links, tag values and sub-directories beyond the end of the file.

        Returns:
            Bytes of all directories as they are counted for memory; see `_MARGIN`.
        """
        seen: set[int] = set()
        offset = self._number(self.start, self.room)
        while offset:
            if offset in seen:
                raise InputError(f"{self.path} is damaged: its directories run in a circle.")
            seen.add(offset)
            tags, end = self._directory(offset)
            for below in self._below(tags):
                self._directory(below)
            offset = self._number(end, self.room)
        return self.listed

    def _directory(self, offset: int) -> tuple[NDArray[Any], int]:
        """The entries of one directory, and where they end."""
        entries, first = self._number(offset, self.count), offset + self.count
        length = entries * self.entry.itemsize
        tags = np.frombuffer(self._bytes(first, length), self.entry)
        lengths = _TYPE_BYTES[tags["type"] & 255] * tags["count"].astype(float)
        ends = np.where(lengths > self.room, tags["value"] + lengths, 0)
        if (ends > self.size).any():
            raise InputError(_cut(self.path, self.size, int(ends.max())))
        tables, texts = (np.isin(tags["tag"], each) for each in (_TABLES, _DESCRIPTIONS))
        # A number of a table takes eight bytes, however few it has in the file.
        self.listed += _DIRECTORY_BYTES + 8 * int(tags["count"][tables].sum())
        self.listed += int(lengths[texts].sum())
        return tags, first + length

    def _below(self, tags: NDArray[Any]) -> list[int]:
        """Offsets of the sub-directories (pyramid levels) that one directory names."""
        offsets: list[int] = []
        for i in np.flatnonzero(tags["tag"] == _SUB_DIRECTORIES):
            width = int(_TYPE_BYTES[tags["type"][i] & 255])
            length = width * int(tags["count"][i])
            data = tags["value"][i : i + 1].tobytes()
            if length > self.room:
                data = self._bytes(int(tags["value"][i]), length)
            offsets += np.frombuffer(data[:length], f"{self.order}u{width}").tolist()
        return [offset for offset in offsets if offset]

    def _number(self, offset: int, width: int) -> int:
        return int(np.frombuffer(self._bytes(offset, width), f"{self.order}u{width}")[0])

    def _bytes(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise InputError(_cut(self.path, self.size, offset + length))
        self.file.seek(offset)
        return self.file.read(length)


def _cut(path: str, size: int, needed: int) -> str:
    return (
        f"{path} is truncated: it ends at byte {size} and refers to bytes up to {needed} at "
        "least; copy or export it again."
    )


def _load(path: str, tif: Any, size: int, listed: int) -> TiffImage:
    """Describes the first series of an open file, once all of it is known to be there."""
    if not tif.series:
        raise InputError(f"{path} holds no image.")
    series = tif.series[0]
    page, axes, shape = series.keyframe, series.get_axes(False), tuple(series.get_shape(False))
    if page.dtype is None or 0 in shape:
        what = f"an empty image of shape {shape}" if page.dtype else "samples of an unknown type"
        raise InputError(f"{path} holds {what}.")
    image = shape[axes.find("Y") :][:2]
    if "YX" not in axes or axes.count("Y") > 1 or image != (page.imagelength, page.imagewidth):
        raise InputError(f"{path} has axes {axes} of extents {shape}: its pages must be (y, x).")
    _refuse_missing(path, tif, series)
    _refuse_codec(path, page)
    dtype = np.dtype(np.uint8) if series.dtype.kind == "b" else series.dtype.newbyteorder("=")
    sizes, names = _ome_metadata(tif) if series.kind == "ome" else (_sizes(tif), ())
    planes = _planes(path, tif, series, size)
    # Of mapped voxels any part can be had alone; a large strip would only look costly.
    mapped = 1, min(64, page.imagelength), page.imagewidth
    segment = mapped if isinstance(planes, _Mapped) else _segment(page)
    overhead = 0 if isinstance(planes, _Mapped) else _overhead(page, dtype, planes)
    index_bytes = _MARGIN * listed
    return TiffImage(path, axes, shape, dtype, sizes, names, segment, planes, overhead, index_bytes)


def _overhead(page: Any, dtype: np.dtype[Any], planes: _Decoded) -> int:
    """Bytes of a strip or tile as it is stored, and of all that decoding it makes."""
    decoded = planes.blank.size * dtype.itemsize
    return int(planes.counts.max()) + _COPIES.get(page.compression, 2) * decoded


def _segment(page: Any) -> tuple[int, int, int]:
    """Planes, rows and columns of one strip or tile of a page."""
    if page.is_tiled:
        return page.tiledepth, page.tilelength, page.tilewidth
    return 1, min(page.rowsperstrip, page.imagelength), page.imagewidth


def _refuse_missing(path: str, tif: Any, series: Any) -> None:
    """Refuses a file whose own description declares more planes than tifffile found."""
    if tif.is_ome and series.kind not in ("ome", "imagej"):
        raise InputError(f"{path} does not hold the images that its OME metadata describe.")
    if series.is_multifile:
        raise InputError(
            f"{path} belongs to an OME-TIFF of several files: convert it to a single file or to "
            "OME-Zarr."
        )
    plane = series.keyframe.imagelength * series.keyframe.imagewidth
    declared, found = 0, math.prod(series.get_shape(False)) // plane
    if tif.is_shaped:
        declared = math.prod(tif.shaped_metadata[0]["shape"]) // plane
    elif tif.is_imagej and series.kind != "ome":
        meta = tif.imagej_metadata
        counts = [int(meta.get(name, 1)) for name in ("frames", "slices", "channels")]
        declared = max(int(meta.get("images", 1)), math.prod(counts))
    if declared > found:
        raise InputError(
            f"{path} is truncated or damaged: it declares {declared} planes and holds {found}."
        )


def _refuse_codec(path: str, page: Any) -> None:
    """Refuses a compression that nothing installed here can undo."""
    try:
        tifffile.TIFF.DECOMPRESSORS[page.compression]
        tifffile.TIFF.UNPREDICTORS[page.predictor]
    except KeyError as error:
        why = str(error.args[0])
        remedy = "export it uncompressed or with deflate"
        if "imagecodecs" in why:
            remedy = "pip install 'unet-ray[tiff]'"
        raise InputError(f"{path} cannot be decompressed: {why}; {remedy}.") from error


def _sizes(tif: Any) -> Sizes:
    """Voxel size along z, y, x in micrometre, from what ImageJ or tifffile wrote.

    Resolution tags alone are not trusted: most say 72 dots per inch, of no microscope.
    """
    meta: dict[str, Any] = tif.imagej_metadata or (tif.shaped_metadata or ({},))[0]
    unit = MICROMETRES.get(str(meta.get("unit", "")).lower())
    if unit is None:
        return None, None, None
    tags = tif.pages.first.tags
    y, x = (tags.valueof(tag) or (0, 1) for tag in (_Y_RESOLUTION, _X_RESOLUTION))
    spacing = abs(float(meta.get("spacing", 0)))
    sizes = spacing, y[1] / y[0] if y[0] else 0, x[1] / x[0] if x[0] else 0
    z, y, x = (size * unit if size else None for size in sizes)
    return z, y, x


def _ome_metadata(tif: Any) -> tuple[Sizes, tuple[str, ...]]:
    """Voxel size along z, y, x in micrometre, and the names of the channels."""
    root = ElementTree.fromstring(tif.ome_metadata)
    pixels = next(element for element in root.iter() if element.tag.endswith("Pixels"))
    names = (part.get("Name", "") for part in pixels if part.tag.endswith("Channel"))
    sizes = []
    for axis in "ZYX":
        unit = MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "um").lower())
        size = float(pixels.get(f"PhysicalSize{axis}", 0))
        sizes.append(size * unit if size > 0 and unit else None)
    return (sizes[0], sizes[1], sizes[2]), tuple(names)


def _planes(path: str, tif: Any, series: Any, size: int) -> _Mapped | _Decoded:
    """Finds the stored bytes of every plane and refuses any beyond the end of the file."""
    page, dtype = series.keyframe, series.dtype.newbyteorder(tif.byteorder)
    count = math.prod(series.get_shape(False)) // math.prod(page.shaped)
    if series.dataoffset:  # one block of bytes; perhaps the first page alone has a directory
        starts = series.dataoffset + np.arange(count, dtype=np.int64) * page.nbytes
    else:
        pages = [page for page in series if page is not None]
        if len(pages) != count:
            raise InputError(f"{path} declares {count} planes and holds {len(pages)}.")
        if not (page.is_final and all(_is_one_block(page) for page in pages)):
            _refuse_lacking(path, page, pages, size)
            return _decoded(path, page, pages)
        starts = np.array([page.dataoffsets[0] for page in pages], np.int64)
    end = int(starts.max()) + page.nbytes
    if end > size:
        raise InputError(_cut(path, size, end))
    return _Mapped(path, dtype, page.shaped, starts)


def _is_one_block(page: Any) -> bool:
    """Whether an uncompressed page is there and its strips or tiles follow each other."""
    offsets, counts = np.asarray(page.dataoffsets), np.asarray(page.databytecounts)
    return bool(offsets[0] and (offsets[:-1] + counts[:-1] == offsets[1:]).all())


@dataclass(frozen=True, eq=False)
class _Mapped:
    """Planes stored as plain bytes: a window loads only the memory pages that it touches."""

    path: str
    dtype: np.dtype[Any]
    page: tuple[int, int, int, int, int]
    """Extents of one page: separate samples, depth, rows, columns, interleaved samples."""
    starts: NDArray[np.int64]
    """Byte at which each page starts."""

    def copy(self, numbers: Sequence[int], rows: slice, columns: slice, out: NDArray[Any]) -> None:
        """Fills `out`, shape (planes, rows, columns), with one window of the planes `numbers`.

        The file is mapped for this call alone, so that nothing stays loaded.
        """
        samples, depth, _, _, mixed = self.page
        data = np.memmap(self.path, np.uint8, "r")
        if data.size < self.starts.max() + math.prod(self.page) * self.dtype.itemsize:
            raise RunError(f"{self.path} has become shorter since it was opened.")
        for number, target in zip(numbers, out, strict=True):
            place = np.unravel_index(number, (self.starts.size, samples, depth, mixed))
            page, sample, plane, part = place
            image = np.ndarray(self.page, self.dtype, data, int(self.starts[page]))
            target[:] = image[sample, plane, rows, columns, part]


def _refuse_lacking(path: str, key: Any, pages: Sequence[Any], size: int) -> None:
    """Refuses pages that lack strips or tiles, or whose bytes lie beyond the end."""
    expected = math.prod(_grid(key))
    for number, page in enumerate(pages):
        if not len(page.dataoffsets) == len(page.databytecounts) == expected:
            raise InputError(
                f"{path} is damaged: page {number} lists {len(page.dataoffsets)} of its "
                f"{expected} strips or tiles."
            )
        ends = np.add(page.dataoffsets, page.databytecounts, dtype=np.int64)
        if ends.max() > size:
            raise InputError(_cut(path, size, int(ends.max())))


def _grid(page: Any) -> tuple[int, int, int, int]:
    """Segments of one page along separate samples, depth, rows and columns."""
    samples, *extents, _ = page.shaped
    d, h, w = (-(-n // m) for n, m in zip(extents, _segment(page), strict=True))
    return samples, d, h, w


def _decoded(path: str, key: Any, pages: Sequence[Any]) -> _Decoded:
    """What is kept of `pages`, which are laid out as `key` is.

    No page itself is: tifffile holds about 90 bytes for each strip or tile, and the whole file.
    """
    tables: dict[bytes | None, bytes | None] = {}
    places = np.empty((2, len(pages), math.prod(_grid(key))), np.int64)
    for place, page in zip(places.swapaxes(0, 1), pages, strict=True):
        place[:] = page.dataoffsets, page.databytecounts
    return _Decoded(
        path,
        key.shaped,
        _grid(key),
        np.broadcast_to(key.dtype.type(key.nodata), (*_segment(key), key.shaped[-1])),
        functools.partial(key.decode, jpegheader=key.jpegheader),
        [tables.setdefault(page.jpegtables, page.jpegtables) for page in pages],
        *places,
    )


@dataclass(frozen=True, eq=False)
class _Decoded:
    """Planes stored as strips or tiles that must be decoded, each once per window."""

    path: str
    page: tuple[int, int, int, int, int]
    """Extents of one page: separate samples, depth, rows, columns, interleaved samples."""
    grid: tuple[int, int, int, int]
    """Segments of one page along separate samples, depth, rows and columns."""
    blank: NDArray[Any]
    """What a strip or tile that is left out stands for, shape (depth, rows, columns, samples)."""
    decode: Callable[..., Any]
    """Of tifffile, which all pages share."""
    tables: list[bytes | None]
    """Of each page, for JPEG."""
    offsets: NDArray[np.int64]
    """Byte at which each strip or tile starts, shape (pages, segments)."""
    counts: NDArray[np.int64]
    """Bytes of each, of the same shape."""

    def copy(self, numbers: Sequence[int], rows: slice, columns: slice, out: NDArray[Any]) -> None:
        """Fills `out`, shape (planes, rows, columns), with one window of the planes `numbers`."""
        depth, high, wide, mixed = self.blank.shape
        samples, planes, *_ = self.page
        uses = defaultdict(list)  # which planes of `out` each segment is decoded for
        for target, number in zip(out, numbers, strict=True):
            place = np.unravel_index(number, (len(self.offsets), samples, planes, mixed))
            page, sample, plane, part = map(int, place)
            uses[page, sample, plane // depth].append((target, plane % depth, part))
        with open(self.path, "rb") as file:
            for (page, *at), targets in uses.items():
                for i in range(rows.start // high, -(-rows.stop // high)):
                    for j in range(columns.start // wide, -(-columns.stop // wide)):
                        index = int(np.ravel_multi_index((*at, i, j), self.grid))
                        tile = self._segment_at(file, page, index)
                        a, b = _overlap(rows, i * high, high)
                        c, d = _overlap(columns, j * wide, wide)
                        for target, plane, part in targets:
                            target[a, c] = tile[plane, b, d, part]
                        del tile  # or it stays while the next one is decoded

    def _segment_at(self, file: BinaryIO, page: int, index: int) -> NDArray[Any]:
        """One decoded strip or tile, shape (depth, rows, columns, interleaved samples)."""
        offset, count = int(self.offsets[page, index]), int(self.counts[page, index])
        if not (offset and count):  # a sparse file leaves out what is blank
            return self.blank
        file.seek(offset)
        data = file.read(count)
        try:
            tile: NDArray[Any] = self.decode(data, index, jpegtables=self.tables[page])[0]
        except Exception as error:  # every codec has errors of its own
            raise RunError(
                f"{self.path} cannot be decoded at page {page}, strip or tile {index}: "
                f"{reason(error)}."
            ) from error
        return tile


def _overlap(window: slice, start: int, length: int) -> tuple[slice, slice]:
    """What a window and the segment at `start` share, as seen from each."""
    low, high = max(window.start, start), min(window.stop, start + length)
    return slice(low - window.start, high - window.start), slice(low - start, high - start)
