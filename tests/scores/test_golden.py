"""Scores against their reference implementations, also with one rule broken at a time.

Membranes: Fiji's Trainable_Segmentation. Objects: py-ctcmetrics and scikit-image. Numbers and
images are in the shared data folder; these tests are skipped without it.
"""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from scipy import ndimage
from skimage.segmentation import watershed

from unet_ray.scores import cuts, thinning, warping
from unet_ray.scores import totals as scores
from unet_ray.scores.cuts import Cut, Slice
from unet_ray.scores.evaluation import evaluate
from unet_ray.scores.metrics import seg
from unet_ray.scores.overlaps import (
    Matches,
    foreground_information,
    foreground_pair_counts,
    pair_counts,
)
from unet_ray.scores.totals import (
    THINNED_THRESHOLDS,
    THRESHOLDS,
    instance_scores,
    isbi_scores,
    overlap_tables,
)

BINARY = ("identity", "membrane_thinner", "membrane_thicker", "gaps", "blobs_and_cuts")
CASES = (*BINARY, "prob_map")
EIGHT = np.ones((3, 3))
close = {"rel": 0, "abs": 1e-9}


@pytest.fixture(scope="module")
def golden(shared_data):
    """Loads one of the files of reference numbers."""
    return lambda name: json.loads((shared_data / "golden" / f"{name}.json").read_text())["values"]


@pytest.fixture(scope="module")
def fiji(golden):
    return golden("golden_isbi_fiji")


@pytest.fixture(scope="module")
def images(shared_data):
    """Each proposal, and "labels"."""
    names = ("labels", *CASES)
    return {name: tifffile.imread(shared_data / "golden" / f"{name}.tif") for name in names}


@pytest.fixture(scope="module")
def cut(images):
    """One slice of a case at one threshold; counts are cached."""
    cache, sections = {}, {}

    def cut(case, z, threshold):
        if (case, z) not in sections:
            proposal = images[case][z].astype(float)
            sections[case, z] = Slice(proposal, images["labels"][z] > 0)
        if (case, z, threshold) not in cache:
            cache[case, z, threshold] = Cut(sections[case, z], threshold)
        return cache[case, z, threshold]

    return cut


@pytest.fixture(scope="module")
def all_scores(images):
    """All six scores of a case."""
    cache = {}

    def all_scores(case):
        if case not in cache:
            cache[case] = isbi_scores(images[case], images["labels"])
        return cache[case]

    return all_scores


# Fiji: scores


@pytest.mark.parametrize("case", BINARY)
def test_scores_of_binary_proposals(fiji, all_scores, case):
    reference, scores = fiji[case], {name: score.value for name, score in all_scores(case).items()}
    splits_mergers = reference["warping_error_splits_mergers_radius20 (th 0.5)"]
    assert scores == pytest.approx(
        {
            "pixel_error": reference["pixel_error = 1-F"],
            "rand_error": reference["rand_error_standard = 1-F"],
            "rand_error_foreground": reference["rand_error_foreground_restricted = 1-F"],
            "warping_error": splits_mergers,
            "v_rand": reference["v_rand_thinned (macro)"],
            "v_info": reference["v_info_thinned"],
        },
        **close,
    )
    # every threshold of a binary proposal is the same, but for the last rounding
    for name, score in all_scores(case).items():
        assert [value for _, value in score.curve] == pytest.approx(
            [scores[name]] * len(score.curve), **close
        )
        assert score.threshold == 0.0


# The keys of each score in Fiji's file: best value, best threshold, value at every threshold.
PROBABILITIES = {
    "pixel_error": ("pixel_error = 1-max F", "pixel_best", "pixel_F", "micro"),
    "rand_error": ("rand_error_standard = 1-max F", "rand_best", "rand_F", "micro"),
    "rand_error_foreground": (
        "rand_error_foreground_restricted = 1-max F",
        "rand_fg_best",
        "rand_fg_F",
        "micro",
    ),
    "v_rand": ("v_rand_thinned_max (macro)", "vrand_thinned_best", "vrand_thinned", "macro"),
    "v_info": ("v_info_thinned_max", "vinfo_thinned_best", "vinfo_thinned", "macro"),
}


