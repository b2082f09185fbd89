"""From counts to scores: sums and means over slices, and the best threshold."""

import dataclasses
import math

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from skimage.metrics import adapted_rand_error, variation_of_information

from tests.helper import random_labels, random_stack
from tests.oracles import ious, slow_classify, slow_thin, slow_warp
from tests.strategies import labels
from unet_ray.scores import cuts, stacks
from unet_ray.scores import totals as scores
from unet_ray.scores.overlaps import Overlaps
from unet_ray.scores.stacks import Stack
from unet_ray.scores.totals import (
    INSTANCES,
    IOU_PERCENT,
    ISBI,
    THINNED_THRESHOLDS,
    THRESHOLDS,
    class_scores,
    instance_scores,
    isbi_scores,
    overlap_tables,
)
from unet_ray.volumes.opening import open_volume

# Thresholds


def test_thresholds_are_the_sums_of_a_loop_in_java():
    expected, threshold = [], 0.0
    while threshold <= 1.0:
        expected.append(threshold)
        threshold += 0.1
    assert list(THINNED_THRESHOLDS) == expected and len(expected) == 11
    assert list(THRESHOLDS) == expected[:10]
    assert [str(t) for t in expected[3::4]] == ["0.30000000000000004", "0.7"]
    assert str(expected[7:]) == "[0.7, 0.7999999999999999, 0.8999999999999999, 0.9999999999999999]"


def test_above_a_threshold_is_cell_and_at_it_is_membrane():
    truth = np.ones((1, 1), np.uint8)
    for i, threshold in enumerate(THRESHOLDS):
        errors = dict(isbi_scores(np.full((1, 1), threshold), truth)["pixel_error"].curve)
        assert [errors[t] for t in THRESHOLDS] == [0.0] * i + [1.0] * (10 - i)


def test_single_precision_is_compared_in_double():
    # float 0.1 is slightly above double 0.1, float 0.7 slightly below double 0.7
    curve = isbi_scores(np.full((1, 1), 0.1, np.float32), np.ones((1, 1)))["pixel_error"].curve
    assert [error for _, error in curve] == [0, 0] + [1] * 8
    curve = isbi_scores(np.full((1, 1), 0.7, np.float32), np.ones((1, 1)))["pixel_error"].curve
    assert [error for _, error in curve] == [0] * 7 + [1] * 3


def test_a_threshold_on_a_stored_map_is_k_above_255_times_it():
    for k in range(256):
        map_ = np.array([[k, 255]], np.uint8)
        curve = isbi_scores(map_, np.array([[1, 0]]), ["pixel_error"])["pixel_error"].curve
        # k is the only true cell pixel: without it no pixel is correct
        assert [error < 1 for _, error in curve] == [k > 255 * t for t in THRESHOLDS]


# ISBI 2012: scores computed with the slow rules of other tests


def f1(tp, truth, predicted):
    return 2 * tp / (truth + predicted)


def slow_isbi(proposal, truth):
    """Every curve, computed one slice and one threshold at a time."""
    curves = {name: [] for name in ISBI}
    for threshold in THINNED_THRESHOLDS:
        rows = [slow_slice(p, t, threshold) for p, t in zip(proposal, truth, strict=True)]
        sums = {name: np.sum([row[name] for row in rows], axis=0) for name in list(ISBI)[:4]}
        for name in ("pixel_error", "rand_error", "rand_error_foreground"):
            curves[name].append(1 - f1(*sums[name]))
        curves["warping_error"].append(sums["warping_error"] / truth.size)
        curves["v_rand"].append(np.mean([f1(*row["v_rand"]) for row in rows]))
        curves["v_info"].append(np.mean([row["v_info"] for row in rows]))
    return {name: curve[: len(ISBI[name].thresholds)] for name, curve in curves.items()}


def slow_slice(proposal, truth, threshold):
    predicted = proposal > threshold
    segments, cells, thinned = (
        ndimage.label(truth)[0],
        ndimage.label(predicted)[0],
        slow_thin(predicted),
    )
    same = [np.equal.outer(image.ravel(), image.ravel()) for image in (segments, cells)]
    pairs = np.triu(np.ones(same[0].shape, bool), 1)
    splits, mergers, _ = slow_classify(*slow_warp(truth, proposal, threshold), truth.shape, 20)
    return {
        "pixel_error": ((predicted & truth).sum(), truth.sum(), predicted.sum()),
        "rand_error": [(pairs & mask).sum() for mask in (same[0] & same[1], *same)],
        "rand_error_foreground": foreground_pairs(segments, cells),
        "warping_error": splits + mergers,
        "v_rand": foreground_pairs(segments, thinned),
        "v_info": information(segments, thinned),
    }


