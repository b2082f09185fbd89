"""Warping against a slow implementation of its rules; it must not change the topology."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from tests.oracles import EIGHT, image, is_simple, slow_classify, slow_warp
from tests.strategies import pairs
from unet_ray.scores import warping
from unet_ray.scores.totals import THRESHOLDS
from unet_ray.scores.warping import RADIUS, RING, SIMPLE, Mismatches, classify, warp

EVERYWHERE = np.ones((3, 3))


def left(truth, prediction, radius=RADIUS):
    return classify(*warp(truth, prediction.astype(float), 0.5), radius)


def places_of(cells):
    return {(y, x) for y, x in np.argwhere(cells).tolist()}


tiny = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape).map(lambda a: a * 1.0))
)


@settings(max_examples=150)
@given(pairs() | tiny, st.sampled_from(THRESHOLDS))
def test_warping_matches_the_rules_written_out(images, threshold):
    truth, proposal = images
    warped, mismatches = warp(truth, proposal, threshold)
    cells, left = slow_warp(truth, proposal, threshold)
    assert places_of(warped) == cells
    assert [tuple(place) for place in mismatches.tolist()] == left
    for radius in (1, 2, 3, 5, RADIUS):
        counts = slow_classify(cells, left, truth.shape, radius)
        assert tuple(classify(warped, mismatches, radius)) == counts


@settings(max_examples=100)
@given(pairs(), st.sampled_from(THRESHOLDS))
def test_warping_adds_and_removes_no_cell_and_no_membrane(images, threshold):
    truth, proposal = images
    warped, _ = warp(truth, proposal, threshold)
    frame = [np.pad(cells, 1) for cells in (truth, warped)]
    cells = [ndimage.label(plane)[1] for plane in frame]
    membranes = [ndimage.label(~plane, EVERYWHERE)[1] for plane in frame]
    assert cells[0] == cells[1] and membranes[0] == membranes[1]


@settings(max_examples=60)
@given(pairs(), st.sampled_from(THRESHOLDS))
def test_the_remaining_pixels_are_all_mismatches_and_none_is_simple(images, threshold):
    truth, proposal = images
    warped, mismatches = warp(truth, proposal, threshold)
    left = [tuple(place) for place in mismatches.tolist()]
    assert set(left) == places_of(warped != (proposal > threshold))
    assert len(left) == len(set(left))
    cells = places_of(warped)
    for y, x in left:
        assert not is_simple({(i, j): (y + i, x + j) in cells for i, j in EIGHT})
    assert sum(classify(warped, mismatches)) == len(left)


@settings(max_examples=60)
@given(pairs(), st.sampled_from(THRESHOLDS))
def test_warping_again_changes_nothing(images, threshold):
    truth, proposal = images
    warped, mismatches = warp(truth, proposal, threshold)
    again, left = warp(warped, proposal, threshold)
    np.testing.assert_array_equal(again, warped)
    np.testing.assert_array_equal(left, mismatches)


@settings(max_examples=60)
@given(pairs(), st.sampled_from(THRESHOLDS))
def test_turning_the_slices_turns_the_order_of_ties(images, threshold):
    """Without ties x and y are alike: warping a transposed slice gives the transposed result."""
    truth, proposal = images
    rng = np.random.default_rng(0)
    proposal = np.clip(proposal + rng.normal(0, 1e-3, proposal.shape), 0, 1)
    doubts = np.abs(proposal - threshold).astype(np.float32)
    if len(np.unique(doubts)) < doubts.size:
        return
    one = warp(truth, proposal, threshold)[0]
    other = warp(truth.T, proposal.T, threshold)[0].T
    np.testing.assert_array_equal(one, other)


# The table of simple points


def neighbourhoods():
    """Each code with its neighbourhood: step (y, x) to whether it is cell."""
    for code in range(256):
        yield code, {tuple(step): bool(code >> k & 1) for k, step in enumerate(RING.tolist())}


def test_the_ring_goes_around_once():
    assert sorted(map(tuple, RING.tolist())) == sorted(EIGHT)
    assert (np.abs(np.diff(RING, axis=0, append=RING[:1])).sum(axis=1) == 1).all()


def test_simple_points_are_those_whose_topological_numbers_are_1():
    assert [is_simple(cell) for _, cell in neighbourhoods()] == SIMPLE.tolist()


@pytest.mark.parametrize("turn", [lambda y, x: (x, -y), lambda y, x: (y, -x)], ids=["turn", "flip"])
def test_simple_points_do_not_depend_on_the_orientation(turn):
    codes = {
        frozenset(p for p, is_cell in cell.items() if is_cell): n for n, cell in neighbourhoods()
    }
    for places, code in codes.items():
        assert SIMPLE[code] == SIMPLE[codes[frozenset(turn(*p) for p in places)]]


def test_a_flip_of_a_simple_point_keeps_the_topology_and_no_other_does():
    """Counts cells and membranes before and after flipping the middle of 3 x 3 pixels."""
    for code, cell in neighbourhoods():
        image = np.zeros((5, 5), bool)
        for (i, j), is_cell in cell.items():
            image[2 + i, 2 + j] = is_cell
        counts = []
        for middle in (False, True):
            image[2, 2] = middle
            counts.append((ndimage.label(image)[1], ndimage.label(~image, EVERYWHERE)[1]))
        # in so small an image pieces are not joined elsewhere, so the counts show every change
        assert SIMPLE[code] == (counts[0] == counts[1]), cell


WALL = image("cc.cc", "cc.cc", "cc.cc")


def test_equal_slices_have_no_mismatches():
    assert left(WALL, WALL) == Mismatches(0, 0, 0)


def test_a_shifted_wall_costs_nothing():
    shifted = image("ccc.c", "ccc.c", "ccc.c")
    assert left(WALL, shifted) == Mismatches(0, 0, 0)
    thick = image("c...c", "c...c", "c...c")
    assert left(WALL, thick) == Mismatches(0, 0, 0)


def test_a_gap_in_a_wall_is_a_merger_of_one_pixel():
    gap = image("cc.cc", "ccccc", "cc.cc")
    assert left(WALL, gap) == Mismatches(splits=0, mergers=1, others=0)


def test_no_wall_at_all_is_a_merger_of_its_last_line():
    # A wall can be thinned to one line, which must remain from edge to edge.
    assert left(WALL, np.ones((3, 5), bool)) == Mismatches(splits=0, mergers=3, others=0)
    thick = image("c...c", "c...c", "c...c")
    assert left(thick, np.ones((3, 5), bool)) == Mismatches(splits=0, mergers=3, others=0)


def test_a_false_wall_is_a_split_of_one_pixel():
    # It runs from one edge to the other; the pixel that would close it cannot be flipped.
    assert left(np.ones((3, 5), bool), WALL) == Mismatches(splits=1, mergers=0, others=0)


def test_cells_and_holes_that_vanish_or_appear_are_neither():
    empty, dot = np.zeros((3, 3), bool), image("...", ".c.", "...")
    assert left(dot, empty) == Mismatches(0, 0, 1)
    assert left(empty, dot) == Mismatches(0, 0, 1)
    assert left(~dot, ~empty) == Mismatches(0, 0, 1)
    assert left(~empty, ~dot) == Mismatches(0, 0, 1)


def test_a_cell_that_vanishes_shrinks_to_one_pixel():
    assert left(np.ones((4, 4), bool), np.zeros((4, 4), bool)) == Mismatches(0, 0, 1)


def test_the_surest_pixel_is_flipped_first():
    truth = image("c", "c", "c")
    # The surer end is flipped first, then the middle; the last pixel must remain.
    for proposal, stays in (([[0.1], [0.2], [0.3]], 2), ([[0.3], [0.2], [0.1]], 0)):
        warped, _ = warp(truth, np.array(proposal), 0.5)
        assert np.flatnonzero(warped) == [stays]


def test_equally_sure_pixels_are_flipped_in_the_order_of_x():
    truth = np.ones((2, 2), bool)
    # all but one may flip, in the order (y, x) = 00, 10, 01, 11
    warped, _ = warp(truth, np.zeros((2, 2)), 0.5)
    assert warped.tolist() == [[False, False], [False, True]]
    # three must flip: after 00 and 10 one of the right column remains
    warped, _ = warp(truth, np.array([[0.0, 0.2], [0.0, 0.0]]), 0.5)
    assert warped.tolist() == [[False, True], [False, False]]


def test_confidence_is_compared_in_single_precision():
    # In double precision the second is surer, in single precision they are as sure.
    truth, almost = np.ones((1, 2), bool), 0.25 - 1e-12
    warped, _ = warp(truth, np.array([[0.25, almost]]), 0.5)
    assert warped.tolist() == [[False, True]]
    warped, _ = warp(truth, np.array([[0.25, 0.24]]), 0.5)
    assert warped.tolist() == [[True, False]]


def test_a_pixel_that_may_not_flip_yet_is_tried_again():
    # The middle of a full square flips only once its edge is gone, which is less sure.
    truth = np.ones((3, 3), bool)
    proposal = np.full((3, 3), 0.4)
    proposal[1, 1], proposal[2, 2] = 0.0, 1.0
    warped, mismatches = warp(truth, proposal, 0.5)
    np.testing.assert_array_equal(warped, proposal > 0.5)
    assert len(mismatches) == 0


def test_a_split_is_detected_within_a_window():
    # A ring of cell, cut at one place: no split of the whole, but one within the window.
    truth = np.pad(np.zeros((7, 7), bool), 1, constant_values=True)
    prediction = truth.copy()
    prediction[0, 4] = False
    assert left(truth, prediction, radius=2).splits == 1
    assert left(truth, prediction, radius=9).splits == 0
    # a window larger than the slice covers all of it, as in Fiji
    assert left(truth, prediction, radius=10).splits == 0


def test_a_radius_larger_than_one_side_covers_the_whole_slice():
    # The path around the hole is too long for a window of radius 20, if one applied.
    truth = np.ones((9, 80), bool)
    truth[1:-1, 1:-1] = False
    prediction = truth.copy()
    prediction[4, 0] = False
    assert left(truth, prediction).splits == 0
    tall = np.pad(truth, ((0, 31), (0, 0)))
    assert left(tall, np.pad(prediction, ((0, 31), (0, 0)))).splits == 1


@settings(max_examples=30)
@given(pairs(8), st.sampled_from(THRESHOLDS))
def test_the_loops_stay_within_their_arrays(images, threshold):
    # Compiled code would read and write out of bounds silently; the same code in Python raises.
    truth, proposal = images
    expected = classify(*warp(truth, proposal, threshold), 2)
    compiled = {name: getattr(warping, name) for name in ("_flip_simple", "_count", "_tears")}
    with pytest.MonkeyPatch.context() as patch:
        for name, loop in compiled.items():
            patch.setattr(warping, name, loop.py_func)
        assert classify(*warp(truth, proposal, threshold), 2) == expected


def test_the_input_slices_are_unchanged():
    truth, proposal = WALL.copy(), 1.0 - WALL
    warp(truth, proposal, 0.5)
    np.testing.assert_array_equal(truth, WALL)
    np.testing.assert_array_equal(proposal, 1.0 - WALL)
