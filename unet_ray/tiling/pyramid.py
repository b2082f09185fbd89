"""The pyramid of a volume: the factors, shapes and plans of its coarser levels.

Knows extents, voxel sizes and shards. Does not know how voxels are averaged or where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from unet_ray.tiling.boxes import Ints
from unet_ray.tiling.tiles import Context, TilePlan, round_up

NO_CONTEXT = Context((0, 0, 0), (0, 0, 0), (1, 1, 1))
LARGEST_TOP = 512  # extent of the coarsest level along y and x, in voxels; it fits a screen


def factors_of(shape: Sequence[int], voxel_size: Sequence[float] | None) -> tuple[Ints, ...]:
    """Returns the factors of levels 1, 2, … relative to level 0, each (z, y, x).

    From level to level y and x are halved, until both fit `LARGEST_TOP`. z is halved as long as
    its voxels are at most as large as those along y and x, so that voxels approach cubes.

    Args:
        shape: shape of the volume, in voxels (z, y, x).
        voxel_size: (z, y, x) in any unit; None if unknown. Then z is never halved, since a stack
            may be a series of frames.

    Returns:
        Powers of two; empty if the volume fits.
    """
    levels: list[Ints] = []
    factors: Ints = (1, 1, 1)
    extents = tuple(shape)
    while max(extents[1:]) > LARGEST_TOP:
        halved = [axis for axis in (1, 2) if extents[axis] > 1]
        if voxel_size and extents[0] > 1:
            spacing = [s * f for s, f in zip(voxel_size, factors, strict=True)]
            if spacing[0] <= min(spacing[axis] for axis in halved):
                halved.append(0)
        factors = tuple(2 * f if axis in halved else f for axis, f in enumerate(factors))
        extents = level_shape(shape, factors)
        levels.append(factors)
    return tuple(levels)


def level_shape(shape: Sequence[int], factors: Sequence[int]) -> Ints:
    """Returns the shape of a level; its last voxel along an axis may cover fewer voxels."""
    return tuple(-(-n // f) for n, f in zip(shape, factors, strict=True))


def level_plan(base: TilePlan, factors: Sequence[int]) -> TilePlan:
    """Returns the tiles of a level, which are its shards; they read no halo.

    A level smaller than a core has a smaller core. It remains a multiple of the step, since chunks
    are cores halved: an odd core of 957 voxels would be one chunk, too large for viewers.

    Args:
        base: the plan of level 0.
        factors: of the level relative to level 0, per axis.
    """
    shape = level_shape(base.shape, factors)
    extents = zip(shape, base.core, base.context.step, strict=True)
    core = tuple(min(round_up(n, step), largest) for n, largest, step in extents)
    return TilePlan(shape, core, NO_CONTEXT, core)