def inside_of(segments, predicted):
    """Labels of both at the true cells; each predicted membrane pixel is its own segment."""
    own = np.where(
        predicted == 0,
        np.arange(predicted.size).reshape(predicted.shape) + predicted.size,
        predicted,
    )
    return segments[segments > 0], own[segments > 0]


def foreground_pairs(segments, predicted):
    same = [np.equal.outer(image, image) for image in inside_of(segments, predicted)]
    return (same[0] & same[1]).sum(), same[0].sum(), same[1].sum()


def information(segments, predicted):
    truth, prediction = inside_of(segments, predicted)

    def entropy(*images):
        shares = np.unique_counts(np.stack(images, 1) @ [1, 10**6]).counts / truth.size
        return -(shares * np.log(shares)).sum()

    zero = np.zeros_like(truth)
    h = entropy(truth, zero), entropy(prediction, zero)
    if min(h) < 1e-12:
        return 0.0
    return 2 * (sum(h) - entropy(truth, prediction)) / sum(h)


@pytest.mark.parametrize("seed", range(4))
def test_all_six_curves_match_the_rules_written_out(seed):
    proposal, truth = random_stack(seed, shape=(2, 14, 17))
    result = isbi_scores(proposal, truth)
    for name, curve in slow_isbi(proposal, truth).items():
        assert [value for _, value in result[name].curve] == pytest.approx(curve, abs=1e-12), name
        assert len(set(curve)) > 3  # otherwise the test is weak


def test_the_best_threshold_is_the_first_of_equals():
    proposal, truth = random_stack(1)
    for name, score in isbi_scores(proposal, truth).items():
        best = max if name.startswith("v_") else min
        thresholds, values = zip(*score.curve, strict=True)
        assert thresholds == ISBI[name].thresholds
        assert score.value == best(values)
        assert score.threshold == thresholds[values.index(score.value)]
    binary = isbi_scores(truth, truth)
    assert {score.threshold for score in binary.values()} == {0.0}


def test_the_value_of_each_slice_is_taken_at_the_threshold_of_the_stack():
    proposal, truth = random_stack(2)
    whole = isbi_scores(proposal, truth)
    for z in range(3):
        single = isbi_scores(proposal[z], truth[z])
        for name, score in whole.items():
            at = dict(single[name].curve)[score.threshold]
            assert score.slices[z] == pytest.approx(at, abs=1e-15)
    assert whole["v_rand"].value == pytest.approx(np.mean(whole["v_rand"].slices))
    assert whole["warping_error"].value == pytest.approx(np.mean(whole["warping_error"].slices))


def test_selected_scores_equal_those_of_all():
    proposal, truth = random_stack(3)
    together = isbi_scores(proposal, truth)
    assert list(together) == list(ISBI)
    for name, score in together.items():
        assert isbi_scores(proposal, truth, [name]) == {name: score}
    assert list(isbi_scores(proposal, truth, ["v_info", "pixel_error"])) == [
        "v_info",
        "pixel_error",
    ]


def test_slices_are_separate_images():
    # One long cell through both slices counts as two cells.
    truth = np.ones((2, 4, 4), np.uint8)
    split = truth.copy()
    split[1] = [[1, 1, 0, 1]] * 4
    both, second = isbi_scores(split, truth), isbi_scores(split[1], truth[1])
    assert both["warping_error"].value == second["warping_error"].value / 2
    assert both["v_rand"].value == pytest.approx((1 + second["v_rand"].value) / 2)
    # pairs: 120 in the first slice and 120, 48 of which are in one piece or in the wall, truth 240
    right = 120 + (28 + 6 + 6)
    assert both["rand_error"].value == pytest.approx(1 - 2 * right / (240 + right))


def test_slices_whose_truth_has_no_cell_are_left_out_of_means():
    proposal, truth = random_stack(4)
    truth[1] = False
    result = isbi_scores(proposal, truth)
    rest = isbi_scores(proposal[[0, 2]], truth[[0, 2]])
    for name in ("v_rand", "v_info", "rand_error_foreground"):
        assert result[name].value == rest[name].value
        assert math.isnan(result[name].slices[1])
        assert not math.isnan(result[name].slices[0])
    assert result["pixel_error"].value > rest["pixel_error"].value


