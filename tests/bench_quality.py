"""The lab book of the default recipe: one change at a time, scored on held-out slices.

python -m tests.bench_quality CHANGE [CPU_MINUTES [SEED]] > FOLDER/CHANGE-SEED.json
python -m tests.bench_quality table FOLDER

CHANGE is a key of `CHANGES`, or several joined by +; ``none`` is the recipe without any. Reads ISBI
2012 from ../shared/data. Training stops after the CPU time of this process, so that other programs
on the machine do not matter. After each fifth of the time it prints a line of JSON for each kind of
weights: the last ones, and averages over about 500 and 2,000 steps. At the end there are also the
scores of the mean over the 8 symmetries of the square.
"""

import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch.optim.swa_utils import AveragedModel

from tests.helper import load_training_data
from unet_ray.machine import keep_freed_memory
from unet_ray.network.prediction import Predictor
from unet_ray.scores.totals import isbi_scores
from unet_ray.tiling.mirror import read_mirrored
from unet_ray.tiling.tiles import TilePlan
from unet_ray.training import patches
from unet_ray.training.augment import Deformation, change_grey, draw_deformation
from unet_ray.training.patches import Sampler, ahead, sample_slots
from unet_ray.training.recipes import Recipe
from unet_ray.training.trainer import Learner, World, optimiser_for
from unet_ray.training.weights import weight_map

STACK = Path(__file__).parents[2] / "shared" / "data" / "isbi2012"
HELD_OUT = "9:12,21:24"  # three slices of each half of the stack: see its slices.json
SCORES = ("pixel_error", "rand_error_foreground", "v_rand", "v_info")
COLUMNS = {
    "pixel error": "pixel_error",
    "Rand error": "rand_error_foreground",
    "V_rand": "v_rand",
    "V_info": "v_info",
    "accuracy at the best threshold": "accuracy",
    "accuracy at 0.5": "at_half",
}
AVERAGES = {"500": 500, "2000": 2000}  # steps

# Fields of `Recipe`, or of what this file changes besides (`OURS`).
OURS = "schedule", "reduction", "balance", "slices", "deep", "grey", "zoom", "exact", "as_stored"
CHANGES = {
    "none": {},
    "bfloat16": {"precision": "bfloat16"},
    "channels-8": {"base_channels": 8},
    "channels-32": {"base_channels": 32},
    "channels-64": {"base_channels": 64},
    "depth-3": {"depth": 3},
    "patch-284": {"patch": (284, 284)},
    "patch-572": {"patch": (572, 572)},
    "batch-4": {"batch": 4},
    "elastic-0": {"elastic": 0.0},
    "elastic-10": {"elastic": 10.0},
    "elastic-20": {"elastic": 20.0},
    "elastic-30": {"elastic": 30.0},
    "dropout-0.2": {"dropout": 0.2},
    "rate-0.002": {"learning_rate": 2e-3},
    "rate-0.0005": {"learning_rate": 5e-4},
    "w0-0": {"w0": 0.0},
    "w0-5": {"w0": 5.0},
    "cosine": {"schedule": "cosine"},
    "unbalanced": {"balance": 0.0},
    "half-balanced": {"balance": 0.5},
    "unweighted": {"balance": 0.0, "w0": 0.0},
    "no-blur-noise": {"degrade": 0.0},
    "blur-noise-2": {"degrade": 2.0},
    "slices-3": {"slices": 1},
    "slices-5": {"slices": 2},
    "by-weight": {"reduction": "weight"},
    "deep": {"deep": 2},
    "grey-0.4": {"grey": 0.4},
    "zoom-1.25": {"zoom": 1.25},
    "exact-0.5": {"exact": 0.5},
    "exact-0.8": {"exact": 0.8},
    "as-stored": {"as_stored": 0.0},
    "as-stored-late": {"as_stored": 0.6},
    "tilted": {"orientation": "upright"},
    "tilted-exact": {"orientation": "upright", "exact": 0.5},
}


