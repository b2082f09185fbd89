"""Tiles, the voxels that each reads and writes, and the plan that numbers them.

Knows the arithmetic that makes tiling exact. Does not know files, networks or engines.
A tile owns its core and reads the core plus a halo:

        read.start                                             read.stop
        |<-- before -->|<----------- core ----------->|<-- after -->|
                       |<- write (core in the volume) ->|

Cores start at multiples of the core size from the origin of the volume, whatever the requested
region. So exactly one tile owns a voxel, and every run computes it from the same input.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Box, Ints
from unet_ray.tiling.levels import Level, output_extents


@functools.lru_cache  # the search takes up to 40 ms
def _axis_context(levels: tuple[Level, ...]) -> tuple[int, int, int]:
    """Returns (before, after, step) of one-axis `levels`, from the arithmetic of the layers."""
    step = math.prod(level.pool[0] for level in levels[:-1])
    extent = 1
    while (output := output_extents(levels, [extent])) is None:
        extent += 1
    before = (extent - output[0]) // 2
    # Valid input sizes come in steps, so the output exceeds the core. An excess of at least the
    # loss of the last two convolutions gives one formula at every depth d of the paper's network:
    # before = 6 * 2^d - 4 and after = 6 * 2^d.
    excess = output[0] % step
    while excess < 2 * (levels[0].kernel[0] - 1):
        excess += step
    return before, before + excess, step


@dataclass(frozen=True, slots=True)
class Context:
    """The voxels a network needs around a core, and the alignment that makes tiles exact.

    Attributes:
        before: voxels of context below the core, per axis.
        after: voxels of context above the core, per axis. The output exceeds the core a little;
            the excess at its end is dropped.
        step: the core must be a multiple of it, per axis. Otherwise tiles start on different
            phases of the max-pooling and leave seams, as the paper's 572 -> 388 at stride 388.
    """

    before: Ints
    after: Ints
    step: Ints

    @classmethod
    def of_levels(cls, levels: Sequence[Level]) -> Context:
        """Returns the context of a U-Net with `levels`, from full resolution to the coarsest."""
        axes = range(len(levels[0].kernel))
        contexts = [
            _axis_context(tuple(Level((v.kernel[a],), (v.pool[a],)) for v in levels)) for a in axes
        ]
        before, after, step = zip(*contexts, strict=True)
        return cls(before, after, step)

    @property
    def halo(self) -> Ints:
        """Voxels read around a core, summed over both sides, per axis."""
        return tuple(a + b for a, b in zip(self.before, self.after, strict=True))


@dataclass(frozen=True, slots=True)
class Tile:
    """One unit of work.

    Attributes:
        index: number of the tile in its plan.
        read: the input box, mirrored outside the volume; all tiles have the same shape.
        write: the voxels that the tile owns: its core, cut at the faces of the volume.
        crop: `write` relative to the start of the core.
    """

    index: int
    read: Box
    write: Box
    crop: Box


def round_up(value: int, step: int) -> int:
    """Returns the smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step


