"""Scores of a segmentation against the ground truth, equal to their reference implementations.

Each function documents what the score measures, what it ignores, its formula and its source.
totals.py computes several scores in one pass. Prediction and truth are arrays (y, x) or (z, y, x),
or volumes. Stacks that exceed the memory are read slice by slice or piece by piece.

Membranes (ISBI 2012): in the truth 0 is membrane and 1 is cell, or 255 in uint8. The prediction is
the probability of cell. Each slice is scored as a separate 2-D image. Pixels above the threshold
are cell. The thresholds are Fiji's: 0.1 added repeatedly in double precision. Sources:
Arganda-Carreras et al. 2015, Front. Neuroanat. 9:142, and Fiji's Trainable_Segmentation, package
`metrics`.

Objects: integer labels. 0 is background; every other label is one object, connected or not.
Classes: integers, one per class.

Every function raises InputError if the shapes differ or a value is not allowed.
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
    """1 minus the F1 score of the cell pixels; not the fraction of wrong pixels.

    Pixels are compared one by one, so topology is ignored. Moving a border by one pixel costs more
    than a gap of one pixel that merges two neurons. 0 is best.

    Formula: 1 - F, F = 2 TP / (2 TP + FP + FN) of cell pixels summed over all slices; minimum over
    10 thresholds. Source: Fiji `PixelError.getPrecisionRecallStats`.
    """
    return isbi_scores(prediction, truth, ["pixel_error"])["pixel_error"]


def rand_error(prediction: Scored, truth: Scored) -> Score:
    """1 minus the F1 score of pixel pairs that belong to the same segment.

    All membrane counts as one more segment, so its thickness matters a lot. The position of an
    error within a cell is ignored. 0 is best.

    Formula: 1 - F, F = 2 TP / (2 TP + FP + FN) of pixel pairs in the same 4-connected segment,
    n(n - 1)/2 per segment, summed over slices; minimum over 10 thresholds. Source: Fiji
    `RandError.getRandIndexStats`; Rand 1971.
    """
    return isbi_scores(prediction, truth, ["rand_error"])["rand_error"]


def rand_error_foreground(prediction: Scored, truth: Scored) -> Score:
    """`rand_error` restricted to pixels that are cell in the truth.

    Merging two large cells costs more than merging two small ones. Membrane predicted where the
    truth has membrane is ignored. 0 is best. This is most likely the "Rand error" of the U-Net
    paper.

    Formula: 1 - F as in `rand_error`, pairs with replacement (n * n), over true cell pixels. Each
    of them that is predicted as membrane is its own segment. Minimum over 10 thresholds. Source:
    Fiji `RandError.getForegroundRestrictedRandIndexStats`.
    """
    return isbi_scores(prediction, truth, ["rand_error_foreground"])["rand_error_foreground"]


def warping_error(prediction: Scored, truth: Scored) -> Score:
    """The fraction of pixels that split or merge cells; shifts of a border are free.

    Only errors of topology count: a shifted membrane costs nothing, a gap of one pixel costs one
    pixel. The size of merged cells is ignored, and so are cells that vanish: a prediction without
    any cell scores 0. 0 is best.

    Formula: (split pixels + merger pixels) / all pixels, after flipping simple points of the
    truth towards the prediction; minimum over 10 thresholds. Source: Fiji
    `WarpingError.getMinimumSplitsAndMergersErrorValue(0, 0.9, 0.1, false, 20)`; Jain et al. 2010.
    """
    return isbi_scores(prediction, truth, ["warping_error"])["warping_error"]


def v_rand(prediction: Scored, truth: Scored) -> Score:
    """The F1 score of pixel pairs within true cells, after thinning the membranes.

    Thick membranes are free; only gaps and false walls cost. The position of the thinned line
    within the membrane is ignored. 1 is best. It has ranked the leaderboard since 2015.

    Formula: the mean over slices of F of the foreground-restricted pairs, maximum over 11
    thresholds. Slices whose truth has no cell are skipped. Source: Fiji
    `RandError.getForegroundRestrictedRandAfterThinningStats`; Arganda-Carreras et al. 2015.
    """
    return isbi_scores(prediction, truth, ["v_rand"])["v_rand"]


def v_info(prediction: Scored, truth: Scored) -> Score:
    """How much information prediction and truth share about the cell of a pixel, after thinning.

    Small cells weigh more than in `v_rand`, because information grows with the logarithm of the
    size. A slice with one cell, in truth or prediction, carries no information and scores 0.
    1 is best.

    Formula: the mean over slices of F = 2 I / (H(truth) + H(prediction)), over true cell pixels,
    maximum over 11 thresholds. Source: Fiji
    `VariationOfInformation.getForegroundRestrictedScoreAfterThinning`.
    """
    return isbi_scores(prediction, truth, ["v_info"])["v_info"]


def seg(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """The overlap (IoU) of each true object with its predicted object, averaged over true objects.

    An object scores 0 if no predicted object covers more than half of it. Predicted objects
    without a true one are ignored. 1 is best.

    Formula: the mean over true objects of |R and S| / |R or S|, with S the predicted object for
    which |R and S| > |R| / 2. Source: Cell Tracking Challenge, SEG; Maska et al. 2014.
    """
    return instance_scores(prediction, truth, per_slice, ["seg"])["seg"]


def ap50(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """The fraction of matched objects among all true and all false objects, at IoU 0.5.

    An object is matched if it overlaps its partner by at least half of their union. A better fit
    does not raise the score. 1 is best.

    Formula: TP / (TP + FP + FN), matched one to one with IoU >= 0.5. Source: the "average
    precision" of StarDist and Cellpose (Data Science Bowl 2018).
    """
    return instance_scores(prediction, truth, per_slice, ["ap50"])["ap50"]


def ap_mean(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """`ap50` averaged over IoU thresholds from 0.5 to 0.95.

    It rewards exact outlines. It does not show which objects are missed. 1 is best.

    Formula: the mean of TP / (TP + FP + FN) over IoU >= 0.5, 0.55, ... 0.95. Source: Data Science
    Bowl 2018.
    """
    return instance_scores(prediction, truth, per_slice, ["ap_mean"])["ap_mean"]


def adapted_rand_error(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """1 minus the F1 score of voxel pairs that belong to the same object.

    An object weighs with the square of its size. Voxels that are background in the truth are
    ignored. 0 is best.

    Formula: 1 - 2 sum p_ij / (sum a_i + sum b_j) of voxel pairs without replacement, over voxels
    whose truth is not 0. Source: CREMI; scikit-image `adapted_rand_error`.
    """
    return instance_scores(prediction, truth, per_slice, ["adapted_rand_error"])[
        "adapted_rand_error"
    ]


def voi_split(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """Over-segmentation: bits needed to name a voxel's predicted object, given its true one.

    0 means that no true object is split. Mergers are ignored; `voi_merge` measures them.

    Formula: H(prediction | truth) in bits, over voxels whose truth is not 0. Source: Meila 2007;
    CREMI; scikit-image `variation_of_information(..., ignore_labels=(0,))`, its first number.
    """
    return instance_scores(prediction, truth, per_slice, ["voi_split"])["voi_split"]


def voi_merge(prediction: Scored, truth: Scored, per_slice: bool = False) -> Score:
    """Under-segmentation: bits needed to name a voxel's true object, given its predicted one.

    0 means that no predicted object merges two true ones. Splits are ignored; `voi_split`
    measures them.

    Formula: H(truth | prediction) in bits, over voxels whose truth is not 0. Source: as
    `voi_split`, its second number.
    """
    return instance_scores(prediction, truth, per_slice, ["voi_merge"])["voi_merge"]


def accuracy(prediction: Scored, truth: Scored) -> Score:
    """The fraction of voxels with the right class.

    A frequent class can hide the loss of a rare one.

    Formula: correct voxels / all voxels. 1 is best.
    """
    return class_scores(overlap_tables(prediction, truth))["accuracy"]


def iou(prediction: Scored, truth: Scored) -> ClassScore:
    """The intersection over union of each class.

    A voxel of the wrong class counts against both classes. The position of errors is ignored.

    Formula: TP / (TP + FP + FN) (Jaccard 1901); the mean is over the classes that occur. 1 is
    best.
    """
    score = class_scores(overlap_tables(prediction, truth))["iou"]
    return ClassScore(**vars(score))


def dice(prediction: Scored, truth: Scored) -> ClassScore:
    """The F1 score of each class; never below its `iou`.

    The position of errors is ignored.

    Formula: 2 TP / (2 TP + FP + FN) (Dice 1945); the mean is over the classes that occur. 1 is
    best.
    """
    score = class_scores(overlap_tables(prediction, truth))["dice"]
    return ClassScore(**vars(score))
