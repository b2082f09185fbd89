"""Small charts as SVG text: curves, bars, maps of tiles, and the bars that explain their colours.

Knows numbers, axes and colours; knows neither files nor pages. A chart is one ``<svg>`` element
with a title and a description, and without id, script or reference. It is drawn in the colour of
the text around it and in the CSS variables ``--line-1`` to ``--line-6``, where the page sets them.
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
LETTER = 6.6
# Lines differ in colour, dashes and mark; yellow and black would vanish on white or on black.
COLOURS = tuple("#{:02x}{:02x}{:02x}".format(*OKABE_ITO[i]) for i in (5, 6, 3, 7, 1, 2))
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4")
MARKER_SHAPES = "●■▲◆▼○"
MARKED_POINTS = 40
# What a logarithmic axis can show; no number of a training is beyond.
LEAST, MOST = 1e-99, 1e99
LEVELS = 8
MAP_SIDE, CELL_SIDE, LABELLED_CELLS = 300.0, 44.0, 48


@dataclass(frozen=True)
class Axis:
    """Where numbers lie along one side of a chart.

    Attributes:
        low, high: the numbers at its ends, `low` < `high`.
        start, stop: their places, in units of the drawing.
        log: equal ratios are equally far apart.
        ticks: the numbers that are written, ascending, from `low` to `high`.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Numbers, start: float, stop: float, log: bool = False) -> Axis:
        """An axis that holds all the finite `values`, above 0 if `log`; its ends are ticks."""
        known = values[np.isfinite(values) & ((values > 0) | (not log))]
        known = np.clip(known, LEAST, MOST) if log else known
        low, high = (float(known.min()), float(known.max())) if known.size else (0.1, 1.0)
        ticks = _log_ticks(low, high) if log else _even_ticks(low, high)
        return cls(ticks[0], ticks[-1], start, stop, log, tuple(ticks))

    def place(self, values: Any) -> Numbers:
        """Where `values` lie; NaN for what a logarithm cannot show."""
        numbers = np.asarray(values, np.float64)
        low, high = self.low, self.high
        if self.log:
            numbers = np.log(np.where(numbers > 0, np.clip(numbers, LEAST, MOST), np.nan))
            low, high = math.log(low), math.log(high)
        place: Numbers = self.start + (numbers - low) / (high - low) * (self.stop - self.start)
        return place


