"""Arrays and volumes as stacks (z, y, x) for scoring, read slice by slice or piece by piece.

Handles shapes, dtypes and the check of allowed values. Independent of the scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.volume import Volume

Scored: TypeAlias = "NDArray[Any] | Volume | Stack"
PIECE_VOXELS = 1 << 22
SLAB_BYTES = 1 << 28  # bound of the slices read together; whole chunks are decoded only once


class Stack:
    """A prediction or a truth as a stack (z, y, x), from an array or a volume.

    Args:
        source: an array (y, x), (z, y, x) or (1, z, y, x), or a volume of one channel.
        name: its name in error messages; by default the volume's path, or "the array".
        scale: divisor that turns stored values into probabilities. By default 1 for floats and
            for integers that are all 0 or 1, and the largest value of the type for other integers.
        planes: z of the slices to use, in this order; all by default.

    Raises:
        InputError: if `source` has another number of axes, several channels, no voxels or a
            dtype that is not numeric.
        TypeError: if `source` is a stack.
    """

    def __init__(
        self,
        source: Scored,
        name: str | None = None,
        scale: float | None = None,
        planes: list[int] | None = None,
    ) -> None:
        if isinstance(source, Stack):
            raise TypeError("source is a Stack already; use Stack.of.")
        self.name = name or (source.path if isinstance(source, Volume) else "the array")
        if not isinstance(source, Volume):
            source = np.asarray(source)
        shape = tuple(source.shape)
        if len(shape) == 4 and shape[0] != 1:
            raise InputError(
                f"{self.name}: has {shape[0]} channels; scores need one map: labels or the "
                "probability of cell."
            )
        if not isinstance(source, Volume):
            if not 2 <= source.ndim <= 4 or source.dtype.kind not in "biuf" or not source.size:
                raise InputError(
                    f"{self.name}: {source.dtype} of shape {shape} is not an image; scores need "
                    "a numeric array of shape (y, x) or (z, y, x)."
                )
            source = source.reshape(-1, *shape[-2:])
        self._source, self._scale, self._planes = source, scale, planes
        depth = len(planes) if planes is not None else source.shape[-3]
        self.shape = (depth, *source.shape[-2:])
        self.dtype = source.dtype

    @classmethod
    def of(cls, source: Scored) -> Stack:
        """Returns `source` as a stack; a stack is returned as it is."""
        return source if isinstance(source, Stack) else cls(source)

    def read(self, box: Box) -> NDArray[Any]:
        """Reads the voxels of a box (z, y, x)."""
        if self._planes is None:
            return self._read(box)
        start, stop = box.start, box.stop
        planes = self._planes[start[0] : stop[0]]
        slices = [Box((z, *start[1:]), (z + 1, *stop[1:])) for z in planes]
        return np.concatenate([self._read(slice_) for slice_ in slices])

    def _read(self, box: Box) -> NDArray[Any]:
        if isinstance(self._source, Volume):
            voxels: NDArray[Any] = self._source.read(box)[0]
            return voxels
        return self._source[box.slices]

    def slices(self) -> Iterator[NDArray[Any]]:
        """Yields the slices (y, x) in order; reads as many together as a storage chunk is deep."""
        chunk = self._source.chunk[0] if isinstance(self._source, Volume) else 1
        area = self.shape[1] * self.shape[2]
        depth = max(1, min(chunk, SLAB_BYTES // (area * self.dtype.itemsize)))
        for z in range(0, self.shape[0], depth):
            stop = min(z + depth, self.shape[0])
            yield from self.read(Box((z, 0, 0), (stop, *self.shape[1:])))

    def pieces(self) -> Iterator[Box]:
        """Yields boxes that partition the stack.

        Each box consists of whole storage chunks, of at most 4 Mvoxel unless one chunk is larger.
        """
        chunk = self._source.chunk if isinstance(self._source, Volume) else (1, 1, 1)
        extent = list(chunk)
        for axis in (2, 1, 0):
            area = np.prod(extent) // extent[axis]
            chunks = max(1, PIECE_VOXELS // int(area * chunk[axis]))
            extent[axis] = min(self.shape[axis], chunk[axis] * chunks)
        starts = [range(0, n, m) for n, m in zip(self.shape, extent, strict=True)]
        for start in itertools.product(*starts):
            yield Box(start, start).grow((0, 0, 0), tuple(extent)).intersect(Box.of(self.shape))

    def scale(self) -> float:
        """The divisor that turns values into probabilities; may read the whole stack."""
        if self._scale is None:
            binary = self.dtype.kind in "bf" or all(plane.max() <= 1 for plane in self.slices())
            self._scale = 1.0 if binary else float(np.iinfo(self.dtype).max)
        return self._scale

    def probabilities(self) -> Iterator[NDArray[np.float64]]:
        """Yields the slices (y, x) as probabilities, float64 from 0 to 1.

        Raises:
            InputError: if a value is not finite or out of range; it names the voxel.
        """
        scale = self.scale()
        for z, plane in enumerate(self.slices()):
            values = np.divide(plane, scale, dtype=np.float64)
            with np.errstate(invalid="ignore"):
                wrong = ~((values >= 0) & (values <= 1))
            if wrong.any():
                y, x = (int(i) for i in np.argwhere(wrong)[0])
                raise InputError(
                    f"{self.name}: voxel (z, y, x) = ({z}, {y}, {x}) is {plane[y, x]}; a "
                    f"probability is a finite number from 0 to {scale:g}."
                )
            yield values

    def cells(self) -> Iterator[NDArray[np.bool_]]:
        """Yields the slices (y, x) of a truth as bool: False is membrane (0), True is cell.

        Raises:
            InputError: if cell is not stored as 1 throughout, or as the dtype's largest value
                throughout.
        """
        white: Any = None
        for z, plane in enumerate(self.slices()):
            for value in np.unique(plane):
                if value != 0 and white is None:
                    white = value
                if value not in (0, white) or (white is not None and white not in self._whites()):
                    raise InputError(
                        f"{self.name}: slice {z} holds {value}; a truth holds 0 (membrane) and one "
                        f"other value, {' or '.join(map(str, self._whites()))} (cell). Convert it."
                    )
            yield plane != 0

    def _whites(self) -> tuple[int, ...]:
        return (1,) if self.dtype.kind in "bf" else (1, int(np.iinfo(self.dtype).max))

    def labels(self, box: Box) -> NDArray[Any]:
        """Reads the voxels of a box (z, y, x) as labels, uint64.

        Raises:
            InputError: if they are not integers of at least 0.
        """
        voxels = self.read(box)
        if voxels.dtype.kind == "f" or (voxels.dtype.kind == "i" and voxels.min(initial=0) < 0):
            raise InputError(
                f"{self.name}: labels must be integers of at least 0, not {voxels.dtype}"
                f"{'' if voxels.dtype.kind == 'f' else f' with {voxels.min()}'}."
            )
        return voxels.astype(np.uint64, copy=False)


def paired(prediction: Scored, truth: Scored) -> tuple[Stack, Stack]:
    """Returns prediction and truth as stacks.

    Raises:
        InputError: if their shapes differ.
    """
    predicted, true = Stack.of(prediction), Stack.of(truth)
    if predicted.shape != true.shape:
        raise InputError(
            f"{predicted.name} and {true.name}: prediction and truth must have the same shape, but "
            f"are {_by(predicted.shape)} and {_by(true.shape)} (z, y, x)."
        )
    return predicted, true


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
