"""A run that is ready to start, and its worker.

Knows how to read, predict and write one tile. Does not know which tiles are done, or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError, RunError, VoxelError
from unet_ray.machine import machine_name
from unet_ray.network.checkpoints import read_hashed_model
from unet_ray.network.prediction import (
    Device,
    Precision,
    Predictor,
    gpu_versions,
    instructions,
)
from unet_ray.segmentation.memory import GPU_TILES, WorkerMemory
from unet_ray.segmentation.rules import Rules
from unet_ray.storage.layout import PREDICTED
from unet_ray.storage.lease import Fence
from unet_ray.storage.places import Place
from unet_ray.storage.provenance import KIND, Provenance
from unet_ray.storage.stores import Store
from unet_ray.tiling.boxes import Ints
from unet_ray.tiling.mirror import read_mirrored, reflect
from unet_ray.tiling.tiles import Tile, TilePlan
from unet_ray.versions import versions
from unet_ray.volumes.fingerprint import changed
from unet_ray.volumes.intensity import Intensity
from unet_ray.volumes.volume import Volume


@dataclass(frozen=True)
class Segmentation:
    """A run that is ready to start: everything that determines its stored bytes.

    Attributes:
        volume: the input.
        model: the model file.
        out: the output store.
        plan: the tiles.
        intensity: mean and standard deviation of the grey values.
        precision, device: number format and device of the network.
        tta: average over the 8 symmetries of the square, in 3-D over 16 or 48.
        nan: treatment of non-finite voxels: ``error`` or ``zero``.
        outputs: names of the stored outputs.
        threshold: probability above which a voxel is of class 1; None for the likelier class.
        factors: voxels of the volume per voxel of each pyramid level, from level 1 on.
        rules: rules of the objects; None without objects.
        class_values: label value of each class.
        memory: memory of one worker.
        memory_limit: upper bound of the bytes of one worker, as the user has set it.
        provenance: record of the facts above in the store; a resumed run must match it.
        resumed: whether the store exists and the run resumes it.
        mask: volume that is nonzero where tiles are requested; None for all tiles.
        fence: stops workers from writing after the run has lost its output; None outside a lease.
    """

    volume: Volume
    model: Path
    out: Place
    plan: TilePlan
    intensity: Intensity
    precision: Precision
    device: Device
    tta: bool
    nan: str
    outputs: tuple[str, ...]
    class_values: tuple[int, ...]
    memory: WorkerMemory
    memory_limit: int
    provenance: Provenance
    resumed: bool
    threshold: float | None = None
    factors: tuple[Ints, ...] = ()
    rules: Rules | None = None
    mask: Volume | None = None
    fence: Fence | None = None

    @property
    def predicted(self) -> tuple[str, ...]:
        """Names of the outputs that the network predicts; the others are made from them."""
        return tuple(name for name in self.outputs if name in PREDICTED)

    @property
    def join_memory(self) -> int:
        """Bytes for the arrays of a task that unites all tiles."""
        return self.memory.left_of(self.memory_limit)

    @cached_property
    def absent(self) -> NDArray[np.bool_]:
        """Which tiles of an existing store lack a shard, bool, shape (tiles,).

        Raises:
            RunError: if metadata of the store are missing or damaged; names the file.
        """
        return ~Store(self.out, self.predicted).present(self.plan)

    def make_worker(self) -> TileWorker:
        """Creates the worker of the segment stage, in the process that runs it."""
        return TileWorker(self)

    def refuse_changes(self) -> None:
        """Checks the whole input before the run ends.

        Raises:
            ChangedError: if it has changed since the run was prepared.
        """
        self.volume.refuse_changes()

    def make_helper(self) -> TileHelper:
        """Creates a worker that only reads or writes; another process predicts."""
        return TileHelper(self)


class TileHelper:
    """Reads and writes the tiles of one run; safe to share between threads."""

    def __init__(self, run: Segmentation) -> None:
        self._run = run
        _refuse_other_machine(run, self._kind())
        self._store = Store(run.out, run.predicted, run.fence.look if run.fence else None)

    def _kind(self) -> dict[str, Any]:
        """The properties of this machine that determine what it reads and writes."""
        # Not the GPU: a query would reserve some of its memory, and this process does not use it.
        return {"versions": versions()}

    def read(self, tile: int) -> NDArray[Any]:
        """Reads the input of a tile; see `read_tile`.

        Raises:
            VoxelError: if a voxel is not finite; names the tile and the voxel.
        """
        return read_tile(self._run.volume, self._run.plan[tile], self._run.nan)

    def write(self, tile: int, result: dict[str, NDArray[np.uint8]]) -> str:
        """Writes the shards of a tile; returns their checksum when they are on disk."""
        return self._store.write(self._run.plan[tile], result)


class TileWorker(TileHelper):
    """Reads, predicts and writes the tiles of one run; safe to share between threads."""

    def __init__(self, run: Segmentation) -> None:
        super().__init__(run)
        try:
            network, _, sha256 = read_hashed_model(run.model)
        except InputError as error:  # it was valid when the run was prepared
            raise changed(str(run.model)) from error
        if sha256 != run.provenance.model_sha256:
            raise changed(str(run.model))
        self._predictor = Predictor(
            network,
            run.plan,
            run.intensity,
            run.precision,
            run.device,
            run.tta,
            run.threshold,
            1 if run.device == "cpu" else GPU_TILES,
        )

    def _kind(self) -> dict[str, Any]:
        return kind_of_machine(self._run.device)

    def predict(self, tile: int, voxels: NDArray[Any]) -> dict[str, NDArray[np.uint8]]:
        """The uint8 outputs of a tile's core, by name; see `Predictor`."""
        return self._predictor(self._run.plan[tile], voxels, self._run.predicted)


