"""Scores of a segmentation against the truth, as the reference implementations give them.

Each function says what its score means, what it does not see, how it is computed and whose
definition that is; totals.py computes several in one pass. A prediction and a truth are arrays
(y, x) or (z, y, x), or volumes; a stack larger than the memory is read by slices or by pieces.

Membranes (ISBI 2012): 0 is membrane and 1 is cell, or 255 in uint8; the prediction is the
probability of cell. Slices are 2-D images of their own. Thresholds are those of Fiji, sums of 0.1
in double precision; above a threshold is cell. Sources: Arganda-Carreras et al. 2015,
Front. Neuroanat. 9:142, and Fiji's Trainable_Segmentation, package `metrics`.

Objects: integers, 0 is background, each other number an object, connected or not. Classes:
integers, each number a class.

Every function raises InputError if the shapes differ or a number is not allowed.
"""

from __future__ import annotations

from unet_ray.scores.stacks import Scored
from unet_ray.scores.totals import (
    ClassScore as ClassScore,
)
from unet_ray.scores.totals import (
    Score as Score,
)
from unet_ray.scores.totals import (
    class_scores as class_scores,
)
from unet_ray.scores.totals import (
    instance_scores as instance_scores,
)
from unet_ray.scores.totals import (
    isbi_scores as isbi_scores,
)
from unet_ray.scores.totals import (
    overlap_tables as overlap_tables,
)


def pixel_error(prediction: Scored, truth: Scored) -> Score:
    """How badly cell pixels are found: 1 minus their F1, which is not the share of wrong pixels.

    It compares pixel by pixel, so a border moved by one pixel costs more than a gap of one pixel
    that merges two neurons; it does not see topology. 0 is best.

    Formula: 1 - F, F = 2 TP / (2 TP + FP + FN) of cell pixels summed over all slices; least over
    10 thresholds. Source: Fiji `PixelError.getPrecisionRecallStats`.
    """
    return isbi_scores(prediction, truth, ["pixel_error"])["pixel_error"]


def rand_error(prediction: Scored, truth: Scored) -> Score:
    """How often two pixels that belong together are apart, or the other way round.

    The membrane counts as one more segment, so its thickness matters a lot; it does not see
    where in a cell an error lies. 0 is best.

    Formula: 1 - F, F = 2 TP / (2 TP + FP + FN) of pixel pairs in the same 4-connected segment,
    n(n - 1)/2 per segment, summed over slices; least over 10 thresholds. Source: Fiji
    `RandError.getRandIndexStats`; Rand 1971.
    """
    return isbi_scores(prediction, truth, ["rand_error"])["rand_error"]


def rand_error_foreground(prediction: Scored, truth: Scored) -> Score:
    """As `rand_error`, looking only at pixels that are cell in the truth.

    A merger of two large cells costs much, one of two small ones little; it does not see
    membranes that are drawn where truth has membrane too. 0 is best. The U-Net paper's "Rand
    error" is, as far as can be told, this one.

    Formula: 1 - F as in `rand_error`, pairs with replacement (n * n), over true cell pixels; one
    with predicted membrane is a segment of its own. Least over 10 thresholds. Source: Fiji
    `RandError.getForegroundRestrictedRandIndexStats`.
    """
    return isbi_scores(prediction, truth, ["rand_error_foreground"])["rand_error_foreground"]


def warping_error(prediction: Scored, truth: Scored) -> Score:
    """How many pixels split or merge cells, after every shift of a border has been forgiven.

    It counts errors of topology only: a membrane in a slightly wrong place costs nothing, and a
    gap of one pixel costs one pixel. It does not see how large the merged cells are, nor cells
    that vanish: a prediction without any cell scores 0. 0 is best.

    Formula: (split pixels + merger pixels) / all pixels, after flipping simple points of the
    truth towards the prediction; least over 10 thresholds. Source: Fiji
    `WarpingError.getMinimumSplitsAndMergersErrorValue(0, 0.9, 0.1, false, 20)`; Jain et al. 2010.
    """
    return isbi_scores(prediction, truth, ["warping_error"])["warping_error"]


def v_rand(prediction: Scored, truth: Scored) -> Score:
    """As `rand_error_foreground`, after thinning the membranes: do cells stay apart and whole?

    Thick membranes cost nothing any more, only gaps and false walls do; it does not see whether
    the line runs in the middle of the membrane. 1 is best; the leaderboard's order since 2015.

    Formula: the mean over slices of F of the foreground-restricted pairs, largest over 11
    thresholds; slices whose truth has no cell are left out. Source: Fiji
    `RandError.getForegroundRestrictedRandAfterThinningStats`; Arganda-Carreras et al. 2015.
    """
    return isbi_scores(prediction, truth, ["v_rand"])["v_rand"]


