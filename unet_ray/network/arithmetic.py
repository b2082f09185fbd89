"""The cost of passes and tiles: multiplications, bytes, and the overhead of the halo.

Calculates with the extents and channels of the network's layers. Independent of torch. The ratio
of areas would overestimate the overhead: deep layers do most of the work, and lose less of their
area to the halo than the input does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unet_ray.tiling.boxes import Ints
from unet_ray.tiling.levels import Layer, Level, layers
from unet_ray.tiling.streaming import Stream
from unet_ray.tiling.tiles import TilePlan, round_up

# Cached results of passes over constant voxels; empty background has one value, rarely two.
CONSTANTS = 2

Doubling = Literal["after", "before"]
Orientation = Literal["any", "upright", "fixed"]
# The symmetries of the plane that a network has learned, by the orientation of its patches: quarter
# turns, and whether the image is then flipped along x.
PLANE: dict[str, tuple[tuple[int, bool], ...]] = {
    "any": tuple((turns, flipped) for turns in range(4) for flipped in (False, True)),
    "upright": ((0, False), (0, True)),
    "fixed": ((0, False),),
}
STREAMED = (False, True, True)  # the axes along which a pass of a stream loses voxels


@dataclass(frozen=True)
class Widths:
    """Channels of the layers of a U-Net at level n; 0 is the finest.

    Attributes:
        base: channels of the first convolution.
        doubling: whether channels double ``after`` a pooling, or already ``before`` it; see `UNet`.
    """

    base: int
    doubling: Doubling = "after"

    def down(self, n: int) -> Ints:
        """Channels of both convolutions of the contracting path; the last ones are the skip's."""
        first = self.base << n
        return first, first << (self.doubling == "before")

    def below(self, n: int) -> int:
        """Channels that enter level `n` of the contracting path; 0 for the image."""
        return self.down(n - 1)[-1] if n else 0

    def up(self, n: int) -> int:
        """Channels of the up-convolution to level `n`."""
        return self.down(n + 1)[-1] if self.doubling == "before" else self.base << n

    def joined(self, n: int) -> int:
        """Channels of skip connection and up-convolution together."""
        return self.down(n)[-1] + self.up(n)

    def join(self, n: int) -> Ints:
        """Channels of both convolutions of the expanding path."""
        return (self.down(n)[-1],) * 2


@dataclass(frozen=True)
class NetworkSize:
    """The numbers of a network that determine time and memory.

    Attributes:
        in_channels, classes, base_channels: see `UNet`.
        levels: from full resolution to the coarsest, over (z, y, x).
        weights: number of parameters.
        itemsize: bytes of one activation: 4 for float32, 2 for bfloat16.
        tta: whether passes are averaged over the symmetries of the voxels.
        doubling, orientation: see `UNet`.
    """

    in_channels: int
    classes: int
    base_channels: int
    levels: tuple[Level, ...]
    weights: int
    itemsize: int
    tta: bool = False
    doubling: Doubling = "after"
    orientation: Orientation = "any"

    @property
    def symmetries(self) -> int:
        """Number of passes that are averaged; see `symmetries_of`."""
        return symmetries_of(self.levels, self.orientation) if self.tta else 1

    @property
    def copies(self) -> int:
        """Number of networks: the one for the symmetries of the plane, and those turned for z."""
        return turns_of(self.levels, self.orientation) if self.tta else 1

    @property
    def widths(self) -> Widths:
        """Channels of the layers."""
        return Widths(self.base_channels, self.doubling)

    def layers(
        self, extents: Sequence[float], valid: bool | Sequence[bool] = True
    ) -> Iterator[tuple[Layer, int, int]]:
        """Yields each layer with the channels of its input and output; see `levels.layers`."""
        inputs, up, second = self.in_channels, False, False
        for layer in layers(self.levels, extents, valid):
            outputs = inputs
            if layer.kind == "head":
                outputs = self.classes
            elif layer.kind == "up-convolution":
                outputs, up = self.widths.up(layer.level), True
            elif layer.kind == "convolution":
                pair = (self.widths.join if up else self.widths.down)(layer.level)
                outputs, second = pair[second], not second
            yield layer, inputs, outputs
            joined = layer.kind == "up-convolution"
            inputs = self.widths.joined(layer.level) if joined else outputs


def symmetries_of(levels: Sequence[Level], orientation: Orientation = "any") -> int:
    """Number of symmetries of a network: 8 of the square, in 3-D 16, and 48 of the cube.

    A network that learned one orientation has fewer: in the plane 2 if upright, 1 if fixed.
    """
    return len(PLANE[orientation]) * turns_of(levels, orientation)


def turns_of(levels: Sequence[Level], orientation: Orientation) -> int:
    """Number of positions of the z axis: 1 in 2-D, in 3-D both directions, and 6 of the cube."""
    widths = [*(level.kernel for level in levels), *(level.pool for level in levels[:-1])]
    if all(width[0] == 1 for width in widths):
        return 1
    cube = orientation == "any" and all(len({*width}) == 1 for width in widths)
    return 6 if cube else 2


def pass_multiplications(net: NetworkSize, extents: Sequence[float]) -> float:
    """Multiplications of one pass of unpadded convolutions over ``(z, y, x)`` input voxels."""
    return _multiplications(net, extents, valid=True)


def core_multiplications(net: NetworkSize, extents: Sequence[float]) -> float:
    """Multiplications for a core of ``(z, y, x)`` voxels if no layer needed a halo."""
    return _multiplications(net, extents, valid=False)


def slab_multiplications(net: NetworkSize, extents: Sequence[float]) -> float:
    """Multiplications of one pass of a stream over ``(z, y, x)`` input voxels."""
    return _multiplications(net, extents, STREAMED)


