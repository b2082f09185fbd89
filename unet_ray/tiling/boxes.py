"""N-dimensional, half-open boxes of voxels with integer corners.

Knows integer arithmetic. Does not know arrays, files or networks. A box may extend beyond a
volume: a negative start is a position before the origin and never counts from the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """The voxels at ``start <= position < stop``, in NumPy axis order.

    Attributes:
        start: the first position, per axis.
        stop: the position after the last, per axis.

    Raises:
        ValueError: if the corners have different lengths or a stop is below its start.
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
        """Returns the box that covers a whole array of `shape`, starting at the origin."""
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
        """Index that cuts this box out of an array; valid only for non-negative corners."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def grow(self, before: Sequence[int], after: Sequence[int]) -> Box:
        """Returns this box with `before` voxels added below and `after` above, per axis."""
        start = tuple(a - n for a, n in zip(self.start, before, strict=True))
        return Box(start, tuple(b + n for b, n in zip(self.stop, after, strict=True)))

    def shift(self, offset: Sequence[int]) -> Box:
        """Returns this box moved by `offset` voxels, per axis."""
        start = tuple(a + n for a, n in zip(self.start, offset, strict=True))
        return Box(start, tuple(b + n for b, n in zip(self.stop, offset, strict=True)))

    def relative_to(self, origin: Sequence[int]) -> Box:
        """Returns this box in coordinates that start at `origin`."""
        return self.shift([-n for n in origin])

    def intersect(self, other: Box) -> Box:
        """Returns the voxels that both boxes contain; its size is 0 if they do not overlap."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box(start, tuple(max(a, b) for a, b in zip(start, stop, strict=True)))

    def split(self, shape: Sequence[int]) -> Iterator[Box]:
        """Yields boxes of at most `shape` that partition this one, last axis fastest."""
        if not self.start:
            yield self
            return
        for low in range(self.start[0], self.stop[0], shape[0]):
            high = min(low + shape[0], self.stop[0])
            for rest in Box(self.start[1:], self.stop[1:]).split(shape[1:]):
                yield Box((low, *rest.start), (high, *rest.stop))

    def split_by_chunks(self, chunk: Sequence[int], max_chunks: int) -> Iterator[Box]:
        """Yields boxes that partition this one, each of few chunks, last axis fastest.

        Args:
            chunk: extents of a chunk; the first chunk starts at the origin.
            max_chunks: number of chunks that a box may touch, at least 1.
        """
        spans = [(a // n, -(-b // n)) for a, b, n in zip(self.start, self.stop, chunk, strict=True)]
        shape: list[int] = []
        for low, high in reversed(spans):
            shape.insert(0, max(1, min(high - low, max_chunks)))
            max_chunks //= shape[0]
        for part in Box(*zip(*spans, strict=True)).split(shape):
            start, stop = (
                tuple(a * n for a, n in zip(corner, chunk, strict=True))
                for corner in (part.start, part.stop)
            )
            yield Box(start, stop).intersect(self)

    def __str__(self) -> str:
        """Formats the box as ``z0:z1,y0:y1,x0:x1``, like a region on the command line."""
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))