@pytest.mark.parametrize("name", PROBABILITIES)
def test_scores_of_probabilities_at_every_threshold(fiji, all_scores, name):
    value, threshold, curve, how = PROBABILITIES[name]
    reference, score = fiji["prob_map"], all_scores("prob_map")[name]
    assert score.value == pytest.approx(reference[value], **close)
    assert score.threshold == float(reference[f"{threshold}_threshold"])
    expected = reference[f"{curve}_per_threshold ({how} over 3 slices)"]
    thresholds, values = zip(*score.curve, strict=True)
    assert list(thresholds) == [float(key) for key in expected]
    turned = [v if name.startswith("v_") else 1 - v for v in values]
    assert turned == pytest.approx(list(expected.values()), **close)


def test_the_best_threshold_of_the_warping_error_of_one_slice(fiji, images):
    score = isbi_scores(images["prob_map"][0], images["labels"][0], ["warping_error"])[
        "warping_error"
    ]
    reference = fiji["prob_map"]["warping slice 0 only"]
    assert (score.value, score.threshold) == (
        reference["warping_minimum_splits_mergers"],
        reference["warping_best_threshold"],
    )


def test_stored_files_give_the_same_scores(shared_data, all_scores):
    folder = shared_data / "golden"
    scored = evaluate(folder / "gaps.tif", folder / "labels.tif", "isbi", per_slice=True).scores
    assert scored == all_scores("gaps")


# Fiji: counts


def stats_of(fiji, case, which, z):
    """Fiji's counts by threshold: of slice z, or of the whole stack of a binary case."""
    reference = fiji[case]
    raw = reference["fiji_raw_per_slice"][z] if case == "prob_map" else reference["fiji_raw"]
    return {float(threshold): stats for threshold, stats in raw[which].items()}


def exactly(stats):
    """(in both, in truth, in prediction); Fiji's doubles may have a rounding error."""
    tp, fp, fn = (round(stats[key]) for key in ("tp", "fp", "fn"))
    for key, count in zip(("tp", "fp", "fn"), (tp, fp, fn), strict=True):
        assert abs(stats[key] - count) < 1e-3
    return tp, tp + fn, tp + fp


def check_counts(fiji, case, which, counted):
    """Compares counts by threshold, of each slice or summed over all."""
    parts = [[0], [1], [2]] if case == "prob_map" else [[0, 1, 2]]
    for slices in parts:
        for threshold, stats in stats_of(fiji, case, which, slices[0]).items():
            counts = [counted(case, z, threshold) for z in slices]
            assert tuple(map(sum, zip(*counts, strict=True))) == exactly(stats)


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_counted_as_in_fiji(fiji, cut, case):
    def counted(*where):
        tp, fp, fn = cut(*where).pixels()
        return tp, tp + fn, tp + fp

    check_counts(fiji, case, "pixel_getPrecisionRecallStats", counted)


@pytest.mark.parametrize("case", CASES)
def test_pairs_are_counted_as_in_fiji(fiji, cut, case):
    check_counts(
        fiji, case, "rand_getRandIndexStats", lambda *where: pair_counts(cut(*where).overlaps)
    )


@pytest.mark.parametrize("case", CASES)
def test_foreground_pairs_are_counted_as_in_fiji(fiji, cut, case):
    check_counts(
        fiji,
        case,
        "rand_getForegroundRestrictedRandIndexStats",
        lambda *where: foreground_pair_counts(cut(*where).overlaps),
    )


@pytest.mark.parametrize("case", CASES)
def test_pairs_after_thinning_are_counted_as_in_fiji(fiji, cut, case):
    check_counts(
        fiji,
        case,
        "rand_getForegroundRestrictedRandAfterThinningStats_perSliceAverage_true",
        lambda *where: foreground_pair_counts(cut(*where).thinned),
    )


def information_f(table):
    return scores._information_f([foreground_information(table)])


def test_information_of_each_slice_at_each_threshold(fiji, cut):
    for z in range(3):
        which = "vi_getForegroundRestrictedScoreAfterThinning"
        for threshold, value in stats_of(fiji, "prob_map", which, z).items():
            thinned = cut("prob_map", z, threshold).thinned
            assert information_f(thinned) == pytest.approx(value, **close)


