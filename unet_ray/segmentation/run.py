"""A run that is ready to start, and its worker.

Knows read, predict and write of one tile. Does not know which tiles are done, or who runs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError, RunError, VoxelError
from unet_ray.machine import machine_name
from unet_ray.network.checkpoints import read_model
from unet_ray.network.prediction import Device, Precision, Predictor, instructions
from unet_ray.segmentation.memory import WorkerMemory
from unet_ray.storage.lease import Fence
from unet_ray.storage.places import Place
from unet_ray.storage.provenance import KIND, Provenance
from unet_ray.storage.stores import Store
from unet_ray.tiling.mirror import read_mirrored, reflect
from unet_ray.tiling.tiles import Tile, TilePlan
from unet_ray.versions import versions
from unet_ray.volumes.intensity import Intensity
from unet_ray.volumes.volume import Volume


@dataclass(frozen=True)
class Segmentation:
    """A run that is ready to start: everything that fixes its bytes.

    Attributes:
        volume: the input.
        model: the model file.
        out: the output store.
        plan: the tiles.
        intensity: grey values of the volume.
        precision, device: of the network.
        tta: average over the 8 symmetries of the square.
        nan: ``zero`` if voxels that are not finite count as 0.
        outputs: what is stored.
        class_values: label value of each class.
        memory: what one worker needs.
        provenance: all of this, kept in the store and compared when a run goes on.
        resumed: the store was there already and is continued.
        mask: shows which tiles are asked for; None for all.
        fence: keeps workers from writing once the run has lost its output; None for no such run.
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
    provenance: Provenance
    resumed: bool
    mask: Volume | None = None
    fence: Fence | None = None

    def make_worker(self) -> TileWorker:
        """The worker of the segment stage, for the process that runs it."""
        return TileWorker(self)

    def make_helper(self) -> TileHelper:
        """A worker that only reads or writes, where another predicts."""
        return TileHelper(self)


class TileHelper:
    """Reads and writes tiles of one run; may be shared by threads."""

    def __init__(self, run: Segmentation) -> None:
        self._run = run
        _refuse_other_kind(run)
        self._store = Store(run.out, run.outputs, run.fence.look if run.fence else None)

    def read(self, tile: int) -> NDArray[Any]:
        """The voxels that a tile reads, ``(c, z, y, x)``, mirrored beyond the volume's faces.

        Raises:
            VoxelError: if one of them is not a finite number; names the tile and the voxel.
        """
        return read_tile(self._run.volume, self._run.plan[tile], self._run.nan)

    def write(self, tile: int, result: dict[str, NDArray[np.uint8]]) -> None:
        """Writes the shards of a tile and waits until they are on disk."""
        self._store.write(self._run.plan[tile], result)


class TileWorker(TileHelper):
    """Reads, predicts and writes tiles of one run; may be shared by threads."""

    def __init__(self, run: Segmentation) -> None:
        super().__init__(run)
        network, _ = read_model(run.model)
        self._predictor = Predictor(
            network, run.plan, run.intensity, run.precision, run.device, run.tta
        )

    def predict(self, tile: int, voxels: NDArray[Any]) -> dict[str, NDArray[np.uint8]]:
        """The outputs on the core of a tile."""
        return self._predictor(self._run.plan[tile], voxels, self._run.outputs)


def read_tile(volume: Volume, tile: Tile, nan: str) -> NDArray[Any]:
    """The voxels that `tile` reads, ``(c, z, y, x)``, mirrored beyond the volume's faces.

    Args:
        volume: the input.
        tile: of any plan of it.
        nan: ``zero`` if voxels that are not finite count as 0.

    Raises:
        VoxelError: if one of them is not a finite number; names the tile and the voxel.
    """
    voxels = read_mirrored(volume.read, volume.shape[1:], tile.read)
    if voxels.dtype.kind != "f" or np.isfinite(voxels).all():
        return voxels
    if nan == "zero":
        return np.where(np.isfinite(voxels), voxels, voxels.dtype.type(0))
    raise VoxelError(_not_finite(volume, tile, voxels))


def _not_finite(volume: Volume, tile: Tile, voxels: NDArray[Any]) -> str:
    channel, *offset = np.argwhere(~np.isfinite(voxels))[0].tolist()
    seen = zip(tile.read.start, offset, volume.shape[1:], strict=True)
    place = tuple(int(reflect(np.array(a + n), extent)) for a, n, extent in seen)
    return (
        f"{volume.path}: voxel (z, y, x) = {place} of channel {channel} is "
        f"{voxels[(channel, *offset)]}, read by tile {tile.index} ({tile.write}); replace "
        f"values that are not finite, or give --nan zero and another --out."
    )


def _refuse_other_kind(run: Segmentation) -> None:
    """Makes sure that this machine gives the bytes that the store is said to have.

    Raises:
        RunError: if it is of another kind than the one that the run was prepared for.
    """
    if found := run.provenance.other_kind(kind_of_machine(run.device)):
        field, stored, here = found
        raise RunError(
            f"{run.out}: its {field} is {stored}, but {here} on {machine_name()}, so its tiles "
            "could have other bytes; run it on machines of one kind."
        )


def kind_of_machine(device: Device) -> dict[str, Any]:
    """What of this machine and its software fixes the bytes."""
    return dict(zip(KIND, (instructions(device), versions()), strict=True))


def refuse_difference(path: Place, stored: Provenance, now: Provenance) -> None:
    """Makes sure that a store was made as a run would make it.

    Args:
        path: the store.
        stored: how it was made.
        now: how the run would make it.

    Raises:
        InputError: naming the first difference.
    """
    for field, there, here in stored.differences(now):
        raise InputError(
            f"{path}: was made with another {field} ({there}, now {here}); choose another --out, "
            "or delete it with --overwrite."
        )
