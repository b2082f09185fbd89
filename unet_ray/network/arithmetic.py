"""What passes and tiles cost: multiplications, bytes, and what the halo takes of them.

Knows the extents and channels of the network's layers as numbers. Does not know torch. The ratio of
areas is the wrong model: deep layers, where most of the work is, lose less of their area to the
halo than the input does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unet_ray.tiling.levels import Level, layers
from unet_ray.tiling.tiles import TilePlan, round_up

# Results of constant passes that are kept: empty background is one value, seldom two.
CONSTANTS = 2


@dataclass(frozen=True)
class NetworkSize:
    """The numbers of a network that time and memory depend on.

    Attributes:
        in_channels, classes, base_channels: as of the network.
        levels: from full resolution to the coarsest, over (z, y, x).
        weights: number of parameters.
        itemsize: bytes of one activation: 4 for float32, 2 for bfloat16.
        tta: passes are averaged over the symmetries of the square.
    """

    in_channels: int
    classes: int
    base_channels: int
    levels: tuple[Level, ...]
    weights: int
    itemsize: int
    tta: bool = False

    def width(self, level: int) -> int:
        """Channels of a level."""
        return self.base_channels << level


def pass_multiplications(net: NetworkSize, extents: Sequence[float]) -> float:
    """Multiplications of one pass over ``(z, y, x)`` voxels through unpadded convolutions."""
    return _multiplications(net, extents, valid=True)


def core_multiplications(net: NetworkSize, extents: Sequence[float]) -> float:
    """The same for a core of ``(z, y, x)`` voxels if it needed no halo at all."""
    return _multiplications(net, extents, valid=False)


def _multiplications(net: NetworkSize, extents: Sequence[float], valid: bool) -> float:
    total, channels = 0.0, net.in_channels
    for layer in layers(net.levels, extents, valid):
        width = net.classes if layer.kind == "head" else net.width(layer.level)
        # An up-convolution feeds each voxel that it returns from one voxel.
        taps = math.prod(net.levels[layer.level].kernel) if layer.kind == "convolution" else 1
        if layer.kind != "pooling":
            total += taps * channels * width * layer.voxels
            channels = width
        if layer.kind == "up-convolution":
            channels = 2 * width  # joined to the skip
    return total


def halo_overhead(net: NetworkSize, plan: TilePlan) -> float:
    """Arithmetic beyond what the volume's voxels alone would cost, as a part of that.

    0.39 says 39 % more. Counts the halo and what cores reach beyond the volume's faces.
    """
    slices = round_up(plan.shape[0], plan.passes[0])
    in_core = math.prod(c // p for c, p in zip(plan.core[1:], plan.passes[1:], strict=True))
    passes = math.prod(plan.counts[1:]) * in_core
    spent = slices * passes * pass_multiplications(net, (1, *plan.pass_shape[1:]))
    return spent / core_multiplications(net, (1, *plan.shape[1:])) / plan.shape[0] - 1


def read_amplification(plan: TilePlan, chunk: Sequence[int]) -> float:
    """Voxels that all tiles together decode, over the voxels of the volume.

    1.3 says that three in ten are decoded twice: for the halo, and since chunks are decoded whole.

    Args:
        plan: the tiles.
        chunk: storage unit of the input, (z, y, x).
    """
    axes = zip(plan.shape, plan.core, plan.context.before, plan.context.after, chunk, strict=True)
    return math.prod(_decoded(*axis) / axis[0] for axis in axes)


def _decoded(extent: int, core: int, before: int, after: int, chunk: int) -> int:
    """Voxels along one axis that its tiles decode, one after another."""
    first = np.arange(0, extent, core) - before
    last = first + before + core + after
    # What lies beyond a face is mirrored, from inside.
    low = np.minimum(np.maximum(first, 0), np.maximum(2 * extent - 1 - last, 0))
    high = np.maximum(np.minimum(last, extent), np.minimum(1 - first, extent))
    return int((np.minimum(-(-high // chunk) * chunk, extent) - low // chunk * chunk).sum())


def pass_bytes(net: NetworkSize, pass_shape: tuple[int, ...]) -> int:
    """Peak of one forward call at inference, walking down and up the network.

    Args:
        net: size of the network.
        pass_shape: (slices in the batch, y, x) that the call is given.
    """
    voxels = math.prod(pass_shape)
    steps = [*layers(net.levels, pass_shape)]
    joined = {step.level: step.voxels for step in steps if step.kind == "up-convolution"}

    def skips(level: int) -> float:
        """Bytes of the skips above a level, cut to what is joined there."""
        return sum(net.width(n) * joined[n] for n in range(level)) * net.itemsize

    peak, below, up = 0.0, float(net.in_channels * voxels * net.itemsize), False
    previous = ""
    for step in steps[:-1]:
        features = net.width(step.level) * step.voxels * net.itemsize
        up = up or step.kind == "up-convolution"
        if not up:
            kept = skips(step.level + (step.kind == "pooling"))
            peak = max(peak, kept + below + features)
        elif previous == step.kind:  # the second convolution
            # The joined buffer is twice a skip; the skip goes before the up-convolution comes.
            skip = net.width(step.level) * joined[step.level] * net.itemsize
            peak = max(peak, skips(step.level) + 3 * skip + features)
        below, previous = features, step.kind
    image = voxels * net.in_channels * (4 + net.itemsize)
    scores = voxels * net.classes * (net.itemsize + 4 + 4)
    if net.tta:  # the turned image, and the sum so far, stay beside every pass
        image += voxels * (net.in_channels * net.itemsize + net.classes * 4)
        scores += voxels * net.classes * 4
    return int(image + max(peak, skips(1) + scores))