@pytest.mark.parametrize("case", BINARY)
def test_information_without_thinning(fiji, cut, case):
    value = np.mean([information_f(cut(case, z, 0.0).overlaps) for z in range(3)])
    reference = fiji[case]["v_info_foreground_restricted_no_thinning"]
    assert value == pytest.approx(reference, **close)


@pytest.mark.parametrize("case", BINARY)
def test_warping_is_exact_to_the_pixel(fiji, images, cut, case):
    mismatches = [cut(case, z, 0.5).mismatches for z in range(3)]
    pixels = images["labels"].size
    reference = fiji[case]
    assert sum(map(sum, mismatches)) == reference["warping_error_all_mismatches (th 0.5)"] * pixels
    topology = sum(counts.splits + counts.mergers for counts in mismatches)
    assert topology == reference["warping_error_splits_mergers_radius20 (th 0.5)"] * pixels


def test_warping_is_exact_to_the_pixel_at_every_threshold(fiji, images, cut):
    reference, pixels = fiji["prob_map"]["warping slice 0 only"], images["labels"][0].size
    everything = reference["warping_classic_all_mismatches_per_threshold"]
    topology = reference["warping_splits_mergers_radius20_per_threshold"]
    assert list(map(float, everything)) == list(map(float, topology)) == list(THRESHOLDS)
    for key in everything:
        mismatches = cut("prob_map", 0, float(key)).mismatches
        assert sum(mismatches) == everything[key] * pixels
        assert mismatches.splits + mismatches.mergers == topology[key] * pixels


# py-ctcmetrics: SEG

SEQUENCES = ("DIC-C2DH-HeLa", "PhC-C2DH-U373")
RESULTS = ("ST", "identity", "eroded4", "split_halves", "drop_every_third")


@pytest.fixture(scope="module")
def sequence(shared_data):
    """Folders of results and of truth."""

    def sequence(name, result):
        stored = {"ST": shared_data / "ctc" / name / "01_ST" / "SEG"}
        made = shared_data / "golden" / "ctc_results" / name / f"01_{result}"
        return stored.get(result, made), shared_data / "ctc" / name / "01_GT" / "SEG"

    return sequence


def stack_of(folder):
    return np.stack([tifffile.imread(path) for path in sorted(folder.glob("*.tif"))])


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("name", SEQUENCES)
def test_seg_of_a_sequence_and_of_each_frame(golden, sequence, name, result):
    reference = golden("golden_ctc_seg")[f"{name}/01/{result}"]
    folders = sequence(name, result)
    score = evaluate(*folders, "instances", per_slice=True).scores["seg"]
    assert score.value == pytest.approx(reference["SEG"], **close)
    frames = list(reference["frames"].values())
    expected = [sum(frame["iou"]) / frame["n_ref"] for frame in frames]
    assert list(score.slices) == pytest.approx(expected, **close)
    for table, frame in zip(overlap_tables(*map(stack_of, folders), True), frames, strict=True):
        objects = Matches.of(table)
        assert (objects.truths, len(objects.covered())) == (frame["n_ref"], frame["n_matched"])
        assert sorted(objects.covered()) == pytest.approx(sorted(frame["iou"]), **close)


# scikit-image: pairs and information of volumes


def zero_boundary(labels):
    """Neighbours as `numpy.roll` gives them: the last voxel's is the first."""
    neighbours = [np.roll(labels, -1, axis) for axis in (1, 2)]
    return np.where((labels == neighbours[0]) & (labels == neighbours[1]), labels, 0)


