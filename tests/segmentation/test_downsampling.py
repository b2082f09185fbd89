"""Downsampled voxels against other libraries and against slow implementations of the rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from skimage.measure import block_reduce

from unet_ray.segmentation import downsampling
from unet_ray.segmentation.downsampling import mean_of, most_frequent

FACTORS = [(1, 2, 2), (2, 2, 2), (1, 1, 2), (2, 1, 1), (3, 2, 4), (1, 1, 1)]


def blocks_of(voxels, factors):
    """Yields the position of each block, and its voxels."""
    counts = [-(-n // f) for n, f in zip(voxels.shape, factors, strict=True)]
    for position in np.ndindex(*counts):
        corner = zip(position, factors, strict=True)
        yield position, voxels[tuple(slice(p * f, (p + 1) * f) for p, f in corner)]


def slow_mean(voxels, factors):
    """The means of blocks by integer arithmetic: the exact half is rounded up."""
    means = {
        position: (2 * int(block.sum(dtype=int)) + block.size) // (2 * block.size)
        for position, block in blocks_of(voxels, factors)
    }
    return array_of(means, np.uint8)


def slow_most_frequent(labels, factors):
    """The most frequent labels of blocks, by sorting."""
    winners = {}
    for position, block in blocks_of(labels, factors):
        values, counts = np.unique(block, return_counts=True)
        winners[position] = values[counts.argmax()]
    return array_of(winners, labels.dtype)


def array_of(entries, dtype):
    """An array of entries by position, the last position last."""
    shape = [n + 1 for n in [*entries][-1]]
    return np.array([*entries.values()], dtype).reshape(shape)


shapes = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
factors_of_blocks = st.tuples(*[st.integers(1, 4)] * 3)


@st.composite
def label_volumes(draw):
    """Volumes of few labels, so that ties are frequent, in both dtypes of stores."""
    dtype = draw(st.sampled_from([np.uint8, np.uint64]))
    largest = np.iinfo(dtype).max
    values = st.sampled_from([0, 1, 2, int(largest) - 1, int(largest)])
    return draw(arrays(dtype, draw(shapes), elements=values))


@pytest.mark.parametrize("factors", FACTORS)
def test_means_match_skimage(factors):
    voxels = np.random.default_rng(0).integers(0, 256, (6, 24, 40), np.uint8)
    expected = np.floor(block_reduce(voxels.astype(float), factors, np.mean) + 0.5)
    means = mean_of(voxels, factors)
    assert means.dtype == np.uint8
    np.testing.assert_array_equal(means, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64])
@pytest.mark.parametrize("factors", FACTORS)
def test_most_frequent_labels_match_skimage_and_scipy(factors, dtype):
    def mode(blocks, axis):
        return stats.mode(blocks.reshape(*blocks.shape[:3], -1), axis=-1).mode

    labels = np.random.default_rng(0).integers(0, 4, (6, 24, 40)).astype(dtype)
    labels[:, :, 20:] = 3  # blocks of one label, and blocks of several
    winners = most_frequent(labels, factors)
    assert winners.dtype == dtype
    np.testing.assert_array_equal(winners, block_reduce(labels, factors, mode))


@settings(max_examples=200)
@given(shapes.flatmap(lambda shape: arrays(np.uint8, shape)), factors_of_blocks)
def test_means_of_cut_blocks_count_only_their_own_voxels(voxels, factors):
    np.testing.assert_array_equal(mean_of(voxels, factors), slow_mean(voxels, factors))


@settings(max_examples=200)
@given(label_volumes(), factors_of_blocks)
def test_most_frequent_labels_of_cut_blocks_count_only_their_own_voxels(labels, factors):
    winners = most_frequent(labels, factors)
    np.testing.assert_array_equal(winners, slow_most_frequent(labels, factors))
    assert {*winners.flat} <= {*labels.flat}  # no label is invented


def test_a_half_is_rounded_up():
    assert mean_of(np.array([[[0, 1, 1, 2, 254, 255]]], np.uint8), (1, 1, 2)).tolist() == [
        [[1, 2, 255]]
    ]


def test_of_equally_frequent_labels_the_lowest_wins_even_the_background():
    labels = np.array([[[9, 9, 4, 4, 7, 0, 0, 7], [4, 4, 9, 9, 0, 7, 7, 7]]], np.uint64)
    assert most_frequent(labels, (1, 2, 4)).tolist() == [[[4, 7]]]
    assert most_frequent(labels, (1, 2, 2)).tolist() == [[[4, 4, 0, 7]]]


def test_a_mean_of_the_largest_voxels_does_not_overflow():
    assert (mean_of(np.full((40, 40, 41), 255, np.uint8), (40, 40, 40)) == 255).all()


def test_channels_are_averaged_one_by_one():
    voxels = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 6, 7), np.uint8)
    means = mean_of(voxels, (2, 2, 2))
    assert means.shape == (2, 3, 3, 3, 4)
    for channel in np.ndindex(2, 3):
        np.testing.assert_array_equal(means[channel], mean_of(voxels[channel], (2, 2, 2)))


def test_arrays_need_not_be_contiguous_and_stay_unchanged():
    voxels = np.random.default_rng(0).integers(0, 5, (7, 6, 5), np.uint8)
    copy = voxels.copy()
    for function in (mean_of, most_frequent):
        np.testing.assert_array_equal(
            function(voxels.T, (2, 2, 2)), function(np.ascontiguousarray(voxels.T), (2, 2, 2))
        )
    np.testing.assert_array_equal(voxels, copy)


@settings(max_examples=40)
@given(label_volumes(), factors_of_blocks)
def test_the_loops_stay_within_their_arrays(labels, factors):
    # Compiled code would read and write out of bounds silently; the same code in Python raises.
    functions = {name: getattr(downsampling, name) for name in ("_average", "_elect", "_winner")}
    expected = most_frequent(labels, factors), mean_of(labels.astype(np.uint8), factors)
    with pytest.MonkeyPatch.context() as patched:
        for name, function in functions.items():
            patched.setattr(downsampling, name, function.py_func)
        np.testing.assert_array_equal(most_frequent(labels, factors), expected[0])
        np.testing.assert_array_equal(mean_of(labels.astype(np.uint8), factors), expected[1])
