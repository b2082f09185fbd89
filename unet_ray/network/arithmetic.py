"""What tiles cost: multiplications of a pass, how many the halo takes, voxels decoded again.

Knows the shapes of the network's layers and of the input's storage units as numbers. The ratio of
areas is the wrong model: deep layers, where most of the work is, lose less of their area to the
halo than the input does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unet_ray.tiling.tiles import TilePlan, round_up


def pass_multiplications(net: NetworkSize, y: float, x: float) -> float:
    """Multiplications of one slice of ``y x x`` voxels through unpadded convolutions."""
    return _walk(net, y, x, shrink=2)


def core_multiplications(net: NetworkSize, y: float, x: float) -> float:
    """The same for a core of ``y x x`` voxels if it needed no halo at all."""
    return _walk(net, y, x, shrink=0)


def halo_overhead(net: NetworkSize, plan: TilePlan) -> float:
    """Arithmetic beyond what the volume's voxels alone would cost, as a part of that.

    0.39 says 39 % more. Counts the halo and what cores reach beyond the volume's faces.
    """
    slices = round_up(plan.shape[0], plan.passes[0])
    in_core = math.prod(c // p for c, p in zip(plan.core[1:], plan.passes[1:], strict=True))
    passes = math.prod(plan.counts[1:]) * in_core
    spent = slices * passes * pass_multiplications(net, *plan.pass_shape[1:])
    return spent / core_multiplications(net, *plan.shape[1:]) / plan.shape[0] - 1


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


def _walk(net: NetworkSize, y: float, x: float, shrink: int) -> float:
    total, channels = 0.0, net.in_channels
    widths = [net.base_channels * 2**level for level in range(net.depth + 1)]
    for level, width in enumerate(widths):
        for inputs in (channels, width):
            y, x = y - shrink, x - shrink
            total += 9 * inputs * width * y * x
        channels = width
        if level < net.depth:
            y, x = y / 2, x / 2
    for width in reversed(widths[:-1]):
        y, x = 2 * y, 2 * x
        total += 2 * width * width * y * x
        for inputs in (2 * width, width):
            y, x = y - shrink, x - shrink
            total += 9 * inputs * width * y * x
    return total + net.base_channels * net.classes * y * x


# Results of constant passes that are kept: empty background is one value, seldom two.
CONSTANTS = 2


@dataclass(frozen=True)
class NetworkSize:
    """The numbers of a network that memory depends on.

    Attributes:
        in_channels, classes, base_channels, depth: as of the network.
        weights: number of parameters.
        itemsize: bytes of one activation: 4 for float32, 2 for bfloat16.
        tta: passes are averaged over the symmetries of the square.
    """

    in_channels: int
    classes: int
    base_channels: int
    depth: int
    weights: int
    itemsize: int
    tta: bool = False


def pass_bytes(net: NetworkSize, pass_shape: tuple[int, ...]) -> int:
    """Peak of one forward call at inference, walking down and up the network.

    Args:
        net: size of the network.
        pass_shape: (slices in the batch, y, x) that the call is given.
    """
    batch, y, x = pass_shape

    def features(channels: int, shrunk: float, level: int) -> float:
        area = (y / 2**level - shrunk) * (x / 2**level - shrunk)
        return float(batch * channels * area * net.itemsize)

    widths = [net.base_channels * 2**level for level in range(net.depth + 1)]
    image = batch * net.in_channels * y * x * (4 + net.itemsize)
    peak, shrunk = 0.0, 0.0
    skips: list[float] = []
    below = features(net.in_channels, 0, 0)
    for level, width in enumerate(widths):
        first, second = features(width, shrunk + 2, level), features(width, shrunk + 4, level)
        peak = max(peak, sum(skips) + below + first, sum(skips) + first + second)
        shrunk = (shrunk + 4) / 2
        below = second / 4
        if level < net.depth:
            skips.append(features(width, _margin(net.depth, level), level))
            peak = max(peak, sum(skips) + second + below)
    for level in reversed(range(net.depth)):
        skip, held = skips[level], sum(skips[:level])
        below = features(2 * widths[level], _margin(net.depth, level) + 4, level) / 2
        # The joined buffer is twice a skip; the skip goes before the up-convolution comes.
        peak = max(peak, held + 3 * skip + below)
    scores = batch * net.classes * y * x * (net.itemsize + 4 + 4)
    if net.tta:  # the turned image, and the sum so far, stay beside every pass
        image += batch * y * x * (net.in_channels * net.itemsize + net.classes * 4)
        scores += batch * net.classes * y * x * 4
    return int(image + max(peak, skips[0] + scores))


def _margin(depth: int, level: int) -> float:
    """Voxels of `level` between the face of the input and what is joined there, both sides."""
    shrink = 12 * 2**depth - 8
    margin = float(shrink - 4)
    for _ in range(level):
        margin = margin / 2 - 4
    return margin
