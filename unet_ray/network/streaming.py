"""A network that streams along z: slabs of planes in, the scores of as many planes out.

Knows the planes that each layer keeps from one slab and one tile to the next. Does not know voxels
or files. Nothing is computed twice along z, and every call has the same shapes, so a result does
not depend on the slab with which a stream began.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from unet_ray.network.unet import UNet, applied, memory_format, middle, pooled
from unet_ray.tiling.boxes import Ints
from unet_ray.tiling.streaming import Stream, stream_along
from unet_ray.tiling.tiles import Tile, TilePlan

Kept = dict[tuple[str, int, int], Tensor]  # planes of a layer: its part, level and number


class StreamedUNet:
    """Streams slabs through a network, whose norms are folded into its weights.

    Args:
        network: a network in 3-D, at inference.
        slab: planes per call, a multiple of the step along z.

    Attributes:
        stream: planes that the layers keep, and how far the output is behind.

    Raises:
        InputError: if `slab` is not a multiple of the step.
    """

    def __init__(self, network: UNet, slab: int) -> None:
        self._network = network
        self.stream: Stream = stream_along(network.levels, slab)

    def __call__(self, slab: Tensor, kept: Kept) -> Tensor:
        """Class scores of a slab, `stream.warm_up` slabs behind the input.

        Args:
            slab: ``(1, in_channels, slab, y, x)``, normalised.
            kept: planes of the call before, which are replaced in place; empty at the start of a
                stream, where the scores of the first `stream.warm_up` calls are meaningless. After
                an error they are of no use.

        Returns:
            ``(1, classes, slab, y - m, x - m)``; see `UNet.forward`.
        """
        with torch.inference_mode():
            skips = self._network.skip_extents(slab.shape[-2:])
            scores = applied(self._network.head, self._level(0, [slab], skips, kept))
            return _delayed(scores, kept, ("output", 0, 0), self.stream.output)

    def _level(self, number: int, given: list[Tensor], skips: Sequence[Ints], kept: Kept) -> Tensor:
        """The features of a level, after the levels below it.

        `given` is a list, from which the input is taken: a reference would keep it in memory.
        """
        network, stream = self._network, self.stream
        x = self._convolved(network.down[number], given, kept, ("down", number))
        if number == network.depth:
            return x
        late, pool_late = stream.skips[number], stream.pools[number]
        joined = [_delayed(middle(x, skips[number]), kept, ("skip", number, 0), late)]
        whole = _delayed(x, kept, ("pool", number, 0), pool_late)
        below = [pooled(whole, network.levels[number].pool)]
        del x, whole  # before the levels below need memory
        joined.append(applied(network.up[number], self._level(number + 1, below, skips, kept)))
        both = [torch.cat(joined, dim=1)]
        joined.clear()
        return self._convolved(network.join[number], both, kept, ("join", number))

    def _convolved(
        self, stack: nn.Module, given: list[Tensor], kept: Kept, key: tuple[str, int]
    ) -> Tensor:
        x = given.pop()
        for number, layer in enumerate(cast(nn.Sequential, stack)):
            if isinstance(layer, nn.Conv3d):
                x = _after(x, kept, (*key, number), layer.kernel_size[0] - 1)
            x = applied(layer, x)
        return x


def _after(x: Tensor, kept: Kept, key: tuple[str, int, int], count: int) -> Tensor:
    """The kept planes, zeros at first, then `x`; keeps the last `count` planes in their place."""
    if not count:
        return x
    x = torch.cat([_planes_of(x, kept, key, count), x], dim=2)
    kept[key].copy_(x[:, :, -count:])
    return x


def _delayed(x: Tensor, kept: Kept, key: tuple[str, int, int], count: int) -> Tensor:
    """As many planes as `x` has, `count` planes late; keeps those that wait, in place."""
    if not count:
        return x
    before, planes = _planes_of(x, kept, key, count), x.shape[2]
    if count < planes:
        late = torch.cat([before, x[:, :, : planes - count]], dim=2)
        before.copy_(x[:, :, planes - count :])
        return late
    late = before[:, :, :planes].clone()
    for plane in range(count - planes):  # one by one, since source and target overlap
        before[:, :, plane] = before[:, :, plane + planes]
    before[:, :, count - planes :] = x
    return late


def _planes_of(x: Tensor, kept: Kept, key: tuple[str, int, int], count: int) -> Tensor:
    """The `count` planes that a layer has kept, which are zeros at the start of a stream."""
    if key not in kept:
        kept[key] = torch.zeros(
            (*x.shape[:2], count, *x.shape[3:]), dtype=x.dtype, device=x.device
        ).contiguous(memory_format=memory_format(x))
    return kept[key]


class Columns:
    """Planes that streams keep between the tiles of a column, in one process.

    A tile above one that this process has just predicted continues its streams. Any other tile
    begins new ones, which takes longer and gives the same bytes.

    Args:
        plan: the tiles.
        least: streams that may wait or run at a time, or as many as tiles that were predicted at a
            time if these are more.
    """

    def __init__(self, plan: TilePlan, least: int = 1) -> None:
        self._counts = plan.counts
        self._waiting: dict[int, dict[Ints, list[Kept]]] = {}  # by the number of the next tile
        self._spare: list[dict[Ints, list[Kept]]] = []  # of streams that have ended
        self._busy, self._most = 0, least  # tiles predicted now, and streams at a time
        self._lock = threading.Lock()

    @contextmanager
    def of(self, tile: Tile) -> Iterator[tuple[dict[Ints, list[Kept]], bool]]:
        """Yields the planes of the parts of a tile, and whether its streams go on with them.

        New streams write over the planes of ended ones: new memory for each column would leave gaps
        between the pieces. After an error the planes are dropped.
        """
        layer = math.prod(self._counts[1:])
        with self._lock:
            continued = self._waiting.pop(tile.index, None)
            self._busy += 1
            self._most = max(self._most, self._busy)
            while self._waiting and len(self._waiting) + self._busy > self._most:
                # The one that has waited longest.
                self._spare.append(self._waiting.pop(next(iter(self._waiting))))
            kept = continued
            if kept is None:
                kept = self._spare.pop() if self._spare else {}
        try:
            yield kept, continued is not None
        except BaseException:
            kept = {}
            raise
        finally:
            with self._lock:
                self._busy -= 1
                if kept and tile.index + layer < layer * self._counts[0]:
                    self._waiting[tile.index + layer] = kept
                elif kept:
                    self._spare.append(kept)
