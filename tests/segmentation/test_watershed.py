"""Objects split at their necks: equal for all tiles, and equal to a slow watershed of the whole."""

import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tests.segmentation.test_unions import CONNECTIONS, bordering, every_connection, plan_of
from unet_ray.errors import DamageError, RunError
from unet_ray.metrics import seg
from unet_ray.segmentation import watershed
from unet_ray.segmentation.components import Connection, label_components
from unet_ray.segmentation.unions import unite
from unet_ray.segmentation.watershed import BasinRecord, basin_bytes, heights, label_basins, window
from unet_ray.tiling.boxes import Box

ENOUGH = 1 << 30
SLICE, VOLUME = Connection("slice"), Connection("volume")


@pytest.fixture
def near(monkeypatch):
    """A short reach, so that a small volume has tiles whose margins end inside the volume."""

    def set_reach(voxels):
        monkeypatch.setattr(watershed, "REACH", {"slice": voxels, "volume": voxels})

    return set_reach


def labelled(plan, mask, connection):
    """The labels of all tiles, and their records."""
    labels, records = {}, {}
    for index in range(len(plan)):
        read = window(plan[index].write, plan.shape, connection)
        labels[index], record = label_basins(
            mask[read.slices], read, plan[index].write, plan.shape, connection
        )
        records[index] = record
    return labels, records


def instances(mask, connection, core=None, **options):
    """Ids of the whole volume, from tiles of size `core`."""
    plan = plan_of(mask.shape, core or mask.shape)
    labels, records = labelled(plan, mask, connection)
    stored = {index: record.to_bytes() for index, record in records.items()}
    ids = np.zeros(plan.shape, np.uint64)
    for index, ids_of_tile in unite(
        plan,
        lambda index: BasinRecord.from_bytes(stored[index]),
        connection,
        **{"max_bytes": ENOUGH, "split": True, **options},
    ):
        ids[plan[index].write.slices] = ids_of_tile[labels[index]]
    return ids


# The same on the whole volume, voxel by voxel


def expected_heights(mask, connection):
    flat, cap = connection.connect == "slice", watershed.REACH[connection.connect]
    parts = [part[None] for part in mask] if flat else [mask]
    # Without any background, scipy measures to a voxel that does not exist.
    distances = [
        np.full(part.shape, float(cap)) if part.all() else ndimage.distance_transform_edt(part)
        for part in parts
    ]
    squared = np.minimum(np.rint(np.concatenate(distances) ** 2), cap**2)
    height = np.floor(np.sqrt(256 * squared)).astype(np.int64)
    for axis in (1, 2) if flat else (0, 1, 2):
        height = ndimage.correlate1d(height, [1, 2, 3, 2, 1], axis, mode="nearest")
    return np.where(mask, height, 0)


def expected(mask, connection, min_size=0, exclude_border=False, ids="dense"):
    height = expected_heights(mask, connection)
    steps = [tuple(step) for step in np.argwhere(connection.structure) - 1 if step.any()]
    voxels = [tuple(voxel) for voxel in np.argwhere(mask).tolist()]
    inside = set(voxels)
    neighbours = {
        a: [b for s in steps if (b := tuple(map(sum, zip(a, s, strict=True)))) in inside]
        for a in voxels
    }
    higher = {a: max(neighbours[a], key=lambda b: height[b], default=a) for a in voxels}
    tops = {a for a in voxels if height[higher[a]] <= height[a]}
    trees = Trees(voxels)
    for a in voxels:
        for b in neighbours[a]:
            if b == higher[a] and a not in tops:
                trees.join(a, b)
            if a in tops and b in tops and height[a] == height[b]:
                trees.join(a, b)
    peak = {}
    for a in voxels:
        peak[trees[a]] = max(peak.get(trees[a], 0), height[a])
    necks = {
        (-min(height[a], height[b]), *sorted((trees[a], trees[b])))
        for a in voxels
        for b in neighbours[a]
    }
    voxel = 16 * 9 ** (2 if connection.connect == "slice" else 3)
    for negative, a, b in sorted(necks):
        a, b, neck = trees[a], trees[b], -negative
        lower = min(peak[a], peak[b])
        if a != b and (neck > 0.9 * lower or lower - neck < 0.75 * voxel):
            trees.join(a, b)
            peak[trees[a]] = max(peak[a], peak[b])
    border = bordering(mask.shape, connection)
    members = {}
    for a in voxels:
        members.setdefault(trees[a], []).append(a)
    result, number = np.zeros(mask.shape, np.uint64), 0
    for first, group in sorted(members.items()):
        index = tuple(np.transpose(group))
        if len(group) >= min_size and not (exclude_border and border[index].any()):
            number += 1
            linear = int(np.ravel_multi_index(first, mask.shape))
            result[index] = number if ids == "dense" else linear + 1
    return result