def test_progress_is_reported():
    calls = []
    isbi_scores(*random_stack(0), ["pixel_error"], lambda *numbers: calls.append(numbers))
    assert calls == [(1, 3), (2, 3), (3, 3)]


# Objects


def compared_with_skimage(prediction, truth):
    error = adapted_rand_error(truth, prediction)[0]
    split, merge = variation_of_information(truth, prediction, ignore_labels=(0,))
    return {"adapted_rand_error": error, "voi_split": split, "voi_merge": merge}


@settings(max_examples=100)
@given(labels(most=4, width=(2, 12)))
def test_pairs_and_information_agree_with_scikit_image(images):
    truth, prediction = images
    truth[0, :2] = prediction[0, :2] = 1  # skimage divides by zero where there is no pair
    result = instance_scores(prediction, truth)
    for name, value in compared_with_skimage(prediction, truth).items():
        assert result[name].value == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("seed", range(3))
def test_larger_labels_agree_with_scikit_image(seed):
    prediction, truth = random_labels(seed, (5, 30, 30), most=60)
    result = instance_scores(prediction, truth)
    for name, value in compared_with_skimage(prediction, truth).items():
        assert result[name].value == pytest.approx(value, abs=1e-12), name


def slow_precision(prediction, truth, percent):
    """Data Science Bowl: TP / (TP + FP + FN) of the best one-to-one assignment."""
    overlap = ious(truth, prediction)
    good = np.round(overlap * 1e9) >= percent * 1e7
    tp = good[linear_sum_assignment(good, maximize=True)].sum()
    return tp / (sum(overlap.shape) - tp) if sum(overlap.shape) else math.nan


@settings(max_examples=100)
@given(labels(most=5) | st.integers(0, 999).map(random_labels))
def test_average_precision_is_that_of_the_best_assignment(images):
    truth, prediction = images
    result = instance_scores(prediction, truth, names=["ap50", "ap_mean"])
    curve = [slow_precision(prediction, truth, percent) for percent in IOU_PERCENT]
    assert result["ap50"].value == pytest.approx(curve[0], nan_ok=True)
    assert result["ap_mean"].value == pytest.approx(np.mean(curve), nan_ok=True)
    assert [v for _, v in result["ap_mean"].curve] == pytest.approx(curve, nan_ok=True)
    assert [iou for iou, _ in result["ap_mean"].curve] == [n / 100 for n in range(50, 100, 5)]


@settings(max_examples=100)
@given(labels(most=5) | st.integers(0, 999).map(random_labels))
def test_seg_is_the_mean_over_true_objects(images):
    truth, prediction = images
    values = []
    for t in np.unique(truth[truth != 0]):
        inside, counts = np.unique(prediction[truth == t], return_counts=True)
        match = [p for p, n in zip(inside, counts, strict=True) if p and 2 * n > counts.sum()]
        both = [((truth == t) & (prediction == p)).sum() for p in match]
        either = [((truth == t) | (prediction == p)).sum() for p in match]
        values.append(both[0] / either[0] if match else 0)
    score = instance_scores(prediction, truth, names=["seg"])["seg"]
    assert score.value == pytest.approx(np.mean(values) if values else math.nan, nan_ok=True)


@given(labels(), st.permutations(range(1, 4)))
def test_names_of_objects_do_not_matter(images, order):
    truth, prediction = images
    renamed = np.array([0, *order])[prediction] * (2**40 + 7)
    expected = instance_scores(prediction, truth)
    for name, score in instance_scores(renamed, truth).items():
        assert score.value == pytest.approx(expected[name].value, nan_ok=True)


@given(labels())
def test_perfect_objects(images):
    truth, _ = images
    result = {name: score.value for name, score in instance_scores(truth, truth).items()}
    if not truth.any():
        assert all(math.isnan(value) for value in result.values())
        return
    assert result["seg"] == result["ap50"] == result["ap_mean"] == 1
    assert result["voi_split"] == result["voi_merge"] == pytest.approx(0, abs=1e-12)
    if np.unique_counts(truth[truth != 0]).counts.max() > 1:
        assert result["adapted_rand_error"] == 0


