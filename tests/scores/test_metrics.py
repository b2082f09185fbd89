"""Every score by hand: images of a few pixels, and the number as a fraction."""

import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from scipy import ndimage

from tests.helper import random_stack
from tests.oracles import image
from tests.strategies import pairs
from unet_ray.errors import InputError
from unet_ray.scores import metrics
from unet_ray.scores.metrics import (
    accuracy,
    adapted_rand_error,
    ap50,
    ap_mean,
    dice,
    iou,
    pixel_error,
    rand_error,
    rand_error_foreground,
    seg,
    v_info,
    v_rand,
    voi_merge,
    voi_split,
    warping_error,
)
from unet_ray.scores.totals import THINNED_THRESHOLDS

MEMBRANES = (pixel_error, rand_error, rand_error_foreground, warping_error, v_rand, v_info)
OBJECTS = (seg, ap50, ap_mean, adapted_rand_error, voi_split, voi_merge)
CLASSES = (accuracy, iou, dice)
UNDEFINED = math.nan

WALL = image("cc.cc", "cc.cc", "cc.cc")
GAP = image("cc.cc", "ccccc", "cc.cc")
ALL, NOTHING = np.ones((3, 5), bool), np.zeros((3, 5), bool)


def values(functions, prediction, truth, **options):
    """Name and value of each score."""
    return {f.__name__: f(prediction, truth, **options).value for f in functions}


def test_every_score_is_a_documented_function():
    functions = [f for _, f in inspect.getmembers(metrics, inspect.isfunction)]
    scores = {f for f in functions if f.__module__ == metrics.__name__}
    assert scores == {*MEMBRANES, *OBJECTS, *CLASSES}
    for function in scores:
        text = inspect.getdoc(function)
        assert "Formula: " in text and ("best" in text or "means that" in text)


# Membranes. The wall separates two cells of 6 pixels; its 3 pixels are a segment in `rand_error`.

