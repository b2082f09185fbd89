"""Whether the disk of an output can hold what is left of one run, or of several.

Knows bytes and tile numbers. Does not know how well anything compresses, and writes nothing.
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
from unet_ray.segmentation.outlook import most_bytes
from unet_ray.segmentation.preparation import tiles_left, wanted_tiles
from unet_ray.segmentation.run import Segmentation
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.places import Place, files_below
from unet_ray.units import format_bytes


def check_disks(runs: Sequence[Segmentation], settings: Settings) -> None:
    """Refuses runs whose stores may need more than their disks have.

    Args:
        runs: to be done one after another.
        settings: of all of them.

    Raises:
        InputError: if the upper bound of the tiles that are left is more than is free.
    """
    disks: dict[int, list[Segmentation]] = {}
    for run in runs:
        if isinstance(run.out, Path):  # nobody knows what an object store holds
            disks.setdefault(os.stat(_standing(run.out)).st_dev, []).append(run)
    for together in disks.values():
        _check_disk(together, settings)


def _check_disk(runs: Sequence[Segmentation], settings: Settings) -> None:
    free = free_bytes([run.out for run in runs], settings.overwrite)
    if sum(_most(run, len(run.plan)) for run in runs) <= free:
        return
    counts = [int(tiles_left(run, wanted_tiles(run, settings)).sum()) for run in runs]
    left = [(run, count) for run, count in zip(runs, counts, strict=True) if count]
    most = sum(_most(run, count) for run, count in left)
    if most > free:
        out, several = left[0][0].out, len(left) > 1
        tiles = f"the {sum(counts)} tiles of {len(left)} stores" if several else "its tiles"
        raise InputError(
            f"{out.parent if several else out}: {tiles} may take {format_bytes(most)}, "
            f"{format_bytes(free)} are free there; make room, "
            f"{'do fewer inputs at a time' if several else 'choose another --out'}, or store less, "
            "as with --outputs classes or a --region."
        )


def _most(run: Segmentation, tiles: int) -> int:
    values = stored_values(len(run.class_values), run.outputs)
    return most_bytes(run.plan, values, len(run.outputs), tiles) if tiles else 0


def free_bytes(outs: Sequence[Place], overwrite: bool = False) -> float:
    """Bytes that may be written where stores are to be; infinite where nobody knows.

    Args:
        outs: the stores, on one disk, whether they are there or not.
        overwrite: what is there now will be deleted first.
    """
    out = outs[0]
    if not isinstance(out, Path):
        return math.inf
    disk = shutil.disk_usage(_standing(out))
    old = 0
    for path in (path for out in outs if overwrite for path in files_below(out)):
        with suppress(FileNotFoundError):  # of a run that is still writing there
            old += os.lstat(str(path)).st_size
    return disk.free + old if disk.total else math.inf


def _standing(out: Path) -> Path:
    """The folder that is there, in which a store is to be."""
    return next(path for path in (out, *out.parents) if path.exists())
