"""Seams of labels without truth: how often objects end at tile planes, and at planes inside tiles.

Knows pairs of voxels across planes, and the noise of their counts. Does not know who made the
labels.

Two voxels that touch across a plane are a pair if at least one of them is labelled; an object ends
there if their labels differ. Labels without seams end equally often at every plane, so the ratio of
the two rates is 1. Objects cut at tile planes raise it; objects merged there lower it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from unet_ray.errors import InputError
from unet_ray.storage.layout import ARRAYS, INSTANCES
from unet_ray.storage.places import PathOrUrl, Place, place_of
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.opening import open_volume
from unet_ray.volumes.volume import Volume

# Distances of control planes from their tile plane, the largest first. Nearby planes cut the same
# objects, which halves the noise of planes at 1/4, 1/2 and 3/4 of a tile. Multiples of 4 also suit
# labels that were enlarged 2 or 4 times.
CONTROLS = 8, 4
WINDOW = 512  # largest side of a window, in voxels
PAIRS = 1 << 28  # pairs to read at the tile planes of an axis; of more, a random sample
# An axis on which more pairs end is left out of the total. Labels of single slices are an example:
# all objects end at every plane along z, so none can be cut.
SHOWING = 0.9
# Windows are made smaller, to at least 64 voxels, where an axis has fewer than 32. Their counts go
# into at most 256 groups for the standard error.
FEW_WINDOWS, SMALLEST_WINDOW, GROUPS = 32, 64, 256
# Ratios are seams if they exceed 1.02 by three standard errors: a normal variable stays below its
# mean plus three standard deviations with this probability.
TOLERANCE, CONFIDENCE = 0.02, 0.99865

Read = Callable[[Box], NDArray[Any]]
Counts = NDArray[np.int64]
Verdict = Literal["sound", "cut", "unknown"]


@dataclass(frozen=True)
class Error:
    """A standard error.

    Attributes:
        value: the error, 0 or more.
        freedom: its degrees of freedom.
    """

    value: float
    freedom: float

    @property
    def quantile(self) -> float:
        """Student's t that matches three standard deviations of a normal distribution."""
        return float(special.stdtrit(self.freedom, CONFIDENCE)) if self.freedom < 1e6 else 3.0


@dataclass(frozen=True)
class Rates:
    """Ends of objects at the tile planes of an axis, or of all axes, and at control planes.

    Attributes:
        planes: number of tile planes with pairs.
        pairs: pairs of voxels across the tile planes with at least one labelled voxel.
        ends: those of them with two different labels.
        control_rate: share of the pairs across control planes that are ends; of all axes, the mean
            of the axes, weighted by `pairs`. None without such pairs.
        error: standard error of `rate` - `control_rate`; None if fewer than two windows have pairs.
    """

    planes: int = 0
    pairs: int = 0
    ends: int = 0
    control_rate: float | None = None
    error: Error | None = None

    @property
    def rate(self) -> float | None:
        """Share of the pairs across tile planes that are ends, or None without pairs."""
        return self.ends / self.pairs if self.pairs else None

    @property
    def ratio(self) -> float | None:
        """Rate at tile planes / rate at control planes.

        It is None without pairs or if nothing ends, and infinite if only tile planes have ends.
        """
        if self.rate is None or self.control_rate is None or not (self.ends or self.control_rate):
            return None
        return self.rate / self.control_rate if self.control_rate else math.inf

    @property
    def ratio_error(self) -> float | None:
        """Standard error of `ratio`, or None if it is unknown."""
        if self.error is None or not self.control_rate:
            return None
        return self.error.value / self.control_rate

    @property
    def verdict(self) -> Verdict:
        """``cut`` if the ratio is more than three standard errors above 1.02.

        Three errors are those of a large sample; in a small one, Student's t takes their place. It
        is ``cut`` as well if no object crosses any tile plane, and too many cross control planes
        for a coincidence: objects on a lattice end at few planes, so that the error is large.
        """
        if self.rate is None or self.control_rate is None or self.error is None:
            return "unknown"
        if self.rate == 1 and self.control_rate <= SHOWING:
            coincidence: float = self.control_rate**self.planes
            if coincidence < 1 - CONFIDENCE:
                return "cut"
        bound = (1 + TOLERANCE) * self.control_rate + self.error.quantile * self.error.value
        return "cut" if self.rate > bound else "sound"

    def text(self) -> str:
        """The ratio and its standard error, such as ``1.00 ± 0.02``."""
        if self.ratio is None:
            return "–"  # noqa: RUF001, a dash as in tables
        error = "" if self.ratio_error is None else f" ± {self.ratio_error:.2f}"
        return f"{self.ratio:.2f}{error}"


