"""Objects of the volume from tiles: equal to one call of scipy.ndimage.label on the whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from unet_ray.segmentation.components import Connection, TileRecord, label_components
from unet_ray.segmentation.unions import holes, unite
from unet_ray.tiling.tiles import Context, TilePlan

NO_CONTEXT = Context((0, 0, 0), (0, 0, 0), (1, 1, 1))
CONNECTIONS = [Connection(c, k) for c in ("volume", "slice") for k in (6, 18, 26)]
ENOUGH = 1 << 30
every_connection = pytest.mark.parametrize("connection", CONNECTIONS, ids=str)


def plan_of(shape, core):
    return TilePlan(tuple(shape), tuple(core), NO_CONTEXT, (1, 1, 1))


# What a run does, without files


def labelled(plan, mask, connection, skipped=()):
    """The labels of all tiles, and a function that returns their records."""
    labels, records = {}, {}
    for index in set(range(len(plan))) - set(skipped):
        write = plan[index].write
        labels[index], count = label_components(mask[write.slices], connection)
        record = TileRecord.of(labels[index], count, write, plan.shape, connection)
        records[index] = record.to_bytes()

    def read(index):
        return None if index in skipped else TileRecord.from_bytes(records[index])

    return labels, read


def instances(plan, mask, connection, skipped=(), **options):
    """Ids of the whole volume, from tiles."""
    labels, read = labelled(plan, mask, connection, skipped)
    ids = np.zeros(plan.shape, np.uint64)
    tiles = []
    for index, ids_of_tile in unite(plan, read, connection, max_bytes=ENOUGH, **options):
        assert ids_of_tile.dtype == np.uint64
        ids[plan[index].write.slices] = ids_of_tile[labels[index]]
        tiles.append(index)
    assert tiles == sorted(labels)
    return ids


def filled(plan, mask, connection, skipped=()):
    """The mask with its holes, from tiles."""
    labels, read = labelled(plan, ~mask, connection.complement, skipped)
    result = mask.copy()
    for index, enclosed in holes(plan, read, connection, ENOUGH):
        result[plan[index].write.slices] |= enclosed[labels[index]]
    return result


# The same on the whole volume


def bordering(shape, connection):
    """A volume that is True at its border."""
    border = np.zeros(shape, bool)
    for axis in range(3):
        if shape[axis] > 1 and not (axis == 0 and connection.connect == "slice"):
            ends = np.moveaxis(border, axis, 0)
            ends[0] = ends[-1] = True
    return border


def expected(mask, connection, min_size=0, exclude_border=False, ids="dense"):
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connection.connectivity])
    if connection.connect == "slice":
        structure[0] = structure[2] = False
    labels, count = ndimage.label(mask, structure)
    border = bordering(mask.shape, connection)
    objects = []
    for label in range(1, count + 1):
        inside = labels == label
        if inside.sum() >= min_size and not (exclude_border and (inside & border).any()):
            objects.append((int(np.flatnonzero(inside)[0]), inside))
    result = np.zeros(mask.shape, np.uint64)
    for number, (first, inside) in enumerate(sorted(objects, key=lambda pair: pair[0]), 1):
        result[inside] = number if ids == "dense" else first + 1
    return result


def expected_holes(mask, connection, unknown=None):
    """Background that does not reach the border, nor voxels of `unknown`, by flooding."""
    border = bordering(mask.shape, connection)
    if not border.any():
        return np.zeros(mask.shape, bool)
    if unknown is not None:
        border |= unknown
    reached = border & ~mask
    structure = connection.complement.structure
    return ~mask & ~ndimage.binary_propagation(reached, structure, ~mask)


@st.composite
def cases(draw):
    """A small random volume, its tiles, and a connection."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)))
    core = draw(st.tuples(*(st.integers(1, n) for n in shape)))
    share = draw(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random.random(shape) < share, plan_of(shape, core), draw(st.sampled_from(CONNECTIONS))


options = st.fixed_dictionaries(
    {
        "min_size": st.sampled_from([0, 1, 2, 3, 10]),
        "exclude_border": st.booleans(),
        "ids": st.sampled_from(["dense", "first-voxel"]),
    }
)


@settings(max_examples=700, deadline=None)
@given(cases(), options)
def test_ids_equal_those_of_the_whole_volume(case, options):
    mask, plan, connection = case
    np.testing.assert_array_equal(
        instances(plan, mask, connection, **options), expected(mask, connection, **options)
    )


@settings(max_examples=300, deadline=None)
@given(cases(), options)
def test_ids_of_filled_objects_equal_those_of_the_whole_volume(case, options):
    mask, plan, connection = case
    full = filled(plan, mask, connection)
    np.testing.assert_array_equal(full, mask | expected_holes(mask, connection))
    np.testing.assert_array_equal(
        instances(plan, full, connection, **options), expected(full, connection, **options)
    )


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_skipped_tiles_are_background_that_reaches_the_border(case, data):
    mask, plan, connection = case
    skipped = data.draw(st.sets(st.integers(0, len(plan) - 1)))
    unknown = np.zeros(mask.shape, bool)
    for index in skipped:
        unknown[plan[index].write.slices] = True
    mask = mask & ~unknown
    np.testing.assert_array_equal(
        instances(plan, mask, connection, skipped), expected(mask, connection)
    )
    np.testing.assert_array_equal(
        filled(plan, mask, connection, skipped),
        mask | expected_holes(mask, connection, unknown),
    )
