"""The damage of one stage: which of its committed tiles have damaged files.

Knows how to check all tiles in parallel. Does not know how a tile is computed again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import closing

from unet_ray.engine.rounds import numbers_of, tries
from unet_ray.engine.stages import Stage, Whole
from unet_ray.errors import RunError
from unet_ray.storage.tile_audit import TileAudit


class CheckedStage:
    """The damaged tiles of one stage.

    Args:
        audit: checks the files of a tile.

    Attributes:
        audit: as above.
        damage: a description for each damaged output, by tile and output.
    """

    def __init__(self, audit: TileAudit) -> None:
        self.audit = audit
        self.damage: dict[int, dict[str, str]] = {}

    @property
    def done(self) -> int:
        """Number of committed tiles."""
        return int(self.audit.done.sum())

    def check(self, limit: int = 0) -> list[int]:
        """Checks every committed tile; returns a random sample of at most `limit` sound tiles.

        Raises:
            RunError: if a tile cannot be checked.
        """
        random_numbers, sound = random.SystemRandom(), 0
        chosen: list[int] = []
        stage = Stage("verify", lambda: Whole(self._check), "cpu")
        with closing(tries(stage, numbers_of(self.audit.done))) as receipts:
            for receipt, will_retry in receipts:
                if receipt.error and not will_retry:
                    raise RunError(f"{self.audit.path}: tile {receipt.tile}: {receipt.error}")
                if receipt.error or receipt.tile in self.damage:
                    continue
                sound += 1
                # Reservoir sampling (Knuth, algorithm R): all tiles so far are equally likely.
                if len(chosen) < limit:
                    chosen.append(receipt.tile)
                elif (slot := random_numbers.randrange(sound)) < limit:
                    chosen[slot] = receipt.tile
        return chosen

    def check_again(self, tiles: Sequence[int]) -> list[int]:
        """Checks tiles that were repaired; returns the sound ones."""
        for tile in tiles:
            self._check(tile)
        return [tile for tile in tiles if tile not in self.damage]

    def _check(self, tile: int) -> None:
        damage = self.audit.damage_of(tile)
        self.damage.pop(tile, None)
        if damage:
            self.damage[tile] = damage

    def sentences(self) -> Iterator[str]:
        """Yields one sentence for each damaged file."""
        for tile, outputs in sorted(self.damage.items()):
            for name, damage in outputs.items():
                path = self.audit.shard(name, tile)
                subject = "the shard" if name in self.audit.outputs else "the records"
                yield f"{path}: {subject} of tile {tile} {damage}."