def read_tile(volume: Volume, tile: Tile, nan: str) -> NDArray[Any]:
    """Reads the core and halo of a tile, mirrored at the faces of the volume.

    Args:
        volume: the input.
        tile: a tile of any plan of the volume.
        nan: treatment of non-finite voxels: ``error``, or ``zero`` to replace them by 0.

    Returns:
        Voxels of shape ``(c, z, y, x)``, in the dtype of the volume.

    Raises:
        VoxelError: if a voxel is not finite and `nan` is ``error``; names the tile and the voxel.
    """
    voxels = read_mirrored(volume.read, volume.shape[1:], tile.read)
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all() and nan == "error":
        raise VoxelError(_non_finite_message(volume, tile, voxels))
    return finite(voxels)


def finite(voxels: NDArray[Any]) -> NDArray[Any]:
    """Returns the voxels with 0 in place of values that are not finite."""
    if voxels.dtype.kind != "f" or np.isfinite(voxels).all():
        return voxels
    return np.where(np.isfinite(voxels), voxels, voxels.dtype.type(0))


def _non_finite_message(volume: Volume, tile: Tile, voxels: NDArray[Any]) -> str:
    channel, *offset = np.argwhere(~np.isfinite(voxels))[0].tolist()
    axes = zip(tile.read.start, offset, volume.shape[1:], strict=True)
    position = tuple(int(reflect(np.array(a + n), extent)) for a, n, extent in axes)
    return (
        f"{volume.path}: voxel (z, y, x) = {position} of channel {channel} is "
        f"{voxels[(channel, *offset)]}, read by tile {tile.index} ({tile.write}); replace "
        f"values that are not finite, or set --nan zero and another --out."
    )


def _refuse_other_machine(run: Segmentation, kind: Mapping[str, Any]) -> None:
    """Refuses a machine whose results could differ in some bytes from the stored ones.

    Raises:
        RunError: if the provenance names other instructions or versions than this machine has.
    """
    if difference := run.provenance.other_kind(kind):
        field, stored, present = difference
        raise RunError(
            f"{run.out}: its {field} is {stored}, but {present} on {machine_name()}, so the "
            "results could differ; use machines of one kind."
        )


def kind_of_machine(device: Device) -> dict[str, Any]:
    """The properties of this machine and its software that determine the stored bytes."""
    software = {**versions(), **gpu_versions(device)}
    return dict(zip(KIND, (instructions(device), software), strict=True))


def refuse_difference(path: Place, stored: Provenance, current: Provenance) -> None:
    """Refuses to resume a store whose provenance differs from that of the run.

    Args:
        path: the store.
        stored: provenance of the store.
        current: provenance of the run.

    Raises:
        InputError: if they differ; names the first difference.
    """
    for field, stored_value, value in stored.differences(current):
        raise InputError(
            f"{path}: was made with another {field} ({stored_value}, now {value}); choose another "
            "--out, or delete it with --overwrite."
        )
