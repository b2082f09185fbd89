"""The table of overlaps against counts in dictionaries, pairs against a loop over all pairs."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from tests.oracles import ious
from tests.strategies import labels
from unet_ray.scores.overlaps import (
    EXACT_IN_INT64,
    Matches,
    Overlaps,
    conditional_entropies,
    foreground_information,
    foreground_pair_counts,
    pair_counts,
    sizes,
    sum_of_squares,
)

LARGE = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]
IOU_PERCENT = range(50, 100, 5)


def rows_of(table):
    rows = zip(table.truth.tolist(), table.prediction.tolist(), table.voxels.tolist(), strict=True)
    by_pair = {(t, p): n for t, p, n in rows}
    assert len(by_pair) == len(table.voxels)  # each pair once
    return by_pair


def counted(truth, prediction):
    return dict(Counter(zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True)))


@given(labels())
def test_a_table_counts_every_voxel(images):
    table = Overlaps.of(*images)
    assert rows_of(table) == counted(*images)
    assert table.total == images[0].size


@given(st.integers(0, 40), st.data())
def test_labels_of_any_size_are_distinguished(length, data):
    image = arrays(np.uint64, length, elements=st.sampled_from(LARGE))
    truth, prediction = data.draw(image), data.draw(image)
    assert rows_of(Overlaps.of(truth, prediction)) == counted(truth, prediction)


@given(labels(), st.lists(st.integers(0, 40)))
def test_tables_of_pieces_sum_to_the_table_of_the_whole(images, cuts):
    pieces = [np.split(image.ravel(), sorted(cuts)) for image in images]
    tables = [Overlaps.of(*piece) for piece in zip(*pieces, strict=True)]
    assert rows_of(Overlaps.joined(tables)) == counted(*images)
    one_by_one = tables[0]
    for table in tables[1:]:
        one_by_one = Overlaps.joined([one_by_one, table])
    assert rows_of(one_by_one) == counted(*images)


@given(labels())
def test_sizes_are_those_of_the_whole_segment(images):
    truth, prediction = images
    table = Overlaps.of(truth, prediction)
    assert table.truth_sizes().tolist() == [(truth == t).sum() for t in table.truth]
    assert table.prediction_sizes().tolist() == [(prediction == p).sum() for p in table.prediction]
    assert sizes(table.truth, table.voxels).tolist() == np.unique_counts(truth).counts.tolist()


def test_a_table_without_voxels():
    empty = Overlaps.of(np.zeros(0, int), np.zeros(0, int))
    assert rows_of(empty) == {} and empty.total == 0
    assert pair_counts(empty) == (0, 0, 0)
    assert conditional_entropies(empty) == (0, 0)
    assert foreground_pair_counts(empty) is None and foreground_information(empty) is None


# Pairs


def slow_pairs(truth, prediction):
    """Unordered pairs of pixels in the same segment of both, truth, prediction."""
    pixels = list(zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True))
    both = true = predicted = 0
    for (t, p), (u, q) in itertools.combinations(pixels, 2):
        both += t == u and p == q
        true += t == u
        predicted += p == q
    return both, true, predicted


def slow_foreground_pairs(truth, prediction):
    """Ordered pairs of true cell pixels, including each pixel with itself.

    A pixel that is predicted as membrane only pairs with itself.
    """
    pixels = list(zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True))
    inside = [(i, t, p) for i, (t, p) in enumerate(pixels) if t]
    both = true = predicted = 0
    for (i, t, p), (j, u, q) in itertools.product(inside, repeat=2):
        joined = i == j or (p == q and p != 0)
        both += t == u and joined
        true += t == u
        predicted += joined
    return both, true, predicted


@settings(max_examples=60)
@given(labels())
def test_pair_counts_match_counting_every_pair(images):
    assert pair_counts(Overlaps.of(*images)) == slow_pairs(*images)


@settings(max_examples=60)
@given(labels())
def test_foreground_pair_counts_match_counting_every_pair(images):
    counts = foreground_pair_counts(Overlaps.of(*images))
    if images[0].any():
        assert counts == slow_foreground_pairs(*images)
    else:
        assert counts is None


def test_pairs_of_a_few_pixels_by_hand():
    # truth       1 1 1 2    3 + 0 pairs together; prediction 1 1 2 2: 1 + 1; in both: the first
    table = Overlaps.of(np.array([1, 1, 1, 2]), np.array([1, 1, 2, 2]))
    assert pair_counts(table) == (1, 3, 2)
    assert foreground_pair_counts(table) == (4 + 1 + 1, 9 + 1, 4 + 4)
    # predicted membrane on two pixels of cell: singletons, and they count with themselves
    table = Overlaps.of(np.array([1, 1, 1, 0]), np.array([1, 0, 0, 0]))
    assert pair_counts(table) == (1, 3, 3)
    assert foreground_pair_counts(table) == (1 + 2, 9, 1 + 2)


@pytest.mark.parametrize(
    "voxels",
    [[3, 4], [EXACT_IN_INT64 - 1], [EXACT_IN_INT64], [2**32, 2**33, 1], [2**50] * 3, []],
    ids=str,
)
def test_sums_of_squares_are_exact_at_any_size(voxels):
    assert sum_of_squares(np.array(voxels, np.int64)) == sum(n * n for n in voxels)


def test_pairs_of_a_terabyte_are_exact():
    n = 2**40 + 1
    table = Overlaps(np.array([1, 2]), np.array([5, 5]), np.array([n, n]))
    both, truth, prediction = pair_counts(table)
    assert both == truth == n * (n - 1)
    assert prediction == 2 * n * (2 * n - 1) // 2


# Information


def entropy(image):
    """Entropy of the labels of an image, in nats."""
    counts = np.array(list(Counter(image).values()))
    return -sum(n / len(image) * math.log(n / len(image)) for n in counts.tolist())


@given(labels())
def test_foreground_information_counts_each_membrane_pixel_as_a_segment(images):
    truth, prediction = (image.ravel().tolist() for image in images)
    entropies = foreground_information(Overlaps.of(*images))
    if not any(truth):
        assert entropies is None
        return
    inside = [
        (t, p or f"single {i}") for i, (t, p) in enumerate(zip(truth, prediction, strict=True)) if t
    ]
    expected = [entropy([t for t, _ in inside]), entropy([p for _, p in inside]), entropy(inside)]
    assert entropies == pytest.approx(expected, abs=1e-12)


@given(labels())
def test_conditional_entropies_are_differences_of_entropies(images):
    truth, prediction = (image.ravel().tolist() for image in images)
    both = entropy(list(zip(truth, prediction, strict=True)))
    expected = [(both - entropy(truth)) / math.log(2), (both - entropy(prediction)) / math.log(2)]
    split, merge = conditional_entropies(Overlaps.of(*images))
    assert [split, merge] == pytest.approx(expected, abs=1e-12)
    assert split >= 0 and merge >= 0


def test_a_halved_object_is_split_by_one_bit():
    table = Overlaps.of(np.array([7, 7, 7, 7]), np.array([1, 1, 2, 2]))
    assert conditional_entropies(table) == pytest.approx((1, 0), abs=1e-12)
    swapped = Overlaps(table.prediction, table.truth, table.voxels)
    assert conditional_entropies(swapped) == pytest.approx((0, 1), abs=1e-12)


@settings(max_examples=200)
@given(labels(most=4) | labels(most=2, width=(1, 4)))
def test_matched_objects_are_those_of_the_best_assignment(images):
    table, overlap = Matches.of(Overlaps.of(*images)), ious(*images)
    assert (table.truths, table.predictions) == overlap.shape
    for percent in IOU_PERCENT:
        # exact fractions: 3/5 is not below 0.6, nor 13/20 below 0.65
        good = np.round(overlap * 1e9) >= percent * 1e7
        rows, columns = linear_sum_assignment(good, maximize=True)
        assert table.matched(percent) == good[rows, columns].sum()


@given(labels(most=4))
def test_an_object_is_covered_by_the_one_that_holds_more_than_half(images):
    truth, prediction = images
    expected = []
    for t in np.unique(truth[truth != 0]):
        for p in np.unique(prediction[prediction != 0]):
            shared = ((truth == t) & (prediction == p)).sum()
            if shared / (truth == t).sum() > 0.5:
                expected.append(shared / ((truth == t) | (prediction == p)).sum())
    covered = Matches.of(Overlaps.of(truth, prediction)).covered()
    assert sorted(covered) == pytest.approx(sorted(expected))


def test_two_halves_are_one_match_at_half_and_none_above():
    whole, halves = np.array([1, 1, 1, 1]), np.array([1, 1, 2, 2])
    for truth, prediction in ((whole, halves), (halves, whole)):
        matches = Matches.of(Overlaps.of(truth, prediction))
        assert [matches.matched(percent) for percent in (50, 51, 55)] == [1, 0, 0]
    # neither half holds more than half of the whole; the whole holds each half, with IoU 1/2
    assert Matches.of(Overlaps.of(whole, halves)).covered().tolist() == []
    assert Matches.of(Overlaps.of(halves, whole)).covered().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("percent", IOU_PERCENT)
def test_an_overlap_of_exactly_the_threshold_counts(percent):
    truth, prediction = np.ones(100, int), np.repeat([1, 0], [percent, 100 - percent])
    assert Matches.of(Overlaps.of(truth, prediction)).matched(percent) == 1
    prediction[percent - 1] = 0
    assert Matches.of(Overlaps.of(truth, prediction)).matched(percent) == 0