BY_HAND = {
    "identical": (WALL, WALL, [0, 0, 0, 0, 1, 1]),
    # 12 of 15 pixels are right. Pairs: 15 + 15 + 3 in the truth, all right, of 15 * 14 / 2. Of the
    # cell pixels 36 + 36 pairs of 144. A line of the wall must remain. One segment has no
    # information.
    "all cell": (
        ALL,
        WALL,
        [1 - 24 / 27, 1 - 66 / (33 + 105), 1 - 144 / (72 + 144), 3 / 15, 144 / (72 + 144), 0],
    ),
    # Nothing is right. Membrane is one segment too. Each cell pixel is single: 12 pairs. The cells
    # vanish, which is no split. Thinning makes one segment of a slice without cells.
    "all membrane": (
        NOTHING,
        WALL,
        [1, 1 - 66 / (33 + 105), 1 - 24 / (72 + 12), 0, 144 / (72 + 144), 0],
    ),
    # One pixel is wrong. Segments of 13 and 2 pixels: 15 + 15 + 1 pairs are right, of 78 + 1.
    # Without a wall all the way thinning leaves one segment.
    "a gap": (
        GAP,
        WALL,
        [1 - 24 / 25, 1 - 62 / (33 + 79), 1 - 144 / (72 + 144), 1 / 15, 144 / (72 + 144), 0],
    ),
    # The left cell of 3 pixels falls into 1, 1 and a wall of 1, in the foreground a segment of its
    # own: 1 + 1 + 1 + 9 pairs are predicted, none of them false, of 9 + 9. In `rand_error`
    # membranes are one segment, of 8 pixels and of 9.
    "a false wall": (
        image("c.c.ccc", "......."),
        image("ccc.ccc", "......."),
        [
            1 - 10 / 11,
            1 - 2 * (3 + 28) / (3 + 3 + 28 + 3 + 36),
            *(1 - 24 / (18 + 12), 1 / 14, 24 / (18 + 12)),
            # H(truth) = ln 2, all of it shared; H(prediction) = ln 2 / 2 + 3 (ln 6 / 6)
            2 * math.log(2) / (math.log(2) + math.log(2) / 2 + math.log(6) / 2),
        ],
    ),
    # The wall moves by one: in each of 3 rows one false and one missed cell pixel. Segments of 9,
    # 3 and 3. Right pairs: 15 of the left cell, 3 of the rest of the right one, 3 of its pixels
    # under the new wall, 3 of those of the old wall. Of the cell pixels 6 are together, 3 and 3
    # alone. Only the topology is right.
    "a wall elsewhere": (
        image("ccc.c", "ccc.c", "ccc.c"),
        WALL,
        [
            *(1 - 18 / 24, 1 - 2 * 24 / (33 + 36 + 3 + 3)),
            *(1 - 2 * (36 + 9 + 3) / (72 + 48), 0, 2 * (36 + 9 + 3) / (72 + 48)),
            # H(truth) = ln 2, all shared; H(prediction) = ln 2 / 2 + ln 4 / 4 + 3 (ln 12 / 12)
            2 * math.log(2) / (math.log(2) + math.log(2) + math.log(12) / 4),
        ],
    ),
    # The membrane is one segment of 15 pixels. There is no true cell.
    "a truth of membrane": (
        WALL,
        NOTHING,
        [1, 1 - 66 / (105 + 33), UNDEFINED, 0, UNDEFINED, UNDEFINED],
    ),
    "membrane in both": (NOTHING, NOTHING, [0, 0, UNDEFINED, 0, UNDEFINED, UNDEFINED]),
    # One cell carries no information: v_info is 0 even of a perfect prediction, as in Fiji.
    "one cell in both": (ALL, ALL, [0, 0, 0, 0, 1, 0]),
    "one cell, a false wall": (
        WALL,
        ALL,
        [1 - 24 / 27, 1 - 66 / (33 + 105), 1 - 150 / (225 + 75), 1 / 15, 150 / (225 + 75), 0],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_membranes_by_hand(name):
    prediction, truth, expected = BY_HAND[name]
    result = values(MEMBRANES, prediction, truth)
    by_name = dict(zip(result, expected, strict=True))
    assert result == pytest.approx(by_name, abs=1e-12, nan_ok=True)


def test_the_best_threshold_gives_the_value():
    # Both are cell up to 0.3, only the first up to 0.9: correct from 0.4.
    prediction, truth = np.array([[0.95, 0.35]]), np.array([[1, 0]])
    score = pixel_error(prediction, truth)
    assert (score.value, score.threshold) == (0, 0.4)
    assert [error for _, error in score.curve] == pytest.approx([1 / 3] * 4 + [0] * 6)


def test_an_undefined_score_has_no_threshold_and_no_curve_of_numbers():
    score = v_rand(WALL, NOTHING)
    assert math.isnan(score.value) and score.threshold is None
    assert [t for t, _ in score.curve] == list(THINNED_THRESHOLDS)
    assert all(math.isnan(value) for _, value in score.curve)


def test_one_pixel():
    # There is no pair of different pixels, and no wall.
    result = values(MEMBRANES, np.ones((1, 1)), np.ones((1, 1)))
    expected = {"pixel_error": 0, "rand_error": UNDEFINED, "rand_error_foreground": 0}
    expected |= {"warping_error": 0, "v_rand": 1, "v_info": 0}
    assert result == pytest.approx(expected, nan_ok=True)


@settings(max_examples=40)
@given(pairs())
def test_a_perfect_prediction(images):
    truth, _ = images
    result = values(MEMBRANES, truth, truth)
    assert result["pixel_error"] == result["warping_error"] == 0
    pixels = np.unique_counts(ndimage.label(truth)[0]).counts
    # without a segment of two pixels there is no pair
    assert math.isnan(result["rand_error"]) if pixels.max() == 1 else result["rand_error"] == 0
    if truth.any():
        assert (result["rand_error_foreground"], result["v_rand"]) == (0, 1)
        one_cell = ndimage.label(truth)[1] == 1
        assert result["v_info"] == pytest.approx(0 if one_cell else 1)


@settings(max_examples=40)
@given(pairs())
def test_scores_are_between_0_and_1(images):
    truth, proposal = images
    for value in values(MEMBRANES, proposal, truth).values():
        assert math.isnan(value) or -1e-12 <= value <= 1 + 1e-12


def test_how_a_probability_is_stored_makes_no_difference():
    proposal, truth = random_stack(0, values=255)
    expected = [f(proposal, truth) for f in MEMBRANES]
    for stored in (
        np.rint(proposal * 255).astype(np.uint8),
        np.rint(proposal * 65535).astype(np.uint16),
        proposal[None],
    ):
        assert [f(stored, truth) for f in MEMBRANES] == expected
    for white in (truth.astype(np.uint8), truth * np.uint8(255), truth * 1.0, truth * np.int64(1)):
        assert [f(proposal, white) for f in MEMBRANES] == expected
    binary = proposal > 0.5
    expected = [f(binary, truth) for f in MEMBRANES]
    for stored in (binary.astype(np.uint8), binary * np.uint8(255), binary.astype(np.float32)):
        assert [f(stored, truth) for f in MEMBRANES] == expected


# Objects

TRUE = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
PREDICTED = np.array([[5, 5, 5, 0, 6, 0, 6, 6]])


def bits(*counts):
    shares = np.array(counts) / sum(counts)
    return -(shares * np.log2(shares)).sum()


def test_objects_by_hand():
    assert values(OBJECTS, PREDICTED, TRUE) == pytest.approx(
        {
            # 3 of 4 voxels of the first, with IoU 3/4; exactly half of the second is no match
            "seg": (3 / 4 + 0) / 2,
            # one pair with IoU 3/4, one with 1/4
            "ap50": 1 / 3,
            "ap_mean": 6 / 10 * 1 / 3,
            # pairs of voxels with truth: 3 right, of 6 + 1, and of 3 + 1 (background is a segment)
            "adapted_rand_error": 1 - 6 / (7 + 4),
            "voi_split": bits(3, 1, 1, 1) - bits(4, 2),
            "voi_merge": bits(3, 1, 1, 1) - bits(3, 2, 1),
        }
    )


def test_identical_objects():
    expected = dict(zip(("seg", "ap50", "ap_mean"), (1, 1, 1), strict=True))
    expected |= {"adapted_rand_error": 0, "voi_split": 0, "voi_merge": 0}
    assert values(OBJECTS, TRUE, TRUE) == pytest.approx(expected, abs=1e-12)
    # other labels for the same objects
    assert values(OBJECTS, TRUE * 7, TRUE) == pytest.approx(expected, abs=1e-12)


def test_two_halves_of_an_object():
    # Each half has IoU 1/2: one of them is matched at 0.5, the other is false; none covers it.
    whole, halves = np.array([[1, 1, 1, 1]]), np.array([[1, 1, 2, 2]])
    result = values(OBJECTS, halves, whole)
    assert (result["seg"], result["ap50"], result["ap_mean"]) == pytest.approx((0, 1 / 2, 1 / 20))
    assert result["adapted_rand_error"] == pytest.approx(1 - 4 / (6 + 2))
    assert (result["voi_split"], result["voi_merge"]) == pytest.approx((1, 0))
    # swapped: the whole covers both halves
    result = values(OBJECTS, whole, halves)
    assert (result["seg"], result["ap50"]) == pytest.approx((1 / 2, 1 / 2))
    assert (result["voi_split"], result["voi_merge"]) == pytest.approx((0, 1))


def test_no_objects_at_all():
    empty = np.zeros((2, 3), np.uint8)
    assert all(math.isnan(value) for value in values(OBJECTS, empty, empty).values())
    # only false objects
    result = values(OBJECTS, empty + 1, empty)
    assert (result.pop("ap50"), result.pop("ap_mean")) == (0, 0)
    assert all(math.isnan(value) for value in result.values())


def test_a_prediction_without_objects():
    result = values(OBJECTS, np.zeros_like(TRUE), TRUE)
    assert (result["seg"], result["ap50"], result["ap_mean"]) == (0, 0, 0)
    # as in scikit-image, background is one segment: both objects are merged
    assert result["adapted_rand_error"] == pytest.approx(1 - 14 / (7 + 15))
    assert (result["voi_split"], result["voi_merge"]) == pytest.approx((0, bits(4, 2)))


def test_disconnected_pieces_of_one_label_are_one_object():
    apart = np.array([[3, 0, 3, 3]])
    assert seg(np.array([[0, 0, 9, 9]]), apart).value == pytest.approx(2 / 3)


def test_large_labels_are_distinguished():
    for a, b in ((1, 2**32 + 1), (2**63, 2**63 + 1), (2**64 - 1, 1)):
        truth = np.array([[a, a, a, b, b, b, 0]], np.uint64)
        assert values(OBJECTS, truth, truth)["voi_merge"] == pytest.approx(0, abs=1e-12)
        merged = np.where(truth == b, np.uint64(a), truth)
        assert voi_merge(merged, truth).value == pytest.approx(1)
        assert ap50(merged, truth).value == pytest.approx(1 / 2)


def test_scores_of_each_slice():
    prediction, truth = np.stack([PREDICTED, TRUE]), np.stack([TRUE, TRUE])
    for function in OBJECTS:
        score = function(prediction, truth, per_slice=True)
        single = function(PREDICTED, TRUE).value, function(TRUE, TRUE).value
        assert score.slices == pytest.approx(single)
        assert function(prediction, truth).slices == ()
    assert seg(prediction, truth, per_slice=True).value == pytest.approx((3 / 4 + 0 + 1 + 1) / 4)
    assert ap50(prediction, truth, per_slice=True).value == pytest.approx(3 / (4 + 4 - 3))


# Classes


def test_classes_by_hand():
    truth, prediction = np.array([[0, 0, 1, 1, 2, 2]]), np.array([[0, 1, 1, 1, 2, 0]])
    assert accuracy(prediction, truth).value == pytest.approx(4 / 6)
    score = iou(prediction, truth)
    assert dict(score.classes) == pytest.approx({0: 1 / 3, 1: 2 / 3, 2: 1 / 2})
    assert score.value == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)
    score = dice(prediction, truth)
    assert dict(score.classes) == pytest.approx({0: 2 / 4, 1: 4 / 5, 2: 2 / 3})
    assert score.value == pytest.approx((2 / 4 + 4 / 5 + 2 / 3) / 3)


def test_a_class_in_only_one_of_both_has_an_iou_of_0():
    for prediction, truth in (([[0, 0]], [[0, 4]]), ([[0, 4]], [[0, 0]])):
        score = iou(np.array(prediction), np.array(truth))
        assert dict(score.classes) == {0: 1 / 2, 4: 0} and score.value == 1 / 4


def test_identical_classes():
    result = values(CLASSES, TRUE, TRUE)
    assert result == {"accuracy": 1, "iou": 1, "dice": 1}


# Errors


@pytest.mark.parametrize("function", [*MEMBRANES, *OBJECTS, *CLASSES], ids=lambda f: f.__name__)
def test_other_shapes_are_refused(function):
    one, other = np.zeros((2, 3, 4), np.uint8), np.zeros((2, 4, 3), np.uint8)
    with pytest.raises(InputError, match="must have the same shape, but are 2 x 3 x 4 and 2 x 4 x"):
        function(one, other)
    with pytest.raises(InputError, match="has 2 channels"):
        function(np.zeros((2, 1, 3, 4), np.uint8), one)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1])