def v_info(prediction: Scored, truth: Scored) -> Score:
    """How much the prediction tells about which cell a pixel belongs to, after thinning.

    Small cells count more than in `v_rand`, since information grows with the logarithm of a
    size; a slice with one cell only, on either side, carries none and scores 0. 1 is best.

    Formula: the mean over slices of F = 2 I / (H(truth) + H(prediction)), over true cell pixels,
    largest over 11 thresholds. Source: Fiji
    `VariationOfInformation.getForegroundRestrictedScoreAfterThinning`.
    """
    return isbi_scores(prediction, truth, ["v_info"])["v_info"]


def seg(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """How well each true object is covered by its prediction, on average over all true objects.

    An object counts 0 if no predicted one covers more than half of it; predicted objects that
    are in no true one cost nothing: it does not see them. 1 is best.

    Formula: the mean over true objects of |R and S| / |R or S|, with S the predicted object for
    which |R and S| > |R| / 2. Source: Cell Tracking Challenge, SEG; Maska et al. 2014.
    """
    return instance_scores(prediction, truth, per_slice, ["seg"])["seg"]


def ap50(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """The share of objects that are found, of all true and all false ones, at IoU 0.5.

    An object counts as found when it overlaps its partner by half of their union; how much
    better than that it fits is not seen. 1 is best.

    Formula: TP / (TP + FP + FN), matched one to one with IoU >= 0.5. Source: the "average
    precision" of StarDist and Cellpose (Data Science Bowl 2018).
    """
    return instance_scores(prediction, truth, per_slice, ["ap50"])["ap50"]


def ap_mean(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """As `ap50`, averaged over ever stricter demands on the overlap.

    It rewards exact outlines; it does not see which objects are missed. 1 is best.

    Formula: the mean of TP / (TP + FP + FN) over IoU >= 0.5, 0.55, ... 0.95. Source: Data Science
    Bowl 2018.
    """
    return instance_scores(prediction, truth, per_slice, ["ap_mean"])["ap_mean"]


def adapted_rand_error(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """How often two voxels of true objects that belong together are apart, or the other way.

    Large objects weigh more, with the square of their size; voxels without a true object are not
    seen. 0 is best.

    Formula: 1 - 2 sum p_ij / (sum a_i + sum b_j) of voxel pairs without replacement, over voxels
    whose truth is not 0. Source: CREMI; scikit-image `adapted_rand_error`.
    """
    return instance_scores(prediction, truth, per_slice, ["adapted_rand_error"])[
        "adapted_rand_error"
    ]


def voi_split(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """How torn the true objects are: bits needed to say which piece of an object a voxel is in.

    0 means that no true object is split. Objects that are merged are not seen; `voi_merge`
    sees them.

    Formula: H(prediction | truth) in bits, over voxels whose truth is not 0. Source: Meila 2007;
    CREMI; scikit-image `variation_of_information(..., ignore_labels=(0,))`, its first number.
    """
    return instance_scores(prediction, truth, per_slice, ["voi_split"])["voi_split"]


def voi_merge(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """How mixed the predicted objects are: bits needed to say which true object a voxel is of.

    0 means that no predicted object holds two true ones. Objects that are split are not seen;
    `voi_split` sees them.

    Formula: H(truth | prediction) in bits, over voxels whose truth is not 0. Source: as
    `voi_split`, its second number.
    """
    return instance_scores(prediction, truth, per_slice, ["voi_merge"])["voi_merge"]


def accuracy(prediction: Scored, truth: Scored) -> Score:
    """The share of voxels whose class is right. A frequent class can hide that a rare one is lost.

    Formula: correct voxels / all voxels. 1 is best.
    """
    return class_scores(overlap_tables(prediction, truth))["accuracy"]


def iou(prediction: Scored, truth: Scored) -> ClassScore:
    """The overlap of each class, as a share of all voxels that either side gives that class.

    A voxel wrong by a class counts against both classes; where the errors lie is not seen.

    Formula: TP / (TP + FP + FN) (Jaccard 1901); the mean is over the classes that occur. 1 is
    best.
    """
    found = class_scores(overlap_tables(prediction, truth))["iou"]
    return ClassScore(**vars(found))


def dice(prediction: Scored, truth: Scored) -> ClassScore:
    """As `iou`, with the overlap counted twice; of a class it is never below its IoU.

    It is the F1 score of each class; where the errors lie is not seen.

    Formula: 2 TP / (2 TP + FP + FN) (Dice 1945); the mean is over the classes that occur. 1 is
    best.
    """
    found = class_scores(overlap_tables(prediction, truth))["dice"]
    return ClassScore(**vars(found))
