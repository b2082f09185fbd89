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

TRIED = 2  # of several runs, the largest, which tell of the others
MARGIN = 1.5  # by which a few tiles may be mistaken about what all of them store


def check_disk(
    runs: Sequence[Segmentation], left: Sequence[NDArray[np.bool_]], settings: Settings
) -> None:
    """Refuses what the disk cannot hold by far; tries some tiles only where it might not.

    Args:
        runs: whose stores lie on one disk.
        left: bits of the tiles that each is still to do, (tiles,).
        settings: of all of them.

    Raises:
        InputError: if what the tiles that are left store, as a few of them tell, is far more than
            is free.
    """
    most = [_most(run, int(tiles.sum())) for run, tiles in zip(runs, left, strict=True)]
    free = free_bytes([run.out for run in runs], settings.overwrite)
    if sum(most) <= free:
        return
    largest = sorted(filter(most.__getitem__, range(len(runs))), key=most.__getitem__)[-TRIED:]
    tried = {n: _stored(runs[n], settings, np.flatnonzero(left[n])) for n in largest}
    known = [n for n in largest if tried[n]]
    stored = sum(most) * sum(tried.values()) / sum(most[n] for n in known) if known else 0.0
    if stored > MARGIN * free:
        tiles, several = sum(int(bits.sum()) for bits in left), len(runs) > 1
        out = runs[0].out.parent if several else runs[0].out
        what = f"the {tiles} tiles of {len(runs)} stores" if several else f"its {tiles} tiles"
        remedy = "do fewer inputs at a time" if several else "choose another --out"
        raise InputError(
            f"{out}: {what} would take about {format_bytes(stored)} ({format_bytes(sum(most))} at "
            f"most), {format_bytes(free)} are free there; make room, {remedy}, or store less, as "
            "with --outputs classes or a --region."
        )


def _most(run: Segmentation, tiles: int) -> int:
    values = stored_values(len(run.class_values), run.outputs)
    return most_bytes(run.plan, values, len(run.outputs), tiles)


def free_bytes(outs: Sequence[Place], overwrite: bool = False) -> float:
    """Bytes that may be written where stores are to be; infinite where nobody knows.

    Args:
        outs: the stores, on one disk, whether they are there or not.
        overwrite: what is there now will be deleted first.
    """
    out = outs[0]
    if not isinstance(out, Path):
        return math.inf
    disk = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists()))
    old = 0
    for path in (path for out in outs if overwrite for path in files_below(out)):
        with suppress(FileNotFoundError):  # of a run that is still writing there
            old += os.lstat(str(path)).st_size
    return disk.free + old if disk.total else math.inf


def _stored(run: Segmentation, settings: Settings, tiles: NDArray[np.intp]) -> float:
    """Bytes of these tiles on disk, as a few of them tell; 0 if they cannot be tried."""
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
    return trial.stored * len(tiles) if trial else 0.0
