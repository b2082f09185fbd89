"""From volumes and a model to stores: plan -> read -> predict -> write, and what is left to do.

Knows what a user asks for in one command: one volume or several, and where each store goes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from unet_ray.engine.rounds import Progress
from unet_ray.errors import InputError
from unet_ray.segmentation.disk import check_disks
from unet_ray.segmentation.execution import execute
from unet_ray.segmentation.preparation import prepare, refuse_overlap
from unet_ray.segmentation.run import Segmentation
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.layout import ROOT
from unet_ray.storage.places import PathOrUrl, Place, place_of


def segment(
    source: PathOrUrl,
    model: str | os.PathLike[str],
    out: PathOrUrl,
    settings: Settings | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Place:
    """Segments one volume into a store, or goes on with it where it stopped.

    Args:
        source: path of the volume.
        model: RUN folder or model file.
        out: path of the store.
        settings: what to do otherwise than by default.
        watch: called after each tile.

    Returns:
        Path of the store.

    Raises:
        InputError: for anything wrong with input, model, settings or an existing store.
        QuarantinedError: if tiles failed too often; all others are done.
        RunError: if the disk takes nothing more.
    """
    settings = settings or Settings()
    run = prepare(source, model, out, settings)
    check_disks([run], settings)
    execute(run, settings, watch)
    return run.out


def prepare_all(
    sources: Sequence[str], model: str, out: str, settings: Settings
) -> list[Segmentation]:
    """Prepares every input before any is run; see `prepare` and `output_paths`.

    Raises:
        InputError: also if `out` is itself a store, if a store would overlap the input of another,
            or if the disk cannot hold all of them.
    """
    stores = output_paths(sources, out)
    if len(sources) > 1 and (place_of(out) / ROOT).is_file():
        raise InputError(f"{out}: is a store; several inputs need a folder: give another --out.")
    runs = [
        prepare(source, model, store, settings)
        for source, store in zip(sources, stores, strict=True)
    ]
    for run in runs:
        for each in runs:
            refuse_overlap(run.out, place_of(each.volume.path))
    check_disks(runs, settings)
    return runs


def output_paths(sources: Sequence[str], out: str) -> list[Place]:
    """The store of each input: `out` itself for one, a store each in folder `out` for several.

    Raises:
        InputError: if two inputs would share a store.
    """
    if len(sources) == 1:
        return [place_of(out)]
    names = [Path(source).name for source in sources]
    stems = [re.sub(r"(\.ome)?\.(tiff?|zarr|png)$", "", name, flags=re.I) for name in names]
    for stem in stems:
        if stems.count(stem) > 1:
            raise InputError(f"Two inputs are named {stem!r}: run them with an --out each.")
    return [place_of(out) / f"{stem}.zarr" for stem in stems]
