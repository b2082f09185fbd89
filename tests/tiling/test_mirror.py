"""Mirrored reads against ``numpy.pad(mode="reflect")``, and the boxes that they read."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import boxes, shapes
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.mirror import read_mirrored, reflect


class Source:
    """An array that records the boxes read from it."""

    def __init__(self, array):
        self.array, self.boxes_read, self.returned = array, [], []

    def __call__(self, box):
        assert box.intersect(Box.of(self.array.shape[-len(box.start) :])) == box and box.size
        self.boxes_read.append(box)
        self.returned.append(self.array[(..., *box.slices)])
        return self.returned[-1]


def numbered(shape):
    return np.arange(np.prod(shape)).reshape(shape)


@given(shapes((4, 9, 9)), st.lists(st.integers(0, 40), min_size=6, max_size=6))
@example((1, 1, 1), [40] * 6)
@example((2, 1, 3), [0, 37, 40, 1, 0, 40])
def test_mirror_read_equals_numpy_reflect_pad(shape, halo):
    image, before, after = numbered(shape), halo[:3], halo[3:]
    read = read_mirrored(Source(image), shape, Box.of(shape).grow(before, after))
    padding = list(zip(before, after, strict=True))
    np.testing.assert_array_equal(read, np.pad(image, padding, mode="reflect"))


@given(shapes((4, 9, 9)), boxes(low=-50, high=50).filter(lambda box: box.size))
@example((1, 1, 5), Box((0, 0, -2), (1, 1, 1)))  # the same voxels in reverse
def test_any_box_is_a_part_of_the_padded_image(shape, box):
    source = Source(numbered((2, *shape)).astype(np.uint16))
    read = read_mirrored(source, shape, box)
    padded = np.pad(source.array, [(0, 0), *[(50, 50)] * 3], mode="reflect")
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, padded[(slice(None), *box.shift((50,) * 3).slices)])


@given(shapes((4, 9, 9)), boxes(low=-50, high=50).filter(lambda box: box.size))
def test_the_source_is_read_once_and_only_where_needed(shape, box):
    source = Source(numbered(shape))
    shown = read_mirrored(source, shape, box)
    (inside,) = source.boxes_read
    # It is the smallest box that contains every voxel of the result.
    places = np.stack(np.unravel_index(shown.ravel(), shape))
    assert inside == Box(tuple(places.min(axis=1)), tuple(places.max(axis=1) + 1))


@given(st.data(), shapes((4, 9, 9)))
def test_a_box_inside_the_volume_is_returned_as_read(data, shape):
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = Box(
        start, tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    )
    source = Source(numbered(shape))
    read = read_mirrored(source, shape, box)
    assert source.boxes_read == [box] and read is source.returned[0]


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_the_face_voxel_is_the_mirror(length):
    shown = reflect(np.arange(-30, 30), length)
    np.testing.assert_array_equal(shown, np.pad(np.arange(length), (30, 30 - length), "reflect"))