class Deep(torch.nn.Module):
    """Scores of coarser levels of the expanding path, too: deep supervision (Lee et al. 2015).

    Args:
        network: the network; forward hooks keep the features of the levels.
        levels: number of coarser levels.
    """

    def __init__(self, network, levels):
        super().__init__()
        self.features, width = {}, network.base_channels
        self.heads = torch.nn.ModuleList(
            torch.nn.Conv2d(width << level, network.classes, 1) for level in range(1, levels + 1)
        )
        for level in range(1, levels + 1):
            network.join[level][-1].register_forward_hook(partial(self.keep, level))

    def keep(self, level, layer, given, features):
        self.features[level] = features

    def scores(self, extents):
        """Scores of each level at full resolution, cut to `extents`, with a weight for each."""
        for level, head in enumerate(self.heads, start=1):
            scale = 2**level
            scores = torch.nn.functional.interpolate(
                head(self.features[level].float()), scale_factor=scale, mode="bilinear"
            )
            for axis, extent in zip((2, 3), extents, strict=True):
                scores = scores.narrow(axis, (scores.shape[axis] - extent) // 2, extent)
            yield scores, 1 / scale


class Scheduled(Learner):
    """Steps with another schedule of the learning rate, or another reduction of the loss."""

    schedule, reduction, deep = "", "", None

    def _loss(self, scores, targets, weights):
        loss = super()._loss(scores, targets, weights)
        for coarser, share in self.deep.scores(targets.shape[1:]) if self.deep else ():
            loss = loss + share * super()._loss(coarser, targets, weights)
        return loss

    def step(self, samples, number, progress):
        if self.schedule == "cosine":
            # `Learner` computes (1 - progress) ** decay; this progress gives a half cosine.
            wave = (1 + np.cos(np.pi * progress)) / 2
            progress = 1 - wave ** (1 / self._recipe.decay)
        if self.reduction == "weight":
            samples = [replace(s, weights=s.weights / s.weights.mean()) for s in samples]
        return super().step(samples, number, progress)


class Bench:
    """One training with scores on held-out slices."""

    def __init__(self, change, seconds, seed):
        settings = {"base_channels": 16, "precision": "float32", "patch": (380, 380)}
        settings |= {"val": HELD_OUT, "steps": 10**6, "seed": seed, "orientation": "any"}
        fields = {k: v for name in change.split("+") for k, v in CHANGES[name].items()}
        ours = {name: fields.pop(name, None) for name in OURS}
        self.recipe, self.seconds = Recipe.of("default", **settings | fields), seconds
        self.data = loaded(self.recipe, ours["slices"] or 0, ours["balance"])
        if ours["grey"]:
            patches.change_grey = partial(change_grey, strength=ours["grey"])
        if ours["zoom"]:
            patches.draw_deformation = partial(zoomed, ours["zoom"])
        if ours["exact"]:
            patches.draw_deformation = partial(sometimes_exact, ours["exact"])
        self.progress = 0.0
        if ours["as_stored"] is not None:
            patches.draw_deformation = partial(self.as_stored_after, ours["as_stored"])
        self.sampler = Sampler(self.data, self.recipe)
        torch.manual_seed(seed)
        self.network = self.recipe.network(self.data.channels, 2)
        self.network.to(memory_format=torch.channels_last)
        world = World(0, 1, torch.device("cpu"), torch.get_num_threads())
        optimiser = optimiser_for(self.recipe, self.network)
        precision = self.recipe.precision
        self.learner = Scheduled(self.recipe, self.network, optimiser, world, precision, 0.0)
        self.learner.schedule, self.learner.reduction = ours["schedule"], ours["reduction"]
        if ours["deep"]:
            self.learner.deep = Deep(self.network, ours["deep"])
            optimiser.add_param_group({"params": [*self.learner.deep.parameters()]})
        self.averages = {
            name: AveragedModel(self.network, avg_fn=averaging(steps))
            for name, steps in AVERAGES.items()
        }

    def train(self):
        slots = sample_slots(0, 0, self.recipe.batch)
        samples, step, used, fifth = ahead(self.sampler.__getitem__, slots), 0, 0.0, 0
        while used < self.seconds:
            start = time.process_time()
            batch = list(islice(samples, self.recipe.batch))
            self.progress = min(1.0, used / self.seconds)
            self.learner.step(batch, step, self.progress)
            for average in self.averages.values():
                average.update_parameters(self.network)
            step, used = step + 1, used + time.process_time() - start
            if int(5 * used / self.seconds) > fifth and used < self.seconds:
                fifth = int(5 * used / self.seconds)
                self.show(step, used)
        self.show(step, used, last=True)

    def as_stored_after(self, start, shape, rng, elastic, angle, flips):
        """A deformation that neither rotates nor flips after a share of the time."""
        free = self.progress < start
        return draw_deformation(shape, rng, elastic, angle * free, (free, free))

    def show(self, step, used, last=False):
        """Prints the scores of each way of predicting."""
        for name, network in [("last", self.network), *self.averages.items()]:
            model = getattr(network, "module", network).eval()
            for tta in (False, True) if last else (False,):
                row = {"step": step, "cpu_minutes": round(used / 60, 1), "weights": name}
                print(json.dumps(row | {"tta": tta} | scores_of(model, self.data.held_out, tta)))
        sys.stdout.flush()
        self.network.train()


def zoomed(largest, shape, rng, elastic, angle, flips):
    """A deformation that also enlarges or shrinks the patch by a factor of up to `largest`."""
    offsets = draw_deformation(shape, rng, elastic, angle, flips).offsets
    return Deformation(offsets * np.float32(largest ** rng.uniform(-1, 1)))


def sometimes_exact(share, shape, rng, elastic, angle, flips):
    """For a share of the patches only flips and, if all are allowed, quarter turns.

    No grey value of these patches is interpolated.
    """
    if rng.random() >= share:
        return draw_deformation(shape, rng, elastic, angle, flips)
    offsets = draw_deformation(shape, rng, 0.0, 0, flips).offsets
    turn = rng.choice([-1, 1]) if all(flips) else 1
    return Deformation(np.ascontiguousarray(offsets[::turn]))


def averaging(steps):
    """A moving average over about `steps` steps, and over fewer at the start."""

    def average(old, new, count):
        return old.lerp(new, max(1 / steps, 9 / (10 + float(count))))

    return average


def loaded(recipe, neighbours, balance):
    """The data, with neighbouring slices as channels and other weights of classes if set."""
    images, labels = (tifffile.imread(STACK / f"train-{n}.tif") for n in ("volume", "labels"))
    shifts = range(-neighbours, neighbours + 1)
    places = np.arange(len(images))
    planes = [np.abs(places + n) for n in shifts]
    planes = [np.where(p < len(images), p, 2 * len(images) - 2 - p) for p in planes]
    data = load_training_data([np.stack([images[p] for p in planes])], [labels[None]], recipe)
    if balance is None:
        return data
    (volume,) = data.volumes
    shares = np.bincount(volume.targets.ravel()) / volume.targets.size
    factors = (1 / (2 * shares)) ** balance
    factors = (factors / (factors * shares).sum()).astype(np.float32)
    weights = weight_map(volume.targets, 2, recipe.w0, recipe.sigma, factors)
    return replace(data, volumes=(replace(volume, weights=weights),))


def scores_of(network, held_out, tta):
    """Scores, the threshold with the fewest wrong voxels, and the share of voxels right there."""
    (slices,) = held_out
    shape = slices.image.shape[1:]
    core = (1, *shape[1:])
    plan = TilePlan(shape, core, network.context, core)
    predictor = Predictor(network, plan, slices.intensity, "float32", "cpu", tta)
    planes = [predict(predictor, plan, number, slices.image) for number in range(len(plan))]
    p = np.concatenate(planes) / 255
    scores = {n: s.value for n, s in isbi_scores(p, slices.targets, SCORES).items()}
    cuts = np.arange(5, 255, 5) / 255
    right = [((p > cut) == slices.targets).mean() for cut in cuts]
    half = ((p > 0.5) == slices.targets).mean()
    scores |= {"threshold": cuts[np.argmax(right)], "accuracy": max(right), "at_half": half}
    return {name: round(float(value), 4) for name, value in scores.items()}


def predict(predictor, plan, number, image):
    tile = plan[number]
    voxels = read_mirrored(lambda box: image[(slice(None), *box.slices)], plan.shape, tile.read)
    return predictor(tile, voxels, ("probabilities",))["probabilities"][0][tile.crop.slices]


def table(folder):
    """Prints the last scores of all runs of a folder as Markdown, those with averaged weights."""
    print("| change | seed | steps | TTA | " + " | ".join(COLUMNS) + " |")
    print("|---" * (4 + len(COLUMNS)) + "|")
    for path in sorted(Path(folder).glob("*.json")):
        change, _, seed = path.stem.rpartition("-")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        finished = any(line["tta"] for line in lines)
        for line in lines[-6:] if finished else ():
            if line["weights"] == "500":
                scores = " | ".join(f"{line[name]:.4f}" for name in COLUMNS.values())
                step, tta = line["step"], "yes" if line["tta"] else "no"
                print(f"| {change} | {seed} | {step} | {tta} | {scores} |")


def main(change="", minutes=10, seed=1):
    if change == "table":
        return table(minutes)
    if not {*change.split("+")} <= {*CHANGES}:
        raise SystemExit(f"CHANGE={change!r} must be of {', '.join(CHANGES)}.")
    if not STACK.is_dir():
        raise SystemExit(f"no real images at {STACK}")
    keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    Bench(change, 60 * float(minutes), int(seed)).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
