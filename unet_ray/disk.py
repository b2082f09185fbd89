"""Whether the disk of an output can hold what is left of a run.

Knows bytes and tile numbers; writes nothing there. Where it cannot tell, the run goes on: a disk
that fills up all the same ends it without loss.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unet_ray.errors import InputError, RunError
from unet_ray.memory import format_bytes
from unet_ray.pilot import try_tiles
from unet_ray.places import Place, files_below
from unet_ray.planning import (
    SAMPLE,
    Settings,
    most_bytes,
    plan,
    spread,
    stored_values,
)
from unet_ray.preparation import Segmentation

MARGIN = 1.5  # by which a few tiles may be mistaken about what all of them store


def check_disk(run: Segmentation, settings: Settings, left: NDArray[np.bool_]) -> None:
    """Refuses what the disk cannot hold by far; tries some tiles only where it might not.

    Raises:
        InputError: if what the tiles that are left store, as a few of them tell, is far more than
            is free.
    """
    free, tiles = free_bytes(run.out, settings.overwrite), int(left.sum())
    values = stored_values(len(run.class_values), run.outputs)
    most = most_bytes(run.plan, values, len(run.outputs), tiles)
    if most <= free:
        return
    stored = _stored(run, settings, np.flatnonzero(left)) * tiles
    if stored > MARGIN * free:
        raise InputError(
            f"{run.out}: its {tiles} tiles would take about {format_bytes(stored)} "
            f"({format_bytes(most)} at most), {format_bytes(free)} are free there; make room, "
            "choose another --out, or store less, as with --outputs classes or a --region."
        )


def free_bytes(out: Place, overwrite: bool = False) -> float:
    """Bytes that may be written where a store is to be; infinite where nobody knows.

    Args:
        out: the store, whether it is there or not.
        overwrite: what is there now will be deleted first.
    """
    if not isinstance(out, Path):
        return math.inf
    disk = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists()))
    old = 0
    for path in files_below(out) if overwrite else ():
        with suppress(FileNotFoundError):  # of a run that is still writing there
            old += os.lstat(str(path)).st_size
    return disk.free + old if disk.total else math.inf


def _stored(run: Segmentation, settings: Settings, tiles: NDArray[np.intp]) -> float:
    """Bytes of one of these tiles on disk, as a few of them tell; 0 if they cannot be tried."""
    z, y, x = run.plan.core
    asked = replace(
        settings,
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
    return trial.stored if trial else 0.0
