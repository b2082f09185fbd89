"""The foreground of a run's objects: the class map, with holes filled if a rule says so.

Knows the stored class map and the holes of each tile. Does not know how objects are labelled.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import DamageError
from unet_ray.segmentation.components import Connection, label_components
from unet_ray.segmentation.packing import pack, unpack
from unet_ray.segmentation.pyramid import Source
from unet_ray.segmentation.rules import Rules
from unet_ray.segmentation.run import Segmentation
from unet_ray.storage.places import Place
from unet_ray.storage.records import IDS, Records
from unet_ray.tiling.boxes import Box

_KIND = b"tile-ids"  # the first bytes of each record of ids


class Foreground:
    """The foreground of a run, read by boxes; safe to share between threads.

    Args:
        run: the run; its class map is finished, and its holes, too, where they are filled.
        rules: its rules.
    """

    def __init__(self, run: Segmentation, rules: Rules) -> None:
        self._out, self._plan, self._fills = run.out, run.plan, rules.fill_holes
        self._outside = Connection(rules.connect, rules.connectivity).complement
        self._classes = Source(run, ("classes",))

    def read(self, box: Box) -> NDArray[np.bool_]:
        """Returns the foreground of `box`, (z, y, x).

        Raises:
            RunError: if a shard of the class map, or the holes of a tile, are missing or damaged.
        """
        mask: NDArray[np.bool_] = self._classes.read("classes", box) != 0
        for tile in self._plan.within(box) if self._fills else ():
            write = self._plan[tile].write
            part = write.intersect(box)
            holes = self._holes(tile)[part.relative_to(write.start).slices]
            mask[part.relative_to(box.start).slices] |= holes
        return mask

    def background(self, tile: int) -> tuple[NDArray[np.int32], int]:
        """Returns the labels of the background of a tile, (z, y, x) from 1, and their number."""
        background = self._classes.read("classes", self._plan[tile].write) == 0
        return label_components(background, self._outside)

    def _holes(self, tile: int) -> NDArray[np.bool_]:
        labels, count = self.background(tile)
        ids = read_ids(self._out, tile, count, background=True)
        holes: NDArray[np.bool_] = (ids != 0)[labels]
        return holes


def ids_to_bytes(ids: NDArray[np.uint64]) -> bytes:
    """Returns the record of the final ids of a tile's labels."""
    return pack(_KIND, [ids.astype("<u8")])


def read_ids(out: Place, tile: int, labels: int, background: bool) -> NDArray[np.uint64]:
    """Returns the final id of each label of a tile, as the join has written it, (labels + 1,).

    Raises:
        DamageError: if the record is missing, damaged or of other labels; names it.
    """

    def parse(data: bytes) -> NDArray[np.uint64]:
        (ids,) = unpack(_KIND, ["<u8"], data)
        if len(ids) != labels + 1:
            raise DamageError(f"it has {len(ids)} ids for {labels} labels and the background")
        return ids

    return Records(out, IDS[background]).parsed(tile, parse)
