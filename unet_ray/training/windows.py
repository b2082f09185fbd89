"""Arrays that are read and written by windows, for training data larger than memory.

Handles planes of volumes, and arrays in memory or in a folder. Independent of labels and patches.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from unet_ray.errors import InputError, RunError
from unet_ray.storage.places import Guard
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.volume import Volume

PREFIX, PART = "weights-", ".part"  # of the name of a folder whose arrays are not complete
CHUNK = (16, 128, 128)


class Windowed(Protocol):
    """An array that returns the window of slices along its last three axes: in memory or not."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents; the last three are z, y, x."""

    @property
    def dtype(self) -> Any:
        """Data type."""

    def __getitem__(self, index: Any, /) -> Any: ...
    def __setitem__(self, index: Any, value: Any, /) -> None: ...


class Planes:
    """Planes of a volume as an array (c, z, y, x); a window is read when it is indexed.

    Args:
        volume: the volume.
        planes: numbers of the planes, ascending.
    """

    def __init__(self, volume: Volume, planes: Sequence[int] | NDArray[np.intp]) -> None:
        self._volume, self._planes = volume, np.asarray(planes, np.intp)
        self.shape = volume.shape[0], len(self._planes), *volume.shape[2:]
        self.dtype = volume.dtype

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Reads the window of the last three slices, with all channels.

        Raises:
            InputError: if a voxel is not finite.
            RunError: if the file is damaged or has changed.
        """
        z, y, x = (s.indices(n) for s, n in zip(index[-3:], self.shape[1:], strict=True))
        parts = []
        for run in consecutive(self._planes[z[0] : z[1]]):
            box = Box((run.start, y[0], x[0]), (run.stop, y[1], x[1]))
            parts.append(self._volume.read_with_retries(box))
            if not np.isfinite(parts[-1]).all():
                raise InputError(
                    f"{self._volume.path}: has voxels that are not finite in {box} (z, y, x); "
                    "replace them first."
                )
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Raises TypeError: an input is not changed."""
        raise TypeError(f"{self._volume.path} is an input; it is only read.")

    def take(self, planes: NDArray[np.intp]) -> Planes:
        """Returns some of these planes; nothing is read."""
        return Planes(self._volume, self._planes[planes])


def take_planes(image: Windowed, planes: Sequence[int] | NDArray[np.intp]) -> Windowed:
    """Returns some planes of an array (c, z, y, x)."""
    numbers = np.asarray(planes, np.intp)
    if isinstance(image, Planes):
        return image.take(numbers)
    taken: Windowed = image[:, numbers]
    return taken


def consecutive(numbers: NDArray[np.intp]) -> list[range]:
    """Returns the runs of consecutive numbers of an ascending array."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [range(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]


class Arrays:
    """New arrays, in memory or in a folder.

    Attributes:
        folder: where the arrays are; None for memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    @classmethod
    def beside(cls, path: Path) -> Arrays:
        """Arrays in a new folder, which `keep` renames to `path` once they are complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(Path(tempfile.mkdtemp(PART, PREFIX, path.parent)))

    def new(self, name: str, shape: Sequence[int], dtype: type[np.generic]) -> Windowed:
        """Returns an array of zeros, (z, y, x)."""
        if self.folder is None:
            return np.zeros(shape, dtype)
        chunks = tuple(min(n, most) for n, most in zip(shape, CHUNK, strict=True))
        zarr.create_array(
            self.folder / name,
            shape=tuple(shape),
            dtype=np.dtype(dtype),
            chunks=chunks,
            compressors=ZstdCodec(level=1, checksum=True),
        )
        return Stored(self.folder / name, "r+")

    def remove(self, name: str = "") -> None:
        """Deletes an array of the folder, or the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder / name, ignore_errors=True)


class Stored:
    """An array of a folder, with checksums; a window is read or written when it is indexed.

    Args:
        path: of the array.
        mode: ``r``, or ``r+`` for writing, too.
    """

    def __init__(self, path: Path, mode: Literal["r", "r+"] = "r") -> None:
        self._path, self._array = path, zarr.open_array(path, mode=mode)
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Reads a window.

        Raises:
            RunError: if a chunk is damaged.
        """
        try:
            return np.asarray(self._array[index])
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(
                f"{self._path}: cannot be read: {error}. Delete {self._path.parent.name} in the "
                "RUN folder and run the same command again; it computes the weight maps again."
            ) from error

    def __setitem__(self, index: Any, value: Any) -> None:
        self._array[index] = value


def keep(part: Path, path: Path, header: dict[str, Any], guard: Guard) -> None:
    """Renames a folder of complete arrays to `path`; deletes other folders that are not complete.

    Args:
        part: the folder of `Arrays.beside`.
        path: its final name; arrays there are replaced.
        header: what the arrays depend on; see `header_of`.
        guard: entered around the change; raises if the run has lost its lease.
    """
    zarr.create_group(part, attributes={"header": header})
    with guard():
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
        for other in path.parent.glob(f"{PREFIX}*{PART}"):
            shutil.rmtree(other, ignore_errors=True)


def header_of(path: Path) -> dict[str, Any] | None:
    """Returns the header of the arrays at `path`; None if there are none."""
    try:
        header: Any = zarr.open_group(path, mode="r").attrs["header"]
    except (FileNotFoundError, KeyError, ValueError):
        return None
    return dict(header)
