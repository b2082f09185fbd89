"""Objects of the volume from tiles: equal to one call of scipy.ndimage.label on the whole."""

import tracemalloc
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from unet_ray.errors import DamageError, RunError
from unet_ray.segmentation import forest as forest_module
from unet_ray.segmentation.components import Connection, TileRecord, TileSummary, label_components
from unet_ray.segmentation.forest import WINDOW_BYTES
from unet_ray.segmentation.unions import holes, join_bytes, slabs, unite
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


# Worst cases


def snake(shape=(6, 8, 8)):
    """One path of voxels through all tiles."""
    mask = np.zeros(shape, bool)
    mask[::2, ::2] = True
    for z in range(0, shape[0], 2):
        for number, y in enumerate(range(1, shape[1] - 2, 2)):
            mask[z, y, -1 if number % 2 == 0 else 0] = True
        if z + 2 < shape[0]:
            mask[z + 1, 0 if z % 4 else -2, 0] = True
    return mask


def checkerboard(shape=(6, 8, 8)):
    return np.indices(shape).sum(0) % 2 == 0


def corners(shape=(6, 8, 8)):
    """A voxel in each corner of each tile of 3 x 4 x 4."""
    mask = np.zeros(shape, bool)
    mask[np.ix_([0, 2, 3, 5], [0, 3, 4, 7], [0, 3, 4, 7])] = True
    return mask


def across(*positions):
    """Some voxels of a volume of 6 x 8 x 8."""
    mask = np.zeros((6, 8, 8), bool)
    for position in positions:
        mask[position] = True
    return mask


WORST = {
    "snake": (snake(), {6: 1, 18: 1, 26: 1}),
    "checkerboard": (checkerboard(), {6: 192, 18: 1, 26: 1}),
    "all foreground": (np.ones((6, 8, 8), bool), {6: 1, 18: 1, 26: 1}),
    "empty": (np.zeros((6, 8, 8), bool), {6: 0, 18: 0, 26: 0}),
    "corners": (corners(), {6: 27, 18: 27, 26: 27}),
    "face": (across((2, 1, 1), (3, 1, 1)), {6: 1, 18: 1, 26: 1}),
    "edge of z and y": (across((2, 3, 1), (3, 4, 1)), {6: 2, 18: 1, 26: 1}),
    "edge of z and y, descending": (across((2, 4, 1), (3, 3, 1)), {6: 2, 18: 1, 26: 1}),
    "edge of z and x": (across((2, 1, 3), (3, 1, 4)), {6: 2, 18: 1, 26: 1}),
    "edge of z and x, descending": (across((2, 1, 4), (3, 1, 3)), {6: 2, 18: 1, 26: 1}),
    "edge of y and x": (across((1, 3, 3), (1, 4, 4)), {6: 2, 18: 1, 26: 1}),
    "edge of y and x, descending": (across((1, 3, 4), (1, 4, 3)), {6: 2, 18: 1, 26: 1}),
    "diagonal over a face": (across((2, 1, 1), (3, 2, 1)), {6: 2, 18: 1, 26: 1}),
    "diagonal over an edge": (across((2, 3, 1), (3, 4, 2)), {6: 2, 18: 2, 26: 1}),
    "corner": (across((2, 3, 3), (3, 4, 4)), {6: 2, 18: 2, 26: 1}),
    "corner, x descending": (across((2, 3, 4), (3, 4, 3)), {6: 2, 18: 2, 26: 1}),
    "corner, y descending": (across((2, 4, 3), (3, 3, 4)), {6: 2, 18: 2, 26: 1}),
    "corner, both descending": (across((2, 4, 4), (3, 3, 3)), {6: 2, 18: 2, 26: 1}),
}


@pytest.mark.parametrize("core", [(3, 4, 4), (1, 8, 8), (6, 2, 1), (6, 8, 8), (4, 5, 3)])
@pytest.mark.parametrize("name", WORST)
def test_worst_cases(name, core):
    mask, objects = WORST[name]
    for connection in CONNECTIONS:
        ids = instances(plan_of(mask.shape, core), mask, connection)
        np.testing.assert_array_equal(ids, expected(mask, connection))
        if connection.connect == "volume":
            assert ids.max() == objects[connection.connectivity]


def test_a_hole_that_spans_tiles_is_filled_unless_it_leaks():
    mask = np.zeros((6, 8, 8), bool)
    mask[1:5, 1:7, 1:7] = True
    mask[2:4, 2:6, 2:6] = False
    plan = plan_of(mask.shape, (3, 4, 4))
    whole = np.zeros_like(mask)
    whole[1:5, 1:7, 1:7] = True
    np.testing.assert_array_equal(filled(plan, mask, Connection()), whole)
    mask[4, 5, 5] = False
    np.testing.assert_array_equal(filled(plan, mask, Connection()), mask)


def test_a_diagonal_leak_counts_only_if_the_background_is_diagonal():
    mask = np.ones((1, 6, 6), bool)
    mask[0, 0] = mask[0, -1] = mask[0, :, 0] = mask[0, :, -1] = False
    mask[0, 2, 2] = mask[0, 1, 1] = False
    plan = plan_of(mask.shape, (1, 2, 2))
    assert not filled(plan, mask, Connection("volume", 6))[0, 2, 2]
    assert filled(plan, mask, Connection("volume", 26))[0, 2, 2]