def test_pooled_scores_cover_all_objects_of_all_slices():
    prediction, truth = random_labels(5)
    prediction[2:] = truth[2:]
    truth[3, 3:], prediction[3, 3:] = 0, 0
    result = instance_scores(prediction, truth, per_slice=True)
    single = [instance_scores(p, t) for p, t in zip(prediction, truth, strict=True)]
    objects = [len(np.unique(t[t > 0])) for t in truth]
    others = [len(np.unique(p[p > 0])) for p in prediction]
    voxels = [(t > 0).sum() for t in truth]
    assert len(set(objects)) > 1
    for name, score in result.items():
        assert list(score.slices) == [scores_of_slice[name].value for scores_of_slice in single]
    for name, weights in (("seg", objects), ("voi_split", voxels), ("voi_merge", voxels)):
        assert result[name].value == pytest.approx(np.average(result[name].slices, weights=weights))
        assert result[name].value != pytest.approx(np.mean(result[name].slices), abs=1e-6)
    ap = np.array(result["ap50"].slices)
    sums = np.array(objects) + others
    tp = np.rint(ap * sums / (1 + ap))  # from ap = tp / (sums - tp)
    assert result["ap50"].value == pytest.approx(tp.sum() / (sums.sum() - tp.sum()))


def test_equal_labels_in_two_slices_are_two_objects():
    # The same id in two slices: one object of six voxels, or two of four and of two.
    truth = np.array([[[1, 1, 1, 1]], [[1, 1, 0, 0]]])
    prediction = np.array([[[1, 1, 1, 1]], [[0, 0, 1, 1]]])
    assert instance_scores(prediction, truth)["seg"].value == pytest.approx(4 / 8)
    score = instance_scores(prediction, truth, per_slice=True)["seg"]
    assert score.value == pytest.approx((1 + 0) / 2)
    assert score.slices == (1, 0)


def test_selected_scores_of_objects_equal_those_of_all():
    prediction, truth = random_labels(1)
    for per_slice in (False, True):
        together = instance_scores(prediction, truth, per_slice)
        assert list(together) == list(INSTANCES)
        for name, score in together.items():
            assert instance_scores(prediction, truth, per_slice, [name]) == {name: score}


# Pieces


@pytest.fixture
def volumes(tmp_path):
    def stored(array, chunk):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr"
        zarr.create_array(path, data=array, chunks=chunk)
        return open_volume(path)

    return stored


@settings(max_examples=40)
@given(labels(most=4), st.integers(1, 60), st.booleans())
def test_scores_do_not_depend_on_the_size_of_pieces(images, voxels, per_slice):
    truth, prediction = (np.stack([image, image[:, ::-1], image]) for image in images)
    expected = instance_scores(prediction, truth, per_slice)
    classes = class_scores(overlap_tables(prediction, truth, per_slice), per_slice)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "PIECE_VOXELS", voxels)
        patch.setattr(scores, "JOINED_AT_ONCE", 2)
        assert repr(instance_scores(prediction, truth, per_slice)) == repr(expected)
        again = class_scores(overlap_tables(prediction, truth, per_slice), per_slice)
    assert repr(again) == repr(classes)


@pytest.mark.parametrize("voxels", [1, 50, 1 << 22])
@pytest.mark.parametrize("chunk", [(1, 9, 12), (4, 2, 5), (3, 9, 1)], ids=str)
def test_a_volume_gives_the_scores_of_its_array(volumes, monkeypatch, chunk, voxels):
    prediction, truth = random_labels(2)
    expected = instance_scores(prediction, truth), instance_scores(prediction, truth, True)
    first, second = volumes(prediction, chunk), volumes(truth, (2, 4, 12))
    monkeypatch.setattr(stacks, "PIECE_VOXELS", voxels)
    for mixed in ((first, second), (prediction, second), (first, truth), (Stack(first), truth)):
        assert (instance_scores(*mixed), instance_scores(*mixed, True)) == expected


@pytest.mark.parametrize("voxels", [1, 700, 1 << 22])
@pytest.mark.parametrize("chunk", [(1, 20, 24), (2, 7, 24), (3, 20, 5)], ids=str)
def test_a_volume_gives_the_membrane_scores_of_its_array(volumes, monkeypatch, chunk, voxels):
    proposal, truth = random_stack(6)
    proposal, truth = np.rint(255 * proposal).astype(np.uint8), truth.astype(np.uint8)
    expected = isbi_scores(proposal, truth)
    monkeypatch.setattr(stacks, "PIECE_VOXELS", voxels)
    first, second = volumes(proposal, chunk), volumes(truth, (3, 4, 4))
    assert isbi_scores(first, second) == isbi_scores(proposal, second) == expected


