"""Charts are parsed: points, bars and cells must be at the positions of their numbers."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helper import SVG, parsed, paths, points
from unet_ray.report import charts
from unet_ray.report.charts import (
    Axis,
    Series,
    binned_series,
    cell_means,
    colour_bar,
    histogram,
    line_chart,
    number,
    tile_map,
    tile_maps,
)
from unet_ray.report.pictures import VIRIDIS

finite = st.floats(-1e12, 1e12).filter(lambda v: v == 0 or abs(v) > 1e-9)
positive = st.floats(1e-9, 1e12)


def texts(svg):
    return ["".join(node.itertext()) for node in parsed(svg).iter(f"{SVG}text")]


def line(x, y, name="a"):
    return Series(name, np.array(x, float), np.array(y, float))


def axes(series, log=False):
    """The axes of a chart without names."""
    x = Axis.over(np.concatenate([s.x for s in series]), charts.LEFT, charts.WIDTH - charts.RIGHT)
    y = np.concatenate([s.y for s in series])
    return x, Axis.over(y, charts.HEIGHT - charts.BOTTOM, charts.TOP, log)


def value_at(axis, place):
    share = (place - axis.start) / (axis.stop - axis.start)
    if axis.log:
        return axis.low * (axis.high / axis.low) ** share
    return axis.low + share * (axis.high - axis.low)


# Axes


@given(st.lists(finite, min_size=1, max_size=20))
def test_an_axis_holds_all_its_numbers_between_few_even_ticks(values):
    axis = Axis.over(np.array(values), 50, 300)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low - slack <= min(values) <= max(values) <= axis.high + slack
    assert 2 <= len(axis.ticks) <= 8
    assert (axis.ticks[0], axis.ticks[-1]) == (axis.low, axis.high)
    steps = np.diff(axis.ticks)
    np.testing.assert_allclose(steps, steps[0])
    assert f"{steps[0]:e}"[0] in "125"


@given(st.lists(positive, min_size=1, max_size=20))
def test_a_logarithmic_axis_holds_all_its_numbers(values):
    axis = Axis.over(np.array([*values, 0.0, -3.0, np.nan]), 300, 50, log=True)
    assert axis.low <= min(values) * (1 + 1e-6)
    assert axis.high >= max(values) * (1 - 1e-6)
    assert 2 <= len(axis.ticks) <= 11
    assert (np.diff(axis.ticks) > 0).all()


@given(st.lists(finite, min_size=1, max_size=9), st.booleans())
def test_a_position_maps_back_to_its_number(values, log):
    numbers = np.abs(values) + 1e-9 if log else np.array(values)
    axis = Axis.over(numbers, 10, 400, log)
    back = value_at(axis, axis.place(numbers))
    np.testing.assert_allclose(back, numbers, rtol=1e-6, atol=1e-9 * (axis.high - axis.low))


def test_equal_ratios_are_equally_far_apart():
    axis = Axis.over(np.array([1.0, 100.0]), 0, 100, log=True)
    np.testing.assert_allclose(axis.place([1, 10, 100]), [0, 50, 100])
    assert np.isnan(axis.place([0, -1])).all()


@pytest.mark.parametrize("values", [[5e-324], [1e-323, 1.0], [1e308, 1e-308], [5e-324, 1e308]])
@pytest.mark.parametrize("log", [False, True])
def test_extreme_numbers_have_an_axis(values, log):
    axis = Axis.over(np.array(values), 10, 100, log)
    assert (np.diff(axis.ticks) > 0).all()
    assert np.isfinite(axis.place(values)).all()
    assert ((axis.place(values) >= 9.9) & (axis.place(values) <= 100.1)).all()


def test_an_axis_without_numbers_has_ends():
    axis = Axis.over(np.array([np.nan]), 0, 100)
    assert axis.low < axis.high


@pytest.mark.parametrize(
    ("value", "text"), [(0.3, "0.3"), (0.1 + 0.2, "0.3"), (15000, "15\u202f000"), (-2, "-2")]
)
def test_numbers_are_readable(value, text):
    assert number(value) == text


# Lines


@pytest.mark.parametrize("log", [False, True])
def test_points_of_a_line_map_back_to_the_data(log):
    rng = np.random.default_rng(0)
    series = [line(np.arange(10, 310, 10), rng.uniform(0.02, 1.3, 30))]
    x, y = axes(series, log)
    drawn = points(paths(line_chart("loss", series, "step", "loss", log=log), "line")[0])
    np.testing.assert_allclose(value_at(x, drawn[:, 0]), series[0].x, atol=0.1)
    np.testing.assert_allclose(value_at(y, drawn[:, 1]), series[0].y, rtol=0.002, atol=0.001)


@pytest.mark.parametrize("last", [5000, 100_000, 3e9])
def test_no_tick_is_cut_off(last):
    svg = line_chart("t", [line([0, last], [0, 1])], "step", "loss")
    tick = next(n for n in parsed(svg).iter(f"{SVG}text") if n.text == number(last))
    assert tick.get("text-anchor") == "middle"
    assert float(tick.get("x")) + 3.4 * len(tick.text) <= charts.WIDTH


def test_a_value_that_is_not_finite_leaves_a_gap():
    series = [line(range(5), [1, 2, np.nan, 2, 1])]
    path = paths(line_chart("t", series, "x", "y"), "line")[0]
    assert path.count("M") == 2
    assert len(points(path)) == 4


def test_a_logarithmic_chart_leaves_out_zero():
    series = [line(range(4), [1, 0, 10, 100])]
    assert len(points(paths(line_chart("t", series, "x", "y", log=True), "line")[0])) == 3


def test_lines_differ_by_more_than_colour_and_are_named():
    series = [line(range(5), np.full(5, 0.5), f"score {i}") for i in range(6)]
    svg = line_chart("t", series, "step", "score", names=True)
    lines = [n for n in parsed(svg).iter(f"{SVG}path") if n.get("class") == "line"]
    assert len({n.get("stroke-dasharray") for n in lines}) == 6
    assert len({n.get("style") for n in lines}) == 6
    named = [n for n in parsed(svg).iter(f"{SVG}text") if "score " in n.text]
    assert sorted(n.text[2:] for n in named) == [s.name for s in series]
    assert len({n.text[0] for n in named}) == 6
    heights = sorted(float(n.get("y")) for n in named)
    assert min(np.diff(heights)) >= 13
    assert charts.TOP - 14 < heights[0] < heights[-1] <= charts.HEIGHT - charts.BOTTOM + 5


def test_long_names_leave_space_for_the_chart():
    svg = line_chart("t", [line([0, 1], [0, 1], "x" * 300)], "step", "y", names=True)
    assert "x" * 15 + "…" in "".join(texts(svg))
    assert points(paths(svg, "line")[0])[-1, 0] > 200


def test_few_points_are_marked_and_many_are_not():
    few, many = (line_chart("t", [line(range(n), range(n))], "x", "y") for n in (12, 300))
    assert sum("●" in text for text in texts(few)) == 12
    assert "●" not in many


def test_the_ring_is_at_its_point():
    series = [line([0.1, 0.5, 0.9], [0.4, 0.1, 0.3])]
    svg = line_chart("t", series, "threshold", "error", mark=(0.5, 0.1, "best 0.1"))
    circle = parsed(svg).find(f"{SVG}circle")
    x, y = axes(series)
    assert value_at(x, float(circle.get("cx"))) == pytest.approx(0.5, abs=0.002)
    assert value_at(y, float(circle.get("cy"))) == pytest.approx(0.1, abs=0.002)
    assert "best 0.1" in texts(svg)
    undefined = line_chart("t", series, "x", "y", mark=(0.5, np.nan, "best"))
    assert "best" not in texts(undefined)


@given(st.integers(1, 900), st.integers(1, 60))
def test_binned_lines_are_short_and_keep_means_and_extremes(count, most):
    values = np.random.default_rng(count).normal(size=count)
    series = binned_series("a", range(count), values, most)
    assert len(series.x) <= most
    if count <= most:
        assert series.low is None
        np.testing.assert_array_equal(series.y, values)
        return
    assert (series.low.min(), series.high.max()) == (values.min(), values.max())
    assert ((series.low <= series.y + 1e-9) & (series.y <= series.high + 1e-9)).all()
    assert (np.diff(series.x) > 0).all()
    first = -(-count // most)
    assert series.y[0] == pytest.approx(values[:first].mean())


def test_a_long_line_is_a_small_chart_with_a_band():
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(size=20000))
    svg = line_chart("t", [binned_series("loss", range(20000), values)], "x", "y", log=True)
    assert len(svg) < 20_000
    assert 'fill-opacity=".25"' in svg


# Bars and maps


def test_bars_are_as_high_as_their_numbers():
    heights = np.array([0.0, 1.0, 4.0, 2.0])
    path = paths(histogram("t", np.linspace(0, 1, 5), heights, "p", "%"), "bars")[0]
    bars = re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)H([\d.]+)V", path)
    left, ground, top, right = np.array(bars, float).T
    scale = (ground - top)[2] / 4
    np.testing.assert_allclose((ground - top) / scale, heights, atol=0.01)
    assert (right > left).all()
    assert (left[1:] > right[:-1]).all()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_cell_means_ignore_nan(rows, columns, most):
    rng = np.random.default_rng([rows, columns])
    values = rng.normal(size=(rows, columns))
    values[rng.random(values.shape) < 0.3] = np.nan
    means = cell_means(values, (most, most))
    assert means.shape == (min(rows, most), min(columns, most))
    ends = [[i * n // min(n, most) for i in range(min(n, most))] + [n] for n in values.shape]
    for i, j in np.ndindex(means.shape):
        part = values[ends[0][i] : ends[0][i + 1], ends[1][j] : ends[1][j + 1]]
        finite_part = part[np.isfinite(part)]
        expected = finite_part.mean() if finite_part.size else np.nan
        assert means[i, j] == pytest.approx(expected, nan_ok=True)


def test_cell_means_ignore_infinity():
    values = np.array([[1.0, np.inf, 3.0, np.inf]])
    np.testing.assert_array_equal(cell_means(values, (1, 2)), [[1.0, 3.0]])


AXES = ("y", 90), ("x", 120)


def fills(svg):
    return {n.get("fill"): n.get("d") for n in parsed(svg).iter(f"{SVG}path")}


def rectangles(path):
    return re.findall(r"M([\d.]+) ([\d.]+)h(-?[\d.]+)v", path)


def test_tiles_are_coloured_by_their_time():
    seconds = np.array([[1.0, 1.0, 3.0], [2.0, 3.0, 1.0]])
    svg = tile_map("t", seconds, np.ones((2, 3)), (1, 3), AXES)
    colours = fills(svg)
    dark, light = ("#{:02x}{:02x}{:02x}".format(*VIRIDIS[i]) for i in (0, -1))
    assert len(rectangles(colours[dark])) == 2  # two neighbours are one
    assert len(rectangles(colours[light])) == 2
    assert {"1", "2", "3"} <= set(texts(svg))
    assert "x: 0 to 120" in texts(svg)
    assert "90" in texts(svg)
    assert "done: 6 of 6." in svg


def test_unfinished_cells_are_struck_out_and_unknown_times_are_grey():
    seconds = np.array([[1.0, np.nan, np.nan]])
    done = np.array([[0.5, 0.0, 1.0]])
    svg = tile_map("t", seconds, done, (1, 1), AXES)
    strokes = next(d for d in paths(svg) if "l" in d)
    assert strokes.count("l") == 2
    grey = next(n for n in parsed(svg).iter(f"{SVG}path") if n.get("fill-opacity"))
    assert len(rectangles(grey.get("d"))) == 1
    assert "done: 1 of 3." in svg


def test_small_cells_have_no_numbers():
    seconds = np.full((64, 64), 2.0)
    assert "2" not in texts(tile_map("t", seconds, np.ones_like(seconds), (1, 3), AXES))


def test_the_largest_maps_are_small():
    rng = np.random.default_rng(0)
    seconds, done = rng.random((40, 300, 300)), rng.random((40, 300, 300)) < 0.5
    maps, bar, grouped = tile_maps(seconds, done, (640, 9000, 9000), (16, 30, 30), (4, 64))
    assert [title for title, _ in maps] == [
        "slices 0 to 159",
        "slices 160 to 319",
        "slices 320 to 479",
        "slices 480 to 639",
    ]
    assert grouped
    assert sum(len(svg) for _, svg in maps) + len(bar) < 700_000


def test_a_stack_of_slabs_is_one_map_of_z_and_x():
    seconds = np.array([1.0, 2.0, np.nan]).reshape(3, 1, 1)
    done = np.array([True, True, False]).reshape(3, 1, 1)
    maps, bar, grouped = tile_maps(seconds, done, (40, 50, 60), (16, 64, 64), (4, 64))
    assert len(maps) == 1
    assert maps[0][0] == "slices 0 to 39"
    assert {"z: 0", "40", "x: 0 to 60", "1", "2"} <= set(texts(maps[0][1]))
    assert "done: 2 of 3." in maps[0][1]
    assert not grouped
    assert {"1", "2"} <= set(texts(bar))


def test_each_slab_has_a_map_and_all_share_one_scale():
    seconds = np.arange(8.0).reshape(2, 2, 2)
    maps, bar, _ = tile_maps(seconds, seconds >= 0, (20, 64, 64), (16, 32, 32), (4, 64))
    assert [title for title, _ in maps] == ["slices 0 to 15", "slices 16 to 19"]
    assert not set(fills(maps[0][1])) & set(fills(maps[1][1])) - {"none", None}
    assert {"0", "7"} <= set(texts(bar))


def test_a_single_slice_is_named_as_one():
    maps, _, _ = tile_maps(
        np.ones((2, 2, 2)), np.ones((2, 2, 2), bool), (2, 9, 9), (1, 8, 8), (4, 9)
    )
    assert [title for title, _ in maps] == ["slice 0", "slice 1"]


def test_maps_without_times_have_no_colour_bar():
    nothing = np.full((1, 2, 2), np.nan)
    maps, bar, _ = tile_maps(nothing, np.isfinite(nothing), (4, 9, 9), (4, 8, 8), (4, 64))
    assert bar == ""
    assert "done: 0 of 4." in maps[0][1]


@pytest.mark.parametrize("log", [False, True])
def test_a_colour_bar_shows_its_ends_and_middle(log):
    svg = colour_bar("Weight", (1.0, 16.0), "s", log)
    labels = texts(svg)
    assert {"1", "16", "4" if log else "8.5", "Weight, s"} <= set(labels)
    assert len(list(parsed(svg).iter(f"{SVG}rect"))) == charts.LEVELS


def test_a_colour_bar_of_one_number_has_one_colour():
    svg = colour_bar("Weight", (3.0, 3.0), "", log=True)
    assert texts(svg) == ["3", "Weight"]
    assert len(list(parsed(svg).iter(f"{SVG}rect"))) == 1


# Words


EVIL = "<script>alert('1')</script>&\""


def test_every_word_is_escaped_and_every_chart_is_well_formed():
    series = [line([0, 1], [0, 1], EVIL), line([0, 1], [1, 0], "b")]
    grid = np.ones((2, 2))
    for svg in (
        line_chart(EVIL, series, EVIL, EVIL, mark=(0, 0, EVIL), names=True),
        histogram(EVIL, [0, 1], [1], EVIL, EVIL),
        tile_map(EVIL, grid, grid, (0, 1), ((EVIL, 4), (EVIL, 4))),
        colour_bar(EVIL, (0, 1), EVIL),
    ):
        assert "<script" not in svg
        assert parsed(svg).find(f"{SVG}title").text == EVIL
        assert parsed(svg).find(f"{SVG}desc").text
        assert parsed(svg).get("role") == "img"
