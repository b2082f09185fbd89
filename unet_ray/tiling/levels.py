"""The resolution levels of a U-Net and the extents of its layers for a given input.

Knows kernel and pooling widths along any number of axes. Does not know channels or tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from unet_ray.tiling.boxes import Ints


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of a U-Net: two unpadded convolutions, then pooling to the next level.

    Attributes:
        kernel: width of the convolutions per axis; 1 on an axis that is not convolved.
        pool: width of the pooling and of the matching up-convolution per axis; 1 for none.
            Ignored for the last level.
    """

    kernel: Ints
    pool: Ints


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a forward pass.

    Attributes:
        kind: the operation; ``head`` is the final convolution of width 1.
        level: number of the resolution level; 0 is the finest.
        extents: output extents, per axis.
    """

    kind: Literal["convolution", "pooling", "up-convolution", "head"]
    level: int
    extents: tuple[float, ...]

    @property
    def voxels(self) -> float:
        """Number of output voxels in one channel."""
        return math.prod(self.extents)


def layers(
    levels: Sequence[Level], extents: Sequence[float], valid: bool | Sequence[bool] = True
) -> Iterator[Layer]:
    """Yields the layers of a U-Net in the order of a forward pass (Ronneberger 2015, fig. 1).

    Args:
        levels: from full resolution to the coarsest.
        extents: input extents, per axis. If the network does not accept them, some of the
            layers have fractional extents or extents below 1.
        valid: whether convolutions are unpadded and so lose the border, of all axes or of each.
    """
    lose = [valid] * len(extents) if isinstance(valid, bool) else valid
    size = tuple(float(n) for n in extents)
    last = len(levels) - 1

    def convolved(level: int) -> Iterator[Layer]:
        nonlocal size
        for _ in range(2):
            axes = zip(size, levels[level].kernel, lose, strict=True)
            size = tuple(n - k + 1 if cut else n for n, k, cut in axes)
            yield Layer("convolution", level, size)

    for level in range(last):
        yield from convolved(level)
        size = tuple(n / p for n, p in zip(size, levels[level].pool, strict=True))
        yield Layer("pooling", level, size)
    yield from convolved(last)
    for level in reversed(range(last)):
        size = tuple(n * p for n, p in zip(size, levels[level].pool, strict=True))
        yield Layer("up-convolution", level, size)
        yield from convolved(level)
    yield Layer("head", 0, size)


def output_extents(levels: Sequence[Level], extents: Sequence[int]) -> Ints | None:
    """Returns the output extents of a U-Net for input `extents`; None if it does not fit them."""
    sizes = [layer.extents for layer in layers(levels, extents)]
    if any(n < 1 or n != int(n) for size in sizes for n in size):
        return None
    return tuple(int(n) for n in sizes[-1])


def descriptions(levels: Sequence[Level]) -> list[str]:
    """Returns a line for each level, such as ``convolves 1 x 3 x 3, pools 1 x 2 x 2 (z, y, x)``."""
    kernels = [" x ".join(map(str, level.kernel)) for level in levels]
    pools = [", pools " + " x ".join(map(str, level.pool)) for level in levels[:-1]]
    pairs = zip(kernels, [*pools, ""], strict=True)
    return [f"convolves {kernel}{pool} (z, y, x)" for kernel, pool in pairs]
