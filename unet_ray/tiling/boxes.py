"""Boxes of voxels: n-dimensional, half-open, of plain integers.

Knows integer arithmetic only: no arrays, no files, no network. A box may reach outside any
volume (negative starts are ordinary numbers here, never "from the end").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """The voxels ``start <= position < stop``, one number per axis, in NumPy axis order.

    Raises:
        ValueError: if the two corners have different lengths or a stop lies before its start.
    """

    start: Ints
    stop: Ints

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(f"Box corners differ in length: {self.start} and {self.stop}.")
        if any(b < a for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"Box stops before it starts: {self.start} to {self.stop}.")

    @classmethod
    def of(cls, shape: Sequence[int]) -> Box:
        """The box of a whole array of `shape`, from the origin."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> Ints:
        """Extent per axis, in voxels."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this box in an array whose origin is the origin of the axes."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def grow(self, before: Sequence[int], after: Sequence[int]) -> Box:
        """This box with `before` voxels added below and `after` above, per axis."""
        start = tuple(a - n for a, n in zip(self.start, before, strict=True))
        return Box(start, tuple(b + n for b, n in zip(self.stop, after, strict=True)))

    def shift(self, offset: Sequence[int]) -> Box:
        """This box moved by `offset` voxels."""
        start = tuple(a + n for a, n in zip(self.start, offset, strict=True))
        return Box(start, tuple(b + n for b, n in zip(self.stop, offset, strict=True)))

    def relative_to(self, origin: Sequence[int]) -> Box:
        """This box as seen from `origin`."""
        return self.shift([-n for n in origin])

    def intersect(self, other: Box) -> Box:
        """The voxels in both; of size 0 if the boxes do not meet."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box(start, tuple(max(a, b) for a, b in zip(start, stop, strict=True)))

    def split(self, shape: Sequence[int]) -> Iterator[Box]:
        """Boxes of at most `shape` that partition this one, last axis fastest."""
        if not self.start:
            yield self
            return
        for low in range(self.start[0], self.stop[0], shape[0]):
            high = min(low + shape[0], self.stop[0])
            for rest in Box(self.start[1:], self.stop[1:]).split(shape[1:]):
                yield Box((low, *rest.start), (high, *rest.stop))

    def split_by_chunks(self, chunk: Sequence[int], most: int) -> Iterator[Box]:
        """Boxes that partition this one and touch at most `most` chunks each, last axis fastest.

        Args:
            chunk: extents of a chunk; the first begins at the origin.
            most: at least 1.
        """
        spans = [(a // n, -(-b // n)) for a, b, n in zip(self.start, self.stop, chunk, strict=True)]
        shape: list[int] = []
        for low, high in reversed(spans):
            shape.insert(0, max(1, min(high - low, most)))
            most //= shape[0]
        for part in Box(*zip(*spans, strict=True)).split(shape):
            start, stop = (
                tuple(a * n for a, n in zip(corner, chunk, strict=True))
                for corner in (part.start, part.stop)
            )
            yield Box(start, stop).intersect(self)

    def __str__(self) -> str:
        """``z0:z1,y0:y1,x0:x1``, as the command line writes a region."""
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))
