"""Tiles: which voxels a tile owns, which it reads, and the plan that numbers them all.

Knows the arithmetic that makes tiling exact and nothing of files, networks or who runs a tile.
A tile owns its core; it reads the core and a halo:

        read.start                                             read.stop
        |<-- before -->|<----------- core ----------->|<-- after -->|
                       |<- write (core in the volume) ->|

Cores start at multiples of the core size from the origin of the volume, whatever region is asked
for, so every voxel is owned by one tile and computed from the same numbers in every run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Box, Ints
from unet_ray.tiling.levels import Level, output_extents


def _axis_context(levels: Sequence[Level]) -> tuple[int, int, int]:
    """(before, after, step) along the one axis of `levels`, from the layers' arithmetic alone."""
    step = math.prod(level.pool[0] for level in levels[:-1])
    extent = 1
    while (output := output_extents(levels, [extent])) is None:
        extent += 1
    before = (extent - output[0]) // 2
    # The network returns the core and some more, since input sizes come in steps: at least what
    # the last two convolutions take, which makes the halo one formula at every depth:
    # before = 6 * 2^d - 4 and after = 6 * 2^d for the paper's layers.
    excess = output[0] % step
    while excess < 2 * (levels[0].kernel[0] - 1):
        excess += step
    return before, before + excess, step


@dataclass(frozen=True, slots=True)
class Context:
    """What a network needs around a core, and the alignment that makes tiles exact.

    Attributes:
        before: voxels of real context below the core, per axis.
        after: voxels above it; the network returns a little more than the core and the last
            voxels are dropped.
        step: cores are multiples of it. Tiles that are not fall on different phases of the
            max-pooling and leave seams: the paper's 572 -> 388 at stride 388 is such a tiling.
    """

    before: Ints
    after: Ints
    step: Ints

    @classmethod
    def of_levels(cls, levels: Sequence[Level]) -> Context:
        """The context of a U-Net with these `levels`, from full resolution to the coarsest."""
        axes = range(len(levels[0].kernel))
        found = [_axis_context([Level((v.kernel[a],), (v.pool[a],)) for v in levels]) for a in axes]
        before, after, step = zip(*found, strict=True)
        return cls(before, after, step)

    @property
    def halo(self) -> Ints:
        """Voxels read around a core, both sides together, per axis."""
        return tuple(a + b for a, b in zip(self.before, self.after, strict=True))


@dataclass(frozen=True, slots=True)
class Tile:
    """One unit of work.

    Attributes:
        index: its number in the plan.
        read: what is read, mirrored where it leaves the volume; the same shape for every tile.
        write: the voxels it owns: its core, cut at the volume's faces.
        crop: where `write` lies in the predicted core.
    """

    index: int
    read: Box
    write: Box
    crop: Box


