"""The table of objects: equal to skimage.measure.regionprops_table on the whole volume."""

import io
from dataclasses import fields, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import regionprops_table

from tests.segmentation.test_unions import bordering, cases, instances, plan_of
from unet_ray.errors import DamageError, RunError
from unet_ray.segmentation import table as table_module
from unet_ray.segmentation.components import Connection
from unet_ray.segmentation.table import TileRows, merge_rows, table_bytes, write_table
from unet_ray.tiling.boxes import Box

ENOUGH = 1 << 30
CUBE = Connection()


def tile_rows(ids, *others):
    """The rows of a tile, given the id of each voxel. Each run of voxels has a label of its own."""
    starts = np.diff(ids.reshape(-1), prepend=np.uint64(0)) != 0
    numbers = np.concatenate([np.zeros(1, np.uint64), ids.reshape(-1)[starts]])
    labels = np.cumsum(starts, dtype=np.int32).reshape(ids.shape)
    return TileRows.of(np.where(ids, labels, 0), numbers, *others)


def rows_of(plan, ids, probabilities, grey, connection=CUBE):
    """The rows of all tiles, through their bytes."""
    for index in range(len(plan)):
        write = plan[index].write
        probabilities_of_tile, grey_of_tile = (
            None if values is None else values[:, *write.slices] for values in (probabilities, grey)
        )
        rows = tile_rows(
            ids[write.slices], write, plan.shape, probabilities_of_tile, grey_of_tile, connection
        )
        yield TileRows.from_bytes(rows.to_bytes())


def columns(table):
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def expected(ids, probabilities, grey, connection, voxel_size):
    """The same columns by scikit-image, on the whole volume."""
    # Labels of scikit-image are small.
    numbers, labels = np.unique(ids, return_inverse=True)
    labels = labels.reshape(ids.shape) + (numbers[0] != 0)
    numbers = numbers[numbers != 0]
    props = regionprops_table(labels, properties=("area", "bbox", "centroid"))
    result = {"id": numbers, "voxels": props["area"].astype(np.uint64)}
    result["volume"] = props["area"] * np.prod(voxel_size)
    for name, source, first in (
        ("centroid", "centroid", 0),
        ("start", "bbox", 0),
        ("stop", "bbox", 3),
    ):
        result |= {f"{name}_{'zyx'[axis]}": props[f"{source}-{axis + first}"] for axis in range(3)}

    def mean(image):
        return regionprops_table(labels, image, properties=("mean_intensity",))["mean_intensity"]

    if probabilities is not None:
        result["mean_probability"] = sum(mean(channel / 255) for channel in probabilities)
    for number, channel in enumerate(() if grey is None else grey):
        result[f"mean_grey_{number}"] = mean(channel.astype(np.float64))
    border = bordering(ids.shape, connection)
    result["border"] = np.array([(border & (ids == number)).any() for number in numbers], bool)
    return result


def drawn_image(random, dtype, shape):
    if np.dtype(dtype).kind == "f":
        return random.normal(100, 50, shape).astype(dtype)
    # Means of larger integers are not exact in scikit-image.
    return random.integers(0, min(np.iinfo(dtype).max, 1 << 40), shape).astype(dtype)


images = st.sampled_from([None, "u1", "<u2", ">u2", "i2", "u4", "i8", "f2", "f4", ">f4", "f8"])


@settings(max_examples=120, deadline=None)
@given(
    cases(), images, st.integers(1, 2), st.integers(0, 2), st.sampled_from(["dense", "first-voxel"])
)
def test_table_equals_scikit_image_on_the_whole_volume(case, dtype, channels, foreground, kind):
    mask, plan, connection = case
    random = np.random.default_rng(mask.size)
    ids = instances(plan, mask, connection, ids=kind)
    grey = None if dtype is None else drawn_image(random, dtype, (channels, *mask.shape))
    probabilities = drawn_image(random, "u1", (foreground, *mask.shape)) if foreground else None
    rows = rows_of(plan, ids, probabilities, grey, connection)
    table = columns(merge_rows(rows, (0.5, 0.2, 0.1), ENOUGH))
    whole = ids if ids.any() else np.ones_like(ids)  # scikit-image refuses a volume of no object
    right = expected(whole, probabilities, grey, connection, (0.5, 0.2, 0.1))
    assert list(table) == list(right)
    for name, values in right.items():
        if not ids.any():
            values = values[:0]
        if values.dtype.kind == "f":
            np.testing.assert_allclose(table[name], values, rtol=1e-12)
        else:
            np.testing.assert_array_equal(table[name], values)
        assert table[name].dtype == values.dtype


def sample_rows(seed=0, dtype="u2"):
    """Rows of the first tile of a volume, with probabilities and two channels."""
    random = np.random.default_rng(seed)
    shape = (2, 6, 8)
    ids = random.integers(0, 5, shape).astype(np.uint64)
    grey = drawn_image(random, dtype, (2, *shape))
    probabilities = drawn_image(random, "u1", (1, *shape))
    return tile_rows(ids, Box.of(shape), (4, 6, 8), probabilities, grey, CUBE)


