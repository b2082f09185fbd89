"""Labels connected components by runs: rows of neighbouring voxels along x.

Knows one array of voxels. Does not know tiles or volumes.

Two runs of neighbouring rows belong together if they overlap, or nearly so where diagonal voxels
are neighbours. A union of runs is several times faster than one of voxels (He et al. 2008).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unet_ray.compiled import compiled


def label_runs(
    mask: NDArray[np.bool_], structure: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], int]:
    """Labels the connected components of `mask`, exactly as `scipy.ndimage.label` does.

    Besides the labels it needs 12 bytes per run, at most 6 per voxel.

    Args:
        mask: (z, y, x), with fewer than 2^31 runs.
        structure: the neighbours of the centre, shape (3, 3, 3), symmetric; a neighbour that
            differs along x implies the one that does not.

    Returns:
        Labels (z, y, x) from 1, in the order of their first voxels, and their number.
    """
    mask = np.ascontiguousarray(mask)
    rows = np.zeros(mask.shape[0] * mask.shape[1] + 1, np.int64)
    _count(mask, rows)
    np.cumsum(rows, out=rows)
    edges = np.empty((rows[-1], 2), np.int32)
    parents = np.empty(rows[-1], np.int32)
    # Rows before a row, as steps along z and y, and how far neighbours reach along x.
    before = [
        (z, y) for z, y in ((-1, -1), (-1, 0), (-1, 1), (0, -1)) if structure[z + 1, y + 1, 1]
    ]
    reach = [int(structure[z + 1, y + 1, 2]) for z, y in before]
    steps = np.array(before, np.int64).reshape(-1, 2)
    count = _unite(mask, rows, edges, parents, steps, np.array(reach, np.int64))
    labels = np.zeros(mask.shape, np.int32)
    _paint(labels, rows, edges, parents)
    return labels, int(count)


@compiled
def _count(mask: NDArray[np.bool_], rows: NDArray[np.int64]) -> None:
    """Counts the runs of each row, shifted by one row."""
    for z in range(mask.shape[0]):
        for y in range(mask.shape[1]):
            line, runs = mask[z, y], 0
            last = False
            for x in range(len(line)):
                runs += line[x] and not last
                last = line[x]
            rows[z * mask.shape[1] + y + 1] = runs


@compiled
def _root(parents: NDArray[np.int32], run: int) -> int:
    while parents[run] != run:
        parents[run] = parents[parents[run]]
        run = parents[run]
    return run


@compiled
def _unite(
    mask: NDArray[np.bool_],
    rows: NDArray[np.int64],
    edges: NDArray[np.int32],
    parents: NDArray[np.int32],
    steps: NDArray[np.int64],
    reach: NDArray[np.int64],
) -> int:
    """Finds the runs and their components, in place; returns the number of components.

    Args:
        mask: the voxels.
        rows: number of the first run of each row, and of all runs.
        edges: start and stop of each run along x.
        parents: at the end, the label of each run.
        steps: rows before a row, along z and y.
        reach: along x, for each of these rows.
    """
    depth, height, width = mask.shape
    for z in range(depth):
        for y in range(height):
            row = z * height + y
            line, run, x = mask[z, y], rows[row], 0
            while run < rows[row + 1]:
                while not line[x]:
                    x += 1
                edges[run, 0] = x
                while x < width and line[x]:
                    x += 1
                edges[run, 1] = x
                parents[run] = run
                run += 1
            for k in range(len(steps)):
                v, u = z + steps[k, 0], y + steps[k, 1]
                if v < 0 or u < 0 or u >= height:
                    continue
                other, last = rows[v * height + u], rows[v * height + u + 1]
                run = rows[row]
                while run < rows[row + 1] and other < last:
                    if (
                        edges[run, 0] < edges[other, 1] + reach[k]
                        and edges[other, 0] < edges[run, 1] + reach[k]
                    ):
                        one, two = _root(parents, run), _root(parents, other)
                        parents[max(one, two)] = min(one, two)
                    if edges[run, 1] < edges[other, 1]:
                        run += 1
                    else:
                        other += 1
    count = 0
    for run in range(len(parents)):
        # The parent has a lower number, so it already has its label.
        if parents[run] == run:
            count += 1
            parents[run] = count
        else:
            parents[run] = parents[parents[run]]
    return count


@compiled
def _paint(
    labels: NDArray[np.int32],
    rows: NDArray[np.int64],
    edges: NDArray[np.int32],
    parents: NDArray[np.int32],
) -> None:
    """Writes the label of each run to its voxels."""
    height = labels.shape[1]
    for z in range(labels.shape[0]):
        for y in range(height):
            row = z * height + y
            for run in range(rows[row], rows[row + 1]):
                labels[z, y, edges[run, 0] : edges[run, 1]] = parents[run]
