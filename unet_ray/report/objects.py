"""The section about the objects of a store: number, sizes and the largest ones.

Knows the columns of the table of objects. Does not know how objects are made, or the layout of the
page.
"""

from __future__ import annotations

import heapq
import io
import math
from collections.abc import Iterator

import numpy as np
import pyarrow
from markupsafe import Markup
from numpy.typing import NDArray
from pyarrow import parquet

from unet_ray.errors import DamageError, reason
from unet_ray.report import charts
from unet_ray.report.figures import Facts, digits_of
from unet_ray.report.results import Result
from unet_ray.storage.layout import INSTANCES, TABLE
from unet_ray.storage.written import is_made, read_table

LARGEST = 10  # objects that are listed
ROWS = 1 << 16  # of the table at a time
BINS_PER_DECADE = 4


def about_objects(result: Result) -> Facts:
    """Facts about the objects of a store; empty if they are not finished.

    Raises:
        DamageError: if the table is missing or damaged; names the file.
    """
    if INSTANCES not in result.outputs or not is_made(result.path, "table", result.plan, 1):
        return {}
    counts, touching, largest = _summed(result)
    objects = int(counts.sum())
    return {
        "count": f"{objects:,}",
        "border": f"{touching:,}",
        "sizes": Markup(_histogram(counts)) if objects else None,
        "largest": largest,
    }


def _summed(result: Result) -> tuple[NDArray[np.int64], int, list[Facts]]:
    """Objects per bin of sizes, objects at the border, and the largest objects."""
    counts, touching = np.zeros(20 * BINS_PER_DECADE, np.int64), 0
    largest: list[tuple[int, int, Facts]] = []
    for rows in _batches(result):
        voxels = rows["voxels"].to_numpy()
        bins = (BINS_PER_DECADE * np.log10(voxels)).astype(np.int64)
        counts += np.bincount(bins, minlength=len(counts))
        touching += int(rows["border"].to_numpy(zero_copy_only=False).sum())
        for row in np.argsort(-voxels.astype(np.int64), kind="stable")[:LARGEST].tolist():
            facts = {name: rows[name][row].as_py() for name in rows.schema.names}
            largest.append((facts["voxels"], -facts["id"], _row(facts)))
        largest = heapq.nlargest(LARGEST, largest, key=lambda each: each[:2])
    return counts, touching, [facts for _, _, facts in largest]


def _batches(result: Result) -> Iterator[pyarrow.RecordBatch]:
    columns = ["id", "voxels", "volume", "centroid_z", "centroid_y", "centroid_x", "border"]
    try:
        file = parquet.ParquetFile(io.BytesIO(read_table(result.path)))
        yield from file.iter_batches(ROWS, columns=columns)
    except (pyarrow.ArrowException, KeyError) as error:
        raise DamageError(f"{result.path / TABLE}: is damaged ({reason(error)}).") from error


def _row(facts: Facts) -> Facts:
    centre = ", ".join(f"{facts[f'centroid_{axis}']:.1f}" for axis in "zyx")
    volume = "unknown" if facts["volume"] is None else digits_of(facts["volume"])
    return {
        "id": facts["id"],
        "voxels": f"{facts['voxels']:,}",
        "volume": volume,
        "centre": centre,
        "border": "yes" if facts["border"] else "no",
    }


def _histogram(counts: NDArray[np.int64]) -> str:
    """Bars over the logarithm of the size, from the first to the last bin with an object."""
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1]) + 1
    edges = np.arange(first, last + 1) / BINS_PER_DECADE
    smallest, biggest = (f"{math.floor(10**edge):,}" for edge in (edges[0], edges[-1]))
    title = f"Sizes of objects, {smallest} to {biggest} voxels"
    return charts.histogram(title, edges, counts[first:last], "log10 of the voxels", "objects")