class Trees(dict):
    """The root of each voxel: the first voxel of its set."""

    def __init__(self, voxels):
        super().__init__((voxel, voxel) for voxel in voxels)

    def __getitem__(self, voxel):
        while (parent := super().__getitem__(voxel)) != voxel:
            voxel = parent
        return voxel

    def join(self, a, b):
        a, b = self[a], self[b]
        self[max(a, b)] = min(a, b)


@st.composite
def masks(draw, most=(3, 9, 9)):
    """Random voxels or blobs, with necks of all widths. In mirrored ones, necks are equal."""
    shape = draw(st.tuples(*(st.integers(1, n) for n in most)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    noise = ndimage.gaussian_filter(random.standard_normal(shape), draw(st.floats(0, 3)))
    for axis in draw(st.sets(st.sampled_from([1, 2]))):
        noise = np.concatenate([noise, np.flip(noise, axis)], axis)
    return noise > draw(st.floats(-0.8, 0.8)) * noise.std()


options = st.fixed_dictionaries(
    {
        "min_size": st.sampled_from([0, 1, 3, 20]),
        "exclude_border": st.booleans(),
        "ids": st.sampled_from(["dense", "first-voxel"]),
    }
)
connections = st.sampled_from(CONNECTIONS)
short = settings(max_examples=60, deadline=None)


@settings(max_examples=100, deadline=None)
@given(masks(), st.data(), connections, st.integers(1, 4), options)
def test_ids_equal_those_of_a_slow_watershed_of_the_whole_volume(
    mask, data, connection, voxels, options
):
    core = data.draw(st.tuples(*(st.integers(1 + n // 5, n) for n in mask.shape)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watershed, "REACH", {"slice": voxels, "volume": voxels})
        np.testing.assert_array_equal(
            instances(mask, connection, core, **options), expected(mask, connection, **options)
        )


@settings(max_examples=60, deadline=None)
@given(masks(most=(3, 60, 60)), st.data(), connections, st.integers(1, 9), options)
def test_ids_do_not_depend_on_the_tiles(mask, data, connection, voxels, options):
    core = data.draw(st.tuples(*(st.integers(1 + n // 5, n) for n in mask.shape)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watershed, "REACH", {"slice": voxels, "volume": voxels})
        np.testing.assert_array_equal(
            instances(mask, connection, core, **options), instances(mask, connection, **options)
        )


@pytest.mark.parametrize("masks", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_equal_necks_are_taken_in_the_same_order_for_all_tiles(near, masks):
    """In mirrored masks necks are equal; their order matters in about 2 % of these."""
    random = np.random.default_rng(1)
    for _ in range(masks):
        near(int(random.integers(2, 9)))
        noise = random.standard_normal((1, *random.integers(8, 30, 2)))
        noise = ndimage.gaussian_filter(noise, (0, *[random.uniform(0.3, 3)] * 2))
        noise = np.concatenate([noise, noise[:, :, ::-1]], 2)
        mask = noise > random.uniform(-0.8, 0.5) * noise.std()
        core = (1, *random.integers(2, mask.shape[1:]).tolist())
        connection = Connection("slice", 6 if random.random() < 0.5 else 26)
        np.testing.assert_array_equal(
            instances(mask, connection, core), instances(mask, connection)
        )


RING = """
..##########################..
..##########################..
..#######............#######..
...###..................###...
..###....................###..
#####.......######.......#####
#####......########......#####
######.....########.....######
######.....########.....######
#####......########......#####
#####.......######.......#####
..###....................###..
...###..................###...
..#######............#######..
..##########################..
..##########################..
"""


def test_a_flat_top_in_several_tiles_is_one_basin(near):
    """Its parts would also be merged, but later than other basins with an equal neck."""
    near(3)
    mask = np.array([[c == "#" for c in row] for row in RING.split()])[None]
    np.testing.assert_array_equal(instances(mask, SLICE, (1, 15, 4)), instances(mask, SLICE))


def test_a_reach_of_the_product_does_not_depend_on_the_tiles():
    cells, _ = discs([(150, 140, 90), (150, 270, 60), (60, 330, 40)], (300, 400))
    whole = instances(cells, SLICE)
    assert whole.max() == 3
    for core in ((1, 150, 200), (1, 77, 400), (1, 300, 133)):
        np.testing.assert_array_equal(instances(cells, SLICE, core), whole)


@every_connection
def test_the_margin_suffices_and_is_not_wider(near, connection):
    """One voxel around the tile also has the heights of the whole volume, and no voxel more."""
    near(4)
    random = np.random.default_rng(6)
    write, one = Box((9, 9, 9), (11, 14, 14)), (connection.connect == "volume", 1, 1)
    ring, wider = write.grow(one, one), write.grow([2 * n for n in one], [2 * n for n in one])
    differs = False
    for share in [0.95, 0.98, 0.99] * 20:
        mask = random.random((20, 23, 23)) < share
        read = window(write, mask.shape, connection)
        whole, part = heights(mask, connection), heights(mask[read.slices], connection)
        here = ring.relative_to(read.start).slices
        np.testing.assert_array_equal(part[here], whole[ring.slices])
        differs |= (part[wider.relative_to(read.start).slices] != whole[wider.slices]).any()
    assert differs


@every_connection
@settings(max_examples=15, deadline=None)
@given(mask=masks(most=(9, 60, 60)))
def test_heights_equal_those_from_scipy(connection, mask):
    np.testing.assert_array_equal(heights(mask, connection), expected_heights(mask, connection))


@pytest.mark.parametrize("connection", [SLICE, VOLUME], ids=str)
def test_a_voxel_of_height_is_a_voxel_of_distance(connection):
    mask = np.zeros((80, 5, 5) if connection == VOLUME else (1, 160, 5), bool)
    mask.reshape(-1)[mask.size // 2 :] = True  # a wall: distances grow along one axis
    height = heights(mask, connection).max((1, 2) if connection == VOLUME else (0, 2))
    unit, cap = watershed.voxel_height(connection), watershed.REACH[connection.connect]
    inside = height[len(height) // 2 :]
    np.testing.assert_array_equal(np.diff(inside[2 : cap - 4]), unit)
    assert inside[-1] == cap * unit


# What is split


def discs(circles, shape):
    """The union of discs (y, x, radius), and the disc in which each pixel is deepest."""
    y, x = np.indices(shape)
    depth = np.stack([r - np.hypot(y - a, x - b) for a, b, r in circles])
    inside = depth.max(0) > 0
    return inside[None], np.where(inside, depth.argmax(0) + 1, 0)[None]


@short
@given(masks(), connections)
def test_each_object_is_connected(mask, connection):
    ids = instances(mask, connection)
    np.testing.assert_array_equal(ids > 0, mask)
    for number in range(1, int(ids.max()) + 1):
        assert label_components(ids == number, connection)[1] == 1


@short
@given(st.floats(1, 75), st.tuples(st.floats(0, 1), st.floats(0, 1)), st.floats(1, 3))
def test_an_ellipse_stays_whole(radius, centre, slim):
    half = int(radius) + 3
    y, x = np.indices((2 * half, 2 * half)) - half
    mask = np.hypot((y - centre[0]) * slim, x - centre[1])[None] <= radius
    assert instances(mask, SLICE).max() == label_components(mask, SLICE)[1]


@short
@given(st.integers(1, 40), st.integers(1, 90), connections)
def test_a_rectangle_stays_whole(height, width, connection):
    mask = np.pad(np.ones((1, height, width), bool), ((0, 0), (2, 2), (2, 2)))
    assert instances(mask, connection).max() == 1


@short
@given(st.floats(14, 60), st.floats(0.6, 1), st.floats(0, 0.6), st.floats(0, 6.3))
def test_two_discs_with_a_neck_become_two(radius, ratio, neck, angle):
    """`neck` is half the width of the neck, as a share of the smaller radius."""
    small = radius * ratio
    half = neck * small
    apart = np.sqrt(radius**2 - half**2) + np.sqrt(small**2 - half**2)
    side = int(3 * radius + 10)
    centre = (side + apart * np.sin(angle), side + apart * np.cos(angle))
    mask, truth = discs([(side, side, radius), (*centre, small)], (2 * side, 2 * side))
    assert instances(mask, SLICE).max() == 2
    assert seg(instances(mask, SLICE).astype(np.int64), truth).value > 0.8


def test_two_balls_become_two():
    z, y, x = np.indices((50, 50, 80))
    one, two = ((z - 25) ** 2 + (y - 25) ** 2 + (x - c) ** 2 <= 20**2 for c in (24, 56))
    ids = instances(one | two, VOLUME, (50, 20, 33))
    assert ids.max() == 2 and ids[25, 25, 24] != ids[25, 25, 56]


def test_slices_have_their_own_objects():
    cells, _ = discs([(30, 30, 20), (30, 62, 20)], (60, 90))
    ids = instances(np.concatenate([cells, cells]), SLICE)
    assert ids.max() == 4


def test_cells_that_touch_are_split(shared_data):
    """HeLa cells of the Cell Tracking Challenge, in a mask without any gaps between them."""
    folder = shared_data / "ctc/DIC-C2DH-HeLa/01_ST/SEG"
    truth = np.stack([tifffile.imread(path) for path in sorted(folder.glob("*.tif"))[:3]])
    truth = truth.astype(np.int64)
    whole, _ = label_components(truth > 0, SLICE)
    ids = instances(truth > 0, SLICE, (1, 256, 512))
    before = seg(whole, truth, per_slice=True).value
    after = seg(ids.astype(np.int64), truth, per_slice=True).value
    assert before < 0.7 and after > 0.95


# Records


@pytest.fixture
def record(near):
    near(3)
    mask = ndimage.gaussian_filter(np.random.default_rng(4).standard_normal((4, 30, 30)), 1) > 0
    plan = plan_of(mask.shape, (4, 15, 15))
    return labelled(plan, mask, VOLUME)[1][3]


def test_a_record_survives_its_bytes(record):
    assert len(record.touching) and len(record.necks)
    assert (record.targets >= 0).any() and (record.targets < 0).any()
    again = BasinRecord.from_bytes(record.to_bytes())
    for field in fields(record):
        np.testing.assert_equal(getattr(again, field.name), getattr(record, field.name))


def test_a_record_has_the_labels_of_whole_objects_merged():
    cells, _ = discs([(30, 30, 20), (30, 62, 20)], (60, 90))
    (record,) = labelled(plan_of(cells.shape, cells.shape), cells, SLICE)[1].values()
    assert record.count == 2 and not record.touching.size and not record.necks.size


@pytest.mark.parametrize(
    "changes",
    [
        lambda r: {"touching": r.touching + np.int32(r.count)},
        lambda r: {"touching": r.touching[::-1].copy()},
        lambda r: {"touching": r.touching[:0], "tops": r.tops[:0], "targets": r.targets[:0]},
        lambda r: {"tops": r.tops[1:]},
        lambda r: {"targets": r.targets[1:]},
        lambda r: {"necks": r.necks + len(r.touching)},
        lambda r: {"necks": r.necks - len(r.touching)},
        lambda r: {"low_heights": r.high_heights},
    ],
)
def test_a_record_with_impossible_values_is_refused(record, changes):
    data = replace(record, **changes(record)).to_bytes()
    with pytest.raises(DamageError):
        BasinRecord.from_bytes(data)


def test_bytes_that_changed_are_refused(record):
    data = record.to_bytes()
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(DamageError):
            BasinRecord.from_bytes(bytes(changed))


def test_a_tile_is_read_with_its_margin():
    mask, write = np.ones((1, 200, 200), bool), Box((0, 100, 0), (1, 200, 100))
    with pytest.raises(ValueError, match="margin"):
        label_basins(mask[write.slices], write, write, mask.shape, SLICE)


@pytest.mark.parametrize("share", [0.4, 0.7])
@every_connection
def test_labelling_stays_within_its_memory(near, connection, share):
    """Noise has the most basins and necks."""
    near(8)
    mask = np.random.default_rng(1).random((30, 120, 120)) < share
    write = Box((5, 20, 20), (25, 100, 100))
    read = window(write, mask.shape, connection)
    part = mask[read.slices].copy()
    label_basins(part, read, write, mask.shape, connection)  # compiles
    tracemalloc.start()
    label_basins(part, read, write, mask.shape, connection)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    bound = basin_bytes(read, write, connection)
    assert 0.2 * bound < peak < bound


def test_a_union_that_exceeds_the_memory_is_refused(near):
    near(2)
    mask = np.random.default_rng(0).random((1, 400, 400)) < 0.6
    plan = plan_of(mask.shape, (1, 100, 100))
    _, records = labelled(plan, mask, SLICE)
    least = bytes_within_tiles(records)
    assert dict(unite(plan, records.get, SLICE, max_bytes=3 * least, split=True))
    with pytest.raises(RunError, match="--memory"):
        dict(unite(plan, records.get, SLICE, max_bytes=least, split=True))


def bytes_within_tiles(records):
    """Less than the union needs: it also keeps necks between tiles."""
    return (64 << 20) + sum(48 * len(r.touching) + 80 * len(r.necks) for r in records.values())
