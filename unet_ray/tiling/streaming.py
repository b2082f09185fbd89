"""Arithmetic of a U-Net that streams along an axis: it computes each layer's planes only once.

Knows how many planes each layer keeps from one slab to the next. Does not know channels, tensors or
tiles.

A stream takes slabs of equal extent, one after the other, and returns as many planes for each. A
convolution of width 3 keeps the last 2 planes of its input. A pooling keeps a plane if a slab does
not end at a multiple of its width. Skip connections wait for the levels below. So the planes that
are returned are `warm_up` slabs behind, and those of the first `warm_up` slabs are meaningless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Ints
from unet_ray.tiling.levels import Level, layers
from unet_ray.tiling.tiles import Context


@dataclass(frozen=True, slots=True)
class Stream:
    """Planes along one axis that a U-Net keeps between two slabs.

    Convolutions keep ``kernel - 1`` planes of their input, and are not listed.

    Attributes:
        slab: planes of the input and of the output per call.
        pools: planes kept before the pooling of each level.
        skips: planes kept of the cropped skip connection of each level.
        output: planes kept of the output, so that the returned slabs start at multiples of `slab`.
        warm_up: slabs before the first meaningful one.
    """

    slab: int
    pools: Ints
    skips: Ints
    output: int
    warm_up: int

    def around(self, context: Context) -> Context:
        """Returns the context of a tile: along z as many planes as the slabs of the warm-up."""
        after = self.slab * self.warm_up - context.before[0]
        return Context(context.before, (after, *context.after[1:]), context.step)


def stream_along(levels: Sequence[Level], slab: int, axis: int = 0) -> Stream:
    """Returns the stream of a U-Net with `levels` along an axis.

    The first plane of the first slab is ``Context.before`` planes below the first plane of the
    output, so poolings have the same phase as in a pass over a tile.

    Args:
        levels: from full resolution to the coarsest.
        slab: planes per call; a multiple of the step of the network.
        axis: the axis.

    Raises:
        InputError: if `slab` is not a multiple of the step.
    """
    line = [Level((v.kernel[axis],), (v.pool[axis],)) for v in levels]
    context = Context.of_levels(line)
    (step,), (halo,) = context.step, context.halo
    if slab < step or slab % step:
        near = max(step, round(slab / step) * step)
        raise InputError(f"slab={slab} must be a multiple of {step}; nearest is {near}.")
    cropped = _cropped(line, halo + step)
    # Plane i that a layer of the stream returns is plane i - late of a pass over the whole volume.
    late, skipped, pools = 0, [], []
    for level in line[:-1]:
        late += 2 * (level.kernel[0] - 1)
        skipped.append(late)
        pools.append(-late % level.pool[0])
        late = (late + pools[-1]) // level.pool[0]
    late += 2 * (line[-1].kernel[0] - 1)
    skips = []
    for number in reversed(range(len(line) - 1)):
        late *= line[number].pool[0]
        skips.append(late - skipped[number] - cropped[number])
        late += 2 * (line[number].kernel[0] - 1)
    output = -late % slab
    return Stream(slab, tuple(pools), tuple(reversed(skips)), output, (late + output) // slab)


def _cropped(line: Sequence[Level], extent: int) -> list[int]:
    """Planes that the skip connection of each level loses on either side."""
    convolved = [0.0] * len(line)
    cropped = [0] * (len(line) - 1)
    for layer in layers(line, [extent]):
        if layer.kind == "convolution":
            convolved[layer.level] = layer.extents[0]
        elif layer.kind == "up-convolution":
            cropped[layer.level] = int(convolved[layer.level] - layer.extents[0]) // 2
    return cropped
