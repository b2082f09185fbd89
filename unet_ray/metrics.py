"""The scores of arrays, as functions under the name that users import.

Knows nothing itself: `unet_ray.scores.metrics` computes and explains each score.
"""

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

__all__ = [
    "accuracy",
    "adapted_rand_error",
    "ap50",
    "ap_mean",
    "dice",
    "iou",
    "pixel_error",
    "rand_error",
    "rand_error_foreground",
    "seg",
    "v_info",
    "v_rand",
    "voi_merge",
    "voi_split",
    "warping_error",
]
