"""Small charts as SVG text: curves, histograms, maps of tiles and colour bars.

Handles numbers, axes and colours. Independent of files and pages. A chart is one ``<svg>`` element
with a title and a description, without id, script or reference. It uses the text colour of the
page and its CSS variables ``--line-1`` to ``--line-6``, with defaults.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.report.pictures import OKABE_ITO, colour_map

Numbers = NDArray[np.float64]

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 26, 40
LETTER = 6.6  # mean width of a letter
# Lines differ in colour, dashes and marker. Yellow and black are unreadable on white or on black.
COLOURS = tuple("#{:02x}{:02x}{:02x}".format(*OKABE_ITO[i]) for i in (5, 6, 3, 7, 1, 2))
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4")
MARKER_SHAPES = "●■▲◆▼○"
MARKED_POINTS = 40
# Limits of a logarithmic axis; values beyond are clipped.
LEAST, MOST = 1e-99, 1e99
LEVELS = 8
MAP_SIDE, CELL_SIDE, LABELLED_CELLS = 300.0, 44.0, 48


@dataclass(frozen=True)
class Axis:
    """One axis of a chart: maps numbers to positions in the drawing.

    Attributes:
        low, high: the numbers at its ends, `low` < `high`.
        start, stop: the positions of `low` and `high`, in units of the drawing.
        log: whether the scale is logarithmic.
        ticks: the labelled numbers, ascending, from `low` to `high`.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Numbers, start: float, stop: float, log: bool = False) -> Axis:
        """An axis over all finite `values`, only those above 0 if `log`; its ends are ticks."""
        shown = values[np.isfinite(values) & ((values > 0) | (not log))]
        shown = np.clip(shown, LEAST, MOST) if log else shown
        low, high = (float(shown.min()), float(shown.max())) if shown.size else (0.1, 1.0)
        ticks = _log_ticks(low, high) if log else _even_ticks(low, high)
        return cls(ticks[0], ticks[-1], start, stop, log, tuple(ticks))

    def place(self, values: Any) -> Numbers:
        """The positions of `values`; NaN for values without a logarithm on a logarithmic axis."""
        numbers = np.asarray(values, np.float64)
        low, high = self.low, self.high
        if self.log:
            numbers = np.log(np.where(numbers > 0, np.clip(numbers, LEAST, MOST), np.nan))
            low, high = math.log(low), math.log(high)
        place: Numbers = self.start + (numbers - low) / (high - low) * (self.stop - self.start)
        return place