def _even_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, the first at or below `low`, the last above."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), LEAST):
        room = abs(low) / 2 if abs(low) > LEAST else 1.0
        low, high = low - room, high + room
    decade = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(f * decade for f in (1, 2, 5, 10, 20) if (high - low) <= f * decade * most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the numbers; powers alone where that is many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    if last - first > 3:
        every = math.ceil((last - first) / 6)
        return [10.0**k for k in range(first, last + every, every)]
    ticks = [f * 10.0**k for k in range(first, last + 1) for f in (1, 2, 5)]
    below = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    above = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[below : max(above, below + 1) + 1]


@dataclass(frozen=True)
class Series:
    """One line of a chart; numbers that are not finite leave gaps.

    Attributes:
        name: written at its end, if there are several.
        x, y: its points, in the order of x.
        low, high: what each point stands for lies between these; None for no such band.
    """

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


def binned_series(name: str, x: Any, y: Any, most: int = 200) -> Series:
    """A line of at most `most` points: means of as many neighbours as needed, with their range."""
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
    """Curves over one pair of axes, told apart by colour, dashes and mark.

    Args:
        title: what the chart shows.
        series: one to six lines.
        x_label: what the x axis is, with its unit.
        y_label: what the y axis is, likewise.
        log: the y axis is logarithmic; numbers of 0 and less are left out.
        mark: a point (x, y) to be ringed, and what is written of it.
        names: write the name of each line at its end.
    """
    longest = max(len(_shortened(s.name)) for s in series)
    right = RIGHT + LETTER * (2 + longest) * names
    every = [v for s in series for v in (s.y, s.low, s.high) if v is not None]
    x = Axis.over(np.concatenate([s.x for s in series]), LEFT, WIDTH - right)
    y = Axis.over(np.concatenate(every), HEIGHT - BOTTOM, TOP, log)
    parts = [_grid(x, y, x_label, y_label)]
    parts += [_line(s, i, x, y) for i, s in enumerate(series)]
    if names:
        parts.append(_names(series, x, y))
    if mark:
        parts.append(_ring(mark, x, y))
    points = sum(len(s.x) for s in series)
    told = f"{y_label} over {x_label}: {', '.join(s.name for s in series)}; points: {points}."
    return _svg(title, told, parts, HEIGHT)


def _svg(title: str, told: str, parts: Sequence[str], height: float) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {_n(height)}" role="img" '
        'xmlns="http://www.w3.org/2000/svg" font-size="12" fill="currentColor">'
        f"<title>{escape(title)}</title><desc>{escape(told)}</desc>{''.join(parts)}</svg>"
    )


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def number(value: float) -> str:
    """A number for people: at most six digits, thousands apart."""
    return f"{value:,.6g}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _shortened(name: str, most: int = 16) -> str:
    """A name that fits beside a chart."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _grid(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    """Ticks, their numbers, faint lines at those of y, and what the axes are."""
    parts = [_text(2, 13, y_label), _text((x.start + x.stop) / 2, HEIGHT - 5, x_label, "middle")]
    lines = []
    for tick, place in zip(y.ticks, y.place(y.ticks).tolist(), strict=True):
        parts.append(_text(x.start - 6, place + 4, number(tick), "end"))
        lines.append(f"M{_n(x.start)} {_n(place)}H{_n(x.stop)}")
    ends = []
    for tick, place in zip(x.ticks, x.place(x.ticks).tolist(), strict=True):
        text = number(tick)
        inside = min(place, WIDTH - 2 - LETTER * len(text) / 2)  # the last one is whole too
        parts.append(_text(inside, y.start + 17, text, "middle"))
        ends.append(f"M{_n(place)} {_n(y.start)}v4")
    parts.append(f'<path d="{"".join(lines)}" stroke="currentColor" stroke-opacity=".18"/>')
    ends.append(f"M{_n(x.start)} {_n(y.start)}H{_n(x.stop)}")
    parts.append(f'<path d="{"".join(ends)}" stroke="currentColor"/>')
    return "".join(parts)


def _colour(index: int) -> str:
    return f"var(--line-{index % 6 + 1},{COLOURS[index % 6]})"


def _line(series: Series, index: int, x: Axis, y: Axis) -> str:
    """The band, the line and, where there are few points, their marks."""
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
    """Points joined by lines; a gap where one is not finite."""
    steps, pen = [], "M"
    for a, b in zip(across.tolist(), up.tolist(), strict=True):
        if math.isfinite(a) and math.isfinite(b):
            steps.append(f"{pen}{_n(a)} {_n(b)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(steps)


def _names(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Each name at the end of its line, pushed apart where lines end together."""
    ends = []
    for index, each in enumerate(series):
        last = y.place(each.y)[np.isfinite(y.place(each.y))]
        ends.append((float(last[-1]) if last.size else y.start, index))
    parts, free = [], -math.inf
    for end, index in sorted(ends):
        free = max(end, free + 14)
        style = f' style="fill:{_colour(index)}"'
        parts.append((free, f"{MARKER_SHAPES[index % 6]} {_shortened(series[index].name)}", style))
    over = max(0.0, free - y.start)
    return "".join(_text(x.stop + 5, at - over + 4, text, more=style) for at, text, style in parts)


def _ring(mark: tuple[float, float, str], x: Axis, y: Axis) -> str:
    """A ring around a point, and at the top of the chart what is written of it."""
    across, up = float(x.place(mark[0])), float(y.place(mark[1]))
    if not (math.isfinite(across) and math.isfinite(up)):
        return ""
    return (
        f'<circle cx="{_n(across)}" cy="{_n(up)}" r="6" fill="none" stroke="currentColor" '
        f'stroke-width="1.5"/>{_text(x.stop, 13, mark[2], "end")}'
    )


