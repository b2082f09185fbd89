"""The lab book of affinities: a network with more outputs, and objects by a mutex watershed.

python -m tests.bench_affinities [CPU_MINUTES [SEED]] > FOLDER/affinities-SEED.json

Needs ``pip install bioimage-cpp``. Trains as `tests.bench_quality` does. The network has 8 outputs
besides the two classes: whether a voxel and the one at an offset of 1, 3, 9 or 27 voxels along y or
x are in the same cell. Their loss is that of Sørensen and Dice, added to the weighted
cross-entropy. Prints scores of the class map as ever, and those of cells by a mutex watershed (Wolf
et al. 2020): offsets of 1 attract, the others repel.
"""

import json
import sys

import numpy as np
import torch
from bioimage_cpp.segmentation import mutex_watershed
from scipy import ndimage
from torch.optim.swa_utils import AveragedModel

from tests.bench_quality import Bench, Scheduled, predict, scores_of
from unet_ray.machine import keep_freed_memory
from unet_ray.network.prediction import FINITE, Predictor
from unet_ray.network.unet import UNet
from unet_ray.scores.cuts import Slice
from unet_ray.scores.overlaps import Overlaps, foreground_information, foreground_pair_counts
from unet_ray.scores.totals import _information_f, _mean_of, _pair_f
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.tiling.tiles import TilePlan
from unet_ray.training.trainer import optimiser_for

DISTANCES = 1, 3, 9, 27
OFFSETS = [offset for n in DISTANCES for offset in ((-n, 0), (0, -n))]
STEPS = range(0, 20, 2)  # twentieths; below the threshold, a voxel is in no cell


def same_cell(targets):
    """For each offset whether both voxels are in one cell, and whether both are in the patch."""
    cells = ndimage.label(targets == 1)[0]
    same, inside = (np.zeros((len(OFFSETS), *cells.shape), np.float32) for _ in range(2))
    for number, (y, x) in enumerate(OFFSETS):
        here = cells[-y or None :, -x or None :] if (y, x) != (0, 0) else cells
        there = cells[: y or None, : x or None]
        place = (number, slice(-y or None, None), slice(-x or None, None))
        same[place], inside[place] = (here == there) & (here > 0), 1
    return same, inside


def dice_loss(share, target, inside):
    """One minus the coefficient of Sørensen and Dice, mean over the offsets, halved."""
    both = (share * target * inside).sum((0, 2, 3))
    either = ((share**2 + target**2) * inside).sum((0, 2, 3))
    return (1 - 2 * both / (either + 1e-6)).mean() / 2


class AffinityLearner(Scheduled):
    """Steps with the loss of the affinities added."""

    def _loss(self, scores, targets, weights):
        loss = super()._loss(scores[:, :2], targets, weights)
        truth = [same_cell(target.numpy()) for target in targets]
        same, inside = (torch.from_numpy(np.stack(a)) for a in zip(*truth, strict=True))
        share = scores[:, 2:].float().sigmoid()
        # Pairs in one cell, and pairs in two, since most pairs are in one.
        loss = loss + dice_loss(share, same, inside)
        return loss + dice_loss(1 - share, 1 - same, inside)


def part_of(network, channels):
    """The network with some of its outputs."""
    part = UNet(
        network.in_channels, len(channels), network.base_channels, network.depth, network.norm, 0.0
    )
    state = dict(network.state_dict())
    for name in ("head.weight", "head.bias"):
        state[name] = state[name][list(channels)]
    part.load_state_dict(state)
    return part.eval()


class Affinities(Predictor):
    """Sigmoid of each output, as probabilities of classes 1 and up."""

    def _computed(self, image, outputs, kept):
        finite = []
        scores = self._inside(self._scores(image, finite, 0, None))
        rounded = (255 * scores.sigmoid()).round().byte()[:, 1:]
        return {"probabilities": rounded.transpose(0, 1), FINITE: finite[0].byte()}


def watershed_scores(network, held_out, tta=False):
    """V_rand and V_info of cells by a mutex watershed, at the best threshold of the class map."""
    (slices,) = held_out
    shape = slices.image.shape[1:]
    core = (1, *shape[1:])
    plan = TilePlan(shape, core, network.context, core)
    classes = part_of(network, (0, 1))
    affine = part_of(network, (0, *range(2, 2 + len(OFFSETS))))
    predictor = Predictor(classes, plan, slices.intensity, "float32", "cpu", tta)
    p = np.concatenate([predict(predictor, plan, n, slices.image) for n in range(len(plan))]) / 255
    predictor, affinities = Affinities(affine, plan, slices.intensity, "float32", "cpu"), []
    for number in range(len(plan)):
        tile = plan[number]
        voxels = read_mirrored(lambda b: slices.image[(slice(None), *b.slices)], shape, tile.read)
        affinities.append(predictor(tile, voxels, ("probabilities",))["probabilities"][:, 0] / 255)
    best = {}
    for cut in (step / 20 for step in STEPS):
        pairs, bits = [], []
        for probability, share, truth in zip(p, affinities, slices.targets, strict=True):
            weights = np.concatenate([share[:2], 1 - share[2:]]).astype(np.float32)
            cells = mutex_watershed(weights, OFFSETS, 2, mask=probability > cut)
            table = Overlaps.of(Slice(probability, truth == 1).segments, cells.astype(np.int64))
            pairs.append(foreground_pair_counts(table))
            bits.append(foreground_information(table))
        scores = {"v_rand": _mean_of(_pair_f)(pairs), "v_info": _mean_of(_information_f)(bits)}
        for name, value in scores.items():
            if value > best.get(name, (0, 0))[0]:
                best[name] = (value, cut)
    return {f"mutex_{name}": round(value, 4) for name, (value, _) in best.items()}


class AffinityBench(Bench):
    """A training whose network has outputs for affinities, too."""

    def __init__(self, change, seconds, seed):
        super().__init__(change, seconds, seed)
        torch.manual_seed(seed)
        self.network = self.recipe.network(self.data.channels, 2 + len(OFFSETS))
        self.network.to(memory_format=torch.channels_last)
        optimiser = optimiser_for(self.recipe, self.network)
        self.learner = AffinityLearner(
            self.recipe, self.network, optimiser, self.learner._world, self.recipe.precision, 0.0
        )
        self.averages = {
            name: AveragedModel(self.network, avg_fn=average.avg_fn)
            for name, average in self.averages.items()
        }

    def show(self, step, used, last=False):
        model = self.averages["500"].module.eval()
        for tta in (False, True) if last else (False,):
            row = {"step": step, "cpu_minutes": round(used / 60, 1), "weights": "500", "tta": tta}
            row |= scores_of(part_of(model, (0, 1)), self.data.held_out, tta)
            print(json.dumps(row | watershed_scores(model, self.data.held_out, tta)), flush=True)
        self.network.train()


def main(minutes=8, seed=1):
    keep_freed_memory()
    torch.set_num_threads(1)
    AffinityBench("bfloat16", 60 * float(minutes), int(seed)).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