@dataclass(frozen=True)
class Seams:
    """Result of `seams_of`.

    Attributes:
        axes: along z, y and x.
        total: of all axes together.
    """

    axes: tuple[Rates, Rates, Rates]
    total: Rates

    @property
    def verdict(self) -> Verdict:
        """``cut`` if the total or an axis is so; else the verdict on the total."""
        verdicts = [rates.verdict for rates in (self.total, *self.axes)]
        return "cut" if "cut" in verdicts else verdicts[0]

    @property
    def sound(self) -> bool:
        """Whether no seams were detected."""
        return self.verdict != "cut"

    def summary(self) -> str:
        """The ratio with its standard error, in total and along each axis with labels."""
        axes = zip("zyx", self.axes, strict=True)
        listed = [f"{axis} {rates.text()}" for axis, rates in axes if rates.planes]
        return f"{self.total.text()} ({', '.join(listed) or 'no tile planes with labels'})"

    def sentence(self) -> str:
        """The verdict in words."""
        return {
            "sound": "no seams detected: objects do not end more often at tile planes than inside "
            "tiles",
            "cut": "seams detected: objects end more often at tile planes than inside tiles",
            "unknown": "too few labelled voxels at tile planes to judge seams",
        }[self.verdict]

    def lines(self) -> list[str]:
        """One line for each axis, and one for all axes."""
        return [
            f"{name}: {rates.text()}{_counts_in_words(rates)}"
            for name, rates in zip(("z", "y", "x", "all"), (*self.axes, self.total), strict=True)
        ]


def _counts_in_words(rates: Rates) -> str:
    if rates.rate is None or rates.control_rate is None:
        return " (no tile planes with labels)"
    return (
        f" ({rates.planes} tile plane{'s' * (rates.planes > 1)}: {rates.rate:.2%} of {rates.pairs} "
        f"pairs end; inside tiles {rates.control_rate:.2%})"
    )


def seams_of(
    labels: Any,
    every: Sequence[int],
    computed: NDArray[np.bool_] | None = None,
    most_pairs: int = PAIRS,
) -> Seams:
    """Compares the ends of objects at tile planes with those at control planes beside them.

    Control planes are 4 and 8 voxels from each tile plane, on both sides; in tiles of at most 16
    voxels only 4, and of at most 8 voxels 1. An axis with tiles of 1 or 2 voxels has none and is
    left out. Windows of at most 512 x 512 voxels are read one at a time, 18 voxels deep.

    Args:
        labels: integers (z, y, x), 0 is background; a `Volume` of one channel, or an array that is
            sliced as in NumPy, such as a Zarr array.
        every: extents of a tile (z, y, x); tiles start at the origin.
        computed: which tiles count, bool, one per tile along z, y and x; all by default. A tile
            plane counts between two such tiles.
        most_pairs: of more pairs at the tile planes of an axis, a random sample of windows is read;
            it is the same on every call.

    Raises:
        InputError: if the labels are not integers (z, y, x), or `every` is not above zero.
        RunError: if a volume cannot be read.
    """
    shape, read = _opened(labels)
    if len(every) != 3 or min(every) < 1:
        raise InputError(f"every={tuple(every)} must be three numbers above zero (z, y, x).")
    axes = [_rates_along(axis, read, shape, every, computed, most_pairs) for axis in range(3)]
    return Seams((axes[0], axes[1], axes[2]), _together(axes))


def stored_seams(source: PathOrUrl, every: Sequence[int]) -> Seams:
    """The seams of stored labels of any format that `open_volume` reads.

    Args:
        source: path or URL of the labels; a 2-D image has one plane along z. Of an OME-Zarr group
            the finest level is read.
        every: extents of a tile (z, y, x).

    Raises:
        InputError: if the labels cannot be read, are no integers or have several channels, or if
            the volume contains no tile plane.
        RunError: if the labels are damaged.
    """
    folder = place_of(source)
    names = ("zarr.json", ".zgroup", ".zattrs")
    if any((folder / "labels" / name).is_file() for name in names):
        raise InputError(
            f"{folder}: is an image with labels; name the labels, as in {folder}/labels/NAME."
        )
    volume = open_volume(source)
    shape = volume.shape[1:]
    if all(n <= tile for n, tile in zip(shape, every, strict=True)):
        raise InputError(
            f"every={','.join(map(str, every))} leaves no tile plane in {volume.path}, which has "
            f"{' x '.join(map(str, shape))} voxels (z, y, x)."
        )
    return seams_of(volume, every)


def instance_seams(
    store: Place, plan: TilePlan, done: NDArray[np.bool_], most_pairs: int = PAIRS
) -> Seams:
    """The seams of the instances in a store of `segment`, which must be finished.

    Args:
        store: the store.
        plan: its tiles.
        done: which tiles are predicted, bool (tiles,); a mask may have skipped others.
        most_pairs: see `seams_of`.

    Raises:
        RunError: if a shard is damaged.
    """
    array = open_volume(store / ARRAYS[INSTANCES])
    return seams_of(array, plan.core, done.reshape(plan.counts), most_pairs)