def histogram(title: str, edges: Any, heights: Any, x_label: str, y_label: str) -> str:
    """Bars between `edges` (one more than `heights`), from 0 up."""
    sides, tops = np.asarray(edges, np.float64), np.asarray(heights, np.float64)
    x = Axis.over(sides, LEFT, WIDTH - RIGHT)
    y = Axis.over(np.append(tops, 0.0), HEIGHT - BOTTOM, TOP)
    places, up, ground = x.place(sides).tolist(), y.place(tops).tolist(), float(y.place(0))
    bars = [
        f"M{_n(a + 0.5)} {_n(ground)}V{_n(top)}H{_n(b - 0.5)}V{_n(ground)}Z"
        for (a, b), top in zip(pairwise(places), up, strict=True)
    ]
    drawn = f'<path class="bars" d="{"".join(bars)}" style="fill:{_colour(0)}"/>'
    told = f"{y_label} over {x_label}, {len(tops)} bars; the highest is {number(tops.max())}."
    return _svg(title, told, [drawn, _grid(x, y, x_label, y_label)], HEIGHT)


def cell_means(values: Numbers, most: Sequence[int]) -> Numbers:
    """Means over the cells of a map, at most so many along each axis; NaN is not counted."""
    total, known = np.where(np.isfinite(values), values, 0), np.isfinite(values).astype(np.float64)
    for axis, (extent, cells) in enumerate(zip(values.shape, most, strict=True)):
        starts = np.arange(min(extent, cells)) * extent // min(extent, cells)
        total = np.add.reduceat(total, starts, axis)
        known = np.add.reduceat(known, starts, axis)
    with np.errstate(invalid="ignore"):
        means: Numbers = total / known
        return means


def _levels(values: Numbers, low: float, high: float) -> NDArray[np.int64]:
    """Which of `LEVELS` equal parts of the range from `low` to `high` each of the values is in."""
    share = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.clip(np.nan_to_num(share) * LEVELS, 0, LEVELS - 1).astype(np.int64)


def _shade(share: float) -> str:
    return "#{:02x}{:02x}{:02x}".format(
        *colour_map(np.array([[round(share * 255)]], np.uint8))[0, 0]
    )


