"""All settings of a training run, filled in from a named recipe and checked.

Knows numbers and their rules; trains nothing.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from unet_ray.errors import InputError
from unet_ray.network.prediction import Precision
from unet_ray.network.unet import Norm, UNet

LabelsAre = Literal["classes", "instances"]

# Size of what a patch gives back, in steps of the network, where no patch is asked for.
PATCH_STEPS = {"default": 12, "paper": 24}


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run; the defaults learn ISBI's membranes in minutes.

    Attributes:
        recipe: name of the recipe that the rest was filled in from.
        depth, base_channels, norm, dropout: of the network. Every norm computes the same function
            in training and in prediction.
        patch: size of a patch along y and x, in voxels, as the network reads it; (0, 0) stands
            for that of the recipe at this depth.
        batch: patches of a step and worker; with N workers a step sees N times as many.
        steps: stop after so many; None for no such bound.
        minutes: stop after so many minutes of training; None for no such bound.
        optimiser: ``adamw``, or ``sgd`` with `momentum`.
        learning_rate: at the start. The loss is the mean over voxels of w * -log p, so it does
            not depend on the patch size; it is the same for any number of workers.
        decay: the learning rate falls as (1 - progress) ** decay; 0 keeps it constant.
        clip: largest norm of the gradient; 0 for no clipping.
        momentum: of SGD; AdamW has none.
        labels_are: ``classes``, or ``instances``: numbers of cells, of which the network learns
            cell and background.
        ignore_label: label of voxels without annotation, which weigh nothing.
        val: slices that are held out, as in ``20:24``; None for none.
        val_fraction: share of the slices that is held out, the last ones.
        best_by: name of the score by which the best model is kept; None for that of the labels.
        patience: stop after so many validations without a better one; None for never.
        w0, sigma: of the weight map, eq. 2 of the paper.
        elastic: standard deviation of the deformation at its nodes, in voxels (sec. 3.1).
        seed: where chance starts.
        precision: of the arithmetic; ``auto`` is bfloat16 where the hardware has it.
    """

    recipe: Literal["default", "paper"] = "default"
    depth: int = 4
    base_channels: int = 64
    norm: Norm = "weight"
    dropout: float = 0.0
    patch: tuple[int, int] = (0, 0)
    batch: int = 1
    steps: int | None = None
    minutes: float | None = None
    optimiser: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    decay: float = 0.9
    clip: float = 5.0
    momentum: float = 0.9
    labels_are: LabelsAre = "classes"
    ignore_label: int | None = None
    val: str | None = None
    val_fraction: float = 0.0
    best_by: str | None = None
    patience: int | None = None
    w0: float = 10.0
    sigma: float = 5.0
    elastic: float = 10.0
    seed: int = 0
    precision: Precision | Literal["auto"] = "auto"

    @classmethod
    def of(cls, name: str, **chosen: Any) -> Recipe:
        """The recipe called `name` with what was chosen otherwise; None means not chosen.

        Raises:
            InputError: if a number is out of range, has no meaning in this recipe, or the patch
                does not fit the network.
        """
        filled = {**RECIPES[name], **{k: v for k, v in chosen.items() if v is not None}}
        if filled.get("steps") is None and filled.get("minutes") is None:
            filled["minutes"] = 15.0
        made = cls(recipe=name, **filled)  # type: ignore[arg-type]
        if not any(made.patch):
            made = dataclasses.replace(made, patch=made._default_patch())
        made._check()
        if made.optimiser != "sgd" and chosen.get("momentum") is not None:
            raise InputError(
                f"momentum={made.momentum} is of SGD, and recipe={name} has none; give "
                "--recipe paper, or no momentum."
            )
        return made

    def _default_patch(self) -> tuple[int, int]:
        """380 at depth 4, the paper's 572 in its recipe; as many steps at other depths."""
        context = UNet(1, 2, 1, self.depth).context
        extent = context.halo[-1] + PATCH_STEPS[self.recipe] * context.step[-1]
        return extent, extent

    def _check(self) -> None:
        rules = {
            "batch": (self.batch >= 1, "at least 1"),
            "steps": (self.steps is None or self.steps >= 1, "at least 1"),
            "minutes": (self.minutes is None or 0 < self.minutes < math.inf, "above 0"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0"),
            "momentum": (0 <= self.momentum < 1, "at least 0 and below 1"),
            "w0": (0 <= self.w0 < math.inf, "at least 0"),
            "sigma": (0 < self.sigma < math.inf, "above 0"),
            "elastic": (0 <= self.elastic < math.inf, "at least 0"),
            "val_fraction": (0 <= self.val_fraction < 1, "at least 0 and below 1"),
            "patience": (self.patience is None or self.patience >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**63, "at least 0 and below 2**63"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                raise InputError(f"{name}={getattr(self, name)} must be {rule}.")
        if self.val and self.val_fraction:
            raise InputError("val and val_fraction both name slices to hold out: give one.")
        if (self.best_by or self.patience) and not (self.val or self.val_fraction):
            raise InputError(
                "best_by and patience need held-out slices: give --val or --val-fraction."
            )
        with torch.device("meta"):  # checks the numbers of the network without its memory
            network = self.network(1, 2)
        least = network.context.halo[-1] + network.context.step[-1]
        for extent in self.patch:
            network.output_extent(extent)
            if extent < least:
                raise InputError(f"patch={extent} is too small for this network: {least} or more.")

    def network(self, channels: int, classes: int) -> UNet:
        """A network of these settings."""
        return UNet(channels, classes, self.base_channels, self.depth, self.norm, self.dropout)

    @property
    def output(self) -> tuple[int, int]:
        """Size of what the network returns for a patch."""
        network = UNet(1, 2, 1, self.depth)
        return network.output_extent(self.patch[0]), network.output_extent(self.patch[1])


# "paper": a single large patch a step, momentum 0.99, dropout, no norm, no decay (sec. 3).
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "norm": "none",
        "dropout": 0.5,
        "optimiser": "sgd",
        "learning_rate": 1e-3,
        "momentum": 0.99,
        "decay": 0.0,
        "clip": 0.0,
    },
}