def split_z(labels):
    z = np.arange(len(labels))[:, None, None]
    return np.where(labels > 0, 2 * labels - (z < len(labels) // 2), 0)


CHANGES = {
    "identity": lambda labels: labels,
    "merge_pairs: (l+1)//2": lambda labels: (labels + 1) // 2,
    "split_z: l>0 -> 2l-(z<Z//2)": split_z,
    "roll_x3: np.roll(l,3,axis=2)": lambda labels: np.roll(labels, 3, axis=2),
    "all_one: (l>0)": lambda labels: labels > 0,
    "zero_boundary: 0 where l differs from its +x or +y neighbour": zero_boundary,
}
VOLUMES = {
    "fib25_crop": "fib25_crop/labels.tif",
    "ovule_crop": "ovule_crop/labels.tif",
    "stardist": "stardist/mask3d.tif",
}


@pytest.mark.parametrize("volume", VOLUMES)
def test_pairs_and_information_of_volumes(shared_data, golden, volume):
    labels = tifffile.imread(shared_data / VOLUMES[volume]).astype(np.int64)
    reference = golden("golden_3d_skimage")[volume]
    assert set(reference) == set(CHANGES)
    names = ["adapted_rand_error", "voi_split", "voi_merge"]
    for change, expected in reference.items():
        result = instance_scores(CHANGES[change](labels), labels, names=names)
        error = expected["adapted_rand_error(l,p) [error,precision,recall]"][0]
        information = expected["variation_of_information(l,p,ignore_labels=(0,))"]
        values = [result[name].value for name in names]
        assert values == pytest.approx([error, *information], **close), change


@pytest.mark.parametrize("case", BINARY)
def test_pairs_and_information_of_slices(fiji, images, case):
    cells, truth = (
        np.stack([ndimage.label(plane)[0] for plane in images[name] > 0])
        for name in (case, "labels")
    )
    result = instance_scores(cells, truth, per_slice=True)
    reference = fiji[case]["skimage_0.26.0 (4-connected labels of each slice)"]
    errors = reference["skimage_adapted_rand_error(true,test) per slice"]
    information = reference["skimage_variation_of_information(ignore_labels=(0,)) per slice"]
    expected = {
        "adapted_rand_error": [error for error, _, _ in errors],
        "voi_split": [split for split, _ in information],
        "voi_merge": [merge for _, merge in information],
    }
    for name, values in expected.items():
        assert list(result[name].slices) == pytest.approx(values, **close)


# One rule broken at a time: each must change a golden value. The tests above show that the correct
# rules reproduce these values; a rule whose break changes nothing would be untested.


def same_at_corners(cells):
    return ndimage.label(cells, EIGHT)


def labels_by_skimage(cells):
    """Thinning as scikit-image does it: another order of flooding."""
    return watershed(~cells, ndimage.label(cells)[0], connectivity=1, watershed_line=True)


def transposed_thin(cells):
    return thin(cells.T).T


def transposed_warp(truth, proposal, threshold):
    """Ties by y, then x."""
    warped, left = warp(truth.T, proposal.T, threshold)
    return warped.T.copy(), left[:, ::-1].copy()


def warp_regardless_of_doubt(truth, proposal, threshold):
    """Mismatches in the order of x and y only."""
    return warp(truth, (proposal > threshold).astype(float), threshold)


def unwarped(truth, proposal, threshold):
    return truth, np.argwhere(truth != (proposal > threshold))


def with_radius(radius):
    return lambda warped, left: classify(warped, left, radius)


thin, warp, classify = thinning.thin, warping.warp, warping.classify
four = SimpleNamespace(label=same_at_corners)

# Each broken rule: the patched object, the case, and the scores that must change.
BROKEN = {
    "segments 8-connected": (
        (cuts, "_segments", lambda cells: same_at_corners(cells)[0]),
        "membrane_thinner",
        ["rand_error", "rand_error_foreground", "v_rand", "v_info"],
    ),
    "thinned segments 8-connected": (
        (thinning, "ndimage", four),
        "membrane_thinner",
        ["v_rand", "v_info"],
    ),
    "warped cells 8-connected": ((warping, "ndimage", four), "gaps", ["warping_error"]),
    "simple points of 8-connected cells": (
        (warping, "SIMPLE", warping.SIMPLE[::-1].copy()),
        "gaps",
        ["warping_error"],
    ),
    "no thinning": (
        (cuts, "thin", lambda cells: ndimage.label(cells)[0]),
        "membrane_thicker",
        ["v_rand", "v_info"],
    ),
    "thinning scans y before x": (
        (cuts, "thin", transposed_thin),
        "membrane_thicker",
        ["v_rand", "v_info"],
    ),
    "thinning of scikit-image": (
        (cuts, "thin", labels_by_skimage),
        "membrane_thicker",
        ["v_rand", "v_info"],
    ),
    "warping takes y before x": (
        (cuts, "warp", transposed_warp),
        "membrane_thicker",
        ["warping_error"],
    ),
    "warping does not begin with the surest": (
        (cuts, "warp", warp_regardless_of_doubt),
        "prob_map",
        ["warping_error"],
    ),
    "no warping": ((cuts, "warp", unwarped), "gaps", ["warping_error"]),
    "splits are detected in the whole slice": (
        (cuts, "classify", with_radius(10**6)),
        "membrane_thicker",
        ["warping_error"],
    ),
    "splits are detected in a small window": (
        (cuts, "classify", with_radius(2)),
        "membrane_thicker",
        ["warping_error"],
    ),
}
# As above, for rules in the table of scores.
MEASURES = {
    "mean over slices": ("pixel_error", {"value": scores._mean_of(scores._pixel_error)}),
    "mean over slices, pairs": ("rand_error", {"value": scores._mean_of(scores._pair_error)}),
    "mean over slices, foreground": (
        "rand_error_foreground",
        {"value": scores._mean_of(scores._pair_error)},
    ),
    "sum over slices": ("v_rand", {"value": scores._pair_f}),
    "membrane is a segment": ("v_rand", {"count": lambda cut: pair_counts(cut.thinned)}),
    "membrane is no segment": (
        "rand_error",
        {"count": lambda cut: foreground_pair_counts(cut.overlaps)},
    ),
    "predicted membrane is one segment": (
        "rand_error_foreground",
        {"count": lambda cut: pair_counts(cut.overlaps.where(cut.overlaps.truth != 0))},
    ),
    "every mismatch counts": (
        "warping_error",
        {"count": lambda cut: (sum(cut.mismatches), cut.size)},
    ),
    "the last threshold is the best": ("v_info", {"best": lambda values: values[-1]}),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_changes_its_scores(monkeypatch, images, all_scores, rule):
    where, case, names = BROKEN[rule]
    right = all_scores(case)
    monkeypatch.setattr(*where)
    wrong = isbi_scores(images[case], images["labels"], names)
    for name in names:
        assert abs(wrong[name].value - right[name].value) > 1e-6


@pytest.mark.parametrize("rule", MEASURES)
def test_a_broken_sum_changes_its_score(monkeypatch, images, all_scores, rule):
    name, parts = MEASURES[rule]
    cases = ("membrane_thicker", "prob_map")
    right = [all_scores(case)[name].value for case in cases]
    monkeypatch.setitem(scores.ISBI, name, dataclasses.replace(scores.ISBI[name], **parts))
    wrong = [isbi_scores(images[case], images["labels"], [name])[name].value for case in cases]
    assert np.abs(np.subtract(wrong, right)).max() > 1e-6


@pytest.mark.parametrize("name", scores.ISBI)
def test_a_pixel_at_the_threshold_is_not_above_it(images, all_scores, name):
    # v >= threshold is the same as: the next larger number > threshold
    nudged = np.minimum(np.nextafter(images["gaps"].astype(float), 2), 1)
    first = isbi_scores(nudged, images["labels"], [name])[name].curve[0][1]
    assert abs(first - all_scores("gaps")[name].curve[0][1]) > 1e-6


@pytest.mark.parametrize("name", SEQUENCES)
def test_seg_is_not_the_mean_of_the_frames(golden, sequence, name):
    reference = golden("golden_ctc_seg")[f"{name}/01/eroded4"]["SEG"]
    score = seg(*map(stack_of, sequence(name, "eroded4")), per_slice=True)
    assert abs(np.mean(score.slices) - reference) > 1e-4
    # a sequence is not a volume either, in which equal labels of two frames are one object
    whole = seg(*map(stack_of, sequence(name, "eroded4")))
    assert abs(whole.value - reference) > 1e-4


def test_half_of_an_object_does_not_cover_it():
    # No golden object is covered by exactly a half: two pixels of four, SEG is 0 and not 1/2.
    truth, prediction = np.array([[1, 1, 1, 1]]), np.array([[1, 1, 0, 0]])
    assert seg(prediction, truth).value == 0
    prediction[0, 2] = 1
    assert seg(prediction, truth).value == 3 / 4


def test_thresholds_equal_those_of_fiji(fiji):
    reference = fiji["prob_map"]
    assert [float(t) for t in reference["pixel_F_per_threshold (micro over 3 slices)"]] == list(
        THRESHOLDS
    )
    thinned = reference["vrand_thinned_per_threshold (macro over 3 slices)"]
    assert [float(t) for t in thinned] == list(THINNED_THRESHOLDS)