def test_a_volume_without_a_border_has_no_holes():
    mask = np.zeros((2, 1, 1), bool)
    plan = plan_of(mask.shape, (1, 1, 1))
    assert not filled(plan, mask, Connection("slice")).any()


# Memory and damage


def test_the_window_of_planes_does_not_change_the_ids(monkeypatch):
    monkeypatch.setattr(forest_module, "WINDOW_BYTES", 0)
    mask = np.random.default_rng(0).random((6, 8, 8)) < 0.4
    for connection in CONNECTIONS:
        ids = instances(plan_of(mask.shape, (2, 3, 3)), mask, connection)
        np.testing.assert_array_equal(ids, expected(mask, connection))


def test_slabs_follow_each_other_in_scan_order():
    for shape, core, size in [
        ((6, 8, 8), (3, 4, 4), 4),
        ((6, 8, 8), (1, 4, 4), 2),
        ((6, 8, 8), (1, 1, 4), 1),
        ((6, 8, 8), (1, 1, 1), 1),
        ((1, 8, 8), (16, 4, 4), 2),
    ]:
        plan = plan_of(shape, core)
        numbers = np.arange(np.prod(shape)).reshape(shape)
        last = -1
        for slab in slabs(plan):
            assert len(slab) == size
            voxels = [numbers[plan[index].write.slices] for index in slab]
            assert min(v.min() for v in voxels) == last + 1
            last = max(v.max() for v in voxels)
        assert last == numbers.size - 1


def test_labels_beyond_the_memory_are_refused_with_what_they_need():
    mask = checkerboard()
    plan = plan_of(mask.shape, (3, 4, 4))
    connection = Connection()
    _, read = labelled(plan, mask, connection)
    labels = [read(index).count for index in range(len(plan))]
    touching = sum(len(read(index).touching) for index in range(len(plan)))
    slab = max(sum(labels[n] for n in tiles) for tiles in slabs(plan))
    dense, first = join_bytes(slab, touching, "dense"), join_bytes(slab, touching, "first-voxel")
    assert len(list(unite(plan, read, connection, max_bytes=dense))) == 8
    assert len(list(unite(plan, read, connection, ids="first-voxel", max_bytes=first))) == 8
    with pytest.raises(RunError) as refused:
        list(unite(plan, read, connection, max_bytes=dense - 1))
    assert f"{sum(labels)} labels, of which {touching} touch" in str(refused.value)
    assert "--memory 65MiB or more, or --ids first-voxel" in str(refused.value)
    with pytest.raises(RunError, match=r"or more\."):
        list(unite(plan, read, connection, ids="first-voxel", max_bytes=first - 1))
    with pytest.raises(RunError, match=r"need .* to be united"):
        list(holes(plan, read, connection.complement, first - 1))


@pytest.mark.parametrize("ids", ["dense", "first-voxel"])
def test_the_memory_of_a_union_stays_within_what_is_stated(ids, monkeypatch):
    monkeypatch.setattr(forest_module, "WINDOW_BYTES", 0)
    connection, mask = Connection(), checkerboard((32, 128, 128))
    plan = plan_of(mask.shape, (8, 16, 16))
    _, read = labelled(plan, mask, connection)
    records = [read(index) for index in range(len(plan))]
    touching = sum(len(tile.touching) for tile in records)
    labels = max(sum(records[n].count for n in tiles) for tiles in slabs(plan))
    del records

    def peak():
        tracemalloc.start()
        for _ in unite(plan, read, connection, ids=ids, max_bytes=ENOUGH):
            pass
        bytes_at_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_at_peak

    peak()  # compiles
    stated = join_bytes(labels, touching, ids) - WINDOW_BYTES
    assert stated / 2 < peak() < stated + (256 << 10)  # a record of a tile needs 40 KiB


def summary_of(record):
    return TileSummary(**{field.name: getattr(record, field.name) for field in fields(TileSummary)})


@pytest.mark.parametrize("ids", ["dense", "first-voxel"])
def test_the_faces_of_each_tile_are_read_once(ids):
    mask, connection = checkerboard(), Connection()
    plan = plan_of(mask.shape, (3, 4, 4))
    _, read = labelled(plan, mask, connection)
    calls = []

    def counted(index):
        calls.append(index)
        return read(index)

    def summary(index):
        return summary_of(read(index))

    options = {"ids": ids, "max_bytes": ENOUGH}
    united = dict(unite(plan, counted, connection, **options, summary=summary))
    assert calls == list(range(len(plan))) == list(united)
    for index, expected in unite(plan, read, connection, **options):
        np.testing.assert_array_equal(united[index], expected)
    with pytest.raises(DamageError, match="tile 0 belongs to other"):
        list(unite(plan, read, connection, **options, summary=lambda index: summary(index ^ 1)))


def test_a_record_of_another_tile_plan_or_connection_is_damage():
    mask, connection = checkerboard(), Connection()
    plan = plan_of(mask.shape, (3, 4, 4))
    _, read = labelled(plan, mask, connection)
    others = {
        "tile": lambda index: read(index ^ 1),
        "plan": labelled(plan_of((6, 8, 16), (3, 4, 4)), np.tile(mask, (1, 1, 2)), connection)[1],
        "connection": labelled(plan, mask, Connection("slice"))[1],
    }
    for other in others.values():
        with pytest.raises(DamageError, match="tile 0 belongs to other"):
            list(unite(plan, other, connection, max_bytes=ENOUGH))
