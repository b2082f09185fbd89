"""A NumPy array as a volume.

Knows the axes of arrays without names. Does not know files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.volume import Choice, Volume, name_axes

NAME = "array"
# Rows of a storage unit: those of an uncompressed TIFF file, so that an array and the file that it
# is saved to are cut into the same tiles.
ROWS = 64


class Array(Volume):
    """An array in memory: (y, x), (z, y, x), (c, z, y, x) or (t, c, z, y, x).

    Args:
        voxels: integers, floats or booleans. It is not copied: do not change it while it is used.
        choice: the channel and the time point to read.
    """

    kind = "array"

    def __init__(self, voxels: NDArray[Any], choice: Choice) -> None:
        self._voxels = voxels
        super().__init__(NAME, choice)

    def _open(self) -> NDArray[Any]:
        voxels = self._voxels
        if not 2 <= voxels.ndim <= 5:
            raise InputError(
                f"{NAME}: has {voxels.ndim} axes, but must have 2 to 5: (y, x), (z, y, x), "
                "(c, z, y, x) or (t, c, z, y, x)."
            )
        axes = name_axes(NAME, "?" * voxels.ndim, voxels.shape)
        extents = dict(zip(axes, voxels.shape, strict=True))
        time, channels = self._choice.select(NAME, extents.get("t", 1), extents.get("c", 1))
        # Leading axes that the array lacks have extent 1.
        voxels = voxels.reshape((1,) * (5 - voxels.ndim) + voxels.shape)[time, channels]
        dtype = np.dtype(np.uint8) if voxels.dtype.kind == "b" else voxels.dtype.newbyteorder("=")
        unit = 1, min(ROWS, voxels.shape[2]), voxels.shape[3]
        self._describe(voxels.shape, dtype, unit, (None, None, None))
        self._name_channels((), channels)
        return voxels

    def read_overhead(self, shape: Sequence[int]) -> int:
        """No bytes: nothing is decoded."""
        return 0

    def identity(self) -> dict[str, Any]:
        """Shape, dtype and a hash of every voxel, for JSON."""
        voxels = np.ascontiguousarray(self.read(Box.of(self.shape[1:])))
        return {
            "name": NAME,
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            "bytes": voxels.nbytes,
            "sha256": hashlib.sha256(voxels.data).hexdigest(),
        }

    def pin(self) -> None:
        """Does nothing: an array has no files."""

    def _read(self, box: Box) -> NDArray[Any]:
        voxels: NDArray[Any] = self._source[(slice(None), *box.slices)].astype(self.dtype)
        return voxels

    def _reopen(self) -> NDArray[Any]:
        return self._open()