def _opened(labels: Any) -> tuple[tuple[int, ...], Read]:
    """The shape (z, y, x) of labels, and a function that reads a box of them."""
    name = labels.path if isinstance(labels, Volume) else "the labels"
    if labels.dtype.kind not in "iub":
        raise InputError(
            f"{name}: has {labels.dtype} voxels, but labels are integers; 0 is background."
        )
    if isinstance(labels, Volume):
        if labels.shape[0] != 1:
            raise InputError(f"{name}: has {labels.shape[0]} channels, but labels have one.")
        return labels.shape[1:], lambda box: labels.read_with_retries(box)[0]
    if len(labels.shape) != 3:
        raise InputError(f"{name}: have {len(labels.shape)} axes, but must have three (z, y, x).")
    return tuple(labels.shape), lambda box: np.asarray(labels[box.slices])


def _rates_along(
    axis: int,
    read: Read,
    shape: Sequence[int],
    every: Sequence[int],
    computed: NDArray[np.bool_] | None,
    most_pairs: int,
) -> Rates:
    """Counts the pairs at all planes of one axis."""
    offsets = [0, *_controls(every[axis])]
    if len(offsets) == 1 or shape[axis] <= every[axis]:
        return Rates()
    windows = _Windows.of(axis, shape, every)
    numbers = windows.chosen(computed, most_pairs)
    groups = np.zeros((min(GROUPS, len(numbers)), 4), np.int64)
    by_plane: dict[int, Counts] = defaultdict(lambda: np.zeros((len(offsets), 2), np.int64))
    for turn, number in enumerate(numbers.tolist()):
        plane, window = windows.box(number)
        counts = _counted(axis, read, shape[axis], plane, offsets, window)
        by_plane[plane] += counts
        groups[turn * len(groups) // len(numbers)] += [*counts[0], *counts[1:].sum(0)]
    pairs, ends, control_pairs, control_ends = (int(n) for n in groups.sum(0))
    planes = sum(bool(counts[0, 0]) for counts in by_plane.values())
    if not control_pairs:
        return Rates(planes, pairs, ends)
    error = _error_between_windows(groups)
    between_planes = _error_between_planes(list(by_plane.values()))
    if error and between_planes:
        error = max(error, between_planes, key=lambda each: each.value * each.quantile)
    return Rates(planes, pairs, ends, control_ends / control_pairs, error)


def _controls(extent: int) -> list[int]:
    """Offsets of the control planes of a tile plane, for tiles of this extent."""
    distances = [n for n in CONTROLS if 2 * n < extent] or ([1] if extent > 2 else [])
    return [offset for n in distances for offset in (-n, n)]


@dataclass(frozen=True)
class _Windows:
    """The windows on the tile planes of an axis: each tile has equally many, numbered as in NumPy.

    Attributes:
        axis: 0, 1 or 2; its planes are between two tiles.
        shape: extents of the volume (z, y, x).
        every: extents of a tile.
        side: extent of a window along the two other axes.
    """

    axis: int
    shape: Sequence[int]
    every: Sequence[int]
    side: int = WINDOW

    @classmethod
    def of(cls, axis: int, shape: Sequence[int], every: Sequence[int]) -> _Windows:
        """Returns windows that are large, but enough for a standard error."""
        windows = cls(axis, shape, every)
        while math.prod(windows.grid) < FEW_WINDOWS and windows.side > SMALLEST_WINDOW:
            windows = cls(axis, shape, every, windows.side // 2)
        return windows

    @property
    def in_tile(self) -> list[int]:
        """Number of windows in a tile, along each axis."""
        return [1 if i == self.axis else -(-self.every[i] // self.side) for i in range(3)]

    @property
    def grid(self) -> list[int]:
        """Number of windows along each axis: of planes along that of the planes."""
        planes_or_tiles = [-(-n // m) for n, m in zip(self.shape, self.every, strict=True)]
        planes_or_tiles[self.axis] -= 1
        return [n * m for n, m in zip(planes_or_tiles, self.in_tile, strict=True)]

    def chosen(self, computed: NDArray[np.bool_] | None, most_pairs: int) -> NDArray[np.int64]:
        """Numbers of the windows between computed tiles, at most about `most_pairs` voxels."""
        across = {0, 1, 2} - {self.axis}
        area = math.prod(min(self.shape[i], self.every[i], self.side) for i in across)
        if computed is None:
            numbers, total = None, math.prod(self.grid)
        else:
            along = np.moveaxis(computed, self.axis, 0)
            both = np.moveaxis(along[:-1] & along[1:], 0, self.axis)
            for i, count in enumerate(self.in_tile):
                both = both.repeat(count, i)
            numbers = np.flatnonzero(both)
            total = len(numbers)
        most = max(1, most_pairs // area)
        if total <= most:
            return np.arange(total) if numbers is None else numbers
        random = np.sort(np.random.default_rng(0).choice(total, most, replace=False, shuffle=False))
        return random if numbers is None else numbers[random]

    def box(self, number: int) -> tuple[int, Box]:
        """Position of the plane of a window, and the window, which is empty beyond the volume.

        The voxels before and behind a plane at position n have the indices n - 1 and n.
        """
        place = [int(i) for i in np.unravel_index(number, self.grid)]
        start, stop = [0] * 3, [1] * 3
        for i in {0, 1, 2} - {self.axis}:
            tile, window = divmod(place[i], self.in_tile[i])
            end = min((tile + 1) * self.every[i], self.shape[i])
            start[i] = min(tile * self.every[i] + window * self.side, end)
            stop[i] = min(start[i] + self.side, end)
        return (place[self.axis] + 1) * self.every[self.axis], Box(tuple(start), tuple(stop))


def _counted(
    axis: int, read: Read, extent: int, plane: int, offsets: Sequence[int], window: Box
) -> Counts:
    """Pairs and ends in a window at the planes at `plane` + each offset, shape (offsets, 2).

    Planes beyond the volume have no pairs.
    """
    counts = np.zeros((len(offsets), 2), np.int64)
    if not window.size:
        return counts
    low, high = plane + min(offsets) - 1, min(plane + max(offsets) + 1, extent)
    start, stop = list(window.start), list(window.stop)
    start[axis], stop[axis] = low, high
    slab = np.moveaxis(read(Box(tuple(start), tuple(stop))), axis, 0)
    for row, offset in enumerate(offsets):
        i = plane + offset - low
        if i < len(slab):
            before, behind = slab[i - 1], slab[i]
            pairs = np.count_nonzero((before != 0) | (behind != 0))
            counts[row] = pairs, np.count_nonzero(before != behind)
    return counts


def _error_between_windows(groups: Counts) -> Error | None:
    """Standard error of the difference of the rates, by the jackknife over groups of windows.

    Args:
        groups: pairs and ends at tile planes, pairs and ends at control planes, shape (groups, 4).
    """
    groups = groups[groups.any(1)]
    rest = groups.sum(0) - groups  # the sums without each group
    rest = rest[(rest[:, 0] > 0) & (rest[:, 2] > 0)]
    if len(rest) < 2:
        return None
    differences = rest[:, 1] / rest[:, 0] - rest[:, 3] / rest[:, 2]
    return Error(float(np.sqrt((len(rest) - 1) * differences.var())), len(rest) - 1)


def _error_between_planes(planes: Sequence[Counts]) -> Error | None:
    """Standard error of the difference of the rates, from the scatter of the control planes.

    It is the larger one where whole planes differ, as where a section of tissue is shifted.

    Args:
        planes: for each tile plane, pairs and ends at it and at its control planes.
    """
    squares, freedom, controls = 0.0, 0, 0
    for counts in planes:
        pairs, ends = counts[1:][counts[1:, 0] > 0].T
        if len(pairs) > 1:
            squares += float(np.square(ends - pairs * (ends.sum() / pairs.sum())).sum())
            freedom += len(pairs) - 1
            controls += len(pairs)
    total = np.sum(planes, 0)
    tile_pairs, control_pairs = int(total[0, 0]), int(total[1:, 0].sum())
    if not freedom or not tile_pairs:
        return None
    variance = squares / freedom * (len(planes) + controls * (tile_pairs / control_pairs) ** 2)
    return Error(math.sqrt(variance) / tile_pairs, freedom)


def _together(axes: Sequence[Rates]) -> Rates:
    """All axes, each compared with its own control planes, without those that show nothing."""
    compared = [a for a in axes if a.control_rate is not None and a.control_rate <= SHOWING]
    pairs = sum(a.pairs for a in compared)
    if not pairs:
        return Rates()
    expected = sum(a.pairs * (a.control_rate or 0.0) for a in compared)
    weighted = [(a.pairs / pairs, a.error) for a in compared]
    known = [(weight * e.value, e.freedom) for weight, e in weighted if e is not None]
    error = _sum_of(known) if len(known) == len(weighted) else None
    planes, ends = sum(a.planes for a in compared), sum(a.ends for a in compared)
    return Rates(planes, pairs, ends, expected / pairs, error)


def _sum_of(errors: Sequence[tuple[float, float]]) -> Error:
    """Standard error of a sum; its degrees of freedom after Welch and Satterthwaite."""
    variance = sum(value**2 for value, _ in errors)
    fourth = sum(value**4 / freedom for value, freedom in errors)
    return Error(math.sqrt(variance), variance**2 / fourth if fourth else math.inf)
