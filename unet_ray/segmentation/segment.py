"""Segmentation of one or several volumes into stores: the Python API of `unet-ray segment`.

Knows the inputs of one command and the output path of each. Does not know how tiles are run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from unet_ray.engine.rounds import Progress
from unet_ray.errors import InputError, refuse_empty
from unet_ray.segmentation.disk import check_disks
from unet_ray.segmentation.execution import execute
from unet_ray.segmentation.preparation import prepare, refuse_overlap
from unet_ray.segmentation.run import Segmentation
from unet_ray.segmentation.settings import Settings
from unet_ray.storage.inspection import refuse_links
from unet_ray.storage.layout import ROOT
from unet_ray.storage.places import PathOrUrl, Place, place_of


def segment(
    source: PathOrUrl,
    model: str | os.PathLike[str],
    out: PathOrUrl,
    settings: Settings | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Place:
    """Segments one volume into a store; resumes an interrupted run.

    Args:
        source: path or URL of the volume.
        model: RUN folder or model file.
        out: path or URL of the store.
        settings: defaults to ``Settings()``.
        watch: called after each tile that is committed or quarantined.

    Returns:
        Path of the store.

    Raises:
        InputError: if the input, the model, a setting or an existing store is invalid, or the
            store does not fit onto its disk.
        QuarantinedError: if tiles were quarantined; all others are done.
        RunError: if the disk is full or read-only, or a worker does not fit into memory.
    """
    refuse_empty(out)
    settings = settings or Settings()
    run = prepare(source, model, out, settings)
    refuse_links(run.out, run.outputs)
    check_disks([run], settings)
    execute(run, settings, watch)
    return run.out


def prepare_all(
    sources: Sequence[str], model: str, out: str, settings: Settings
) -> list[Segmentation]:
    """Prepares all inputs, so that errors appear before the first run starts; see `prepare`.

    Args:
        sources: paths of the volumes.
        model: RUN folder or model file.
        out: the store, or for several inputs the folder of the stores; see `output_paths`.
        settings: the settings of all runs.

    Raises:
        InputError: if an input is invalid, if `out` is a store although there are several inputs,
            if a store overlaps an input, or if the stores do not fit onto their disks.
    """
    refuse_empty(out)
    stores = output_paths(sources, out)
    if len(sources) > 1 and (place_of(out) / ROOT).is_file():
        raise InputError(f"{out}: is a store; several inputs need a folder; choose another --out.")
    runs = [
        prepare(source, model, store, settings)
        for source, store in zip(sources, stores, strict=True)
    ]
    for run in runs:
        refuse_links(run.out, run.outputs)
        for other in runs:
            refuse_overlap(run.out, place_of(other.volume.path))
    check_disks(runs, settings)
    return runs


def output_paths(sources: Sequence[str], out: str) -> list[Place]:
    """Path of each input's store: `out` for one input, ``out/NAME.zarr`` for several.

    Raises:
        InputError: if two inputs have the same name.
    """
    if len(sources) == 1:
        return [place_of(out)]
    names = [Path(source).name for source in sources]
    stems = [re.sub(r"(\.ome)?\.(tiff?|zarr|png)$", "", name, flags=re.I) for name in names]
    for stem in stems:
        if stems.count(stem) > 1:
            raise InputError(f"Two inputs are named {stem!r}: run each with its own --out.")
    return [place_of(out) / f"{stem}.zarr" for stem in stems]