def test_a_table_has_units_and_survives_parquet():
    table = merge_rows([sample_rows(1), sample_rows(2)], (1, 0.5, 0.5), ENOUGH)
    data = write_table(table)
    assert data == write_table(merge_rows([sample_rows(1), sample_rows(2)], (1, 0.5, 0.5), ENOUGH))
    read = pq.read_table(io.BytesIO(data))
    assert read.equals(table)
    units = {field.name: (field.metadata or {}).get(b"unit") for field in read.schema}
    assert units["volume"] == b"micrometer^3"
    assert units["voxels"] == units["centroid_z"] == units["start_x"] == b"voxel"
    assert units["id"] is units["border"] is units["mean_probability"] is None
    assert read["volume"].to_pylist() == [n / 4 for n in read["voxels"].to_pylist()]


def test_the_volume_is_null_without_a_voxel_size():
    table = merge_rows([sample_rows()], None, ENOUGH)
    assert table["volume"].null_count == len(table) == 4


def test_a_table_of_no_tiles_is_empty():
    table = merge_rows([], None, ENOUGH)
    assert len(table) == 0
    assert table.column_names[0] == "id"


def test_a_large_table_has_several_row_groups(monkeypatch):
    monkeypatch.setattr(table_module, "ROW_GROUP", 3)
    file = pq.ParquetFile(io.BytesIO(write_table(merge_rows([sample_rows()], None, ENOUGH))))
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [3, 1]


def test_sums_of_integers_are_exact():
    ids = np.ones((1, 1, 3), np.uint64)
    grey = np.array([2**32 - 1, 2**32 - 1, 1], np.uint32).reshape(1, 1, 1, 3)
    rows = tile_rows(ids, Box.of(ids.shape), ids.shape, None, grey, CUBE)
    assert rows.greys.tolist() == [[2**33 - 1]]
    merged = TileRows.merged([rows] * 1000)
    assert merged.greys.tolist() == [[1000 * (2**33 - 1)]]
    assert merged.voxels.tolist() == [3000]


def test_ids_above_2_to_the_53_stay_apart():
    ids = np.array([2**60, 2**60 + 1, 2**64 - 1], np.uint64).reshape(1, 1, 3)
    rows = tile_rows(ids, Box.of(ids.shape), ids.shape, None, None, CUBE)
    table = merge_rows([rows, rows], None, ENOUGH)
    assert table["id"].to_pylist() == [2**60, 2**60 + 1, 2**64 - 1]
    assert table["voxels"].to_pylist() == [2, 2, 2]


def test_rows_do_not_depend_on_the_batches_of_a_merge(monkeypatch):
    parts = [sample_rows(seed) for seed in range(20)]
    once = merge_rows(parts, None, ENOUGH)
    monkeypatch.setattr(table_module, "BATCH_BYTES", 1)
    assert merge_rows(iter(parts), None, ENOUGH).equals(once)


def test_a_table_beyond_the_memory_is_refused_with_what_it_needs(monkeypatch):
    monkeypatch.setattr(table_module, "BATCH_BYTES", 1)
    ids = np.arange(1, 1001, dtype=np.uint64).reshape(10, 10, 10)
    plan = plan_of(ids.shape, (1, 10, 10))

    def rows():
        return rows_of(plan, ids, None, None)

    needed = table_bytes(1000, 0)
    assert len(merge_rows(rows(), None, needed)) == 1000
    with pytest.raises(RunError, match=r"1000 objects needs .* are allowed; use --memory 1MiB"):
        merge_rows(rows(), None, needed - 1)
    with pytest.raises(RunError, match="1000 objects"):
        merge_rows(rows(), None, 1)


def test_tiles_with_different_channels_are_refused():
    with pytest.raises(DamageError, match="different channels"):
        merge_rows([sample_rows(dtype="u1"), sample_rows(dtype="f4")], None, ENOUGH)


# Bytes


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_rows_survive_their_bytes(dtype):
    rows = sample_rows(dtype=dtype)
    again = TileRows.from_bytes(rows.to_bytes())
    for field in fields(rows):
        first, second = getattr(rows, field.name), getattr(again, field.name)
        np.testing.assert_array_equal(first, second)
        assert first.dtype == second.dtype
    assert again.to_bytes() == rows.to_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"ids": np.array([0, 1, 2, 3], np.uint64)},
        {"ids": np.array([1, 3, 2, 4], np.uint64)},
        {"ids": np.array([1, 2, 3], np.uint64)},
        {"voxels": np.array([1, 0, 1, 1])},
        {"voxels": np.array([1, 1, 1])},
        {"start": np.full((4, 3), 9)},
        {"start": np.full((4, 3), -1)},
        {"border": np.zeros(5, bool)},
        {"greys": np.zeros((3, 2), np.int64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_rows_that_cannot_be_are_damage(change):
    with pytest.raises(DamageError):
        TileRows.from_bytes(replace(sample_rows(), **change).to_bytes())