def _even_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from at most `low` to at least `high`."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), LEAST):
        margin = abs(low) / 2 if abs(low) > LEAST else 1.0
        low, high = low - margin, high + margin
    decade = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(f * decade for f in (1, 2, 5, 10, 20) if (high - low) <= f * decade * most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the range; only powers over more than 3 decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    if last - first > 3:
        decades = math.ceil((last - first) / 6)
        return [10.0**k for k in range(first, last + decades, decades)]
    ticks = [f * 10.0**k for k in range(first, last + 1) for f in (1, 2, 5)]
    below = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    above = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[below : max(above, below + 1) + 1]


@dataclass(frozen=True)
class Series:
    """One line of a chart; values that are not finite leave gaps.

    Attributes:
        name: the label at the end of the line.
        x, y: the points, in the order of x.
        low, high: the range of the values behind each point, drawn as a band; None for no band.
    """

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


def binned_series(name: str, x: Any, y: Any, most: int = 200) -> Series:
    """A line of at most `most` points; each is the mean of neighbours, with their range."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(xs) <= most:
        return Series(name, xs, ys)
    starts = np.arange(0, len(xs), math.ceil(len(xs) / most))
    sizes = np.diff(np.append(starts, len(xs)))
    means = [np.add.reduceat(values, starts) / sizes for values in (xs, ys)]
    low, high = np.minimum.reduceat(ys, starts), np.maximum.reduceat(ys, starts)
    return Series(name, means[0], means[1], low, high)


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log: bool = False,
    mark: tuple[float, float, str] | None = None,
    names: bool = False,
) -> str:
    """Draws lines over one pair of axes; they differ in colour, dashes and markers.

    Args:
        title: the title of the chart.
        series: one to six lines.
        x_label: quantity and unit of the x axis.
        y_label: quantity and unit of the y axis.
        log: makes the y axis logarithmic; values of at most 0 are left out.
        mark: a point (x, y) to be ringed, and its text.
        names: writes the name of each line at its end.
    """
    longest = max(len(_shortened(s.name)) for s in series)
    right = RIGHT + LETTER * (2 + longest) * names
    heights = [v for s in series for v in (s.y, s.low, s.high) if v is not None]
    x = Axis.over(np.concatenate([s.x for s in series]), LEFT, WIDTH - right)
    y = Axis.over(np.concatenate(heights), HEIGHT - BOTTOM, TOP, log)
    parts = [_grid(x, y, x_label, y_label)]
    parts += [_line(s, i, x, y) for i, s in enumerate(series)]
    if names:
        parts.append(_names(series, x, y))
    if mark:
        parts.append(_ring(mark, x, y))
    points = sum(len(s.x) for s in series)
    text = f"{y_label} over {x_label}: {', '.join(s.name for s in series)}; points: {points}."
    return _svg(title, text, parts, HEIGHT)


def _svg(title: str, description: str, parts: Sequence[str], height: float) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {_n(height)}" role="img" '
        'xmlns="http://www.w3.org/2000/svg" font-size="12" fill="currentColor">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def number(value: float) -> str:
    """Formats a number with at most six digits and separated thousands."""
    return f"{value:,.6g}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _shortened(name: str, most: int = 16) -> str:
    """A name cut to fit beside a chart."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _text(x: float, y: float, text: str, anchor: str = "start", attributes: str = "") -> str:
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{attributes}>{escape(text)}</text>'


def _grid(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    """Ticks with their numbers, faint lines at the y ticks, and the labels of the axes."""
    parts = [_text(2, 13, y_label), _text((x.start + x.stop) / 2, HEIGHT - 5, x_label, "middle")]
    lines = []
    for tick, place in zip(y.ticks, y.place(y.ticks).tolist(), strict=True):
        parts.append(_text(x.start - 6, place + 4, number(tick), "end"))
        lines.append(f"M{_n(x.start)} {_n(place)}H{_n(x.stop)}")
    ends = []
    for tick, place in zip(x.ticks, x.place(x.ticks).tolist(), strict=True):
        text = number(tick)
        inside = min(place, WIDTH - 2 - LETTER * len(text) / 2)  # the last label must fit
        parts.append(_text(inside, y.start + 17, text, "middle"))
        ends.append(f"M{_n(place)} {_n(y.start)}v4")
    parts.append(f'<path d="{"".join(lines)}" stroke="currentColor" stroke-opacity=".18"/>')
    ends.append(f"M{_n(x.start)} {_n(y.start)}H{_n(x.stop)}")
    parts.append(f'<path d="{"".join(ends)}" stroke="currentColor"/>')
    return "".join(parts)


def _colour(index: int) -> str:
    return f"var(--line-{index % 6 + 1},{COLOURS[index % 6]})"


def _line(series: Series, index: int, x: Axis, y: Axis) -> str:
    """The band, the line and, if there are few points, their markers."""
    colour, across, up = _colour(index), x.place(series.x), y.place(series.y)
    parts = []
    if series.low is not None and series.high is not None:
        floor = np.where(np.isnan(y.place(series.low)), y.start, y.place(series.low))
        band = _path(np.append(across, across[::-1]), np.append(y.place(series.high), floor[::-1]))
        parts.append(f'<path d="{band}Z" style="fill:{colour}" fill-opacity=".25"/>')
    parts.append(
        f'<path class="line" d="{_path(across, up)}" fill="none" style="stroke:{colour}" '
        f'stroke-width="2" stroke-linejoin="round" stroke-dasharray="{DASHES[index % 6]}"/>'
    )
    if len(across) <= MARKED_POINTS:
        mark, style = MARKER_SHAPES[index % 6], f' font-size="9" style="fill:{colour}"'
        both = zip(across.tolist(), up.tolist(), strict=True)
        parts += [_text(a, b + 3, mark, "middle", style) for a, b in both if math.isfinite(b)]
    return "".join(parts)


def _path(across: Numbers, up: Numbers) -> str:
    """An SVG path through the points, with a gap at points that are not finite."""
    steps, pen = [], "M"
    for a, b in zip(across.tolist(), up.tolist(), strict=True):
        if math.isfinite(a) and math.isfinite(b):
            steps.append(f"{pen}{_n(a)} {_n(b)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(steps)


def _names(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Each name at the end of its line; names of nearby ends are moved apart."""
    ends = []
    for index, line in enumerate(series):
        finite = y.place(line.y)[np.isfinite(y.place(line.y))]
        ends.append((float(finite[-1]) if finite.size else y.start, index))
    parts, free = [], -math.inf
    for end, index in sorted(ends):
        free = max(end, free + 14)
        style = f' style="fill:{_colour(index)}"'
        parts.append((free, f"{MARKER_SHAPES[index % 6]} {_shortened(series[index].name)}", style))
    excess = max(0.0, free - y.start)
    return "".join(
        _text(x.stop + 5, at - excess + 4, text, attributes=style) for at, text, style in parts
    )


def _ring(mark: tuple[float, float, str], x: Axis, y: Axis) -> str:
    """A ring around a point, and its text at the top of the chart."""
    across, up = float(x.place(mark[0])), float(y.place(mark[1]))
    if not (math.isfinite(across) and math.isfinite(up)):
        return ""
    return (
        f'<circle cx="{_n(across)}" cy="{_n(up)}" r="6" fill="none" stroke="currentColor" '
        f'stroke-width="1.5"/>{_text(x.stop, 13, mark[2], "end")}'
    )


def histogram(title: str, edges: Any, heights: Any, x_label: str, y_label: str) -> str:
    """Draws bars from 0 to `heights` between `edges`, which has one more element."""
    sides, tops = np.asarray(edges, np.float64), np.asarray(heights, np.float64)
    x = Axis.over(sides, LEFT, WIDTH - RIGHT)
    y = Axis.over(np.append(tops, 0.0), HEIGHT - BOTTOM, TOP)
    places, up, ground = x.place(sides).tolist(), y.place(tops).tolist(), float(y.place(0))
    bars = [
        f"M{_n(a + 0.5)} {_n(ground)}V{_n(top)}H{_n(b - 0.5)}V{_n(ground)}Z"
        for (a, b), top in zip(pairwise(places), up, strict=True)
    ]
    path = f'<path class="bars" d="{"".join(bars)}" style="fill:{_colour(0)}"/>'
    text = f"{y_label} over {x_label}, {len(tops)} bars; the highest is {number(tops.max())}."
    return _svg(title, text, [path, _grid(x, y, x_label, y_label)], HEIGHT)


def cell_means(values: Numbers, most: Sequence[int]) -> Numbers:
    """Averages `values` over the cells of a coarser map, ignoring values that are not finite.

    Args:
        values: any number of axes.
        most: the largest number of cells along each axis.
    """
    total, count = np.where(np.isfinite(values), values, 0), np.isfinite(values).astype(np.float64)
    for axis, (extent, cells) in enumerate(zip(values.shape, most, strict=True)):
        starts = np.arange(min(extent, cells)) * extent // min(extent, cells)
        total = np.add.reduceat(total, starts, axis)
        count = np.add.reduceat(count, starts, axis)
    with np.errstate(invalid="ignore"):
        means: Numbers = total / count
        return means


def _levels(values: Numbers, low: float, high: float) -> NDArray[np.int64]:
    """The level of each value: its index among `LEVELS` equal parts of `low` to `high`."""
    share = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.clip(np.nan_to_num(share) * LEVELS, 0, LEVELS - 1).astype(np.int64)


def _shade(share: float) -> str:
    return "#{:02x}{:02x}{:02x}".format(
        *colour_map(np.array([[round(share * 255)]], np.uint8))[0, 0]
    )


@dataclass(frozen=True)
class _Lattice:
    """The positions of the cells of a map, from its corner and the size of a cell."""

    left: float
    top: float
    wide: float
    high: float

    def rectangles(self, where: NDArray[np.bool_]) -> str:
        """A path of the cells in `where` (rows, columns); neighbours in a row are merged."""
        paths = []
        for row, flags in enumerate(where):
            turns = np.flatnonzero(np.diff(np.concatenate(([0], flags, [0]))))
            for a, b in turns.reshape(-1, 2).tolist():
                corner = f"M{_n(self.left + a * self.wide)} {_n(self.top + row * self.high)}"
                width = (b - a) * self.wide
                paths.append(f"{corner}h{_n(width)}v{_n(self.high)}h{_n(-width)}z")
        return "".join(paths)

    def strokes(self, where: NDArray[np.bool_]) -> str:
        """A path of one diagonal through each of the cells in `where`."""
        stroke = f"l{_n(self.wide)} {_n(-self.high)}"
        corners = np.argwhere(where) * (self.high, self.wide) + (self.top + self.high, self.left)
        return "".join(f"M{_n(x)} {_n(y)}{stroke}" for y, x in corners.tolist())

    def label(self, row: int, column: int, text: str, colour: str) -> str:
        """A text at the centre of a cell."""
        x, y = self.left + (column + 0.5) * self.wide, self.top + (row + 0.5) * self.high
        return _text(x, y + 4, text, "middle", f' fill="{colour}"')


def tile_map(
    title: str,
    seconds: Numbers,
    done: Numbers,
    scale: tuple[float, float],
    axes: tuple[tuple[str, int], tuple[str, int]],
    aspect: float = 1.0,
) -> str:
    """Draws a map coloured by seconds, in steps of viridis; unfinished cells are struck out.

    Args:
        title: the title of the map.
        seconds: (rows, columns); NaN if unknown, which is drawn in grey if the cell is done.
        done: fraction of each cell that is done, 0 to 1.
        scale: the seconds of the darkest and of the lightest colour.
        axes: name and extent in voxels of rows and columns, such as ``("y", 512), ("x", 640)``.
        aspect: height of a cell relative to its width.
    """
    (rows, columns), (down, across) = seconds.shape, axes
    wide = min(CELL_SIDE, MAP_SIDE / columns, MAP_SIDE / (rows * aspect))
    cells = _Lattice(LEFT, TOP, wide, wide * aspect)
    timed, levels = np.isfinite(seconds) & (done > 0), _levels(seconds, *scale)
    parts = [f'<path d="{cells.rectangles((done > 0) & ~timed)}" fill-opacity=".3"/>']
    for level in range(LEVELS):
        path = cells.rectangles(timed & (levels == level))
        parts.append(f'<path d="{path}" fill="{_shade(level / (LEVELS - 1))}"/>' * bool(path))
    outline = f"M{LEFT} {TOP}h{_n(wide * columns)}v{_n(cells.high * rows)}H{LEFT}z"
    parts.append(
        f'<path d="{outline}{cells.strokes(done < 1)}" fill="none" stroke="currentColor"/>'
    )
    if seconds.size <= LABELLED_CELLS and cells.high >= 14 and wide >= 30:
        for row, column in np.argwhere(timed).tolist():
            colour = "#fff" if levels[row, column] < LEVELS // 2 else "#000"
            parts.append(cells.label(row, column, f"{seconds[row, column]:.2g}", colour))
    bottom = TOP + max(cells.high * rows, 28)
    parts += [
        _text(LEFT, TOP - 6, f"{across[0]}: 0 to {number(across[1])}"),
        _text(LEFT - 5, TOP + 11, f"{down[0]}: 0", "end"),
        _text(LEFT - 5, bottom, number(down[1]), "end"),
    ]
    text = f"Cells that are done: {int((done == 1).sum())} of {done.size}."
    return _svg(title, text, parts, bottom + 6)


def tile_maps(
    seconds: Numbers,
    done: NDArray[np.bool_],
    shape: Sequence[int],
    core: Sequence[int],
    most: tuple[int, int],
) -> tuple[list[tuple[str, str]], str, bool]:
    """Draws maps of all tiles of a volume on one scale of seconds.

    Each map shows y and x of a slab of the volume. If one tile spans the volume in y, there is one
    map, of z and x.

    Args:
        seconds: of each tile (z, y, x), NaN if unknown.
        done: whether each tile is done (z, y, x).
        shape: of the volume, in voxels (z, y, x).
        core: shape of a tile, in voxels (z, y, x).
        most: the largest number of maps, and of cells along each side of a map. Beyond that,
            neighbouring tiles share a cell, which shows their mean.

    Returns:
        The maps with their titles; the colour bar, empty if no time is known; whether tiles
        share cells.
    """
    times, fractions = np.where(done, seconds, np.nan), done.astype(np.float64)
    z, y, x = zip("zyx", shape, strict=True)
    axes, aspect, depth = (y, x), core[1] / core[2], done.shape[0]
    if done.shape[1] == 1:
        times, fractions = times.swapaxes(0, 1), fractions.swapaxes(0, 1)
        axes, aspect, depth = (z, x), 0.5, 1
    cells = (min(most[0], depth), most[1], most[1])
    means, parts = cell_means(times, cells), cell_means(fractions, cells)
    timed = means[np.isfinite(means)]
    scale = (float(timed.min()), float(timed.max())) if timed.size else (0.0, 0.0)
    edges = [i * depth // cells[0] * core[0] for i in range(cells[0])] + [shape[0]]
    titles = [f"slices {a} to {b - 1}" if b - a > 1 else f"slice {a}" for a, b in pairwise(edges)]
    maps = [
        (title, tile_map(title, mean, part, scale, axes, aspect))
        for title, mean, part in zip(titles, means, parts, strict=True)
    ]
    bar = colour_bar("Time of a tile", scale, "s") if timed.size else ""
    return maps, bar, means.size < done.size


def colour_bar(title: str, ends: tuple[float, float], unit: str, log: bool = False) -> str:
    """Draws the legend of a colour map: `LEVELS` steps of viridis with their numbers.

    Args:
        title: the quantity.
        ends: the numbers of the first and of the last colour.
        unit: follows the title; may be empty.
        log: whether the scale is logarithmic.
    """
    low, high = ends
    shades = LEVELS if high > low else 1
    between = np.geomspace if log else np.linspace
    steps = between(low, high, shades // 2 + 1)
    left, wide = 24.0, (WIDTH - 48) / LEVELS
    parts = [
        f'<rect x="{_n(left + i * wide)}" y="16" width="{_n(wide)}" height="12" '
        f'fill="{_shade(i / (LEVELS - 1))}"/>'
        for i in range(shades)
    ]
    parts += [
        _text(left + 2 * i * wide, 42, f"{step:.2g}", "middle")
        for i, step in enumerate(steps.tolist())
    ]
    parts.append(_text(left, 11, f"{title}, {unit}" if unit else title))
    return _svg(title, f"Colours from {low:.2g} to {high:.2g} {unit}".strip() + ".", parts, 48)