def test_progress_counts_pieces(monkeypatch):
    monkeypatch.setattr(stacks, "PIECE_VOXELS", 108)
    calls = []
    instance_scores(*random_labels(0), watch=lambda *numbers: calls.append(numbers))
    assert calls == [(n, 4) for n in range(1, 5)]


def test_tables_of_many_pieces_are_joined_in_groups(monkeypatch):
    lengths, joined = [], Overlaps.joined.__func__

    def counted(cls, tables):
        lengths.append(len(tables))
        return joined(cls, tables)

    monkeypatch.setattr(Overlaps, "joined", classmethod(counted))
    monkeypatch.setattr(stacks, "PIECE_VOXELS", 1)
    monkeypatch.setattr(scores, "JOINED_AT_ONCE", 10)
    overlap_tables(np.zeros((5, 7, 9), int), np.zeros((5, 7, 9), int))
    assert max(lengths) == 10


# Classes


@given(labels(most=4))
def test_classes_are_counted_one_by_one(images):
    truth, prediction = images
    result = class_scores(overlap_tables(prediction, truth))
    assert result["accuracy"].value == (truth == prediction).mean()
    occurring = np.union1d(truth, prediction).tolist()
    rows = []
    for k in occurring:
        tp = ((truth == k) & (prediction == k)).sum()
        fp, fn = (prediction == k).sum() - tp, (truth == k).sum() - tp
        rows.append((k, tp / (tp + fp + fn), 2 * tp / (2 * tp + fp + fn)))
    assert list(result["iou"].classes) == [(k, iou) for k, iou, _ in rows]
    assert list(result["dice"].classes) == [(k, dice) for k, _, dice in rows]
    assert result["iou"].value == pytest.approx(np.mean([iou for _, iou, _ in rows]))
    assert result["dice"].value == pytest.approx(np.mean([dice for *_, dice in rows]))


def test_a_class_missing_in_a_slice_is_left_out_of_its_mean():
    truth = np.array([[[0, 0, 1, 1]], [[0, 0, 0, 0]]])
    prediction = np.array([[[0, 1, 1, 1]], [[0, 0, 0, 0]]])
    result = class_scores(overlap_tables(prediction, truth, True), per_slice=True)
    # first slice: class 0 shares 1 of 2, class 1 shares 2 of 3; second: only class 0, all correct
    assert result["iou"].slices == pytest.approx(((1 / 2 + 2 / 3) / 2, 1))
    assert result["iou"].classes == ((0, 5 / 6), (1, 2 / 3))
    assert result["accuracy"].slices == (3 / 4, 1)
    assert result["accuracy"].value == 7 / 8


# One rule broken at a time changes the scores


def changed_by(monkeypatch, name, *, seed=0, **broken):
    proposal, truth = random_stack(seed)
    before = isbi_scores(proposal, truth, [name])[name]
    monkeypatch.setitem(scores.ISBI, name, dataclasses.replace(scores.ISBI[name], **broken))
    return before, isbi_scores(proposal, truth, [name])[name]


@pytest.mark.parametrize("name", ["pixel_error", "rand_error", "rand_error_foreground"])
def test_the_mean_over_slices_differs_from_summed_counts(monkeypatch, name):
    value = scores._mean_of(ISBI[name].value)
    before, after = changed_by(monkeypatch, name, value=value)
    assert abs(before.value - after.value) > 1e-4


def test_summed_counts_differ_from_the_mean_over_slices(monkeypatch):
    before, after = changed_by(monkeypatch, "v_rand", value=scores._pair_f)
    assert abs(before.value - after.value) > 1e-4


def test_pieces_that_touch_at_corners_are_separate_segments(monkeypatch):
    proposal, truth = random_stack(16)
    before = isbi_scores(proposal, truth)
    eight = np.ones((3, 3))
    monkeypatch.setattr(cuts, "_segments", lambda cells: ndimage.label(cells, eight)[0])
    after = isbi_scores(proposal, truth)
    for name in ("rand_error", "rand_error_foreground", "v_rand", "v_info"):
        assert abs(before[name].value - after[name].value) > 1e-3