@pytest.mark.parametrize("function", MEMBRANES, ids=lambda f: f.__name__)
def test_values_that_are_not_probabilities_are_refused(function, value):
    prediction = np.full((2, 3, 5), 0.5)
    prediction[1, 2, 4] = value
    with pytest.raises(InputError, match=rf"voxel \(z, y, x\) = \(1, 2, 4\) is {value}; a prob"):
        function(prediction, np.stack([WALL, WALL]))


@pytest.mark.parametrize("function", MEMBRANES, ids=lambda f: f.__name__)
def test_a_truth_of_three_values_is_refused(function):
    truth = np.array([[0, 1, 2]], np.uint8)
    with pytest.raises(InputError, match="slice 0 holds 2; a truth holds 0"):
        function(np.zeros((1, 3)), truth)


@pytest.mark.parametrize("function", [*OBJECTS, *CLASSES], ids=lambda f: f.__name__)
def test_values_that_are_not_labels_are_refused(function):
    whole = np.zeros((2, 3), np.uint8)
    for bad, message in (
        (whole * 1.0, "not float64"),
        (whole.astype(np.int8) - 1, "not int8 with -1"),
    ):
        for images in ((bad, whole), (whole, bad)):
            with pytest.raises(
                InputError, match=f"labels must be integers of at least 0, {message}"
            ):
                function(*images)


def test_users_import_the_scores_by_their_names():
    import unet_ray.metrics as public

    ours = {name for name, value in vars(metrics).items() if callable(value) and name[0] != "_"}
    ours -= {"Scored"}
    assert ours == {name for name, value in vars(public).items() if callable(value)}
    assert all(getattr(public, name) is getattr(metrics, name) for name in ours)