@dataclass(frozen=True)
class _Lattice:
    """Where the cells of a map lie: its corner, and the size of a cell."""

    left: float
    top: float
    wide: float
    high: float

    def rectangles(self, where: NDArray[np.bool_]) -> str:
        """A path of these cells (rows, columns); neighbours in a row are one."""
        found = []
        for row, flags in enumerate(where):
            turns = np.flatnonzero(np.diff(np.concatenate(([0], flags, [0]))))
            for a, b in turns.reshape(-1, 2).tolist():
                corner = f"M{_n(self.left + a * self.wide)} {_n(self.top + row * self.high)}"
                width = (b - a) * self.wide
                found.append(f"{corner}h{_n(width)}v{_n(self.high)}h{_n(-width)}z")
        return "".join(found)

    def strokes(self, where: NDArray[np.bool_]) -> str:
        """A path of one diagonal through each of these cells."""
        stroke = f"l{_n(self.wide)} {_n(-self.high)}"
        corners = np.argwhere(where) * (self.high, self.wide) + (self.top + self.high, self.left)
        return "".join(f"M{_n(x)} {_n(y)}{stroke}" for y, x in corners.tolist())

    def label(self, row: int, column: int, text: str, colour: str) -> str:
        """A text in the middle of a cell."""
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
    """A map coloured by seconds, in steps of viridis; cells that are not all done are struck out.

    Args:
        title: what the map shows.
        seconds: (rows, columns); NaN where nothing is known: such a cell is grey if it is done.
        done: share of each cell that is done, 0 to 1.
        scale: the seconds of the darkest and of the lightest colour.
        axes: name and extent in voxels, down and across, such as ``("y", 512), ("x", 640)``.
        aspect: height of a cell in widths.
    """
    (rows, columns), (down, across) = seconds.shape, axes
    wide = min(CELL_SIDE, MAP_SIDE / columns, MAP_SIDE / (rows * aspect))
    cells = _Lattice(LEFT, TOP, wide, wide * aspect)
    known, levels = np.isfinite(seconds) & (done > 0), _levels(seconds, *scale)
    parts = [f'<path d="{cells.rectangles((done > 0) & ~known)}" fill-opacity=".3"/>']
    for level in range(LEVELS):
        path = cells.rectangles(known & (levels == level))
        parts.append(f'<path d="{path}" fill="{_shade(level / (LEVELS - 1))}"/>' * bool(path))
    outline = f"M{LEFT} {TOP}h{_n(wide * columns)}v{_n(cells.high * rows)}H{LEFT}z"
    parts.append(
        f'<path d="{outline}{cells.strokes(done < 1)}" fill="none" stroke="currentColor"/>'
    )
    if seconds.size <= LABELLED_CELLS and cells.high >= 14 and wide >= 30:
        for row, column in np.argwhere(known).tolist():
            colour = "#fff" if levels[row, column] < LEVELS // 2 else "#000"
            parts.append(cells.label(row, column, f"{seconds[row, column]:.2g}", colour))
    bottom = TOP + max(cells.high * rows, 28)
    parts += [
        _text(LEFT, TOP - 6, f"{across[0]}: 0 to {number(across[1])}"),
        _text(LEFT - 5, TOP + 11, f"{down[0]}: 0", "end"),
        _text(LEFT - 5, bottom, number(down[1]), "end"),
    ]
    told = f"Cells that are done: {int((done == 1).sum())} of {done.size}."
    return _svg(title, told, parts, bottom + 6)


def tile_maps(
    seconds: Numbers,
    done: NDArray[np.bool_],
    shape: Sequence[int],
    core: Sequence[int],
    most: tuple[int, int],
) -> tuple[list[tuple[str, str]], str, bool]:
    """Maps of all tiles of a volume on one scale of seconds.

    A map shows y and x of a slab of the volume. Where one tile is as high as the volume there is
    one map, of z and x.

    Args:
        seconds: of each tile (z, y, x), NaN where unknown.
        done: which tiles are done (z, y, x).
        shape: the volume, in voxels (z, y, x).
        core: a tile, likewise.
        most: how many maps, and how many cells along each side of a map; tiles beyond that share
            cells, which show their mean.

    Returns:
        Maps with their titles; the legend of their colours, empty if no time is known; whether
        tiles share cells.
    """
    times, shares = np.where(done, seconds, np.nan), done.astype(np.float64)
    z, y, x = zip("zyx", shape, strict=True)
    axes, aspect, deep = (y, x), core[1] / core[2], done.shape[0]
    if done.shape[1] == 1:
        times, shares = times.swapaxes(0, 1), shares.swapaxes(0, 1)
        axes, aspect, deep = (z, x), 0.5, 1
    cells = (min(most[0], deep), most[1], most[1])
    means, parts = cell_means(times, cells), cell_means(shares, cells)
    known = means[np.isfinite(means)]
    scale = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    edges = [i * deep // cells[0] * core[0] for i in range(cells[0])] + [shape[0]]
    titles = [f"slices {a} to {b - 1}" if b - a > 1 else f"slice {a}" for a, b in pairwise(edges)]
    maps = [
        (title, tile_map(title, mean, part, scale, axes, aspect))
        for title, mean, part in zip(titles, means, parts, strict=True)
    ]
    bar = colour_bar("Time of a tile", scale, "s") if known.size else ""
    return maps, bar, means.size < done.size


def colour_bar(title: str, ends: tuple[float, float], unit: str, log: bool = False) -> str:
    """The legend of a colour map: `LEVELS` steps of viridis, with the numbers between them.

    Args:
        title: what the colours stand for.
        ends: the numbers of the first and of the last colour.
        unit: written behind the numbers; may be empty.
        log: equal ratios are equally far apart.
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
