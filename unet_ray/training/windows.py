"""Arrays that are read and written by windows, for training data larger than memory.

Handles planes of volumes, and arrays in memory or in a folder. Independent of labels and patches.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from unet_ray.errors import ChangedError, InputError, RunError
from unet_ray.storage.places import Guard
from unet_ray.tiling.boxes import Box
from unet_ray.volumes.volume import Volume

CHUNK = (128, 128)
# Value of voxels that have not been written, by kind of array: none that is ever written.
MISSING = {"f": float("nan"), "u": 254, "i": -1}


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
            ChangedError: if the file has changed.
            RunError: if the file is damaged.
        """
        z, y, x = (s.indices(n) for s, n in zip(index[-3:], self.shape[1:], strict=True))
        parts = []
        for run in consecutive(self._planes[z[0] : z[1]]):
            box = Box((run.start, y[0], x[0]), (run.stop, y[1], x[1]))
            parts.append(self._read(box))
            if not np.isfinite(parts[-1]).all():
                raise InputError(
                    f"{self._volume.path}: has voxels that are not finite in {box} (z, y, x); "
                    "replace them first."
                )
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _read(self, box: Box) -> NDArray[Any]:
        try:
            return self._volume.read_with_retries(box)
        except ChangedError as error:
            raise ChangedError(
                f"{self._volume.path} has changed since this training began; restore it and run "
                "the same command again, or choose another --out."
            ) from error

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
    """New arrays (z, y, x), in memory or in a folder.

    Args:
        folder: where the arrays are; None for memory.
        planes: planes of a chunk.
    """

    def __init__(self, folder: Path | None = None, planes: int = 1) -> None:
        self.folder, self._chunk = folder, (planes, *CHUNK)

    def new(self, name: str, shape: Sequence[int], dtype: type[np.generic]) -> Windowed:
        """Returns an array; write all of it.

        Raises:
            RunError: if it cannot be written.
        """
        if self.folder is None:
            return np.zeros(shape, dtype)
        chunks = tuple(min(n, most) for n, most in zip(shape, self._chunk, strict=True))
        with _written(self.folder / name):
            zarr.create_array(
                self.folder / name,
                shape=tuple(shape),
                dtype=np.dtype(dtype),
                chunks=chunks,
                compressors=ZstdCodec(level=1, checksum=True),
                fill_value=MISSING[np.dtype(dtype).kind],
                config={"write_empty_chunks": True},
            )
        return Stored(self.folder / name, "r+")

    def remove(self, name: str) -> None:
        """Deletes an array of the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder / name, ignore_errors=True)


class Stored:
    """An array of a folder, with checksums; a window is read or written when it is indexed.

    Args:
        path: of the array.
        mode: ``r``, or ``r+`` for writing, too.

    Raises:
        RunError: if there is no such array.
    """

    def __init__(self, path: Path, mode: Literal["r", "r+"] = "r") -> None:
        self._path = path
        with _read(path):
            self._array = zarr.open_array(path, mode=mode, config={"write_empty_chunks": True})
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Reads a window.

        Raises:
            RunError: if a chunk is damaged or missing.
        """
        with _read(self._path):
            window = np.asarray(self._array[index])
            missing = MISSING[self.dtype.kind]
            if (window != window if missing != missing else window == missing).any():
                raise ValueError("a chunk is missing")
        return window

    def __setitem__(self, index: Any, value: Any) -> None:
        """Writes a window.

        Raises:
            RunError: if it cannot be written.
        """
        with _written(self._path):
            self._array[index] = value


def keep(part: Path, path: Path, header: dict[str, Any], guard: Guard) -> None:
    """Renames a folder of complete arrays to `path`, in place of the one that is there.

    Args:
        part: the folder of `Arrays`.
        path: its final name.
        header: what the arrays depend on; see `header_of`.
        guard: entered around the change; raises if the run has lost its lease.

    Raises:
        RunError: if it cannot be written.
    """
    with _written(path):
        zarr.create_group(part, attributes={"header": header})
        drop(path, part.with_name(f"old-{part.name}"), guard)
        with guard():
            part.rename(path)


def drop(path: Path, scratch: Path, guard: Guard) -> None:
    """Deletes a folder of arrays, if there is one: a rename under the guard, then the files."""
    with guard():
        if path.exists():
            path.rename(scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def header_of(path: Path) -> dict[str, Any] | None:
    """Returns the header of the arrays at `path`; None if there are none."""
    try:
        header: Any = zarr.open_group(path, mode="r").attrs["header"]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return dict(header) if isinstance(header, dict) else None


@contextmanager
def _read(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"{path}: cannot be read: {error}. Delete {path.parent.name} in the RUN folder and run "
            "the same command again; it computes the weight maps again."
        ) from error


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error}. Weight maps need 5 bytes per labelled voxel, in "
            "3-D 13 while they are computed. Run the same command again when there is space."
        ) from error
