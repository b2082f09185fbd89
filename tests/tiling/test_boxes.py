"""Boxes against sets of positions and against NumPy's own slicing."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import boxes
from unet_ray.tiling.boxes import Box

small = boxes(axes=2, low=-7, high=7)
offsets = st.tuples(st.integers(-9, 9), st.integers(-9, 9))


def voxels(box):
    return set(itertools.product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True))))


@given(small)
def test_size_and_shape_count_the_voxels(box):
    assert box.size == math.prod(box.shape) == len(voxels(box))


@given(small, small)
def test_an_intersection_contains_the_voxels_of_both(a, b):
    both = a.intersect(b)
    assert voxels(both) == voxels(a) & voxels(b)
    if a.size:
        assert (both == a) == (voxels(a) <= voxels(b))


@given(small, offsets)
def test_shift_and_relative_to_undo_each_other(box, offset):
    moved = box.shift(offset)
    assert voxels(moved) == {(y + offset[0], x + offset[1]) for y, x in voxels(box)}
    assert moved.relative_to(offset) == box


@given(small, st.tuples(*[st.integers(0, 5)] * 2), st.tuples(*[st.integers(0, 5)] * 2))
def test_grow_adds_below_and_above(box, before, after):
    grown = box.grow(before, after)
    assert grown.start == tuple(np.subtract(box.start, before))
    assert grown.stop == tuple(np.add(box.stop, after))


@given(boxes(axes=3, low=0, high=9))
def test_slices_cut_the_box_out_of_an_array(box):
    image = np.zeros((9, 9, 9), int)
    image[box.slices] += 1
    assert {tuple(p) for p in np.argwhere(image).tolist()} == voxels(box)
    assert image[box.slices].shape == box.shape


@settings(max_examples=50)
@given(boxes(axes=3, low=-6, high=6), st.tuples(*[st.integers(1, 5)] * 3))
def test_split_partitions_in_reading_order(box, shape):
    parts = list(box.split(shape))
    painted = [v for part in parts for v in voxels(part)]
    assert len(painted) == len(set(painted)) and set(painted) == voxels(box)
    assert all(n <= limit for part in parts for n, limit in zip(part.shape, shape, strict=True))
    assert [p.start for p in parts] == sorted(p.start for p in parts)


@settings(max_examples=100)
@given(boxes(axes=3, low=0, high=9), st.tuples(*[st.integers(1, 5)] * 3), st.integers(1, 12))
def test_a_split_by_chunks_limits_the_chunks_of_a_box(box, chunk, max_chunks):
    parts = list(box.split_by_chunks(chunk, max_chunks))
    painted = [v for part in parts for v in voxels(part)]
    assert len(painted) == len(set(painted)) and set(painted) == voxels(box)
    touched = [{tuple(np.floor_divide(v, chunk)) for v in voxels(part)} for part in parts]
    assert all(len(chunks) <= max_chunks for chunks in touched)
    assert sum(map(len, touched)) == len(set().union(*touched))  # no chunk is in two parts


def test_the_box_of_an_array():
    assert Box.of((4, 5)) == Box((0, 0), (4, 5))
    assert list(Box.of(()).split(())) == [Box((), ())]


def test_a_box_is_written_as_a_region():
    assert str(Box((0, -3, 5), (1, 4, 5))) == "0:1,-3:4,5:5"


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        ((0, 0), (1,), r"differ in length: \(0, 0\) and \(1,\)"),
        ((0, 3), (1, 2), r"stops before it starts: \(0, 3\) to \(1, 2\)"),
    ],
)
def test_invalid_corners_are_refused(start, stop, message):
    with pytest.raises(ValueError, match=message):
        Box(start, stop)


def test_boxes_of_different_dimensions_are_refused():
    with pytest.raises(ValueError):
        Box.of((2, 2)).intersect(Box.of((2, 2, 2)))
    with pytest.raises(ValueError):
        Box.of((2, 2)).grow((1,), (1,))
