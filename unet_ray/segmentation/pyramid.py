"""One pyramid level of a store: each tile is one shard, made from the level below.

Knows which voxels of the level below a shard needs. Does not know who runs the tiles, or how
voxels are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine.stages import Whole
from unet_ray.errors import RunError, reason
from unet_ray.segmentation.downsampling import mean_of, most_frequent
from unet_ray.segmentation.run import Segmentation
from unet_ray.storage.layout import LEDGER
from unet_ray.storage.ledger import skipped
from unet_ray.storage.stores import Store
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.pyramid import level_plan
from unet_ray.tiling.tiles import TilePlan


class Source:
    """The stored arrays of one level, read by boxes. Missing shards are errors, not zeros.

    Args:
        run: the run; its store has all tiles of the level.
        outputs: names of the arrays.
        level: pyramid level; 0 is the predicted one.
    """

    def __init__(self, run: Segmentation, outputs: Sequence[str], level: int = 0) -> None:
        self.plan = plan_of(run, level)
        self._store = Store(run.out, outputs, level=level)
        # Tiles that a mask skips have no shard at level 0, and count as background.
        predicted = level == 0 and "instances" not in outputs
        self._skipped = skipped(run.out / LEDGER, len(run.plan)) if predicted else None

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """Returns the voxels of `box`, (..., z, y, x).

        Raises:
            RunError: if a shard is missing, empty or damaged; names the file.
        """
        tiles = [*self.plan.within(box)]
        if len(tiles) == 1 and self.plan[tiles[0]].write == box:
            return self._part(name, tiles[0], box)
        array = self._store.read(name)
        voxels = np.empty((*array.shape[:-3], *box.shape), array.dtype)
        for tile in tiles:
            part = self.plan[tile].write.intersect(box)
            z, y, x = part.relative_to(box.start).slices
            voxels[..., z, y, x] = self._part(name, tile, part)
        return voxels

    def _part(self, name: str, tile: int, part: Box) -> NDArray[Any]:
        """Returns the voxels of `part`, which belongs to one tile."""
        planned, array = self.plan[tile], self._store.read(name)
        if self._skipped is not None and self._skipped[tile]:  # a killed run may have left a shard
            return np.zeros((*array.shape[:-3], *part.shape), array.dtype)
        self._store.require(name, planned)
        try:
            if part == planned.write:
                return self._store.decoded(name, planned)
            return np.asarray(array[(..., *part.slices)])
        except Exception as error:  # each codec raises its own errors
            raise RunError(
                f"{self._store.shard(name, planned)}: {name} of tile {tile} cannot be read "
                f"({reason(error)}); repair it with `unet-ray verify --repair`."
            ) from error


class LevelWorker(Whole):
    """Makes the shards of one level; safe to share between threads.

    Args:
        run: the run.
        outputs: names of the arrays.
        level: pyramid level, at least 1.
    """

    def __init__(self, run: Segmentation, outputs: Sequence[str], level: int) -> None:
        super().__init__(self._make)
        self._plan, self._outputs = plan_of(run, level), outputs
        self._source = Source(run, outputs, level - 1)
        self._store = Store(run.out, outputs, run.fence.look if run.fence else None, level)
        finer = run.factors[level - 2] if level > 1 else (1, 1, 1)
        pairs = zip(run.factors[level - 1], finer, strict=True)
        self._ratio = tuple(coarse // fine for coarse, fine in pairs)

    def _make(self, tile: int) -> str:
        planned = self._plan[tile]
        results = {name: self._reduced(name, planned.write) for name in self._outputs}
        return self._store.write(planned, results)

    def _reduced(self, name: str, write: Box) -> NDArray[Any]:
        """The voxels of a shard, made part by part.

        Each part covers at most one shard below, which is decoded as a whole. The memory holds the
        new shard and a part, as it holds a shard and its copy when the tile is written.
        """
        array = self._store.read(name)
        core = zip(self._source.plan.core, self._ratio, strict=True)
        extents = tuple(-(-below // ratio) for below, ratio in core)
        reduced = np.empty((*array.shape[:-3], *write.shape), array.dtype)
        reduce = mean_of if name == "probabilities" else most_frequent
        for part in write.split(extents):
            voxels = self._source.read(name, self._below(part))
            z, y, x = part.relative_to(write.start).slices
            reduced[..., z, y, x] = reduce(voxels, self._ratio)
        return reduced

    def _below(self, part: Box) -> Box:
        """The voxels of the level below that `part` covers."""
        start, stop = (
            tuple(n * f for n, f in zip(corner, self._ratio, strict=True))
            for corner in (part.start, part.stop)
        )
        return Box(start, stop).intersect(Box.of(self._source.plan.shape))


def plan_of(run: Segmentation, level: int) -> TilePlan:
    """Returns the tiles of a pyramid level of a run."""
    return level_plan(run.plan, run.factors[level - 1]) if level else run.plan
