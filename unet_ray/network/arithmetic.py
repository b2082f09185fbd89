"""The cost of passes and tiles: multiplications, bytes, and the overhead of the halo.

Calculates with the extents and channels of the network's layers. Independent of torch. The ratio
of areas would overestimate the overhead: deep layers do most of the work, and lose less of their
area to the halo than the input does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unet_ray.tiling.levels import Level, layers
from unet_ray.tiling.tiles import TilePlan, round_up

# Cached results of passes over constant voxels; empty background has one value, rarely two.
CONSTANTS = 2


@dataclass(frozen=True)
class NetworkSize:
    """The numbers of a network that determine time and memory.

    Attributes:
        in_channels, classes, base_channels: see `UNet`.
        levels: from full resolution to the coarsest, over (z, y, x).
        weights: number of parameters.
        itemsize: bytes of one activation: 4 for float32, 2 for bfloat16.
        tta: whether passes are averaged over the symmetries of the square.
    """

    in_channels: int
    classes: int
    base_channels: int
    levels: tuple[Level, ...]
    weights: int
    itemsize: int
    tta: bool = False

    def width(self, level: int) -> int:
        """Number of channels of a level."""
        return self.base_channels << level


def pass_multiplications(net: NetworkSize, extents: Sequence[float]) -> float:
    """Multiplications of one pass of unpadded convolutions over ``(z, y, x)`` input voxels."""
    return _multiplications(net, extents, valid=True)


def core_multiplications(net: NetworkSize, extents: Sequence[float]) -> float:
    """Multiplications for a core of ``(z, y, x)`` voxels if no layer needed a halo."""
    return _multiplications(net, extents, valid=False)


def _multiplications(net: NetworkSize, extents: Sequence[float], valid: bool) -> float:
    total, channels = 0.0, net.in_channels
    for layer in layers(net.levels, extents, valid):
        width = net.classes if layer.kind == "head" else net.width(layer.level)
        # An up-convolution computes each output voxel from one input voxel.
        taps = math.prod(net.levels[layer.level].kernel) if layer.kind == "convolution" else 1
        if layer.kind != "pooling":
            total += taps * channels * width * layer.voxels
            channels = width
        if layer.kind == "up-convolution":
            channels = 2 * width  # concatenated with the skip connection
    return total


def halo_overhead(net: NetworkSize, plan: TilePlan) -> float:
    """Multiplications of all tiles relative to those of the volume without halo, minus 1.

    A value of 0.39 means 39 % more. It includes the halo and the parts of cores outside the volume.
    """
    slices = round_up(plan.shape[0], plan.passes[0])
    passes_per_core = math.prod(c // p for c, p in zip(plan.core[1:], plan.passes[1:], strict=True))
    passes = math.prod(plan.counts[1:]) * passes_per_core
    total = slices * passes * pass_multiplications(net, (1, *plan.pass_shape[1:]))
    return total / core_multiplications(net, (1, *plan.shape[1:])) / plan.shape[0] - 1


def read_amplification(plan: TilePlan, chunk: Sequence[int]) -> float:
    """Voxels decoded by all tiles divided by the voxels of the volume.

    It exceeds 1 because halos overlap and because chunks are decoded whole.

    Args:
        plan: plan of the tiles.
        chunk: storage unit of the input, (z, y, x).
    """
    axes = zip(plan.shape, plan.core, plan.context.before, plan.context.after, chunk, strict=True)
    return math.prod(_decoded(*axis) / axis[0] for axis in axes)


def _decoded(extent: int, core: int, before: int, after: int, chunk: int) -> int:
    """Total of the voxels that the tiles along one axis decode, each tile separately."""
    start = np.arange(0, extent, core) - before
    stop = start + before + core + after
    # Voxels outside the volume are mirror images of voxels inside, which must be read too.
    low = np.minimum(np.maximum(start, 0), np.maximum(2 * extent - 1 - stop, 0))
    high = np.maximum(np.minimum(stop, extent), np.minimum(1 - start, extent))
    return int((np.minimum(-(-high // chunk) * chunk, extent) - low // chunk * chunk).sum())


def pass_bytes(net: NetworkSize, pass_shape: tuple[int, ...]) -> int:
    """Peak memory in bytes of one forward call at inference, over all layers of the network.

    Args:
        net: size of the network.
        pass_shape: shape of the input, (slices in the batch, y, x).
    """
    voxels = math.prod(pass_shape)
    steps = [*layers(net.levels, pass_shape)]
    joined = {step.level: step.voxels for step in steps if step.kind == "up-convolution"}

    def skips(level: int) -> float:
        """Bytes of the cropped skip connections above a level."""
        return sum(net.width(n) * joined[n] for n in range(level)) * net.itemsize

    peak, input_bytes, up = 0.0, float(net.in_channels * voxels * net.itemsize), False
    previous = ""
    for step in steps[:-1]:
        features = net.width(step.level) * step.voxels * net.itemsize
        up = up or step.kind == "up-convolution"
        if not up:
            above = skips(step.level + (step.kind == "pooling"))
            peak = max(peak, above + input_bytes + features)
        elif previous == step.kind:  # the second convolution
            # The joined buffer is twice a skip; the skip is freed before the up-convolution runs.
            skip = net.width(step.level) * joined[step.level] * net.itemsize
            peak = max(peak, skips(step.level) + 3 * skip + features)
        input_bytes, previous = features, step.kind
    image = voxels * net.in_channels * (4 + net.itemsize)
    scores = voxels * net.classes * (net.itemsize + 4 + 4)
    if net.tta:  # the rotated image and the sum of previous passes are in memory too
        image += voxels * (net.in_channels * net.itemsize + net.classes * 4)
        scores += voxels * net.classes * 4
    return int(image + max(peak, skips(1) + scores))