def equal_core(extent: int, largest: int, step: int) -> int:
    """Returns the core along one axis that covers `extent` in equal tiles of at most `largest`.

    It uses the fewest tiles that `largest` allows, then the smallest core for that number of
    tiles. So the last tile is not a thin remainder.

    Args:
        extent: size of the volume along the axis, in voxels, at least 1.
        largest: upper bound of the core, in voxels; a value below `step` counts as `step`.
        step: the core is a multiple of it.
    """
    largest = max(step, largest // step * step)
    tiles = -(-extent // largest)
    return round_up(-(-extent // tiles), step)


@dataclass(frozen=True)
class TilePlan:
    """All tiles of one volume; ``plan[i]`` computes tile `i`.

    Attributes:
        shape: shape of the volume, in voxels (z, y, x).
        core: voxels that a tile owns, per axis; multiples of ``context.step``.
        context: voxels that the network needs around a core.
        passes: the part of a core that one forward call computes, per axis; it divides the core.
        streamed: whether passes stream along z: each continues the one below it, and reads as many
            planes as it returns. A tile then reads a halo for the first pass of a stream.

    Raises:
        InputError: if the core or the pass is not a multiple of the step, or the core is not a
            multiple of the pass.
    """

    shape: Ints
    core: Ints
    context: Context
    passes: Ints
    streamed: bool = False

    def __post_init__(self) -> None:
        for label, sizes, unit_name, units in (
            ("tile", self.core, "step", self.context.step),
            ("pass", self.passes, "step", self.context.step),
            ("tile", self.core, "pass", self.passes),
        ):
            for axis, (n, k) in enumerate(zip(sizes, units, strict=True)):
                if n <= 0 or n % k:
                    raise InputError(
                        f"{label}={','.join(map(str, sizes))} does not fit this network: axis "
                        f"{axis} must be a multiple of its {unit_name}, {k}; nearest is "
                        f"{max(k, round(n / k) * k)}."
                    )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TilePlan:
        """Returns the plan whose `dataclasses.asdict`, stored as JSON, is `fields`."""
        context = Context(**{name: tuple(sizes) for name, sizes in fields["context"].items()})
        shape, core, passes = (tuple(fields[name]) for name in ("shape", "core", "passes"))
        return cls(shape, core, context, passes, fields.get("streamed", False))

    def to_json(self) -> dict[str, Any]:
        """Returns the fields for JSON; the one of streams only if there are streams."""
        fields = asdict(self)
        if not self.streamed:  # as earlier versions wrote it
            del fields["streamed"]
        return fields

    @property
    def counts(self) -> Ints:
        """Number of tiles per axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.core, strict=True))

    def __len__(self) -> int:
        return math.prod(self.counts)

    @property
    def read_shape(self) -> Ints:
        """Extents of the input of a tile, per axis."""
        return tuple(c + h for c, h in zip(self.core, self.context.halo, strict=True))

    @property
    def pass_shape(self) -> Ints:
        """Extents of the input of one forward call, per axis."""
        shape = tuple(c + h for c, h in zip(self.passes, self.context.halo, strict=True))
        return (self.passes[0], *shape[1:]) if self.streamed else shape

    def __getitem__(self, index: int) -> Tile:
        if not 0 <= index < len(self):
            raise IndexError(f"Tile {index} of a plan with {len(self)} tiles.")
        coordinates, rest = [], index  # of the tile in the grid, last axis first
        for count in reversed(self.counts):
            rest, coordinate = divmod(rest, count)
            coordinates.append(coordinate)
        start = tuple(n * c for n, c in zip(reversed(coordinates), self.core, strict=True))
        core = Box.of(self.core).shift(start)
        write = core.intersect(Box.of(self.shape))
        read = core.grow(self.context.before, self.context.after)
        return Tile(index, read, write, write.relative_to(start))

    def part(self, region: Box) -> Box:
        """Returns the tiles that overlap `region`, as a box in the grid of shape `counts`."""
        if not region.intersect(Box.of(self.shape)).size:
            return Box((0,) * len(self.core), (0,) * len(self.core))
        low = tuple(a // c for a, c in zip(region.start, self.core, strict=True))
        high = tuple(-(-b // c) for b, c in zip(region.stop, self.core, strict=True))
        return Box(low, high).intersect(Box.of(self.counts))

    def within(self, region: Box) -> Iterator[int]:
        """Yields the numbers of the tiles that overlap `region`, ascending."""
        part, counts = self.part(region), self.counts
        leading = (range(a, b) for a, b in zip(part.start[:-1], part.stop[:-1], strict=True))
        for coordinates in itertools.product(*leading):
            row = 0
            for coordinate, count in zip(coordinates, counts[:-1], strict=True):
                row = row * count + coordinate
            row *= counts[-1]
            yield from range(row + part.start[-1], row + part.stop[-1])

    def pass_boxes(self, tile: Tile) -> Iterator[Box]:
        """Yields the parts of a core that forward calls compute, relative to the core's start.

        All have the shape `passes`. Parts entirely outside the volume are skipped.
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
