"""What a training is about to do, as rows of a table.

Knows the facts of data, recipe and network that a user should check. Does not know how a table is
drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unet_ray.network.checkpoints import read_tensors
from unet_ray.tiling.levels import descriptions
from unet_ray.training.data import TrainingData
from unet_ray.training.recipes import Recipe
from unet_ray.training.truths import IGNORED
from unet_ray.training.validation import checked_score
from unet_ray.training.windows import Planes
from unet_ray.units import format_seconds

Rows = list[tuple[str, str]]
NAMES_SHOWN = 3  # files of which each has a line


def summary(
    data: TrainingData,
    recipe: Recipe,
    workers: int,
    where: str,
    step: int = 0,
    step_seconds: float | None = None,
) -> Rows:
    """Describes a training before its first step.

    Args:
        data: the labelled volumes.
        recipe: all settings.
        workers: number of workers that train together.
        where: precision and device, such as ``bfloat16 on cpu``.
        step: the step of the checkpoint that the run resumes from; 0 for a new run.
        step_seconds: measured seconds of one step, or None.
    """
    rows = [("images", line) for line in _files(data.identity["images"])]
    if data.voxel_size:
        rows.append(("voxel size", f"{_by(data.voxel_size)} um (z, y, x)"))
    rows += [("labels", line) for line in _files(data.identity["labels"])]
    if data.unlabelled:
        text = f"{data.unlabelled} slices without labels are left out; paired by number"
        rows.append(("pairs", text))
    if any(isinstance(volume.image, Planes) for volume in data.volumes):
        rows.append(("memory", "images, labels and weight maps are read by windows; see --memory"))
    rows.append(("classes", _classes(data)))
    rows.append(("held out", _held_out(data, recipe)))
    if data.held_out:
        score = checked_score(data.held_out, len(data.class_values), recipe.best_by)
        rows.append(("best model", f"by {score} on the held-out slices; see --best-by"))
    network = recipe.network(data.channels, len(data.class_values))
    weights = sum(parameter.numel() for parameter in network.parameters())
    rows.append(
        (
            "network",
            f"{recipe.dims}-D, depth {recipe.depth}, {recipe.base_channels} channels, norm "
            f"{recipe.norm}, {_count(weights)} weights, {where}",
        )
    )
    if recipe.dims == 3:
        rows += [(f"level {n}", line) for n, line in enumerate(descriptions(network.levels))]
    if recipe.start:
        rows.append(("starts from", recipe.start))
    batch = f", {workers * recipe.batch} patches per step" if workers * recipe.batch > 1 else ""
    rows.append(
        ("patch", f"{_by(recipe.patch)} voxels, of which {_by(recipe.output)} are predicted{batch}")
    )
    rows.append(("workers", f"{workers}, initial learning rate {recipe.learning_rate:g}"))
    rows.append(("steps", _steps(recipe, step_seconds)))
    if step:
        rows.append(("resumes", f"from step {step}"))
    return rows


def _files(files: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"{file['name']}: {file['dtype']}, {_by(file['shape'])} (c, z, y, x)"
        for file in files[:NAMES_SHOWN]
    ]
    more = len(files) - NAMES_SHOWN
    return [*lines, f"and {more} more"] if more > 0 else lines


def _classes(data: TrainingData) -> str:
    counts = np.zeros(256, np.int64)
    counts[: len(data.counts)] = data.counts
    for held_out in data.held_out:
        counts += np.bincount(held_out.targets.ravel(), minlength=256)
    counts[IGNORED] = 0
    shares = 100 * counts / max(1, counts.sum())
    return ", ".join(f"{value} ({shares[n]:.1f} %)" for n, value in enumerate(data.class_values))


def _held_out(data: TrainingData, recipe: Recipe) -> str:
    held_out = sum(len(each.targets) for each in data.held_out)
    # In 3-D the volumes contain the held-out slices, too.
    learned = sum(volume.targets.shape[0] for volume in data.volumes)
    total = learned + held_out * (recipe.dims == 2)
    if not held_out:
        return f"none of {total} slices, so no validation; set --val or --val-fraction"
    part = f" ({recipe.val})" if recipe.val else ""
    return f"{held_out} of {total} slices{part}"


def _steps(recipe: Recipe, step_seconds: float | None) -> str:
    limit = f"at most {recipe.steps}" if recipe.steps else ""
    if recipe.minutes is None:
        return str(recipe.steps)
    minutes = format_seconds(60 * recipe.minutes)
    if step_seconds is None:
        return f"{limit}{', ' if limit else ''}as many as fit into {minutes}"
    expected = int(60 * recipe.minutes / step_seconds)
    if recipe.steps and recipe.steps <= expected:
        return f"{recipe.steps}, about {format_seconds(recipe.steps * step_seconds)}"
    return f"about {expected} in {minutes}, {step_seconds:.2g} s each"


def model_line(model: Path) -> str:
    """Says which step a finished model is from, with its validation scores and threshold."""
    header = read_tensors(model)[1]
    training, threshold = header["training"], header.get("threshold")
    scores = training.get("validation", {})
    line = f"step {training['steps']}"
    if scores:
        line += f", the best of the run: {_listed(scores)}"
    return line if threshold is None else f"{line}; class 1 above a probability of {threshold:.3f}"


def _listed(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 10**6 else f"{number:,}"


def _by(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)
