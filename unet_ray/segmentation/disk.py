"""Whether the disk of an output can hold what is left of one run, or of several.

Knows bytes and tile numbers; writes nothing there. Where it cannot tell, the run goes on: a disk
that fills up all the same ends it without loss.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError, RunError
from unet_ray.segmentation.memory import stored_values
from unet_ray.segmentation.outlook import SAMPLE, most_bytes, plan, spread
from unet_ray.segmentation.pilot import try_tiles
from unet_ray.segmentation.preparation import tiles_left, wanted_tiles
from unet_ray.segmentation.run import Segmentation
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.places import Place, files_below
from unet_ray.units import format_bytes

TRIED = 8  # of several runs
MARGIN = 1.5  # by which a few tiles may be mistaken about what all of them store


def check_disks(runs: Sequence[Segmentation], settings: Settings) -> None:
    """Refuses what disks cannot hold by far; tries some tiles only where they might not.

    Args:
        runs: to be done one after another.
        settings: of all of them.

    Raises:
        InputError: if what the tiles that are left store, as a few of them tell, is far more than
            is free.
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
    left = [(run, tiles_left(run, wanted_tiles(run, settings))) for run in runs]
    left = [(run, tiles) for run, tiles in left if tiles.any()]
    count = sum(int(tiles.sum()) for _, tiles in left)
    most = sum(_most(run, int(tiles.sum())) for run, tiles in left)
    if most <= free:
        return
    stored = _stored_by_all(left, settings)
    if is_too_much(stored, free):
        out, several = left[0][0].out, len(left) > 1
        raise InputError(
            f"{out.parent if several else out}: "
            f"{f'the {count} tiles of {len(left)} stores' if several else f'its {count} tiles'} "
            f"would take about {format_bytes(stored)} ({format_bytes(most)} at most), "
            f"{format_bytes(free)} are free there; make room, "
            f"{'do fewer inputs at a time' if several else 'choose another --out'}, or store less, "
            "as with --outputs classes or a --region."
        )


def is_too_much(stored: float, free: float) -> bool:
    """Whether what a few tiles tell of bytes stored is by far more than is free."""
    return stored > MARGIN * free


def _most(run: Segmentation, tiles: int) -> int:
    values = stored_values(len(run.class_values), run.outputs)
    return most_bytes(run.plan, values, len(run.outputs), tiles)


def _stored_by_all(
    left: Sequence[tuple[Segmentation, NDArray[np.bool_]]], settings: Settings
) -> float:
    """Bytes that these tiles take on disk at least, as a few of them tell.

    Of many runs some are tried; of the others each tile is taken to store as little of what it
    could as those of any run that was.
    """
    most = [_most(run, int(tiles.sum())) for run, tiles in left]
    tried = spread(np.argsort(most, kind="stable"), TRIED)
    stored = {n: _stored(left[n][0], settings, np.flatnonzero(left[n][1])) for n in tried}
    least = min(stored[n] / most[n] for n in tried)
    return sum(stored.get(n, least * most[n]) for n in range(len(left)))


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


def _stored(run: Segmentation, settings: Settings, tiles: NDArray[np.intp]) -> float:
    """Bytes of these tiles on disk, as a few of them tell; 0 if they cannot be tried."""
    z, y, x = run.plan.core
    asked = replace(
        settings,
        engine="local",  # where it is tried
        workers=1,
        region=None,
        mask=None,
        tile=(z, y, x),
        memory=sys.maxsize,
        outputs=run.outputs,
        precision=run.precision,
    )
    try:
        outlook = plan(run.volume.path, run.model, asked)
        trial = try_tiles(replace(outlook, sample=tuple(spread(tiles, SAMPLE))), workers=1)
    except (RunError, OSError):  # of a bad chunk, or another disk: the run itself will tell
        return 0.0
    return trial.stored * len(tiles) if trial else 0.0
