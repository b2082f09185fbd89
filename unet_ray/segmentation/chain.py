"""The stages of a run in their order: prediction, pyramid levels, objects and their table.

Knows the worker and the files of each stage. Does not know who runs the tiles, or how a worker
computes one.

A stage after the prediction starts when no tile of the prediction is missing; tiles that a mask
skips count as background. Its ledger records from which tiles its results were made, so that they
are made again if a later run adds tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine.stages import Worker
from unet_ray.segmentation.rules import Rules
from unet_ray.segmentation.run import Segmentation
from unet_ray.storage.layout import PREDICTED
from unet_ray.storage.ledger import committed
from unet_ray.storage.places import Place
from unet_ray.storage.records import IDS, LABELS, ROWS
from unet_ray.storage.written import ONE_TASK, Written, is_made_from, origin_of
from unet_ray.tiling.boxes import Ints
from unet_ray.tiling.pyramid import level_plan
from unet_ray.tiling.tiles import TilePlan


@dataclass(frozen=True)
class Link:
    """One stage after the prediction.

    Attributes:
        written: its name, its tiles, and the files that it writes.
        make_worker: makes the worker of a run, in the process that uses it.
        reads_input: whether the worker reads the input volume.
    """

    written: Written
    make_worker: Callable[[Segmentation], Worker]
    reads_input: bool = False

    def continues(self, out: Place, source: str) -> bool:
        """Returns whether the results so far were made from the predicted tiles of `source`."""
        return is_made_from(out, self.written.stage, source)

    def origin(self, source: str) -> dict[str, str]:
        """Returns the record of the predicted tiles for the ledger."""
        return origin_of(self.written.stage, source)

    def pending(self, out: Place, source: str) -> NDArray[np.bool_]:
        """Returns which tiles must still be computed, bool, shape (tiles,).

        Args:
            out: the output.
            source: digest of the predicted tiles, see `source_of`.
        """
        tiles = len(self.written.plan)
        if not self.continues(out, source):
            return np.ones(tiles, bool)
        return ~(committed(out / self.written.ledger, tiles) & self.written.present(out))


def chain_of(
    plan: TilePlan, outputs: Sequence[str], factors: Sequence[Ints], rules: Rules | None
) -> tuple[Link, ...]:
    """Returns the stages after the prediction, in their order.

    Args:
        plan: the predicted tiles.
        outputs: names of the stored outputs.
        factors: voxels of the volume per voxel of each pyramid level, from level 1 on.
        rules: rules of the objects; None without objects.
    """
    predicted = tuple(name for name in outputs if name in PREDICTED)
    links = [*_levels("pyramid", plan, predicted, factors)]
    if rules is None:
        return tuple(links)
    tiles = len(plan)
    for background in (True, False) if rules.fill_holes else (False,):
        label, join = ("holes", "join-holes") if background else ("label", "join")
        labels = Written(label, plan, records=LABELS[background], files=tiles)
        ids = Written(join, ONE_TASK, records=IDS[background], files=tiles)
        links += [
            Link(labels, partial(_make, "LabelWorker", background=background)),
            Link(ids, partial(_make, "JoinWorker", background=background)),
        ]
    instances = Written("instances", plan, ("instances",), records=ROWS, files=tiles)
    links.append(Link(instances, partial(_make, "InstanceWorker"), reads_input=True))
    links += _levels("instances-pyramid", plan, ("instances",), factors)
    table = Written("table", ONE_TASK, table=True)
    return (*links, Link(table, partial(_make, "TableWorker")))


def _levels(
    name: str, plan: TilePlan, outputs: tuple[str, ...], factors: Sequence[Ints]
) -> list[Link]:
    return [
        Link(
            Written(f"{name}-{level}", level_plan(plan, each), outputs, level),
            partial(_make_level, outputs=outputs, level=level),
        )
        for level, each in enumerate(factors, 1)
    ]


# The workers are imported where they are made: their compiled code needs memory, and processes that
# only predict do without it.


def _make_level(run: Segmentation, outputs: tuple[str, ...], level: int) -> Worker:
    from unet_ray.segmentation.pyramid import LevelWorker

    return LevelWorker(run, outputs, level)


def _make(name: str, run: Segmentation, **chosen: bool) -> Worker:
    from unet_ray.segmentation import instances

    worker: Worker = getattr(instances, name)(run, **chosen)
    return worker
