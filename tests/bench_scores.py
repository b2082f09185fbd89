"""How long scores take, on one core, beside scikit-image: python tests/bench_scores.py."""

import os
import time

import numpy as np
from scipy import ndimage
from skimage.metrics import adapted_rand_error, variation_of_information
from skimage.segmentation import watershed

from unet_ray import make_phantom
from unet_ray.scores.thinning import thin
from unet_ray.scores.totals import ISBI, instance_scores, isbi_scores

SHAPE = (30, 512, 512)


def seconds(function, *args):
    """Time of one call, and what it gave."""
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def proposal_of(truth):
    """A probability of cell that is wrong in places at every threshold."""
    rng = np.random.default_rng(0)
    blurred = ndimage.gaussian_filter(truth.astype(np.float32), (0, 1.5, 1.5))
    noise = ndimage.gaussian_filter(rng.standard_normal(truth.shape), (0, 2, 2))
    return np.clip(blurred + 0.25 * noise / noise.std(), 0, 1).astype(np.float32)


def main():
    """Prints a table; compiled loops are warmed up first."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    truth = make_phantom(SHAPE, seed=0).classes > 0
    proposal = proposal_of(truth)
    isbi_scores(proposal[:1], truth[:1])
    print(f"ISBI 2012, {' x '.join(map(str, SHAPE))}, all thresholds, one core")
    took, scores = seconds(isbi_scores, proposal, truth)
    print(f"  all six scores         {took:7.1f} s   (wanted: under 60)")
    for name in ISBI:
        alone, _ = seconds(isbi_scores, proposal, truth, [name])
        print(f"  {name:22} {alone:7.1f} s   value {scores[name].value:.4f}")
    cells = proposal > 0.5
    ours, _ = seconds(lambda: [thin(plane) for plane in cells])
    line, _ = seconds(lambda: [_watershed(plane) for plane in cells])
    print(f"thinning at one threshold: {ours:.2f} s, skimage watershed {line:.2f} s: ", end="")
    print(f"{line / ours:.1f} times faster")
    labels = ndimage.label(truth)[0]
    found = ndimage.label(cells)[0]
    ours, _ = seconds(instance_scores, found, labels)
    theirs, _ = seconds(_skimage, labels, found)
    print(f"objects: all six scores {ours:.2f} s, two of them in skimage {theirs:.2f} s: ", end="")
    print(f"{theirs / ours:.1f} times faster")


def _watershed(cells):
    """Nearly the same lines (not exactly: another order of flooding)."""
    return watershed(~cells, ndimage.label(cells)[0], connectivity=1, watershed_line=True)


def _skimage(labels, found):
    adapted_rand_error(labels, found)
    variation_of_information(labels, found, ignore_labels=(0,))


if __name__ == "__main__":
    main()
