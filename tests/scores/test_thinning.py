"""Thinning against a slow implementation of its rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from tests.oracles import slow_thin
from unet_ray.scores import thinning
from unet_ray.scores.thinning import thin


def slices(most=12):
    """Binary slices, from few cells to few membranes."""
    shapes = st.tuples(st.integers(1, most), st.integers(1, most))
    return shapes.flatmap(lambda shape: arrays(bool, shape)) | random_slices(most)


def random_slices(most):
    """As `slices`, with cells of one density."""

    def drawn(seed, density):
        rng = np.random.default_rng(seed)
        return rng.random(rng.integers(1, most + 1, 2)) < density

    return st.builds(drawn, st.integers(0, 2**32), st.sampled_from([0.03, 0.1, 0.3, 0.6, 0.9]))


@settings(max_examples=300)
@given(slices())
def test_thinning_matches_the_rules_written_out(cells):
    np.testing.assert_array_equal(thin(cells), slow_thin(cells))


def test_a_gap_of_one_pixel_becomes_a_line():
    # The membrane touches both cells: it takes the label of the left one, then meets the right one.
    assert thin(np.array([[1, 0, 1]], bool)).tolist() == [[1, 0, 2]]


def test_in_a_gap_of_two_pixels_the_line_is_the_one_visited_later():
    # x is scanned upwards: the left pixel joins the left cell, the right one meets both.
    assert thin(np.array([[1, 0, 0, 1]], bool)).tolist() == [[1, 1, 0, 2]]
    assert thin(np.array([[1], [0], [0], [1]], bool)).tolist() == [[1], [1], [0], [2]]


def test_a_wall_with_an_open_end_vanishes():
    # There is one cell: it grows over its own wall.
    cells = np.array([[1, 0, 1], [1, 0, 1], [1, 1, 1]], bool)
    assert thin(cells).tolist() == [[1, 1, 1]] * 3


def test_cells_that_touch_at_a_corner_stay_separate():
    # The other two corners meet both cells.
    assert thin(np.array([[1, 0], [0, 1]], bool)).tolist() == [[1, 0], [0, 2]]


@pytest.mark.parametrize("value", [False, True])
def test_a_slice_of_one_value_is_one_segment(value):
    for shape in [(1, 1), (1, 7), (5, 3)]:
        assert (thin(np.full(shape, value)) == 1).all()


@settings(max_examples=60)
@given(slices())
def test_cells_keep_their_numbers_and_no_cell_is_added(cells):
    segments, labels = thin(cells), ndimage.label(cells)[0]
    if cells.any():
        np.testing.assert_array_equal(segments[cells], labels[cells])
        assert segments.min() >= 0 and segments.max() == labels.max()
    else:
        assert (segments == 1).all()


@settings(max_examples=60)
@given(slices())
def test_segments_never_touch(cells):
    segments = thin(cells)
    for a, b in ((segments[1:], segments[:-1]), (segments[:, 1:], segments[:, :-1])):
        assert ((a == b) | (a == 0) | (b == 0)).all()


@settings(max_examples=60)
@given(slices(), st.permutations(range(4)))
def test_the_order_of_neighbours_makes_no_difference(cells, order):
    # Pixels that wait in the queue together have the same colour of a chessboard, so none of them
    # is a neighbour of another.
    original = thinning.SIDES
    expected = thin(cells)
    try:
        thinning.SIDES = original[list(order)].copy()
        np.testing.assert_array_equal(thin(cells), expected)
    finally:
        thinning.SIDES = original


def test_the_order_in_which_pixels_are_scanned_makes_a_difference():
    cells = np.array([[1, 0, 0, 1]], bool)
    assert thin(cells[:, ::-1])[:, ::-1].tolist() != [[1, 1, 0, 2]]
    corner = np.array([[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    assert not np.array_equal(thin(corner.T).T > 0, thin(corner) > 0)


@settings(max_examples=30)
@given(slices(8))
def test_the_loop_stays_within_its_arrays(cells):
    # Compiled code would read and write out of bounds silently; the same code in Python raises.
    labels = ndimage.label(cells)[0].astype(np.int32)
    labels[labels == 0] = thinning.WAITING
    thinning._flood.py_func(labels, thinning.SIDES)
    if cells.any():
        np.testing.assert_array_equal(labels, thin(cells))


def test_the_input_slice_is_unchanged():
    cells = np.array([[1, 0, 1]], bool)
    thin(cells)
    assert cells.tolist() == [[True, False, True]]
