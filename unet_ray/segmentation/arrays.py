"""An array segmented in memory, with the tiles and the arithmetic of `segment`.

Knows the plan and the worker of an array. Does not know stores, and writes no file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unet_ray.engine.cluster import side_by_side
from unet_ray.engine.rounds import Progress, numbers_of, tries
from unet_ray.engine.stages import Stage
from unet_ray.errors import RunError, VoxelError
from unet_ray.machine import keep_freed_memory
from unet_ray.network.prediction import Predictor
from unet_ray.network.unet import UNet
from unet_ray.segmentation.memory import (
    in_columns,
    in_flight,
    needed_bytes,
    network_size,
    stored_values,
)
from unet_ray.segmentation.planning import choose_plan
from unet_ray.segmentation.preparation import check_memory
from unet_ray.segmentation.run import read_tile
from unet_ray.segmentation.settings import Settings, device_of, precision_of, refuse_channels
from unet_ray.tiling.tiles import TilePlan
from unet_ray.volumes.intensity import measure
from unet_ray.volumes.volume import Volume

STAGE = "predict"
OUTPUTS = ("probabilities", "classes")

Maps = dict[str, NDArray[np.uint8]]


def predict_volume(
    volume: Volume,
    network: UNet,
    model: str,
    threshold: float | None,
    settings: Settings,
    watch: Callable[[Progress], None],
) -> tuple[TilePlan, Maps]:
    """Predicts every voxel of a volume; the results are arrays in memory.

    The bytes are those that `segment` stores with the same plan, precision and kind of machine.

    Args:
        volume: the input.
        network: in inference mode.
        model: name of the model, for messages.
        threshold: of the class map; see `Predictor`.
        settings: tile, memory, workers, precision, tta and nan are used.
        watch: called after each tile.

    Returns:
        The plan, and ``probabilities`` (classes - 1, z, y, x) and ``classes`` (z, y, x), uint8.

    Raises:
        InputError: if volume and network do not fit, or memory is too small.
        RunError: if a tile cannot be read or predicted.
    """
    refuse_channels(volume, network, model)
    # Before any thread is made: each would get a pool of memory of its own, and give it back.
    keep_freed_memory()
    device = device_of(settings)
    precision = settings.precision or precision_of(device, settings)
    size = network_size(network, precision, settings.tta)
    values = stored_values(network.classes, OUTPUTS)
    plan, memory = choose_plan(volume, network, size, settings, values)
    check_memory(Path(volume.path), memory, device, settings)
    predictor = Predictor(
        network, plan, measure(volume), precision, device, settings.tta, threshold
    )
    worker = _ArrayWorker(volume, plan, predictor, settings.nan, network.classes)
    stage = Stage(
        STAGE,
        lambda: worker,
        device,
        in_flight=in_flight(memory, device, settings),
        memory=needed_bytes(memory, device, settings),
    )
    _run(in_columns(stage, plan, settings), plan, settings, watch)
    return plan, worker.maps


def _run(
    stage: Stage, plan: TilePlan, settings: Settings, watch: Callable[[Progress], None]
) -> None:
    start, workers = time.monotonic(), side_by_side(stage.device, "local", settings.workers)
    now = Progress(0, len(plan), 0, 0, 0, 0.0, workers=max(1, min(workers, len(plan))))
    tiles = numbers_of(np.ones(len(plan), bool), stage.layer)
    for receipt, again in tries(stage, tiles, "local", settings.workers):
        if receipt.error and not again:
            kind = VoxelError if receipt.verdict == "never" else RunError
            raise kind(f"tile {receipt.tile}: {receipt.error}")
        done = not receipt.error
        now = replace(
            now,
            done=now.done + done,
            finished=now.finished + done,
            voxels=now.voxels + done * plan[receipt.tile].write.size,
            seconds=time.monotonic() - start,
            failures=now.failures + (not done),
            memory=max(now.memory, receipt.memory),
        )
        watch(now)


class _ArrayWorker:
    """Reads from a volume and writes into arrays; shared by threads, since tiles never overlap."""

    def __init__(
        self, volume: Volume, plan: TilePlan, predictor: Predictor, nan: str, classes: int
    ) -> None:
        self._volume, self._plan, self._predictor, self._nan = volume, plan, predictor, nan
        self.maps: Maps = {
            "probabilities": np.zeros((classes - 1, *plan.shape), np.uint8),
            "classes": np.zeros(plan.shape, np.uint8),
        }

    def read(self, tile: int) -> NDArray[Any]:
        """The input of a tile, ``(c, z, y, x)``."""
        return read_tile(self._volume, self._plan[tile], self._nan)

    def predict(self, tile: int, voxels: NDArray[Any]) -> Maps:
        """The outputs on the core of a tile."""
        return self._predictor(self._plan[tile], voxels, OUTPUTS)

    def write(self, tile: int, result: Maps) -> None:
        """Copies the voxels of a tile that are inside the volume."""
        z, y, x = self._plan[tile].write.slices
        cropped: Any = (..., *self._plan[tile].crop.slices)
        for name, values in result.items():
            self.maps[name][..., z, y, x] = values[cropped]
