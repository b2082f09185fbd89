"""Disk space check before a run: whether the output disks can store the remaining tiles.

Knows file sizes and tile counts. Does not know compression ratios, and writes nothing.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from unet_ray.errors import InputError
from unet_ray.segmentation.memory import stored_values
from unet_ray.segmentation.outlook import max_disk_bytes
from unet_ray.segmentation.preparation import remaining_tiles, wanted_tiles
from unet_ray.segmentation.run import Segmentation
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.places import Place, files_below
from unet_ray.units import format_bytes


def check_disks(runs: Sequence[Segmentation], settings: Settings) -> None:
    """Refuses runs whose stores may need more space than their disks have free.

    Object stores are not checked, since they do not report their free space.

    Args:
        runs: the runs, executed one after another.
        settings: the settings of all runs.

    Raises:
        InputError: if the upper bound of the remaining tiles exceeds the free space of a disk.
    """
    runs_by_disk: dict[int, list[Segmentation]] = {}
    for run in runs:
        if isinstance(run.out, Path):
            device_id = os.stat(_existing_path(run.out)).st_dev
            runs_by_disk.setdefault(device_id, []).append(run)
    for runs_on_disk in runs_by_disk.values():
        _check_disk(runs_on_disk, settings)


def _check_disk(runs: Sequence[Segmentation], settings: Settings) -> None:
    free = free_bytes([run.out for run in runs], settings.overwrite)
    # Counting the remaining tiles reads every ledger, so first try the cheap bound of all tiles.
    if sum(_max_bytes(run, len(run.plan)) for run in runs) <= free:
        return
    counts = [int(remaining_tiles(run, wanted_tiles(run, settings)).sum()) for run in runs]
    unfinished = [(run, count) for run, count in zip(runs, counts, strict=True) if count]
    needed = sum(_max_bytes(run, count) for run, count in unfinished)
    if needed > free:
        out, several = unfinished[0][0].out, len(unfinished) > 1
        tiles = f"the {sum(counts)} tiles of {len(unfinished)} stores" if several else "its tiles"
        raise InputError(
            f"{out.parent if several else out}: {tiles} may need {format_bytes(needed)}, but only "
            f"{format_bytes(free)} are free; free disk space, "
            f"{'process fewer inputs at a time' if several else 'choose another --out'}, or store "
            "less, for example with --outputs classes or --region."
        )


def _max_bytes(run: Segmentation, tiles: int) -> int:
    values = stored_values(len(run.class_values), run.outputs)
    objects = "instances" in run.outputs
    return max_disk_bytes(run.plan, values, len(run.outputs), tiles, objects, run.factors)


def free_bytes(outs: Sequence[Place], overwrite: bool = False) -> float:
    """Bytes available for stores on one disk; infinite for object stores and where unknown.

    Args:
        outs: paths of the stores, all on one disk; they need not exist.
        overwrite: also count the files of existing stores, which will be deleted first.
    """
    out = outs[0]
    if not isinstance(out, Path):
        return math.inf
    disk = shutil.disk_usage(_existing_path(out))
    old = 0
    for path in (path for out in outs if overwrite for path in files_below(out)):
        with suppress(FileNotFoundError):  # deleted by a run that is writing to the store
            old += os.lstat(str(path)).st_size
    return disk.free + old if disk.total else math.inf


def _existing_path(out: Path) -> Path:
    """The store's path if it exists, else its nearest existing parent."""
    return next(path for path in (out, *out.parents) if path.exists())
