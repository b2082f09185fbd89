"""Compares norms for the default recipe: scores on held-out slices during training.

python -m tests.bench_norm WAY [STEPS [SEED]]

WAY is a norm of `unet-ray train` (none, weight, batch) or an alternative that the project rejected:
running  batch norm that trains with statistics of each patch and predicts with a running mean
frozen   as running for two thirds of the steps, then fixed mean statistics of 150 patches
renorm   batch renormalisation (Ioffe 2017), with bounds that rise as in its section 4

Reads ISBI 2012 from ../shared/data. Prints one line of JSON after each tenth of the steps. In the
last third, if the statistics are fixed, a line includes the scores of averaged weights.
"""

import json
import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.helper import load_training_data
from unet_ray.machine import keep_freed_memory
from unet_ray.training.patches import Sampler, ahead, sample_slots
from unet_ray.training.recipes import Recipe
from unet_ray.training.trainer import CALIBRATION_PATCHES, Learner, World, optimiser_for
from unet_ray.training.validation import Validator

DATA = Path(__file__).parents[2] / "shared" / "data"
HELD_OUT = "9:12,21:24"  # three slices of each half of the stack: see its slices.json
FREEZE, FREEZE_PATCHES = 2 / 3, 150
SHOWN = ("v_rand", "v_info", "pixel_error")
WAYS = ("none", "weight", "batch", "running", "frozen", "renorm")


class Renorm(nn.BatchNorm2d):
    """Batch renormalisation: corrected to the running statistics, within bounds."""

    progress = 0.0

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        ramp = min(1.0, max(0.0, (self.progress - 0.04) / 0.26))
        largest, furthest = 1 + 2 * ramp, 5 * ramp
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        sd, running_sd = (variance + self.eps).sqrt(), (self.running_var + self.eps).sqrt()
        ratio = (sd.detach() / running_sd).clamp(1 / largest, largest)
        shift = ((mean.detach() - self.running_mean) / running_sd).clamp(-furthest, furthest)
        momentum = 0.01 if ramp else 0.1
        self.running_mean.lerp_(mean.detach(), momentum)
        self.running_var.lerp_(variance.detach(), momentum)
        scale = self.weight * ratio / sd
        offset = self.bias + self.weight * (shift - mean * ratio / sd)
        return x * scale[:, None, None] + offset[:, None, None]


def norms_of(network):
    return [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]


def prepared(way, recipe):
    """The network of `recipe`, with batch renormalisation if `way` is ``renorm``."""
    network = recipe.network(1, 2)
    if way == "renorm":
        for pair in (*network.down, *network.join):
            for index, layer in enumerate(pair):
                if isinstance(layer, nn.BatchNorm2d):
                    pair[index] = Renorm(layer.num_features)
    return network.to(memory_format=torch.channels_last)


def average(old, new, count):
    """A moving average over about 500 steps, and over fewer at the start."""
    return old.lerp(new, max(0.002, 9 / (10 + float(count))))


class Bench:
    """One training run with scores on held-out slices."""

    def __init__(self, way, steps, seed):
        norm = way if way in WAYS[:3] else "batch"
        chosen = {"base_channels": 16, "precision": "float32", "patch": (380, 380)}
        chosen |= {"val": HELD_OUT, "norm": norm}
        recipe = Recipe.of("default", steps=steps, seed=seed, **chosen)
        stack = DATA / "isbi2012"
        files = [[str(stack / f"train-{name}.tif")] for name in ("volume", "labels")]
        self.way, self.steps = way, steps
        self.data = load_training_data(*files, recipe)
        self.sampler = Sampler(self.data, recipe)
        torch.manual_seed(seed)
        self.network, self.average = prepared(way, recipe), None
        world = World(0, 1, torch.device("cpu"), torch.get_num_threads())
        optimiser = optimiser_for(recipe, self.network)
        self.learner = Learner(recipe, self.network, optimiser, world, "float32", 0.0)
        self.learns = norm == "batch" and way != "batch"
        if way == "batch":
            images = [self.sampler[step, 0].image for step in range(CALIBRATION_PATCHES)]
            self.network.calibrate(torch.from_numpy(np.stack(images)))

    def freeze(self, step):
        """Fixes the statistics at their mean over patches that no training step uses."""
        for norm in norms_of(self.network):
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            for number in range(FREEZE_PATCHES):
                image = torch.from_numpy(self.sampler[10**9 + step, number].image[None])
                self.network(image.contiguous(memory_format=torch.channels_last))
        self.learns = False

    def train(self):
        samples = ahead(self.sampler.__getitem__, sample_slots(0, 0, 1))
        validator = Validator(self.data.held_out, 2, None, "float32", "cpu")
        for step, sample in enumerate(islice(samples, self.steps)):
            progress = step / self.steps
            if progress >= FREEZE and self.average is None:
                if self.way == "frozen":
                    self.freeze(step)
                if not self.learns:
                    self.average = AveragedModel(self.network, avg_fn=average)
            for norm in norms_of(self.network):
                norm.train(self.learns)
                norm.progress = progress
            self.learner.step([sample], step, progress)
            if self.average:
                self.average.update_parameters(self.network)
            if (step + 1) * 10 // self.steps > step * 10 // self.steps:
                self.print_scores(validator, step + 1)

    def print_scores(self, validator, step):
        row = {"step": step, **shown(validator(self.network).scores)}
        if self.average:
            row["average"] = shown(validator(self.average.module).scores)
        print(json.dumps(row), flush=True)


def shown(scores):
    return {name: round(scores[name], 4) for name in SHOWN}


def main(way="", steps=1500, seed=1):
    if way not in WAYS:
        raise SystemExit(f"WAY={way!r} is one of {', '.join(WAYS)}.")
    if not DATA.is_dir():
        raise SystemExit(f"no real images at {DATA}")
    keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    Bench(way, int(steps), int(seed)).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
