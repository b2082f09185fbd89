"""All settings of a training run: defaults from a named recipe, and range checks.

Handles settings only; trains nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from unet_ray.errors import InputError, refuse_unknown
from unet_ray.network.arithmetic import Doubling, Orientation
from unet_ray.network.checkpoints import find_model, read_model
from unet_ray.network.prediction import Precision
from unet_ray.network.unet import Norm, UNet
from unet_ray.tiling.tiles import round_up

LabelsAre = Literal["classes", "instances"]

# Largest default output extent of a patch along y and x, in multiples of the network's step; in 3-D
# the extents in voxels.
PATCH_STEPS = 24
PATCH_EXTENTS = (16, 64, 64)
DISPLACED = 0.4  # voxels between labels and images, from which on patches keep their orientation
TILT = math.radians(30)
# Largest rotation of patches, and whether they are flipped along y and x.
ORIENTATIONS = {
    "any": (math.pi, (True, True)),
    "upright": (TILT, (False, True)),
    "fixed": (TILT, (False, False)),
}
# A level convolves and pools along z if a voxel is at most this much longer along z than along x.
NEARLY_ISOTROPIC = 1.5


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run; the defaults learn ISBI's membranes in minutes.

    Section and equation numbers refer to Ronneberger, Fischer, Brox 2015.

    Attributes:
        recipe: name of the recipe that supplies the defaults.
        dims: 2 for a network that segments each slice by itself, 3 for one in 3-D.
        anisotropy: ``auto`` leaves out the third dimension of levels where voxels are much longer
            along z than along x; see `levels_along_z`. ``none`` treats all axes alike.
        z_levels: see `UNet`; computed by `fitted` in 3-D.
        voxel_size: of the images, (z, y, x) in micrometres; None for what the files state.
        depth, base_channels, norm, dropout: settings of the network. Every norm computes the same
            function in training and in prediction. Without `base_channels`, training chooses them
            by `channels_for`.
        patch: size of the network's input in voxels, along y and x, in 3-D along z, y and x; zeros
            until `fitted` selects the default.
        batch: number of patches per step and worker. N workers see N times this many per step.
        steps: stop after this number of steps; None for no limit.
        minutes: stop after this many minutes of training; None for no limit.
        optimiser: ``adamw``, or ``sgd`` with `momentum`.
        learning_rate: learning rate at the start. It need not be adapted to the patch size, since
            the loss is a mean over voxels. It is the same for any number of workers.
        decay: the learning rate falls as (1 - progress) ** decay; 0 keeps it constant.
        clip: maximum norm of the gradient; 0 for no clipping.
        averaged: the model is a moving average of the weights over about this many steps; 0 for the
            weights of the last step.
        momentum: momentum of SGD, from 0 to below 1; AdamW ignores it.
        labels_are: ``classes``, or ``instances`` if the labels number the cells. The network then
            learns two classes, cell and background.
        ignore_label: label of voxels without annotation; their weight is 0.
        val: slices to hold out, such as ``20:24``; None for none.
        val_fraction: share of the slices to hold out, from 0 to below 1; takes the last slices.
        best_by: name of the score that selects the best model; None for the default of the labels.
        patience: stop after this many validations without a better score; None for no limit.
        w0, sigma: weight and width in voxels of the border term of the weight map (eq. 2).
        elastic: standard deviation of the deformation at its nodes, in voxels (sec. 3.1).
        degrade: strength of random blur and noise; 0 for none.
        orientation: ``any`` rotates patches by any angle and flips them. ``upright`` rotates by at
            most 30 degrees and flips only along x, ``fixed`` does not flip; in 3-D all flip along
            z. ``auto`` is ``any``, unless labels are displaced from the images; see `oriented`.
        start: RUN folder or file of a model whose weights the training starts from; None for random
            weights.
        seed: random seed.
        precision: number format of the arithmetic; ``auto`` is bfloat16 if the hardware supports
            it, else float32.
    """

    recipe: Literal["default", "paper"] = "default"
    dims: Literal[2, 3] = 2
    anisotropy: Literal["auto", "none"] = "auto"
    z_levels: tuple[tuple[int, int], ...] | None = None
    voxel_size: tuple[float, float, float] | None = None
    depth: int = 4
    base_channels: int | None = None
    norm: Norm = "weight"
    dropout: float = 0.0
    patch: tuple[int, ...] = (0, 0)
    batch: int = 1
    steps: int | None = None
    minutes: float | None = None
    optimiser: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    decay: float = 0.9
    clip: float = 5.0
    averaged: int = 500
    momentum: float = 0.9
    labels_are: LabelsAre = "classes"
    ignore_label: int | None = None
    val: str | None = None
    val_fraction: float = 0.0
    best_by: str | None = None
    patience: int | None = None
    w0: float = 10.0
    sigma: float = 5.0
    elastic: float = 20.0
    degrade: float = 1.0
    orientation: Orientation | Literal["auto"] = "auto"
    start: str | None = None
    seed: int = 0
    precision: Precision | Literal["auto"] = "auto"

    @classmethod
    def of(cls, name: str, **chosen: Any) -> Recipe:
        """Returns the recipe `name` with the chosen settings in place of its defaults.

        Args:
            name: ``default`` or ``paper``.
            **chosen: fields of `Recipe`; None selects the recipe's default. Without `steps` and
                `minutes`, training lasts 15 minutes. With `start`, depth, channels and norm are
                those of that model, and the default of the learning rate is 0.0003.

        Raises:
            InputError: if a number is out of range, if the recipe does not use a chosen setting, or
                if the patch does not fit the network.
        """
        refuse_unknown("recipe", name, RECIPES)
        given = {k: v for k, v in chosen.items() if v is not None}
        start = _settings_of_start(given)
        settings = {**RECIPES[name], **start, **given}
        if settings.get("steps") is None and settings.get("minutes") is None:
            settings["minutes"] = 15.0
        if settings.get("dims") == 3:
            settings = {"depth": 3, "patch": (0, 0, 0), **settings}
        recipe = cls(recipe=name, **settings)  # type: ignore[arg-type]
        recipe._check()
        if recipe.dims == 2:
            recipe.fitted(None)
        if recipe.optimiser != "sgd" and chosen.get("momentum") is not None:
            raise InputError(
                f"momentum={recipe.momentum} applies only to SGD, which recipe={name} does not "
                "use; choose --recipe paper, or leave out momentum."
            )
        return recipe

    def fitted(self, voxel_size: Sequence[float] | None, longest: int | None = None) -> Recipe:
        """Returns this recipe with the levels along z, and with a patch that fits the network.

        Args:
            voxel_size: of the images, (z, y, x) in any unit; None if unknown, for equal sizes.
            longest: largest extent of the images along y and x, in voxels; None if unknown.

        Raises:
            InputError: if the patch does not fit the network, or no level convolves along z.
        """
        recipe = self
        if self.dims == 3 and self.z_levels is None:
            size = self.voxel_size or voxel_size
            known = size if size and self.anisotropy == "auto" else (1.0, 1.0, 1.0)
            levels = levels_along_z(self.depth, known)
            if all(kernel == 1 for kernel, _ in levels):
                z, x = known[0], known[2]
                raise InputError(
                    f"dims=3: voxels are {z / x:.3g} times as long along z as along x, so no level "
                    f"of depth {self.depth} convolves along z; set --dims 2, a larger --depth, or "
                    "--anisotropy none."
                )
            stated = (size[0], size[1], size[2]) if size else None
            recipe = dataclasses.replace(self, z_levels=levels, voxel_size=stated)
        if not any(self.patch):
            recipe = dataclasses.replace(recipe, patch=recipe._default_patch(longest))
        recipe._check_patch()
        return recipe

    def _default_patch(self, longest: int | None) -> tuple[int, ...]:
        """Returns 572 voxels at depth 4, less for smaller images; in 3-D see `PATCH_EXTENTS`.

        At other depths the output has as many steps. It is no larger than the images need, except
        in the paper's recipe.
        """
        context = self._smallest_network().context
        if self.dims == 3:
            axes = zip(context.halo, context.step, PATCH_EXTENTS, strict=True)
            return tuple(halo + round_up(extent, step) for halo, step, extent in axes)
        halo, step = context.halo[-1], context.step[-1]
        extent = PATCH_STEPS * step
        if longest is not None and self.recipe == "default":
            extent = min(extent, round_up(longest, step))
        return halo + extent, halo + extent

    def _smallest_network(self) -> UNet:
        """The network with one channel, for the arithmetic of its levels; without memory."""
        with torch.device("meta"):
            return dataclasses.replace(self, base_channels=1).network(1, 2)

    def _check(self) -> None:
        refuse_unknown("labels_are", self.labels_are, ("classes", "instances"))
        refuse_unknown("anisotropy", self.anisotropy, ("auto", "none"))
        refuse_unknown("orientation", self.orientation, ("auto", *ORIENTATIONS))
        refuse_unknown("norm", self.norm, ("none", "weight", "batch"))
        refuse_unknown("optimiser", self.optimiser, ("adamw", "sgd"))
        refuse_unknown("precision", self.precision, ("auto", "float32", "bfloat16"))
        whole = "depth", "base_channels", "batch", "steps", "averaged", "patience", "seed"
        for name in whole:
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise InputError(f"{name}={value!r} must be a whole number.")
        rules = {
            "batch": (self.batch >= 1, "at least 1"),
            "steps": (self.steps is None or self.steps >= 1, "at least 1"),
            "minutes": (self.minutes is None or 0 < self.minutes < math.inf, "above 0"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0"),
            "averaged": (self.averaged >= 0, "at least 0"),
            "momentum": (0 <= self.momentum < 1, "at least 0 and below 1"),
            "w0": (0 <= self.w0 < math.inf, "at least 0"),
            "sigma": (0 < self.sigma < math.inf, "above 0"),
            "degrade": (0 <= self.degrade < math.inf, "at least 0"),
            "elastic": (0 <= self.elastic < math.inf, "at least 0"),
            "val_fraction": (0 <= self.val_fraction < 1, "at least 0 and below 1"),
            "patience": (self.patience is None or self.patience >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**63, "at least 0 and below 2**63"),
            "dims": (self.dims in (2, 3), "2 or 3"),
            "z_levels": (self.dims == 3 or self.z_levels is None, "None in 2-D"),
            "voxel_size": (
                self.voxel_size is None
                or (len(self.voxel_size) == 3 and all(0 < n < math.inf for n in self.voxel_size)),
                "three sizes above 0",
            ),
        }
        for name, (valid, rule) in rules.items():
            if not valid:
                raise InputError(f"{name}={getattr(self, name)} must be {rule}.")
        if self.val and self.val_fraction:
            raise InputError("val and val_fraction both choose the held-out slices; set only one.")
        if (self.best_by or self.patience) and not (self.val or self.val_fraction):
            raise InputError(
                "best_by and patience need held-out slices; set --val or --val-fraction."
            )
        with torch.device("meta"):  # checks the network's settings without allocating memory
            self.with_channels(1).network(1, 2)

    def _check_patch(self) -> None:
        if len(self.patch) != self.dims:
            form = "Y,X" if self.dims == 2 else "Z,Y,X"
            raise InputError(f"patch={self.patch} must be {form} for a network in {self.dims}-D.")
        network = self._smallest_network()
        for axis, extent in zip(range(-self.dims, 0), self.patch, strict=True):
            try:
                network.output_extent(extent, axis)
            except InputError as error:
                raise InputError(str(error).replace("size=", "patch=", 1)) from None
            smallest = network.context.halo[axis] + network.context.step[axis]
            if extent < smallest:
                raise InputError(
                    f"patch={extent} is too small for this network; it must be at least {smallest}."
                )

    def with_channels(self, base_channels: int) -> Recipe:
        """Returns this recipe with `base_channels`, unless it has channels of its own."""
        if self.base_channels is not None:
            return self
        return dataclasses.replace(self, base_channels=base_channels)

    def oriented(self, displacement: Sequence[float] | None) -> Recipe:
        """Returns this recipe with another orientation in place of ``auto``.

        In patches that are rotated and flipped, displaced labels are on all sides of an edge. A
        network that sees one orientation learns where the labels are.

        Args:
            displacement: of the labels from the images along y and x, in voxels; None if unknown.
        """
        if self.orientation != "auto":
            return self
        y, x = (abs(n) >= DISPLACED for n in displacement or (0.0, 0.0))
        chosen: Orientation = "fixed" if x else "upright" if y else "any"
        return dataclasses.replace(self, orientation=chosen)

    def network(self, channels: int, classes: int) -> UNet:
        """Creates an untrained network with these settings.

        Raises:
            ValueError: if the recipe has no channels; see `with_channels`.
        """
        if self.base_channels is None:
            raise ValueError("a recipe without base_channels has no network")
        doubling: Doubling = "before" if self.dims == 3 else "after"
        same = self.base_channels, self.depth, self.norm, self.dropout
        return UNet(channels, classes, *same, self.z_levels, doubling)

    @property
    def turns(self) -> tuple[float, tuple[bool, bool]]:
        """Largest rotation of a patch in radians, and whether it is flipped along y and x."""
        return ORIENTATIONS["any" if self.orientation == "auto" else self.orientation]

    @property
    def output(self) -> tuple[int, ...]:
        """Size of the network's output for a patch along the same axes, in voxels.

        Raises:
            ValueError: if the recipe has no patch; see `fitted`.
        """
        if not any(self.patch):
            raise ValueError("a recipe without a patch has no output; see Recipe.fitted")
        network = self._smallest_network()
        axes = zip(range(-self.dims, 0), self.patch, strict=True)
        return tuple(network.output_extent(extent, axis) for axis, extent in axes)


def levels_along_z(depth: int, voxel_size: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """Returns the widths along z of the convolutions and the pooling of each level.

    A level convolves and pools along z if its voxels are at most 1.5 times as long along z as along
    x. Above, only y and x are pooled, so that voxels become more alike.

    Args:
        depth: number of poolings.
        voxel_size: of the images, (z, y, x) in any unit.
    """
    z, _, x = voxel_size
    levels = []
    for _ in range(depth + 1):
        near = z <= NEARLY_ISOTROPIC * x
        levels.append((3, 2) if near else (1, 1))
        z, x = z * (2 if near else 1), 2 * x
    return tuple(levels)


# Channels at full resolution on a GPU and on a CPU. With twice as many a step takes about four
# times as long, and learns more only if there are enough steps.
GPU_CHANNELS, CPU_CHANNELS = 64, 16


def channels_for(device: str) -> int:
    """Returns the channels of the default recipe on a device: ``cpu``, ``cuda`` or ``mps``.

    On a CPU, 32 channels are still behind 16 after an hour; see docs/explanation/recipe.md.
    """
    return CPU_CHANNELS if device == "cpu" else GPU_CHANNELS


# Of the network: a training that starts from a model has those of that model.
ARCHITECTURE = "dims", "depth", "base_channels", "norm", "dropout"
FINE_TUNING_RATE = 3e-4  # a higher one destroys what the model has learned


def _settings_of_start(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the defaults of a training that starts from a model; none without such a model.

    Raises:
        InputError: if the model cannot be read, or has another setting than the given one.
    """
    if "start" not in given:
        return {}
    path = find_model(given["start"])
    architecture = dict(read_model(path)[1].architecture)
    z_levels = architecture.get("z_levels")
    architecture["dims"] = 3 if z_levels else 2
    for name in ARCHITECTURE:
        if name != "dropout" and given.get(name, architecture[name]) != architecture[name]:
            raise InputError(
                f"{name}={given[name]} does not fit {path}, which has {architecture[name]}; leave "
                f"out {name}, or train without --from."
            )
    given["start"] = str(path)
    levels = {"z_levels": tuple(map(tuple, z_levels))} if z_levels else {}
    same = {name: architecture[name] for name in ARCHITECTURE}
    return {"learning_rate": FINE_TUNING_RATE, **same, **levels}


# "paper": one large patch per step, momentum 0.99, dropout, no norm, no decay (sec. 3). It has
# neither blur and noise nor an average of weights.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "base_channels": 64,
        "norm": "none",
        "dropout": 0.5,
        "optimiser": "sgd",
        "learning_rate": 1e-3,
        "momentum": 0.99,
        "decay": 0.0,
        "clip": 0.0,
        "averaged": 0,
        "elastic": 10.0,
        "degrade": 0.0,
        "orientation": "any",
    },
}