def _multiplications(
    net: NetworkSize, extents: Sequence[float], valid: bool | Sequence[bool]
) -> float:
    total = 0.0
    for layer, inputs, outputs in net.layers(extents, valid):
        # An up-convolution computes each output voxel from one input voxel.
        taps = math.prod(net.levels[layer.level].kernel) if layer.kind == "convolution" else 1
        if layer.kind != "pooling":
            total += taps * inputs * outputs * layer.voxels
    return total


def halo_overhead(net: NetworkSize, plan: TilePlan) -> float:
    """Multiplications of all tiles relative to those of the volume without halo, minus 1.

    A value of 0.39 means 39 % more. It includes the halo and the parts of cores outside the volume.
    """
    passes = round_up(plan.shape[0], plan.passes[0]) // plan.passes[0]
    if not plan.streamed:
        multiplications = pass_multiplications(net, plan.pass_shape)
    else:  # the first pass of each column needs some before it
        multiplications = slab_multiplications(net, plan.pass_shape)
        passes += plan.context.halo[0] // plan.passes[0]
    columns = math.prod(plan.counts[1:])
    columns *= math.prod(c // p for c, p in zip(plan.core[1:], plan.passes[1:], strict=True))
    total = passes * columns * multiplications
    return total / core_multiplications(net, plan.shape) - 1


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
        pass_shape: shape of the input, (z, y, x); z is a batch of slices for a 2-D network.
    """
    voxels = math.prod(pass_shape)
    steps = [*net.layers(pass_shape)]
    joined = {layer.level: layer.voxels for layer, *_ in steps if layer.kind == "up-convolution"}

    def skips(level: int) -> float:
        """Bytes of the cropped skip connections above a level."""
        return sum(net.widths.down(n)[-1] * joined[n] for n in range(level)) * net.itemsize

    peak, input_bytes, up = 0.0, float(net.in_channels * voxels * net.itemsize), False
    previous = ""
    for layer, _, outputs in steps[:-1]:
        features = outputs * layer.voxels * net.itemsize
        up = up or layer.kind == "up-convolution"
        if not up:
            above = skips(layer.level + (layer.kind == "pooling"))
            peak = max(peak, above + input_bytes + features)
        elif previous == layer.kind:  # the second convolution
            # The joined buffer and the up-convolution's result are in memory together; the skip is
            # freed before the up-convolution runs.
            buffers = net.widths.joined(layer.level) + net.widths.up(layer.level)
            buffers_bytes = buffers * joined[layer.level] * net.itemsize
            peak = max(peak, skips(layer.level) + buffers_bytes + features)
        input_bytes, previous = features, layer.kind
    image, scores = _ends(net, voxels)
    return int(image + max(peak, skips(1) + scores))


def _ends(net: NetworkSize, voxels: int) -> tuple[int, int]:
    """Bytes of the image and of the scores of a pass over that many voxels."""
    image = voxels * net.in_channels * (4 + net.itemsize)
    scores = voxels * net.classes * (net.itemsize + 4 + 4)
    if net.tta:  # the rotated image and the sum of previous passes are in memory too
        image += voxels * (net.in_channels * net.itemsize + net.classes * 4)
        scores += voxels * net.classes * 4
    return image, scores


def slab_bytes(net: NetworkSize, pass_shape: tuple[int, ...]) -> int:
    """Peak memory in bytes of one pass of a stream, without the planes that it keeps.

    Args:
        net: size of the network.
        pass_shape: shape of the input, (z, y, x).
    """
    steps = [*net.layers(pass_shape, STREAMED)]
    skip = {
        layer.level: net.widths.down(layer.level)[-1] * layer.voxels * net.itemsize
        for layer, *_ in steps
        if layer.kind == "up-convolution"
    }
    peak = skips = 0.0
    inputs = float(math.prod(pass_shape) * net.in_channels * net.itemsize)
    for layer, _, outputs in steps:
        results = outputs * layer.voxels * net.itemsize
        if layer.kind == "up-convolution":
            joined = net.widths.joined(layer.level) * layer.voxels * net.itemsize
            peak = max(peak, skips + inputs + results, skips + results + joined)
            skips -= skip[layer.level]
            inputs = joined
            continue
        planes = layer.extents[0]
        kept = 1 + (net.levels[layer.level].kernel[0] - 1) / planes
        # The input is copied behind the planes that were kept of the one before.
        peak = max(peak, skips + inputs * (1 + kept), skips + inputs * kept + results)
        if layer.kind == "pooling":
            skips += skip[layer.level]
        inputs = results
    image, scores = _ends(net, math.prod(pass_shape))
    return int(image + max(peak, scores))


def kept_bytes(net: NetworkSize, stream: Stream, pass_shape: tuple[int, ...]) -> int:
    """Bytes of the planes that the layers of a stream keep from one pass to the next.

    Args:
        net: size of the network.
        stream: numbers of these planes.
        pass_shape: shape of the input of a pass, (z, y, x).
    """
    steps = [*net.layers(pass_shape, STREAMED)]
    total, plane = 0.0, float(math.prod(pass_shape[1:]))
    for layer, inputs, _ in steps:
        planes = 0
        if layer.kind == "convolution":
            planes = net.levels[layer.level].kernel[0] - 1
        elif layer.kind == "pooling":
            planes = stream.pools[layer.level]
        total += planes * inputs * plane
        plane = math.prod(layer.extents[1:])
        if layer.kind == "up-convolution":
            total += stream.skips[layer.level] * net.widths.down(layer.level)[-1] * plane
    total += stream.output * net.classes * plane
    return int(total * net.itemsize * net.symmetries)