def round_up(value: int, step: int) -> int:
    """The least multiple of `step` that is not below `value`."""
    return -(-value // step) * step


def equal_core(extent: int, largest: int, step: int) -> int:
    """The core along one axis that covers `extent` in equal tiles, none above `largest`.

    As few tiles as `largest` allows, then as small as that number allows: no sliver at the end.

    Args:
        extent: size of the volume along the axis, in voxels, at least 1.
        largest: the largest core allowed; at least one `step` is used all the same.
        step: the core is a multiple of it.
    """
    largest = max(step, largest // step * step)
    tiles = -(-extent // largest)
    return round_up(-(-extent // tiles), step)


@dataclass(frozen=True)
class TilePlan:
    """All tiles of one volume, as a function of an integer: ``plan[i]``.

    Attributes:
        shape: the volume, in voxels (z, y, x).
        core: voxels that a tile owns, per axis: multiples of ``context.step``.
        context: what the network needs around a core.
        passes: the part of a core that one forward call computes, per axis; divides the core.

    Raises:
        InputError: if a core is no multiple of the step or of the pass.
    """

    shape: Ints
    core: Ints
    context: Context
    passes: Ints

    def __post_init__(self) -> None:
        for what, sizes, name, units in (
            ("tile", self.core, "step", self.context.step),
            ("pass", self.passes, "step", self.context.step),
            ("tile", self.core, "pass", self.passes),
        ):
            for axis, (n, k) in enumerate(zip(sizes, units, strict=True)):
                if n <= 0 or n % k:
                    raise InputError(
                        f"{what}={','.join(map(str, sizes))} does not fit this network: axis "
                        f"{axis} must be a multiple of its {name}, {k}; nearest is "
                        f"{max(k, round(n / k) * k)}."
                    )

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> TilePlan:
        """The plan that `dataclasses.asdict` and JSON made `told` of."""
        context = Context(**{name: tuple(sizes) for name, sizes in told["context"].items()})
        return cls(tuple(told["shape"]), tuple(told["core"]), context, tuple(told["passes"]))

    @property
    def counts(self) -> Ints:
        """Number of tiles per axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.core, strict=True))

    def __len__(self) -> int:
        return math.prod(self.counts)

    @property
    def read_shape(self) -> Ints:
        """Voxels that every tile reads, per axis."""
        return tuple(c + h for c, h in zip(self.core, self.context.halo, strict=True))

    @property
    def pass_shape(self) -> Ints:
        """Voxels that one forward call is given, per axis."""
        return tuple(c + h for c, h in zip(self.passes, self.context.halo, strict=True))

    def __getitem__(self, index: int) -> Tile:
        if not 0 <= index < len(self):
            raise IndexError(f"Tile {index} of a plan with {len(self)} tiles.")
        place, rest = [], index
        for count in reversed(self.counts):
            rest, at = divmod(rest, count)
            place.append(at)
        start = tuple(at * c for at, c in zip(reversed(place), self.core, strict=True))
        core = Box.of(self.core).shift(start)
        write = core.intersect(Box.of(self.shape))
        read = core.grow(self.context.before, self.context.after)
        return Tile(index, read, write, write.relative_to(start))

    def part(self, region: Box) -> Box:
        """The tiles that touch `region`, as a box of the grid `counts`: `size` is their number."""
        if not region.intersect(Box.of(self.shape)).size:
            return Box((0,) * len(self.core), (0,) * len(self.core))
        low = tuple(a // c for a, c in zip(region.start, self.core, strict=True))
        high = tuple(-(-b // c) for b, c in zip(region.stop, self.core, strict=True))
        return Box(low, high).intersect(Box.of(self.counts))

    def within(self, region: Box) -> Iterator[int]:
        """Numbers of the tiles that touch `region`, ascending; none for an empty one."""
        part, counts = self.part(region), self.counts
        rows = (range(a, b) for a, b in zip(part.start[:-1], part.stop[:-1], strict=True))
        for place in itertools.product(*rows):
            row = 0
            for at, count in zip(place, counts[:-1], strict=True):
                row = row * count + at
            row *= counts[-1]
            yield from range(row + part.start[-1], row + part.stop[-1])

    def pass_boxes(self, tile: Tile) -> Iterator[Box]:
        """Parts of the core that forward calls compute, relative to the core's start.

        All have the shape `passes`; those that lie wholly outside the volume are left out.
        """
        for part in Box.of(self.core).split(self.passes):
            if part.intersect(tile.crop).size:
                yield part

    def __repr__(self) -> str:
        def row(label: str, values: Sequence[int]) -> str:
            return f"  {label:<7}" + " x ".join(f"{v:>5}" for v in values)

        before, after = self.context.before, self.context.after
        core, read = self.core[-1], self.read_shape[-1]
        return "\n".join(
            [
                f"{len(self)} tiles, {' x '.join(map(str, self.counts))} over (z, y, x)",
                row("volume", self.shape),
                row("core", self.core),
                row("read", self.read_shape),
                row("pass", self.pass_shape),
                f"  along x: |-{before[-1]}-|{f' core {core} ':=^20}|-{after[-1]}-|  = {read} read",
            ]
        )
